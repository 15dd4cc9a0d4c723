"""Tagging: column files, labels at first pieces, and entity F1 beside seqeval's results."""

import numpy as np
import pytest
import toy_tokenizer
from toy_tasks import CONLL03

from experiments import conll


@pytest.fixture(scope="module")
def tokenizer():
    """A token a letter, but for e and g at the start of a word."""
    return toy_tokenizer.roberta()


def test_files_in_either_tagging_are_read_alike(tmp_path):
    (tmp_path / "train.txt").write_text(CONLL03)
    first, second = conll.read(tmp_path / "train.txt")
    assert first == (["EU", "rejects", "German", "call"], ["B-ORG", "O", "B-MISC", "O"])
    assert second.tags == ["B-LOC", "I-LOC", "B-LOC"]
    (tmp_path / "iob2.txt").write_text(CONLL03.replace("I-ORG", "B-ORG").replace("New NNP I-NP I", "New NNP I-NP B"))
    assert conll.read(tmp_path / "iob2.txt") == [first, second]
    assert conll.labels([first, second]) == ["O", "B-LOC", "B-MISC", "B-ORG", "I-LOC"]
    columns = "\n".join(f"{i}\t{w}\t_\tNN\t{t}" for i, (w, t) in enumerate(zip(*first, strict=True), 1))
    (tmp_path / "train.sd.conllx").write_text(columns + "\n")
    assert conll.read(tmp_path / "train.sd.conllx", column=1) == [first]


def test_files_of_another_format_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"valid.txt is not there"):
        conll.read(tmp_path / "valid.txt")
    for text in ("EU NNP I-NP I-ORG\nrejects VBZ I-VP 0\n", "EU B-ORG\nO\n", "EU B-ORG\nsays B-\n"):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(ValueError, match=r"bad.txt, line 2: a line ends with O, B-KIND or I-KIND, this is"):
            conll.read(tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_text("-DOCSTART- O\n\n")
    with pytest.raises(ValueError, match=r"bad.txt is empty"):
        conll.read(tmp_path / "bad.txt")


WANTED = [
    ["B-PER", "I-PER", "O", "B-LOC", "O"],
    ["I-ORG", "I-ORG", "B-ORG", "O", "I-LOC"],
    ["B-MISC", "I-MISC", "I-MISC", "O", "O", "B-PER"],
    ["O", "O", "O"],
    ["O", "B-LOC"],
]
GIVEN = [
    ["B-PER", "I-PER", "O", "B-LOC", "I-LOC"],
    ["B-ORG", "I-ORG", "I-ORG", "O", "I-LOC"],
    ["B-MISC", "I-PER", "I-MISC", "O", "B-PER", "I-PER"],
    ["O", "B-LOC", "B-LOC"],
    ["O", "I-LOC"],
]


def test_entities_and_f1_are_seqevals():
    # seqeval 1.2.2, get_entities of each, and its scores of the first four sentences: .2, .2857142857, .2352941176.
    assert [conll.entities(tags) for tags in GIVEN[:4]] == [
        [("PER", 0, 1), ("LOC", 3, 4)],
        [("ORG", 0, 2), ("LOC", 4, 4)],
        [("MISC", 0, 0), ("PER", 1, 1), ("MISC", 2, 2), ("PER", 4, 5)],
        [("LOC", 1, 1), ("LOC", 2, 2)],
    ]
    assert [conll.entities(tags) for tags in WANTED[1:3]] == [
        [("ORG", 0, 1), ("ORG", 2, 2), ("LOC", 4, 4)],
        [("MISC", 0, 2), ("PER", 5, 5)],
    ]
    assert conll.score(GIVEN[:4], WANTED[:4]) == pytest.approx((20, 28.57142857, 23.52941176, 0))
    assert conll.score(GIVEN, WANTED).sentences == pytest.approx(20)  # the fifth, tagged otherwise but alike
    assert conll.score([["O"]], [["O"]]) == (0, 0, 0, 100)
    with pytest.raises(ValueError, match="a sentence of 5 words has 4 tags"):
        conll.score([GIVEN[0][:4]], WANTED[:1])


def test_labels_stand_at_first_pieces_alone(tokenizer):
    sentences = [
        conll.Sentence(["eu", "says", "german", "go"], ["B-ORG", "O", "B-MISC", "O"]),
        conll.Sentence(["york"], ["B-LOC"]),
    ]
    names = conll.labels(sentences)
    rows = conll.rows(sentences, names, tokenizer, longest=64, multiple=8)
    pieces = [
        tokenizer.convert_ids_to_tokens(row[mask]) for row, mask in zip(rows["tokens"], rows["mask"], strict=True)
    ]
    assert pieces[0] == ["<s>", "Ġe", "u", "Ġ", *"says", "Ġg", *"erman", "Ġg", "o", "</s>"]
    assert pieces[1] == ["<s>", "Ġ", *"york", "</s>"] and rows["tokens"].shape == (2, 24)
    assert np.flatnonzero(rows["weights"][0]).tolist() == [1, 3, 8, 14]
    assert [names[i] for i in rows["targets"][0, [1, 3, 8, 14]]] == sentences[0].tags
    assert (rows["tokens"][1, 7:] == tokenizer.pad_token_id).all() and not rows["weights"][1, 2:].any()
    wanted = [sentence.tags for sentence in sentences]
    assert conll.tags(sentences, rows, rows["targets"], names) == wanted
    cut = conll.rows(sentences, names, tokenizer, longest=10, multiple=8)
    assert cut["tokens"].shape == (2, 10) and cut["tokens"][0, 9] == tokenizer.sep_token_id
    assert conll.tags(sentences, cut, cut["targets"], names) == [["B-ORG", "O", "B-MISC", "O"], ["B-LOC"]]
    assert conll.tags(sentences, cut, np.full((2, 10), 1), names) == [["B-LOC"] * 3 + ["O"], ["B-LOC"]]
