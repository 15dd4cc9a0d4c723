"""A model's sequence: positions, who sees whom, the key-value cache, and what ports put before the tokens.

Two ports put rows there.  A `prompt` is soft tokens, which run through the layers as the others do; a `prefix` is keys
and values alone, of which no query is computed.  Keys lie in the order prefix, prompt, tokens; positions count through
all three, so that real tokens start behind what was put there.  With a cache both are written by the call that starts
it, in rows that the cache gains for them, and later calls find them there.  `Inputs.infix` has a prefix stand between
two tokens: its keys lie where they did, and positions and sight are those of the place between.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peft_jax.attention import EVERYWHERE, Visible
from peft_jax.core import Inputs, Ports


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """A key-value cache: keys and values ``[layers, batch, slots, kv_heads, dim]``, the segment of each filled slot
    (0 where a slot is padding or empty) ``[batch, slots]``, and how many slots are filled; once it is started, also how
    many rows the first call's ports put before the tokens.

    A layer calls `attend`, a model `advance` behind its layers: a cache of another kind has both, and `arrange`, by
    which it lays out the sequence itself (`peft_jax.serving.pool`)."""

    keys: Array
    values: Array
    segments: Array
    filled: Array
    before: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def empty(cls, layers: int, kv_heads: int, dim: int, batch: int, length: int, dtype: Any = jnp.float32) -> "Cache":
        rows = jnp.zeros((layers, batch, length, kv_heads, dim), dtype)
        return cls(rows, jnp.zeros_like(rows), jnp.zeros((batch, length), jnp.int32), jnp.int32(0))

    def write(self, layer: Array, keys: Array, values: Array) -> "Cache":
        """The new tokens' rows of one layer, written in place when the caller donates the cache."""
        start = (layer, 0, self.filled, 0, 0)
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)  # noqa: E731
        return dataclasses.replace(self, keys=put(self.keys, keys), values=put(self.values, values))

    def start(self, rows: int) -> "Cache":
        """An empty cache with so many slots more, for what is put before the tokens."""
        more = lambda x, axis: jnp.pad(x, [(0, rows * (i == axis)) for i in range(x.ndim)])  # noqa: E731
        return Cache(more(self.keys, 2), more(self.values, 2), more(self.segments, 1), self.filled, before=rows)

    def attend(
        self,
        attend: Callable[..., Array],
        layer: Array,
        query: Array,
        key: Array | None,
        value: Array | None,
        visible: Visible,
        scale: float,
    ) -> tuple[Array, "Cache"]:
        """Attention over all that the cache holds once this layer's rows are written.  Without new keys, over what it
        holds already: a source, read by an earlier call."""
        cache = self if key is None or value is None else self.write(layer, key, value)
        keys, values = cache.keys[layer].astype(query.dtype), cache.values[layer].astype(query.dtype)
        return attend(query, keys, values, visible, scale), cache

    def advance(self, rows: int) -> "Cache":
        """After all layers have written: the next call's tokens go behind these."""
        return dataclasses.replace(self, filled=self.filled + rows)

    def take(self, rows: Int[Array, "rows"]) -> "Cache":
        """These rows of the batch, in this order, repeated where named twice (beam search)."""
        keys, values = jnp.take(self.keys, rows, axis=1), jnp.take(self.values, rows, axis=1)
        return dataclasses.replace(self, keys=keys, values=values, segments=jnp.take(self.segments, rows, axis=0))

    reorder = take  # within the beams of a row


class Sequence(NamedTuple):
    """What a model's layers run over.

    x           the embedded tokens behind the prompt, if there is one ``[batch, prompt + time, width]``
    positions   int32 ``[batch, prompt + time]``
    key_positions   int32 ``[batch or 1, keys]``: those of everything that is seen
    visible     who sees whom
    prefix      (keys, values) of every layer, ``[layers, (batch,) l, kv_heads, dim]``, or None
    cache       with the new rows' segments written (the layers write their keys), or None
    """

    x: Array
    positions: Array
    key_positions: Array
    visible: Visible
    prefix: Any
    cache: Any
    rows: tuple[int, int]  # put before the tokens: by the prefix, by the prompt

    def finish(self, x: Array, cache: Any) -> Any:
        """The real tokens' features, with the cache, if there is one, ready for the next call."""
        prefix, prompt = self.rows
        rows = prefix + x.shape[1]
        return x[:, prompt:] if cache is None else (x[:, prompt:], cache.advance(rows))


def arrange(inputs: Inputs, x: Float[Array, "batch time width"], ports: Ports, causal: bool = True) -> Sequence:
    """Lays out embedded tokens behind what the ports put before them.

    Positions count a row's real tokens, or a segment's tokens when segments are given, and go on from the cache.
    Given positions are those of the tokens alone, too: what is put before them is added.
    """
    (batch, time), cache = inputs.tokens.shape[:2], inputs.cache
    if hasattr(cache, "arrange"):
        return cache.arrange(inputs, x)
    started = cache is not None and cache.before is not None
    prompt, prefix = (None, None) if started else (ports.prompt, ports.prefix)
    before = 0 if prefix is None else prefix[0].shape[-3]
    soft = 0 if prompt is None else prompt.shape[-2]
    infix = None if prefix is None else inputs.infix
    segments = _segments(inputs)
    # How many of the rows put there each row has: none where it goes alone.
    alone = None if ports.alone is None or not before + soft else jnp.broadcast_to(ports.alone, (batch,))[:, None]
    there = lambda n: n if alone is None else jnp.where(alone, 0, n)  # noqa: E731
    own = jnp.arange(before + soft, dtype=jnp.int32)  # their positions
    alike = segments is None and inputs.positions is None and infix is None and alone is None  # in all rows
    if inputs.positions is not None and started:
        positions = inputs.positions + jnp.sum(cache.segments[:, : cache.before] != 0, 1, dtype=jnp.int32)[:, None]
    elif inputs.positions is not None:
        positions = inputs.positions + there(before + soft)
    elif started:
        positions = _positions(inputs, segments) + jnp.sum(cache.segments != 0, 1, dtype=jnp.int32)[:, None]
    elif infix is None:
        positions = _positions(inputs, segments) + there(before + soft)
    else:
        own, positions = _around(infix, _positions(inputs, segments), there(before), there(soft), before, soft, inputs)
    if cache is not None or alone is not None:
        segments = jnp.ones((batch, time), jnp.int32) if segments is None else segments
    own = jnp.broadcast_to(own, (batch, before + soft))
    key_positions = jnp.concatenate([own, positions], 1)[: 1 if alike else batch]
    if prompt is not None:
        rows = jnp.broadcast_to(prompt, (batch, *prompt.shape[-2:]))
        x = jnp.concatenate([rows.astype(x.dtype), x], 1)
        positions = jnp.concatenate([own[:, before:], positions], 1)
    # Packed segments share what comes before them; an encoder's prompt is one of the row's own tokens.
    everywhere = 1 if inputs.segments is None else EVERYWHERE
    if prompt is not None and inputs.segments is not None and not causal:
        raise ValueError(
            "an encoder's prompt reads its row's tokens, so packed rows cannot share one: pad them instead"
        )
    put = lambda n: jnp.broadcast_to(there(jnp.int32(everywhere)), (batch, n))  # noqa: E731
    queries = None if segments is None else jnp.concatenate([put(soft), segments], 1)
    keys: Any = None if segments is None else jnp.concatenate([put(before), put(soft), segments], 1)
    order = jnp.arange(soft + time, dtype=jnp.int32)[None] + before
    if cache is None:
        slots = jnp.arange(before + soft + time, dtype=jnp.int32)[None]
        if infix is not None:
            slots = _infixed(slots, positions[:, soft:], own, before, before + soft)
        visible = Visible(order, slots, queries, keys, None, causal=causal, plain=segments is None and not before)
        return Sequence(x, positions, key_positions, visible, prefix, None, (before, soft))
    if not started:
        cache = cache.start(before + soft)
    seen = jax.lax.dynamic_update_slice(cache.segments, keys, (0, cache.filled))
    slots = jnp.arange(seen.shape[1], dtype=jnp.int32)[None]
    key_positions = jnp.cumsum(seen != 0, 1, dtype=jnp.int32) - 1  # without an infix, the positions that were given out
    if infix is not None:
        slots = _infixed(slots, positions[:, soft:], own, before, before + soft)
    visible = Visible(cache.filled + order, slots, queries, seen, None, causal=causal)
    cache = dataclasses.replace(cache, segments=seen)
    return Sequence(x, positions, key_positions, visible, prefix, cache, (before, soft))


def _around(
    infix: Array, positions: Array, has: Any, has_soft: Any, before: int, soft: int, inputs: Inputs
) -> tuple[Array, Array]:
    """The positions of what is put there and of the tokens, where a prefix of `before` rows stands between tokens; each
    row of the batch has `has` of them, and `has_soft` soft tokens."""
    if inputs.segments is not None:
        raise ValueError("packed rows hold several texts and infix names one place a row: pad them instead")
    rows = infix[:, None] + has_soft + jnp.arange(before, dtype=jnp.int32)[None]
    front = jnp.broadcast_to(jnp.arange(soft, dtype=jnp.int32), (len(infix), soft))
    tokens = positions + has_soft + jnp.where(positions >= infix[:, None], has, 0)
    return jnp.concatenate([rows, front], 1), tokens


def _infixed(slots: Array, positions: Array, own: Array, before: int, first: int) -> Array:
    """The order of the keys where the prefix's rows come right before the first token behind them."""
    batch, time = positions.shape
    behind = positions > own[:, before - 1 : before]
    token = jnp.where(jnp.any(behind, axis=1), jnp.argmax(behind, axis=1).astype(jnp.int32), time) + first
    rows = jnp.broadcast_to(token[:, None], (batch, before))
    return jnp.concatenate([rows, jnp.broadcast_to(slots[:, before:], (batch, slots.shape[1] - before))], 1)


def _segments(inputs: Inputs) -> Any:
    """int32 ``[batch, time]``, 0 at padding; None where all tokens are real and of one segment."""
    if inputs.mask is None:
        return inputs.segments
    return jnp.where(inputs.mask, 1 if inputs.segments is None else inputs.segments, 0).astype(jnp.int32)


def _positions(inputs: Inputs, segments: Any) -> Int[Array, "batch time"]:
    """Counted from 0: a row's real tokens, or each of its segments'."""
    batch, time = inputs.tokens.shape[:2]
    order = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
    if inputs.segments is not None:
        new = jnp.concatenate([jnp.ones((batch, 1), bool), segments[:, 1:] != segments[:, :-1]], 1)
        return order - jax.lax.cummax(jnp.where(new, order, 0), axis=1)
    return order if segments is None else jnp.maximum(jnp.cumsum(segments, 1) - 1, 0)


def across(time: int, before: int, source: Any, rows: int, alone: Any = None) -> Visible:
    """Sight of a source, behind `before` rows of a prefix, from `time` tokens: of all its `rows`, or of those whose
    segment in `source` ``[batch, rows]`` is not 0; where a row goes `alone`, not of the prefix."""
    keys = None if source is None else jnp.pad(source, ((0, 0), (before, 0)), constant_values=1)
    if keys is not None and before and alone is not None:
        keys = keys.at[:, :before].set(jnp.where(jnp.broadcast_to(alone, (len(keys),)), 0, 1)[:, None])
    queries = None if source is None else jnp.ones((len(source), time), jnp.int32)
    order = jnp.zeros((1, time), jnp.int32)
    return Visible(order, jnp.zeros((1, before + rows), jnp.int32), queries, keys, causal=False, plain=source is None)


def layer_attention(
    attend: Callable[..., Array],
    query: Float[Array, "batch time heads dim"],
    key: Float[Array, "batch keys kv_heads dim"] | None,
    value: Float[Array, "batch keys kv_heads dim"] | None,
    visible: Visible,
    scale: float,
    prefix: Any,
    cache: Any,
    layer: Array | None,
) -> tuple[Float[Array, "batch time heads dim"], Any]:
    """Attention over the layer's prefix and the new keys, or, with a cache, over all that it holds (`Cache.attend`)."""
    if prefix is not None and key is not None and value is not None:
        key, value = _behind(prefix[0], key), _behind(prefix[1], value)
    if cache is not None:
        assert layer is not None
        return cache.attend(attend, layer, query, key, value, visible, scale)
    return attend(query, key, value, visible, scale), cache


def _behind(prefix: Array, x: Float[Array, "batch time heads dim"]) -> Float[Array, "batch keys heads dim"]:
    if prefix.shape[-2:] != x.shape[-2:]:
        (heads, dim), (wanted, wide) = prefix.shape[-2:], x.shape[-2:]
        raise ValueError(
            f"the prefix has {heads} key heads of {dim} and this model {wanted} of {wide}: it is another model's"
        )
    rows = jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[-3:]))
    return jnp.concatenate([rows.astype(x.dtype), x], 1)
