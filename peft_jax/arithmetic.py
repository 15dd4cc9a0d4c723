"""Adapter arithmetic: sums, differences and consensus of LoRA adapters on one base, as one more LoRA adapter.

    ΔW = Σᵢ wᵢ sᵢ Aᵢ Bᵢ        wᵢ a weight, of either sign; sᵢ Aᵢ Bᵢ what adapter i adds to W

    method             a layer's result                                                    rank
    concatenation      ΔW itself: A = [w₁ s₁ A₁, w₂ s₂ A₂, …], B = [B₁; B₂; …]             Σ rᵢ
    svd                the nearest to ΔW of its rank, from QR of the factors                `rank`
    linear             A = Σ ±√|wᵢ sᵢ| Aᵢ, B = Σ √|wᵢ sᵢ| Bᵢ: not ΔW, for it has AᵢBⱼ too   r, the same for all
    magnitude_prune    of each tensor τ the share `density` that is largest; Σ wᵢ τᵢ
    dare_linear        of each τ a random share `density`, divided by it; Σ wᵢ τᵢ
    ties, dare_ties    pruned likewise; then each number has a sign elected, and those who
                       agree have their mean: Σ wᵢ τᵢ / how many they are

The last four have two forms: ``on="factors"`` takes A and B for τ, weighted as in linear; ``on="delta"`` takes
τᵢ = sᵢ Aᵢ Bᵢ, and its result is cut to `rank` by an SVD.

Source: task arithmetic, arXiv 2212.04089; TIES, arXiv 2306.01708, section 3; DARE, arXiv 2311.03099, section 3; HF PEFT
tuners/lora/model.py, add_weighted_adapter, and utils/merge_utils.py.

Departures: of a negative weight, HF PEFT elects the sign as if it were positive; here the negated adapter votes, and
one of weight 0 does not.  HF PEFT sums a single adapter as 'linear' whatever it is asked for, and keeps the first
adapter's rsLoRA flag, which multiplies the result by √r; here neither happens.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Params, Path
from peft_jax.methods.lora import LoRA
from peft_jax.weights import Leaf, base_of

# method: (how a tensor is pruned, whether signs are elected); the others do neither.
PRUNING = {
    "magnitude_prune": ("magnitude", False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}
METHODS = ("concatenation", "svd", "linear", *PRUNING)
ADVICE = {
    "DoRA": "its magnitude is no term of a sum; merge it, or train it as LoRA",
    "DyLoRA": "methods.truncate(params, rank) first",
    "Unfrozen": "what trains whole is not summed: set it back to its base, or leave it out",
    "Adapters": "give the trees that were stacked, one by one",
    "LoRA on Residual": "interop.hf_peft.save writes it as LoRA of twice the rank, to be loaded again",
    "LoRA on LoRA": "give each adapter a tree of its own",
}


class Combined(NamedTuple):
    """What `weighted_sum` gives back.

    params      the base with one LoRA leaf wherever an adapter had one, sharing the base's buffers
    error       ‖result − wanted‖ / ‖wanted‖ over all leaves, in the Frobenius norm; wanted is ΔW or, with
                ``on="delta"``, what was cut to `rank`
    errors      the same by leaf, ``model/layers/self_attn/q_proj/kernel``
    """

    params: Params
    error: float
    errors: dict[str, float]


class _Recipe(NamedTuple):
    """How to sum: the arguments of `weighted_sum` that every layer needs."""

    method: str
    rank: int | None
    density: float | None
    on: str
    elect: str


class _Term(NamedTuple):
    """One adapter in one layer: its a ``[in, r]`` and b ``[r, out]`` in fp64, its weight w, its scale s, and a key."""

    name: str
    a: np.ndarray
    b: np.ndarray
    weight: float
    scale: float
    key: Array | None


def weighted_sum(
    adapters: Mapping[str, Params] | Sequence[Params],
    weights: Mapping[str, float] | Sequence[float],
    method: str = "concatenation",
    *,
    rank: int | None = None,
    density: float | None = None,
    on: str = "factors",
    elect: str = "total",
    key: Array | None = None,
    name: str = "lora",
) -> Combined:
    """One LoRA adapter made of several on the same base; the equations are at the head of this module.

    An adapter that leaves a module or a layer alone adds nothing there, and has no vote.

    Args:
        adapters: trees of LoRA leaves (or bare arrays) on one base, by name or in order.  Ranks may differ, except
            where A and B are themselves averaged.
        weights: one for each adapter; negative ones subtract.
        method: one of `METHODS`.
        rank: of the result, at most; for 'svd' and with ``on="delta"``.
        density: the share of numbers that pruning keeps, in (0, 1].
        on: 'factors' or 'delta'; the latter forms whole matrices, a layer at a time.
        elect: how TIES elects a sign: by the 'total' of the numbers, or by the 'frequency' of their signs.
        key: for DARE.
        name: what the new leaves are called.

    The result is in fp32, or wider where an adapter is.

    Raises:
        ValueError: on an unknown method, an option out of range or without use, adapters on different bases, leaves
            other than LoRA, or ranks that differ where factors are averaged; with the path.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import arithmetic, methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> base = {"q_proj": {"kernel": jax.numpy.eye(64)}}
    >>> one, two = (methods.lora(r)(jax.random.key(0), base, forward)[0] for r in (2, 3))
    >>> exact = arithmetic.weighted_sum({"one": one, "two": two}, {"one": 1.0, "two": -0.5})
    >>> exact.params["q_proj"]["kernel"].ranks, exact.error
    ((5,), 0.0)
    >>> arithmetic.weighted_sum([one, two], [1.0, -0.5], "svd", rank=2).params["q_proj"]["kernel"].ranks
    (2,)
    """
    given = dict(adapters) if isinstance(adapters, Mapping) else {str(i): tree for i, tree in enumerate(adapters)}
    wanted = _weights(given, weights)
    recipe = _Recipe(method, rank, density, on, elect)
    _check(recipe, key)
    flat = _flat(given)
    squares: dict[str, np.ndarray] = {}

    def each(path: Path, leaf: Leaf) -> Leaf:
        mine = {n: w for n, found in flat.items() if isinstance(w := found[path], LoRA)}
        if not mine:
            return leaf
        here = "/".join(path)
        result, squares[here] = _leaf(here, mine, wanted, recipe, key, name)
        return result

    params = trees.map_leaves(each, next(iter(given.values())))
    errors = {here: _ratio(found) for here, found in squares.items()}
    return Combined(params, _ratio(sum(squares.values(), np.zeros(2))), errors)


def scale(params: Params, by: float) -> Params:
    """The adapter times `by`: every LoRA leaf's scale is multiplied, and nothing recompiles.

    `pj.set_scale` sets the scale instead.

    Raises:
        ValueError: as `weighted_sum`.
    """
    _flat({"it": params})
    times = lambda w: dataclasses.replace(w, scale=w.scale * jnp.asarray(by, w.scale.dtype))  # noqa: E731
    return trees.map_leaves(lambda path, w: times(w) if isinstance(w, LoRA) else w, params)


def negate(params: Params) -> Params:
    """The adapter that undoes this one: W − ΔW where it made W + ΔW (task negation, arXiv 2212.04089, section 3)."""
    return scale(params, -1.0)


# -- what is given ----------------------------------------------------------------------------------------------------


def _weights(adapters: Mapping[str, Params], weights: Mapping[str, float] | Sequence[float]) -> dict[str, float]:
    if not adapters:
        raise ValueError("no adapters to sum: give at least one tree")
    if isinstance(weights, Mapping):
        if wrong := set(weights) ^ set(adapters):
            raise ValueError(f"adapters and weights differ in {sorted(wrong)[0]!r}: give each adapter one weight")
        named = {name: float(weights[name]) for name in adapters}
    elif len(weights) != len(adapters):
        raise ValueError(f"there are {len(adapters)} adapters and {len(weights)} weights: give each adapter one weight")
    else:
        named = {name: float(weight) for name, weight in zip(adapters, weights, strict=True)}
    for name, weight in named.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {name!r} is {weight}: give a finite number")
    return named


def _check(recipe: _Recipe, key: Array | None) -> None:
    method, rank, density, on, elect = recipe
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}: choose from {', '.join(METHODS)}")
    if on not in ("factors", "delta"):
        raise ValueError(f"on is {on!r}: choose 'factors' or 'delta'")
    if elect not in ("total", "frequency"):
        raise ValueError(f"elect is {elect!r}: choose 'total' or 'frequency'")
    if on == "delta" and method not in PRUNING:
        raise ValueError(f"{method} has no form on='delta': {', '.join(PRUNING)} have, and 'svd' cuts the sum itself")
    options: dict[str, tuple[Any, bool]] = {
        "rank": (rank, method == "svd" or on == "delta"),
        "density": (density, method in PRUNING),
        "key": (key, method in PRUNING and PRUNING[method][0] == "random"),
    }
    for option, (value, wanted) in options.items():
        if (value is None) == wanted:
            called = f"{method} on={on!r}" if method in PRUNING else method
            raise ValueError(f"{called} {'needs' if wanted else 'has no use for'} {option}")
    if rank is not None and (rank < 1 or rank != int(rank)):
        raise ValueError(f"rank must be a positive integer, got {rank}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")


def _flat(adapters: Mapping[str, Params]) -> dict[str, dict[Path, Leaf]]:
    """The leaves of each tree by path, once they are known to be plain LoRA on one base."""
    flat = {name: trees.leaves(params) for name, params in adapters.items()}
    (first, like), *_ = flat.items()
    for name, params in adapters.items():
        for added in trees.ADDED if isinstance(params, Mapping) else ():
            for entry in params.get(added, ()):
                raise ValueError(f"adapter {name!r} has {added}/{entry}, which is not summed: only plain LoRA adds up")
        for path in sorted(set(like) ^ set(flat[name])):
            raise ValueError(f"adapter {name!r} is on another base: {'/'.join(path)} is only in one of them")
        for path, w in flat[name].items():
            here = "/".join(path)
            if hasattr(w, "base") and not (type(w) is LoRA and base_of(w.base) is None):
                kind = f"LoRA on {type(w.base).__name__}" if type(w) is LoRA else type(w).__name__
                advice = f"; {ADVICE[kind]}" if kind in ADVICE else ""
                raise ValueError(f"adapter {name!r} has {kind} at {here}: only plain LoRA adds up{advice}")
            if w.shape != like[path].shape:
                raise ValueError(
                    f"adapter {name!r} is on another base: {here} is {w.shape}, and {like[path].shape} in {first!r}"
                )
            if not _same(_base(w), _base(like[path])):
                raise ValueError(f"adapter {name!r} is on another base: {here} holds other numbers than in {first!r}")
    return flat


def _base(w: Leaf) -> Leaf:
    return w.base if isinstance(w, LoRA) else w


def _same(one: Leaf, two: Leaf) -> bool:
    """Whether two leaves hold the same numbers; those that share their buffers are not read."""
    kind: Any = jax.tree.structure(one)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=False)
    return kind == jax.tree.structure(two) and all(
        x is y or (x.dtype == y.dtype and np.array_equal(x, y)) for x, y in pairs
    )


# -- one leaf ---------------------------------------------------------------------------------------------------------


def _leaf(
    here: str, mine: Mapping[str, LoRA], weights: Mapping[str, float], recipe: _Recipe, key: Array | None, name: str
) -> tuple[LoRA, np.ndarray]:
    """The sum of one leaf's adapters; and ‖result − wanted‖² and ‖wanted‖², over its layers."""
    like = next(iter(mine.values()))
    lead = like.scale.shape
    # On the host, in fp64: factors are small, and layers of other ranks have other shapes.
    flat = lambda x: np.asarray(x, np.float64).reshape(-1, *x.shape[len(lead) :])  # noqa: E731
    host = {n: [flat(x) for x in (w.a, w.b, w.scale)] for n, w in mine.items()}
    layers, squares = [], np.zeros(2)
    for layer in range(len(like.ranks)):
        terms = []
        for n, arrays in host.items():
            a, b, s = (x[layer] for x in arrays)
            drawn = None if key is None else functools.reduce(_fold, (n, here, str(layer)), key)
            if rank := mine[n].ranks[layer]:
                terms.append(_Term(n, a[:, :rank], b[:rank], weights[n], float(s), drawn))
        empty = np.zeros((like.a.shape[-2], 0)), np.zeros((0, like.b.shape[-1])), np.zeros(2)
        a, b, square = _sum(terms, recipe, here) if terms else empty
        layers.append((a, b))
        squares += square
    ranks = tuple(a.shape[1] for a, _ in layers)
    a = np.stack([np.pad(a, ((0, 0), (0, max(ranks) - a.shape[1]))) for a, _ in layers])
    b = np.stack([np.pad(b, ((0, max(ranks) - b.shape[0]), (0, 0))) for _, b in layers])
    s = np.array(ranks, bool)
    a, b, s = (x.reshape((*lead, *x.shape[1:])) for x in (a, b, s))
    dtype = functools.reduce(
        np.promote_types, (x.dtype for w in mine.values() for x in (w.a, w.b)), np.dtype(np.float32)
    )
    a, b, s = jnp.asarray(a, dtype), jnp.asarray(b, dtype), jnp.asarray(s, like.scale.dtype)
    return LoRA(like.base, a, b, s, ranks=ranks, name=name), squares


def _sum(terms: list[_Term], recipe: _Recipe, here: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(a, b, squares)`` of one layer."""
    # ΔW as the product of two factors.
    a = np.concatenate([t.a * (t.weight * t.scale) for t in terms], 1)
    b = np.concatenate([t.b for t in terms], 0)
    if recipe.method == "concatenation":
        return a, b, np.array([0.0, _norm(a, b) ** 2])
    if recipe.method == "svd":
        (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b.T)
        u, s, vt = np.linalg.svd(ra @ rb.T)
        return _cut(qa @ u, s, vt @ qb.T, recipe.rank)
    if recipe.on == "delta":
        deltas = [(t.a * t.scale).astype(np.float32) @ t.b.astype(np.float32) for t in terms]
        merged = _merged(deltas, [t.weight for t in terms], [t.key for t in terms], recipe)
        u, s, vt = (np.asarray(x) for x in jnp.linalg.svd(jnp.asarray(merged, jnp.float32), full_matrices=False))
        return _cut(u, s, vt, recipe.rank)
    if len({t.a.shape[1] for t in terms}) > 1:
        found = ", ".join(f"{t.name!r} has rank {t.a.shape[1]}" for t in terms)
        raise ValueError(
            f"{recipe.method} averages A and B themselves, and at {here} {found}: choose 'concatenation' or 'svd', or "
            "on='delta'"
        )
    products = [t.weight * t.scale for t in terms]
    keys = [[None if t.key is None else _fold(t.key, part) for t in terms] for part in ("a", "b")]
    # The sign goes to one of the two: on both sides it would cancel.
    signed = [math.copysign(math.sqrt(abs(p)), p) for p in products]
    mean_a = _merged([t.a for t in terms], signed, keys[0], recipe)
    mean_b = _merged([t.b for t in terms], [abs(w) for w in signed], keys[1], recipe)
    off = _norm(np.concatenate([mean_a, -a], 1), np.concatenate([mean_b, b], 0))
    return mean_a, mean_b, np.array([off, _norm(a, b)]) ** 2


def _merged(tensors: list[np.ndarray], weights: list[float], keys: list[Array | None], recipe: _Recipe) -> np.ndarray:
    """``Σ wᵢ τᵢ`` of pruned tensors; with an election, the mean of those that agree."""
    _, elects = PRUNING.get(recipe.method, ("", False))
    pruned = [_pruned(t, key, recipe) for t, key in zip(tensors, keys, strict=True)]
    weighted = np.stack([t * w for t, w in zip(pruned, weights, strict=True)])
    if not elects:
        return weighted.sum(0)
    votes = np.stack([t * np.sign(w) for t, w in zip(pruned, weights, strict=True)])
    ballot = votes.sum(0) if recipe.elect == "total" else np.sign(votes).sum(0)
    agree = np.sign(votes) == np.where(ballot >= 0, 1, -1)[None]
    return (weighted * agree).sum(0) / np.maximum(agree.sum(0), 1)


def _pruned(tensor: np.ndarray, key: Array | None, recipe: _Recipe) -> np.ndarray:
    density = 1.0 if recipe.density is None else recipe.density
    if density == 1:
        return tensor
    if key is not None:
        return tensor * np.asarray(jax.random.bernoulli(key, density, tensor.shape)) / density
    kept = np.argsort(-np.abs(tensor), axis=None, kind="stable")[: int(density * tensor.size)]
    mask = np.zeros(tensor.size, bool)
    mask[kept] = True
    return tensor * mask.reshape(tensor.shape)


def _cut(u: np.ndarray, s: np.ndarray, vt: np.ndarray, rank: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first `rank` directions, their lengths shared by both factors; what is cut off is the error."""
    root = np.sqrt(s[:rank])
    squares = np.square(s.astype(np.float64))
    return u[:, : len(root)] * root, root[:, None] * vt[: len(root)], np.array([squares[rank:].sum(), squares.sum()])


def _norm(a: np.ndarray, b: np.ndarray) -> float:
    """``‖a b‖``, from QR: the product is never formed."""
    (_, ra), (_, rb) = np.linalg.qr(a), np.linalg.qr(b.T)
    return float(np.linalg.norm(ra @ rb.T))


def _ratio(squares: np.ndarray) -> float:
    off, wanted = squares
    return math.sqrt(off / wanted) if wanted else math.sqrt(off)


def _fold(key: Array, text: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(text.encode()))
