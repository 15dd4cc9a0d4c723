"""Which tokens a draw may choose from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32


def restrict(
    logits: Float[Array, "batch vocab"], temperature: Any = 1.0, top_k: Any = None, top_p: Any = None
) -> Float[Array, "batch vocab"]:
    """``logits / temperature``, −∞ outside the `top_k` most probable tokens and then outside the `top_p` nucleus.

    Each option is one number for all rows, or an array ``[batch, 1]``.
    """
    logits = logits / temperature
    if top_k is None and top_p is None:
        return logits
    order = _order(logits)
    lowest = jnp.zeros((logits.shape[0], 1), jnp.uint32)
    if top_k is not None:
        lowest = _largest(lambda bar: jnp.sum(order >= bar, -1, keepdims=True) >= top_k, lowest)
    if top_p is not None:
        share = jax.nn.softmax(jnp.where(order >= lowest, logits, -jnp.inf), axis=-1)
        # What is left out weighs 1 − p at most: summed from the small end, where rounding does no harm.
        weighs = lambda bar: jnp.sum(jnp.where(order < bar, share, 0.0), -1, keepdims=True) <= 1 - top_p  # noqa: E731
        lowest = jnp.minimum(jnp.maximum(lowest, _largest(weighs, lowest)), jnp.max(order, -1, keepdims=True))
    return jnp.where(order >= lowest, logits, -jnp.inf)


def _order(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds: Callable[[Array], Array], like: UInt32[Array, "batch 1"]) -> UInt32[Array, "batch 1"]:
    """The largest number for which a falling predicate holds, found bit by bit: much cheaper than to sort."""

    def bit(i: Array, found: Array) -> Array:
        trial = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(trial), trial, found)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(like))
