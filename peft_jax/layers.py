"""Flax layers that read typed leaves, and the small pieces that model families share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peft_jax import trees
from peft_jax.core import Params, Ports
from peft_jax.sharding import pin
from peft_jax.weights import Leaf, embed, linear

normal = nn.initializers.normal(0.02)


def leaf(module: nn.Module, name: str, init: Callable[..., Array], shape: tuple[int, ...]) -> Leaf:
    """A parameter that may be a typed leaf.  `nn.Module.param` would compare the leaf's first array with `shape`."""
    if module.has_variable("params", name):
        return trees.fill(module.get_variable("params", name), module.get_variable("shared", name, {}))
    return module.param(name, init, shape, jnp.float32)


def variables(params: Params) -> dict[str, Params]:
    """What a module's `apply` is given: "params", which `run_layers` slices by layer, and "shared", which it does not:
    what the layers of a leaf share, at the leaf's own path, where `leaf` finds it."""
    sliced, shared = trees.unshare(params)
    return {"params": sliced, "shared": shared}


class Linear(nn.Module):
    """``x kernel + bias`` for a kernel ``[in, out]`` of any leaf type."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        y = pin(linear(x, leaf(self, "kernel", normal, (x.shape[-1], self.features))))
        if self.use_bias:
            y = add_vector(y, leaf(self, "bias", nn.initializers.zeros, (self.features,)))
        return y


def affine(x: Float[Array, "... inputs"], params: Any) -> Float[Array, "... outputs"]:
    """``x kernel + bias``, of a head that is no module."""
    return add_vector(linear(x, params["kernel"]), params["bias"])


class Embed(nn.Module):
    """Rows of an embedding ``[vocabulary, width]`` of any leaf type."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... width"]:
        return pin(embed(ids, leaf(self, "embedding", normal, (self.vocab, self.width))))


class RMSNorm(nn.Module):
    """``x / rms(x) · scale``, the statistics in fp32; `centred`: ``· (1 + scale)``, the product in fp32 too."""

    epsilon: float
    centred: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        start = nn.initializers.zeros if self.centred else nn.initializers.ones
        scale = leaf(self, "scale", start, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)
        if self.centred:
            return times_vector(wide, 1 + scale.astype(jnp.float32)).astype(x.dtype)
        return times_vector(wide.astype(x.dtype), scale)


class LayerNorm(nn.Module):
    """``(x − mean) / sd · scale + bias``, the statistics in fp32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return layer_norm(x, norm_weights(self, x.shape[-1]), self.epsilon)


def norm_weights(module: nn.Module, width: int) -> tuple[Leaf, Leaf]:
    """A layer norm's scale and bias, in the module's own scope."""
    return leaf(module, "scale", nn.initializers.ones, (width,)), leaf(module, "bias", nn.initializers.zeros, (width,))


def layer_norm(x: Float[Array, "... d"], weights: tuple[Leaf, Leaf], epsilon: float) -> Float[Array, "... d"]:
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, -1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)
    return add_vector(times_vector(wide.astype(x.dtype), weights[0]), weights[1])


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


# -- layers in a row --------------------------------------------------------------------------------------------------

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
    for name in given - taken - {"alone", "step_key", "micro_key", "adapter"}:
        raise ValueError(f"{family} has no port {name!r}: it takes {', '.join(sorted(taken)) or 'none'}")
