"""NF4 and FP4 on a GPU: dequantise, and a product for few rows, as Pallas kernels of the Triton backend.

    W[i] = code[nibble i] · absmax[i // block_size]        absmax[j] = dynamic[q j] · nested[j // 256] + offset
    y[m, n] = Σ_k x[m, k] W[n, k]                          accumulated in fp32

Double quantisation is undone inside.  Both kernels read a byte once and use its two numbers: `dequantise` joins them in
registers and stores them side by side; `fused` never does, for it multiplies the high nibbles with the even inputs and
the low ones with the odd.  What lies beyond an edge is read at the edge: it is written again as it is, or multiplied
by a zero input.

Departures: a block is a power of two, and `fused` wants rows that blocks fill (`fusable`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from peft_jax.quant.nf4 import CODES, DYNAMIC, NESTED, FourBit, Nested

AXIS = 1  # which axis of the stored layout `fused` contracts


class Blocks(NamedTuple):
    """How a kernel cuts its work.  numbers: of `dequantise`, a program; outputs, bytes: of `fused`, a tile of codes;
    splits: of the inputs, summed at the end (0 chooses); by_sum: the most rows that are multiplied without the tensor
    cores; table: 'gather' reads the 16 codes from memory, 'select' chooses among constants."""

    numbers: int = 4096
    outputs: int = 16
    bytes: int = 128
    splits: int = 0
    by_sum: int = 4
    table: str = "gather"
    warps: int = 4
    stages: int = 3


BLOCKS = Blocks()


class _Static(NamedTuple):
    kind: str
    block_size: int
    stored: str


def _static(w: FourBit) -> _Static:
    return _Static(w.kind, w.block_size, w.stored)


def refuse(w: FourBit) -> str | None:
    """Why no kernel takes this leaf."""
    size = w.block_size
    return None if size & (size - 1) == 0 else f"blocks of {size} numbers, where a kernel needs a power of two"


def fusable(w: FourBit) -> bool:
    """Whether blocks fill the stored rows, so that a tile of rows has its scales in rows too."""
    length = w.matrix[0] if w.transposed else w.matrix[1]
    return length % w.block_size == 0


def _look_up(kind: str, how: str, table: Any, index: Array) -> Array:
    if how == "gather":
        return table[index]
    values = [jnp.full(index.shape, float(code), jnp.float32) for code in CODES[kind]]
    for bit in range(4):
        odd = index & (1 << bit) != 0
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _scales(absmax: list[Any], flat: Array) -> Array:
    """The scales of blocks, which are counted through the whole layer."""
    if len(absmax) == 1:
        return absmax[0][flat]
    codes, nested, offset, dynamic = absmax
    # A product and a sum that no compiler may fuse into one rounding: see `FourBit.scales`.
    product = dynamic[codes[flat].astype(jnp.int32)] * nested[flat // NESTED]
    return jnp.maximum(product, float(jnp.finfo(jnp.float32).min)) + offset[0]


def _operands(w: FourBit) -> list[Array]:
    if not isinstance(w.absmax, Nested):
        return [w.absmax.reshape(-1)]
    codes, nested, offset = w.absmax
    return [codes.reshape(-1), nested.reshape(-1), offset.reshape(1), jnp.asarray(DYNAMIC)]


# -- dequantise -------------------------------------------------------------------------------------------------------


def _dequantise(codes: Any, flag: Any, table: Any, *rest: Any, w: _Static, blocks: int, how: str, tile: int) -> None:
    *absmax, out = rest
    rows = jnp.minimum(pl.program_id(0) * tile + jnp.arange(tile), blocks - 1)
    half = w.block_size // 2
    packed = (codes[rows[:, None], jnp.arange(half)[None, :]] ^ flag[0]).astype(jnp.int32)
    scale = _scales(absmax, rows)[:, None]
    high, low = (_look_up(w.kind, how, table, nibble) * scale for nibble in (packed >> 4, packed & 15))
    out[rows[:, None], jnp.arange(2 * half)[None, :]] = jnp.stack([high, low], -1).reshape(tile, -1).astype(out.dtype)


def dequantise(w: FourBit, flag: Array | None = None, *, interpret: bool = False, blocks: Blocks = BLOCKS) -> Array:
    """The array of one layer as it is stored; `flag`, False, ties it to what it waits for (see `frozen.tied`)."""
    stored = w.matrix[::-1] if w.transposed else w.matrix
    size = w.block_size
    scales = w.absmax.codes if isinstance(w.absmax, Nested) else w.absmax
    count, tile = scales.size, max(1, blocks.numbers // size)
    codes = w.codes.reshape(-1)
    codes = jnp.pad(codes, (0, count * (size // 2) - codes.size)).reshape(count, size // 2)
    flag = jnp.zeros(1, jnp.uint8) if flag is None else flag.astype(jnp.uint8).reshape(1)
    body = functools.partial(_dequantise, w=_static(w), blocks=count, how=blocks.table, tile=tile)
    values = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((count, size), w.stored),
        grid=(pl.cdiv(count, tile),),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name="dequantise_four_bit",
    )(codes, flag, jnp.asarray(CODES[w.kind]), *_operands(w))
    return values.reshape(-1)[: math.prod(stored)].reshape(stored)


# -- few rows ---------------------------------------------------------------------------------------------------------


def _fused(
    even: Any, odd: Any, codes: Any, table: Any, *rest: Any, w: _Static, steps: int, blocks: Blocks, rows: int
) -> None:
    *absmax, out = rest
    outputs, width = codes.shape
    half, wide = w.block_size // 2, blocks.bytes
    scales, groups = max(1, wide // half), width // half
    dtype = even.dtype
    n = jnp.minimum(pl.program_id(0) * blocks.outputs + jnp.arange(blocks.outputs), outputs - 1)
    by_sum, split = rows <= blocks.by_sum, pl.program_id(1) * steps

    def step(i: Array, total: Any) -> Any:
        first = (split + i) * wide
        byte = jnp.minimum(first + jnp.arange(wide), width - 1)
        packed = codes[n[:, None], byte[None, :]].astype(jnp.int32)
        group = jnp.minimum(first // half + jnp.arange(scales), groups - 1)
        scale = _scales(absmax, n[:, None] * groups + group[None, :])
        scale = jnp.broadcast_to(scale[:, :, None], (*scale.shape, wide // scales)).reshape(packed.shape)
        numbers = [
            (_look_up(w.kind, blocks.table, table, nibble) * scale).astype(w.stored).astype(dtype)
            for nibble in (packed >> 4, packed & 15)
        ]
        inputs = pl.ds(first, wide)
        if by_sum:
            high, low = (each.astype(jnp.float32) for each in numbers)
            pairs = ((even[m, inputs].astype(jnp.float32), odd[m, inputs].astype(jnp.float32)) for m in range(rows))
            return tuple(t + (high * a[None, :] + low * b[None, :]) for t, (a, b) in zip(total, pairs, strict=True))
        for x, number in zip((even, odd), numbers, strict=True):
            total += _dot(x[:, inputs], number, 1)
        return total

    if by_sum:
        sums = tuple(jnp.zeros((blocks.outputs, wide), jnp.float32) for _ in range(rows))
        for m, total in enumerate(jax.lax.fori_loop(0, steps, step, sums)):
            out[m, :] = total.sum(1).astype(out.dtype)
    else:
        start = jnp.zeros((even.shape[0], blocks.outputs), jnp.float32)
        out[...] = jax.lax.fori_loop(0, steps, step, start).astype(out.dtype)


def _dot(x: Array, y: Array, axis: int) -> Array:
    """x times y, contracting `axis` of y; fp32 operands are multiplied as fp32, not as tf32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def fused(
    x: Float[Array, "rows k"], w: FourBit, *, interpret: bool = False, blocks: Blocks = BLOCKS
) -> Float[Array, "rows n"]:
    """``x`` times the rows of a leaf, each of which is dequantised in registers: for at most 64 rows of `x`."""
    rows, (outputs, width) = x.shape[0], w.codes.shape
    grid, steps = splits_of(outputs, blocks.outputs, pl.cdiv(width, blocks.bytes), blocks.splits)
    padded = rows if rows <= blocks.by_sum else pad_rows(rows)
    pairs = jnp.pad(x, ((0, padded - rows), (0, 2 * (grid[1] * steps * blocks.bytes - width)))).reshape(padded, -1, 2)
    body = functools.partial(_fused, w=_static(w), steps=steps, blocks=blocks, rows=rows)
    dtype = x.dtype if grid[1] == 1 else jnp.dtype(jnp.float32)
    operands = [pairs[..., 0], pairs[..., 1], w.codes, jnp.asarray(CODES[w.kind]), *_operands(w)]
    parts = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((grid[1], padded, grid[0] * blocks.outputs), dtype),
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(operands),
        out_specs=pl.BlockSpec((None, padded, blocks.outputs), lambda n, k: (k, 0, n)),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name="fused_four_bit",
    )(*operands)
    return parts.sum(0)[:rows, :outputs].astype(x.dtype)


def pad_rows(rows: int) -> int:
    """Rows of a tile for the tensor cores: a power of two, 16 or more."""
    return max(16, 1 << (rows - 1).bit_length())


def splits_of(outputs: int, tile: int, steps: int, splits: int, programs: int = 512) -> tuple[tuple[int, int], int]:
    """(the grid over outputs and over splits of the inputs, steps a program): enough programs to fill a GPU."""
    across = pl.cdiv(outputs, tile)
    splits = min(splits or max(1, min(8, programs // across)), steps)
    each = pl.cdiv(steps, splits)
    return (across, pl.cdiv(steps, each)), each
