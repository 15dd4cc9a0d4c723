"""Seven tasks of common sense, answered by likelihood, without examples: as the LM evaluation harness asks them.

    hellaswag   "{activity}: {context}"                            the ending that follows
    piqa, arc_easy, arc_challenge   "Question: {question}\\nAnswer:"
    winogrande  the sentence up to its blank and one of two names   the rest of the sentence, the same for both
    boolq       "{passage}\\nQuestion: {question}?\\nAnswer:"          no, yes
    openbookqa  the stem of the question

The answer is the choice with the highest log-likelihood (`accuracy`), or log-likelihood a character (`normalised`).

`read` takes the data sets' own records, one JSON object a line: ``<folder>/<task>.jsonl``.

Source: EleutherAI/lm-evaluation-harness, lm_eval/tasks/{hellaswag,piqa,winogrande,arc,super_glue,openbookqa} and
lm_eval/api/task.py.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax import Forward, Inputs
from peft_jax.core import Params

MULTIPLE = 32  # of places, to which rows are padded


class Question(NamedTuple):
    """A context and a continuation for each choice, which of them is right, and the choices' lengths in characters."""

    pairs: tuple[tuple[str, str], ...]
    answer: int
    lengths: tuple[int, ...]


# -- reading ----------------------------------------------------------------------------------------------------------

Record = Mapping[str, Any]


def _choose(context: str, choices: Sequence[str], answer: int) -> Question:
    return Question(tuple((context, f" {choice}") for choice in choices), answer, tuple(map(len, choices)))


def _cleaned(text: str) -> str:
    """HellaSwag's marks of wikiHow taken out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(x: Record) -> Question:
    context = f"{x['activity_label']}: {x['ctx_a']} {x['ctx_b'].capitalize()}"
    return _choose(_cleaned(context), [_cleaned(ending) for ending in x["endings"]], int(x["label"]))


def _piqa(x: Record) -> Question:
    return _choose(f"Question: {x['goal']}\nAnswer:", [x["sol1"], x["sol2"]], int(x["label"]))


def _winogrande(x: Record) -> Question:
    before, blank, after = x["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no blank")
    rest = " " + after.strip()
    pairs = tuple((before + x[option], rest) for option in ("option1", "option2"))
    return Question(pairs, int(x["answer"]) - 1, (len(rest),) * 2)


def _lettered(context: str, x: Record) -> Question:
    return _choose(context, x["choices"]["text"], list(x["choices"]["label"]).index(x["answerKey"]))


TASKS: dict[str, Callable[[Record], Question]] = {
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "arc_easy": lambda x: _lettered(f"Question: {x['question']}\nAnswer:", x),
    "arc_challenge": lambda x: _lettered(f"Question: {x['question']}\nAnswer:", x),
    "boolq": lambda x: _choose(
        f"{x['passage']}\nQuestion: {x['question']}?\nAnswer:", ["no", "yes"], int(x.get("answer", x.get("label")))
    ),
    "openbookqa": lambda x: _lettered(x["question_stem"], x),
}


def read(folder: Path, task: str) -> list[Question]:
    """The questions of a task.

    Raises:
        FileNotFoundError: if its file is not there.
        ValueError: on a task that is not one of `TASKS`, and on a line that is not a record of it.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}: choose from {', '.join(TASKS)}")
    file, found = folder / f"{task}.jsonl", []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                question = TASKS[task](json.loads(line))
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{file}, line {number} is not a record of {task}: {error!r}") from None
            if not 0 <= question.answer < len(question.pairs):
                raise ValueError(f"{file}, line {number} has an answer that is none of its choices")
            found.append(question)
    return found


# -- the score --------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    accuracy: float
    normalised: float  # by characters


def encoded(tokenizer: Any, context: str, continuation: str, longest: int) -> tuple[list[int], int]:
    """The tokens of both, cut on the left, and how many of them are the continuation's."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = list(tokenizer(context)["input_ids"])
    both = list(tokenizer(context + continuation)["input_ids"])
    count = len(both) - len(before)
    if not 0 < count < longest:
        raise ValueError(f"{continuation[:40]!r} has {count} tokens: at least 1 and fewer than {longest} are supported")
    return both[-longest:], count


def likelihoods(forward: Forward, params: Params, given: Sequence[tuple[list[int], int]], rows: int = 8) -> np.ndarray:
    """The log-likelihood of each continuation; what is of like length is read together, `rows` at a time."""
    found = np.zeros(len(given))
    order = sorted(range(len(given)), key=lambda i: len(given[i][0]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        length = -(-max(len(given[i][0]) for i in chosen) // MULTIPLE) * MULTIPLE
        tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        counted = np.zeros((rows, length), np.float32)
        for row in range(rows):
            one, count = given[chosen[min(row, len(chosen) - 1)]]
            tokens[row, : len(one)], mask[row, : len(one)] = one, True
            counted[row, len(one) - count : len(one)] = 1
        found[chosen] = np.asarray(_sums(forward, params, tokens, mask, counted))[: len(chosen)]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _sums(forward: Forward, params: Params, tokens: Any, mask: Any, counted: Any) -> Float[Array, " rows"]:
    logits = forward(params, Inputs(jnp.asarray(tokens), mask=jnp.asarray(mask)))[:, :-1].astype(jnp.float32)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(each * counted[:, 1:], axis=1)


def score(
    forward: Forward, params: Params, questions: Sequence[Question], tokenizer: Any, longest: int, rows: int = 8
) -> Score:
    """The share of right answers, by log-likelihood and by log-likelihood a character."""
    pairs = [pair for question in questions for pair in question.pairs]
    given = [encoded(tokenizer, *pair, longest) for pair in pairs]
    each, start, right = likelihoods(forward, params, given, rows), 0, np.zeros((len(questions), 2))
    for index, question in enumerate(questions):
        mine = each[start : start + len(question.pairs)]
        start += len(question.pairs)
        right[index] = [np.argmax(x) == question.answer for x in (mine, mine / np.array(question.lengths))]
    return Score(*map(float, right.mean(0)))
