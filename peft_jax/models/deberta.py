"""DeBERTa, versions 2 and 3 (He et al. 2020, arXiv 2006.03654; 2021, arXiv 2111.09543): disentangled attention.

    Ã_ij = q_i k_j + q_i r^K_δ(i,j) + k_j r^Q_δ(j,i)        scores are Ã / √(3d), fewer where a term is left out

A token has a content, and its distance δ to another a vector of its own, which one table P holds for all layers:
r^K = P W_K and r^Q = P W_Q, by the content's own projections or by others (section 3.1; here content to position is
"c2p", position to content "p2c").  Distances share rows of P in logarithmic buckets.  The largest models of version 2
add a convolution of the embeddings to what their first layer gives.  Heads are those of `peft_jax.models.encoder`.

Module names are those of `transformers` (models/deberta_v2/modeling_deberta_v2.py), so that target modules carry over.

A prompt's tokens are tokens, with distances as all others.  A prefix's keys have no place in the text, so the terms of
positions are 0 for them: the code of P-tuning v2 (THUDM/P-tuning-v2, model/debertaV2.py) has it so.

Departures: the model's own dropout is not applied, methods bring their own; the convolution sees the tokens at the
neighbouring positions of the same text, which padding and packing do not change.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peft_jax.attention import Visible, dot_product_attention
from peft_jax.core import Forward, Inputs, Params, Ports
from peft_jax.layers import (
    Embed,
    LayerNorm,
    Linear,
    activation,
    add_vector,
    layer_norm,
    leaf,
    norm_weights,
    normal,
    run_layers,
)
from peft_jax.models import encoder
from peft_jax.models.encoder import affine_tensors, head_modules
from peft_jax.models.tensors import Tensor
from peft_jax.sequence import layer_attention
from peft_jax.weights import linear

MODEL_TYPES, HEADS = ("deberta-v2",), encoder.HEADS
# What a checkpoint may hold that no head here needs: pretraining's own heads, absolute positions where the model reads
# none, and a pooler that nothing reads.
UNUSED = r"^(cls|lm_predictions|mask_predictions)\.|(^|\.)(position_embeddings|pooler)\."
ROOT, POOLED = "deberta", ("pooler.dense", "classifier")
PROJECTIONS = ("query_proj", "key_proj", "value_proj")
POSITION_PROJECTIONS = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}  # where the content's are not shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(encoder.Config):
    span: int  # rows of the table of distances, in either direction; 0 for none
    buckets: bool  # whether distances share rows
    longest: int  # the distance from which on all share one
    terms: tuple[str, ...]  # of "c2p" and "p2c"
    shared: bool  # whether positions are projected as contents are
    normed: bool  # whether a norm is over the table of distances
    kernel: int  # how many tokens the convolution sees; 0 for none
    kernel_activation: str

    @property
    def scale(self) -> float:
        return (self.head_dim * (1 + len(self.terms))) ** -0.5


def read_config(config: Any, **options: Any) -> Config:
    # transformers leaves many of these out of its class: they are there if the checkpoint's file has them.
    get = functools.partial(getattr, config)
    terms = tuple(config.pos_att_type or ())
    if unknown := [term for term in terms if term not in POSITION_PROJECTIONS]:
        raise ValueError(f"pos_att_type {unknown[0]!r} is not supported: c2p and p2c are")
    heads, width = config.num_attention_heads, config.hidden_size
    if width % heads or get("attention_head_size", width // heads) != width // heads:
        raise ValueError(f"{heads} heads of {get('attention_head_size', width / heads)} do not make a width of {width}")
    kernel, groups = max(get("conv_kernel_size", 0), 0), get("conv_groups", 1)
    if kernel and (kernel % 2 == 0 or groups != 1):
        raise ValueError(f"conv_kernel_size {kernel} with conv_groups {groups} is not supported: an odd one with 1 is")
    longest = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    buckets = max(get("position_buckets", -1), 0)
    if buckets and (buckets % 2 or longest - 1 <= buckets // 2):
        raise ValueError(
            f"{buckets} position_buckets for distances up to {longest} are not supported: give an even number, with "
            "half of them less than the longest distance"
        )
    for name in (config.pooler_hidden_act, get("conv_act", "tanh")):
        activation(name)
    common = encoder.read_common(config, **options) | {
        "embedding": get("embedding_size", width),
        "table": config.max_position_embeddings if config.position_biased_input else 0,
    }
    return Config(
        root=ROOT,
        pooled=POOLED,
        pooler_activation=config.pooler_hidden_act,
        span=(buckets or longest) if config.relative_attention else 0,
        buckets=bool(buckets),
        longest=longest,
        terms=terms,
        shared=get("share_att_key", False),
        normed="layer_norm" in (get("norm_rel_ebd", "none") or "none").lower() and config.relative_attention,
        kernel=kernel,
        kernel_activation=get("conv_act", "tanh"),
        **common,
    )


# -- distances --------------------------------------------------------------------------------------------------------


@functools.cache
def bucket_table(buckets: int, longest: int) -> np.ndarray:
    """The bucket of each distance from 0 to `longest`: the first half of them exact, the others logarithmic.

    >>> from peft_jax.models.deberta import bucket_table
    >>> bucket_table(8, 16).tolist()
    [0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 7, 7, 7, 7, 7, 7, 8]
    """
    exact, far = buckets // 2, np.arange(longest + 1)
    steps = np.log(np.maximum(far, exact).astype(np.float32) / np.float32(exact))
    steps = steps / np.log(np.float32((longest - 1) / exact)) * np.float32(exact - 1)
    return np.where(far <= exact, far, np.ceil(steps).astype(np.int32) + exact).astype(np.int32)


def rows_of(ahead: Int[Array, "rows queries keys"], c: Config) -> Int[Array, "rows queries keys"]:
    """The row of the table of distances for keys that lie so far ahead: the middle one for the query itself."""
    if c.buckets:
        far = jnp.asarray(bucket_table(c.span, c.longest))[jnp.minimum(jnp.abs(ahead), c.longest)]
        ahead = jnp.sign(ahead) * far
    return jnp.clip(c.span - ahead, 0, 2 * c.span - 1)


def used_rows(longest: int, c: Config) -> tuple[int, int]:
    """Where the rows begin and end that distances up to `longest` have: of a short text, some in the middle."""
    far = int(bucket_table(c.span, c.longest)[min(longest, c.longest)]) if c.buckets else longest
    return max(c.span - far, 0), min(c.span + far + 1, 2 * c.span)


class Shared(NamedTuple):
    """What all layers see.

    visible     who sees whom
    table       P, or the rows of it that are used ``[1 or batch, rows, width]``, or None
    rows        int32 ``[1 or batch, time, time]``: which row of it is between a query and a key, or None
    nearby      the convolution of the embeddings ``[batch, time, width]``, and the norm behind it, or None
    """

    visible: Visible
    table: Any = None
    rows: Any = None
    nearby: Any = None


def distances(
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch time heads dim"],
    keys: Float[Array, "rows table heads dim"] | None,
    queries: Float[Array, "rows table heads dim"] | None,
    rows: Int[Array, "some time time"],
) -> Float[Array, "batch heads time time"]:
    """``q_i r^K_δ(i,j) + k_j r^Q_δ(j,i)`` in fp32, of those of r^K and r^Q that there are."""
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    chosen = functools.partial(jnp.take_along_axis, indices=rows[:, None], mode="clip")
    score: Any = 0.0
    if keys is not None:
        score += chosen(product(query.transpose(0, 2, 1, 3), keys.transpose(0, 2, 3, 1)), axis=3)
    if queries is not None:
        score += chosen(product(queries.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1)), axis=2)
    return score


# -- the stack --------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, prefix: Any, shared: Shared) -> Array:
        c, visible = self.config, shared.visible
        split = lambda y: y.reshape(*y.shape[:2], c.heads, c.head_dim)  # noqa: E731
        projections = [Linear(c.width, True, name=name) for name in PROJECTIONS]
        query, key, value = (split(project(x)) for project in projections)
        if c.span and c.terms:
            own = dict(zip(("p2c", "c2p"), projections[:2], strict=True))
            if not c.shared:
                own = {term: Linear(c.width, True, name=POSITION_PROJECTIONS[term]) for term in c.terms}
            of = {term: split(own[term](shared.table)) for term in c.terms}
            bias = distances(query, key, of.get("c2p"), of.get("p2c"), shared.rows) * c.scale
            before = 0 if prefix is None else prefix[0].shape[-3]
            visible = dataclasses.replace(visible, bias=jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (before, 0))))
        y, _ = layer_attention(self.attend, query, key, value, visible, c.scale, prefix, None, None)
        return y.reshape(x.shape)


class Layer(nn.Module):
    """One encoder layer, in the form that `run_layers` wants: (carry, this layer's inputs, what all layers share)."""

    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, own: Any, shared: Shared) -> tuple[Array, None]:
        layer, prefix = own
        x = encoder.layer(self.config, SelfAttention, self.attend, x, prefix, shared)
        if shared.nearby is not None:  # the first layer's alone
            y, weights = shared.nearby
            x = jnp.where(layer == 0, layer_norm(x + y, weights, self.config.epsilon), x)
        return x, None


class NormWeights(nn.Module):
    """The weights of a norm that is applied elsewhere."""

    width: int

    @nn.compact
    def __call__(self) -> Any:
        return norm_weights(self, self.width)


class Convolution(nn.Module):
    """``activation(Σ_k x_{i+k} W_k + b)`` over the tokens at neighbouring positions, and the norm behind it."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, ahead: Array, seen: Array) -> Any:
        c = self.config
        kernel = leaf(self, "kernel", normal, (c.kernel, c.width, c.width))
        y = jnp.zeros_like(x)
        for k in range(c.kernel):
            there = (ahead == k - c.kernel // 2) & seen  # [1 or batch, time, time]: at most one a row
            y += linear(jnp.matmul(there.astype(x.dtype), x), kernel[k])
        y = add_vector(y, leaf(self, "bias", nn.initializers.zeros, (c.width,)))
        return activation(c.kernel_activation)(y), NormWeights(c.width, name="LayerNorm")()


class Encoder(nn.Module):
    """Tokens to features."""

    config: Config

    @nn.compact
    def __call__(self, inputs: Inputs, ports: Ports = Ports()) -> Any:  # noqa: B008 (frozen)
        c = self.config
        x, sequence = encoder.Embeddings(c, name="embeddings")(inputs, ports)
        before = sequence.rows[0]
        keys = sequence.key_positions[:, before:]
        ahead = keys[:, None, :] - sequence.positions[: len(keys), :, None]
        shared = Shared(sequence.visible)
        if c.span:
            # Given positions may lie as far apart as they like, others no farther than there are keys.
            longest = sequence.key_positions.shape[1] if inputs.positions is None else 2 * c.longest
            start, stop = used_rows(longest, c)
            table = Embed(2 * c.span, c.width, name="rel_embeddings")(jnp.arange(start, stop)[None]).astype(x.dtype)
            table = LayerNorm(c.epsilon, name="LayerNorm")(table) if c.normed else table
            if ports.adapter is not None:  # each row of the batch projects it by an adapter of its own
                table = jnp.broadcast_to(table, (len(x), *table.shape[1:]))
            shared = shared._replace(table=table, rows=rows_of(ahead, c) - start)
        if c.kernel:
            seen = sequence.visible.mask()[:, 0, :, before:]
            shared = shared._replace(nearby=Convolution(c, name="conv")(x, ahead, seen))
        attend, own = ports.attend or dot_product_attention, (np.arange(c.layers, dtype=np.int32), sequence.prefix)
        return sequence.finish(run_layers(Layer, (c, attend), c, x, own, shared), None)


def build(config: Any, **options: Any) -> Forward:
    """The forward function of a transformers config.  Scores are fp32, whatever the compute dtype."""
    c = read_config(config, **options)
    return encoder.build(c, Encoder, tensors(config, c.head))


def init(key: Array, config: Any, *, scan: bool = True, dtype: Any = jnp.float32, **options: Any) -> Params:
    """Random weights: normal with sd 0.02, norms at one, biases at zero."""
    return encoder.init(key, read_config(config, scan=scan, remat="none", **options), Encoder, dtype)


# -- tensors ----------------------------------------------------------------------------------------------------------

EXTRAS = ("position_embeddings", "token_type_embeddings", "embed_proj", "rel_embeddings", "norm", "conv")


def tensors(config: Any, head: str | None = None) -> tuple[Tensor, ...]:
    """Where each tensor of a Hugging Face checkpoint goes; without a head, names do not begin with the model's own."""
    c = read_config(config)
    there = (c.table, c.types, c.embedding != c.width, c.span, c.normed, c.kernel)
    extras = tuple(name for name, has in zip(EXTRAS, there, strict=True) if has)
    separate = () if c.shared or not c.span else tuple(POSITION_PROJECTIONS[term] for term in c.terms)
    return _table("" if head is None else f"{ROOT}.", extras, separate, head_modules(head, POOLED))


def _table(
    prefix: str, extras: tuple[str, ...], separate: tuple[str, ...], modules: tuple[str, ...]
) -> tuple[Tensor, ...]:
    embeddings = ("word_embeddings", *(name for name in EXTRAS[:2] if name in extras))
    found = list(encoder.tensors(ROOT, prefix, embeddings, (*PROJECTIONS, *separate), modules))
    inside = f"{prefix}encoder."
    if "embed_proj" in extras:
        kernel = f"{ROOT}/embeddings/embed_proj/kernel"
        found.append(Tensor(f"{prefix}embeddings.embed_proj.weight", (kernel,), transpose=True))
    if "rel_embeddings" in extras:
        found.append(Tensor(f"{inside}rel_embeddings.weight", (f"{ROOT}/rel_embeddings/embedding",)))
    if "norm" in extras:
        found += affine_tensors(f"{inside}LayerNorm", f"{ROOT}/LayerNorm", "scale")
    if "conv" in extras:
        found += affine_tensors(f"{inside}conv.conv", f"{ROOT}/conv")
        found += affine_tensors(f"{inside}conv.LayerNorm", f"{ROOT}/conv/LayerNorm", "scale")
    return tuple(found)


EVERY = (  # what any member has, behind the name of its embedding: without a head, and with one
    ("embeddings.word_embeddings", _table("", EXTRAS, tuple(POSITION_PROJECTIONS.values()), ())),
    (
        f"{ROOT}.embeddings.word_embeddings",
        _table(f"{ROOT}.", EXTRAS, tuple(POSITION_PROJECTIONS.values()), (*POOLED, "qa_outputs")),
    ),
)
