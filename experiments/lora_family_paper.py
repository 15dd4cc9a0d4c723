"""The LoRA family on GLUE, with the papers' models and numbers: RoBERTa-base and -large, and DeBERTaV3-base.

    python -m experiments.run lora_family --profile paper --data PATH [--model PATH] [--only base-rte-lora]

--data takes GLUE's folder (`experiments.glue`).  --model takes a folder of the three models' directories, roberta-base,
roberta-large and deberta-v3-base; without it they come from the Hub.

Rows are a model, a task and a method; the head is new in each and trains with it.

base, LoRA       rank 8 on queries and values, α = 8, and the rates, epochs and batches of its Table 9
base, DyLoRA     the same with α = 16, frozen and uniform as the released scripts have it, weight decay 0.1
base, VeRA       rank 1024, d from 0.1, with its own rates of vectors and head, epochs and batches (six of the tasks)
base, full       rate 2e-5, 10 epochs of batch 16: within what RoBERTa's paper tries (Liu et al. 2019, appendix)
large, LoRA      α = 16, SST-2 and STS-B, of which the authors' scripts are known; eight devices' batches as one
deberta          AdaLoRA, 8 directions on average of 12, and LoRA at rank 8, on all six matrices of a layer; both with
                 AdaLoRA's Table 8: rates, epochs, γ, tᵢ, ΔT, t_f; batch 32, α = 32, 100 steps of warm-up

AdamW; the rate rises over the first 6% of the steps and falls to 0 linearly.  After every epoch the development set is
evaluated and the best epoch counts, as in LoRA's and VeRA's papers.  The first measure is the one that they print:
Matthews' correlation for CoLA, Pearson's for STS-B, accuracy for the rest (MNLI: both sets together).

Not run.  Expected, averages over the tasks: RoBERTa-base full 86.4 and LoRA 87.2 (its paper; by task below), VeRA 85.2
beside LoRA's 86.6 on six tasks; DyLoRA at rank 8 85.44 beside LoRA's 85.27; DeBERTaV3-base: AdaLoRA 89.31, LoRA 88.34.

Hours are computed, not measured: places x 4 x 86M operations (302M for large; 6 where all of the model trains) at 45%
of an A100's 19.5 TFLOP/s in fp32: from minutes (MRPC) to 17 hours (LoRA on MNLI); one seed of all about 150.

Departures: MRPC, RTE and STS-B start from the pretrained model, as in VeRA's paper, and not from the best adapter of
MNLI; texts are padded to 128 tokens (QNLI and RTE 256) where the authors pad to up to 512, which is cheaper and all but
the same; the model's own dropout is not applied, nor any before the head; STS-B is the first of two scores of a head
for classes, whose squared error is the loss; leftover examples of an epoch are left out of it.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import peft_jax as pj
from experiments import glue, selection
from experiments.encoder_runs import beside_head, rising
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Work
from experiments.p_tuning_v2_data import scores
from peft_jax import Forward, Method, Ports, methods, models, training, trees
from peft_jax.core import Params
from peft_jax.training.losses import Batch, inputs_of
from peft_jax.weights import Unfrozen

QUERY_VALUE = r"\.(query|value)$"
ALL_SIX = r"encoder\.layer\..*\.(query|key|value|dense)(_proj)?$"
HUB = {
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "deberta-v3-base": "microsoft/deberta-v3-base",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, a task, what is trained, and how.

    size         the rank, or how many directions on average
    allocation   of AdaLoRA: γ, tᵢ, ΔT, t_f
    """

    model: str
    task: str
    method: str
    rate: float
    epochs: int
    batch: int
    head_rate: float
    size: int = 8
    alpha: float = 8.0
    decay: float = 0.0
    warmup_steps: int = 0  # in place of a share
    allocation: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        return f"{SHORT[self.model]}-{self.task}-{self.method}"


SHORT = {"roberta-base": "base", "roberta-large": "large", "deberta-v3-base": "deberta"}


@dataclasses.dataclass(frozen=True)
class Paper:
    """What all rows share."""

    model: str = "roberta-base, roberta-large and deberta-v3-base"
    data: str = "glue"
    length: int = 128
    long: int = 256  # of the tasks in LONG
    warmup: float = 0.06
    evaluated: int = 64  # rows at a time
    steps: int | None = None  # by default, what the epochs make

    def row_length(self, task: str) -> int:
        return self.long if task in ("qnli", "rte") else self.length


class Size(NamedTuple):
    """Examples to train on and in the development sets."""

    train: int
    dev: int


SIZES = {
    "mnli": Size(392_702, 19_647),
    "sst2": Size(67_349, 872),
    "mrpc": Size(3_668, 408),
    "cola": Size(8_551, 1_043),
    "qnli": Size(104_743, 5_463),
    "qqp": Size(363_846, 40_430),
    "rte": Size(2_490, 277),
    "stsb": Size(5_749, 1_500),
}

# Rate, epochs and batch of LoRA (Table 9); rate, the head's, epochs of VeRA; rate, epochs, γ, tᵢ, ΔT, t_f of AdaLoRA.
LORA = {
    "mnli": (5e-4, 30, 16),
    "sst2": (5e-4, 60, 16),
    "mrpc": (4e-4, 30, 16),
    "cola": (4e-4, 80, 32),
    "qnli": (4e-4, 25, 32),
    "qqp": (5e-4, 25, 16),
    "rte": (5e-4, 80, 32),
    "stsb": (4e-4, 40, 16),
}
LORA_LARGE = {"sst2": (4e-4, 10, 64), "stsb": (3e-4, 10, 32)}
VERA = {
    "sst2": (4e-3, 4e-3, 60),
    "mrpc": (1e-2, 4e-3, 30),
    "cola": (1e-2, 1e-2, 80),
    "qnli": (1e-2, 4e-3, 25),
    "rte": (4e-3, 1e-2, 160),
    "stsb": (1e-2, 1e-2, 80),
}
ADALORA = {
    "mnli": (5e-4, 7, 0.1, 8000, 100, 50000),
    "sst2": (8e-4, 24, 0.1, 6000, 100, 22000),
    "mrpc": (1e-3, 30, 0.1, 600, 1, 1800),
    "cola": (5e-4, 25, 0.5, 800, 10, 3500),
    "qnli": (1.2e-3, 5, 0.1, 2000, 100, 8000),
    "qqp": (5e-4, 5, 0.1, 8000, 100, 25000),
    "rte": (1.2e-3, 50, 0.3, 600, 1, 1800),
    "stsb": (2.2e-3, 25, 0.1, 800, 10, 2000),
}


def base(task: str) -> list[Row]:
    """RoBERTa-base on a task."""
    rate, epochs, batch = LORA[task]
    found = [
        Row("roberta-base", task, "full", 2e-5, 10, 16, 2e-5),
        Row("roberta-base", task, "lora", rate, epochs, batch, rate),
        Row("roberta-base", task, "dylora", rate, epochs, batch, rate, alpha=16.0, decay=0.1),
    ]
    if task in VERA:
        rate, head, epochs = VERA[task]
        found.append(Row("roberta-base", task, "vera", rate, epochs, 64, head, 1024))
    return found


def large(task: str) -> Row:
    rate, epochs, batch = LORA_LARGE[task]
    return Row("roberta-large", task, "lora", rate, epochs, batch, rate, alpha=16.0, decay=0.1)


def deberta(task: str) -> list[Row]:
    rate, epochs, gamma, *times = ADALORA[task]
    shared: dict[str, Any] = {"alpha": 32.0, "warmup_steps": 100}
    return [
        Row("deberta-v3-base", task, "lora-six", rate, epochs, 32, rate, **shared),
        Row("deberta-v3-base", task, "adalora", rate, epochs, 32, rate, **shared, allocation=(gamma, *map(int, times))),
    ]


# -- figures ----------------------------------------------------------------------------------------------------------

BY_TASK = dict(zip(LORA, (87.5, 95.1, 89.7, 63.4, 93.3, 90.8, 86.6, 91.5), strict=True))
PRINTED = "the paper's, %"
FIGURES: dict[str, dict[str, float]] = {
    **{f"base-{task}-lora": {PRINTED: value} for task, value in BY_TASK.items()},
    "deberta-cola-lora-six": {PRINTED: 69.82},
    "deberta-cola-adalora": {PRINTED: 71.45},
    "deberta-rte-lora-six": {PRINTED: 85.2},
    "deberta-rte-adalora": {PRINTED: 88.09},
}


def part(title: str, rows: list[Row]) -> Part:
    return Part(title, tuple(rows), {row.name: FIGURES.get(row.name, {}) for row in rows})


# -- runs -------------------------------------------------------------------------------------------------------------


class Sources(NamedTuple):
    models: Path | None
    folder: Path

    def model(self, name: str) -> Any:
        return HUB[name] if self.models is None else self.models / name


def load(s: Paper, source: str | None, folder: str | None) -> Sources:
    """Where models and data are: each run reads its own."""
    path = Path(folder or "data/glue")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there: give the folder of CoLA, SST-2 and so on with --data")
    return Sources(None if source is None else Path(source), path)


def method_of(row: Row) -> Method:
    if row.method == "full":
        return methods.unfreeze(r"^(?!classifier)", keep_base=False)  # a new head trains anyway
    if row.method == "dylora":
        return methods.dylora(row.size, row.alpha, QUERY_VALUE, frozen=True)
    if row.method == "vera":
        return methods.vera(row.size, QUERY_VALUE)
    if row.method == "adalora":
        return methods.adalora(row.size, row.alpha, ALL_SIX)
    return methods.lora(row.size, row.alpha, ALL_SIX if row.method == "lora-six" else QUERY_VALUE)


def optimiser(s: Paper, row: Row, steps: int) -> optax.GradientTransformation:
    """AdamW with the head's own rate, and AdaLoRA's allocation round it.

    Where `steps` is not what the paper's epochs make, the allocation keeps its shares of them.
    """
    share = row.warmup_steps / steps if row.warmup_steps else s.warmup
    rates = (row.rate, row.head_rate)
    tx = beside_head(*(optax.adamw(rising(r, steps, share), weight_decay=row.decay) for r in rates))
    if row.allocation is None:
        return tx
    gamma, *times = row.allocation
    initial, every, final = map(int, times)
    whole = row.epochs * (SIZES[row.task].train // row.batch)
    initial, final = (round(x * steps / whole) for x in (initial, final))
    return methods.allocate_rank(tx, steps, initial_steps=initial, final_steps=final, every=every, orthogonality=gamma)


def squared_error(forward: Forward, params: Params, batch: Batch, ports: Ports = Ports()) -> tuple[Array, Array]:  # noqa: B008
    """Of the first score of each row: (Σ, count)."""
    found = forward(params, inputs_of(batch), ports)[:, 0].astype(jnp.float32)
    return jnp.sum(jnp.square(found - jnp.asarray(batch["labels"]))), jnp.float32(found.shape[0])


def predicted(task: str, given: np.ndarray) -> np.ndarray:
    """Labels, or scores, of what a head for classes gives."""
    return given[:, 0] if task == "stsb" else np.argmax(given, axis=-1)


def run(sources: Sources, s: Paper, row: Row, seed: int) -> Outcome:
    key, task, kind = jax.random.key(seed), row.task, glue.TASKS[row.task]
    labels, place = max(len(kind.labels), 2), sources.model(row.model)
    model = models.load(place, head="classification", labels=labels, key=key, remat="dots")
    if model.tokenizer is None:
        raise ValueError(f"{place} holds no tokenizer: give the directory of a whole model")
    if not any(isinstance(weight, Unfrozen) for weight in trees.weights(model.params)):
        raise ValueError(f"{place} has a head of its own: give a pretrained model, whose head is then new")
    read = lambda split: glue.rows(  # noqa: E731
        glue.read(sources.folder, task, split), model.tokenizer, s.row_length(task), not kind.labels
    )
    learnt, dev = read("train"), [read(split) for split in glue.splits(task)]
    held_out = {name: np.concatenate([part[name] for part in dev]) for name in dev[0]}

    batches = training.batches(learnt, row.batch, seed)
    epoch = len(batches)
    steps = s.steps or row.epochs * epoch
    params, forward = method_of(row)(key, model.params, model.forward)
    count, tx = pj.count(params), optimiser(s, row, steps)
    step = training.make_step(forward, tx, training.classification if kind.labels else squared_error, clip=1.0)
    state, frozen = training.init_state(params, tx, key)
    del model, params  # where all of it trains, the state holds it

    def measured(params: Params) -> glue.Score:
        given = selection.over(scores, forward, params, held_out, s.evaluated)
        return glue.score(task, predicted(task, given), held_out["labels"])

    best = selection.keep_best(step, state, frozen, batches.batch, steps, epoch, lambda p: measured(p).score)
    begin = time.perf_counter()
    metrics = measured(best.params)._asdict() | {"epoch": best.step / epoch}
    seconds, times = best.seconds + time.perf_counter() - begin, best.evaluations + 1
    evaluated = Work(times * int(held_out["mask"].sum()), times * held_out["tokens"].size, seconds)
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, best.train, evaluated)


def places(s: Paper, row: Row) -> tuple[int, int]:
    """Of the real data: see `SIZES`."""
    size, length = SIZES[row.task], s.row_length(row.task)
    epoch = size.train // row.batch
    steps = s.steps or row.epochs * epoch
    return steps * row.batch * length, (-(-steps // epoch) + 1) * size.dev * length


PAPER = Profile(
    parts=(
        part("RoBERTa-base", [row for task in LORA for row in base(task)]),
        part("RoBERTa-large", [large(task) for task in LORA_LARGE]),
        part("DeBERTaV3-base", [row for task in ADALORA for row in deberta(task)]),
    ),
    settings=Paper(),
    metrics=(
        Metric("score", "score, %", 1),
        Metric("beside", "second measure, %", 1),
        Metric("epoch", "best epoch", 0),
    ),
    speed=Speed(25_000, 50_000, "assumed of one A100 in fp32, not measured"),
    places=places,
    load=load,
    run=run,
)
