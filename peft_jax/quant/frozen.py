"""What the quantised leaves share: a frozen array that is dequantised where it is used, and again in the backward pass.

The memory that a few bits save is lost if the backward pass keeps what the forward pass dequantised.  So `linear` and
`unembed` here have their own backward rule, which keeps the leaf itself and dequantises it once more.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.weights import Weight, linear, unembed


class Frozen(Weight):
    """A leaf that stores one array, and trains nothing.

    A subclass has `codes`, two axes behind the leading ones; the static fields `matrix`, the shape of one layer, and
    `stored`, the dtype that it stands for; and it defines `dequantise`, the array of one layer.
    """

    codes: Any
    matrix: Any
    stored: str

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    def dequantise(self) -> Array:
        raise TypeError(f"{type(self).__name__} does not say which array it stands for")

    def like(self, array: Array) -> "Frozen":
        """Another array, stored as this one is."""
        raise TypeError(f"{type(self).__name__} does not say how it stores an array")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *self.matrix)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.stored)

    def materialise(self) -> Array:
        # A layer at a time: what is on the way from codes to numbers is larger than either.
        return jax.lax.map(lambda w: w.materialise(), self) if self.lead else self.dequantise()

    def linear(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        return _product(x, self, False)

    def unembed(self, x: Float[Array, "... outputs"]) -> Float[Array, "... inputs"]:
        return _product(x, self, True)


def _product(x: Array, w: Frozen, transpose: bool) -> Array:
    @jax.custom_vjp
    def product(x: Array, w: Frozen) -> Array:
        return (unembed if transpose else linear)(x, _tied(w, x).dequantise())

    def forth(x: Array, w: Frozen) -> tuple[Array, Frozen]:
        return product(x, w), w

    def back(w: Frozen, g: Array) -> tuple[Array, None]:
        return (linear if transpose else unembed)(g, _tied(w, g).dequantise()), None

    product.defvjp(forth, back)
    return product(x, w)


def _tied(w: Frozen, x: Array) -> Frozen:
    """The same leaf, whose codes and scales depend on what they meet, so that nothing is made of them before.

    Otherwise the compiler would dequantise all layers at once, or find that the forward pass has dequantised the same
    codes, and keep the result all the way (an optimization_barrier is gone before it looks).
    """
    never = _never(x)

    def each(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return x ^ never.astype(x.dtype)
        return jnp.where(never, jnp.zeros((), x.dtype), x)  # a scale for each number is as large as the numbers

    return jax.tree.map(each, w)


@jax.custom_batching.custom_vmap
def _never(x: Array) -> Array:
    """False, of any number and of NaN; no compiler looks through it."""
    first = x[(0,) * x.ndim]
    return (first != first) & (first == first)


@_never.def_vmap
def _never_of_several(size: int, batched: list[bool], x: Array) -> tuple[Array, bool]:
    return _never(x[0]), False  # one flag for all: the codes they share are dequantised once


def each_layer(fn: Callable[[Array], Any], array: Array) -> Any:
    """``fn`` of each layer's matrix, a layer at a time: several at once would need many times the memory."""
    lead = array.shape[:-2]
    if not lead:
        return jax.jit(fn)(array)
    flat = array.reshape(math.prod(lead), *array.shape[-2:])
    found = jax.jit(lambda x: jax.lax.map(fn, x))(flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def refuse_unfinite(scales: Any) -> None:
    """Raises where a scale is not finite, which happens where a number is not."""
    for scale in jax.tree.leaves(scales):
        if isinstance(scale, jax.core.Tracer) or not jnp.issubdtype(scale.dtype, jnp.floating):
            continue
        if not np.isfinite(np.asarray(scale)).all():
            raise ValueError("the array holds NaN or Inf, which no quantised format can: look for what made it")
