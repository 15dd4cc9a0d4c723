"""The tasks of P-tuning v2's paper profile, as what a run trains on and how it is measured.

A task is read, which says what head it needs; then encoded with the model's tokenizer.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments import conll, squad, superglue
from peft_jax import Forward, Ports, training
from peft_jax.training.data import Rows
from peft_jax.training.losses import Batch, Loss, inputs_of

Judge = Callable[[np.ndarray], dict[str, float]]  # what a model gives for all rows -> score and exact, in percent
DEV, TEST = "dev", "test"


class Sources(NamedTuple):
    model: str
    folder: Path


class Data(NamedTuple):
    """What a run trains on, and its sets: the rows, and how what the model gives for them is judged.

    measure    a function of (forward, params, batch): what the model gives
    reported   the set whose measures are reported, once the best epoch is known
    """

    train: Rows
    sets: dict[str, tuple[Rows, Judge]]
    reported: str
    loss: Loss
    measure: Callable[..., Any]


class Reading(NamedTuple):
    """The head that a task needs, and its data once there is a tokenizer."""

    head: str
    labels: int | None
    encode: Callable[[Any], Data]


@dataclasses.dataclass(frozen=True)
class Reader:
    """How a task is read; the setting that says how long its rows are; whether the rate falls by epochs."""

    read: Callable[[Any, Path, str], Reading]
    length: str
    epochs: bool


class Size(NamedTuple):
    """Rows of the real data, as far as costs go: what a run trains on, evaluates each epoch, and reports at the end."""

    train: int
    dev: int
    reported: int
    choices: int = 1
    length: int = 0  # tokens a row; 0 stands for the setting


# Sentences are padded to 128 or 224 tokens; windows of SQuAD are those of 384 tokens and a stride of 128, about.
SIZES = {
    "boolq": Size(9_427, 3_270, 3_270),
    "copa": Size(400, 100, 100, choices=2),
    "rte": Size(2_490, 277, 277),
    "wic": Size(5_428, 638, 638),
    "wsc": Size(554, 104, 104),
    "conll03": Size(14_041, 3_250, 3_453, length=224),
    "conll04": Size(922, 231, 288, length=128),
    "ontonotes": Size(59_924, 8_528, 8_262, length=256),
    "squad1.1": Size(88_500, 10_800, 10_800),
    "squad2.0": Size(132_000, 12_200, 12_200),
}


# -- losses and what is measured --------------------------------------------------------------------------------------


def choice_scores(forward: Forward, params: Any, batch: Batch, ports: Ports = Ports()) -> Float[Array, "batch choices"]:  # noqa: B008
    """A score for each choice, of rows ``[batch, choices, time]``: the first score that a head for classes gives it."""
    shape = batch["tokens"].shape
    flat = {name: x.reshape(-1, shape[-1]) for name, x in batch.items() if x.ndim == 3}
    return forward(params, inputs_of(flat), ports)[:, 0].reshape(shape[:2]).astype(jnp.float32)


def choice_loss(forward: Forward, params: Any, batch: Batch, ports: Ports = Ports()) -> tuple[Array, Array]:  # noqa: B008
    """Cross entropy of the right choice: (Σ, count)."""
    scores, labels = choice_scores(forward, params, batch, ports), jnp.asarray(batch["labels"])
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return jnp.sum(losses), jnp.float32(losses.shape[0])


def scores(forward: Forward, params: Any, batch: Batch) -> Array:
    return forward(params, inputs_of(batch))


def chosen(forward: Forward, params: Any, batch: Batch) -> Array:
    """The label with the highest score, of each row or each token."""
    return jnp.argmax(scores(forward, params, batch), axis=-1)


def choice(forward: Forward, params: Any, batch: Batch) -> Array:
    return jnp.argmax(choice_scores(forward, params, batch), axis=-1)


# -- tasks ------------------------------------------------------------------------------------------------------------


def read_superglue(s: Any, folder: Path, task: str) -> Reading:
    parts = {split: superglue.read(folder / "superglue", task, split) for split in ("train", "val")}
    two = task == "copa"

    def judge(predicted: np.ndarray) -> dict[str, float]:
        found = superglue.score(task, predicted, [example.label for example in parts["val"]])
        return {"score": found.score, "exact": found.accuracy}

    def encode(tokenizer: Any) -> Data:
        rows = {split: superglue.pair_rows(found, task, tokenizer, s.pair) for split, found in parts.items()}
        loss, measure = (choice_loss, choice) if two else (training.classification, chosen)
        return Data(rows["train"], {DEV: (rows["val"], judge)}, DEV, loss, measure)

    return Reading("classification", 2 if two else len(superglue.LABELS[task]), encode)


TAGGED = {  # the folder, the files, and the column of words
    "conll03": ("CoNLL03", ("train.txt", "valid.txt", "test.txt"), 0),
    "conll04": ("CoNLL04", ("train.txt", "dev.txt", "test.txt"), 0),
    "ontonotes": ("ontoNotes", ("train.sd.conllx", "dev.sd.conllx", "test.sd.conllx"), 1),
}


def read_tagged(s: Any, folder: Path, task: str) -> Reading:
    place, files, column = TAGGED[task]
    splits = ("train", DEV, TEST)
    parts = {n: conll.read(folder / place / file, column) for n, file in zip(splits, files, strict=True)}
    names = conll.labels(parts["train"])

    def encode(tokenizer: Any) -> Data:
        rows = {name: conll.rows(found, names, tokenizer, s.sentence) for name, found in parts.items()}

        def judge(name: str) -> Judge:
            def of(predicted: np.ndarray) -> dict[str, float]:
                given = conll.tags(parts[name], rows[name], predicted, names)
                found = conll.score(given, [sentence.tags for sentence in parts[name]])
                return {"score": found.f1, "exact": found.sentences}

            return of

        sets = {name: (rows[name], judge(name)) for name in (DEV, TEST)}
        return Data(rows["train"], sets, TEST, training.next_token, chosen)

    return Reading("tokens", len(names), encode)


def read_squad(s: Any, folder: Path, task: str) -> Reading:
    version = task.removeprefix("squad")
    train, dev = (squad.read(folder / "squad" / file) for file in squad.SPLITS[version])

    def encode(tokenizer: Any) -> Data:
        learnt = squad.windows(train, tokenizer, s.window, s.stride).rows
        found = squad.windows(dev, tokenizer, s.window, s.stride)

        def judge(given: np.ndarray) -> dict[str, float]:
            texts = squad.texts(dev, found, given, empty=version == "2.0")
            score = squad.score(texts, [question.answers for question in dev])
            return {"score": score.f1, "exact": score.exact_match}

        return Data(learnt, {DEV: (found.rows, judge)}, DEV, training.answers, scores)

    return Reading("answers", None, encode)


READERS = {
    **{task: Reader(read_superglue, "pair", False) for task in ("boolq", "copa", "rte", "wic", "wsc")},
    **{task: Reader(read_tagged, "sentence", True) for task in TAGGED},
    **{f"squad{version}": Reader(read_squad, "window", True) for version in squad.SPLITS},
}
