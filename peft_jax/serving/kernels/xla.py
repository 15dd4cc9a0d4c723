"""The reference: gather what the tables name, once, then multiply; in plain JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from peft_jax.attention import HIDDEN, soft_cap
from peft_jax.serving.stored import dtype_of, numbers


def gathered(
    rows: Shaped[Array, "layers R W"], layer: Int32[Array, ""], ids: Int32[Array, "batch n"]
) -> Float[Array, "batch n W"]:
    """Some rows of one layer: one gather from the pool, of which no layer is sliced out first."""
    return numbers(rows.at[layer, ids].get(mode="clip", wrap_negative_indices=False))


def matrices(
    rows: Shaped[Array, "layers R W"], layer: Int32[Array, ""], ids: Int32[Array, "batch n"], rank: int, wide: int
) -> Float[Array, "batch rank wide"]:
    """The matrices that lie in those rows, direction after direction."""
    flat = gathered(rows, layer, ids).reshape(ids.shape[0], -1)
    return flat[:, : rank * wide].reshape(ids.shape[0], rank, wide)


def lowrank(
    x: Float[Array, "batch time inputs"],
    rows: Shaped[Array, "layers R W"],
    layer: Int32[Array, ""],
    a_rows: Int32[Array, "batch na"],
    b_rows: Int32[Array, "batch nb"],
    rank: int,
    outputs: int,
) -> Float[Array, "batch time outputs"]:
    """``x[b] A_bᵀ B_b``; what lies between the two products is fp32."""
    a = matrices(rows, layer, a_rows, rank, x.shape[-1])
    b = matrices(rows, layer, b_rows, rank, outputs)
    if x.shape[1] == 1 and x.shape[0] > 1:
        # A product for each row with one row of x is a call each on a CPU: summed as they come, half the time.
        x32, a32, b32 = (each.astype(jnp.float32) for each in (x, a, b))
        return ((x32 * a32).sum(2, keepdims=True) * b32).sum(1, keepdims=True).astype(x.dtype)
    dtype = common(x, rows)
    h = product("bti,bri->btr", x.astype(dtype), a.astype(dtype))
    return product("btr,bro->bto", h, b.astype(jnp.float32)).astype(x.dtype)


def paged_attention(
    query: Float[Array, "batch time heads dim"],
    new_key: Float[Array, "batch time kv_heads dim"],
    new_value: Float[Array, "batch time kv_heads dim"],
    rows: Shaped[Array, "layers R W"],
    layer: Int32[Array, ""],
    key_rows: Int32[Array, "batch context"],
    value_rows: Int32[Array, "batch context"],
    past: Int32[Array, "batch"],
    new: Int32[Array, "batch"],
    scale: float,
    window: Int32[Array, ""],
    cap: float | None,
) -> Float[Array, "batch time heads dim"]:
    """One softmax over the scores of both parts, whose keys are not joined into one array."""
    batch, time, _, dim = query.shape
    context, kv_heads, dtype = key_rows.shape[1], new_key.shape[2], common(query, rows)
    at, steps = jnp.arange(context, dtype=jnp.int32), jnp.arange(time, dtype=jnp.int32)
    filled, real = at[None] < past[:, None], steps[None] < new[:, None]
    paged = [
        gathered(rows, layer, jnp.where(filled, ids, 0)).reshape(batch, context, kv_heads, dim)
        for ids in (key_rows, value_rows)
    ]
    fresh = [jnp.where(real[..., None, None], each, jnp.zeros((), each.dtype)) for each in (new_key, new_value)]
    keys, values = ([each.astype(dtype) for each in pair] for pair in zip(paged, fresh, strict=True))
    # [batch, kv_heads, heads that share one, time, dim] as rows of one matrix for each key head.
    q = query.astype(dtype).reshape(batch, time, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, dim)
    scores = jnp.concatenate([product("bkid,bjkd->bkij", q, each) for each in keys], axis=-1) * scale
    mine = past[:, None] + steps[None]
    place = jnp.concatenate([jnp.broadcast_to(at[None], key_rows.shape), mine], axis=1)
    distance = mine[:, :, None] - place[:, None, :]
    held = jnp.concatenate([filled, real], axis=1)[:, None, :] & real[:, :, None]
    seen = (held & (distance >= 0) & (distance < window))[:, None, None]
    scores = soft_cap(scores, cap).reshape(batch, kv_heads, -1, time, context + time)
    shares = jax.nn.softmax(jnp.where(seen, scores, HIDDEN), axis=-1)
    shares = jnp.where(seen, shares, 0.0).reshape(batch, kv_heads, -1, context + time).astype(dtype)
    parts = (shares[..., :context], shares[..., context:])
    y = sum(product("bkij,bjkd->bkid", part, each) for part, each in zip(parts, values, strict=True))
    y = jnp.asarray(y).reshape(batch, kv_heads, -1, time, dim).transpose(0, 3, 1, 2, 4)
    return y.reshape(query.shape).astype(query.dtype)


def common(x: Array, rows: Array) -> jnp.dtype:
    """The dtype in which the input meets the pool: their own where it is one, else fp32."""
    return x.dtype if x.dtype == dtype_of(rows) else jnp.dtype(jnp.float32)


def product(how: str, a: Array, b: Array) -> Array:
    """Accumulated in fp32; fp32 operands are multiplied as such on a GPU too, not as tf32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(how, a, b, precision=precision, preferred_element_type=jnp.float32)
