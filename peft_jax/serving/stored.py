"""How the pool keeps its numbers: as they are, but for bf16 on a CPU, which is kept as its bits.

XLA's CPU backend widens a scatter into bf16 to fp32, and would copy the whole pool there and back at every step; a
scatter of 16-bit integers it does in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def kept_in(dtype: Any) -> Any:
    """The dtype of a pool's array that is to hold such numbers."""
    return jnp.uint16 if jax.default_backend() == "cpu" and jnp.dtype(dtype) == jnp.bfloat16 else jnp.dtype(dtype)


def dtype_of(rows: Shaped[Array, "..."]) -> Any:
    """The dtype of the numbers that a pool's array holds."""
    return jnp.dtype(jnp.bfloat16) if rows.dtype == jnp.uint16 else rows.dtype


def stored(numbers: Float[Array, "..."], rows: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Numbers in the form in which `rows` keeps them."""
    numbers = numbers.astype(dtype_of(rows))
    return jax.lax.bitcast_convert_type(numbers, rows.dtype) if rows.dtype == jnp.uint16 else numbers


def numbers(rows: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Rows of a pool as the numbers that they hold."""
    return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows
