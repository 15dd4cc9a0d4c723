"""What a model gives for a whole set, and the best of a run's evaluations: the end of training that papers report.

A run is evaluated every so many steps, and the parameters of the best evaluation are kept; of several that are equally
good, the first.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import Work, train
from peft_jax import Forward, training
from peft_jax.core import Params
from peft_jax.training.data import Rows
from peft_jax.training.losses import Batch
from peft_jax.training.step import Step
from peft_jax.trees import combine

Measure = Callable[[Forward, Params, Batch], Any]  # an array, or several, with an entry a row


def over(measure: Measure, forward: Forward, params: Params, rows: Rows, size: int) -> np.ndarray:
    """``measure(forward, params, batch)`` of all rows, `size` of them at a time: one program, compiled once."""
    count = len(rows["tokens"])
    parts = []
    for start in range(0, count, size):
        chosen = np.minimum(np.arange(start, start + size), count - 1)  # the last batch is filled up
        parts.append(np.asarray(_measured(measure, forward, params, {name: x[chosen] for name, x in rows.items()})))
    return np.concatenate(parts)[:count]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measured(measure: Measure, forward: Forward, params: Params, batch: Batch) -> Any:
    return measure(forward, params, batch)


class Best(NamedTuple):
    """The best evaluation: the whole tree, what it was worth, after which step; how many there were, and the cost."""

    params: Params
    value: float
    step: int
    evaluations: int
    train: Work
    seconds: float  # of the evaluations


def keep_best(
    step: Step,
    state: training.State,
    frozen: Params,
    batch: Callable[[int], Batch],
    steps: int,
    every: int,
    value: Callable[[Params], float],
) -> Best:
    """Trains for `steps` steps and evaluates after `every` of them, and at the end.

    Raises:
        FloatingPointError: if a step was not finite.
    """
    best, cost, seconds, evaluations = None, Work(0, 0), 0.0, 0
    for start in range(0, steps, every):
        taken = min(every, steps - start)
        state, more = train(step, state, frozen, functools.partial(_later, batch, start), taken)
        cost = Work(cost.tokens + more.tokens, cost.places + more.places, cost.seconds + more.seconds)
        begin = time.perf_counter()
        found, evaluations = value(combine(state.trainables, frozen)), evaluations + 1
        if best is None or found > best[1]:
            # A copy: the next step destroys the state.
            best = (jax.tree.map(jnp.copy, state.trainables), found, start + taken)
        seconds += time.perf_counter() - begin
    if best is None:
        raise ValueError(f"a run of {steps} steps has nothing to evaluate: ask for 1 or more")
    return Best(combine(best[0], frozen), best[1], best[2], evaluations, cost, seconds)


def _later(batch: Callable[[int], Batch], start: int, index: int) -> Batch:
    return batch(start + index)
