"""Flax layers that read typed leaves, and the small pieces that model families share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peft_jax.attention import Visible
from peft_jax.core import Inputs, Ports
from peft_jax.weights import Leaf, embed, linear

normal = nn.initializers.normal(0.02)


def leaf(module: nn.Module, name: str, init: Callable[..., Array], shape: tuple[int, ...]) -> Leaf:
    """A parameter that may be a typed leaf.  `nn.Module.param` would compare the leaf's first array with `shape`."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
    """``x kernel + bias`` for a kernel ``[in, out]`` of any leaf type."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        y = linear(x, leaf(self, "kernel", normal, (x.shape[-1], self.features)))
        if self.use_bias:
            y = add_vector(y, leaf(self, "bias", nn.initializers.zeros, (self.features,)))
        return y


class Embed(nn.Module):
    """Rows of an embedding ``[vocabulary, width]`` of any leaf type."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... width"]:
        return embed(ids, leaf(self, "embedding", normal, (self.vocab, self.width)))


class RMSNorm(nn.Module):
    """``x / rms(x) · scale``, the statistics in fp32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = leaf(self, "scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
        return times_vector(wide.astype(x.dtype), scale)


class LayerNorm(nn.Module):
    """``(x − mean) / sd · scale + bias``, the statistics in fp32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = leaf(self, "scale", nn.initializers.ones, (x.shape[-1],))
        bias = leaf(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, -1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
        return add_vector(times_vector(wide.astype(x.dtype), scale), bias)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The function that a transformers config calls by this name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"the config's activation {name!r} is not supported: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _aligned(vector: Array, x: Array) -> Array:
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


def times_vector(x: Array, vector: Array) -> Array:
    return x * _aligned(vector, x)


def add_vector(x: Array, vector: Array) -> Array:
    return x + _aligned(vector, x)


# -- positions, segments, cache ---------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """A key-value cache: keys and values ``[layers, batch, slots, kv_heads, dim]``, the segment of each filled slot
    (0 where a slot is padding or empty) ``[batch, slots]``, and how many slots are filled."""

    keys: Array
    values: Array
    segments: Array
    filled: Array

    @classmethod
    def empty(cls, layers: int, kv_heads: int, dim: int, batch: int, length: int, dtype: Any = jnp.float32) -> "Cache":
        rows = jnp.zeros((layers, batch, length, kv_heads, dim), dtype)
        return cls(rows, jnp.zeros_like(rows), jnp.zeros((batch, length), jnp.int32), jnp.int32(0))

    def write(self, layer: Array, keys: Array, values: Array) -> "Cache":
        """The new tokens' rows of one layer, written in place when the caller donates the cache."""
        start = (layer, 0, self.filled, 0, 0)
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)  # noqa: E731
        return dataclasses.replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def advance(self, tokens: int) -> "Cache":
        """After all layers have written: the next call's tokens go behind these."""
        return dataclasses.replace(self, filled=self.filled + tokens)

    def take(self, rows: Int[Array, "rows"]) -> "Cache":
        """These rows of the batch, in this order, repeated where named twice (beam search)."""
        keys, values = jnp.take(self.keys, rows, axis=1), jnp.take(self.values, rows, axis=1)
        return Cache(keys, values, jnp.take(self.segments, rows, axis=0), self.filled)


def cached_attention(
    attend: Callable[..., Array],
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch time kv_heads dim"],
    value: Float[Array, "batch time kv_heads dim"],
    visible: Visible,
    scale: float,
    cache: Cache | None,
    layer: Array,
) -> tuple[Float[Array, "batch time heads dim"], Cache | None]:
    """Attention over the new tokens, or, with a cache, over all that it holds once this layer's rows are written."""
    if cache is not None:
        cache = cache.write(layer, key, value)
        key, value = cache.keys[layer].astype(query.dtype), cache.values[layer].astype(query.dtype)
    return attend(query, key, value, visible, scale), cache


def arrange(inputs: Inputs, causal: bool = True) -> tuple[Array, Visible, Cache | None]:
    """Positions, visibility, and the cache with the new tokens' segments written (the layers write their keys).

    Positions count a row's real tokens, or a segment's tokens when segments are given, and go on from the cache.
    """
    batch, time = inputs.tokens.shape[:2]
    cache, segments, positions = inputs.cache, inputs.segments, inputs.positions
    if segments is None and inputs.mask is not None:
        segments = inputs.mask.astype(jnp.int32)
    elif segments is not None and inputs.mask is not None:
        segments = jnp.where(inputs.mask, segments, 0)
    order = jnp.arange(time, dtype=jnp.int32)[None]
    if positions is None:
        if inputs.segments is not None:
            new = jnp.concatenate([jnp.ones((batch, 1), bool), segments[:, 1:] != segments[:, :-1]], 1)
            positions = order - jax.lax.cummax(jnp.where(new, jnp.broadcast_to(order, new.shape), 0), axis=1)
        elif segments is not None:
            positions = jnp.maximum(jnp.cumsum(segments, 1) - 1, 0)
        else:
            positions = jnp.broadcast_to(order, (batch, time))
        if cache is not None:
            positions = positions + jnp.sum(cache.segments != 0, 1, dtype=jnp.int32)[:, None]
    if cache is None:
        return positions, Visible(order, order, segments, segments, None, causal, plain=segments is None), None
    segments = jnp.ones((batch, time), jnp.int32) if segments is None else segments
    seen = jax.lax.dynamic_update_slice(cache.segments, segments, (0, cache.filled))
    keys = jnp.arange(seen.shape[1], dtype=jnp.int32)[None]
    visible = Visible(cache.filled + order, keys, segments, seen, None, causal)
    return positions, visible, dataclasses.replace(cache, segments=seen)


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": None,
}


def checkpointed(module: Any, remat: str) -> Any:
    """Rematerialisation of a layer: ``full`` recomputes it, ``dots`` keeps its matrix products, ``none`` keeps all."""
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}: choose 'full', 'dots' or 'none'")
    return module if remat == "none" else nn.remat(module, policy=REMAT[remat], prevent_cse=False)


def run_layers(layer: Any, arguments: tuple[Any, ...], config: Any, carry: Any, own: Any, shared: Any) -> Any:
    """Runs `config.layers` copies of a module, scanned under the name ``layers`` or unrolled as ``layers_0``, …

    `layer(*arguments)` maps ``(carry, own, shared)`` to ``(carry, None)``; arrays of `own` are stacked by layer.
    Stacked parameters ("params") are sliced a layer each, the collection "shared" is handed to every layer whole.
    """
    layer = checkpointed(layer, config.remat)
    if config.scan:
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            variable_broadcast="shared",
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.layers,
        )
        return stack(*arguments, name="layers")(carry, own, shared)[0]
    for i in range(config.layers):
        mine = jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), own)
        carry, _ = layer(*arguments, name=f"layers_{i}")(carry, mine, shared)
    return carry


def refuse_unknown_ports(ports: Ports, taken: frozenset[str], family: str) -> None:
    given = {f.name for f in dataclasses.fields(ports) if getattr(ports, f.name) is not None}
    for name in given - taken - {"step_key", "micro_key", "adapter"}:
        raise ValueError(f"{family} has no port {name!r}: it takes {', '.join(sorted(taken)) or 'none'}")
