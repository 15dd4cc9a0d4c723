"""A kernel of any shape, seen as the matrix ``[in, out]`` that it multiplies by, without a copy."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.weights import Leaf, Unfrozen, Weight, base_of, embed, is_weight, linear, materialise, static, unembed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class View(Weight):
    """``base`` in the shape that its model gave it, e.g. ``[width, heads, dim]``, as a matrix ``[*layers, in, out]``.

    `inputs` and `outputs` name axes of one layer's array, in the order in which the matrix has them; the layers' axes
    come before them.  `own` is one layer's shape.  The base is an array of that shape (or one that trains whole), or a
    leaf that stores the matrix itself, in few bits: `packed`.

    >>> import jax.numpy as jnp
    >>> from peft_jax.views import View
    >>> query = View(jnp.arange(24.0).reshape(2, 3, 4), inputs=(0,), outputs=(1, 2), own=(2, 3, 4))
    >>> query.shape, query.materialise().shape
    ((2, 12), (2, 12))
    """

    base: Any
    inputs: tuple[int, ...] = static(default=(0,))
    outputs: tuple[int, ...] = static(default=(1,))
    own: tuple[int, ...] = static(default=())

    @property
    def matrix(self) -> tuple[int, int]:
        inputs, outputs = (math.prod(self.own[axis] for axis in axes) for axes in (self.inputs, self.outputs))
        return inputs, outputs

    @property
    def packed(self) -> bool:
        return is_weight(self.base) and not isinstance(self.base, Unfrozen)

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.base.shape[: len(self.base.shape) - (2 if self.packed else len(self.own))])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *self.matrix)

    def materialise(self) -> Array:
        array = materialise(self.base)
        if self.packed:
            return array
        lead, order = len(self.lead), (*self.inputs, *self.outputs)
        if order != tuple(sorted(order)):
            array = jnp.transpose(array, (*range(lead), *(lead + axis for axis in order)))
        return array.reshape(self.shape)

    def linear(self, x: Array) -> Array:
        return linear(x, self.base if self.packed else self.materialise())

    def embed(self, ids: Array) -> Array:
        return embed(ids, self.base if self.packed else self.materialise())

    def unembed(self, x: Array) -> Array:
        return unembed(x, self.base if self.packed else self.materialise())

    def restore(self, matrix: Array) -> Array:
        """An array of the base's own shape, from the matrix."""
        lead, order = matrix.shape[:-2], (*self.inputs, *self.outputs)
        parts = matrix.reshape(*lead, *(self.own[axis] for axis in order))
        back = sorted(range(len(order)), key=lambda i: order[i])
        return jnp.transpose(parts, (*range(len(lead)), *(len(lead) + i for i in back)))

    def over(self, base: Leaf) -> Leaf:
        """What is left of the leaf with another base in place of everything on it, the base's matrix: an array in the
        base's own shape, or this view of a leaf that is none."""
        return dataclasses.replace(self, base=base) if is_weight(base) else self.restore(base)


def view_of(leaf: Leaf) -> View | None:
    """The view in a leaf, if there is one."""
    while leaf is not None and not isinstance(leaf, View):
        leaf = base_of(leaf)
    return leaf
