"""The LoRA family writes: E2E, a restaurant's attributes in and a sentence about it out.

Papers: Hu et al. 2021, "LoRA", https://arxiv.org/abs/2106.09685, Table 3; Kopiczko et al. 2023, "VeRA",
https://arxiv.org/abs/2310.11454, Table 3: GPT-2 medium and large on E2E.

    make data-tables                                       what the laptop profile reads
    python -m experiments.run lora_family_e2e              laptop: 9 runs, about 9 minutes on two CPU cores
    python -m experiments.run lora_family_e2e --profile paper --model PATH --data PATH
                                                           paper: 9 runs, about 1.3 hours each on one A100
    python -m experiments.tables                           the table, from the results

laptop   SmolLM2-135M on the examples of `prefix_ablation`, which has full fine-tuning, LoRA at rank 8 and prefixes
         after the same steps (`experiments.restaurants` says what is scored).  Queries and values: LoRA and DyLoRA at
         rank 4, α = 4 (DyLoRA: a rank drawn at every step, measured at rank 4); VeRA with 256 directions.  Each of 240
         examples once; AdamW, linear decay to 0, no weight decay, gradient norm clipped at 1.  LoRA's rate is that of
         `prefix_ablation`, 1e-2, and DyLoRA's; VeRA's is ten times it, as in the paper.
paper    GPT-2 medium on all of E2E (`lora_ablation` says how it is trained and written): LoRA and DyLoRA at rank 4,
         α = 32, rate 2e-4; VeRA with 1024 directions, rate 1e-1.  Not run.  Expected BLEU: LoRA 70.4 (68.9 in VeRA's
         paper), VeRA 70.1.
"""

import dataclasses
import functools
import time

import jax
import optax

import peft_jax as pj
from experiments import lora_ablation, restaurants
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table, Work, train
from peft_jax import Forward, Method, methods, training
from peft_jax.training.step import Step


@dataclasses.dataclass(frozen=True)
class Row:
    """A method, how many directions, its α (of LoRA and DyLoRA) and its rate."""

    kind: str
    size: int
    rate: float
    alpha: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}"


def places(s: restaurants.Laptop, row: Row) -> tuple[int, int]:
    return s.steps * s.batch * s.length, s.sentences * s.length + s.held_out * (s.prompt + s.new_tokens)


def method_of(row: Row, dropout: float = 0.0) -> Method:
    """On queries and values."""
    if row.kind == "vera":
        return methods.vera(row.size)
    make = methods.dylora if row.kind == "dylora" else methods.lora
    return make(row.size, row.alpha, dropout=dropout)


@functools.lru_cache(maxsize=1)
def compiled(forward: Forward, s: restaurants.Laptop, row: Row) -> tuple[Forward, optax.GradientTransformation, Step]:
    """The adapted model and its step, which the seeds of a row share."""
    adapted = method_of(row).wrap(forward)
    tx = optax.adamw(optax.linear_schedule(row.rate, 0.0, s.steps), weight_decay=0.0)
    return adapted, tx, training.make_step(adapted, tx, clip=s.clip)


def run(task: restaurants.Task, s: restaurants.Laptop, row: Row, seed: int) -> Outcome:
    model, key = task.model, jax.random.key(seed)
    params = method_of(row).init(key, model.params, model.forward)
    count = pj.count(params)
    _, tx, step = compiled(model.forward, s, row)
    state, frozen = training.init_state(params, tx, key)
    batches = training.batches(restaurants.rows(task.train, s.length, infix=False), s.batch, seed)
    state, cost = train(step, state, frozen, batches.batch, s.steps)
    begin = time.perf_counter()
    merged = pj.merge(pj.combine(state.trainables, frozen))  # plain arrays: one program for all rows
    score = restaurants.score(model.forward, merged, s, model.tokenizer, task.held_out)
    evaluated = Work(score.tokens, places(s, row)[1], time.perf_counter() - begin)
    return Outcome(score.metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


LORA, VERA = "LoRA's: GPT-2 M, BLEU", "VeRA's: GPT-2 M, BLEU"
FIGURES = {"lora": {LORA: 70.4, VERA: 68.9}, "vera": {VERA: 70.1}}


def part(rows: tuple[Row, ...], stands_for: dict[str, str]) -> Part:
    return Part("Table 3: E2E", rows, {row.name: FIGURES.get(row.kind, {}) for row in rows}, stands_for)


ROWS = (Row("lora", 4, 1e-2, 4.0), Row("dylora", 4, 1e-2, 4.0), Row("vera", 256, 1e-1))

LAPTOP = Profile(
    parts=(part(ROWS, {"vera-256": "vera-1024"}),),
    settings=restaurants.Laptop(),
    metrics=restaurants.METRICS,
    speed=Speed(300, 800, "from processor time, on two CPU cores"),
    places=places,
    load=restaurants.prepare,
    run=run,
)


def run_paper(task: lora_ablation.E2E, s: lora_ablation.Paper, row: Row, seed: int) -> Outcome:
    s = dataclasses.replace(s, learning_rate=row.rate)
    return lora_ablation.run_method(task, s, method_of(row, 0.0 if row.kind == "vera" else s.dropout), seed)


PAPER = Profile(
    parts=(part((Row("lora", 4, 2e-4, 32.0), Row("dylora", 4, 2e-4, 32.0), Row("vera", 1024, 1e-1)), {}),),
    settings=lora_ablation.Paper(),
    metrics=(Metric("bleu", "BLEU", 2), Metric("loss", "validation loss, nats", 3)),
    speed=lora_ablation.PAPER.speed,
    places=lora_ablation.paper_places,
    load=lora_ablation.load_e2e,
    run=run_paper,
)

TABLE = Table(
    "lora_family_e2e",
    "The LoRA family writes",
    "Hu et al. 2021, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685), Table 3; Kopiczko et al. 2023, "
    "[arXiv 2310.11454](https://arxiv.org/abs/2310.11454), Table 3",
    {"laptop": LAPTOP, "paper": PAPER},
)
