"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019): encoders, with the heads of `peft_jax.models.encoder`.

Module names are those of `transformers` (models/bert/modeling_bert.py, models/roberta/modeling_roberta.py), so that
target modules carry over.  The two differ in where positions start (RoBERTa's behind its padding token) and in how they
classify: BERT by its pooler and a linear, RoBERTa by two linears of its own.

Departures: the model's own dropout is not applied, methods bring their own; a decoder made of BERT (``is_decoder``,
cross-attention) and relative positions are not supported.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.attention import Visible, dot_product_attention
from peft_jax.core import Forward, Inputs, Params, Ports
from peft_jax.layers import Linear, run_layers
from peft_jax.models import encoder
from peft_jax.models.encoder import Config, head_modules
from peft_jax.models.tensors import Tensor
from peft_jax.sequence import layer_attention

MODEL_TYPES, HEADS = ("bert", "roberta"), encoder.HEADS
# What a checkpoint may hold that no head here needs: pretraining's own heads, and a pooler that nothing reads.
UNUSED = r"^cls\.|^lm_head\.|(^|\.)pooler\."
POOLED = {"bert": ("bert.pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}


def read_config(config: Any, **options: Any) -> Config:
    kind = config.model_type
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"is_decoder and add_cross_attention are not supported: this {kind} is an encoder")
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"positions of the kind {config.position_embedding_type!r} are not supported: absolute are")
    first = config.pad_token_id + 1 if kind == "roberta" else 0
    return Config(root=kind, pooled=POOLED[kind], first=first, **encoder.read_common(config, **options))


class SelfAttention(nn.Module):
    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, prefix: Any, visible: Visible) -> Array:
        c = self.config
        shape = (*x.shape[:2], c.heads, c.head_dim)
        query, key, value = (Linear(c.width, True, name=n)(x).reshape(shape) for n in ("query", "key", "value"))
        y, _ = layer_attention(self.attend, query, key, value, visible, c.head_dim**-0.5, prefix, None, None)
        return y.reshape(x.shape)


class Layer(nn.Module):
    """One encoder layer, in the form that `run_layers` wants: (carry, this layer's inputs, what all layers share)."""

    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, prefix: Any, visible: Visible) -> tuple[Array, None]:
        return encoder.layer(self.config, SelfAttention, self.attend, x, prefix, visible), None


class Encoder(nn.Module):
    """Tokens to features."""

    config: Config

    @nn.compact
    def __call__(self, inputs: Inputs, ports: Ports = Ports()) -> Any:  # noqa: B008 (frozen)
        c = self.config
        x, sequence = encoder.Embeddings(c, name="embeddings")(inputs, ports)
        attend = ports.attend or dot_product_attention
        x = run_layers(Layer, (c, attend), c, x, sequence.prefix, sequence.visible)
        return sequence.finish(x, None)


def build(config: Any, **options: Any) -> Forward:
    """The forward function of a transformers config.  Scores are fp32, whatever the compute dtype."""
    c = read_config(config, **options)
    return encoder.build(c, Encoder, tensors(config, c.head))


def init(key: Array, config: Any, *, scan: bool = True, dtype: Any = jnp.float32, **options: Any) -> Params:
    """Random weights: normal with sd 0.02, norms at one, biases at zero."""
    return encoder.init(key, read_config(config, scan=scan, remat="none", **options), Encoder, dtype)


# -- tensors ----------------------------------------------------------------------------------------------------------


def tensors(config: Any, head: str | None = None) -> tuple[Tensor, ...]:
    """Where each tensor of a Hugging Face checkpoint goes; without a head, names do not begin with the model's own."""
    kind = config.model_type
    return _table(kind, head_modules(head, POOLED[kind]), "" if head is None else f"{kind}.")


def _table(kind: str, modules: tuple[str, ...], prefix: str) -> tuple[Tensor, ...]:
    embeddings = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return encoder.tensors(kind, prefix, embeddings, ("query", "key", "value"), modules)


def _every(kind: str) -> tuple[Tensor, ...]:
    return _table(kind, tuple(dict.fromkeys((*POOLED[kind], "classifier", "qa_outputs"))), f"{kind}.")


EVERY = (  # what any member has, behind the name of its embedding: without a head, and with one
    *(("embeddings.word_embeddings", _table(kind, (), "")) for kind in MODEL_TYPES),
    *((f"{kind}.embeddings.word_embeddings", _every(kind)) for kind in MODEL_TYPES),
)
