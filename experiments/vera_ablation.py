"""VeRA: which of its two vectors is needed, where d starts, and how many directions are shared.

Paper: Kopiczko et al. 2023, "VeRA", https://arxiv.org/abs/2310.11454, its ablations on MRPC and RTE, RoBERTa-large.

    make data-tables                               what it reads
    python -m experiments.run vera_ablation        laptop: 21 runs, about 8 minutes on two CPU cores
    python -m experiments.tables                   the table, from the results

laptop   all-MiniLM-L6-v2 on the sentiment of movie reviews (`experiments.encoder_tasks`: the rows of `lora_family`),
         queries and values.  `experiments.encoder_runs` says what a run is.

         both       b from 0 and d from 0.1 train, 256 directions
         only-d     b is 1 and stays so; d starts from 0, so that the output is the model's at first, and trains
         only-b     d is 0.1 and stays so
         d-1, d-1e-7   d starts from there
         r-16, r-1024   as many directions

         64 steps of 16 reviews, the rate 1e-1, that of `lora_family`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from experiments import encoder_runs as runs
from experiments.encoder_runs import QUERY_VALUE, Compiled, Laptop, Task, Tasks
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table
from peft_jax import Weight, methods, trees
from peft_jax.core import Params
from peft_jax.methods.vera import VeRA
from peft_jax.models.loading import Model

REVIEWS = Task("reviews", "classification", length=32, batch=16, steps=64, held_out=480)


@dataclasses.dataclass(frozen=True)
class Row:
    """`only` names the one vector that trains, "" for both."""

    name: str
    rank: int = 256
    start: float = 0.1
    only: str = ""


@dataclasses.dataclass(frozen=True)
class Settings(Laptop):
    """What all rows share."""

    task: Task = REVIEWS
    rate: float = 1e-1


OTHER = {"d": "b", "b": "d"}


def held(tx: optax.GradientTransformation, only: str) -> optax.GradientTransformation:
    """Moves one vector of the two, and everything else."""
    if not only:
        return tx

    def labels(params: Params) -> Params:
        def each(w: Weight) -> Weight:
            if not isinstance(w, VeRA):
                return w
            return dataclasses.replace(w, b="rests") if only == "d" else dataclasses.replace(w, d="rests")

        return trees.map_weights(each, jax.tree.map(lambda _: "moves", params))

    return optax.partition({"moves": tx, "rests": optax.set_to_zero()}, labels)


def begun(params: Params, only: str) -> Params:
    """b at 1, where d alone trains."""
    ones = lambda w: dataclasses.replace(w, b=jnp.ones_like(w.b)) if isinstance(w, VeRA) else w  # noqa: E731
    return trees.map_weights(ones, params) if only == "d" else params


def leaves(params: Params) -> list[VeRA]:
    return [w for w in trees.weights(params) if isinstance(w, VeRA)]


@functools.lru_cache(maxsize=1)
def compiled(model: Model, s: Settings, row: Row) -> Compiled:
    """What a row's seeds share."""
    method = methods.vera(row.rank, QUERY_VALUE, start=row.start)
    return runs.compiled(model, s, method, held(runs.adam(s, s.rate, s.task.steps), row.only))


def load(s: Settings, source: str | None, folder: str | None) -> Tasks:
    return runs.load(s, source, folder, (s.task,))


def run(tasks: Tasks, s: Settings, row: Row, seed: int) -> Outcome:
    made = compiled(tasks.models[s.task], s, row)
    learnt = runs.learn(tasks, s.task, made, seed, functools.partial(begun, only=row.only))
    metrics, evaluated = runs.judge(tasks, s, s.task, learnt.params)
    resting = sum(getattr(w, OTHER[row.only]).size for w in leaves(learnt.params)) if row.only else 0
    return Outcome(metrics, learnt.numbers.trainable - resting, sum(learnt.numbers[:2]), learnt.cost, evaluated)


# -- what the paper prints: RoBERTa-large ------------------------------------------------------------------------------

MRPC, RTE = "MRPC, %", "RTE, %"
FIGURES = {
    "both": {MRPC: 90.5, RTE: 85.8},
    "only-d": {MRPC: 89.7, RTE: 67.0},
    "only-b": {MRPC: 81.6, RTE: 64.3},
    "d-1": {MRPC: 70.3, RTE: 60.3},
    "d-1e-7": {MRPC: 90.8, RTE: 84.7},
}
BOTH = Row("both")
SCALES = (
    BOTH,
    Row("only-d", start=0.0, only="d"),
    Row("only-b", only="b"),
    Row("d-1", start=1.0),
    Row("d-1e-7", start=1e-7),
)
RANKS = (Row("r-16", 16), BOTH, Row("r-1024", 1024))

LAPTOP = Profile(
    parts=(Part("The vectors, and where d starts", SCALES, FIGURES), Part("How many directions", RANKS, {})),
    settings=Settings(),
    metrics=(Metric("accuracy", "accuracy, %", 1), Metric("loss", "loss, nats", 3)),
    speed=Speed(1_900, 8_000, "from processor time, on two CPU cores"),
    places=lambda s, row: runs.places(s.task),
    load=load,
    run=run,
)

TABLE = Table(
    "vera_ablation",
    "VeRA: its vectors, their start and the rank",
    "Kopiczko et al. 2023, [arXiv 2310.11454](https://arxiv.org/abs/2310.11454), the ablations on MRPC and RTE",
    {"laptop": LAPTOP},
)
