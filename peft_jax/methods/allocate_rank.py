"""AdaLoRA's allocation of ranks, as an optimiser round the whole optimiser (Zhang et al. 2023, arXiv 2303.10512).

    tx = pj.freeze(methods.allocate_rank(optax.adamw(1e-3), steps=1000), params)

At each step t = 0, 1, …, of every number w with gradient g (of the loss and the penalty γR):

    I = |w g|        Ī = β₁ Ī + (1−β₁) I        Ū = β₂ Ū + (1−β₂) |I − Ī|
    S = Ī Ū of λᵢ, plus the means of Ī Ū over Pᵢ and over Qᵢ: a triplet's importance

and λᵢ = 0 for the least important triplets of all matrices and layers, so many that the budget b(t) is kept:

    b₀                                          up to tᵢ, and nothing is pruned
    ⌊b* + (b₀−b*) (1 − (t−tᵢ)/(T−tᵢ−t_f))³⌋     then, pruning every ΔT steps; a pruned λ may grow again between
    b*                                          from T−t_f on, pruning every step, by the importances of T−t_f−1

b₀ is how many triplets there are and b* the target rank times how many matrices.  Pruning is part of the update that
comes out, −λ, so there is no call to forget.

The place: round everything that makes an update, ``allocate_rank(optax.chain(clip, adamw))``, and inside what repeats
or skips whole steps, ``optax.MultiSteps(allocate_rank(…), k)``, ``optax.apply_if_finite(allocate_rank(…), n)``.  What
follows it in an `optax.chain` would change −λ: `training.init_state` and `training.fit` refuse that, and a tree that
trains without it.  Round `optax.MultiSteps` it would count micro-steps.

Source: sections 3.2 and 3.3, algorithm 1; loralib/adalora.py; HF PEFT tuners/adalora/layer.py (``RankAllocator``).

Departures: importances are computed from the weights after the step, as both codes do (algorithm 1: before it), and
the budget is the codes' (equation 14 jumps); at T−t_f HF PEFT prunes and the authors' code only where ΔT divides it:
here as HF PEFT.  No triplet is pruned where b = b₀ (HF PEFT raises).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Params, Path
from peft_jax.methods.adalora import SVD, Allocation, Triplets, found
from peft_jax.weights import Leaf

FORMS, ORDERS, SCORES = ("code", "paper"), ("code", "paper"), ("full", "sensitivity", "magnitude")


def orthogonality(params: Params, form: str = "code") -> Array:
    """R, how far P and Q are from orthogonal, over all adapted matrices of a tree or of its trained half.

    form 'code'     the mean over all P and Q of ‖PᵀP − I‖, ‖QQᵀ − I‖ (Frobenius), as both codes have it
    form 'paper'    the sum of their squares (equation 4)

    The two differ in size, so γ does not carry over from one to the other.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.numpy.eye(64)}}
    >>> params, forward = methods.adalora(rank=4, select="q_proj")(jax.random.key(0), params, forward)
    >>> round(float(methods.orthogonality(params)), 1)  # √6 for small vectors
    2.4
    """
    _choose("form", form, FORMS)
    return _penalty(_leaves(params), {name: _triplets(w) for name, w in found(params).items()}, form)


def allocate_rank(
    tx: trees.Optimiser,
    steps: int,
    *,
    initial_steps: int | None = None,
    final_steps: int | None = None,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.1,
    form: str = "code",
    order: str = "code",
    score: str = "full",
) -> optax.GradientTransformationExtraArgs:
    """The optimiser `tx`, with AdaLoRA's penalty before it and its pruning after it.

    What is not AdaLoRA's passes through.  The budget is an array, so its changes recompile nothing.

    Args:
        tx: the whole optimiser: clipping, rates, decay.
        steps: T, how many optimiser steps the run has.
        initial_steps: tᵢ, without pruning; by default an eighth of `steps`.
        final_steps: t_f, at the target; by default half of them.  With 0, the run may end above its budget.
        every: ΔT.
        beta1, beta2: β₁ and β₂.
        orthogonality: γ, of the penalty whose gradient is added; in the form that `form` names.
        form: 'code' or 'paper', as in `methods.orthogonality`.
        order: importances from the weights after the step ('code') or before it ('paper').
        score: 'full'; or the paper's ablations, 'sensitivity' (I in place of Ī Ū) and 'magnitude' (|λ| alone).

    Raises:
        ValueError: on a schedule that leaves no step to prune in, or an argument out of range; when it is used, on a
            tree without SVD leaves, or a `tx` that changes nothing.
    """
    initial = steps // 8 if initial_steps is None else initial_steps
    final = steps // 2 if final_steps is None else final_steps
    if steps < 1 or initial < 0 or final < 0 or initial + final >= steps:
        raise ValueError(
            f"initial_steps {initial} and final_steps {final} leave none of the {steps} steps to prune in: give a sum "
            "below steps"
        )
    if every < 1:
        raise ValueError(f"every is {every}: give the steps between two prunings, 1 or more")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    if not 0 <= orthogonality < float("inf"):
        raise ValueError(f"orthogonality must not be negative, got {orthogonality}")
    for name, value, known in (("form", form, FORMS), ("order", order, ORDERS), ("score", score, SCORES)):
        _choose(name, value, known)
    wrapped = trees.transformation(tx)

    def init(params: Params) -> Allocation:
        leaves = _leaves(params)
        zeros = {name: jax.tree.map(_zeros, _triplets(w)) for name, w in leaves.items()}
        scores = {name: jnp.copy(zero.values) for name, zero in zeros.items()}
        kept = {name: jnp.asarray(w.used) for name, w in leaves.items()}
        start, again, inner = jnp.int32(_budgets(leaves)[0]), jax.tree.map(jnp.copy, zeros), wrapped.init(params)
        if any(map(_repeats, jax.tree.leaves(inner, is_leaf=_repeats))):
            raise ValueError(
                "allocate_rank would count micro-steps: give optax.MultiSteps(allocate_rank(tx, steps), k)"
            )
        return Allocation(jnp.int32(0), start, zeros, again, scores, kept, inner)

    def update(grads: Params, state: Allocation, params: Params | None = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("allocate_rank needs the parameters: tx.update(grads, state, params)")
        leaves, t = _leaves(params), state.count
        if orthogonality:
            grads = _with_penalty(grads, leaves, orthogonality, form)
        updates, inner = wrapped.update(grads, state.inner, params, **extra)
        if all(u is g for u, g in zip(*map(jax.tree.leaves, (updates, grads)), strict=True)):
            raise ValueError("allocate_rank is round an optimiser that changes nothing: put the whole optimiser inside")

        after = found(params if order == "paper" else trees.apply_updates(params, updates))
        measured = _measure(state, after, found(grads), (beta1, beta2), score)
        before = (state.sensitivity, state.uncertainty, state.scores)
        frozen = t >= steps - final
        mean, spread, scores = jax.tree.map(lambda new, old: jnp.where(frozen, old, new), measured, before)

        start, end = _budgets(leaves)
        budget = start - jnp.sum(_falls(start, end, initial, steps - final) <= t, dtype=jnp.int32)
        pruning = ((t > initial) & (t % every == 0)) | frozen
        kept = _most_important(scores, leaves, start - budget)
        kept = jax.tree.map(lambda new, old: jnp.where(pruning, new, old), kept, state.kept)

        def prune(name: str, w: SVD) -> SVD:
            old, pruned = leaves[name].values, pruning & ~kept[name] & leaves[name].used
            wide = np.promote_types(old.dtype, w.values.dtype)  # in which −λ is exact
            return dataclasses.replace(w, values=jnp.where(pruned, -old.astype(wide), w.values.astype(wide)))

        return _changed(updates, prune), Allocation(t + 1, budget, mean, spread, scores, kept, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: choose {', '.join(map(repr, known))}")


def _repeats(state: Any) -> bool:
    return isinstance(state, optax.MultiStepsState)


# -- leaves -----------------------------------------------------------------------------------------------------------


def _leaves(params: Params) -> dict[str, SVD]:
    leaves = found(params)
    if not leaves:
        raise ValueError("the tree holds no SVD leaf: apply methods.adalora before its penalty or its optimiser")
    return leaves


def _triplets(w: SVD) -> Triplets:
    return Triplets(w.q, w.values, w.p)


def _changed(tree: Any, fn: Callable[[str, SVD], SVD]) -> Any:
    """The tree with `fn(name, leaf)` in place of each SVD leaf, named as `found` names it."""

    def each(path: Path, leaf: Leaf) -> Leaf:
        change = lambda w: fn("/".join((*path, w.name)), w) if isinstance(w, SVD) else w  # noqa: E731
        return trees.map_weights(change, leaf)

    return trees.map_leaves(each, tree)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def _zeros(x: Array) -> Array:
    return jnp.zeros_like(x, jnp.float32)


# -- the penalty ------------------------------------------------------------------------------------------------------


def _penalty(leaves: dict[str, SVD], triplets: dict[str, Triplets], form: str) -> Array:
    total, matrices = jnp.float32(0), 0
    for name, w in leaves.items():
        q, p, used = _wide(triplets[name].q), _wide(triplets[name].p), w.used
        identity = np.eye(used.shape[-1], dtype=np.float32) * used[..., None]
        pairs = used[..., None] & used[..., None, :]
        for gram in (jnp.matrix_transpose(q) @ q, p @ jnp.matrix_transpose(p)):
            squares = jnp.sum(jnp.square(jnp.where(pairs, gram - identity, 0)), (-2, -1))
            off = squares > 0  # the root has no slope at 0
            norms = jnp.where(off, jnp.sqrt(jnp.where(off, squares, 1)), 0)
            total += jnp.sum(norms if form == "code" else squares)
        matrices += 2 * _matrices(w)
    return total / matrices if form == "code" else total


def _with_penalty(grads: Params, leaves: dict[str, SVD], weight: float, form: str) -> Params:
    triplets = {name: _triplets(w) for name, w in leaves.items()}
    slopes = jax.grad(lambda triplets: weight * _penalty(leaves, triplets, form))(triplets)

    def add(name: str, w: SVD) -> SVD:
        q, p = (g + slope.astype(g.dtype) for g, slope in ((w.q, slopes[name].q), (w.p, slopes[name].p)))
        return dataclasses.replace(w, q=q, p=p)

    return _changed(grads, add)


# -- importance and budget --------------------------------------------------------------------------------------------


def _measure(
    state: Allocation, after: dict[str, SVD], grads: dict[str, SVD], betas: tuple[float, float], score: str
) -> tuple[dict[str, Triplets], dict[str, Triplets], dict[str, Array]]:
    """Ī, Ū, and every triplet's importance."""
    weights, slopes = ({name: _triplets(w) for name, w in tree.items()} for tree in (after, grads))
    mix = lambda beta: lambda old, new: beta * old + (1 - beta) * new  # noqa: E731
    now = jax.tree.map(lambda w, g: jnp.abs(_wide(w) * _wide(g)), weights, slopes)
    mean = jax.tree.map(mix(betas[0]), state.sensitivity, now)
    spread = jax.tree.map(mix(betas[1]), state.uncertainty, jax.tree.map(lambda i, m: jnp.abs(i - m), now, mean))
    if score == "magnitude":
        return mean, spread, {name: jnp.abs(_wide(w.values)) for name, w in weights.items()}
    each = now if score == "sensitivity" else jax.tree.map(jnp.multiply, mean, spread)
    return mean, spread, {name: s.values + (s.q.mean(-2) + s.p.mean(-1)) for name, s in each.items()}


def _most_important(scores: dict[str, Array], leaves: dict[str, SVD], pruned: Array) -> dict[str, Array]:
    """Which triplets lie above the `pruned`-th smallest importance, one threshold for all leaves and layers."""
    counted = {name: jnp.where(leaves[name].used, s, jnp.inf) for name, s in scores.items()}
    ranked = jnp.sort(jnp.concatenate([s.ravel() for s in counted.values()]))
    threshold = jnp.where(pruned > 0, ranked[jnp.maximum(pruned - 1, 0)], -jnp.inf)
    return {name: (s > threshold) & leaves[name].used for name, s in scores.items()}


def _matrices(w: SVD) -> int:
    """How many matrices a leaf adapts, those that have lost all triplets included."""
    return sum(map(bool, w.triplets))


def _budgets(leaves: dict[str, SVD]) -> tuple[int, int]:
    """b₀ and b*; a tree that is below its target already stays as it is."""
    start = sum(sum(w.ranks) for w in leaves.values())
    return start, min(start, sum(w.target * _matrices(w) for w in leaves.values()))


@functools.cache
def _falls(start: int, end: int, initial: int, final: int) -> np.ndarray:
    """The step of every fall of the budget by one: in Python's own floats, so that ⌊·⌋ is what both codes have."""
    falls, budget = list[int](), start
    for t in range(initial + 1, final + 1):
        now = int((start - end) * (1 - (t - initial) / (final - initial)) ** 3 + end)
        falls += [t] * (budget - now)
        budget = now
    return np.array(falls, np.int32)
