"""Attention over the pool on a GPU, as a Pallas kernel of the Triton backend.

    largest, total, y  ←  a block of keys at a time        (the softmax's maximum, its sum, and the weighted values)

A program has some tokens of one batch row, the query heads of one key head, and a share of the past.  It looks a
block's rows up in the table, loads those of them that are filled, and goes on; it begins where the window does and ends
where the past does, so its cost follows what is filled and not the table's width.  The last share sees the new tokens
too.  Several shares are weighed against each other at the end.

Source: Kwon et al. 2023 (PagedAttention, arXiv 2309.06180), section 4; Dao 2023 (FlashAttention-2, arXiv 2307.08691),
algorithm 1; the shares of the past are those of Flash-Decoding (Dao et al. 2023).

Departures: a page is one token, and its keys and values are any two rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32

from peft_jax.attention import HIDDEN, soft_cap
from peft_jax.quant.kernels.four_bit import _dot, pad_rows
from peft_jax.serving.kernels.xla import common


class Blocks(NamedTuple):
    """How the kernel cuts its work.  queries: rows of a tile, tokens times the heads that share a key head; keys: of a
    block; splits: shares of the past, where there is one token (0 chooses)."""

    queries: int = 64
    keys: int = 32
    splits: int = 0
    warps: int = 4
    stages: int = 2


BLOCKS = Blocks()


def _attention(
    query: Any, new_key: Any, new_value: Any, rows: Any, layer: Any, key_rows: Any, value_rows: Any, past: Any,
    new: Any, window: Any, *out: Any, scale: float, cap: float | None, queries: int, wide: int, splits: int,
    blocks: Blocks, dtype: Any,
) -> None:  # fmt: skip
    (_, _, heads, dim), kv_heads = query.shape, new_key.shape[2]
    group = heads // kv_heads
    tokens = queries // group
    b, head = pl.program_id(0), pl.program_id(1)
    first, split = pl.program_id(2) // splits * tokens, pl.program_id(2) % splits
    filled, real, reach = past[b], new[b], window[0]
    m, d = jnp.arange(queries), jnp.arange(wide)
    token, shared = first + m // group, head * group + m % group
    mine = (m < tokens * group) & (token < real)
    column = d < dim

    def load(ref: Any, index: tuple[Any, ...], inside: Array) -> Array:
        return triton.load(ref.at[index], mask=inside[:, None] & column[None, :], other=0.0)

    q = load(query, (b, token[:, None], shared[:, None], d[None, :]), mine).astype(dtype)

    def add(so_far: Any, key: Array, value: Array, distance: Array, inside: Array) -> Any:
        largest, total, y = so_far
        scores = soft_cap(_dot(q, key.astype(dtype), 1) * scale, cap)
        seen = mine[:, None] & inside[None, :] & (distance >= 0) & (distance < reach)
        scores = jnp.where(seen, scores, HIDDEN)
        above = jnp.maximum(largest, scores.max(1))
        shares, faded = jnp.where(seen, jnp.exp(scores - above[:, None]), 0.0), jnp.exp(largest - above)
        y = y * faded[:, None] + _dot(shares.astype(dtype), value.astype(dtype), 0)
        return above, total * faded + shares.sum(1), y

    def of_past(j: Array, so_far: Any) -> Any:
        at = j * blocks.keys + jnp.arange(blocks.keys)
        inside = at < filled
        ids = (triton.load(table.at[b, at], mask=inside, other=0) for table in (key_rows, value_rows))
        key, value = (load(rows, (layer[0], each[:, None], (head * dim + d)[None, :]), inside) for each in ids)
        return add(so_far, key, value, filled + token[:, None] - at[None, :], inside)

    def of_new(j: Array, so_far: Any) -> Any:
        at = j * blocks.keys + jnp.arange(blocks.keys)
        inside = at < real
        key, value = (load(ref, (b, at[:, None], head, d[None, :]), inside) for ref in (new_key, new_value))
        return add(so_far, key, value, token[:, None] - at[None, :], inside)

    busy = first < real
    begin = jnp.maximum(filled + first - reach + 1, 0) // blocks.keys
    end = jnp.where(busy, (filled + blocks.keys - 1) // blocks.keys, 0)
    each = (jnp.maximum(end - begin, 0) + splits - 1) // splits
    low = begin + split * each
    so_far: Any = (
        jnp.full(queries, HIDDEN, jnp.float32),
        jnp.zeros(queries, jnp.float32),
        jnp.zeros((queries, wide), jnp.float32),
    )
    so_far = jax.lax.fori_loop(low, jnp.minimum(low + each, end), of_past, so_far)
    low = jnp.maximum(first - reach + 1, 0) // blocks.keys
    end = (jnp.minimum(first + tokens, real) + blocks.keys - 1) // blocks.keys
    end = jnp.where(busy & (split == splits - 1), end, 0)
    largest, total, y = jax.lax.fori_loop(low, end, of_new, so_far)
    inside = (m < tokens * group) & (token < query.shape[1])
    if splits == 1:
        total = jnp.where(total > 0, total, 1.0)
        y = (y / total[:, None]).astype(out[0].dtype)
        place = out[0].at[b, token[:, None], shared[:, None], d[None, :]]
    else:
        triton.store(out[1].at[split, b, token, shared], largest, mask=inside)
        triton.store(out[2].at[split, b, token, shared], total, mask=inside)
        place = out[0].at[split, b, token[:, None], shared[:, None], d[None, :]]
    triton.store(place, y, mask=inside[:, None] & column[None, :])


def paged_attention(
    query: Float[Array, "batch time heads dim"],
    new_key: Float[Array, "batch time kv_heads dim"],
    new_value: Float[Array, "batch time kv_heads dim"],
    rows: Float[Array, "layers R W"],
    layer: Int32[Array, ""],
    key_rows: Int32[Array, "batch context"],
    value_rows: Int32[Array, "batch context"],
    past: Int32[Array, "batch"],
    new: Int32[Array, "batch"],
    scale: float,
    window: Int32[Array, ""],
    cap: float | None,
    *,
    interpret: bool = False,
    blocks: Blocks = BLOCKS,
) -> Float[Array, "batch time heads dim"]:
    """Attention over the pool and the new tokens; with one new token each, the past is shared out over programs."""
    (batch, time, heads, dim), (context, kv_heads) = query.shape, (key_rows.shape[1], new_key.shape[2])
    if not context:
        key_rows = value_rows = jnp.zeros((batch, 1), jnp.int32)
    group = heads // kv_heads
    queries = max(min(blocks.queries, pad_rows(group * time)), pad_rows(group))
    tiles = pl.cdiv(time, queries // group)
    splits = 1
    if time == 1:
        splits = blocks.splits or max(1, min(8, 256 // (batch * kv_heads)))
        splits = max(1, min(splits, context // blocks.keys))
    shape = (batch, time, heads, dim)
    several = [jax.ShapeDtypeStruct((splits, *each), jnp.float32) for each in (shape, shape[:3], shape[:3])]
    outs = [jax.ShapeDtypeStruct(shape, query.dtype)] if splits == 1 else several
    body = functools.partial(
        _attention, scale=scale, cap=cap, queries=queries, wide=pad_rows(dim), splits=splits, blocks=blocks,
        dtype=common(query, rows),
    )  # fmt: skip
    found = pl.pallas_call(
        body,
        out_shape=outs,
        grid=(batch, kv_heads, tiles * splits),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 10,
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(outs),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        name="paged_attention",
    )(query, new_key, new_value, rows, layer.reshape(1), key_rows, value_rows, past, new, window.reshape(1))
    if splits == 1:
        return found[0]
    y, largest, total = found
    weight = jnp.exp(largest - largest.max(0)[None])
    total = (total * weight).sum(0)
    y = (y * weight[..., None]).sum(0) / jnp.where(total > 0, total, 1.0)[..., None]
    return y.astype(query.dtype)
