"""Attention functions that a model can be given, and the description of who may see whom.

An attention function takes ``(query, key, value, visible, scale)`` with query ``[batch, time, heads, dim]``, key and
value ``[batch, keys, kv_heads, dim]`` (heads a multiple of kv_heads), and returns ``[batch, time, heads, dim]``.
`Visible` describes the mask instead of holding it, so that a function may choose its own form: a kernel's causal flag,
blocks, or the dense boolean that `Visible.mask` builds.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Visible:
    """Query i sees key j when j comes no later (if `causal`), lies within `window`, and shares its segment.

    query_order, key_order   int32 [batch or 1, time], [batch or 1, keys]: the place of each token in its row
    query_segments, key_segments   int32 [batch, …] or None; segment 0 is padding, which nobody sees
    window      how many keys a query reaches back over, itself included; None for all
    plain       the orders are 0, 1, 2, … on both sides and there are no segments: a kernel's causal flag is enough
    """

    query_order: Any
    key_order: Any
    query_segments: Any = None
    key_segments: Any = None
    window: Any = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    plain: bool = dataclasses.field(default=False, metadata={"static": True})

    def mask(self) -> Bool[Array, "batch 1 time keys"]:
        distance = self.query_order[:, :, None] - self.key_order[:, None, :]
        seen = distance >= 0 if self.causal else jnp.ones(distance.shape, bool)
        if self.window is not None:
            seen &= distance < self.window
        if self.key_segments is not None:
            keys = self.key_segments[:, None, :]
            seen = seen & (self.query_segments[:, :, None] == keys) & (keys != 0)
        return seen[:, None]


def dot_product_attention(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    visible: Visible,
    scale: float,
) -> Float[Array, "batch time heads dim"]:
    """Full attention: cuDNN's on a GPU in half precision, XLA's elsewhere.

    cuDNN takes the causal flag and a static window where the rows are plain, a dense mask where they are padded or
    packed.  What it would refuse goes to XLA: heads that are wide or no multiple of 8, masks of an odd length.
    """
    plain = visible.plain and visible.causal and (visible.window is None or isinstance(visible.window, int))
    implementation: Literal["cudnn", "xla"] = "cudnn" if _fits_cudnn(query, key, plain) else "xla"
    with jax.numpy_dtype_promotion("standard"):  # inside, JAX's function promotes half precision to fp32
        if plain:
            window = None if visible.window is None else (visible.window - 1, 0)
            return jax.nn.dot_product_attention(
                query, key, value, scale=scale, is_causal=True, local_window_size=window, implementation=implementation
            )
        mask = jnp.broadcast_to(visible.mask(), (query.shape[0], 1, query.shape[1], key.shape[1]))
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation=implementation)


def _fits_cudnn(query: Array, key: Array, plain: bool) -> bool:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    heads = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    lengths = plain or (query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0)
    return jax.default_backend() == "gpu" and half and heads and lengths
