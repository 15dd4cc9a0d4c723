"""Prompt tuning's ablations on the paper's own model and tasks: LM-adapted T5 1.1 on SuperGLUE.

Paper: Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 3 and Figure 3 (a: length, b: start), whose curves
have no printed numbers; code google-research/prompt-tuning.

    python -m experiments.run prompt_ablation --profile paper --data PATH [--model google/t5-xl-lm-adapt]

--data takes the folder of SuperGLUE's official folders (BoolQ, CB, COPA, RTE, WiC).  --model takes an LM-adapted T5 1.1
of any size, by its name or as a directory that transformers saved; the figure has all five of them, small to XXL.

A row is a prompt, trained for each of five tasks apart; its score is the mean of theirs.  Prompts stand before the
encoder's words.  All rows: 30,000 steps of batch 32, Adafactor at a constant 0.3 (decay 0.8, weight decay 1e-5, no
scaling by the parameters, not factored), cross entropy of the answer's tokens (section 3 and the code's
configs/models/t5_1_1_prompt.gin).  By default 100 soft tokens that start from the class labels.  The development set is
evaluated every 1,000 steps and the best evaluation counts (the paper's early stopping).  Three seeds, as in the figure.

Expected on small models: uniform worst, labels best; longer is better up to 20 tokens and hardly so beyond.

Hours are computed, not measured: a run of the base model reads about 1,900 million places in training; at 4 x 85M
operations each (the encoder's) and 45% of an A100's 19.5 TFLOP/s in fp32 that takes about 21 hours.

Departures: answers are ranked by their log-probability, where the paper writes one and compares the words; MultiRC,
ReCoRD and WSC are left out (`experiments.superglue`), so the mean is of five tasks, not eight; the code's z-loss of
1e-4 is left out; class labels that a prompt of 1 has no room for are left out, as in the code.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import peft_jax as pj
from experiments import selection, superglue
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Work
from peft_jax import Forward, Method, methods, models, training
from peft_jax.models import Model
from peft_jax.training.data import Rows
from peft_jax.training.losses import Batch, inputs_of

START = 0  # T5's decoder starts with the padding token


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How a prompt starts ("uniform", "vocabulary" or "labels") and how long it is."""

    start: str
    length: int

    @property
    def name(self) -> str:
        return f"{self.start}-{self.length}"


@dataclasses.dataclass(frozen=True)
class Paper:
    """What all rows share."""

    model: str = "t5-base-lm-adapt"
    data: str = "superglue"
    tasks: tuple[str, ...] = superglue.TEXT_TO_TEXT
    steps: int = 30_000
    every: int = 1_000  # steps from one evaluation to the next
    batch: int = 32
    source: int = 512  # tokens
    rate: float = 0.3
    decay: float = 0.8
    weight_decay: float = 1e-5
    evaluated: int = 32  # rows at a time, each once for every answer


class Data(NamedTuple):
    train: Rows
    dev: Rows  # with the answers to choose from, and the right one
    answers: list[list[int]]  # the tokens of each class label, without their end


class Task(NamedTuple):
    model: Model
    data: dict[str, Data]


# -- data -------------------------------------------------------------------------------------------------------------


def load(s: Paper, source: str | None, folder: str | None) -> Task:
    path = Path(folder or "data/superglue")
    examples = {task: (superglue.read(path, task, "train"), superglue.read(path, task, "val")) for task in s.tasks}
    model = models.load(source or "google/t5-base-lm-adapt", remat="dots")
    if model.tokenizer is None or not model.config.is_encoder_decoder:
        raise ValueError(f"{source} is no encoder-decoder model with a tokenizer: give an LM-adapted T5 1.1")
    return Task(model, {task: encode(s, task, train, dev, model.tokenizer) for task, (train, dev) in examples.items()})


def encode(
    s: Paper, task: str, train: Sequence[superglue.Example], dev: Sequence[superglue.Example], tokenizer: Any
) -> Data:
    """Sources as long as the longest of them up to a multiple of 32, and at most `s.source`; answers with their end."""
    names = superglue.LABELS[task]
    ends = [tokenizer(name)["input_ids"] for name in names]
    answers = np.full((len(names), max(map(len, ends))), -1, np.int32)
    for row, ids in zip(answers, ends, strict=True):
        row[: len(ids)] = ids
    parts = []
    for examples in (train, dev):
        texts = [superglue.text(task, example.fields) for example in examples]
        found = tokenizer(texts, truncation=True, max_length=s.source)["input_ids"]
        length = min(s.source, -(-max(map(len, found)) // 32) * 32)
        rows = {"tokens": np.zeros((len(found), length), np.int32), "mask": np.zeros((len(found), length), bool)}
        for place, ids in enumerate(found):
            rows["tokens"][place, : len(ids)], rows["mask"][place, : len(ids)] = ids, True
        parts.append(rows | {"labels": np.array([example.label for example in examples], np.int32)})
    labels = parts[0].pop("labels")
    parts[1]["answers"] = np.broadcast_to(answers, (len(dev), *answers.shape))
    plain = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
    return Data(parts[0] | written(answers[labels]), parts[1], plain)


def written(answers: Any) -> dict[str, Any]:
    """What the decoder reads and predicts of answers ``[..., n]``, in which -1 is padding."""
    xp = np if isinstance(answers, np.ndarray) else jnp
    targets = xp.maximum(answers, 0)
    first = xp.full_like(targets[..., :1], START)
    before = xp.concatenate([first, targets[..., :-1]], axis=-1)
    return {"decoder_tokens": before, "targets": targets, "weights": (answers >= 0).astype(np.float32)}


def log_probabilities(forward: Forward, params: Any, batch: Batch) -> Float[Array, "batch answers"]:
    """Of each answer that a row may have: the sum over its tokens."""
    rows, choices = batch["answers"].shape[:2]
    answers = batch["answers"].reshape(rows * choices, -1)
    repeated = {name: jnp.repeat(batch[name], choices, axis=0) for name in ("tokens", "mask")} | written(answers)
    logp = jax.nn.log_softmax(forward(params, inputs_of(repeated)).astype(jnp.float32))
    picked = jnp.take_along_axis(logp, repeated["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(picked * repeated["weights"], axis=-1).reshape(rows, choices)


def chosen(forward: Forward, params: Any, batch: Batch) -> Array:
    return jnp.argmax(log_probabilities(forward, params, batch), axis=-1)


# -- runs -------------------------------------------------------------------------------------------------------------


def method_of(row: Prompt, answers: list[list[int]]) -> Method:
    if row.start == "labels":
        return methods.prompt_tuning(row.length, labels=answers[: row.length])
    return methods.prompt_tuning(row.length, start=row.start)


def optimiser(s: Paper) -> optax.GradientTransformation:
    return optax.adafactor(
        s.rate,
        decay_rate=s.decay,
        weight_decay_rate=s.weight_decay,
        multiply_by_parameter_scale=False,
        factored=False,
    )


def run(task: Task, s: Paper, row: Prompt, seed: int) -> Outcome:
    metrics, train, evaluated, count = {}, Work(0, 0), Work(0, 0), pj.count(task.model.params)
    for name, data in task.data.items():
        best, count = _train(task.model, s, row, seed, name, data)
        metrics[name] = best.value
        choices, soft = data.dev["answers"].shape[1], row.length
        train = _add(train, best.train._replace(places=s.steps * s.batch * _places(data.train, soft)))
        tokens = best.evaluations * choices * int(data.dev["mask"].sum())
        places = best.evaluations * choices * len(data.dev["tokens"]) * _places(data.dev, soft)
        evaluated = _add(evaluated, Work(tokens, places, best.seconds))
    metrics["score"] = float(np.mean(list(metrics.values())))
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, train, evaluated)


def _train(model: Model, s: Paper, row: Prompt, seed: int, name: str, data: Data) -> tuple[selection.Best, Any]:
    """One task's prompt."""
    key, tx = jax.random.key(seed), optimiser(s)
    params, forward = method_of(row, data.answers)(key, model.params, model.forward)
    step = training.make_step(forward, tx)
    state, frozen = training.init_state(params, tx, key)
    right = data.dev["labels"]

    def value(params: Any) -> float:
        predicted = selection.over(chosen, forward, params, data.dev, s.evaluated)
        return superglue.score(name, predicted, right).score

    begin = time.perf_counter()
    batches = training.batches(data.train, s.batch, seed)
    best = selection.keep_best(step, state, frozen, batches.batch, s.steps, s.every, value)
    print(
        f"{row.name}, seed {seed}, {name}: {best.value:.1f} at step {best.step} ({time.perf_counter() - begin:.0f} s)"
    )
    return best, pj.count(params)


def _add(a: Work, b: Work) -> Work:
    return Work(a.tokens + b.tokens, a.places + b.places, a.seconds + b.seconds)


def _places(rows: Rows, soft: int) -> int:
    """Of a row: source, prompt and answer."""
    answer = rows["answers"] if "answers" in rows else rows["targets"]
    return rows["tokens"].shape[1] + soft + answer.shape[-1]


# Of the real data, about: the development set's rows, the answers to choose from, the tokens of the longest source.
SIZES = {"boolq": (3_270, 2, 512), "cb": (56, 3, 352), "copa": (100, 2, 96), "rte": (277, 2, 352), "wic": (638, 2, 160)}


def places(s: Paper, row: Prompt) -> tuple[int, int]:
    answer = 8
    sizes = [(dev * choices, min(length, s.source) + row.length + answer) for dev, choices, length in SIZES.values()]
    evaluations = -(-s.steps // s.every)
    train = sum(s.steps * s.batch * length for _, length in sizes)
    return train, sum(evaluations * rows * length for rows, length in sizes)


def prompts(*pairs: tuple[str, int]) -> tuple[Prompt, ...]:
    return tuple(Prompt(*pair) for pair in pairs)


PAPER = Profile(
    parts=(
        Part(
            "Figure 3b: how a prompt of 100 tokens starts",
            prompts(("uniform", 100), ("vocabulary", 100), ("labels", 100)),
            {},
        ),
        Part("Figure 3a: how long it is", prompts(*(("labels", length) for length in (1, 5, 20, 100, 150))), {}),
    ),
    settings=Paper(),
    metrics=(
        Metric("score", "mean of five, %", 1),
        *(Metric(task, f"{superglue.FOLDERS[task]}, %", 1) for task in superglue.TEXT_TO_TEXT),
    ),
    speed=Speed(26_000, 52_000, "assumed of one A100 in fp32, not measured"),
    places=places,
    load=load,
    run=run,
)
