"""GLUE (Wang et al. 2018, arXiv:1804.07461): its eight tasks for encoders, and their measures.

Files are the official TSV, {train,dev}.tsv in the folders CoLA, SST-2, MRPC, QQP, STS-B, MNLI (dev_matched.tsv and
dev_mismatched.tsv), QNLI and RTE; or JSON lines of the same names that end in .jsonl, with the fields of the Hub's
``glue`` data set.  A file's kind is told by which of the two is there.

Measures are the benchmark's: Matthews' correlation for CoLA, Pearson's and Spearman's for STS-B, accuracy for the
others, with F1 of the paraphrases beside it for MRPC and QQP.

Departures: a line of QQP with too few columns, of which the official file has some, is passed over as the official
reader does; in other files it raises.  WNLI is left out, as by all papers here.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax.training.data import Rows

ENTAILED = ("entailment", "not_entailment")


class Kind(NamedTuple):
    """A task's folder, its columns (texts, then the label) in TSV and in JSON, and the labels by number; () for a
    score.  Columns are names, or numbers where the file has no header."""

    folder: str
    tsv: tuple[Any, ...]
    fields: tuple[str, ...]
    labels: tuple[str, ...] = ("0", "1")


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": Kind("CoLA", (3, 1), ("sentence", "label")),
    "sst2": Kind("SST-2", ("sentence", "label"), ("sentence", "label")),
    "mrpc": Kind("MRPC", ("#1 String", "#2 String", "Quality"), (*PAIR, "label")),
    "qqp": Kind("QQP", ("question1", "question2", "is_duplicate"), ("question1", "question2", "label")),
    "stsb": Kind("STS-B", (*PAIR, "score"), (*PAIR, "label"), ()),
    "mnli": Kind(
        "MNLI",
        (*PAIR, "gold_label"),
        ("premise", "hypothesis", "label"),
        ("entailment", "neutral", "contradiction"),
    ),
    "qnli": Kind("QNLI", ("question", "sentence", "label"), ("question", "sentence", "label"), ENTAILED),
    "rte": Kind("RTE", (*PAIR, "label"), (*PAIR, "label"), ENTAILED),
}


class Example(NamedTuple):
    """`texts` are one or two; `label` is a label's number, or a score from 0 to 5."""

    texts: tuple[str, ...]
    label: float


def splits(task: str) -> tuple[str, ...]:
    """The names of the sets that a task is measured on."""
    return ("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",)


# -- files ------------------------------------------------------------------------------------------------------------


def read(folder: Path, task: str, split: str) -> list[Example]:
    """The examples of a task's "train" or of one of its `splits`.

    Raises:
        FileNotFoundError: if there is neither a .tsv nor a .jsonl.
        ValueError: if a line is not an answered example of the task, with its number; if the file is empty.
    """
    kind = TASKS[task]
    path = folder / kind.folder / f"{split}.tsv"
    lines = _table
    if not path.is_file():
        path, lines = path.with_suffix(".jsonl"), _objects
    if not path.is_file():
        raise FileNotFoundError(f"{path.with_suffix('')}.tsv or .jsonl is not there: give GLUE's folder with --data")
    found = []
    for number, values in lines(path, kind):
        try:
            if values is None or len(values) != len(kind.fields):
                raise ValueError("too few columns")
            found.append(Example(tuple(str(text) for text in values[:-1]), _label(kind, values[-1])))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if task == "qqp" and values is None:
                continue
            raise ValueError(f"{path}, line {number} is not an answered example of {task} ({error})") from None
    if not found:
        raise ValueError(f"{path} is empty: it has no examples")
    return found


def _table(path: Path, kind: Kind) -> Any:
    """(line number, the columns' values, or None where there are too few) of each line; quotes are letters."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    columns, first = kind.tsv, 0
    if isinstance(columns[-1], str):
        names = [name.strip() for name in rows[0]]
        if missing := [name for name in columns if name not in names]:
            raise ValueError(f"{path} has no column {missing[0]!r}: it has {', '.join(names)}")
        columns, first = tuple(names.index(name) for name in columns), 1
    for number, row in enumerate(rows[first:], first + 1):
        yield number, [row[i].strip() for i in columns] if len(row) > max(columns) else None


def _objects(path: Path, kind: Kind) -> Any:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                item = json.loads(line)
                values = [item[name] for name in kind.fields]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not an example with {', '.join(kind.fields)}") from error
            yield number, values


def _label(kind: Kind, label: Any) -> float:
    """TSV has names or numbers as text, JSON numbers."""
    if not kind.labels:
        return float(label)
    index = kind.labels.index(label) if isinstance(label, str) else label
    return float(range(len(kind.labels))[index] if index >= 0 else kind.labels.index(str(label)))


def rows(examples: Sequence[Example], tokenizer: Any, length: int, score: bool) -> Rows:
    """What an encoder reads: tokens, mask (and types) ``[n, length]``, and int32 labels, or fp32 scores.

    A pair that is too long loses the ends of its longer text.
    """
    texts = [example.texts for example in examples]
    second = [pair[1] for pair in texts] if len(texts[0]) == 2 else None
    found = tokenizer([pair[0] for pair in texts], second, truncation=True, padding="max_length", max_length=length)
    names = {"tokens": "input_ids", "types": "token_type_ids"}
    given = {name: np.array(found[theirs], np.int32) for name, theirs in names.items() if theirs in found}
    labels = np.array([example.label for example in examples], np.float32 if score else np.int32)
    return given | {"mask": np.array(found["attention_mask"], bool), "labels": labels}


# -- measures ---------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """In percent: what the benchmark's tables print first, and what it prints beside it (or the same)."""

    score: float
    beside: float


def score(task: str, predicted: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray) -> Score:
    """How predicted labels, or scores, agree with those that are right."""
    mine, right = np.asarray(predicted, np.float64), np.asarray(labels, np.float64)
    if mine.shape != right.shape or mine.ndim != 1 or not len(right):
        raise ValueError(f"{task}: {mine.shape} predictions do not match {right.shape} labels")
    first, second = MEASURES.get(task, (accuracy, accuracy))
    return Score(100 * first(mine, right), 100 * second(mine, right))


def accuracy(mine: np.ndarray, right: np.ndarray) -> float:
    return float(np.mean(mine == right))


def f1(mine: np.ndarray, right: np.ndarray) -> float:
    """Of label 1; 0 where it was neither given nor right."""
    return float(2 * np.sum((mine == 1) & (right == 1)) / max(np.sum(mine == 1) + np.sum(right == 1), 1))


def matthews(mine: np.ndarray, right: np.ndarray) -> float:
    """Correlation of two labels; 0 where one side knows a single label."""
    return pearson(mine, right)


def pearson(mine: np.ndarray, right: np.ndarray) -> float:
    """Correlation; 0 where one side is constant."""
    a, b = mine - mine.mean(), right - right.mean()
    scale = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / scale) if scale > 0 else 0.0


def spearman(mine: np.ndarray, right: np.ndarray) -> float:
    """Correlation of ranks, where equals share the mean of theirs."""
    return pearson(_ranks(mine), _ranks(right))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


MEASURES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], Callable[[np.ndarray, np.ndarray], float]]] = {
    "cola": (matthews, accuracy),
    "stsb": (pearson, spearman),
    "mrpc": (accuracy, f1),
    "qqp": (accuracy, f1),
}
