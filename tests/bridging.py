"""What a bridged function is held to: the function itself, on the weights that the leaves stand for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checks import close

import peft_jax as pj
from peft_jax import quant

Function = Callable[..., Any]


def shaken(params: Any, seed: int = 3) -> Any:
    """The tree with what trains moved away from its start, where half of it is zeros."""
    trained, frozen = pj.partition(params)
    random = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: jnp.asarray(x + 0.1 * random.normal(size=x.shape).astype(x.dtype)), trained)
    return pj.combine(moved, frozen)


def total(out: Any) -> jax.Array:
    """A number that depends on every output in its own way."""
    flat = jnp.concatenate([x.astype(jnp.float32).ravel() for x in jax.tree.leaves(out)])
    return jnp.sum(jnp.sin(flat + 0.1 * jnp.arange(flat.size, dtype=jnp.float32)))


def check(
    function: Function, params: Any, inputs: tuple[Any, ...], method: pj.Method, *, tolerance: float = 2e-5, **more: Any
) -> tuple[Any, Any]:
    """Outputs and gradients of the bridged function are the function's own, on the merged tree."""
    seen, forward = pj.bridge(function, **more).traced(params, *inputs)
    adapted, forward = method(jax.random.key(1), seen, forward)
    adapted = shaken(adapted)
    trained, frozen = pj.partition(adapted)

    def both(trained: Any) -> Any:
        whole = pj.combine(trained, frozen)
        base = pj.merge(quant.dequantise(pj.strip(whole)))
        ours, vjp = jax.vjp(lambda t: forward(pj.combine(t, frozen), *inputs), trained)
        wanted, wanted_vjp = jax.vjp(lambda t: function(pj.merge(pj.combine(t, frozen)), *inputs), trained)
        assert jax.tree.structure(ours) == jax.tree.structure(wanted)
        pull = jax.grad(total)(wanted)
        return ours, wanted, vjp(pull), wanted_vjp(pull), function(base, *inputs)

    ours, wanted, gradient, wanted_gradient, base = jax.jit(both)(trained)
    close(ours, wanted, tolerance, tolerance)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted_gradient))
    assert scale > 1e-3 and float(jnp.abs(total(wanted) - total(base))) > 1e-3, "the adapters do nothing here"
    close(gradient, wanted_gradient, 10 * tolerance, 10 * tolerance * scale)
    return adapted, forward
