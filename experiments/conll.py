"""Named entities: column files, a label for each word's first piece, and F1 over whole entities.

    EU NNP B-NP B-ORG
    rejects VBZ B-VP O

One word a line, its tag in the last column, an empty line between sentences, ``-DOCSTART-`` between documents: the
files of CoNLL-2003 (Tjong Kim Sang & De Meulder 2003) and those that THUDM/P-tuning-v2 reads (tasks/ner/datasets) for
CoNLL04 (Roth & Yih 2004) and OntoNotes 5.0 (columns between tabs, the word in the second).  Tags may be IOB1, as in the
original files, or IOB2: they are read as IOB2.

F1 is that of the shared task's script, conlleval: an entity counts if its words and its kind are right; an I- that
continues nothing begins an entity.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax.training.data import Rows

Entity = tuple[str, int, int]  # (kind, first word, last word)


class Sentence(NamedTuple):
    words: list[str]
    tags: list[str]  # IOB2


# -- tags and measures ------------------------------------------------------------------------------------------------


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence's tags.

    >>> from experiments import conll
    >>> conll.entities(["B-PER", "I-PER", "I-LOC", "O", "B-LOC", "B-LOC"])
    [('PER', 0, 1), ('LOC', 2, 2), ('LOC', 4, 4), ('LOC', 5, 5)]
    """
    found: list[Entity] = []
    before = "O"
    for place, tag in enumerate(tags):
        if tag != "O":
            kind = tag[2:]
            goes_on = tag[0] == "I" and before[2:] == kind
            found.append((kind, found.pop()[1] if goes_on else place, place))
        before = tag
    return found


def iob2(tags: Sequence[str]) -> list[str]:
    """The same entities, each beginning with B-."""
    found = ["O"] * len(tags)
    for kind, first, last in entities(tags):
        found[first : last + 1] = [f"B-{kind}"] + [f"I-{kind}"] * (last - first)
    return found


class Score(NamedTuple):
    """Over all entities, in percent; `sentences` is how many have every tag right."""

    precision: float
    recall: float
    f1: float
    sentences: float


def score(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> Score:
    """How the tags of sentences agree with those that are right."""
    right = given = true = whole = 0
    for mine, theirs in zip(predicted, wanted, strict=True):
        if len(mine) != len(theirs):
            raise ValueError(f"a sentence of {len(theirs)} words has {len(mine)} tags")
        ours, gold = set(entities(mine)), set(entities(theirs))
        right, given, true, whole = (
            right + len(ours & gold),
            given + len(ours),
            true + len(gold),
            whole + (ours == gold),
        )
    f1 = 2 * right / (given + true) if given + true else 0.0
    return Score(*(100 * x for x in (right / max(given, 1), right / max(true, 1), f1, whole / max(len(wanted), 1))))


# -- files ------------------------------------------------------------------------------------------------------------


def read(path: Path, column: int = 0) -> list[Sentence]:
    """The sentences of a file; words stand in `column`, columns are separated by tabs or else by spaces.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if a line has no such columns or no such tag, with its number; if the file is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the folder that holds it (a word and its tags a line)")
    found = [Sentence([word for word, _ in lines], iob2([tag for _, tag in lines])) for lines in _lines(path, column)]
    if not found:
        raise ValueError(f"{path} is empty: it has no sentences")
    return found


def _lines(path: Path, column: int) -> Iterator[list[tuple[str, str]]]:
    """(word, tag) of each sentence."""
    sentence: list[tuple[str, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if sentence:
                yield sentence
            sentence = []
            continue
        columns = line.rstrip().split("\t" if "\t" in line else " ")
        tag = columns[-1]
        if len(columns) < column + 2 or not (tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)):
            raise ValueError(
                f"{path}, line {number}: a line ends with O, B-KIND or I-KIND, this is {line.strip()[:60]!r}"
            )
        sentence.append((columns[column], tag))
    if sentence:
        yield sentence


def labels(sentences: Sequence[Sentence]) -> list[str]:
    """All tags, O first: what a head chooses from."""
    return ["O", *sorted({tag for sentence in sentences for tag in sentence.tags} - {"O"})]


# -- rows -------------------------------------------------------------------------------------------------------------


def rows(sentences: Sequence[Sentence], names: Sequence[str], tokenizer: Any, longest: int, multiple: int = 32) -> Rows:
    """One sentence a row: tokens, mask, and targets that weigh at each word's first piece alone.

    Rows are as long as the longest of them, up to a `multiple`, and no longer than `longest`: what does not fit is cut,
    and `tags` then calls those words O.  A tag that is not among `names` is O here; `score` compares with what it is.
    """
    index = {name: i for i, name in enumerate(names)}
    pieces = [tokenizer([f" {w}" for w in s.words], add_special_tokens=False)["input_ids"] for s in sentences]
    length = min(longest, -(-max(2 + sum(map(len, words)) for words in pieces) // multiple) * multiple)
    shape = (len(sentences), length)
    found = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets")}
    found |= {"weights": np.zeros(shape, np.float32), "mask": np.zeros(shape, bool)}
    found["tokens"][:] = tokenizer.pad_token_id
    for row, (words, sentence) in enumerate(zip(pieces, sentences, strict=True)):
        starts = np.cumsum([1, *map(len, words)])[:-1]
        kept = starts < length - 1
        inner = [token for word in words for token in word][: length - 2]
        tokens = [tokenizer.cls_token_id, *inner, tokenizer.sep_token_id]
        found["tokens"][row, : len(tokens)], found["mask"][row, : len(tokens)] = tokens, True
        found["targets"][row, starts[kept]] = np.array([index.get(t, 0) for t in sentence.tags], np.int32)[kept]
        found["weights"][row, starts[kept]] = 1
    return found


def tags(sentences: Sequence[Sentence], rows: Rows, predicted: np.ndarray, names: Sequence[str]) -> list[list[str]]:
    """Each word's tag, from the labels ``[rows, time]`` that were chosen for the tokens."""
    found = []
    for sentence, weights, chosen in zip(sentences, rows["weights"], predicted, strict=True):
        mine = [names[i] for i in chosen[weights > 0]]
        found.append([*mine, *["O"] * (len(sentence.words) - len(mine))])
    return found
