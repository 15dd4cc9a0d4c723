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

CHUNK = 256  # queries that `chunked_attention` computes at a time
EVERYWHERE = -1  # the segment of what a method puts before packed rows


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
    `plain_attention` elsewhere, of `CHUNK` queries at a time, computed anew in the backward pass."""
    batch, time = query.shape[:2]
    if time <= CHUNK or visible.bias is not None or _fits_cudnn(query, key, visible):
        return dot_product_attention(query, key, value, visible, scale)
    chunks = -(-time // CHUNK)

    def split(x: Any) -> Any:  # [batch, time, …] to [chunks, batch, CHUNK, …]
        if x is None:
            return None
        x = jnp.pad(x, [(0, 0), (0, chunks * CHUNK - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, CHUNK, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(given: tuple[Array, Array, Any]) -> Array:
        q, order, segments = given
        seen = dataclasses.replace(visible, query_order=order, query_segments=segments, plain=False)
        return plain_attention(q, key, value, seen, scale)

    y = jax.lax.map(one, (split(query), split(visible.query_order), split(visible.query_segments)))
    return jnp.moveaxis(y, 0, 1).reshape(batch, chunks * CHUNK, *query.shape[2:])[:, :time]


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
    scores = jnp.where(visible.mask()[:, :, None], scores, 0.7 * jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(batch, kv_heads, group * time, -1)
    y = jnp.einsum("bkij,bkjd->bkid", shares, value)
    return y.reshape(batch, kv_heads, group, time, dim).transpose(0, 3, 1, 2, 4).reshape(query.shape)
