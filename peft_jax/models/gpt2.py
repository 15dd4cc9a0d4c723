"""GPT-2 (Radford et al. 2019): learned positions, norms before each block, one fused projection seen as three leaves.

Module names are those of `transformers` (models/gpt2/modeling_gpt2.py), so that target modules carry over.  Its fused
``c_attn`` is held as ``c_attn.q``, ``c_attn.k`` and ``c_attn.v``: the pattern ``c_attn`` selects all three,
``c_attn\\.(q|v)`` two.

Departures: the model's own dropout (``resid_pdrop``, ``embd_pdrop``, ``attn_pdrop``) is not applied, methods bring
their own; ``reorder_and_upcast_attn`` changes nothing, because the softmax is in fp32 anyway.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax.attention import Visible, dot_product_attention
from peft_jax.core import Forward, Inputs, Params, Ports
from peft_jax.layers import Embed, LayerNorm, Linear, activation, run_layers
from peft_jax.models.causal_lm import causal_lm, init_causal_lm
from peft_jax.models.tensors import Tensor
from peft_jax.sequence import arrange, layer_attention

MODEL_TYPES = ("gpt2",)
HEADS: tuple[str, ...] = ()
UNUSED = ""
PORTS = frozenset({"attend", "prompt", "prefix"})
ROOT, TABLE = "transformer", "wte"  # of the tree: the decoder, its embedding


@dataclasses.dataclass(frozen=True)
class Config:
    """What the modules need of a transformers config, and how they are to be run."""

    width: int
    hidden: int
    layers: int
    heads: int
    vocab: int
    positions: int
    epsilon: float
    activation: str
    tied: bool
    scale: float  # of the attention scores
    scale_by_layer: bool  # divide them by the layer's number too, from 1
    scan: bool = True
    remat: str = "full"
    compute_dtype: Any = None

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def read_config(config: Any, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Config:
    if config.add_cross_attention:
        raise ValueError("add_cross_attention is not supported: this GPT-2 is a decoder alone")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    activation(config.activation_function)
    return Config(
        width=config.n_embd,
        hidden=config.n_inner or 4 * config.n_embd,
        layers=config.n_layer,
        heads=config.n_head,
        vocab=config.vocab_size,
        positions=config.n_positions,
        epsilon=config.layer_norm_epsilon,
        activation=config.activation_function,
        tied=config.tie_word_embeddings,
        scale=(config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0,
        scale_by_layer=config.scale_attn_by_inverse_layer_idx,
        scan=scan,
        remat=remat,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype),
    )


class Projections(nn.Module):
    """The fused projection: queries, keys and values, each ``[batch, time, heads, dim]``."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        c = self.config
        shape = (*x.shape[:2], c.heads, c.head_dim)
        return tuple(Linear(c.width, True, name=name)(x).reshape(shape) for name in "qkv")


class Attention(nn.Module):
    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, visible: Visible, prefix: Any, cache: Any, layer: Array) -> tuple[Array, Any]:
        c = self.config
        query, key, value = Projections(c, name="c_attn")(x)
        if c.scale_by_layer:  # on the queries, since kernels want a static scale
            query = query / (layer + 1).astype(query.dtype).reshape((1,) * query.ndim)
        y, cache = layer_attention(self.attend, query, key, value, visible, c.scale, prefix, cache, layer)
        return Linear(c.width, True, name="c_proj")(y.reshape(x.shape)), cache


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        x = activation(c.activation)(Linear(c.hidden, True, name="c_fc")(x))
        return Linear(c.width, True, name="c_proj")(x)


class Layer(nn.Module):
    """One decoder layer, in the form that `run_layers` wants: (carry, this layer's inputs, what all layers share)."""

    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, carry: Any, own: Any, visible: Visible) -> tuple[Any, None]:
        (x, cache), (layer, prefix) = carry, own
        y = LayerNorm(self.config.epsilon, name="ln_1")(x)
        y, cache = Attention(self.config, self.attend, name="attn")(y, visible, prefix, cache, layer)
        x = x + y
        y = LayerNorm(self.config.epsilon, name="ln_2")(x)
        return (x + MLP(self.config, name="mlp")(y), cache), None


class Decoder(nn.Module):
    """Embeddings, layers, final norm: tokens to features."""

    config: Config

    @nn.compact
    def __call__(self, inputs: Inputs, ports: Ports = Ports()) -> Any:  # noqa: B008 (frozen)
        c = self.config
        x = Embed(c.vocab, c.width, name="wte")(inputs.tokens)
        x = x if c.compute_dtype is None else x.astype(c.compute_dtype)
        sequence = arrange(inputs, x, ports)
        x = sequence.x + Embed(c.positions, c.width, name="wpe")(sequence.positions).astype(x.dtype)
        own = (np.arange(c.layers, dtype=np.int32), sequence.prefix)
        attend = ports.attend or dot_product_attention
        x, cache = run_layers(Layer, (c, attend), c, (x, sequence.cache), own, sequence.visible)
        return sequence.finish(LayerNorm(c.epsilon, name="ln_f")(x), cache)


def build(config: Any, *, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Forward:
    """The forward function of a transformers config.  Logits are fp32, whatever the compute dtype."""
    decoder = Decoder(read_config(config, scan, remat, compute_dtype))
    return causal_lm(decoder, ROOT, TABLE, tensors(config), PORTS, config.model_type)


def init(key: Array, config: Any, *, scan: bool = True, dtype: Any = jnp.float32) -> Params:
    """Random weights: normal with sd 0.02, norms at one, biases at zero."""
    return init_causal_lm(key, Decoder(read_config(config, scan, "none")), ROOT, dtype)


def tensors(config: Any) -> tuple[Tensor, ...]:
    """Where each tensor of a Hugging Face checkpoint goes.  Its Conv1D keeps kernels ``[in, out]``, as we do."""
    return _table(read_config(config).tied)


def _table(tied: bool) -> tuple[Tensor, ...]:
    ours, theirs = "transformer/layers/", "transformer.h.{layer}."
    found = [Tensor(f"transformer.{n}.weight", (f"transformer/{n}/embedding",)) for n in ("wte", "wpe")]
    for name, at, to in [
        ("ln_f", "transformer.", "transformer/"),
        ("ln_1", theirs, ours),
        ("ln_2", theirs, ours),
    ]:
        found.append(Tensor(f"{at}{name}.weight", (f"{to}{name}/scale",)))
        found.append(Tensor(f"{at}{name}.bias", (f"{to}{name}/bias",)))
    for kind, leaf, ending in [("weight", "kernel", ""), ("bias", "bias", ".bias")]:
        fused = tuple(f"{ours}attn/c_attn/{n}/{leaf}" for n in "qkv")
        names = tuple(f"{theirs}attn.c_attn.{n}{ending}" for n in "qkv")
        found.append(Tensor(f"{theirs}attn.c_attn.{kind}", fused, names=names))
        for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            found.append(Tensor(f"{theirs}{name}.{kind}", (f"{ours}{name.replace('.', '/')}/{leaf}",)))
    if not tied:
        found.append(Tensor("lm_head.weight", ("lm_head/kernel",), transpose=True))
    return tuple(found)


EVERY = ((f"{ROOT}.{TABLE}", _table(tied=False)),)  # what any member has, behind the name of its embedding
