"""Compiled decoding loops: one token at a time, or beam search.

Both read the prompt in one pass, of which only the last position's logits are computed, then carry the cache through a
`while_loop` that ends when every row has ended.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from peft_jax.core import Forward, Inputs, Params, Ports
from peft_jax.sampling import restrict

NEVER = -1e9  # the score of what cannot be chosen


# -- choosing ---------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sampling:
    """How tokens are drawn; all arrays."""

    key: Any
    temperature: Any
    top_k: Any = None
    top_p: Any = None


def choose(logits: Float[Array, "batch vocab"], sampling: Sampling | None, number: Any) -> Int[Array, "batch"]:
    """The next token of each row; `number` counts a row's tokens, and each has randomness of its own."""
    if sampling is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = restrict(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    key = jax.random.fold_in(sampling.key, number)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _is_end(tokens: Int[Array, "..."], ends: Int[Array, "n"]) -> Bool[Array, "..."]:
    return jnp.any(tokens[..., None] == ends.reshape((1,) * tokens.ndim + ends.shape), axis=-1)


# -- running ----------------------------------------------------------------------------------------------------------


def prefill(
    forward: Forward, params: Params, inputs: Inputs, ports: Ports, new: int
) -> tuple[Float[Array, "batch vocab"], Any]:
    """The logits after the prompt, and a cache with room for the new tokens."""
    assert forward.spec.cache is not None
    dtype = jax.eval_shape(forward.features, params, inputs, ports).dtype
    given = inputs.tokens if inputs.decoder_tokens is None else inputs.decoder_tokens
    cache = forward.spec.cache(given.shape[0], given.shape[1] + new - 1, dtype)  # the last one is not read again
    features, cache = forward.features(params, dataclasses.replace(inputs, cache=cache), ports)
    return forward.head(params, features[:, -1:], ports)[:, -1].astype(jnp.float32), cache


def step(
    forward: Forward, params: Params, tokens: Int[Array, "batch"], cache: Any, ports: Ports
) -> tuple[Float[Array, "batch vocab"], Any]:
    new = tokens[:, None]
    inputs = Inputs(None, decoder_tokens=new, cache=cache) if forward.spec.attentions else Inputs(new, cache=cache)
    logits, cache = forward(params, inputs, ports)
    return logits[:, -1].astype(jnp.float32), cache


@functools.partial(jax.jit, static_argnames=("forward", "new"))
def write(
    forward: Forward,
    params: Params,
    inputs: Inputs,
    ends: Array,
    pad: Array,
    ports: Ports,
    new: int,
    sampling: Sampling | None,
) -> Int[Array, "batch new"]:
    """One token at a time."""
    logits, cache = prefill(forward, params, inputs, ports, new)
    token = choose(logits, sampling, 0)
    written = jnp.full((logits.shape[0], new), pad).at[:, 0].set(token)

    def unfinished(state: Any) -> Array:
        number, _, ended, _, _ = state
        return (number < new) & ~jnp.all(ended)

    def body(state: Any) -> Any:
        number, token, ended, written, cache = state
        logits, cache = step(forward, params, token, cache, ports)
        token = choose(logits, sampling, number)
        written = written.at[:, number].set(jnp.where(ended, pad, token))
        return number + 1, token, ended | _is_end(token, ends), written, cache

    state = (jnp.int32(1), token, _is_end(token, ends), written, cache)
    return jax.lax.while_loop(unfinished, body, state)[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Beams:
    """Hypotheses of every row, the best first.

    number   how many tokens are written
    open, open_scores       those that go on: tokens [batch, beams, new], log p [batch, beams]
    done, done_scores       those that have ended, log p / length^penalty
    ended    [batch, beams] which entries of `done` hold a hypothesis
    hopeful  [batch] whether an open one may still beat the worst of `done`
    stuck    no open hypothesis can go on
    """

    number: Any
    open: Any
    open_scores: Any
    done: Any
    done_scores: Any
    ended: Any
    hopeful: Any
    stuck: Any


def _pick(x: Array, beams: Array) -> Array:
    return jnp.take_along_axis(x, beams.reshape(beams.shape + (1,) * (x.ndim - 2)), axis=1)


def _bar(scores: Array, where: Array) -> Array:
    """Added, not put in place: those that are barred keep their order where the numbers' precision allows."""
    return scores + jnp.where(where, NEVER, 0.0)


def _extend(beams: Beams, logits: Array, ends: Array, penalty: Array) -> tuple[Beams, Int[Array, "batch beams"]]:
    """Adds a token to every open hypothesis, and says which of the old ones each new one continues."""
    batch, width, new = beams.open.shape
    vocab = logits.shape[-1]
    scores = jax.nn.log_softmax(logits, axis=-1).reshape(batch, width, vocab) + beams.open_scores[..., None]
    # Enough candidates that, should all beams offer every end, as many as there are beams go on.
    candidates = max(2, 1 + ends.shape[0]) * width
    scores, flat = jax.lax.top_k(scores.reshape(batch, width * vocab), candidates)
    source, token = flat // vocab, flat % vocab
    texts = _pick(beams.open, source).at[:, :, beams.number].set(token)
    ending = _is_end(token, ends) | (beams.number + 1 == new)

    going_on = _bar(scores, ending)
    open_scores, chosen = jax.lax.top_k(going_on, width)

    length = (beams.number + 1).astype(jnp.float32) ** penalty
    finished = ending & (jnp.arange(candidates) < width)[None]
    done_scores = _bar(_bar(scores / length, ~beams.hopeful[:, None]), ~finished)
    done_scores, best = jax.lax.top_k(jnp.concatenate([beams.done_scores, done_scores], 1), width)
    ended = _pick(jnp.concatenate([beams.ended, finished], 1), best)
    worst = jnp.where(ended, jnp.min(done_scores, axis=1, keepdims=True), NEVER)
    beams = Beams(
        number=beams.number + 1,
        open=_pick(texts, chosen),
        open_scores=open_scores,
        done=_pick(jnp.concatenate([beams.done, texts], 1), best),
        done_scores=done_scores,
        ended=ended,
        hopeful=beams.hopeful & jnp.any(open_scores[:, :1] / length > worst, axis=1),
        stuck=jnp.all(ending),
    )
    return beams, _pick(source, chosen)


@functools.partial(jax.jit, static_argnames=("forward", "new", "width"))
def search(
    forward: Forward,
    params: Params,
    inputs: Inputs,
    ends: Array,
    pad: Array,
    ports: Ports,
    new: int,
    penalty: Array,
    width: int,
) -> Int[Array, "batch new"]:
    """Beam search, as in transformers' generation/utils.py `_beam_search` with early_stopping=False."""
    logits, cache = prefill(forward, params, inputs, ports, new)
    batch = logits.shape[0]
    ports = _repeat(ports, width)
    blank, never = jnp.full((batch, width, new), pad), jnp.full((batch, width), NEVER)
    first = never.at[:, 0].set(0.0)  # all beams are alike at first: only one may be continued
    yes, no = jnp.ones((batch,), bool), jnp.zeros((batch, width), bool)
    beams = Beams(jnp.int32(0), blank, first, blank, never, no, yes, jnp.bool_(False))
    offset = width * jnp.arange(batch, dtype=jnp.int32)[:, None]
    beams, _ = _extend(beams, jnp.repeat(logits, width, axis=0), ends, penalty)
    cache = cache.take(jnp.repeat(jnp.arange(batch), width))

    def unfinished(state: Any) -> Array:
        beams, _ = state
        return jnp.any(beams.hopeful) & ~beams.stuck

    def body(state: Any) -> Any:
        beams, cache = state
        logits, cache = step(forward, params, beams.open[:, :, beams.number - 1].reshape(-1), cache, ports)
        beams, source = _extend(beams, logits, ends, penalty)
        return beams, cache.reorder((source + offset).reshape(-1))

    beams, _ = jax.lax.while_loop(unfinished, body, (beams, cache))
    return beams.done[:, 0]


def _repeat(ports: Ports, width: int) -> Ports:
    """What a port gives to each row, given to each of its beams."""
    adapter = None if ports.adapter is None else jnp.repeat(ports.adapter, width, axis=0)
    prefix = jax.tree.map(lambda x: jnp.repeat(x, width, axis=1) if x.ndim == 5 else x, ports.prefix)
    return dataclasses.replace(ports, adapter=adapter, prefix=prefix)
