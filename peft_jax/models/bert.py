"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019): encoders, with heads for classes, tags and answers.

Module names are those of `transformers` (models/bert/modeling_bert.py, models/roberta/modeling_roberta.py), so that
target modules carry over.  The two differ in where positions start (RoBERTa's behind its padding token) and in how they
classify: BERT by its pooler and a linear, RoBERTa by two linears of its own.

    head              outputs
    None              the features themselves ``[batch, time, width]``
    "classification"  a score for each label ``[batch, labels]``, of which the features are the first real token's
    "tokens"          a score for each label of every token ``[batch, time, labels]``
    "answers"         scores of where an answer starts and ends ``[batch, time, 2]``

Departures: the model's own dropout is not applied, methods bring their own; a decoder made of BERT (``is_decoder``,
cross-attention) and relative positions are not supported.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.attention import Visible, dot_product_attention
from peft_jax.core import Forward, Inputs, Params, Ports, Spec
from peft_jax.layers import (
    Embed,
    LayerNorm,
    Linear,
    activation,
    affine,
    checkpointed,
    normal,
    refuse_unknown_ports,
    run_layers,
    variables,
)
from peft_jax.models.tensors import Tensor, naming
from peft_jax.sequence import arrange, layer_attention

MODEL_TYPES = ("bert", "roberta")
HEADS = ("classification", "tokens", "answers")
PORTS = frozenset({"attend", "prompt", "prefix"})
# What a checkpoint may hold that no head here needs: pretraining's own heads, and a pooler that nothing reads.
UNUSED = r"^cls\.|^lm_head\.|(^|\.)pooler\."


@dataclasses.dataclass(frozen=True)
class Config:
    """What the modules need of a transformers config, and how they are to be run."""

    kind: str
    width: int
    hidden: int
    layers: int
    heads: int
    vocab: int
    types: int
    table: int  # rows of the table of positions
    first: int  # the position of the first token
    epsilon: float
    activation: str
    head: str | None = None
    labels: int = 0
    scan: bool = True
    remat: str = "full"
    compute_dtype: Any = None

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def positions(self) -> int:
        return self.table - self.first


def read_config(
    config: Any,
    scan: bool = True,
    remat: str = "full",
    compute_dtype: Any = None,
    head: str | None = None,
    labels: int | None = None,
) -> Config:
    kind = config.model_type
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"is_decoder and add_cross_attention are not supported: this {kind} is an encoder")
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"positions of the kind {config.position_embedding_type!r} are not supported: absolute are")
    if head not in (None, *HEADS):
        raise ValueError(f"{kind} has no head {head!r}: choose one of {', '.join(HEADS)}, or None")
    activation(config.hidden_act)
    return Config(
        kind=kind,
        width=config.hidden_size,
        hidden=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        types=config.type_vocab_size,
        table=config.max_position_embeddings,
        first=config.pad_token_id + 1 if kind == "roberta" else 0,
        epsilon=config.layer_norm_eps,
        activation=config.hidden_act,
        head=head,
        labels=0 if head is None else 2 if head == "answers" else labels or config.num_labels,
        scan=scan,
        remat=remat,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype),
    )


class SelfAttention(nn.Module):
    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, visible: Visible, prefix: Any) -> Array:
        c = self.config
        shape = (*x.shape[:2], c.heads, c.head_dim)
        query, key, value = (Linear(c.width, True, name=n)(x).reshape(shape) for n in ("query", "key", "value"))
        y, _ = layer_attention(self.attend, query, key, value, visible, c.head_dim**-0.5, prefix, None, None)
        return y.reshape(x.shape)


class Output(nn.Module):
    """A linear, the residual, and the norm behind them."""

    config: Config

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        y = Linear(self.config.width, True, name="dense")(y)
        return LayerNorm(self.config.epsilon, name="LayerNorm")(y + x)


class Attention(nn.Module):
    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, visible: Visible, prefix: Any) -> Array:
        y = SelfAttention(self.config, self.attend, name="self")(x, visible, prefix)
        return Output(self.config, name="output")(y, x)


class Intermediate(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return activation(self.config.activation)(Linear(self.config.hidden, True, name="dense")(x))


class Layer(nn.Module):
    """One encoder layer, in the form that `run_layers` wants: (carry, this layer's inputs, what all layers share)."""

    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, prefix: Any, visible: Visible) -> tuple[Array, None]:
        x = Attention(self.config, self.attend, name="attention")(x, visible, prefix)
        y = Intermediate(self.config, name="intermediate")(x)
        return Output(self.config, name="output")(y, x), None


class Embeddings(nn.Module):
    """Words, then what a prompt puts before them, then positions and token types on all of it."""

    config: Config

    @nn.compact
    def __call__(self, inputs: Inputs, ports: Ports) -> Any:
        c = self.config
        x = Embed(c.vocab, c.width, name="word_embeddings")(inputs.tokens)
        x = x if c.compute_dtype is None else x.astype(c.compute_dtype)
        sequence = arrange(inputs, x, ports, causal=False)
        x, soft = sequence.x, sequence.rows[1]
        types = jnp.zeros(inputs.tokens.shape, jnp.int32) if inputs.types is None else inputs.types
        types = jnp.pad(types, ((0, 0), (soft, 0)))
        x = x + Embed(c.table, c.width, name="position_embeddings")(sequence.positions + c.first).astype(x.dtype)
        x = x + Embed(c.types, c.width, name="token_type_embeddings")(types).astype(x.dtype)
        return LayerNorm(c.epsilon, name="LayerNorm")(x), sequence


class Encoder(nn.Module):
    """Tokens to features."""

    config: Config

    @nn.compact
    def __call__(self, inputs: Inputs, ports: Ports = Ports()) -> Any:  # noqa: B008 (frozen)
        c = self.config
        x, sequence = Embeddings(c, name="embeddings")(inputs, ports)
        attend = ports.attend or dot_product_attention
        x = run_layers(Layer, (c, attend), c, x, sequence.prefix, sequence.visible)
        return sequence.finish(x, None)


# -- heads ------------------------------------------------------------------------------------------------------------


def _first(x: Float[Array, "batch time width"], inputs: Inputs) -> Float[Array, "batch 1 width"]:
    """Each row's first real token: [CLS], wherever padding puts it."""
    if inputs.mask is None:
        return x[:, :1]
    return jnp.take_along_axis(x, jnp.argmax(inputs.mask, axis=1)[:, None, None], axis=1)


def _scores(c: Config, params: Params, x: Array) -> Array:
    if c.head != "classification":
        return affine(x, params["classifier" if c.head == "tokens" else "qa_outputs"])
    if c.kind == "bert":
        return affine(jnp.tanh(affine(x[:, 0], params[c.kind]["pooler"]["dense"])), params["classifier"])
    inner = jnp.tanh(affine(x[:, 0], params["classifier"]["dense"]))
    return affine(inner, params["classifier"]["out_proj"])


def build(config: Any, **options: Any) -> Forward:
    """The forward function of a transformers config.  Scores are fp32, whatever the compute dtype."""
    c = read_config(config, **options)
    encoder = Encoder(c)
    checkpointed(Encoder, c.remat)  # a misspelt mode is an error here, not at the first call

    def features(params: Params, inputs: Inputs, given: Ports) -> Any:
        refuse_unknown_ports(given, PORTS, c.kind)
        if inputs.cache is not None:
            raise ValueError(f"{c.kind} reads a whole text at once: it keeps no key-value cache")
        inputs = jax.tree.map(jnp.asarray, inputs)
        names = ("embeddings", "layers", *(f"layers_{i}" for i in range(c.layers)))
        mine = {name: params[c.kind][name] for name in names if name in params[c.kind]}
        x = encoder.apply(variables(mine), inputs, given)
        return _first(x, inputs) if c.head == "classification" else x

    def head(params: Params, x: Array, given: Ports) -> Array:
        return x if c.head is None else _scores(c, params, x).astype(jnp.float32)

    table = tensors(config, c.head)
    names, stacked = naming(table, c.layers, c.scan)
    spec = Spec(
        width=c.width,
        layers=c.layers,
        heads=c.heads,
        kv_heads=c.heads,
        head_dim=c.head_dim,
        vocab=c.vocab,
        positions=c.positions,
        labels=c.labels,
        ports=PORTS,
        names=names,
        stacked=stacked,
        tensors=table,
        embedding=(c.kind, "embeddings", "word_embeddings", "embedding"),
    )
    return Forward(features, head, spec)


def init(key: Array, config: Any, *, scan: bool = True, dtype: Any = jnp.float32, **options: Any) -> Params:
    """Random weights: normal with sd 0.02, norms at one, biases at zero."""
    c = read_config(config, scan, "none", **options)
    key, pooler, *keys = jax.random.split(key, 4)

    def linear(key: Array, outputs: int) -> Params:
        return {"kernel": normal(key, (c.width, outputs), jnp.float32), "bias": jnp.zeros((outputs,), jnp.float32)}

    params: Params = {c.kind: Encoder(c).init(key, Inputs(jnp.zeros((1, 1), jnp.int32)))["params"]}
    if _pools(c.kind, c.head):
        params[c.kind]["pooler"] = {"dense": linear(pooler, c.width)}
    if c.head == "classification" and c.kind == "roberta":
        params["classifier"] = {"dense": linear(keys[0], c.width), "out_proj": linear(keys[1], c.labels)}
    elif c.head is not None:
        params["qa_outputs" if c.head == "answers" else "classifier"] = linear(keys[0], c.labels)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _pools(kind: str, head: str | None) -> bool:
    return kind == "bert" and head == "classification"


# -- tensors ----------------------------------------------------------------------------------------------------------


def tensors(config: Any, head: str | None = None) -> tuple[Tensor, ...]:
    """Where each tensor of a Hugging Face checkpoint goes; without a head, names do not begin with the model's own."""
    kind = config.model_type
    parts = [f"{kind}.pooler.dense"] if _pools(kind, head) else []
    return _table(kind, (*parts, *_head_modules(kind, head)), "" if head is None else f"{kind}.")


def _head_modules(kind: str, head: str | None) -> tuple[str, ...]:
    if head == "classification" and kind == "roberta":
        return ("classifier.dense", "classifier.out_proj")
    return () if head is None else ("qa_outputs",) if head == "answers" else ("classifier",)


def _table(kind: str, more: tuple[str, ...], root: str) -> tuple[Tensor, ...]:
    ours, theirs = f"{kind}/layers/", f"{root}encoder.layer.{{layer}}."
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    found = [Tensor(f"{root}embeddings.{n}.weight", (f"{kind}/embeddings/{n}/embedding",)) for n in names]

    def both(source: str, path: str, weight: str) -> list[Tensor]:
        transposed = weight == "kernel"
        return [
            Tensor(f"{source}.weight", (f"{path}/{weight}",), transpose=transposed),
            Tensor(f"{source}.bias", (f"{path}/bias",)),
        ]

    found += both(f"{root}embeddings.LayerNorm", f"{kind}/embeddings/LayerNorm", "scale")
    inside = [f"attention.self.{n}" for n in ("query", "key", "value")]
    for name in (*inside, "attention.output.dense", "intermediate.dense", "output.dense"):
        found += both(theirs + name, ours + name.replace(".", "/"), "kernel")
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        found += both(theirs + name, ours + name.replace(".", "/"), "scale")
    for name in more:
        found += both(name, name.replace(".", "/"), "kernel")
    return tuple(found)


_PARTS = ("pooler.dense", "classifier", "classifier.dense", "classifier.out_proj", "qa_outputs")
EVERY = (  # what any member has, behind the name of its embedding: without a head, and with one
    *((("embeddings.word_embeddings"), _table(kind, (), "")) for kind in MODEL_TYPES),
    *(
        (f"{kind}.embeddings.word_embeddings", _table(kind, (f"{kind}.{_PARTS[0]}", *_PARTS[1:]), f"{kind}."))
        for kind in MODEL_TYPES
    ),
)
