"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300): questions of 57 subjects with four answers, behind five examples.

The folder is the authors' own: ``dev/<subject>_dev.csv`` and ``test/<subject>_test.csv`` (or ``val``), records of a
question, four answers and a letter, without a header; or ``dev.json`` and ``test.json``, lists of objects with
``question``, ``subject``, ``choices`` and ``answer``, 0 to 3; or the same as ``.jsonl``, an object a line.

The prompt is that of EleutherAI's lm-evaluation-harness, which is the authors' but for one space:

    The following are multiple choice questions (with answers) about {subject}.

    {question}
    A. {choice}
    …
    Answer: {letter}

five times, the subject's first five development questions; then the question, up to ``Answer:``.  The prediction is
the most probable of `` A``, `` B``, `` C``, `` D``, and accuracy is over all questions.  A prompt that is too long
loses examples until it fits.
"""

import csv
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peft_jax import Forward, Inputs, Ports
from peft_jax.core import Params

LETTERS = "ABCD"
ABOUT = "The following are multiple choice questions (with answers) about {subject}.\n\n"
MULTIPLE = 64  # prompts are padded to a multiple of so many tokens, so that few shapes are compiled


class Question(NamedTuple):
    subject: str  # as its file is called: high_school_physics
    question: str
    choices: tuple[str, ...]
    answer: int


def read(folder: Path, split: str) -> list[Question]:
    """The questions of "dev", "val" or "test", subject by subject.

    Raises:
        FileNotFoundError: if the folder holds none.
        ValueError: on a line that is no question, with its place.
    """
    if files := sorted((folder / split).glob(f"*_{split}.csv")):
        return [question for file in files for question in _csv(file, file.stem.removesuffix(f"_{split}"))]
    for suffix in ("json", "jsonl"):
        if (folder / f"{split}.{suffix}").is_file():
            return _json(folder / f"{split}.{suffix}")
    raise FileNotFoundError(
        f"{folder} holds neither {split}/<subject>_{split}.csv nor {split}.json: give the folder of MMLU's data"
    )


def _csv(file: Path, subject: str) -> list[Question]:
    found = []
    with file.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            if len(row) != 6 or len(row[5]) != 1 or row[5] not in LETTERS:
                raise ValueError(f"{file}, record {number}: a record is a question, four answers and A, B, C or D")
            found.append(Question(subject, row[0], tuple(row[1:5]), LETTERS.index(row[5])))
    return found


def _json(file: Path) -> list[Question]:
    text = file.read_text(encoding="utf-8")
    try:
        items = (
            [json.loads(line) for line in text.splitlines() if line] if file.suffix == ".jsonl" else json.loads(text)
        )
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    found = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not {"question", "subject", "choices", "answer"} <= item.keys():
            raise ValueError(f"{file}, item {number}: an item has a question, a subject, choices and an answer")
        if len(item["choices"]) != 4 or item["answer"] not in range(4):
            raise ValueError(f"{file}, item {number}: there are four choices, and answers count from 0 to 3")
        found.append(Question(item["subject"], item["question"], tuple(item["choices"]), int(item["answer"])))
    return found


# -- prompts ----------------------------------------------------------------------------------------------------------


def shown(question: Question, *, answered: bool) -> str:
    lines = [
        question.question.strip(),
        *(f"{x}. {choice}" for x, choice in zip(LETTERS, question.choices, strict=True)),
    ]
    return "\n".join([*lines, "Answer:"]) + (f" {LETTERS[question.answer]}\n\n" if answered else "")


def prompt(question: Question, examples: Sequence[Question]) -> str:
    """What the model reads.

    >>> from experiments import mmlu
    >>> one = mmlu.Question("abstract_algebra", "1 + 1?", ("1", "2", "3", "4"), 1)
    >>> print(mmlu.prompt(one, [one]))
    The following are multiple choice questions (with answers) about abstract algebra.
    <BLANKLINE>
    1 + 1?
    A. 1
    B. 2
    C. 3
    D. 4
    Answer: B
    <BLANKLINE>
    1 + 1?
    A. 1
    B. 2
    C. 3
    D. 4
    Answer:
    """
    about = ABOUT.format(subject=question.subject.replace("_", " "))
    return about + "".join(shown(e, answered=True) for e in examples) + shown(question, answered=False)


def prompts(
    questions: Sequence[Question], development: Sequence[Question], tokenizer: Any, longest: int, shots: int = 5
) -> list[list[int]]:
    """The tokens of each question's prompt, of `longest` at most.

    Raises:
        ValueError: if a subject has too few development questions, or a question alone is too long.
    """
    before: dict[str, list[Question]] = {}
    for one in development:
        before.setdefault(one.subject, []).append(one)
    found = []
    for number, question in enumerate(questions, 1):
        examples = before.get(question.subject, [])[:shots]
        if len(examples) < shots:
            raise ValueError(f"{question.subject} has {len(examples)} development questions, and {shots} are shown")
        for skipped in range(shots + 1):
            tokens = list(tokenizer(prompt(question, examples[skipped:]))["input_ids"])
            if len(tokens) <= longest:
                break
        else:
            raise ValueError(f"question {number} ({question.subject}) has {len(tokens)} tokens, more than {longest}")
        found.append(tokens)
    return found


def letters(tokenizer: Any) -> Int[np.ndarray, "4"]:
    """The token of each letter behind ``Answer:``.

    Raises:
        ValueError: if a letter is no token of its own there.
    """
    encode = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    found = [encode(f"Answer: {x}") for x in LETTERS]
    if any(ids[:-1] != encode("Answer:") for ids in found) or len({ids[-1] for ids in found}) < len(LETTERS):
        raise ValueError("this tokenizer has no token for each of the letters A to D behind 'Answer:'")
    return np.array([ids[-1] for ids in found], np.int32)


# -- the score --------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    accuracy: float  # over all questions
    subjects: Mapping[str, float]
    predictions: np.ndarray


def score(
    forward: Forward, params: Params, questions: Sequence[Question], given: Sequence[list[int]], ids: Any, rows: int = 8
) -> Score:
    """The share of right predictions; prompts of like length are read together, `rows` at a time."""
    predicted = np.zeros(len(questions), np.int64)
    order = sorted(range(len(given)), key=lambda i: len(given[i]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        length = -(-max(len(given[i]) for i in chosen) // MULTIPLE) * MULTIPLE
        tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        for row in range(rows):
            one = given[chosen[min(row, len(chosen) - 1)]]
            tokens[row, : len(one)], mask[row, : len(one)] = one, True
        logits = _last(forward, params, tokens, mask, jnp.asarray(ids))
        predicted[chosen] = np.argmax(np.asarray(logits), axis=1)[: len(chosen)]
    right = predicted == np.array([question.answer for question in questions])
    subjects = sorted({question.subject for question in questions})
    of = np.array([question.subject for question in questions])
    return Score(float(right.mean()), {name: float(right[of == name].mean()) for name in subjects}, predicted)


@functools.partial(jax.jit, static_argnums=0)
def _last(forward: Forward, params: Params, tokens: Any, mask: Any, ids: Any) -> Float[Array, "rows 4"]:
    """The logits of `ids` behind each row's last token."""
    features = forward.features(params, Inputs(jnp.asarray(tokens), mask=jnp.asarray(mask)), Ports())
    last = jnp.sum(mask, axis=1) - 1
    behind = jnp.take_along_axis(features, last[:, None, None], axis=1)
    return forward.head(params, behind, Ports())[:, 0, ids]
