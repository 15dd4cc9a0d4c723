"""Leaves trained whole: biases, norms, embeddings, new heads, or (``unfreeze(".*")``) full fine-tuning."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params
from peft_jax.on_disk import read
from peft_jax.trees import Pattern, Site
from peft_jax.weights import Leaf, Unfrozen, innermost, is_weight, rebase


def unfreeze(select: Pattern, *, keep_base: bool = True, name: str = "unfreeze") -> Method:
    """Trains every leaf that `select` matches, whatever its kind, whole.

    Args:
        select: a pattern over the model's names (see `pj.select`); biases and norms are offered too.
        keep_base: keeps the loaded array beside the trained one, so that `pj.strip` works.  Without it a leaf costs
            its memory once, and strip raises.
        name: what tells this method from another of its kind in one chain.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.Forward(lambda params, inputs, ports: inputs.tokens * params["norm"]["scale"])
    >>> params = {"norm": {"scale": jax.numpy.ones(3)}, "kernel": jax.numpy.ones((3, 3))}
    >>> params, forward = methods.unfreeze("norm")(jax.random.key(0), params, forward)
    >>> pj.count(params)
    Count(trainable=3, frozen=9, bytes=60)
    """

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)
        found = trees.select(select, params, forward, adaptable=lambda site, leaf: True)
        return trees.map_leaves(lambda path, leaf: _unfreeze(found.get(path), leaf, keep_base, name), params)

    return Method(init, lambda forward: trees.bare(forward, name))


def _unfreeze(site: Site | None, leaf: Leaf, keep_base: bool, name: str) -> Leaf:
    if site is None:
        return leaf
    for other in trees.weights(leaf):
        if isinstance(other, Unfrozen):
            raise ValueError(f"{'/'.join(site.path)} is already trained whole, by the method named {other.name!r}")
    leaf = read(leaf)
    if is_weight(innermost(leaf)):
        kind = type(innermost(leaf)).__name__
        raise TypeError(
            f"{'/'.join(site.path)} is stored as {kind} and cannot be trained whole: leave it out of select"
        )
    rows = np.array(site.chosen).reshape(*site.lead[:1], -1)  # of the leaf's first axis
    if (rows.any(-1) != rows.all(-1)).any():
        raise ValueError(
            f"{'/'.join(site.path)} holds all experts of a layer, which train whole together: select all of them, or "
            "load the model with scan=False"
        )
    layers = None if rows.all() else tuple(int(i) for i in np.flatnonzero(rows.any(-1)))

    def train(base: Array) -> Unfrozen:
        # A copy: the trained array is donated by the training step, the base is not.
        value = jnp.copy(base) if layers is None else base[jnp.array(layers)]
        return Unfrozen(base if keep_base or layers else None, value, layers, name)

    return rebase(leaf, train)
