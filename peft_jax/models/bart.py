"""BART (Lewis et al. 2019, arXiv 1910.13461): an encoder-decoder with learned positions and norms behind each block.

Module names are those of `transformers` (models/bart/modeling_bart.py), so that target modules carry over.

Departures: the model's own dropout and layer dropout are not applied, methods bring their own; positions count real
tokens, so that padding may stand on either side; ``final_logits_bias``, which is zero in every BART, is not kept; an
end is not forced on a text that reaches its longest (``forced_eos_token_id``).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax.core import Forward, Params
from peft_jax.layers import Embed, LayerNorm, Linear, activation, run_layers
from peft_jax.models.encoder_decoder import (
    Attention,
    Caches,
    Sight,
    by_stack,
    encoder_decoder,
    init_encoder_decoder,
)
from peft_jax.models.tensors import Tensor
from peft_jax.sequence import Cache, Sequence

MODEL_TYPES = ("bart",)
HEADS: tuple[str, ...] = ()
UNUSED = ""
OFFSET = 2  # rows of the table of positions that stand for none
EPSILON = 1e-5
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclasses.dataclass(frozen=True)
class Config:
    """What the modules need of a transformers config, and how they are to be run.  Pairs are encoder's, decoder's."""

    width: int
    hidden: tuple[int, int]
    layers: int
    decoder_layers: int
    heads: tuple[int, int]
    vocab: int
    positions: int
    activation: str
    tied: bool
    embedding_scale: float
    scan: bool = True
    remat: str = "full"
    compute_dtype: Any = None
    kind: str = "bart"
    output_scale: float = 1.0

    @property
    def attentions(self) -> dict[str, tuple[int, int, int]]:
        encoder, decoder = (
            (layers, heads, self.width // heads)
            for layers, heads in zip((self.layers, self.decoder_layers), self.heads, strict=True)
        )
        return {"encoder": encoder, "decoder": decoder, "cross": decoder}


def read_config(config: Any, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Config:
    if not config.is_encoder_decoder:
        raise ValueError("a BART decoder alone is not supported: give the whole model's config")
    heads = (config.encoder_attention_heads, config.decoder_attention_heads)
    for count in heads:
        if config.d_model % count:
            raise ValueError(f"d_model {config.d_model} is not a multiple of {count} attention heads")
    activation(config.activation_function)
    return Config(
        width=config.d_model,
        hidden=(config.encoder_ffn_dim, config.decoder_ffn_dim),
        layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        heads=heads,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        activation=config.activation_function,
        tied=config.tie_word_embeddings,
        embedding_scale=config.d_model**0.5 if config.scale_embedding else 1.0,
        scan=scan,
        remat=remat,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype),
    )


# -- stacks -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """What the layers of both stacks share: attention to themselves and the feed-forward, each with its residual and
    the norm behind it; in the decoder, attention to the source between them."""

    config: Config
    attend: Callable[..., Array]
    stack: int  # 0 encoder, 1 decoder

    def attention(self, name: str, x: Array, of: Any, *given: Any) -> tuple[Array, Cache | None]:
        c = self.config
        heads = c.heads[self.stack]
        dim = c.width // heads
        y, cache = Attention(heads, dim, dim**-0.5, True, PROJECTIONS, self.attend, name=name)(x, of, *given)
        return LayerNorm(EPSILON, name=f"{name}_layer_norm")(x + y), cache

    def feed_forward(self, x: Array) -> Array:
        y = activation(self.config.activation)(Linear(self.config.hidden[self.stack], True, name="fc1")(x))
        return LayerNorm(EPSILON, name="final_layer_norm")(x + Linear(self.config.width, True, name="fc2")(y))


class EncoderLayer(Layer):
    """One encoder layer, in the form that `run_layers` wants: (carry, this layer's inputs, what all layers share)."""

    @nn.compact
    def __call__(self, x: Array, prefix: Any, visible: Any) -> tuple[Array, None]:
        x, _ = self.attention("self_attn", x, x, visible, prefix)
        return self.feed_forward(x), None


class DecoderLayer(Layer):
    """One decoder layer, in the form that `run_layers` wants."""

    @nn.compact
    def __call__(self, carry: Any, own: Any, shared: Any) -> tuple[Any, None]:
        (x, mine, theirs), (layer, prefix, cross), (visible, source, sight) = carry, own, shared
        x, mine = self.attention("self_attn", x, x, visible, prefix, mine, layer)
        x, theirs = self.attention("encoder_attn", x, source, sight, cross, theirs, layer)
        return (self.feed_forward(x), mine, theirs), None


class Stack(nn.Module):
    config: Config
    attend: Callable[..., Array]

    def begin(self, sequence: Sequence) -> Array:
        c, x = self.config, sequence.x
        table = Embed(c.positions + OFFSET, c.width, name="embed_positions")
        return LayerNorm(EPSILON, name="layernorm_embedding")(x + table(sequence.positions + OFFSET).astype(x.dtype))


class Encoder(Stack):
    @nn.compact
    def __call__(self, source: Sequence) -> Array:
        c = self.config
        return run_layers(EncoderLayer, (c, self.attend, 0), c, self.begin(source), source.prefix, source.visible)


class Decoder(Stack):
    @nn.compact
    def __call__(self, text: Sequence, sight: Sight) -> tuple[Array, Caches | None]:
        c = dataclasses.replace(self.config, layers=self.config.decoder_layers)
        own = (np.arange(c.layers, dtype=np.int32), text.prefix, sight.prefix)
        shared = (text.visible, sight.features, sight.visible)
        carry = (self.begin(text), *sight.held())
        x, *caches = run_layers(DecoderLayer, (c, self.attend, 1), c, carry, own, shared)
        return x, Caches.of(*caches)


STACKS = (Encoder, Decoder)
ROOT = "model"


def build(config: Any, *, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Forward:
    """The forward function of a transformers config.  Logits are fp32, whatever the compute dtype."""
    first, forced = (getattr(config, name, None) for name in ("decoder_start_token_id", "forced_bos_token_id"))
    start = (config.eos_token_id if first is None else first, *(() if forced is None else (forced,)))
    return encoder_decoder(read_config(config, scan, remat, compute_dtype), STACKS, ROOT, tensors(config), start)


def init(key: Array, config: Any, *, scan: bool = True, dtype: Any = jnp.float32) -> Params:
    """Random weights: normal with sd 0.02, norms at one, biases at zero."""
    return init_encoder_decoder(key, read_config(config, scan, "none"), STACKS, ROOT, dtype)


# -- tensors ----------------------------------------------------------------------------------------------------------


def tensors(config: Any) -> tuple[Tensor, ...]:
    """Where each tensor of a Hugging Face checkpoint goes."""
    c = read_config(config)
    return by_stack(c, _table(c.tied))


def _table(tied: bool) -> tuple[Tensor, ...]:
    found = [Tensor("model.shared.weight", ("model/shared/embedding",))]

    def both(source: str, path: str, weight: str) -> None:
        found.append(Tensor(f"{source}.weight", (f"{path}/{weight}",), transpose=weight == "kernel"))
        found.append(Tensor(f"{source}.bias", (f"{path}/bias",)))

    for stack, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        ours, theirs = f"model/{stack}/layers/", f"model.{stack}.layers.{{layer}}."
        found.append(Tensor(f"model.{stack}.embed_positions.weight", (f"model/{stack}/embed_positions/embedding",)))
        both(f"model.{stack}.layernorm_embedding", f"model/{stack}/layernorm_embedding", "scale")
        for name in attentions:
            for projection in PROJECTIONS:
                both(f"{theirs}{name}.{projection}", f"{ours}{name}/{projection}", "kernel")
            both(f"{theirs}{name}_layer_norm", f"{ours}{name}_layer_norm", "scale")
        both(f"{theirs}final_layer_norm", f"{ours}final_layer_norm", "scale")
        for name in ("fc1", "fc2"):
            both(f"{theirs}{name}", f"{ours}{name}", "kernel")
    if not tied:
        found.append(Tensor("lm_head.weight", ("lm_head/kernel",), transpose=True))
    return tuple(found)


EVERY = (("model.shared", _table(tied=False)),)  # what any member has, behind the name of its embedding
