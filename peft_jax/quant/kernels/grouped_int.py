"""Group-wise integers on a GPU: dequantise, and a product for few rows, as Pallas kernels of the Triton backend.

    W[i, o] = step[g, o] · (q[i, o] − zero[g, o])                   g = i // group_size
    y[m, o] = Σ_g step[g, o] · (Σ_i x[m, i] q[i, o] − zero[g, o] · s[m, g])        s[m, g] = Σ_i x[m, i] over the group

`fused` multiplies the codes as they are, small integers that bf16 holds exactly, and takes the zero points from the
inputs' group sums: one subtraction a group where there was one a weight.  QA-LoRA's adapter pools its input into the
same sums, so they are computed once (`group_sums`) and shared.  Products are accumulated in fp32.

`fused` does not round the weights to the leaf's dtype, which `dequantise` does: at fp32 they agree to rounding.

Departures: `fused` wants groups of a power of two, 16 or more (`fusable`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from peft_jax.quant.grouped import WORD, GroupedInt
from peft_jax.quant.kernels.four_bit import _dot, pad_rows, splits_of

AXIS = 0  # which axis of the stored layout `fused` contracts


class Blocks(NamedTuple):
    """How a kernel cuts its work.  columns: outputs of a program of `dequantise`, which has 32 inputs; outputs, inputs:
    of `fused`, a tile (no more inputs than a group); splits, by_sum: as `four_bit.Blocks`."""

    columns: int = 512
    outputs: int = 64
    inputs: int = 64
    splits: int = 0
    by_sum: int = 4
    warps: int = 4
    stages: int = 3


BLOCKS = Blocks()


def refuse(w: GroupedInt) -> str | None:
    """Why no kernel takes this leaf: each is taken."""
    del w
    return None


def fusable(w: GroupedInt) -> bool:
    """Whether a group fills a tile of the tensor cores."""
    return w.group_size >= 16 and w.group_size & (w.group_size - 1) == 0


def group_sums(x: Float[Array, "... inputs"], group_size: int) -> Float[Array, "... groups"]:
    """The sum of each group of inputs, in fp32."""
    return x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group_size).sum(-1)


# -- dequantise -------------------------------------------------------------------------------------------------------


def _dequantise(codes: Any, step: Any, zero: Any, flag: Any, out: Any, *, bits: int, size: int, tile: int) -> None:
    words, outputs = codes.shape
    block = pl.program_id(0)
    o = jnp.minimum(pl.program_id(1) * tile + jnp.arange(tile), outputs - 1)
    held = [codes[jnp.minimum(block * bits + j, words - 1), o] ^ flag[0] for j in range(bits)]
    for i in range(WORD):
        if i == 0 or (size % WORD and (WORD % size or i % size == 0)):  # where a group may begin
            group = jnp.minimum((block * WORD + i) // size, step.shape[0] - 1)
            scale, middle = (each[group, o].astype(jnp.float32) for each in (step, zero))
        word, shift = divmod(i * bits, WORD)
        code = held[word] >> jnp.uint32(shift)
        if shift + bits > WORD:
            code |= held[word + 1] << jnp.uint32(WORD - shift)
        number = (code & jnp.uint32(2**bits - 1)).astype(jnp.int32).astype(jnp.float32)
        out[block * WORD + i, o] = (scale * (number - middle)).astype(out.dtype)


def dequantise(
    w: GroupedInt, flag: Array | None = None, *, interpret: bool = False, blocks: Blocks = BLOCKS
) -> Float[Array, "inputs outputs"]:
    """The array of one layer; `flag`, False, ties it to what it waits for (see `frozen.tied`)."""
    inputs, outputs = w.matrix
    count = pl.cdiv(inputs, WORD)
    flag = jnp.zeros(1, jnp.uint32) if flag is None else flag.astype(jnp.uint32).reshape(1)
    tile = min(blocks.columns, 1 << (outputs - 1).bit_length())
    values = pl.pallas_call(
        functools.partial(_dequantise, bits=w.bits, size=w.group_size, tile=tile),
        out_shape=jax.ShapeDtypeStruct((count * WORD, outputs), w.stored),
        grid=(count, pl.cdiv(outputs, tile)),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name="dequantise_grouped_int",
    )(w.codes, w.step, w.zero, flag)
    return values[:inputs]


# -- few rows ---------------------------------------------------------------------------------------------------------


def _codes(codes: Any, bits: int, first: Array, n: Array, tile: int) -> Array:
    """The codes ``[tile, outputs]`` of inputs from `first` on."""
    last, mask = codes.shape[0] - 1, jnp.uint32(2**bits - 1)
    if WORD % bits == 0 and tile * bits % WORD == 0:
        each = WORD // bits
        word = jnp.minimum(first * bits // WORD + jnp.arange(tile // each), last)
        shift = (jnp.arange(each) * bits).astype(jnp.uint32)
        spread = codes[word[:, None], n[None, :]][:, None, :] >> shift[None, :, None]
        return (spread & mask).astype(jnp.int32).reshape(tile, -1)
    bit = (first + jnp.arange(tile)) * bits
    word, shift = bit // WORD, (bit % WORD).astype(jnp.uint32)[:, None]
    low = codes[jnp.minimum(word, last)[:, None], n[None, :]] >> shift
    # Of a code that lies in one word, what the next would add is beyond the mask; a shift by 32 is none.
    high = codes[jnp.minimum(word + 1, last)[:, None], n[None, :]] << jnp.minimum(WORD - shift, WORD - 1)
    straddles = shift + jnp.uint32(bits) > WORD
    return (jnp.where(straddles, low | high, low) & mask).astype(jnp.int32)


def _fused(
    x: Any, sums: Any, codes: Any, step: Any, zero: Any, out: Any, *, bits: int, size: int, steps: int, tile: int,
    blocks: Blocks, rows: int,
) -> None:  # fmt: skip
    groups, outputs = step.shape
    n = jnp.minimum(pl.program_id(0) * blocks.outputs + jnp.arange(blocks.outputs), outputs - 1)
    by_sum, split = rows <= blocks.by_sum, pl.program_id(1) * steps

    def one(i: Array, total: Any) -> Any:
        first = (split + i) * tile
        group = jnp.minimum(first // size, groups - 1)
        scale, middle = (each[group, n].astype(jnp.float32) for each in (step, zero))
        begins = ((first % size == 0) & (first < groups * size)).astype(jnp.float32)  # a group's sum counts once
        middle = middle * begins
        number = _codes(codes, bits, first, n, tile)
        if by_sum:
            scaled = number.astype(jnp.float32) * scale[None, :]
            return tuple(
                (
                    wide + scaled * x[m, pl.ds(first, tile)].astype(jnp.float32)[:, None],
                    off + scale * middle * sums[m, group],
                )
                for m, (wide, off) in enumerate(total)
            )
        product = _dot(x[:, pl.ds(first, tile)], number.astype(x.dtype), 0)
        return total + scale[None, :] * (product - middle[None, :] * sums[:, group][:, None])

    if by_sum:
        pair = (jnp.zeros((tile, blocks.outputs), jnp.float32), jnp.zeros(blocks.outputs, jnp.float32))
        for m, (wide, off) in enumerate(jax.lax.fori_loop(0, steps, one, (pair,) * rows)):
            out[m, :] = (wide.sum(0) - off).astype(out.dtype)
    else:
        start = jnp.zeros((x.shape[0], blocks.outputs), jnp.float32)
        out[...] = jax.lax.fori_loop(0, steps, one, start).astype(out.dtype)


def fused(
    x: Float[Array, "rows inputs"],
    w: GroupedInt,
    sums: Float[Array, "rows groups"] | None = None,
    *,
    interpret: bool = False,
    blocks: Blocks = BLOCKS,
) -> Float[Array, "rows outputs"]:
    """``x W`` for at most 64 rows; `sums` are `group_sums` of `x`, where they are at hand."""
    sums = group_sums(x, w.group_size) if sums is None else sums.astype(jnp.float32)
    rows, (inputs, outputs) = x.shape[0], w.matrix
    tile = min(blocks.inputs, w.group_size)
    grid, steps = splits_of(outputs, blocks.outputs, inputs // tile, blocks.splits)
    padded = rows if rows <= blocks.by_sum else pad_rows(rows)
    x_padded = jnp.pad(x, ((0, padded - rows), (0, grid[1] * steps * tile - inputs)))
    sums = jnp.pad(sums, ((0, padded - rows), (0, 0)))
    dtype = x.dtype if grid[1] == 1 else jnp.dtype(jnp.float32)
    body = functools.partial(_fused, bits=w.bits, size=w.group_size, steps=steps, tile=tile, blocks=blocks, rows=rows)
    parts = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((grid[1], padded, grid[0] * blocks.outputs), dtype),
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 5,
        out_specs=pl.BlockSpec((None, padded, blocks.outputs), lambda n, k: (k, 0, n)),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name="fused_grouped_int",
    )(x_padded, sums, w.codes, w.step, w.zero)
    return parts.sum(0)[:rows, :outputs].astype(x.dtype)
