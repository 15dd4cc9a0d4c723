"""Attention functions that a model can be given, and the description of who may see whom.

An attention function takes ``(query, key, value, visible, scale)`` with query ``[batch, time, heads, dim]``, key and
value ``[batch, keys, kv_heads, dim]`` (heads a multiple of kv_heads), and returns ``[batch, time, heads, dim]``.
`Visible` describes the mask instead of holding it, so that a function may choose its own form: a kernel's causal flag,
blocks, or the dense boolean that `Visible.mask` builds.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHUNK = 256  # queries, and keys, that `chunked_attention` computes at a time
EVERYWHERE = -1  # the segment of what a method puts before packed rows
HIDDEN = 0.7 * float(jnp.finfo(jnp.float32).min)  # the score of what a query does not see


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Visible:
    """Query i sees key j when j comes no later (if `causal`), lies within `window`, and shares its segment.

    query_order, key_order   int32 [batch or 1, time], [batch or 1, keys]: the place of each token in its row
    query_segments, key_segments   int32 [batch, …] or None; segment 0 is padding, which nobody sees; a key of the
                segment EVERYWHERE is seen from all of them
    window      how many keys a query reaches back over, itself included; None for all
    bias        fp32 [batch or 1, heads, time, keys], added to the scores; None for none
    cap         the scores' soft cap (see `soft_cap`), before the bias; None for none
    plain       the orders are 0, 1, 2, … on both sides and there are no segments: a kernel's causal flag is enough
    """

    query_order: Any
    key_order: Any
    query_segments: Any = None
    key_segments: Any = None
    window: Any = None
    bias: Any = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    plain: bool = dataclasses.field(default=False, metadata={"static": True})
    cap: float | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def flagged(self) -> bool:
        """Whether a kernel's causal flag and a window known in advance say it all."""
        return self.plain and (self.window is None or (self.causal and isinstance(self.window, int)))

    def mask(self) -> Bool[Array, "batch 1 time keys"]:
        distance = self.query_order[:, :, None] - self.key_order[:, None, :]
        seen = distance >= 0 if self.causal else jnp.ones(distance.shape, bool)
        if self.window is not None:
            seen &= distance < self.window
        if self.key_segments is not None:
            keys = self.key_segments[:, None, :]
            shared = (self.query_segments[:, :, None] == keys) | (keys == EVERYWHERE)
            seen = seen & shared & (keys != 0)
        return seen[:, None]


def dot_product_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    visible: Visible,
    scale: float,
) -> Float[Array, "batch time heads dim"]:
    """Full attention: cuDNN's on a GPU in half precision, `plain_attention` elsewhere.

    cuDNN takes the causal flag and a static window where the rows are plain, a dense mask where they are padded or
    packed.  What it would refuse is computed plainly: heads that are wide or no multiple of 8, masks of an odd length;
    so is a bias, whose gradient it does not always have, and so are capped scores, which it does not know.
    """
    if visible.bias is not None or not _fits_cudnn(query, key, visible):
        return plain_attention(query, key, value, visible, scale)
    if visible.flagged:
        window = None if visible.window is None else (visible.window - 1, 0)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            is_causal=visible.causal,
            local_window_size=window,
            implementation="cudnn",
        )
    mask = jnp.broadcast_to(visible.mask(), (query.shape[0], 1, query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation="cudnn")


def chunked_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    visible: Visible,
    scale: float,
) -> Float[Array, "batch time heads dim"]:
    """Full attention whose memory grows linearly with the text: cuDNN's where `dot_product_attention` has it, and
    elsewhere in blocks of `CHUNK` queries and keys, without the blocks that come later or lie outside the window.

    A softmax is summed up block by block, and the backward pass computes its blocks anew from each query's logarithm of
    that sum (Rabe & Staats 2021, arXiv 2112.05682; Dao 2023, arXiv 2307.08691, algorithms 1 and 2).  It is the only
    derivative there is: no forward mode, no second one.  A query that sees nothing gives zeros.
    """
    if query.shape[1] <= CHUNK or visible.bias is not None or _fits_cudnn(query, key, visible):
        return dot_product_attention(query, key, value, visible, scale)
    if visible.key_segments is None and (query.shape[1] % CHUNK or key.shape[1] % CHUNK):  # to tell what fills a block
        ones = (jnp.ones((1, x.shape[1]), jnp.int32) for x in (query, key))
        visible = dataclasses.replace(visible, query_segments=next(ones), key_segments=next(ones))
    return _blockwise(query * jnp.asarray(scale, query.dtype), key, value, visible)


@jax.custom_vjp
def _blockwise(query: Array, key: Array, value: Array, visible: Visible) -> Array:
    return _forward(query, key, value, visible)[0]


def _forward(query: Array, key: Array, value: Array, visible: Visible) -> tuple[Array, Any]:
    blocks = _Blocks(query, key, value, visible)

    def row(given: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        i, first, end = given
        largest = jnp.full((*blocks.query.shape[1:-1], 1), HIDDEN, jnp.float32)

        def add(j: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, y = so_far
            scores, _ = blocks.scores(i, j)
            new = jnp.maximum(largest, scores.max(-1, keepdims=True))
            shares, faded = jnp.exp(scores - new), jnp.exp(largest - new)
            y = y * faded + _product("bkij,bkjd->bkid", shares, blocks.value[j])
            return new, total * faded + shares.sum(-1, keepdims=True), y

        nothing = jnp.zeros(blocks.query.shape[1:], jnp.float32)
        largest, total, y = jax.lax.fori_loop(first, end, add, (largest, jnp.zeros_like(largest), nothing))
        sees = largest > 0.5 * HIDDEN
        total = jnp.where(sees, total, 1.0)
        return jnp.where(sees, y / total, 0.0).astype(query.dtype), jnp.where(sees, largest + jnp.log(total), 0.0)

    y, logarithm = jax.lax.map(row, (jnp.arange(len(blocks.query), dtype=jnp.int32), *_run(blocks.reach())))
    return _joined(y, query), (query, key, value, visible, y, logarithm)


def _backward(kept: Any, slope: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, visible, y, logarithm = kept
    blocks, slope = _Blocks(query, key, value, visible), _split_queries(slope, key.shape[2])
    mean = _product("nbkid,nbkid->nbki", slope, y)[..., None]

    def column(to_query: Array, given: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        j, first, end = given

        def add(i: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            to_query, to_key, to_value = so_far
            scores, through_cap = blocks.scores(i, j)
            shares = jnp.exp(scores - logarithm[i])
            to_shares = _product("bkid,bkjd->bkij", slope[i], blocks.value[j])
            to_scores = shares * (to_shares - mean[i]) * through_cap
            to_value += _product("bkij,bkid->bkjd", shares, slope[i])
            to_key += _product("bkij,bkid->bkjd", to_scores, blocks.query[i])
            return to_query.at[i].add(_product("bkij,bkjd->bkid", to_scores, blocks.key[j])), to_key, to_value

        nothing = jnp.zeros(blocks.key.shape[1:], jnp.float32)
        to_query, *rest = jax.lax.fori_loop(first, end, add, (to_query, nothing, nothing))
        return to_query, tuple(rest)

    columns = (jnp.arange(len(blocks.key), dtype=jnp.int32), *_run(blocks.reach().T))
    to_query, (to_key, to_value) = jax.lax.scan(column, jnp.zeros(blocks.query.shape, jnp.float32), columns)
    return (
        _joined(to_query, query).astype(query.dtype),
        _joined(to_key, key).astype(key.dtype),
        _joined(to_value, value).astype(value.dtype),
        None,
    )


_blockwise.defvjp(_forward, _backward)


class _Blocks:
    """Queries ``[blocks, batch, kv_heads, group · CHUNK, dim]``, keys and values ``[blocks, batch, kv_heads, CHUNK,
    dim]``, and who sees whom among them."""

    def __init__(self, query: Array, key: Array, value: Array, visible: Visible) -> None:
        self.query = _split_queries(query, key.shape[2])
        self.key, self.value = (_split(x).swapaxes(2, 3) for x in (key, value))
        self.visible = visible
        self.orders = _split(visible.query_order, "edge"), _split(visible.key_order, "edge")
        self.segments = _split(visible.query_segments), _split(visible.key_segments)

    def scores(self, i: Array, j: Array) -> tuple[Array, Any]:
        """Of a block of queries and one of keys, in fp32; and the slope of their soft cap."""
        raw, cap = _product("bkid,bkjd->bkij", self.query[i], self.key[j]), self.visible.cap
        capped = soft_cap(raw, cap)
        of = lambda x, k: None if x is None else x[k]  # noqa: E731
        seen = dataclasses.replace(
            self.visible,
            query_order=self.orders[0][i],
            key_order=self.orders[1][j],
            query_segments=of(self.segments[0], i),
            key_segments=of(self.segments[1], j),
        ).mask()
        by_head = capped.reshape(*raw.shape[:2], -1, *seen.shape[-2:])
        masked = jnp.where(seen[:, :, None], by_head, HIDDEN).reshape(raw.shape)
        return masked, 1.0 if cap is None else 1.0 - (capped / cap) ** 2

    def reach(self) -> Bool[Array, "query_blocks key_blocks"]:
        """Whether any query of a block can see any key of another, by their places alone."""
        first, last = ([f(x, (1, 2)) for x in self.orders] for f in (jnp.min, jnp.max))
        near = jnp.ones((len(first[0]), len(first[1])), bool)
        if self.visible.causal:
            near &= last[0][:, None] >= first[1][None]
        if self.visible.window is not None:
            near &= first[0][:, None] - last[1][None] < self.visible.window
        return near


def _run(reach: Bool[Array, "rows columns"]) -> tuple[Array, Array]:
    """The first column that each row reaches, and the one behind its last."""
    columns = jnp.arange(reach.shape[1], dtype=jnp.int32)[None]
    return jnp.where(reach, columns, reach.shape[1]).min(1), jnp.where(reach, columns + 1, 0).max(1)


def _split(x: Any, mode: Any = "constant") -> Any:
    """``[batch, time, …]`` to ``[blocks, batch, CHUNK, …]``, the last one filled up."""
    if x is None:
        return None
    blocks = -(-x.shape[1] // CHUNK)
    x = jnp.pad(x, [(0, 0), (0, blocks * CHUNK - x.shape[1])] + [(0, 0)] * (x.ndim - 2), mode)
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, CHUNK, *x.shape[2:]), 1, 0)


def _split_queries(x: Array, kv_heads: int) -> Array:
    """The queries that share a key head are rows of one matrix."""
    x = _split(x)
    x = x.reshape(*x.shape[:3], kv_heads, -1, x.shape[-1]).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _joined(x: Array, like: Array) -> Array:
    """What `_split_queries` and `_split` have split, in its own order."""
    blocks, batch, kv_heads, _, dim = x.shape
    x = x.reshape(blocks, batch, kv_heads, -1, CHUNK, dim).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, blocks * CHUNK, *like.shape[2:])[:, : like.shape[1]]


def _product(spec: str, x: Array, y: Array) -> Array:
    """In fp32, of numbers that are as short as the second."""
    return jnp.einsum(spec, x.astype(y.dtype), y, preferred_element_type=jnp.float32)


def _fits_cudnn(query: Array, key: Array, visible: Visible) -> bool:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    heads = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    lengths = visible.flagged or (query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0)
    return jax.default_backend() == "gpu" and half and heads and lengths and visible.cap is None


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """``cap · tanh(x / cap)``: what is small stays as it is, and nothing exceeds `cap`; without one, `x` itself."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def plain_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    visible: Visible,
    scale: float,
) -> Float[Array, "batch time heads dim"]:
    """``softmax(cap(scale · q kᵀ) + bias) v``, scores and softmax in fp32; a query that sees nothing gives the mean.

    The queries that share a key head are rows of one matrix, so that each product is as large as it can be and needs
    no transpose: on a CPU a third less time than `jax.nn.dot_product_attention`, forward and backward.
    """
    batch, time, heads, dim = query.shape
    kv_heads, group = key.shape[2], heads // key.shape[2]
    rows = (query * jnp.asarray(scale, query.dtype)).reshape(batch, time, kv_heads, group, dim)
    rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * time, dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("bkid,bkjd->bkij", rows, key, preferred_element_type=jnp.float32)
    scores = soft_cap(scores.reshape(batch, kv_heads, group, time, -1), visible.cap)
    if visible.bias is not None:
        scores += visible.bias.reshape(-1, kv_heads, group, time, scores.shape[-1])
    scores = jnp.where(visible.mask()[:, :, None], scores, HIDDEN)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(batch, kv_heads, group * time, -1)
    y = jnp.einsum("bkij,bkjd->bkid", shares, value)
    return y.reshape(batch, kv_heads, group, time, dim).transpose(0, 3, 1, 2, 4).reshape(query.shape)
