"""SuperGLUE: files of each task, what encoders and T5 read of them, and measures beside scikit-learn's results."""

import numpy as np
import pytest
import toy_tokenizer
from toy_tasks import LINES, write

from experiments import superglue

LABELS = {"boolq": 1, "cb": 1, "copa": 0, "rte": 1, "wic": 0, "wsc": 1}


@pytest.mark.parametrize("task", list(LINES))
def test_each_task_is_read_and_answered(tmp_path, task):
    write(tmp_path, task, "train", [LINES[task], LINES[task]])
    first, second = superglue.read(tmp_path, task, "train")
    assert first == second == (LINES[task], LABELS[task])
    with pytest.raises(FileNotFoundError, match=r"val.jsonl is not there: give the folder of SuperGLUE's folders"):
        superglue.read(tmp_path, task, "val")
    broken = {name: value for name, value in LINES[task].items() if name != "label"}  # as in test.jsonl
    other = LINES["copa" if task == "cb" else "cb"]
    for line in (broken, LINES[task] | {"label": "maybe"}, LINES[task] | {"label": 3}, other, [1]):
        write(tmp_path, task, "val", [LINES[task], line])
        with pytest.raises(ValueError, match=rf"val.jsonl, line 2 is not an answered example of {task}"):
            superglue.read(tmp_path, task, "val")
    write(tmp_path, task, "val", [])
    with pytest.raises(ValueError, match=r"val.jsonl is empty"):
        superglue.read(tmp_path, task, "val")


READ = {
    "boolq": ["<s>is it a pub</s></s>The Mill is a pub.</s>"],
    "cb": ["<s>It rained.</s></s>It was wet.</s>"],
    "copa": ["<s>It rained. so</s></s>I got wet.</s>", "<s>It rained. so</s></s>I sang.</s>"],
    "rte": ["<s>It rained.</s></s>It was wet.</s>"],
    "wic": ["<s>A bank. The bank. Does bank have the same meaning in both sentences?</s>"],
    "wsc": ["<s>he: Mark told Pete that he won.</s></s>Mark</s>"],
}


@pytest.mark.parametrize("task", list(LINES))
def test_encoders_read_the_authors_words(task):
    tokenizer = toy_tokenizer.roberta()
    examples = [superglue.Example(LINES[task], LABELS[task])] * 3
    rows = superglue.pair_rows(examples, task, tokenizer, 80)
    assert rows["tokens"].shape == rows["mask"].shape == ((3, 2, 80) if task == "copa" else (3, 80))
    flat = {name: x.reshape(-1, 80) for name, x in rows.items() if name != "labels"}
    read = [tokenizer.decode(t[m]) for t, m in zip(flat["tokens"], flat["mask"], strict=True)]
    assert read == READ[task] * 3 and rows["labels"].tolist() == [LABELS[task]] * 3
    cut = superglue.pair_rows(examples, task, tokenizer, 20)
    assert cut["mask"].all() or task == "copa"


def test_a_pair_loses_the_end_of_its_longer_text():
    tokenizer = toy_tokenizer.roberta()
    rows = superglue.pair_rows([superglue.Example(LINES["boolq"], 1)], "boolq", tokenizer, 28)
    assert tokenizer.decode(rows["tokens"][0]) == "<s>is it a pub</s></s>The Mill is a</s>"
    why = superglue.Example(LINES["copa"] | {"question": "cause"}, 0)
    rows = superglue.pair_rows([why], "copa", tokenizer, 60)
    assert "It rained. because</s>" in tokenizer.decode(rows["tokens"][0, 0])


def test_t5_reads_its_own_words():
    # t5.data.preprocessors.glue of these fields, without its first word.
    assert {task: superglue.text(task, LINES[task]) for task in superglue.TEXT_TO_TEXT} == {
        "boolq": "passage: The Mill is a pub. question: is it a pub",
        "cb": "hypothesis: It was wet. premise: It rained.",
        "copa": "choice1: I got wet. choice2: I sang. premise: It rained. question: effect",
        "rte": "hypothesis: It was wet. premise: It rained.",
        "wic": "sentence1: A bank. sentence2: The bank. word: bank",
    }
    with pytest.raises(ValueError, match="wsc is not text to text here: choose from boolq, cb"):
        superglue.text("wsc", LINES["wsc"])


def test_measures_are_scikit_learns():
    # sklearn.metrics.f1_score(..., average="macro"), scikit-learn 1.9.
    for predicted, right, f1 in (
        ([0, 0, 1, 2, 2, 1, 0], [0, 1, 1, 2, 0, 1, 0], 0.7111111111111111),
        ([0, 0, 1, 1], [0, 1, 1, 1], 0.7333333333333334),
        ([0, 0, 1, 1], [0, 2, 1, 1], 0.5555555555555555),
    ):
        assert superglue.macro_f1(np.array(predicted), np.array(right)) == pytest.approx(f1)
        found = superglue.score("cb", predicted, right)
        assert found.accuracy == pytest.approx(100 * np.mean(np.equal(predicted, right)))
        assert found.score == pytest.approx((found.accuracy + 100 * f1) / 2)
    assert superglue.score("rte", [0, 1, 1], [0, 1, 0]) == pytest.approx((200 / 3, 200 / 3))
    with pytest.raises(ValueError, match=r"rte: \(2,\) predictions do not match \(3,\) labels"):
        superglue.score("rte", [0, 1], [0, 1, 0])
