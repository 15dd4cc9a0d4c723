"""Several adapters on one base: one more axis of a leaf.

    params, forward = adapters.stack({"fr": french, "de": german}, forward)
    params = adapters.use(params, "de")                       # one for all rows; nothing recompiles
    forward(params, tokens, pj.Ports(adapter=jnp.array([0, 1, -1])))   # one a row; -1 is the base alone

The adapters must be LoRA leaves on the same base, quantised or not; a DyLoRA counts as the LoRA that it is at its rank
in use.  Their ranks, scales and target modules may differ: an adapter that leaves a module alone has rank 0 there.
Prompts and prefixes stack too, where all have them, under one name and of one length: one batch then mixes tasks whose
prefixes are stored side by side.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Params, Path, Ports
from peft_jax.methods.dylora import DyLoRA, shorten
from peft_jax.methods.lora import LoRA
from peft_jax.methods.prefix_tuning import Reparametrised
from peft_jax.ports import Stored
from peft_jax.weights import Leaf, Weight, innermost, is_weight, static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Adapters(Weight):
    """``base`` under one of n adapters: `several` is a LoRA leaf without a base whose arrays carry n after the
    leaf's leading axes (a ``[*layers, n, in, r]``); `active` ``[*layers]`` is the one in use, −1 for none, or
    ``[*layers, batch]`` during a call whose rows each use their own."""

    base: Any
    several: Any
    active: Any
    names: tuple[str, ...] = static(default=())
    name: str = static(default="adapters")

    def pick(self, index: Array) -> LoRA:
        """One layer's leaf under one adapter."""
        # An index beyond the last gives NaN, which the training guard reports, not another adapter.
        one = lambda x: jnp.take(x, jnp.maximum(index, 0), axis=0, mode="fill")  # noqa: E731
        chosen = jax.tree.map(one, self.several)
        scale = jnp.where(index >= 0, chosen.scale, jnp.zeros_like(chosen.scale))
        return dataclasses.replace(chosen, base=self.base, scale=scale)

    def axes(self) -> dict[str, Any]:
        return {}  # `several` is a leaf, and speaks for itself

    def materialise(self) -> Array:
        if self.active.ndim:  # stacked layers
            return jax.lax.map(Adapters.materialise, self)
        return self.pick(self.active).materialise()

    def trained_size(self) -> int:
        return self.several.trained_size()

    def linear(self, x: Array) -> Array:
        return self._each(LoRA.linear, x)

    def embed(self, ids: Array) -> Array:
        return self._each(LoRA.embed, ids)

    def unembed(self, x: Array) -> Array:
        return self._each(LoRA.unembed, x)

    def _each(self, rule: Any, x: Array) -> Array:
        if self.active.ndim == 0:
            return rule(self.pick(self.active), x)
        if self.active.shape[0] != x.shape[0]:
            raise ValueError(f"ports.adapter names {self.active.shape[0]} rows and the batch has {x.shape[0]}")
        return jax.vmap(lambda index, row: rule(self.pick(index), row))(self.active, x)


def stack(adapted: Mapping[str, Params], forward: Forward, *, name: str = "adapters") -> tuple[Params, Forward]:
    """Puts several adapted trees of one base into one; the first adapter is in use.

    Args:
        adapted: parameter trees by adapter name, each of LoRA leaves (or bare arrays) on the same base.
        forward: the forward function that a method gave for one of them; of LoRA alone, the model's own does too.
        name: what tells this group from another.

    Raises:
        ValueError: if the trees differ in structure, in a base's shape or in their prompts' and prefixes' kinds and
            shapes, or hold leaves other than LoRA.
    """
    if not adapted:
        raise ValueError("no adapters to stack: give at least one tree by name")
    flat = {key: trees.leaves(params) for key, params in adapted.items()}
    first = next(iter(flat.values()))
    for key, found in flat.items():
        if missing := set(first) ^ set(found):
            raise ValueError(
                f"adapter {key!r} is on another base: {'/'.join(sorted(missing)[0])} is only in one of them"
            )

    def each(path: Path, leaf: Leaf) -> Leaf:
        mine = {key: shorten(w) if isinstance(w := found[path], DyLoRA) else w for key, found in flat.items()}
        for key, w in mine.items():
            base = w.base if isinstance(w, LoRA) else w
            if hasattr(base, "base"):
                raise ValueError(
                    f"adapter {key!r} has {type(w).__name__} at {'/'.join(path)}: only LoRA can be stacked"
                )
            if (kind := _kind(base)) != (like := _kind(innermost(leaf))):
                raise ValueError(f"adapter {key!r} is on another base: {'/'.join(path)} is {kind}, not {like}")
        if not any(isinstance(w, LoRA) for w in mine.values()):
            return leaf
        return _group(list(mine.values()), tuple(mine), name)

    def wrap(params: Params, ports: Ports) -> tuple[Params, Ports]:
        if ports.adapter is None:
            return params, ports

        def rows(path: Path, w: Any) -> Weight:
            if forward.spec.experts(path):
                raise ValueError(
                    f"{'/'.join(path)} holds experts, which meet tokens of many rows at once: an adapter a row is "
                    "not supported there, so choose one for all (adapters.use), or adapt other leaves"
                )
            active = jnp.broadcast_to(ports.adapter.astype(jnp.int32), (*w.active.shape, *ports.adapter.shape))
            return dataclasses.replace(w, active=active)

        return trees.rewrite(params, name, rows), ports

    first_tree = next(iter(adapted.values()))
    params = trees.map_leaves(each, first_tree)
    if any(tree.get("ports") for tree in adapted.values() if isinstance(tree, Mapping)):
        params |= {"ports": _stored({key: tree.get("ports", {}) for key, tree in adapted.items()}, name)}
    return params, forward.rewritten(wrap)


def _kind(base: Leaf) -> str:
    return f"{type(base).__name__ if is_weight(base) else 'an array'} of {tuple(base.shape)}"


def _stored(entries: Mapping[str, Any], name: str) -> Params:
    """The ports' entries of all trees in one."""
    (first, like), *others = entries.items()
    shapes = lambda tree: [(str(path), x.shape) for path, x in jax.tree.leaves_with_path(tree)]  # noqa: E731
    for key, entry in entries.items():
        if any(isinstance(w, Reparametrised) for w in trees.weights(entry)):
            raise ValueError(f"adapter {key!r} has a prefix that is still an MLP's output: methods.bake(params) first")
    for key, entry in others:
        if shapes(entry) != shapes(like):
            raise ValueError(
                f"adapters {first!r} and {key!r} differ in their prompts or prefixes, in name, kind or length: "
                "a stack holds alike ones"
            )
    each = lambda *w: Stored(jax.tree.map(lambda *x: jnp.stack(x), *w), jnp.int32(0), tuple(entries), name)  # noqa: E731
    return jax.tree.map(each, *entries.values(), is_leaf=is_weight)


def _group(mine: list[Leaf], names: tuple[str, ...], name: str) -> Adapters:
    """One leaf of several, padded to the largest rank, in the widest dtype."""
    loras = [w for w in mine if isinstance(w, LoRA)]
    base, like, rank = loras[0].base, loras[0], max(w.a.shape[-1] for w in loras)
    lead = like.scale.ndim
    dtype = functools.reduce(np.promote_types, (x.dtype for w in loras for x in (w.a, w.b)))

    def padded(w: Leaf) -> tuple[Array, Array, Array]:
        if not isinstance(w, LoRA):
            empty = (*like.a.shape[:-1], rank), (*like.b.shape[:-2], rank, like.b.shape[-1])
            return jnp.zeros(empty[0], dtype), jnp.zeros(empty[1], dtype), jnp.zeros_like(like.scale)
        short, none = (0, rank - w.a.shape[-1]), ((0, 0),) * lead
        a, b = jnp.pad(w.a, (*none, (0, 0), short)), jnp.pad(w.b, (*none, short, (0, 0)))
        return a.astype(dtype), b.astype(dtype), w.scale

    a, b, scale = (jnp.stack(parts, lead) for parts in zip(*map(padded, mine), strict=True))
    ranks = tuple(r for w in mine for r in (w.ranks if isinstance(w, LoRA) else (0,) * len(like.ranks)))
    several = LoRA(None, a, b, scale, ranks=ranks, name=f"{name}.lora")
    return Adapters(base, several, jnp.zeros(like.scale.shape, jnp.int32), names, name)


def use(params: Params, adapter: str | int, *, name: str = "adapters") -> Params:
    """Switches to one adapter, by name or index; −1 is the base alone.  Nothing recompiles.

    Raises:
        ValueError: if there is no such adapter, or no stack of this name.
    """
    if not any(isinstance(w, Adapters | Stored) and w.name == name for w in trees.weights(params)):
        raise ValueError(f"this tree holds no stack of adapters called {name!r}: see adapters.stack")

    def each(path: Path, w: Any) -> Weight:
        if isinstance(adapter, str) and adapter not in w.names:
            raise ValueError(f"there is no adapter {adapter!r}: there are {', '.join(w.names)}")
        index = w.names.index(adapter) if isinstance(adapter, str) else adapter
        if not -1 <= index < len(w.names):
            raise ValueError(f"there is no adapter {index}: there are {len(w.names)}, and -1 for the base alone")
        return dataclasses.replace(w, active=jnp.full_like(w.active, index))

    chosen = trees.rewrite(params, name, each)
    if "ports" in chosen:
        mine = lambda w: each((), w) if isinstance(w, Stored) and w.name == name else w  # noqa: E731
        chosen |= {"ports": trees.map_weights(mine, chosen["ports"])}
    return chosen
