"""The reference: products with a quantised leaf in plain JAX, whole or a tile at a time.

    y = x W      W = dequantised(codes)       accumulated in fp32

Neither turns W over: NF4 stores a kernel's outputs in rows, and the product contracts the axis that it finds.  `tiled`
dequantises some rows, multiplies, and goes on, so that the numbers stay in a processor's cache and W never exists.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.quant.frozen import tied
from peft_jax.quant.nf4 import FourBit

TILE = 1024  # rows, at most


def axis_of(w: Any, transpose: bool) -> int:
    """Which axis of the stored layout ``x W``, or ``x Wᵀ``, contracts."""
    return int((isinstance(w, FourBit) and w.transposed) != transpose)


def as_stored(w: Any) -> Array:
    """The array of one layer in the layout in which it is stored."""
    return w.rows() if isinstance(w, FourBit) else w.dequantise()


def contract(x: Float[Array, "... k"], array: Float[Array, "_ _"], axis: int) -> Float[Array, "... n"]:
    """``x`` times a matrix or its transpose, in the dtype of `x`."""
    return jax.lax.dot_general(x, array.astype(x.dtype), (((x.ndim - 1,), (axis,)), ((), ())))


def whole(x: Float[Array, "... k"], w: Any, transpose: bool) -> Float[Array, "... n"]:
    """Dequantises the layer, then multiplies."""
    return contract(x, as_stored(tied(w, x)), axis_of(w, transpose))


def tiled(x: Float[Array, "... k"], w: Any, transpose: bool) -> Float[Array, "... n"]:
    """The same, a tile at a time, multiplied in fp32, which XLA does faster on a processor than bf16 or fp16: their
    weights are not rounded to either first.  A leaf that no tiles fill evenly is dequantised whole."""
    axis, tiles = axis_of(w, transpose), _tiles(tied(w, x))
    if tiles is None:
        return whole(x, w, transpose)
    wide = x.astype(jnp.float32)
    if x.dtype != wide.dtype:
        tiles = dataclasses.replace(tiles, stored="float32")
    if axis == 1:
        parts = jax.lax.map(lambda tile: contract(wide, as_stored(tile), 1).astype(x.dtype), tiles)
        return jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)
    count = tiles.codes.shape[0]
    pieces = jnp.moveaxis(wide.reshape(*x.shape[:-1], count, -1), -2, 0)

    def add(total: Array, piece: tuple[Array, Any]) -> tuple[Array, None]:
        return total + contract(piece[0], as_stored(piece[1]), 0), None

    start = jnp.zeros((*x.shape[:-1], w.shape[0 if transpose else 1]), jnp.float32)
    return jax.lax.scan(add, start, (pieces, tiles))[0].astype(x.dtype)


def _tiles(w: Any) -> Any:
    """The leaf cut along its stored rows, as a leaf with a leading axis; None where nothing cuts it evenly."""
    four_bit = isinstance(w, FourBit)
    rows = w.codes.shape[0] if four_bit else w.matrix[0]
    unit = 1 if four_bit else math.lcm(w.group_size, 32)
    counts = [n for n in range(-(-rows // TILE), rows + 1) if rows % (n * unit) == 0]
    if rows <= TILE or not counts or rows // counts[0] < TILE // 8:
        return None
    n = counts[0]
    if four_bit:
        matrix = (w.matrix[0], rows // n) if w.transposed else (rows // n, w.matrix[1])
        return dataclasses.replace(w, codes=_cut(w.codes, n), absmax=_cut(w.scales(), n), matrix=matrix)
    cut = {name: _cut(getattr(w, name), n) for name in ("codes", "step", "zero")}
    return dataclasses.replace(w, **cut, matrix=(rows // n, w.matrix[1]))


def _cut(array: Array, n: int) -> Array:
    return array.reshape(n, array.shape[0] // n, *array.shape[1:])
