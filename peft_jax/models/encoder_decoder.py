"""An encoder-decoder model made of two stacks: the two halves, attention, the caches, the spec, and random weights.

Families differ in their stacks; what surrounds them is written once.  A stack is a Flax module of a config and an
attention function.  ``encoder(laid out source) -> what the decoder sees of it``; ``decoder(laid out text, sight) ->
(text, caches)``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peft_jax.attention import Visible, dot_product_attention
from peft_jax.core import Forward, Inputs, Params, Path, Ports, Spec
from peft_jax.layers import Linear, checkpointed, normal, refuse_unknown_ports, variables
from peft_jax.models.tensors import Tensor, naming
from peft_jax.sequence import Cache, across, arrange, layer_attention
from peft_jax.weights import embed, linear, unembed

PORTS = frozenset({"attend", "prompt", "prefix"})
PARTS = ("encoder", "decoder", "cross")  # where attention is, and a prefix can stand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Caches:
    """The decoder's own cache and, once the source has been read, each layer's keys and values of it."""

    own: Cache
    source: Cache | None = None

    def take(self, rows: Int[Array, "rows"]) -> "Caches":
        return Caches(self.own.take(rows), None if self.source is None else self.source.take(rows))

    @classmethod
    def of(cls, own: Cache | None, source: Cache | None) -> "Caches | None":
        return None if own is None else cls(own, source)

    def reorder(self, rows: Int[Array, "rows"]) -> "Caches":
        """`take`, of rows that change places with others of the same source: that stays where it is."""
        return Caches(self.own.take(rows), self.source)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sight:
    """What a decoder's layers see of a source: the encoder's features ``[batch, source, width]``, or None where an
    earlier call has put them into the cache; of which rows; behind which prefix; and the caches."""

    features: Any
    visible: Visible
    prefix: Any
    caches: Caches | None

    def held(self) -> tuple[Cache | None, Cache | None]:
        """The decoder's own cache, and the source's."""
        return (None, None) if self.caches is None else (self.caches.own, self.caches.source)


class Attention(nn.Module):
    """Attention from `x` to `of`, which is `x` itself or a source; None where the cache holds the source."""

    heads: int
    head_dim: int
    scale: float
    use_bias: bool
    names: tuple[str, str, str, str]  # of the projections: query, key, value, output
    attend: Callable[..., Array]

    @nn.compact
    def __call__(
        self,
        x: Array,
        of: Array | None,
        visible: Visible,
        prefix: Any,
        cache: Cache | None = None,
        layer: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        def project(name: str, x: Array) -> Array:
            y = Linear(self.heads * self.head_dim, self.use_bias, name=name)(x)
            return y.reshape(*x.shape[:2], self.heads, self.head_dim)

        query = project(self.names[0], x)
        key, value = (None if of is None else project(name, of) for name in self.names[1:3])
        y, cache = layer_attention(self.attend, query, key, value, visible, self.scale, prefix, cache, layer)
        return Linear(x.shape[-1], self.use_bias, name=self.names[3])(y.reshape(*x.shape[:2], -1)), cache


def encoder_decoder(
    c: Any,
    stacks: tuple[type[nn.Module], type[nn.Module]],
    root: str,
    tensors: Sequence[Tensor],
    start: tuple[int, ...],
) -> Forward:
    """The forward function of a config `c`, whose weights lie in ``params[root]``, or at the top.

    `c` gives width, layers and decoder_layers, the sizes of each of `PARTS` in `attentions`, and what embeddings and
    features are multiplied by: embedding_scale, output_scale.  Features keep the compute dtype; logits are fp32.
    """
    checkpointed(stacks[1], c.remat)  # a misspelt mode is an error here, not at the first call
    attentions: dict[str, tuple[int, int, int]] = c.attentions

    def features(params: Params, inputs: Inputs, given: Ports) -> Any:
        refuse_unknown_ports(given, PORTS, c.kind)
        prefix = _parts(given.prefix, c.kind)
        if inputs.segments is not None:
            raise ValueError(f"{c.kind} reads a source a row, so rows cannot be packed: pad them instead")
        inputs = jax.tree.map(jnp.asarray, inputs)
        tree, caches = params[root] if root else params, inputs.cache
        attend = given.attend or dot_product_attention

        def words(tokens: Array) -> Array:
            x = embed(tokens, tree["shared"]["embedding"])
            x = x if c.compute_dtype is None else x.astype(c.compute_dtype)
            return x * jnp.asarray(c.embedding_scale, x.dtype)

        def run(stack: int, *arguments: Any) -> Any:
            return stacks[stack](c, attend).apply(variables(tree[PARTS[stack]]), *arguments)

        text = Inputs(inputs.decoder_tokens, mask=inputs.decoder_mask, cache=None if caches is None else caches.own)
        target = arrange(text, words(text.tokens), Ports(prefix=prefix.get("decoder"), alone=given.alone))
        time, cross = target.x.shape[1], prefix.get("cross")
        if caches is not None and caches.source is not None:
            held = caches.source
            visible = across(time, 0, held.segments, held.keys.shape[2])
            sight = Sight(None, visible, None, Caches.of(target.cache, held))
        else:
            source = dataclasses.replace(inputs, decoder_tokens=None, decoder_mask=None, cache=None)
            before = Ports(prompt=given.prompt, prefix=prefix.get("encoder"), alone=given.alone)
            laid = arrange(source, words(inputs.tokens), before, causal=False)
            seen, front = laid.visible.query_segments, 0 if cross is None else cross[0].shape[-3]
            if front and given.alone is not None and seen is None:
                seen = jnp.ones(laid.x.shape[:2], jnp.int32)
            visible = across(time, front, seen, laid.x.shape[1], given.alone)
            if caches is not None:
                held = _held(attentions["cross"], visible, len(laid.x), caches.own.keys.dtype)
                caches = Caches.of(target.cache, held)
            sight = Sight(run(0, laid), visible, cross, caches)
        x, caches = run(1, target, sight)
        if caches is None:
            return target.finish(x, None)
        x, own = target.finish(x, caches.own)
        return x, Caches(own, caches.source)

    def head(params: Params, x: Float[Array, "... width"], given: Ports) -> Float[Array, "... vocab"]:
        x = x * jnp.asarray(c.output_scale, x.dtype)
        table = (params[root] if root else params)["shared"]["embedding"]
        logits = unembed(x, table) if c.tied else linear(x, params["lm_head"]["kernel"])
        return logits.astype(jnp.float32)

    def cache(batch: int, length: int, dtype: Any = jnp.float32) -> Caches:
        return Caches(Cache.empty(*attentions["decoder"], batch, length, dtype))

    names, stacked = naming(tensors, c.layers, c.scan)
    shared: Path = (*((root,) if root else ()), "shared", "embedding")
    spec = Spec(
        width=c.width,
        layers=c.layers,
        heads=c.attentions["encoder"][1],
        kv_heads=c.attentions["encoder"][1],
        head_dim=c.attentions["encoder"][2],
        vocab=c.vocab,
        positions=c.positions,
        decoder_positions=c.positions,
        start=start,
        attentions=tuple(c.attentions.items()),
        ports=PORTS,
        names=names,
        stacked=stacked,
        tensors=tuple(tensors),
        tied=(("lm_head", ".".join(shared[:-1])),) if c.tied else (),
        embedding=shared,
        embedding_scale=c.embedding_scale,
        cache=cache,
    )
    return Forward(features, head, spec)


def _parts(prefix: Any, kind: str) -> dict[str, Any]:
    """A prefix by the name of the attention that it stands before."""
    if prefix is None:
        return {}
    if not isinstance(prefix, dict) or not prefix.keys() <= set(PARTS):
        given = ", ".join(map(str, prefix)) if isinstance(prefix, dict) else "one pair of keys and values"
        raise ValueError(f"{kind} takes a prefix as a dict of (keys, values) by {', '.join(PARTS)}, and got {given}")
    return prefix


def _held(sizes: tuple[int, int, int], visible: Visible, batch: int, dtype: Any) -> Cache:
    """An empty cache for what the decoder sees of a source."""
    slots = visible.key_order.shape[1]
    seen = jnp.ones((batch, slots), jnp.int32) if visible.key_segments is None else visible.key_segments
    return dataclasses.replace(Cache.empty(*sizes, batch, slots, dtype), segments=seen)


def init_encoder_decoder(
    key: Array, c: Any, stacks: tuple[type[nn.Module], type[nn.Module]], root: str, dtype: Any
) -> Params:
    """Random weights: normal with sd 0.02, norms at one, biases at zero."""
    keys = jax.random.split(key, 4)
    one, x = Inputs(jnp.zeros((1, 1), jnp.int32)), jnp.zeros((1, 1, c.width))
    source, text = arrange(one, x, Ports(), causal=False), arrange(one, x, Ports())
    encoder, decoder = (stack(c, dot_product_attention) for stack in stacks)
    tree: Params = {
        "shared": {"embedding": normal(keys[0], (c.vocab, c.width), jnp.float32)},
        "encoder": encoder.init(keys[1], source)["params"],
        "decoder": decoder.init(keys[2], text, Sight(x, across(1, 0, None, 1), None, None))["params"],
    }
    tree = {root: tree} if root else tree
    if not c.tied:
        tree["lm_head"] = {"kernel": normal(keys[3], (c.width, c.vocab), jnp.float32)}
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def by_stack(c: Any, table: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A family's table for one config, whose stacks each have their own number of layers."""
    counts = {"encoder": c.layers, "decoder": c.decoder_layers}
    stack = lambda tensor: next(part for part in counts if part in tensor.paths[0].split("/"))  # noqa: E731
    return tuple(t._replace(layers=counts[stack(t)]) if t.layered else t for t in table)
