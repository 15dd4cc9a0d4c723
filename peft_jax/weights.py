"""Typed leaves: what a parameter tree holds where a plain array used to be.

A `Weight` is a pytree that stands for one array.  Models never look inside it; they call three functions, each of which
dispatches on the leaf's type:

    linear(x, w)    [..., in] -> [..., out]     x W
    embed(ids, w)   [...] -> [..., out]         rows of W
    unembed(x, w)   [..., out] -> [..., in]     x Wᵀ (the head of a model with tied embeddings)

and one law binds them: ``linear(x, w) == x @ materialise(w)``.

Leaves nest: ``LoRA(base=NF4(...))`` is an adapter on a quantised base.  `rebase` reaches the innermost base, so that
``chain(lora, quantise)`` and ``chain(quantise, lora)`` agree.  Every array of a leaf carries the leaf's leading axes
(stacked layers), so `nn.scan` and `vmap` slice a leaf as they slice an array; the functions above take a leaf of a
single layer, `materialise` takes either.  What all layers share is kept once, outside the leaf (`Weight.shares`).

No leaf validates itself in ``__post_init__``: JAX builds leaves out of None, booleans and placeholders whenever it
maps over a tree.  Factories validate.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Leaf = Any  # an array, a Weight, or what stands in for one: jax.ShapeDtypeStruct, None in the hole of a partition


class Weight:
    """A typed leaf that stands for one array of `shape` ``[*layers, in, out]``.

    A subclass is a frozen dataclass registered by `jax.tree_util.register_dataclass`.  It names in `trains` the fields
    that an optimiser may move (a field called `base` answers for itself), and defines `materialise`; the
    other three rules have a default that materialises, which a leaf overrides when it can do better.

    It names in `shares` the fields whose arrays have no leading axes, because all layers (and all leaves of one method)
    use the same: None in the tree, where ``params["methods"][name]`` holds each once, and there during a call
    (`peft_jax.trees.share`).

    It names in `needs` the optimiser's state without which it does not train as its paper says, and what makes that.

    `axes` says how its arrays lie along the matrix, which is all that `peft_jax.sharding` has to know of it.
    """

    trains: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[type, str] | None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(base_of(self).shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return base_of(self).dtype

    def materialise(self) -> Array:
        raise TypeError(f"{type(self).__name__} does not say which array it stands for")

    def linear(self, x: Array) -> Array:
        return linear(x, self.materialise())

    def embed(self, ids: Array) -> Array:
        return embed(ids, self.materialise())

    def unembed(self, x: Array) -> Array:
        return unembed(x, self.materialise())

    def axes(self) -> dict[str, Any]:
        """Of the matrix's axes, ``in`` and ``out``, which the last axes of each own array run along; None is neither.

        By field, nested as the field is: ``{"a": ("in", None), "b": (None, "out")}``.  A mesh splits an array as it
        splits the matrix; what is not named lies whole on every device.
        """
        return {}

    def merged(self) -> Leaf:
        """What `pj.merge` leaves in an adapter's place: its array, unless its base can take it in and stay as it is."""
        return self.materialise()

    def trained_size(self) -> int:
        """How many numbers this leaf trains, its base apart; a leaf that pads its arrays counts less than it stores."""
        return sum(array.size for name in self.trains for array in jax.tree.leaves(getattr(self, name)))

    def numbers(self) -> tuple[int, int]:
        """(trainable, frozen) numbers as the model counts them: packed codes count as the numbers they stand for."""
        own = self.trained_size()
        if hasattr(self, "base") or not jax.tree.leaves(self):  # a base of None is the hole of a partition
            trained, frozen = (0, 0) if base_of(self) is None else numbers(base_of(self))
            return trained + own, frozen
        return own, math.prod(self.shape) - own


def is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def base_of(w: Leaf) -> Leaf:
    """What a leaf adapts, or None: an array and a leaf that stores its own numbers adapt nothing."""
    return getattr(w, "base", None) if is_weight(w) else None


def linear(x: Float[Array, "... inputs"], w: Leaf) -> Float[Array, "... outputs"]:
    """``x W`` in the dtype of `x`, for an array or a `Weight` of shape ``[in, out]``."""
    return w.linear(x) if is_weight(w) else x @ w.astype(x.dtype)


def embed(ids: Int[Array, "..."], w: Leaf) -> Float[Array, "... outputs"]:
    """Rows ``W[ids]``.  An id beyond the table gives NaN, which the training guard reports, not a wrong row."""
    return w.embed(ids) if is_weight(w) else jnp.take(w, ids, axis=0, mode="fill")


def unembed(x: Float[Array, "... outputs"], w: Leaf) -> Float[Array, "... inputs"]:
    """``x Wᵀ`` in the dtype of `x`: the head of a model whose embedding is tied."""
    return w.unembed(x) if is_weight(w) else x @ w.T.astype(x.dtype)


def materialise(w: Leaf) -> Array:
    """The plain array that a leaf stands for, with its leading axes."""
    return w.materialise() if is_weight(w) else w


def rebase(w: Leaf, fn: Callable[[Leaf], Leaf]) -> Leaf:
    """Applies `fn` to the innermost base of a leaf, and keeps whatever adapts it."""
    return fn(w) if base_of(w) is None else dataclasses.replace(w, base=rebase(w.base, fn))


def innermost(w: Leaf) -> Leaf:
    """The innermost base itself: the array (or quantised leaf) that the model was loaded with."""
    return w if base_of(w) is None else innermost(w.base)


def numbers(w: Leaf) -> tuple[int, int]:
    """(trainable, frozen) numbers of a leaf."""
    return w.numbers() if is_weight(w) else (0, int(w.size))


def static(**options: Any) -> Any:
    """A dataclass field that is part of a leaf's type: changing it recompiles, so it holds only names and layouts."""
    return dataclasses.field(metadata={"static": True}, **options)


# -- trained whole -----------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Unfrozen(Weight):
    """An array that trains: `value` stands in for `base`, which is kept (or None) so that `pj.strip` can give it back.

    With `layers`, `value` holds those layers of a stacked leaf only, and the others stay the base's.
    """

    trains = ("value",)

    base: Any
    value: Any
    layers: tuple[int, ...] | None = static(default=None)
    name: str = static(default="unfreeze")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape if self.layers is None else self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def axes(self) -> dict[str, Any]:
        return {"value": ("in", "out")}

    def materialise(self) -> Array:
        return self.value if self.layers is None else self.base.at[jnp.array(self.layers)].set(self.value)

    def numbers(self) -> tuple[int, int]:
        # Either array is None in one half of a partition.
        trained = 0 if self.value is None else int(self.value.size)
        if self.layers is None or self.base is None:
            return trained, 0
        return trained, int(self.base.size) // self.base.shape[0] * (self.base.shape[0] - len(self.layers))
