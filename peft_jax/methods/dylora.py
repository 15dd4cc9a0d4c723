"""DyLoRA: LoRA that works at every rank up to its own (Valipour et al. 2022, arXiv 2210.07558).

    y = x W + α/b · x A[:, :b] B[:b]        b drawn anew at each optimiser step, one for all layers

A ``[in, R]`` and B ``[R, out]`` start as LoRA's at the largest rank R.  A step trains the directions 1..b, or the b-th
alone (`frozen`); in time the first directions learn what matters most.  Afterwards any b serves: the leaf computes at
the rank in use, R until `use_rank` says another, and `truncate` keeps b of its directions as plain LoRA.

Source: section 4 and its equation 7; huawei-noah/Efficient-NLP, DyLoRA/loralib and run_glue.py.  The code multiplies A
and B by √(R/b) each, and their product by α/R: together α/b.

Departures: the released scripts are the frozen mode with uniform ranks, which is ``frozen=True`` here; the default is
the other mode, the better one in the paper's ablation.  Their geometric distribution is not in the code: here it is cut
to the range, P(b) ∝ 0.85^b.  In both modes the directions left out of a step have a gradient of zero, and an optimiser
with momentum or decay still moves them, in the code as here: `hold_rows` stops that.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Path, Ports, chain
from peft_jax.methods.lora import QUERY_VALUE, LoRA, lora
from peft_jax.methods.pissa import Residual
from peft_jax.ports import key_of
from peft_jax.trees import Pattern
from peft_jax.weights import Leaf, Weight

GEOMETRIC = 0.15  # the paper's p


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DyLoRA(LoRA):
    """A LoRA leaf of rank `top` that acts as one of rank `active`, both int32 ``[*layers]``; scale is α/top."""

    top: Any = None
    active: Any = None

    def cut(self) -> LoRA:
        """The LoRA leaf of the rank in use, in arrays of full size: no shape depends on the rank."""
        used = jax.lax.broadcasted_iota(jnp.int32, (*self.active.shape, self.a.shape[-1]), self.active.ndim)
        a = jnp.where(used[..., None, :] < self.active[..., None, None], self.a, 0)  # then B's rows have no part either
        scale = scale_at(self.scale, self.top, self.active)
        return LoRA(self.base, a, self.b, scale, self.key, self.rate, self.ranks, self.name)

    def materialise(self) -> Array:
        return self.cut().materialise()

    def linear(self, x: Array) -> Array:
        return self.cut().linear(x)

    def embed(self, ids: Array) -> Array:
        return self.cut().embed(ids)

    def unembed(self, x: Array) -> Array:
        return self.cut().unembed(x)


def scale_at(scale: Array, top: Array, rank: Array) -> Array:
    """α/rank, from α/top; exact where α is a whole number."""
    top, rank = (jnp.maximum(n, 1).astype(scale.dtype) for n in (top, rank))  # 0 where a layer has no adapter
    whole = jnp.round(scale * top)
    return jnp.where(whole / top == scale, whole / rank, scale * (top / rank))


def dylora(
    max_rank: int = 8,
    alpha: float | None = None,
    select: Pattern = QUERY_VALUE,
    *,
    min_rank: int = 1,
    distribution: str = "uniform",
    frozen: bool = False,
    name: str = "dylora",
    **options: Any,
) -> Method:
    """LoRA trained for every rank of a range at once.

    Training draws the rank from the call's `step_key`, which is the same on every micro-batch and device; a call
    without one computes at the rank in use.  Of layers with a smaller rank of their own, all directions are used.

    Args:
        max_rank: R.
        alpha: α; by default `max_rank`.  The scale is α/b.
        select: a pattern over the model's names (see `pj.select`).
        min_rank: the smallest rank that is drawn.
        distribution: 'uniform', or 'geometric', which draws small ranks more often.
        frozen: a step trains the b-th direction alone, and not those before it.
        options: those of `methods.lora`, but for `rslora`.

    Raises:
        ValueError: on a rank, distribution or option out of range, and as `methods.lora` does.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.numpy.eye(16)}}
    >>> params, forward = methods.dylora(max_rank=4, alpha=8)(jax.random.key(0), params, forward)
    >>> pj.count(params).trainable == 4 * (16 + 16)
    True
    >>> plain = methods.truncate(params, 2)["q_proj"]["kernel"]
    >>> plain.a.shape, float(plain.scale)
    ((16, 2), 4.0)
    """
    if options.get("rslora"):
        raise ValueError("rslora is not for dylora(), whose scale is alpha/b: leave it out")
    adapted = lora(max_rank, alpha, select, name=name, **options)
    if not 1 <= min_rank <= max_rank or min_rank != int(min_rank):
        raise ValueError(f"min_rank is {min_rank}: give an integer from 1 to max_rank, {max_rank}")
    for pattern, rank in (options.get("rank_pattern") or {}).items():
        if rank > max_rank:
            raise ValueError(f"rank_pattern gives {pattern!r} the rank {rank}, above max_rank, {max_rank}")
    if distribution not in ("uniform", "geometric"):
        raise ValueError(f"distribution is {distribution!r}: choose 'uniform' or 'geometric'")
    logits = math.log(1 - GEOMETRIC) * np.arange(max_rank - min_rank + 1) * (distribution == "geometric")

    def init(key: Array, params: Params, forward: Forward) -> Params:
        def extend(path: Path, w: Leaf) -> Leaf:
            if not isinstance(w, LoRA):  # a bias that trains along
                return w
            top = jnp.array(w.ranks, jnp.int32).reshape(w.scale.shape)
            return DyLoRA(w.base, w.a, w.b, w.scale, ranks=w.ranks, name=name, top=top, active=jnp.copy(top))

        return trees.rewrite(params, name, extend)

    def draw(params: Params, ports: Ports) -> tuple[Params, Ports]:
        if ports.step_key is None:
            return params, ports
        drawn = jax.random.categorical(key_of(ports.step_key, name), jnp.array(logits, jnp.float32))
        rank = min_rank + drawn.astype(jnp.int32)

        def give(path: Path, w: Weight) -> Weight:
            if not isinstance(w, DyLoRA):  # truncated
                return w
            w = dataclasses.replace(w, active=jnp.minimum(w.top, rank))
            return _but_the_last_stopped(w) if frozen else w

        return trees.rewrite(params, name, give), ports

    return chain(adapted, Method(init, lambda forward: forward.rewritten(draw)))


def _but_the_last_stopped(w: DyLoRA) -> DyLoRA:
    """The same leaf, of which only the last direction in use has a gradient."""
    index = jax.lax.broadcasted_iota(jnp.int32, (*w.active.shape, w.a.shape[-1]), w.active.ndim)
    last = index == w.active[..., None] - 1
    stop = jax.lax.stop_gradient
    a = jnp.where(last[..., None, :], w.a, stop(w.a))
    return dataclasses.replace(w, a=a, b=jnp.where(last[..., None], w.b, stop(w.b)))


# -- any rank, once trained -------------------------------------------------------------------------------------------


def use_rank(params: Params, rank: int | Array, name: str | None = None) -> Params:
    """The same tree, computing at another rank: of every DyLoRA leaf, or of those called `name`.  Nothing recompiles.

    `rank` may be a JAX array, so that `jax.vmap` tries every rank at once; only a number is checked.

    Raises:
        ValueError: if there is no such leaf, or on a rank below 1 or above the largest, with its path.
    """
    _check(params, rank, name, DyLoRA)
    use = lambda w: dataclasses.replace(w, active=jnp.minimum(w.top, jnp.asarray(rank, jnp.int32)))  # noqa: E731
    return trees.map_weights(lambda w: use(w) if _is_meant(w, name, DyLoRA) else w, params)


def truncate(params: Params, rank: int, name: str | None = None) -> Params:
    """Plain LoRA leaves of a smaller rank: the first `rank` directions, with the scale α/rank.

    Takes DyLoRA and LoRA leaves; layers of a smaller rank keep theirs.  The result merges, saves and trains on like any
    LoRA, through the same forward function.

    Args:
        params: the tree.
        rank: b, from 1 to the largest rank here.
        name: restricts it to the leaves of the method called so.

    Raises:
        ValueError: if there is no such leaf, or on a rank below 1 or above the largest, with its path; on PiSSA and
            OLoRA, whose base lacks what all their directions together put back.
    """
    _check(params, rank, name, LoRA)
    return trees.map_weights(lambda w: shorten(w, rank) if _is_meant(w, name, LoRA) else w, params)


def shorten(w: Any, rank: int | None = None) -> LoRA:
    """The plain LoRA leaf of a DyLoRA or LoRA leaf; by default of the rank in use."""
    rank = int(np.max(w.active)) if rank is None else rank
    ranks = tuple(min(r, rank) for r in w.ranks)
    top, new = (jnp.array(r, jnp.int32).reshape(w.scale.shape) for r in (w.ranks, ranks))
    a, b = w.a[..., :rank], w.b[..., :rank, :]
    return LoRA(w.base, a, b, scale_at(w.scale, top, new), w.key, w.rate, ranks, w.name)


def _is_meant(w: Leaf, name: str | None, kind: type[LoRA]) -> bool:
    return isinstance(w, kind) and (name is None or w.name == name)


def _check(params: Params, rank: int | Array, name: str | None, kind: type[LoRA]) -> None:
    largest, where = 0, ""
    for path, leaf in trees.leaves(params).items():
        for w in (w for w in trees.weights(leaf) if _is_meant(w, name, kind)):
            assert isinstance(w, LoRA)
            if kind is LoRA and isinstance(w.base, Residual):
                raise ValueError(f"{'/'.join(path)} is no LoRA on its whole base: merge it, do not truncate it")
            if max(w.ranks) > largest:
                largest, where = max(w.ranks), "/".join(path)
    if not largest:
        called = "" if name is None else f" called {name!r}"
        raise ValueError(
            f"this tree holds no {kind.__name__} leaf{called}: apply methods.{kind.__name__.lower()} first"
        )
    if not isinstance(rank, jax.Array) and not 1 <= rank <= largest:
        raise ValueError(f"the rank {rank} is not one of 1 to {largest}, which {where} has")


# -- the optimiser ----------------------------------------------------------------------------------------------------


def hold_rows(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimiser that leaves alone what took no part in a DyLoRA step: momentum and decay pass it by.

    A direction, a column of A with its row of B, has taken part in a layer's step if any of its gradient is not zero;
    the leaf's mask makes the others' exactly so.  Their moments see that zero, as without this wrapper.  It goes round
    the whole optimiser, and inside `optax.MultiSteps`, whose summed gradient says what took part; everything else moves
    as `tx` has it.

    >>> import optax
    >>> from peft_jax import methods
    >>> tx = methods.hold_rows(optax.adamw(1e-3, weight_decay=0.1))  # then: tx = pj.freeze(tx, params)
    """
    inner = optax.with_extra_args_support(tx)

    def update(grads: Params, state: optax.OptState, params: Params | None = None, **extra: Any) -> Any:
        updates, state = inner.update(grads, state, params, **extra)
        return _held(updates, grads), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _held(updates: Any, grads: Any) -> Any:
    def each(update: Any, grad: Any) -> Any:
        if not isinstance(update, DyLoRA) or update.a is None:
            return update
        moves = jnp.any(grad.a != 0, -2) | jnp.any(grad.b != 0, -1)  # [*layers, r]
        a = jnp.where(moves[..., None, :], update.a, 0)
        b = jnp.where(moves[..., None], update.b, 0)
        return dataclasses.replace(update, a=a, b=b, base=_held(update.base, grad.base))

    return jax.tree.map(each, updates, grads, is_leaf=lambda node: isinstance(node, DyLoRA))
