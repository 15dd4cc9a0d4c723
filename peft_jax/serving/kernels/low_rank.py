"""Products with adapters in the pool on a GPU, as Pallas kernels of the Triton backend: mbgmv, and mbgmm.

    h[b, t, k] = Σ_i x[b, t, i] A_b[k, i]        shrink: a program has some tokens and directions of one batch row
    y[b, t, o] = Σ_k h[b, t, k] B_b[k, o]        expand: some tokens and outputs of it

Number ``n = k · wide + i`` of a matrix lies in row ``table[n // W]`` at column ``n % W``.  A tile reads it by segments,
the largest powers of two that divide both a direction and a row: one look-up in the table is enough for a segment.
Where the table says 0 nothing is loaded, and programs stop at their own adapter's rank, not at the bucket's.

With one token (decode) numbers are multiplied and summed as they come, since such a product is as fast as its matrices
are read; with more (prefill) the tensor cores multiply tiles, and a matrix is read once a tile of tokens.

Source: Sheng et al. 2023 (S-LoRA), section 5.3; Chen et al. 2023 (Punica, arXiv 2310.18547), section 4, shrinks and
expands likewise.

Departures: where x and the pool are bf16, mbgmm rounds h to bf16 for the tensor cores; mbgmv and the reference do not.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32

from peft_jax.quant.kernels.four_bit import _dot, pad_rows
from peft_jax.serving.kernels.xla import common


class Blocks(NamedTuple):
    """How the kernels cut their work.  directions: of a tile; inputs, outputs: of a tile of A, of B; tokens: of a tile,
    where there are several; splits: of the inputs, summed by the second kernel (0 chooses)."""

    directions: int = 16
    inputs: int = 256
    outputs: int = 256
    tokens: int = 64
    splits: int = 0
    warps: int = 4
    stages: int = 3


DECODE = Blocks()
PREFILL = Blocks(directions=64, inputs=64, outputs=128)


class _Matrix(NamedTuple):
    """A matrix of the pool, as a kernel sees it.  wide: numbers of a direction; row: of a row of the pool."""

    rows: Any
    layer: Any
    table: Any
    wide: int
    row: int

    def tile(self, b: Array, k: Array, first: Array, size: int, mine: Array) -> Array:
        """Numbers from `first` on of the directions `k`, zeros beyond the edges: ``[directions, size]``."""
        segment, lanes = min(size, segment_of(self.wide, self.row)), k.shape[0]
        begin = first + jnp.arange(size // segment) * segment
        number = k[:, None] * self.wide + begin[None, :]
        inside = (k < mine)[:, None] & (begin < self.wide)[None, :]
        ids = triton.load(self.table.at[b, number // self.row], mask=inside, other=0)
        column = number % self.row
        if segment == size:  # without a change of shape the compiler sees that columns follow each other
            column = column + jnp.arange(segment)[None, :]
            ids = jnp.broadcast_to(ids, (lanes, size))
        else:
            column = (column[:, :, None] + jnp.arange(segment)[None, None, :]).reshape(lanes, size)
            ids = jnp.broadcast_to(ids[:, :, None], (*number.shape, segment)).reshape(lanes, size)
        return triton.load(self.rows.at[self.layer[0], ids, column], mask=ids > 0, other=0.0)


def segment_of(wide: int, row: int) -> int:
    """How many numbers are sure to follow each other: the largest power of two in a direction and in a row."""
    both = math.gcd(wide, row)
    return both & -both


def tile_of(wide: int, row: int, most: int) -> int:
    """Numbers of a tile: one segment where that is 64 or more, so that they are loaded as they lie."""
    return min(most, pad_rows(wide), max(64, segment_of(wide, row)))


def _shrink(
    x: Any, rows: Any, layer: Any, table: Any, ranks: Any, out: Any, *, steps: int, blocks: Blocks, dtype: Any
) -> None:
    (_, time, wide), tiles = x.shape, out.shape[3] // blocks.directions
    b, of_tokens, rest = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    split = rest // tiles
    k = rest % tiles * blocks.directions + jnp.arange(blocks.directions)
    matrix = _Matrix(rows, layer, table, wide, rows.shape[2])
    mine = ranks[b]
    t = of_tokens * blocks.tokens + jnp.arange(blocks.tokens)

    def step(i: Array, total: Array) -> Array:
        first = (split * steps + i) * blocks.inputs
        a = matrix.tile(b, k, first, blocks.inputs, mine)
        column = first + jnp.arange(blocks.inputs)
        if time == 1:
            number = triton.load(x.at[b, 0, column], mask=column < wide, other=0.0)
            return total + a.astype(jnp.float32) * number.astype(jnp.float32)[None, :]
        inside = (t < time)[:, None] & (column < wide)[None, :]
        numbers = triton.load(x.at[b, t[:, None], column[None, :]], mask=inside, other=0.0)
        return total + _dot(numbers.astype(dtype), a.astype(dtype), 1)

    needed = jnp.where(rest % tiles * blocks.directions < mine, steps, 0)
    if time == 1:
        start = jnp.zeros((blocks.directions, blocks.inputs), jnp.float32)
        out[split, b, 0, k] = jax.lax.fori_loop(0, needed, step, start).sum(1)
    else:
        start = jnp.zeros((blocks.tokens, blocks.directions), jnp.float32)
        total = jax.lax.fori_loop(0, needed, step, start)
        triton.store(out.at[split, b, t[:, None], k[None, :]], total, mask=(t < time)[:, None])


def _expand(h: Any, rows: Any, layer: Any, table: Any, ranks: Any, out: Any, *, blocks: Blocks, dtype: Any) -> None:
    _, time, wide = out.shape
    b, of_tokens, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * blocks.outputs
    matrix = _Matrix(rows, layer, table, wide, rows.shape[2])
    mine = ranks[b]
    t = of_tokens * blocks.tokens + jnp.arange(blocks.tokens)
    columns = first + jnp.arange(blocks.outputs)

    def step(j: Array, total: Array) -> Array:
        k = j * blocks.directions + jnp.arange(blocks.directions)
        numbers = matrix.tile(b, k, first, blocks.outputs, mine)
        parts = []
        for split in range(h.shape[0]):
            if time == 1:
                parts.append(h[split, b, 0, k])
            else:
                where = h.at[split, b, t[:, None], k[None, :]]
                parts.append(triton.load(where, mask=(t < time)[:, None], other=0.0))
        weights = functools.reduce(jnp.add, parts)
        if time == 1:
            return total + numbers.astype(jnp.float32) * weights[:, None]
        return total + _dot(weights.astype(dtype), numbers.astype(dtype), 0)

    needed = (mine + blocks.directions - 1) // blocks.directions
    inside = columns < wide
    if time == 1:
        start = jnp.zeros((blocks.directions, blocks.outputs), jnp.float32)
        total = jax.lax.fori_loop(0, needed, step, start).sum(0)
        triton.store(out.at[b, 0, columns], total.astype(out.dtype), mask=inside)
    else:
        start = jnp.zeros((blocks.tokens, blocks.outputs), jnp.float32)
        total = jax.lax.fori_loop(0, needed, step, start).astype(out.dtype)
        triton.store(out.at[b, t[:, None], columns[None, :]], total, mask=(t < time)[:, None] & inside[None, :])


def ranks_of(
    a_rows: Int32[Array, "batch na"], b_rows: Int32[Array, "batch nb"], rank: int, row: int, inputs: int, outputs: int
) -> Int32[Array, "batch"]:
    """How many directions of each adapter may be other than zeros: those before the tables' last entry."""

    def directions(table: Array, wide: int) -> Array:
        last = jnp.where(table != 0, jnp.arange(1, table.shape[1] + 1, dtype=jnp.int32), 0).max(1)
        return (last * row + wide - 1) // wide

    return jnp.minimum(jnp.minimum(directions(a_rows, inputs), directions(b_rows, outputs)), rank).astype(jnp.int32)


def lowrank(
    x: Float[Array, "batch time inputs"],
    rows: Float[Array, "layers R W"],
    layer: Int32[Array, ""],
    a_rows: Int32[Array, "batch na"],
    b_rows: Int32[Array, "batch nb"],
    rank: int,
    outputs: int,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> Float[Array, "batch time outputs"]:
    """``x[b] A_bᵀ B_b`` in two kernels, mbgmv's where there is one token and mbgmm's where there are more."""
    batch, time, inputs = x.shape
    name, chosen = ("mbgmv", blocks or DECODE) if time == 1 else ("mbgmm", blocks or PREFILL)
    blocks = chosen._replace(
        directions=min(chosen.directions, pad_rows(rank)),
        inputs=tile_of(inputs, rows.shape[2], chosen.inputs),
        outputs=tile_of(outputs, rows.shape[2], chosen.outputs),
        tokens=1 if time == 1 else min(chosen.tokens, pad_rows(time)),
    )
    tiles, tokens, across = (
        pl.cdiv(rank, blocks.directions),
        pl.cdiv(time, blocks.tokens),
        pl.cdiv(inputs, blocks.inputs),
    )
    splits = min(chosen.splits or max(1, min(8, 256 // (batch * tokens * tiles))), across)
    steps = pl.cdiv(across, splits)
    splits = pl.cdiv(across, steps)
    ranks = ranks_of(a_rows, b_rows, rank, rows.shape[2], inputs, outputs)
    at, dtype = layer.reshape(1), common(x, rows)

    def call(body: Any, which: str, shape: Any, grid: tuple[int, ...], table: Array, given: Array) -> Array:
        return pl.pallas_call(
            functools.partial(body, blocks=blocks, dtype=dtype),
            out_shape=shape,
            grid=grid,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 5,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
            name=f"{name}_{which}",
        )(given, rows, at, table, ranks)

    between = jax.ShapeDtypeStruct((splits, batch, time, tiles * blocks.directions), jnp.float32)
    h = call(
        functools.partial(_shrink, steps=steps), "shrink", between, (batch, tokens, splits * tiles), a_rows, x
    )  # fmt: skip
    grid = (batch, tokens, pl.cdiv(outputs, blocks.outputs))
    return call(_expand, "expand", jax.ShapeDtypeStruct((batch, time, outputs), x.dtype), grid, b_rows, h)
