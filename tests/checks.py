"""What tests compare: bits, numbers, shapes, and whether anything was compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import peft_jax as pj
from peft_jax import trees
from peft_jax.training import init_state, make_step

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **more: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def without_compiling(fn: Any, *args: Any) -> Any:
    before = len(COMPILED)
    result = fn(*args)
    assert len(COMPILED) == before, "this call recompiled"
    return result


def raw(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def same(a: Any, b: Any) -> bool:
    """Same structure (static fields too), same dtypes, same bits."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False))
    equal = all(x.dtype == y.dtype and raw(x).tobytes() == raw(y).tobytes() for x, y in pairs)
    return jax.tree.structure(a) == jax.tree.structure(b) and equal


def close(a: Any, b: Any, rtol: float = 2e-5, atol: float = 2e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def differs(a: Any, b: Any, by: float = 1e-3) -> bool:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) > by


def copied(tree: Any) -> Any:
    """On the host, where no donation and no optimiser reaches it."""
    return jax.tree.map(lambda x: raw(x).copy(), tree)


def kinds(tree: Any) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def one_layer(leaf: Any, index: int) -> Any:
    """One layer of a stacked leaf, with what its layers share."""
    sliced, shared = trees.unshare(leaf)
    return trees.fill(jax.tree.map(lambda x: x[index], sliced), shared)


def three_steps(params: Any, forward: Any, tx: Any, batch: Any) -> tuple[Any, list[float]]:
    """The tree after three steps on one batch, and their losses; what is frozen keeps its bits."""
    tx = pj.freeze(tx, params)
    state, frozen = init_state(params, tx, jax.random.key(0))
    before, step, losses = copied(frozen), make_step(forward, tx), []
    for _ in range(3):
        state, measured = step(state, frozen, batch)
        losses.append(float(measured["loss"]))
    assert same(copied(frozen), before), "a frozen leaf moved"
    return pj.combine(state.trainables, frozen), losses


def size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
