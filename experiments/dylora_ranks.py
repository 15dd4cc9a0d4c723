"""DyLoRA: one run for every rank, beside LoRA cut to each rank and LoRA trained at each rank.

Paper: Valipour et al. 2022, "DyLoRA", https://arxiv.org/abs/2210.07558, Table 2 (every rank from 1 to 8, RoBERTa-base
on GLUE), its ablation of frozen directions, and its times on MRPC: a sweep of LoRA over eight ranks is eight runs of
400 s, and DyLoRA one of 408 s.

    make data-tables                              what it reads
    python -m experiments.run dylora_ranks        laptop: 12 runs, about 12 minutes on two CPU cores
    python -m experiments.tables                  the table, from the results

laptop   all-MiniLM-L6-v2 on the sentiment of movie reviews (`experiments.encoder_tasks`), queries and values, largest
         rank 8, α = 16 and the scale α/b at every rank b, as in the paper.  `experiments.encoder_runs` says what a run
         is.  Every run is measured at all ranks from 1 to 8.

         dylora          one run; a step trains the directions 1..b
         dylora-frozen   one run; a step trains the b-th alone, as the released scripts do
         lora-cut        one run of LoRA at rank 8, cut to its first b directions (the code's scale: α/b)
         lora-each       eight runs of LoRA, one at each rank: what DyLoRA saves; its seconds are those of all eight

         "training, s" is the time of the steps alone, compilation apart; its ratio between lora-each and dylora is the
         paper's "4-7x faster", which is against such a sweep and not against one run.  All rows learn at the same rate,
         3e-3, that of `lora_family`; the heads at 1e-2.  80 steps of 16 reviews.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from experiments import encoder_runs as runs
from experiments.encoder_runs import QUERY_VALUE, Compiled, Laptop, Task, Tasks
from experiments.harness import Metric, Outcome, Panel, Part, Profile, Speed, Table, Work
from peft_jax import methods
from peft_jax.models.loading import Model

RANKS = tuple(range(1, 9))


REVIEWS = Task("reviews", "classification", length=32, batch=16, steps=80, held_out=480)


@dataclasses.dataclass(frozen=True)
class Row:
    name: str


@dataclasses.dataclass(frozen=True)
class Settings(Laptop):
    """What all rows share."""

    task: Task = REVIEWS
    alpha: float = 16.0
    rate: float = 3e-3


@functools.lru_cache(maxsize=len(RANKS))
def compiled(model: Model, s: Settings, way: str, rank: int) -> Compiled:
    """What the seeds of a row share, at each rank that it trains."""
    if way.startswith("dylora"):
        method = methods.dylora(rank, s.alpha, QUERY_VALUE, frozen=way == "dylora-frozen")
    else:
        method = methods.lora(rank, s.alpha, QUERY_VALUE)
    return runs.compiled(model, s, method, runs.adam(s, s.rate, s.task.steps))


def load(s: Settings, source: str | None, folder: str | None) -> Tasks:
    return runs.load(s, source, folder, (s.task,))


def run(tasks: Tasks, s: Settings, row: Row, seed: int) -> Outcome:
    """Trains at one rank or at all of them; measures at all of them."""
    model, metrics, trainable, total = tasks.models[s.task], dict[str, float](), 0, 0
    cost = evaluated = Work(0, 0)
    for top in RANKS if row.name == "lora-each" else RANKS[-1:]:
        learnt = runs.learn(tasks, s.task, compiled(model, s, row.name, top), seed)
        cost, trainable, total = add(cost, learnt.cost), learnt.numbers.trainable, sum(learnt.numbers[:2])
        for rank in (top,) if row.name == "lora-each" else RANKS:
            found, more = runs.judge(tasks, s, s.task, methods.truncate(learnt.params, rank))
            metrics |= {f"{name} {rank}": value for name, value in found.items()}
            evaluated = add(evaluated, more)
    return Outcome(metrics | {"seconds": cost.seconds}, trainable, total, cost, evaluated)


def add(one: Work, other: Work) -> Work:
    return Work(one.tokens + other.tokens, one.places + other.places, one.seconds + other.seconds)


def places(s: Settings, row: Row) -> tuple[int, int]:
    train, evaluate = runs.places(s.task)
    return train * (len(RANKS) if row.name == "lora-each" else 1), evaluate * len(RANKS)


def curves(axes: Any, found: Mapping[str, list[dict[str, float]]]) -> None:
    """Accuracy against the rank, a line a row."""
    for name, seeds in found.items():
        if seeds:
            means = [sum(m[f"accuracy {rank}"] for m in seeds) / len(seeds) for rank in RANKS]
            axes.plot(RANKS, means, "o-", ms=3, label=name)
    axes.set_xlabel("rank", fontsize=7)
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3)


# -- what the paper prints: averages over GLUE, RoBERTa-base -----------------------------------------------------------

QUALITY: dict[str, dict[str, float]] = {
    "dylora": {"GLUE at rank 1, %": 84.22, "GLUE at rank 8, %": 85.44},
    "lora-cut": {"GLUE at rank 1, %": 54.9, "GLUE at rank 8, %": 85.27},
}
COST: dict[str, dict[str, float]] = {
    "dylora": {"ablation, rank 1, %": 83.3, "ablation, rank 8, %": 84.47, "MRPC: training, s": 408.39},
    "dylora-frozen": {"ablation, rank 1, %": 81.61, "ablation, rank 8, %": 83.31},
    "lora-each": {"MRPC: training, s": 3199.6},
}
ROWS = tuple(Row(name) for name in ("dylora", "dylora-frozen", "lora-cut", "lora-each"))
ACCURACY = tuple(Metric(f"accuracy {rank}", f"accuracy at rank {rank}, %", 1) for rank in (1, 2, 4, 8))
LOSS = tuple(Metric(f"loss {rank}", f"loss at rank {rank}, nats", 3) for rank in (1, 8))

LAPTOP = Profile(
    parts=(
        Part("Table 2: every rank", ROWS, QUALITY, metrics=ACCURACY, panels=(Panel("accuracy by rank, %", curves),)),
        Part("Frozen directions, and the cost", ROWS, COST, metrics=(*LOSS, Metric("seconds", "training, s", 1))),
    ),
    settings=Settings(),
    metrics=ACCURACY,
    speed=Speed(2_700, 8_000, "from processor time, on two CPU cores"),
    places=places,
    load=load,
    run=run,
)

TABLE = Table(
    "dylora_ranks",
    "DyLoRA: every rank from one run",
    "Valipour et al. 2022, [arXiv 2210.07558](https://arxiv.org/abs/2210.07558), Table 2, the ablation of frozen "
    "directions, and the times on MRPC, of which the sweep's is 8 x 399.95 s",
    {"laptop": LAPTOP},
)
