"""What LongLoRA's two tables share: a model whose positions are interpolated, long stretches of one book, one run.

SmolLM2-135M knows 8,192 positions.  They are divided by 4 (position interpolation: 32,768 positions), which breaks the
model at every length; it is then fine-tuned on stretches of the first 100 chapters of Moby-Dick, and measured with full
attention, at its original cost, on the last ones: `training.perplexity`, in windows that begin 256 tokens apart, and
`experiments.passkey`.  So what is measured is recovery: texts beyond the model's own 8,192 tokens are more than two CPU
cores can train on.

Rates were looked for on chapters 101 to 110, with another seed and 120 steps, before a table was run.  Untrained, the
perplexity at 256 is 245 there (76 without interpolation).  LoRA has 91 at 2e-3 and 89 at 4e-3.  With norms and
embedding at 2e-3 and the embedding at 1e-3, 3e-4, 1e-4 and 3e-5 it has 159, 104, 94 and 94; full fine-tuning at
1e-4 has 121.  LoRA and norms learn at 2e-3 in all rows, matrices
that train whole at 1e-4.  The paper has one rate, 2e-5, and 1,000 steps.

Seeds vary what is drawn for LoRA, the stretches, and the passkeys.  Every stretch is as long as the text that attention
is meant for; a group is a quarter of it.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import peft_jax as pj
from experiments import corpora, passkey
from experiments.data import smollm2
from experiments.harness import Metric, Outcome, Work, train
from peft_jax import Forward, Method, methods, models, training
from peft_jax.core import Params
from peft_jax.models import llama, rotary
from peft_jax.models.loading import Model
from peft_jax.training.step import Step

TRAINED, CHOSEN = 100, 110  # chapters to train on, and up to which rates were chosen
PARTS = {"lora": None, "lora-norm": "norm", "lora-embed": "embed", "lora-both": "embed|norm"}


@dataclasses.dataclass(frozen=True)
class Row:
    """What trains ('' for nothing), under which attention; which positions it has; whether passkeys are its measure."""

    name: str
    trains: str = ""
    attention: str = "shifted"
    interpolated: bool = True
    passkeys: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all rows share."""

    model: str = "SmolLM2-135M-Instruct.Q4_1.gguf"
    data: str = "Moby-Dick"
    factor: float = 4.0
    rank: int = 8
    alpha: float = 16.0
    group: float = 1 / 4
    length: int = 256
    steps: int = 80
    warmup: int = 4
    rate: float = 2e-3  # of LoRA and norms
    whole_rate: float = 1e-4  # of matrices that train whole
    clip: float = 1.0
    windows: tuple[int, ...] = (256, 512, 1024)
    stride: int = 256
    evaluated: int = 1024  # tokens
    asked: tuple[int, ...] = (256, 512)
    questions: int = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The model as it is, and with interpolated positions; tokens to train on and to evaluate."""

    model: Model
    longer: Forward
    text: np.ndarray
    held_out: np.ndarray


def load(s: Settings, source: str | None, folder: str | None) -> Task:
    if folder is not None:
        raise ValueError("the laptop profile reads the book that `make data-tables` fetches: leave --data out")
    model = models.load(smollm2() if source is None else source, remat="none")
    chapters = corpora.moby_dick()
    text, held_out = (
        np.asarray(model.tokenizer("\n\n".join(part))["input_ids"], np.int32)
        for part in (chapters[:TRAINED], chapters[CHOSEN:])
    )
    return Task(model, longer(model, s.factor), text, held_out)


def longer(model: Model, factor: float) -> Forward:
    """The model's forward function, its positions divided by `factor`."""
    config = rotary.rescaled(model.config, {"rope_type": "linear", "factor": factor})
    return llama.build(config, scan="layers" in model.params["model"], remat="none")


def method_of(s: Settings, row: Row) -> Method:
    if row.trains == "full":
        learnt = [methods.unfreeze("", keep_base=False)]
    else:
        learnt = [methods.lora(s.rank, s.alpha, "(q|k|v|o)_proj")]
        whole = PARTS[row.trains]
        learnt += [methods.unfreeze(whole, name="whole")] if whole else []
    if row.attention != "full":
        learnt.append(methods.shift_attention(s.group, wrap=row.attention == "wrapped", shift=row.attention != "short"))
    return pj.chain(*learnt)


@functools.lru_cache(maxsize=1)
def compiled(task: Task, s: Settings, trains: str, attention: str) -> tuple[Any, Step]:
    """What the seeds of a row share.  AdamW with the paper's β and no decay, constant after a warm-up."""
    method = method_of(s, Row("", trains, attention))
    tx = adamw(s, s.whole_rate if trains == "full" else s.rate)
    if "embed" in (PARTS.get(trains) or ""):
        params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, task.longer), task.model.params)
        labels = pj.labels(pj.partition(params)[0], task.longer, {"whole": "embed"})
        tx = optax.partition({"whole": adamw(s, s.whole_rate), "rest": tx}, labels)
    loss = functools.partial(training.next_token, chunk=s.length)
    return tx, training.make_step(method.wrap(task.longer), tx, loss, clip=s.clip)


def adamw(s: Settings, rate: float) -> optax.GradientTransformation:
    return optax.adamw(optax.linear_schedule(0.0, rate, s.warmup), b2=0.95, weight_decay=0.0)


class Learnt(NamedTuple):
    params: Params  # merged: plain arrays
    trainable: int
    total: int
    cost: Work


@functools.lru_cache(maxsize=3)  # a row's seeds
def learn(task: Task, s: Settings, trains: str, attention: str, seed: int) -> Learnt:
    method, key, random = method_of(s, Row("", trains, attention)), jax.random.key(seed), np.random.default_rng(seed)
    params = method.init(key, task.model.params, task.longer)
    tx, step = compiled(task, s, trains, attention)
    state, frozen = training.init_state(params, tx, key)
    starts = random.integers(0, len(task.text) - s.length, s.steps)

    def batch(index: int) -> dict[str, Any]:
        row = task.text[starts[index] : starts[index] + s.length + 1][None]
        ones = np.ones((1, s.length), np.float32)
        return {"tokens": row[:, :-1], "targets": row[:, 1:], "weights": ones, "mask": ones > 0}

    count = pj.count(params)
    del params
    state, cost = train(step, state, frozen, batch, s.steps)
    return Learnt(pj.merge(pj.combine(state.trainables, frozen)), count.trainable, sum(count[:2]), cost)


def run(task: Task, s: Settings, row: Row, seed: int) -> Outcome:
    forward = task.longer if row.interpolated else task.model.forward
    learnt = learn(task, s, row.trains, row.attention, seed) if row.trains else None
    params = task.model.params if learnt is None else learnt.params
    begin, metrics, computed = time.perf_counter(), dict[str, float](), places(s, row)[1]
    if row.passkeys:
        seeds = range(s.questions * seed, s.questions * (seed + 1))
        for length in s.asked:
            share = passkey.accuracy(forward, params, task.model.tokenizer, length, seeds)
            metrics[f"passkey {length}"] = 100 * share
    else:
        text = task.held_out[: s.evaluated]
        for window in s.windows:
            metrics[f"perplexity {window}"] = training.perplexity(forward, params, text, window, s.stride)
    evaluated = Work(computed, computed, time.perf_counter() - begin)
    if learnt is None:
        return Outcome(metrics, 0, pj.count(params).frozen, Work(0, 0), evaluated)
    cost = Work(0, 0) if row.passkeys else learnt.cost  # its training is another row's
    return Outcome(metrics, learnt.trainable, learnt.total, cost, evaluated)


def places(s: Settings, row: Row) -> tuple[int, int]:
    if row.passkeys:
        evaluated = s.questions * sum(s.asked)
    else:
        evaluated = sum(((s.evaluated - window) // s.stride + 1) * window for window in s.windows)
    return s.steps * s.length if row.trains and not row.passkeys else 0, evaluated


def perplexities(s: Settings) -> tuple[Metric, ...]:
    return tuple(Metric(f"perplexity {window}", f"perplexity at {window:,}", 1) for window in s.windows)


def found(s: Settings) -> tuple[Metric, ...]:
    return tuple(Metric(f"passkey {length}", f"passkeys found at {length:,}, %", 0) for length in s.asked)
