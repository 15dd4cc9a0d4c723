"""Tasks for encoders with heads: rows of tokens to learn and to be measured on, always the same ones.

    reviews   which of two sentiments a snippet of a movie review has: `data.movie_reviews` rated beyond ±0.5
    r8        which of 8 topics a piece of newswire has, in the corpus's own split
    news      which of 20 newsgroups a post is from, in the corpus's own split
    brown     the coarse part of speech of each word, learnt and measured at the word's first piece
    squad     which words of a paragraph answer a question: exact match and F1 as in `experiments.squad`

Texts that are too long are cut; sentences and questions that are too long are left out.  What is held out comes from
other texts (brown) and other paragraphs (squad) than what is learnt.  All is taken in one fixed order, so that smaller
subsets lie within larger ones.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from experiments import conll, corpora, squad
from experiments.data import movie_reviews
from peft_jax.training.data import Rows

T = TypeVar("T")
HELD_OUT = 0.2  # of the texts or paragraphs of a corpus that has no split of its own


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """What a task's runs share: how many labels its head chooses from, rows, and how the scores that a head gives to
    those held out are measured, in percent and nats."""

    labels: int
    train: Rows
    held_out: Rows
    measure: Callable[[np.ndarray], dict[str, float]]

    def __str__(self) -> str:
        return ", ".join(
            f"{len(rows['tokens'])} rows {what} (sha256 {digest(rows)})"
            for rows, what in ((self.train, "to train on"), (self.held_out, "held out"))
        )


def prepare(name: str, tokenizer: Any, length: int, train: int, held_out: int) -> Data:
    """So many rows of a task, of `length` tokens each."""
    return TASKS[name](tokenizer, length, train, held_out)


def digest(rows: Rows) -> str:
    return hashlib.sha256(b"".join(rows[name].tobytes() for name in sorted(rows))).hexdigest()[:12]


# -- subsets ----------------------------------------------------------------------------------------------------------


def first(items: Sequence[T], count: int, fits: Callable[[T], bool] = lambda item: True) -> list[T]:
    """The first `count` that fit, in one fixed order.

    Raises:
        ValueError: if there are fewer.
    """
    order = np.random.default_rng(0).permutation(len(items))
    kept = list(itertools.islice((items[i] for i in order if fits(items[i])), count))
    if len(kept) < count:
        raise ValueError(f"{count} rows are wanted and {len(kept)} fit: choose fewer, or longer rows")
    return kept


def short(length: int, tokenizer: Any, *texts: str) -> bool:
    """Whether a text, or two, have at most `length` tokens."""
    return len(tokenizer(*texts, truncation=True, max_length=length + 1)["input_ids"]) <= length


def parted(groups: Sequence[Sequence[T]]) -> tuple[list[T], list[T]]:
    """(to learn, held out): no group has items in both."""
    order = np.random.default_rng(0).permutation(len(groups))
    cut = max(1, round(HELD_OUT * len(groups)))
    flat = lambda chosen: [item for i in chosen for item in groups[i]]  # noqa: E731
    return flat(order[cut:]), flat(order[:cut])


def cross_entropy(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """−log softmax(scores)[target] over the last axis."""
    total = np.logaddexp.reduce(scores.astype(np.float64), axis=-1)
    return total - np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]


# -- classes ----------------------------------------------------------------------------------------------------------


def classes(tokenizer: Any, length: int, train: Iterable[tuple[str, int]], held_out: Iterable[tuple[str, int]]) -> Data:
    """Texts with the indices of their labels."""
    mine, theirs = (_texts(tokenizer, length, list(pairs)) for pairs in (train, held_out))

    def measure(scores: np.ndarray) -> dict[str, float]:
        right = np.argmax(scores, axis=-1) == theirs["labels"]
        return {"accuracy": 100 * float(right.mean()), "loss": float(cross_entropy(scores, theirs["labels"]).mean())}

    return Data(int(max(mine["labels"].max(), theirs["labels"].max())) + 1, mine, theirs, measure)


def _texts(tokenizer: Any, length: int, pairs: list[tuple[str, int]]) -> Rows:
    texts = [text for text, _ in pairs]
    found = tokenizer(texts, truncation=True, padding="max_length", max_length=length)
    rows = {"tokens": np.array(found["input_ids"], np.int32), "mask": np.array(found["attention_mask"], bool)}
    return rows | {"labels": np.array([label for _, label in pairs], np.int32)}


def reviews(tokenizer: Any, length: int, train: int, held_out: int) -> Data:
    rated = [(text, int(rating > 0)) for text, rating in movie_reviews() if abs(rating) > 0.5]
    taken = first(rated, held_out + train)
    return classes(tokenizer, length, taken[held_out:], taken[:held_out])


def topics(read: Callable[[], corpora.Split], tokenizer: Any, length: int, train: int, held_out: int) -> Data:
    split = read()
    names = sorted({text.label for text in split.train})
    taken = (first(part, count) for part, count in zip(split, (train, held_out), strict=True))
    return classes(tokenizer, length, *([(text, names.index(label)) for text, label in part] for part in taken))


# -- tags -------------------------------------------------------------------------------------------------------------


def brown(tokenizer: Any, length: int, train: int, held_out: int) -> Data:
    names = sorted([*corpora.COARSE, corpora.PUNCTUATION])
    fits = lambda s: short(length, tokenizer, " ".join(["", *s.words]))  # noqa: E731
    taken = (first(part, count, fits) for part, count in zip(parted(corpora.brown()), (train, held_out), strict=True))
    mine, theirs = (conll.rows(part, names, tokenizer, length, multiple=length) for part in taken)

    def measure(scores: np.ndarray) -> dict[str, float]:
        words, targets = theirs["weights"] > 0, theirs["targets"]
        right = (np.argmax(scores, axis=-1) == targets)[words]
        return {"accuracy": 100 * float(right.mean()), "loss": float(cross_entropy(scores, targets)[words].mean())}

    return Data(len(names), mine, theirs, measure)


# -- questions --------------------------------------------------------------------------------------------------------


def answers(tokenizer: Any, length: int, train: int, held_out: int) -> Data:
    paragraphs: dict[str, list[squad.Question]] = {}
    for question in corpora.questions():
        paragraphs.setdefault(question.context, []).append(question)
    fits = lambda q: short(length, tokenizer, q.text, q.context)  # noqa: E731
    sides = parted(list(paragraphs.values()))
    mine, theirs = (first(part, count, fits) for part, count in zip(sides, (train, held_out), strict=True))
    learnt, asked = (squad.windows(part, tokenizer, length, stride=0) for part in (mine, theirs))

    def measure(scores: np.ndarray) -> dict[str, float]:
        score = squad.score(squad.texts(theirs, asked, scores), [question.answers for question in theirs])
        inside = np.where(asked.rows["mask"][..., None], scores, -1e9).swapaxes(1, 2)
        places = np.stack([asked.rows["starts"], asked.rows["ends"]], axis=1)
        return {**score._asdict(), "loss": float(cross_entropy(inside, places).mean())}

    return Data(2, learnt.rows, asked.rows, measure)


TASKS: dict[str, Callable[..., Data]] = {
    "reviews": reviews,
    "r8": functools.partial(topics, corpora.r8),
    "news": functools.partial(topics, corpora.newsgroups),
    "brown": brown,
    "squad": answers,
}
