"""SQuAD: files, windows and answers beside transformers' own, measures beside the official script's results."""

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from toy_tasks import squad_file

from experiments import squad
from experiments.squad import Question

WORDS = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *".,?!'", *map(str, range(10))]


@pytest.fixture(scope="module")
def tokenizer():
    """A token a letter, between the special tokens of RoBERTa."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    inner.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token="<s>", pad_token="<pad>", sep_token="</s>", unk_token="<unk>"
    )


def test_files_of_both_versions(tmp_path):
    one, two = squad.read(squad_file(tmp_path / "dev-v2.0.json"))
    assert (one.text, one.answers, one.starts) == ("what?", ("qrst", "qrst uvw"), (21, 21))
    assert two.answers == two.starts == () and two.context[21:25] == "qrst"
    assert squad.read(squad_file(tmp_path / "dev-v1.1.json", "1.1")) == [one]
    with pytest.raises(FileNotFoundError, match=r"train-v1.1.json is not there: .*dev-v2.0.json, with --data"):
        squad.read(tmp_path / "train-v1.1.json")
    for text in ('{"data": [{"paragraphs": [{}]}]}', "{", '{"data": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json is not a file of SQuAD's format"):
            squad.read(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="has no questions"):
        squad.read(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        # From evaluate-v2.0.py: compute_exact and compute_f1, the largest over the answers.
        ("Denver Broncos", ["Denver Broncos", "The Denver Broncos!"], 1.0, 1.0),
        ("the  denver broncos.", ["Denver Broncos"], 1.0, 1.0),
        ("Broncos of Denver, Colorado", ["Denver Broncos", "Broncos"], 0.0, 2 / 3),
        ("Denver Denver", ["Denver"], 0.0, 2 / 3),
        ("Santa Clara, California", ["Levi's Stadium"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("", ["something"], 0.0, 0.0),
        ("an", ["the", "a"], 1.0, 1.0),
    ],
)
def test_measures_are_the_official_scripts(text, answers, exact, f1):
    assert squad.exact_match(text, answers) == exact
    assert squad.f1(text, answers) == pytest.approx(f1)


def test_scores_are_means_in_percent():
    found = squad.score(["Broncos", "x y", ""], [["broncos"], ["x"], []])
    assert found == pytest.approx((100 * 2 / 3, 100 * (1 + 2 / 3 + 1) / 3))
    with pytest.raises(ValueError, match="no questions to score"):
        squad.score([], [])


def test_windows_cover_the_context_and_find_the_answer(tmp_path, tokenizer):
    questions = squad.read(squad_file(tmp_path / "dev-v2.0.json"))
    found = squad.windows(questions, tokenizer, length=20, stride=3)
    # <s> and three </s> and the question of 5 or 4 letters leave 11 or 12 of 26 letters, each window 8 or 9 further.
    assert found.question.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.rows["tokens"].shape == found.rows["mask"].shape == found.offsets.shape[:2] == (6, 20)
    assert found.rows["mask"].sum(1).tolist() == [20, 20, 19, 20, 20, 16] and "types" not in found.rows
    context = questions[0].context
    for row in range(6):
        covered = [context[a:b] for a, b in found.offsets[row] if a >= 0]
        read = tokenizer.convert_ids_to_tokens(found.rows["tokens"][row][found.offsets[row, :, 0] >= 0])
        assert covered == read and len(covered) >= 7
    spans = np.stack([found.rows["starts"], found.rows["ends"]], 1).tolist()
    assert spans[:2] == [[0, 0]] * 2 and spans[3:] == [[0, 0]] * 3  # s is cut from t there; no answer at all
    assert context[found.offsets[2, spans[2][0], 0] : found.offsets[2, spans[2][1], 1]] == "qrst"
    whole = squad.windows(questions[:1], tokenizer, length=48, stride=3)
    assert len(whole.question) == 1 and whole.rows["mask"].sum() == 35
    with pytest.raises(ValueError, match="question one has 5 tokens and windows of 12 have room for 4"):
        squad.windows(questions, tokenizer, length=12, stride=3)
    with pytest.raises(ValueError, match="a fast tokenizer that pads on the right"):
        squad.windows(questions, object())


def reference(scores, offsets, context, empty):
    """The best answer by looking at every pair of all windows of one question."""
    best, none = ("", -np.inf), np.inf
    for (starts, ends), where in zip(scores.swapaxes(1, 2), offsets, strict=True):
        none = min(none, starts[0] + ends[0])
        inside = [i for i, (a, _) in enumerate(where) if a >= 0]
        top = [sorted(inside, key=lambda i: -x[i])[: squad.CANDIDATES] for x in (starts, ends)]
        for i in top[0]:
            for j in top[1]:
                if i <= j < i + squad.LONGEST and starts[i] + ends[j] > best[1]:
                    best = (context[where[i][0] : where[j][1]], starts[i] + ends[j])
    return "" if empty and none > best[1] else best[0]


def test_answers_are_the_best_allowed_pairs(tokenizer):
    rng = np.random.default_rng(0)
    context = " ".join("".join(rng.choice(list("abcdefghij"), rng.integers(1, 7))) for _ in range(80))
    questions = [Question(str(i), "why?", context[: 40 + 35 * i], (), ()) for i in range(8)]
    found = squad.windows(questions, tokenizer, length=64, stride=16)
    scores = rng.normal(size=(*found.offsets.shape[:2], 2)).astype(np.float32)
    scores[:, 0] += 2.0  # at the first token: some questions are then left without an answer, others not
    for empty in (False, True):
        texts = squad.texts(questions, found, scores, empty=empty)
        for i, question in enumerate(questions):
            mine = found.question == i
            assert texts[i] == reference(scores[mine], found.offsets[mine].tolist(), question.context, empty)
        assert texts.count("") == 0 if not empty else 0 < texts.count("") < 8
    start = context.index(" ", 100) + 1
    answer = context[start : context.index(" ", start + 8)]
    question = Question("x", "why?", context, (answer,), (start,))
    found = squad.windows([question], tokenizer, length=64, stride=16)
    right = np.full((*found.offsets.shape[:2], 2), -5.0, np.float32)
    for row, (first, last) in enumerate(zip(found.rows["starts"], found.rows["ends"], strict=True)):
        right[row, first, 0] = right[row, last, 1] = 5.0
    assert squad.texts([question], found, right) == [answer]
    assert squad.score(squad.texts([question], found, right, empty=True), [question.answers]).f1 == 100
