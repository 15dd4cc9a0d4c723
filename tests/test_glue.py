"""GLUE: files of each task in both formats, what encoders read of them, and measures beside other libraries'."""

import json

import numpy as np
import pytest
import scipy.stats
import toy_glue
import toy_tokenizer

from experiments import glue


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
@pytest.mark.parametrize("task", list(glue.TASKS))
def test_each_task_is_read(tmp_path, task, kind):
    toy_glue.write(tmp_path, task, kind)
    for split in ("train", *glue.splits(task)):
        found = glue.read(tmp_path, task, split)
        assert found == [glue.Example(*example) for example in toy_glue.EXAMPLES[task]]
    assert len(found[0].texts) == (1 if task in ("cola", "sst2") else 2)


def test_files_that_are_not_the_tasks_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.tsv or .jsonl is not there: give GLUE's folder with --data"):
        glue.read(tmp_path, "rte", "train")
    toy_glue.write(tmp_path, "rte", "tsv")
    path = tmp_path / "RTE" / "dev.tsv"
    good = path.read_text()
    for broken, words in (
        (good.replace("\tentailment", "\tmaybe"), r"line 2 is not an answered example of rte"),
        (good + "3\tone text\n", r"line 4 is not an answered example of rte \(too few columns\)"),
        (good.replace("sentence2", "text"), r"has no column 'sentence2': it has index, sentence1, text, label"),
        (good.splitlines()[0] + "\n", r"dev.tsv is empty"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=words):
            glue.read(tmp_path, "rte", "dev")
    (tmp_path / "QNLI").mkdir()
    (tmp_path / "QNLI" / "dev.jsonl").write_text(json.dumps({"question": "why?", "label": 0}) + "\n")
    with pytest.raises(ValueError, match=r"dev.jsonl, line 1 is not an example with question, sentence, label"):
        glue.read(tmp_path, "qnli", "dev")
    (tmp_path / "QNLI" / "dev.jsonl").write_text(json.dumps({"question": "why?", "sentence": "So.", "label": 2}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 is not an answered example of qnli"):
        glue.read(tmp_path, "qnli", "dev")


def test_qqps_broken_lines_are_passed_over(tmp_path):
    toy_glue.write(tmp_path, "qqp", "tsv")
    path = tmp_path / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "7\t8\t9\ta question alone\n")
    assert len(glue.read(tmp_path, "qqp", "train")) == 2


def test_encoders_read_one_text_or_two():
    tokenizer = toy_tokenizer.roberta()
    pairs = [glue.Example(("It rained.", "It was wet."), 1), glue.Example(("a", "b"), 0)]
    rows = glue.rows(pairs, tokenizer, 40, score=False)
    assert tokenizer.decode(rows["tokens"][0][rows["mask"][0]]) == "<s>It rained.</s></s>It was wet.</s>"
    assert rows["tokens"].shape == (2, 40) and rows["labels"].dtype == np.int32 and rows["labels"].tolist() == [1, 0]
    rows = glue.rows([glue.Example(("It rained.",), 2.5)], tokenizer, 8, score=True)
    assert tokenizer.decode(rows["tokens"][0]) == "<s>It rai</s>" and rows["labels"].tolist() == [2.5]
    assert rows["labels"].dtype == np.float32


# Of sklearn.metrics, 1.9: matthews_corrcoef, f1_score.
MINE, RIGHT = [1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 0, 1, 1]


def test_measures_are_scikit_learns_and_scipys():
    assert glue.score("cola", MINE, RIGHT) == pytest.approx((46.666666666666664, 75))
    assert glue.score("mrpc", MINE, RIGHT) == pytest.approx((75, 80))
    assert glue.score("rte", MINE, RIGHT) == pytest.approx((75, 75))
    random = np.random.default_rng(0)
    mine, right = random.normal(size=50), random.integers(0, 11, 50) / 2
    expected = [100 * float(of(mine, right).statistic) for of in (scipy.stats.pearsonr, scipy.stats.spearmanr)]
    assert glue.score("stsb", mine, right) == pytest.approx(expected)
    assert glue.score("cola", [1, 1], [0, 1]).score == 0 and glue.score("mrpc", [0], [0]).beside == 0
    with pytest.raises(ValueError, match=r"qqp: \(1,\) predictions do not match \(2,\) labels"):
        glue.score("qqp", [1], [1, 0])
