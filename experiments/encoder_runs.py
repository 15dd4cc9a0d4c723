"""One run of a method on a task for encoders: what the tables of the LoRA family share.

Each trains a method and a new head on MiniLM, merges what it learnt, and measures the plain model: one program
evaluates all rows of a task.  A table says what the method is and at which rates it learns.

The optimiser is Adam as in the papers (AdamW, whose decay is 0 here), the rate rises over the first 6% of the steps and
falls to 0 linearly; the head has a rate of its own, the same in every row, as VeRA's paper has it.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import peft_jax as pj
from experiments import selection
from experiments.harness import Work, train
from experiments.p_tuning_v2_data import scores
from experiments.p_tuning_v2_tasks import LOSSES, Task, Tasks, load, read
from peft_jax import Forward, Method, training, trees
from peft_jax.core import Params
from peft_jax.models.loading import Model
from peft_jax.training.step import Step

__all__ = ["Compiled", "Laptop", "Learnt", "Task", "Tasks", "compiled", "judge", "learn", "load", "places"]

QUERY_VALUE = r"\.(query|value)$"
ALL_SIX = r"encoder\..*\.(query|key|value|dense)$"  # those and the attention's output, the layer's inner and outer


@dataclasses.dataclass(frozen=True)
class Laptop:
    """What all rows of a table share."""

    model: str = "all-MiniLM-L6-v2"
    data: str = "movie_reviews"
    clip: float = 1.0
    head_rate: float = 1e-2
    warmup: float = 0.06
    evaluated: int = 40  # rows at a time


def rising(rate: float, steps: int, warmup: float, decay: str = "linear") -> optax.Schedule:
    """Up over the first share of the steps, linearly, and down to 0 at the last: "linear", or "cosine"."""
    rise = round(warmup * steps)
    left = max(steps - rise, 1)
    fall = optax.cosine_decay_schedule(rate, left) if decay == "cosine" else optax.linear_schedule(rate, 0.0, left)
    return optax.join_schedules((optax.linear_schedule(0.0, rate, max(rise, 1)), fall), (rise,))


def adam(s: Laptop, rate: float, steps: int) -> optax.GradientTransformation:
    return beside_head(*(optax.adam(rising(r, steps, s.warmup)) for r in (rate, s.head_rate)))


def beside_head(rest: optax.GradientTransformation, head: optax.GradientTransformation) -> optax.GradientTransformation:
    """One optimiser for the head, and one for the rest."""

    def labels(params: Params) -> Params:
        return {entry: "head" if entry == "classifier" else "rest" for entry in params}

    return optax.partition({"rest": rest, "head": head}, labels)


class Compiled(NamedTuple):
    """What the seeds of a row share; a table keeps it for its last row."""

    method: Method
    forward: Forward
    tx: optax.GradientTransformation
    step: Step


def compiled(model: Model, s: Laptop, method: Method, tx: optax.GradientTransformation) -> Compiled:
    forward = method.wrap(model.forward)
    return Compiled(method, forward, tx, training.make_step(forward, tx, LOSSES["classification"], clip=s.clip))


class Learnt(NamedTuple):
    params: Params
    numbers: trees.Count
    opt_state: Any
    cost: Work


def learn(
    tasks: Tasks, task: Task, made: Compiled, seed: int, change: Callable[[Params], Params] | None = None
) -> Learnt:
    """Trains a row once.  `change` is done to the parameters that the method gives; compiling is not in the cost."""
    data, model, key = tasks.data[task], tasks.models[task], jax.random.key(seed)
    params = made.method.init(key, read(tasks.source, task, data.labels, seed).params, model.forward)
    params = params if change is None else change(params)
    count = pj.count(params)
    state, frozen = training.init_state(params, made.tx, key)
    del params  # the state holds what trains
    batches = training.batches(data.train, task.batch, seed)
    training.compile_step(made.step, state, frozen, batches.batch(0))
    state, cost = train(made.step, state, frozen, batches.batch, task.steps)
    return Learnt(pj.combine(state.trainables, frozen), count, state.opt_state, cost)


def judge(tasks: Tasks, s: Laptop, task: Task, params: Params) -> tuple[dict[str, float], Work]:
    """Accuracy and loss on what is held out, of the merged model."""
    data, model = tasks.data[task], tasks.models[task]
    begin = time.perf_counter()
    found = selection.over(scores, model.forward, pj.merge(params), data.held_out, s.evaluated)
    cost = Work(int(data.held_out["mask"].sum()), data.held_out["tokens"].size, time.perf_counter() - begin)
    return data.measure(found), cost


def places(task: Task) -> tuple[int, int]:
    return task.steps * task.batch * task.length, task.held_out * task.length
