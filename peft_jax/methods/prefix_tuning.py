"""Prefix tuning: keys and values before those of the real tokens, in every layer (Li & Liang 2021, arXiv 2101.00190).

    attention(q, [P_K; k], [P_V; v])        P_K, P_V ``[layers, l, kv_heads, head_dim]``

P acts through the model's port `prefix`; nothing else trains.  The real tokens stand at the positions from l on; the
prefix's own keys are not rotated.  While it trains, P is the output of an MLP (section 4.3), which steadies training:

    P = tanh(P' W₁ + b₁) W₂ + b₂        P' ``[l, width]``, W₁ ``[width, hidden]``, W₂ ``[hidden, 2 · layers · d]``

with d = kv_heads · head_dim.  Afterwards only P is kept: `bake` drops the MLP.  ``hidden=None`` trains P itself, the
paper's ablation.  Trained numbers: l·width + width·hidden + hidden + (hidden + 1)·2·layers·d, or 2·layers·d·l; kept:
2·layers·d·l.

An encoder-decoder model has three prefixes, each with an MLP of its own: before the encoder's attention, before the
decoder's, and before the source in the decoder's attention to it (section 4.2; its code has the third).  Where a call's
inputs name an `infix`, the rows stand between two tokens (section 7.3): the same parameters, another place.

Source: section 4; XiangLi1999/PrefixTuning, gpt2/train_control.py (``get_prompt_p5``); starting from real words:
its section on initialisation, ``lowdata_token``; seq2seq/prefixTuning.py for the three.

Departures: P' starts N(0, 1) and the MLP as torch's Linear does, U(±1/√inputs), as in its code; P alone starts N(0, 1)
too.  A start from real words is exact with ``hidden=None``; otherwise the MLP is fitted to it as in the code (Adam,
500 steps), at a rate of 1e-3 rather than 1e-4, which ends nearer.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Inputs, Method, Params, Ports, Spec, check_tokens
from peft_jax.methods.lora import dropped
from peft_jax.ports import behind, key_of, need, pick, put, take
from peft_jax.weights import Weight, is_weight, static

FIT_STEPS, FIT_RATE = 500, 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Weight):
    """A prefix as it is kept: keys and values ``[layers, l, kv_heads, head_dim]``.  It lies in ``params["ports"]``."""

    trains = ("keys", "values")
    row_axis: ClassVar[int] = 1  # where the batch goes when each row has its own: behind the layers

    keys: Any
    values: Any
    name: str = static(default="prefix_tuning")

    @property
    def shape(self) -> tuple[int, ...]:
        return (2, *self.keys.shape)

    @property
    def dtype(self) -> Any:
        return self.keys.dtype

    def numbers(self) -> tuple[int, int]:
        return self.trained_size(), 0

    def rows(self) -> tuple[Array, Array]:
        """(keys, values), as the port takes them."""
        return self.keys, self.values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Reparametrised(Weight):
    """A prefix while it trains, as the output of an MLP: embedding ``[l, width]``, w1 ``[width, hidden]``, b1, w2
    ``[hidden, 2 · layers · kv_heads · head_dim]``, b2; `heads` is (layers, kv_heads, head_dim)."""

    trains = ("embedding", "w1", "b1", "w2", "b2")

    embedding: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any
    heads: tuple[int, int, int] = static(default=(0, 0, 0))
    name: str = static(default="prefix_tuning")

    @property
    def shape(self) -> tuple[int, ...]:
        return (2, self.heads[0], self.embedding.shape[0], *self.heads[1:])

    @property
    def dtype(self) -> Any:
        return self.embedding.dtype

    def numbers(self) -> tuple[int, int]:
        return self.trained_size(), 0

    def rows(self) -> tuple[Array, Array]:
        """(keys, values), as the port takes them."""
        inner = jnp.tanh(self.embedding @ self.w1 + self.b1[None])
        return unflatten(inner @ self.w2 + self.b2[None], self.heads)


def unflatten(rows: Array, heads: tuple[int, int, int]) -> tuple[Array, Array]:
    """``[l, layers · 2 · kv_heads · head_dim]``, as the paper's code and HF PEFT keep it, to (keys, values)."""
    layers, kv_heads, dim = heads
    both = rows.reshape(rows.shape[0], layers, 2, kv_heads, dim).transpose(2, 1, 0, 3, 4)
    return both[0], both[1]


def flatten(keys: Array, values: Array) -> Array:
    """The inverse of `unflatten`."""
    return jnp.stack([keys, values]).transpose(2, 1, 0, 3, 4).reshape(keys.shape[1], -1)


def prefix_tuning(
    length: int = 10,
    *,
    hidden: int | None = 512,
    dropout: float = 0.0,
    text: Sequence[int] | None = None,
    start: Params | None = None,
    parts: Sequence[str] | None = None,
    dtype: Any = jnp.float32,
    name: str = "prefix_tuning",
) -> Method:
    """Keys and values before those of the real tokens, in every layer.

    Args:
        length: l, the number of rows.
        hidden: the width of the MLP; None trains keys and values themselves.
        dropout: the rate on the prefix, active when a call's ports carry a `micro_key` (training).
        text: token ids whose keys and values in the frozen model the prefix starts as, tiled or cut to `length`.
        start: a tree with a trained prefix of this name and length, whose numbers this one starts from: another task's,
            or several tasks' together (the multi-task learning of P-tuning v2).
        parts: of an encoder-decoder model, which of its attentions get one: "encoder", "decoder", "cross"; by default
            all.
        dtype: of the trained arrays.
        name: what tells this method from another of its kind in one chain, whose prefix then comes behind this one's;
            also seeds its draws.

    Raises:
        ValueError: on a length that is not positive or leaves the model no position for real tokens; on a dropout
            outside [0, 1); on a text without tokens; on a start of other shapes; on parts that the model does not
            have; if it has no port for a prefix.

    >>> import jax, transformers, peft_jax as pj
    >>> from peft_jax import methods, models
    >>> config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    >>> model = models.from_config(config, jax.random.key(1))
    >>> params, forward = methods.prefix_tuning(5, hidden=None)(jax.random.key(0), model.params, model.forward)
    >>> pj.count(params).trainable == 2 * 2 * 16 * 5, forward(params, jax.numpy.ones((2, 8), int)).shape
    (True, (2, 8, 50))
    """
    if length < 1:
        raise ValueError(f"length is {length}: give the number of the prefix's rows, 1 or more")
    if hidden is not None and hidden < 1:
        raise ValueError(f"hidden is {hidden}: give the MLP's width, 1 or more, or None for none")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if text is not None and len(text) == 0:
        raise ValueError("the text that the prefix is to start as has no tokens")
    if text is not None and start is not None:
        raise ValueError("text and start are two ways to start a prefix: give one of them")

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)
        sizes = _sizes(forward.spec, parts)
        need("prefix", forward, *_rows(sizes, length))

        def one(part: str) -> Prefix | Reparametrised:
            mine, heads = key_of(key, f"{name}.{part}" if part else name), sizes[part]
            if hidden is None:
                return Prefix(*unflatten(jax.random.normal(mine, (length, 2 * math.prod(heads))), heads), name=name)
            return _mlp(mine, length, forward.spec.width, hidden, heads, name)

        leaves = {part: one(part) for part in sizes}
        made: Any = leaves.get("", leaves)
        if text is not None:
            words = words_of(forward, params, np.resize(np.asarray(text, np.int32), length))
            made = Prefix(*words, name=name) if isinstance(made, Prefix) else _fitted(made, words)
        made = made if start is None else _begun(made, start, name)
        return put(params, name, jax.tree.map(lambda x: x.astype(dtype), made))

    def wrap(forward: Forward) -> Forward:
        rows = _rows(_sizes(forward.spec, parts), length)
        need("prefix", forward, *rows)

        def fill(params: Params, ports: Ports) -> tuple[Params, Ports]:
            params, mine = take(params, name)
            if is_weight(mine):
                mine, ports = pick(mine, ports)
                return params, dataclasses.replace(ports, prefix=_before(_live(mine, "", ports), ports.prefix))
            picked = {part: pick(w, ports) for part, w in mine.items()}
            others, ports = ports.prefix or {}, next(iter(picked.values()))[1]
            prefix = {part: _before(_live(w, part, ports), others.get(part)) for part, (w, _) in picked.items()}
            return params, dataclasses.replace(ports, prefix={**others, **prefix})

        return behind(forward.rewritten(fill), *rows)

    def _live(leaf: Any, part: str, ports: Ports) -> tuple[Array, Array]:
        """Keys and values, some of them dropped while training."""
        keys, values = leaf.rows()
        if not dropout or ports.micro_key is None:
            return keys, values
        first, second = jax.random.split(key_of(ports.micro_key, f"{name}.{part}" if part else name))
        return dropped(keys, first, jnp.float32(dropout)), dropped(values, second, jnp.float32(dropout))

    return Method(init, wrap)


def _sizes(spec: Spec, parts: Sequence[str] | None) -> dict[str, tuple[int, int, int]]:
    """(layers, kv_heads, head_dim) of each attention that gets a prefix; a model with one kind has no name for it."""
    if not spec.attentions:
        if parts is not None:
            raise ValueError(f"parts {', '.join(parts)} are of encoder-decoder models, and this is none: leave it out")
        return {"": (spec.layers, spec.kv_heads, spec.head_dim)}
    there = dict(spec.attentions)
    wanted = tuple(there if parts is None else parts)
    if not wanted or not set(wanted) <= there.keys():
        raise ValueError(f"parts are {', '.join(wanted) or 'none'}: choose from {', '.join(there)}")
    return {part: there[part] for part in wanted}


def _rows(sizes: Mapping[str, Any], length: int) -> tuple[int, int]:
    """How many positions the rows take: of the (source's) tokens, and of the decoder's."""
    return length * ("" in sizes or "encoder" in sizes), length * ("decoder" in sizes)


def _begun(made: Any, start: Params, name: str) -> Any:
    """A prefix with the numbers of another tree's."""
    found = start.get("ports", {}).get(name)
    if found is None:
        raise ValueError(f"the tree to start from holds no prefix called {name!r}: train one under this name")
    shapes = [[(str(path), x.shape) for path, x in jax.tree.leaves_with_path(tree)] for tree in (made, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the prefix {name!r} to start from is of another length, MLP or model than this one")
    return jax.tree.map(jnp.copy, found)


def _before(rows: tuple[Array, Array], others: Any) -> Any:
    """A prefix before another one; either may be one a row ``[layers, batch, l, kv_heads, head_dim]``."""
    if others is None:
        return rows

    def both(*pair: Array) -> Array:
        lead = max((x.shape[:-3] for x in pair), key=len)
        wide = [jnp.broadcast_to(x if x.ndim == len(lead) + 3 else x[:, None], (*lead, *x.shape[-3:])) for x in pair]
        return jnp.concatenate([wide[0], wide[1].astype(wide[0].dtype)], -3)

    return tuple(map(both, rows, others))


def _mlp(key: Array, length: int, width: int, hidden: int, heads: tuple[int, int, int], name: str) -> Reparametrised:
    keys, out = jax.random.split(key, 5), 2 * math.prod(heads)

    def linear(key: Array, shape: tuple[int, ...], inputs: int) -> Array:
        return jax.random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(inputs)

    return Reparametrised(
        jax.random.normal(keys[0], (length, width)),
        linear(keys[1], (width, hidden), width),
        linear(keys[2], (hidden,), width),
        linear(keys[3], (hidden, out), hidden),
        linear(keys[4], (out,), hidden),
        heads,
        name,
    )


# -- from real words --------------------------------------------------------------------------------------------------


def words_of(forward: Forward, params: Params, tokens: Any) -> tuple[Array, Array]:
    """The (keys, values) that a model makes of a text, at the positions from 0 on: a prefix, as the port takes it.

    Raises:
        ValueError: if a token is outside the vocabulary.
    """
    ids, empty = np.asarray(tokens, np.int32)[None], forward.spec.cache
    if empty is None or forward.spec.attentions:
        raise ValueError(
            "a start from text reads it with a decoder's cache, which this model does not keep: leave text out"
        )
    check_tokens(ids, forward.spec)

    @jax.jit
    def read(params: Params) -> Any:
        return forward(params, Inputs(jnp.asarray(ids), cache=empty(1, ids.shape[1])))[1]

    cache = read(params)
    return cache.keys[:, 0], cache.values[:, 0]


def _fitted(leaf: Reparametrised, words: tuple[Array, Array]) -> Reparametrised:
    """The MLP fitted to a prefix by its mean squared error."""
    tx = optax.adam(FIT_RATE)

    def distance(leaf: Reparametrised) -> Array:
        return sum((jnp.mean(jnp.square(a - b)) for a, b in zip(leaf.rows(), words, strict=True)), jnp.float32(0))

    @jax.jit
    def fit(leaf: Reparametrised) -> Reparametrised:
        def step(_: Any, state: Any) -> Any:
            leaf, moments = state
            updates, moments = tx.update(jax.grad(distance)(leaf), moments)
            return optax.apply_updates(leaf, updates), moments

        with jax.numpy_dtype_promotion("standard"):
            return jax.lax.fori_loop(0, FIT_STEPS, step, (leaf, tx.init(leaf)))[0]

    return fit(leaf)


def bake(params: Params, name: str | None = None) -> Params:
    """Replaces every reparametrised prefix (or the one called `name`) by the keys and values that it stands for.

    The forward function stays as it is.  A baked prefix can train on, without the MLP.

    Raises:
        ValueError: if there is none.
    """
    found = [w.name for w in trees.weights(params) if isinstance(w, Reparametrised)]
    wanted = [n for n in found if name in (None, n)]
    if not wanted:
        called = "" if name is None else f" called {name!r}"
        raise ValueError(f"there is no reparametrised prefix{called} here: {', '.join(found) or 'none at all'}")

    def each(w: Weight) -> Weight:
        return Prefix(*w.rows(), name=w.name) if isinstance(w, Reparametrised) and w.name in wanted else w

    return trees.map_weights(each, params)
