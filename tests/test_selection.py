"""What a model gives for a whole set, and the best of a run's evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peft_jax as pj
from experiments import selection
from peft_jax import training
from peft_jax.weights import Unfrozen


def test_the_first_of_the_best_evaluations_is_kept():
    params = {"w": Unfrozen(None, jnp.zeros(1)), "frozen": jnp.ones(2)}
    tx = optax.sgd(1.0)
    forward = pj.Forward(lambda params, inputs, ports: -params["w"].value)  # each step adds 1

    def loss(forward, params, batch, ports):
        return jnp.sum(forward(params, batch["tokens"], ports)), jnp.float32(1)

    step = training.make_step(forward, tx, loss)
    state, frozen = training.init_state(params, tx, jax.random.key(0))
    seen = []

    def batch(index):
        seen.append(index)
        return {"tokens": np.zeros((2, 3), np.int32), "mask": np.ones((2, 3), bool)}

    best = selection.keep_best(
        step, state, frozen, batch, 7, 2, lambda p: {2: 1.0, 4: 3.0, 6: 3.0, 7: 2.0}[int(p["w"].value[0])]
    )
    assert (best.value, best.step, best.evaluations, float(best.params["w"].value[0])) == (3.0, 4, 4, 4.0)
    assert seen == list(range(7)) and best.train[:2] == (42, 42) and best.params["frozen"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="a run of 0 steps has nothing to evaluate"):
        selection.keep_best(step, state, frozen, batch, 0, 2, lambda p: 0.0)


def test_a_whole_set_is_measured_in_one_program():
    rows = {"tokens": np.arange(14).reshape(7, 2), "labels": np.arange(7)}
    sizes = []

    def measure(forward, params, batch):
        sizes.append(batch["tokens"].shape)
        return batch["tokens"].sum(1) + batch["labels"] * params

    found = selection.over(measure, pj.Forward(lambda *given: None), jnp.int32(10), rows, 3)
    assert found.tolist() == [14 * i + 1 for i in range(7)] and sizes == [(3, 2)]
