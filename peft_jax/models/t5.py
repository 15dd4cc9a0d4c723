"""T5 (Raffel et al. 2020, arXiv 1910.10683): an encoder-decoder whose positions are biases of the attention scores.

Module names are those of `transformers` (models/t5/modeling_t5.py), ``layer.0`` written ``layer_0``, so that target
modules carry over.  Version 1.0 has a plain feed-forward of relu and ties its head to the embedding, which it then
scales; version 1.1 and the language-model-adapted ones have a gated one of gelu and a head of their own.

The bias of a query and a key depends on the distance of their positions, in buckets: each small distance has its own,
larger ones share them by their logarithm (section 2.1).  One table a stack serves all its layers; there is none between
decoder and source.  A prefix counts as the positions before the first token.

Departures: the model's own dropout is not applied, methods bring their own; values are not clamped in fp16.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core import Forward, Params
from peft_jax.layers import Embed, Linear, RMSNorm, activation, run_layers
from peft_jax.models.encoder_decoder import (
    Attention,
    Caches,
    Sight,
    by_stack,
    encoder_decoder,
    init_encoder_decoder,
)
from peft_jax.models.tensors import Tensor
from peft_jax.sequence import Sequence

MODEL_TYPES = ("t5",)
HEADS: tuple[str, ...] = ()
UNUSED = r"EncDecAttention\.relative_attention_bias"  # old checkpoints hold one that nothing reads


@dataclasses.dataclass(frozen=True)
class Config:
    """What the modules need of a transformers config, and how they are to be run."""

    width: int
    hidden: int
    layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    vocab: int
    epsilon: float
    activation: str
    gated: bool
    buckets: int
    distance: int  # from which on all share a bucket
    tied: bool
    scan: bool = True
    remat: str = "full"
    compute_dtype: Any = None
    kind: str = "t5"
    positions: int = 0  # as many as one likes
    embedding_scale: float = 1.0

    @property
    def output_scale(self) -> float:
        return self.width**-0.5 if self.tied else 1.0

    @property
    def attentions(self) -> dict[str, tuple[int, int, int]]:
        sizes = {"encoder": self.layers, "decoder": self.decoder_layers, "cross": self.decoder_layers}
        return {part: (layers, self.heads, self.head_dim) for part, layers in sizes.items()}


def read_config(config: Any, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Config:
    if not config.is_encoder_decoder:
        raise ValueError("a T5 encoder alone is not supported: give the whole model's config")
    activation(config.dense_act_fn)
    return Config(
        width=config.d_model,
        hidden=config.d_ff,
        layers=config.num_layers,
        decoder_layers=config.num_decoder_layers,
        heads=config.num_heads,
        head_dim=config.d_kv,
        vocab=config.vocab_size,
        epsilon=config.layer_norm_epsilon,
        activation=config.dense_act_fn,
        gated=config.is_gated_act,
        buckets=config.relative_attention_num_buckets,
        distance=config.relative_attention_max_distance,
        # transformers 5 says so by the scale, older ones by the tie; a checkpoint without the scale has the tie.
        tied=bool(getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)),
        scan=scan,
        remat=remat,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype),
    )


# -- positions --------------------------------------------------------------------------------------------------------


@functools.cache
def bucket_table(buckets: int, distance: int) -> np.ndarray:
    """The bucket of each distance from 0 to `distance`: half of them exact, the others logarithmic.

    >>> from peft_jax.models.t5 import bucket_table
    >>> bucket_table(8, 16).tolist()
    [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    """
    exact = buckets // 2
    far = np.arange(distance + 1)
    log = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(distance / exact))
    large = exact + (log * np.float32(buckets - exact)).astype(np.int32)
    return np.where(far < exact, far, np.minimum(large, buckets - 1)).astype(np.int32)


class Bias(nn.Module):
    """What is added to the scores of a sequence's queries and keys, fp32 ``[batch or 1, heads, queries, keys]``."""

    config: Config
    both_ways: bool  # an encoder's queries also see the keys behind them, which have buckets of their own

    @nn.compact
    def __call__(self, sequence: Sequence) -> Float[Array, "rows heads queries keys"]:
        c, keys = self.config, sequence.key_positions
        queries = sequence.positions[: len(keys)]
        ahead = keys[:, None, :] - queries[:, :, None]
        buckets = c.buckets // 2 if self.both_ways else c.buckets
        far = jnp.abs(ahead) if self.both_ways else jnp.maximum(-ahead, 0)
        chosen = jnp.asarray(bucket_table(buckets, c.distance))[jnp.minimum(far, c.distance)]
        chosen = chosen + jnp.where(ahead > 0, buckets, 0) if self.both_ways else chosen
        return Embed(c.buckets, c.heads, name="embed")(chosen).astype(jnp.float32).transpose(0, 3, 1, 2)


# -- stacks -----------------------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, act = self.config, activation(self.config.activation)
        if c.gated:
            y = act(Linear(c.hidden, name="wi_0")(x)) * Linear(c.hidden, name="wi_1")(x)
        else:
            y = act(Linear(c.hidden, name="wi")(x))
        return Linear(c.width, name="wo")(y)


class Block(nn.Module):
    """One sub-layer: a norm, then attention or the feed-forward; the caller adds the residual."""

    config: Config
    attend: Callable[..., Array]
    inner: str

    @nn.compact
    def __call__(self, x: Array, *given: Any) -> Any:
        c = self.config
        y = RMSNorm(c.epsilon, name="layer_norm")(x)
        if self.inner == "DenseReluDense":
            return FeedForward(c, name=self.inner)(y)
        attention = Attention(c.heads, c.head_dim, 1.0, False, ("q", "k", "v", "o"), self.attend, name=self.inner)
        of, *rest = given
        return attention(y, y if self.inner == "SelfAttention" else of, *rest)


class EncoderLayer(nn.Module):
    """One encoder layer, in the form that `run_layers` wants: (carry, this layer's inputs, what all layers share)."""

    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, prefix: Any, visible: Any) -> tuple[Array, None]:
        x = x + Block(self.config, self.attend, "SelfAttention", name="layer_0")(x, None, visible, prefix)[0]
        return x + Block(self.config, self.attend, "DenseReluDense", name="layer_1")(x), None


class DecoderLayer(nn.Module):
    """One decoder layer, in the form that `run_layers` wants."""

    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, carry: Any, own: Any, shared: Any) -> tuple[Any, None]:
        (x, mine, theirs), (layer, prefix, cross), (visible, source, sight) = carry, own, shared
        first, second, last = (
            Block(self.config, self.attend, inner, name=f"layer_{i}")
            for i, inner in enumerate(("SelfAttention", "EncDecAttention", "DenseReluDense"))
        )
        y, mine = first(x, None, visible, prefix, mine, layer)
        x = x + y
        y, theirs = second(x, source, sight, cross, theirs, layer)
        x = x + y
        return (x + last(x), mine, theirs), None


class Encoder(nn.Module):
    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, source: Sequence) -> Array:
        c = self.config
        bias = Bias(c, both_ways=True, name="relative_attention_bias")(source)
        visible = dataclasses.replace(source.visible, bias=bias)
        x = run_layers(EncoderLayer, (c, self.attend), c, source.x, source.prefix, visible)
        return RMSNorm(c.epsilon, name="final_layer_norm")(x)


class Decoder(nn.Module):
    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, text: Sequence, sight: Sight) -> tuple[Array, Caches | None]:
        c = dataclasses.replace(self.config, layers=self.config.decoder_layers)
        bias = Bias(c, both_ways=False, name="relative_attention_bias")(text)
        visible = dataclasses.replace(text.visible, bias=bias)
        own = (np.arange(c.layers, dtype=np.int32), text.prefix, sight.prefix)
        shared = (visible, sight.features, sight.visible)
        carry = (text.x, *sight.held())
        x, *caches = run_layers(DecoderLayer, (c, self.attend), c, carry, own, shared)
        return RMSNorm(c.epsilon, name="final_layer_norm")(x), Caches.of(*caches)


STACKS = (Encoder, Decoder)


def build(config: Any, *, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Forward:
    """The forward function of a transformers config.  Logits are fp32, whatever the compute dtype."""
    c = read_config(config, scan, remat, compute_dtype)
    start = getattr(config, "decoder_start_token_id", None)
    return encoder_decoder(c, STACKS, "", tensors(config), (config.pad_token_id if start is None else start,))


def init(key: Array, config: Any, *, scan: bool = True, dtype: Any = jnp.float32) -> Params:
    """Random weights: normal with sd 0.02, norms at one."""
    return init_encoder_decoder(key, read_config(config, scan, "none"), STACKS, "", dtype)


# -- tensors ----------------------------------------------------------------------------------------------------------


def tensors(config: Any) -> tuple[Tensor, ...]:
    """Where each tensor of a Hugging Face checkpoint goes."""
    c = read_config(config)
    return by_stack(c, _table(("wi_0", "wi_1") if c.gated else ("wi",), c.tied))


def _table(inner: tuple[str, ...], tied: bool) -> tuple[Tensor, ...]:
    found = [Tensor("shared.weight", ("shared/embedding",))]
    for stack, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        ours, theirs = f"{stack}/layers/layer_", f"{stack}.block.{{layer}}.layer."
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(Tensor(bias, (f"{stack}/relative_attention_bias/embed/embedding",)))
        found.append(Tensor(f"{stack}.final_layer_norm.weight", (f"{stack}/final_layer_norm/scale",)))
        for i, kind in enumerate((*attentions, "DenseReluDense")):
            found.append(Tensor(f"{theirs}{i}.layer_norm.weight", (f"{ours}{i}/layer_norm/scale",)))
            for name in (*inner, "wo") if kind == "DenseReluDense" else "qkvo":
                kernel = (f"{ours}{i}/{kind}/{name}/kernel",)
                found.append(Tensor(f"{theirs}{i}.{kind}.{name}.weight", kernel, transpose=True))
    if not tied:
        found.append(Tensor("lm_head.weight", ("lm_head/kernel",), transpose=True))
    return tuple(found)


EVERY = (("shared", _table(("wi", "wi_0", "wi_1"), tied=False)),)  # what any member has, behind its embedding's name
