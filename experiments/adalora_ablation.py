"""AdaLoRA: what its scores, its regulariser and its budget are each good for, and where the ranks go.

Paper: Zhang et al. 2023, "AdaLoRA", https://arxiv.org/abs/2303.10512, its ablations on SST-2 (section 4.4) and its
picture of the final ranks, on DeBERTaV3-base.

    make data-tables                                  what it reads
    python -m experiments.run adalora_ablation        laptop: 18 runs, about 10 minutes on two CPU cores
    python -m experiments.tables                      the table and the ranks, from the results

laptop   all-MiniLM-L6-v2 on the sentiment of movie reviews (`experiments.encoder_tasks`), all six matrices of a layer,
         2 directions on average, of 3 at first.  `experiments.encoder_runs` says what a run is.

         full          sensitivity and its uncertainty, Ī Ū, summed over a triplet
         sensitivity   |w · ∂L/∂w| alone, neither smoothed nor weighed
         magnitude     |λ|
         no-gamma      as full, without the regulariser
         svd-lora      2 directions in every matrix from the first step to the last: nothing is allocated
         lora          LoRA at rank 2, the same budget

         64 steps of 16 reviews; ranks are allocated between a sixth of the steps and two thirds, every second step;
         γ = 0.1, β₁ = β₂ = 0.85, α = 16; the rates are those of `lora_family`, 1e-2 and for lora 3e-3.  A matrix's rank
         at the end is the number of its λ that are not 0.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from experiments import encoder_runs as runs
from experiments.encoder_runs import ALL_SIX, Compiled, Laptop, Task, Tasks
from experiments.harness import Metric, Outcome, Panel, Part, Profile, Speed, Table
from peft_jax import Forward, methods, trees
from peft_jax.core import Params
from peft_jax.methods.adalora import ranks as ranks_left
from peft_jax.models.loading import Model

MATRICES = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
SHORT = ("q", "k", "v", "o", "f1", "f2")


REVIEWS = Task("reviews", "classification", length=32, batch=16, steps=64, held_out=480)


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of score, and γ; `initial` directions at first, 0 for LoRA."""

    name: str
    score: str = "full"
    gamma: float = 0.1
    initial: int = 3


@dataclasses.dataclass(frozen=True)
class Settings(Laptop):
    """What all rows share."""

    task: Task = REVIEWS
    rank: int = 2
    alpha: float = 16.0
    every: int = 2
    rate: float = 1e-2
    lora_rate: float = 3e-3


@functools.lru_cache(maxsize=1)
def compiled(model: Model, s: Settings, row: Row) -> Compiled:
    """What a row's seeds share."""
    steps = s.task.steps
    tx = runs.adam(s, s.rate if row.initial else s.lora_rate, steps)
    if not row.initial:
        return runs.compiled(model, s, methods.lora(s.rank, s.rank, ALL_SIX), tx)
    method = methods.adalora(s.rank, s.alpha, ALL_SIX, initial_rank=row.initial)
    tx = methods.allocate_rank(
        tx,
        steps,
        initial_steps=steps // 6,
        final_steps=steps // 3,
        every=s.every,
        orthogonality=row.gamma,
        score=row.score,
    )
    return runs.compiled(model, s, method, tx)


def load(s: Settings, source: str | None, folder: str | None) -> Tasks:
    return runs.load(s, source, folder, (s.task,))


def ranks(params: Params, forward: Forward) -> dict[str, float]:
    """The rank of each matrix of each layer: ``{"rank 0 q": 3, ...}``."""
    found = dict[str, float]()
    for name, count in ranks_left(params, forward).items():
        end = next(short for whole, short in zip(MATRICES, SHORT, strict=True) if name.endswith(whole))
        found[f"rank {trees.layer_of(name)} {end}"] = float(count)
    return found


def run(tasks: Tasks, s: Settings, row: Row, seed: int) -> Outcome:
    model = tasks.models[s.task]
    learnt = runs.learn(tasks, s.task, compiled(model, s, row), seed)
    metrics, evaluated = runs.judge(tasks, s, s.task, learnt.params)
    if row.initial:
        metrics |= ranks(learnt.params, model.forward)
    return Outcome(metrics, learnt.numbers.trainable, sum(learnt.numbers[:2]), learnt.cost, evaluated)


def heat(row: str) -> Panel:
    """The final ranks of a row, a cell a matrix, averaged over the seeds."""

    def draw(axes: Any, found: Mapping[str, list[dict[str, float]]]) -> None:
        seeds = found[row]
        if not seeds:
            return
        layers = 1 + max(int(n.split()[1]) for n in seeds[0] if n.startswith("rank"))
        cells = [[sum(m[f"rank {i} {x}"] for m in seeds) / len(seeds) for i in range(layers)] for x in SHORT]
        axes.imshow(cells, cmap="Greens", vmin=0, vmax=5, aspect="auto")
        for y, line in enumerate(cells):
            for x, value in enumerate(line):
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=6)
        axes.set_yticks(range(len(SHORT)), SHORT)
        axes.set_xlabel("layer", fontsize=7)

    return Panel(f"{row}: ranks at the end", draw)


# -- what the paper prints: SST-2, DeBERTaV3-base ----------------------------------------------------------------------

FIGURES = {
    "full": {"SST-2, %": 96.1},
    "sensitivity": {"SST-2, %": 95.64},
    "magnitude": {"SST-2, %": 95.87},
    "no-gamma": {"SST-2, %": 95.1},
    "svd-lora": {"SST-2, %": 95.53},
}
ROWS = (
    Row("full"),
    Row("sensitivity", "sensitivity"),
    Row("magnitude", "magnitude"),
    Row("no-gamma", gamma=0.0),
    Row("svd-lora", initial=2),
    Row("lora", initial=0),
)

LAPTOP = Profile(
    parts=(Part("Scores, regulariser and budget", ROWS, FIGURES, panels=(heat("full"), heat("magnitude"))),),
    settings=Settings(),
    metrics=(Metric("accuracy", "accuracy, %", 1), Metric("loss", "loss, nats", 3)),
    speed=Speed(1_200, 8_000, "from processor time, on two CPU cores"),
    places=lambda s, row: runs.places(s.task),
    load=load,
    run=run,
)

TABLE = Table(
    "adalora_ablation",
    "AdaLoRA: scores, regulariser and budget",
    "Zhang et al. 2023, [arXiv 2303.10512](https://arxiv.org/abs/2303.10512), the ablations on SST-2",
    {"laptop": LAPTOP},
)
