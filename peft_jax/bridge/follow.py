"""A typed leaf on its way through a function: which array a variable stands for, as a rearrangement of the leaf's."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax import trees
from peft_jax.views import view_of
from peft_jax.weights import Leaf, Weight, materialise, static

KINDS = ("layers", "in", "out", "own")  # the order of a leaf's axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Nothing(Weight):
    """The leaf of a parameter that is followed for its axes alone."""


class NotFollowed(Exception):
    """Raised by a rule that does not know a use: the message says what is wrong with it."""


class Axis(NamedTuple):
    """A part of a leaf's axis: of which kind, where among its kind (a part of a part is longer), and how long."""

    kind: str
    place: tuple[int, ...]
    size: int


Dims = tuple[tuple[Axis, ...], ...]  # of each dimension of a variable, the axes that it runs over; () is of size 1


def sizes(dims: Sequence[Sequence[Axis]]) -> tuple[int, ...]:
    return tuple(math.prod(axis.size for axis in dim) for dim in dims)


def in_order(axes: Sequence[Axis]) -> list[Axis]:
    return sorted(axes, key=lambda axis: (KINDS.index(axis.kind), axis.place))


def reordered(x: Array, trailing: int, axes: Sequence[Axis], wanted: Sequence[Axis]) -> Array:
    """`x`, whose last `trailing` dimensions run over `axes`, with a dimension for each, in the `wanted` order."""
    lead = x.shape[: x.ndim - trailing]
    x = reshape(x, (*lead, *(axis.size for axis in axes)))
    return transpose(x, (*range(len(lead)), *(len(lead) + list(axes).index(axis) for axis in wanted)))


def reshape(x: Array, shape: Sequence[int]) -> Array:
    return x if x.shape == tuple(shape) else x.reshape(tuple(shape))


def transpose(x: Array, order: Sequence[int]) -> Array:
    return x if tuple(order) == tuple(range(x.ndim)) else jnp.transpose(x, order)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Followed:
    """The array ``[*dims]`` in place of which a function is given a typed leaf: the leaf's, rearranged and cast.

    leaf    the leaf, whose leading axes are the axes of the kind "layers" in `dims`
    dims    the axes that each dimension runs over
    dtype   the array's
    path    where the leaf lies in the tree, for messages
    """

    leaf: Any
    dims: Dims = dataclasses.field(default=(), metadata={"static": True})
    dtype: Any = dataclasses.field(default=None, metadata={"static": True})
    path: str = static(default="")

    @property
    def shape(self) -> tuple[int, ...]:
        return sizes(self.dims)

    @property
    def axes(self) -> list[Axis]:
        return [axis for dim in self.dims for axis in dim]

    def array(self) -> Array:
        """The array itself: the leaf multiplied out."""
        axes = in_order(self.axes)
        whole = materialise(self.leaf)
        return reshape(reordered(whole, whole.ndim, axes, self.axes), self.shape).astype(self.dtype)

    def to(self, dims: Dims, **changes: Any) -> "Followed":
        return dataclasses.replace(self, dims=dims, **changes)

    # -- rearranging: the leaf stays, the dimensions move --

    def transposed(self, order: Sequence[int]) -> "Followed":
        return self.to(tuple(self.dims[i] for i in order))

    def squeezed(self, dimensions: Sequence[int]) -> "Followed":
        here: Followed = self
        for axis in [axis for i in dimensions for axis in self.dims[i]]:
            here = here.without(axis)
        return here.to(tuple(dim for i, dim in enumerate(here.dims) if i not in dimensions))

    def reshaped(self, shape: Sequence[int]) -> "Followed":
        """Other dimensions over the same numbers in the same order; an axis may be cut in parts."""
        here: Followed = self
        for axis in [axis for axis in self.axes if axis.size == 1 and axis.kind != "own"]:
            here = here.without(axis)
        rest, dims = here.axes, list[tuple[Axis, ...]]()
        for size in shape:
            dim: list[Axis] = []
            while rest and rest[0].size == 1:
                dim.append(rest.pop(0))
            while (left := size // math.prod(axis.size for axis in dim)) > 1:
                axis = rest.pop(0)
                if axis.size > left and axis.size % left == 0:
                    rest.insert(0, Axis(axis.kind, (*axis.place, 1), axis.size // left))
                    axis = Axis(axis.kind, (*axis.place, 0), left)
                elif left % axis.size:
                    raise NotFollowed(f"the reshape to {tuple(shape)} cuts across its axes")
                dim.append(axis)
            dims.append(tuple(dim))
        if sizes(dims) != tuple(shape):
            raise NotFollowed(f"the reshape to {tuple(shape)} cuts across its axes")
        return here.to(tuple(dims))

    def expanded(self, shape: Sequence[int], where: Sequence[int]) -> "Followed":
        """New dimensions of size 1: dimension i becomes ``where[i]``."""
        dims: list[tuple[Axis, ...]] = [()] * len(shape)
        for dim, to in zip(self.dims, where, strict=True):
            dims[to] = dim
        if sizes(dims) != tuple(shape):
            raise NotFollowed(f"it is repeated, to {tuple(shape)}")
        return self.to(tuple(dims))

    def without(self, axis: Axis) -> "Followed":
        """Without an axis of size 1."""
        if axis.kind == "layers":
            return self.layer(axis, lambda x, at: jax.lax.squeeze(x, (at,)))
        return self.to(tuple(tuple(a for a in dim if a != axis) for dim in self.dims))

    def layer(self, axis: Axis, take: Callable[[Array, int], Array]) -> "Followed":
        """Without an axis of layers, which ``take(array, axis)`` takes out of every array of the leaf."""
        at = [a for a in in_order(self.axes) if a.kind == "layers"].index(axis)
        sliced, shared = trees.unshare(self.leaf)
        leaf = trees.fill(jax.tree.map(lambda x: take(x, at), sliced), shared)
        return self.to(tuple(tuple(a for a in dim if a != axis) for dim in self.dims), leaf=leaf)

    def step(self, eqn: Any) -> "Followed":
        """As one step of a loop has it, which slices the first dimension: all but the leaf's arrays."""
        first = min((axis for axis in self.axes if axis.kind == "layers"), default=None)
        if first is None or self.dims[0] != (first,):
            raise NotFollowed(
                "it is sliced along an axis that is none of its layers: forward.traced(params, inputs) finds those"
            )
        return self.to(self.dims[1:])


def start(path: str, leaf: Leaf) -> Followed:
    """A leaf as the function's own parameter, in the shape that its model gave it."""
    view = view_of(leaf)
    own, inputs, outputs = (leaf.shape[-2:], (0,), (1,)) if view is None else (view.own, view.inputs, view.outputs)
    lead = leaf.shape[:-2]
    dims: list[tuple[Axis, ...]] = [(Axis("layers", (i,), size),) for i, size in enumerate(lead)]
    for axis, size in enumerate(own):
        kind, among = ("in", inputs) if axis in inputs else ("out", outputs)
        dims.append((Axis(kind, (among.index(axis),), size),) if size > 1 else ())
    return Followed(leaf, tuple(dims), jnp.dtype(leaf.dtype), path)
