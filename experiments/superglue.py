"""SuperGLUE (Wang et al. 2019, arXiv:1905.00537): six of its tasks, for encoders and as text to text.

Files are the official JSONL: {train,val}.jsonl in the folders BoolQ, CB, COPA, RTE, WiC and WSC.

For encoders, a text or a pair of them and a label, in the words of THUDM/P-tuning-v2 (tasks/superglue/dataset.py, its
template for RoBERTa); COPA is a pair for each of two choices.

As text to text, the words of T5 (text-to-text-transfer-transformer, t5/data/preprocessors.py, ``glue``: the fields in
the order of their names, each behind its name) without the task's name before them, as in prompt tuning's code
(prompt_tuning/data/super_glue.py, ``taskless``):

    passage: The Mill is a pub ... question: is the mill a pub        ->        True

Measures are the benchmark's: accuracy; for CB the mean of accuracy and of F1 averaged over its three labels.

Departures: MultiRC and ReCoRD are left out, and WSC as text to text, in which T5 writes the referent and the answer
follows from comparing words.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax.training.data import Rows

# Each task's folder and labels, in the order of their numbers (the answers as text to text).
FOLDERS = {"boolq": "BoolQ", "cb": "CB", "copa": "COPA", "rte": "RTE", "wic": "WiC", "wsc": "WSC"}
LABELS = {
    "boolq": ("False", "True"),
    "cb": ("entailment", "contradiction", "neutral"),
    "copa": ("choice1", "choice2"),
    "rte": ("entailment", "not_entailment"),
    "wic": ("False", "True"),
    "wsc": ("False", "True"),
}
FIELDS = {
    "boolq": ("passage", "question"),
    "cb": ("hypothesis", "premise"),
    "copa": ("choice1", "choice2", "premise", "question"),
    "rte": ("hypothesis", "premise"),
    "wic": ("sentence1", "sentence2", "word"),
}
TEXT_TO_TEXT = tuple(FIELDS)

Fields = dict[str, Any]


class Example(NamedTuple):
    """`fields` are those of the file; `label` is an index into the task's labels."""

    fields: Fields
    label: int


# -- files ------------------------------------------------------------------------------------------------------------


def read(folder: Path, task: str, split: str) -> list[Example]:
    """The examples of a task's "train" or "val".

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if a line is not an example of the task, with its number; if the file is empty.
    """
    path = folder / FOLDERS[task] / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the folder of SuperGLUE's folders with --data")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            PAIRS[task](fields)
            found.append(Example(fields, _label(task, fields["label"])))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, line {number} is not an answered example of {task} ({problem})") from None
    if not found:
        raise ValueError(f"{path} is empty: it has no examples")
    return found


def _label(task: str, label: Any) -> int:
    """JSON has true and false, numbers, or names."""
    return LABELS[task].index(label) if isinstance(label, str) else range(2)[label]


# -- for encoders -----------------------------------------------------------------------------------------------------

Pair = tuple[str, str | None]


def _wic(f: Fields) -> list[Pair]:
    return [(f"{f['sentence1']} {f['sentence2']} Does {f['word']} have the same meaning in both sentences?", None)]


def _wsc(f: Fields) -> list[Pair]:
    return [(f"{f['target']['span2_text']}: {f['text']}", f["target"]["span1_text"])]


def _copa(f: Fields) -> list[Pair]:
    joined = f"{f['premise']} {'because' if f['question'] == 'cause' else 'so'}"
    return [(joined, f["choice1"]), (joined, f["choice2"])]


# Each task's texts: one of them or a pair, and for COPA a pair a choice.
PAIRS: dict[str, Callable[[Fields], list[Pair]]] = {
    "boolq": lambda f: [(f["question"], f["passage"])],
    "cb": lambda f: [(f["premise"], f["hypothesis"])],
    "copa": _copa,
    "rte": lambda f: [(f["premise"], f["hypothesis"])],
    "wic": _wic,
    "wsc": _wsc,
}


def pair_rows(examples: Sequence[Example], task: str, tokenizer: Any, length: int) -> Rows:
    """What an encoder reads: tokens, mask (and types) ``[n, length]``, or ``[n, choices, length]`` for COPA; labels.

    A pair that is too long loses the ends of its longer text.
    """
    texts = [pair for example in examples for pair in PAIRS[task](example.fields)]
    second = None if texts[0][1] is None else [b for _, b in texts]
    found = tokenizer([a for a, _ in texts], second, truncation=True, padding="max_length", max_length=length)
    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    rows = {name: np.array(found[theirs], np.int32) for name, theirs in names.items() if theirs in found}
    rows["mask"] = rows["mask"].astype(bool)
    if task == "copa":
        rows = {name: x.reshape(len(examples), 2, length) for name, x in rows.items()}
    return rows | {"labels": np.array([example.label for example in examples], np.int32)}


# -- as text to text --------------------------------------------------------------------------------------------------


def text(task: str, fields: Fields) -> str:
    """What T5 reads of an example.

    >>> from experiments import superglue
    >>> superglue.text("rte", {"premise": "It rained.", "hypothesis": "It was wet.", "idx": 3})
    'hypothesis: It was wet. premise: It rained.'
    """
    if task not in FIELDS:
        raise ValueError(f"{task} is not text to text here: choose from {', '.join(FIELDS)}")
    return " ".join(f"{name}: {fields[name]}" for name in FIELDS[task])


# -- measures ---------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """In percent; `score` is the benchmark's own measure of the task."""

    accuracy: float
    score: float


def score(task: str, predicted: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray) -> Score:
    """How predicted labels agree with those that are right."""
    mine, right = np.asarray(predicted), np.asarray(labels)
    if mine.shape != right.shape or mine.ndim != 1 or not len(right):
        raise ValueError(f"{task}: {mine.shape} predictions do not match {right.shape} labels")
    accuracy = 100 * float(np.mean(mine == right))
    return Score(accuracy, (accuracy + 100 * macro_f1(mine, right)) / 2 if task == "cb" else accuracy)


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of each label that was given or is right, averaged."""
    kinds = np.union1d(predicted, labels)
    hits = [
        2 * np.sum((predicted == k) & (labels == k)) / (np.sum(predicted == k) + np.sum(labels == k)) for k in kinds
    ]
    return float(np.mean(hits))
