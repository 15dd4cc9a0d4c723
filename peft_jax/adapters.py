"""Several adapters on one base, side by side in one leaf (`peft_jax.methods.slora`), with prompts and prefixes.

    params, forward = adapters.stack({"fr": french, "de": german}, forward)
    params = adapters.use(params, "de")                       # one for all rows; nothing recompiles
    forward(params, tokens, pj.Ports(adapter=jnp.array([0, 1, -1])))   # one a row; -1 is the base alone

The adapters must be LoRA, DyLoRA, AdaLoRA or VeRA leaves on the same base, quantised or not.  Their kinds, ranks,
scales and target modules may differ: an adapter that leaves a module alone has rank 0 there.
Prompts and prefixes stack too, where all have them, under one name and of one length: one batch then mixes tasks whose
prefixes are stored side by side.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax import trees
from peft_jax.core import Forward, Params
from peft_jax.methods.directions import is_adapter
from peft_jax.methods.prefix_tuning import Reparametrised
from peft_jax.methods.slora import Adapters, by_row, side_by_side
from peft_jax.ports import Stored
from peft_jax.weights import is_weight


def stack(adapted: Mapping[str, Params], forward: Forward, *, name: str = "adapters") -> tuple[Params, Forward]:
    """Puts several adapted trees of one base into one; the first adapter is in use.

    Args:
        adapted: parameter trees by adapter name, as `methods.slora` takes them, prompts and prefixes beside them.
        forward: the forward function that a method gave for one of them; without ports, the model's own does too.
        name: what tells this group from another.

    Raises:
        ValueError: if the trees differ in structure, in their base or in their prompts' and prefixes' kinds and
            shapes, or hold leaves other than `methods.slora` takes.
    """
    if not adapted:
        raise ValueError("no adapters to stack: give at least one tree by name")
    first = next(iter(adapted.values()))
    bare = trees.map_leaves(lambda path, w: w.base if is_adapter(w) else w, first)
    params = side_by_side(adapted, trees.without_added(bare), name)
    if any(tree.get("ports") for tree in adapted.values() if isinstance(tree, Mapping)):
        params |= {"ports": _stored({key: tree.get("ports", {}) for key, tree in adapted.items()}, name)}
    return params, by_row(forward, name)


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


def use(params: Params, adapter: str | int, *, name: str | None = None) -> Params:
    """Switches to one adapter, by name or index; −1 is the base alone.  Nothing recompiles.

    Args:
        params: a tree that `stack` or `methods.slora` made.
        adapter: which one.
        name: of the group that is meant; by default all that the tree holds.

    Raises:
        ValueError: if there is no such adapter, or no group of this name.
    """
    stacks = [w for w in trees.weights(params) if isinstance(w, Adapters | Stored)]
    meant = {w.name for w in stacks if name in (None, w.name)}
    if not meant:
        called = "" if name is None else f" called {name!r}"
        raise ValueError(f"this tree holds no stack of adapters{called}: see adapters.stack and methods.slora")

    def each(w: Any) -> Any:
        if not isinstance(w, Adapters | Stored) or w.name not in meant:
            return w
        if isinstance(adapter, str) and adapter not in w.names:
            raise ValueError(f"there is no adapter {adapter!r}: there are {', '.join(w.names)}")
        index = w.names.index(adapter) if isinstance(adapter, str) else adapter
        if not -1 <= index < len(w.names):
            raise ValueError(f"there is no adapter {index}: there are {len(w.names)}, and -1 for the base alone")
        return dataclasses.replace(w, active=jnp.full_like(w.active, index))

    return trees.map_weights(each, params)
