"""Group-wise integers dequantised by Mosaic GPU, the successor of Pallas's Triton backend: a beginning.

    W[i, o] = step[g, o] · (q[i, o] − zero[g, o])      g = i // group_size

A warpgroup takes the words of one group for some outputs; of each word it stores one row a code.  NF4 is not here: a
look-up in registers wants inline PTX (`prmt`), which no interpreter runs.

Departures: codes that fill words (2, 4 and 8 bits), groups of whole words, outputs in multiples of 128.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float

from peft_jax.quant.grouped import WORD, GroupedInt

LANES = 128  # of a warpgroup


def refuse(w: GroupedInt) -> str | None:
    """Why this kernel does not take a leaf."""
    if WORD % w.bits or w.group_size * w.bits % WORD:
        return f"groups of {w.group_size} codes of {w.bits} bits, which fill no whole words"
    return f"{w.matrix[1]} outputs, which are no multiple of {LANES}" if w.matrix[1] % LANES else None


def _dequantise(codes: Any, step: Any, zero: Any, out: Any, *, bits: int, words: int, tile: int) -> None:
    group, first = jax.lax.axis_index("group"), jax.lax.axis_index("outputs") * tile
    columns = pl.ds(first, tile)
    scale, middle = (each[group, columns].astype(jnp.float32) for each in (step, zero))
    for j in range(words):
        word = codes[group * words + j, columns]
        for i in range(WORD // bits):
            code = (word >> jnp.uint32(i * bits)) & jnp.uint32(2**bits - 1)
            number = code.astype(jnp.int32).astype(jnp.float32)
            out[group * words + j, i, columns] = (scale * (number - middle)).astype(out.dtype)


def dequantise(w: GroupedInt, *, interpret: Any = None, tile: int = 512) -> Float[Array, "inputs outputs"]:
    """The array of one layer.  `interpret`: parameters of Mosaic GPU's interpreter, for machines without a GPU.

    Raises:
        ValueError: on a leaf that it does not take.
    """
    if why := refuse(w):
        raise ValueError(f"the leaf has {why}: use 'triton' or 'xla'")
    inputs, outputs = w.matrix
    while outputs % tile:
        tile //= 2
    each = WORD // w.bits
    body = functools.partial(_dequantise, bits=w.bits, words=w.group_size // each, tile=tile)
    values = mosaic_gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((inputs // each, each, outputs), jnp.dtype(w.stored)),
        grid=(inputs // w.group_size, outputs // tile),
        grid_names=("group", "outputs"),
        interpret=interpret,
    )(w.codes, w.step, w.zero)
    return values.reshape(inputs, outputs)
