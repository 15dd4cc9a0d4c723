"""SQuAD 1.1 and 2.0: reading the files, windows for encoders, answers from scores, exact match and F1.

Files are the official JSON (Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822): train-v1.1.json,
dev-v1.1.json, train-v2.0.json, dev-v2.0.json.  Measures are those of the official scripts: lower case, without
punctuation, articles and extra spaces; the best of a question's answers counts.

Windows and answers are those of THUDM/P-tuning-v2 (tasks/qa/dataset.py, tasks/qa/utils_qa.py), which are those of
transformers' examples (pytorch/question-answering/run_qa.py): a long context becomes windows that overlap by `stride`
tokens; a window without the answer has its answer at the first token, [CLS]; an answer is the best pair of one of the
20 highest starts and one of the 20 highest ends, over all windows of a question, at most 30 tokens long; with
unanswerable questions, none is given where the lowest score of the first token beats it.

Departures: starts and ends are sought within the context (there, among all tokens, and those outside are dropped
afterwards), so that there is always an answer; where nothing is left of a text, F1 follows version 2's script (1 if
nothing is left of both, 0 otherwise), version 1.1's would say 0.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax.training.data import Rows

SPLITS = {"1.1": ("train-v1.1.json", "dev-v1.1.json"), "2.0": ("train-v2.0.json", "dev-v2.0.json")}
CANDIDATES, LONGEST = 20, 30  # starts and ends to choose from, tokens of an answer

# -- measures ---------------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces.

    >>> from experiments import squad
    >>> squad.normalise("The  U.S. Navy, an ally")
    'us navy ally'
    """
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(text: str, answers: Iterable[str]) -> float:
    """Whether a text is one of the answers, both normalised; no answers stand for an unanswerable question."""
    return float(normalise(text) in _wanted(answers))


def f1(text: str, answers: Iterable[str]) -> float:
    """The harmonic mean of precision and recall of a text's words, for the answer that it is nearest to.

    >>> from experiments import squad
    >>> squad.f1("the Navy of France", ["French Navy", "Navy"]), squad.f1("", [])
    (0.5, 1.0)
    """
    words = normalise(text).split()
    return max(_f1(words, answer.split()) for answer in _wanted(answers))


def _wanted(answers: Iterable[str]) -> list[str]:
    return [found for found in map(normalise, answers) if found] or [""]


def _f1(words: list[str], answer: list[str]) -> float:
    if not words or not answer:
        return float(words == answer)
    return 2 * (Counter(words) & Counter(answer)).total() / (len(words) + len(answer))


class Score(NamedTuple):
    """Means over questions, in percent."""

    exact_match: float
    f1: float


def score(texts: Sequence[str], answers: Sequence[Iterable[str]]) -> Score:
    """The means of a text a question, and each question's answers."""
    pairs = [(exact_match(text, wanted), f1(text, wanted)) for text, wanted in zip(texts, answers, strict=True)]
    if not pairs:
        raise ValueError("there are no questions to score")
    return Score(*(100 * float(x) for x in np.mean(pairs, axis=0)))


# -- files ------------------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """`answers` are texts of the context that start at its characters `starts`; there are none where there is none."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


def read(path: Path) -> list[Question]:
    """The questions of an official file, in its order.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not of the official format, or has no questions.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the folder of the official files, {_files()}, with --data")
    found = []
    try:
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                found += [_question(q, paragraph["context"]) for q in paragraph["qas"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of SQuAD's format: {type(error).__name__}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no questions")
    return found


def _files() -> str:
    return ", ".join(name for names in SPLITS.values() for name in names)


def _question(fields: Any, context: str) -> Question:
    answers = [] if fields.get("is_impossible") else fields["answers"]
    texts, starts = tuple(a["text"] for a in answers), tuple(int(a["answer_start"]) for a in answers)
    return Question(fields["id"], fields["question"].lstrip(), context, texts, starts)


# -- windows ----------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """What an encoder with a head for answers reads and learns.

    rows      tokens, mask, starts, ends (and types), a row a window
    question  int [rows], the question that each window belongs to
    offsets   int32 [rows, time, 2], the characters of the context that each token covers; −1 outside the context
    """

    rows: Rows
    question: np.ndarray
    offsets: np.ndarray


def windows(questions: Sequence[Question], tokenizer: Any, length: int = 384, stride: int = 128) -> Windows:
    """Windows of `length` tokens each, padded; neighbours share `stride` tokens of the context.

    Raises:
        ValueError: if the tokenizer is not a fast one that pads on the right, or a question leaves no room for more of
            the context than neighbours share.
    """
    if not getattr(tokenizer, "is_fast", False) or tokenizer.padding_side != "right":
        raise ValueError("windows need a fast tokenizer that pads on the right: it says what characters a token covers")
    room = length - tokenizer.num_special_tokens_to_add(pair=True) - stride
    firsts = range(0, len(questions), 1000)  # encodings are large: never of all questions at once
    parts = [_windows(questions[i : i + 1000], i, tokenizer, length, stride, room) for i in firsts]
    rows = {name: np.concatenate([part.rows[name] for part in parts]) for name in parts[0].rows}
    return Windows(rows, *(np.concatenate([getattr(part, name) for part in parts]) for name in Windows._fields[1:]))


def _windows(part: Sequence[Question], first: int, tokenizer: Any, length: int, stride: int, room: int) -> Windows:
    texts = [question.text for question in part]
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    if max(counts) >= room:
        where = part[int(np.argmax(counts))].id
        raise ValueError(f"question {where} has {max(counts)} tokens and windows of {length} have room for {room - 1}")
    found = tokenizer(
        texts,
        [question.context for question in part],
        truncation="only_second",
        padding="max_length",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    names = {"tokens": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    rows = {name: np.array(found[theirs], np.int32) for name, theirs in names.items() if theirs in found}
    rows["mask"] = rows["mask"].astype(bool)
    owner = np.array(found["overflow_to_sample_mapping"])
    inside = np.array([[number == 1 for number in found.sequence_ids(i)] for i in range(len(owner))])
    offsets = np.where(inside[..., None], np.array(found["offset_mapping"], np.int32), -1).astype(np.int32)
    spans = [_span(part[q], w) for q, w in zip(owner, offsets, strict=True)]
    rows["starts"], rows["ends"] = np.array(spans, np.int32).reshape(-1, 2).T
    return Windows(rows, owner + first, offsets)


def _span(question: Question, offsets: np.ndarray) -> tuple[int, int]:
    """The first and last token of a question's first answer in a window, or (0, 0) if the window does not hold it."""
    inside = np.flatnonzero(offsets[:, 1] >= 0)
    if not question.answers or not len(inside):
        return 0, 0
    begin = question.starts[0]
    end = begin + len(question.answers[0])
    begins, ends = offsets[inside, 0], offsets[inside, 1]
    if begin < begins[0] or end > ends[-1]:
        return 0, 0
    start = inside[np.searchsorted(begins, begin, side="right") - 1]
    return int(start), int(inside[np.searchsorted(ends, end, side="left")])


# -- answers ----------------------------------------------------------------------------------------------------------


def texts(questions: Sequence[Question], windows: Windows, scores: np.ndarray, *, empty: bool = False) -> list[str]:
    """Each question's answer, from the scores ``[rows, time, 2]`` of where an answer starts and ends.

    `empty` allows for none, as version 2 needs.
    """
    best = [("", -np.inf)] * len(questions)
    none = np.full(len(questions), np.inf)
    for window, offsets, (starts, ends) in zip(windows.question, windows.offsets, scores.swapaxes(1, 2), strict=True):
        none[window] = min(none[window], float(starts[0] + ends[0]))
        inside = np.flatnonzero(offsets[:, 1] >= 0)
        begin = inside[np.argsort(-starts[inside], kind="stable")[:CANDIDATES]]
        end = inside[np.argsort(-ends[inside], kind="stable")[:CANDIDATES]]
        lengths = end[None] - begin[:, None] + 1
        pairs = np.where((lengths > 0) & (lengths <= LONGEST), starts[begin][:, None] + ends[end][None], -np.inf)
        if not pairs.size or pairs.max() <= best[window][1]:
            continue
        row, column = np.unravel_index(np.argmax(pairs), pairs.shape)
        text = questions[window].context[offsets[begin[row], 0] : offsets[end[column], 1]]
        best[window] = (text, float(pairs.max()))
    return ["" if empty and none[i] > value else text for i, (text, value) in enumerate(best)]
