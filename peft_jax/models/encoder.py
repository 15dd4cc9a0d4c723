"""An encoder and what it ends in: embeddings and layers as families share them, heads, the spec, and random weights.

    head              outputs
    None              the features themselves ``[batch, time, width]``
    "classification"  a score for each label ``[batch, labels]``, of which the features are the first real token's
    "tokens"          a score for each label of every token ``[batch, time, labels]``
    "answers"         scores of where an answer starts and ends ``[batch, time, 2]``

Families differ in their stacks; what surrounds them is written once.  A stack is a Flax module of a config; its module
names are those of `transformers`, which are the same in every family here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    variables,
)
from peft_jax.models.tensors import Tensor, naming
from peft_jax.sequence import Sequence, arrange

HEADS = ("classification", "tokens", "answers")
PORTS = frozenset({"attend", "prompt", "prefix"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What the modules need of a transformers config, and how they are to be run; families add to it.

    The weights lie in ``params[root]``; `pooled` names the linears that classify, with `pooler_activation` between.
    """

    kind: str
    root: str
    pooled: tuple[str, str]
    width: int
    embedding: int  # the width of the embeddings
    hidden: int
    layers: int
    heads: int
    vocab: int
    types: int  # rows of the table of types; 0 for none
    table: int  # rows of the table of positions; 0 for none
    first: int = 0  # the position of the first token
    epsilon: float
    activation: str
    pooler_activation: str = "tanh"
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
        """How many there are for tokens; 0 for as many as one likes."""
        return self.table - self.first

    @property
    def modules(self) -> tuple[str, ...]:
        return head_modules(self.head, self.pooled)


def read_common(
    config: Any,
    scan: bool = True,
    remat: str = "full",
    compute_dtype: Any = None,
    head: str | None = None,
    labels: int | None = None,
) -> dict[str, Any]:
    """The fields that all families read alike; a head's labels are as asked for, or as the config says."""
    if head not in (None, *HEADS):
        raise ValueError(f"{config.model_type} has no head {head!r}: choose one of {', '.join(HEADS)}, or None")
    activation(config.hidden_act)
    return {
        "kind": config.model_type,
        "width": config.hidden_size,
        "embedding": config.hidden_size,
        "hidden": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "vocab": config.vocab_size,
        "types": config.type_vocab_size,
        "table": config.max_position_embeddings,
        "epsilon": config.layer_norm_eps,
        "activation": config.hidden_act,
        "head": head,
        "labels": 0 if head is None else 2 if head == "answers" else labels or config.num_labels,
        "scan": scan,
        "remat": remat,
        "compute_dtype": None if compute_dtype is None else jnp.dtype(compute_dtype),
    }


def head_modules(head: str | None, pooled: tuple[str, str]) -> tuple[str, ...]:
    """The linears of a head, by the source's names; `pooled` are those that classify."""
    return {None: (), "classification": pooled, "tokens": ("classifier",), "answers": ("qa_outputs",)}[head]


class Embeddings(nn.Module):
    """Words, then what a prompt puts before them, then positions and types on all of it, where a model has them."""

    config: Config

    @nn.compact
    def __call__(self, inputs: Inputs, ports: Ports) -> tuple[Array, Sequence]:
        c = self.config
        x = Embed(c.vocab, c.embedding, name="word_embeddings")(inputs.tokens)
        x = x if c.compute_dtype is None else x.astype(c.compute_dtype)
        sequence = arrange(inputs, x, ports, causal=False)
        x, soft = sequence.x, sequence.rows[1]
        if c.table:
            positions = sequence.positions + c.first
            x = x + Embed(c.table, c.embedding, name="position_embeddings")(positions).astype(x.dtype)
        if c.types:
            types = jnp.zeros(inputs.tokens.shape, jnp.int32) if inputs.types is None else inputs.types
            types = jnp.pad(types, ((0, 0), (soft, 0)))
            x = x + Embed(c.types, c.embedding, name="token_type_embeddings")(types).astype(x.dtype)
        if c.embedding != c.width:
            x = Linear(c.width, name="embed_proj")(x)
        return LayerNorm(c.epsilon, name="LayerNorm")(x), sequence


class Output(nn.Module):
    """A linear, the residual, and the norm behind them."""

    config: Config

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        y = Linear(self.config.width, True, name="dense")(y)
        return LayerNorm(self.config.epsilon, name="LayerNorm")(y + x)


class Attention(nn.Module):
    """The family's own attention, and what is behind it."""

    config: Config
    kind: type[nn.Module]
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, prefix: Any, shared: Any) -> Array:
        y = self.kind(self.config, self.attend, name="self")(x, prefix, shared)
        return Output(self.config, name="output")(y, x)


class Intermediate(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return activation(self.config.activation)(Linear(self.config.hidden, True, name="dense")(x))


def layer(c: Config, kind: type[nn.Module], attend: Callable[..., Array], x: Array, prefix: Any, shared: Any) -> Array:
    """One layer, within a compact module: attention, then the feed-forward."""
    x = Attention(c, kind, attend, name="attention")(x, prefix, shared)
    return Output(c, name="output")(Intermediate(c, name="intermediate")(x), x)


def _first(x: Float[Array, "batch time width"], inputs: Inputs) -> Float[Array, "batch 1 width"]:
    """Each row's first real token: [CLS], wherever padding puts it."""
    if inputs.mask is None:
        return x[:, :1]
    return jnp.take_along_axis(x, jnp.argmax(inputs.mask, axis=1)[:, None, None], axis=1)


def build(c: Config, stack: type[nn.Module], table: tuple[Tensor, ...]) -> Forward:
    """The forward function of a config.  Scores are fp32, whatever the compute dtype."""
    module = stack(c)
    checkpointed(stack, c.remat)  # a misspelt mode is an error here, not at the first call

    def features(params: Params, inputs: Inputs, given: Ports) -> Any:
        refuse_unknown_ports(given, PORTS, c.kind)
        if inputs.cache is not None:
            raise ValueError(f"{c.kind} reads a whole text at once: it keeps no key-value cache")
        inputs = jax.tree.map(jnp.asarray, inputs)
        mine = {name: part for name, part in params[c.root].items() if name != "pooler"}
        x = module.apply(variables(mine), inputs, given)
        return _first(x, inputs) if c.head == "classification" else x

    def head(params: Params, x: Array, given: Ports) -> Array:
        if c.head is None:
            return x
        x = x[:, 0] if c.head == "classification" else x
        for i, name in enumerate(c.modules):
            weights = params
            for part in name.split("."):
                weights = weights[part]
            x = affine(activation(c.pooler_activation)(x) if i else x, weights)
        return x.astype(jnp.float32)

    names, stacked = naming(table, c.layers, c.scan)
    spec = Spec(
        width=c.embedding,
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
        embedding=(c.root, "embeddings", "word_embeddings", "embedding"),
    )
    return Forward(features, head, spec)


def init(key: Array, c: Config, stack: type[nn.Module], dtype: Any) -> Params:
    """Random weights: normal with sd 0.02, norms at one, biases at zero."""
    key, pooler, *keys = jax.random.split(key, 4)
    params: Params = {c.root: stack(c).init(key, Inputs(jnp.zeros((1, 1), jnp.int32)))["params"]}
    for i, name in enumerate(c.modules, 1):
        shape = (c.width, c.labels if i == len(c.modules) else c.width)
        drawn = normal(pooler if "pooler" in name else keys.pop(0), shape, jnp.float32)
        *above, last = name.split(".")
        tree = params
        for part in above:
            tree = tree.setdefault(part, {})
        tree[last] = {"kernel": drawn, "bias": jnp.zeros(shape[1:], jnp.float32)}
    return jax.tree.map(lambda x: x.astype(dtype), params)


# -- tensors ----------------------------------------------------------------------------------------------------------


def affine_tensors(source: str, path: str, weight: str = "kernel") -> tuple[Tensor, Tensor]:
    """The two tensors of a linear, or of a norm (whose weight is a "scale")."""
    transposed = weight == "kernel"
    return (
        Tensor(f"{source}.weight", (f"{path}/{weight}",), transpose=transposed),
        Tensor(f"{source}.bias", (f"{path}/bias",)),
    )


def tensors(
    root: str, prefix: str, embeddings: tuple[str, ...], projections: tuple[str, ...], modules: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """Where the tensors of a Hugging Face checkpoint go: the embeddings, each layer with its `projections` inside the
    attention, and the head's `modules`; the model's own names begin with `prefix`."""
    ours, theirs = f"{root}/layers/", f"{prefix}encoder.layer.{{layer}}."
    found = [Tensor(f"{prefix}embeddings.{n}.weight", (f"{root}/embeddings/{n}/embedding",)) for n in embeddings]
    found += affine_tensors(f"{prefix}embeddings.LayerNorm", f"{root}/embeddings/LayerNorm", "scale")
    inside = [f"attention.self.{n}" for n in projections]
    for name in (*inside, "attention.output.dense", "intermediate.dense", "output.dense"):
        found += affine_tensors(theirs + name, ours + name.replace(".", "/"))
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        found += affine_tensors(theirs + name, ours + name.replace(".", "/"), "scale")
    for name in modules:
        found += affine_tensors(name, name.replace(".", "/"))
    return tuple(found)
