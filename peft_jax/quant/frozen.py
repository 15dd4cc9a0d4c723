"""What the quantised leaves share: a frozen array that is dequantised where it is used, and again in the backward pass.

The memory that a few bits save is lost if the backward pass keeps what the forward pass dequantised.  So `linear` and
`unembed` here have their own backward rule, which keeps the leaf itself and dequantises it once more: both passes are
products with the leaf, `Frozen.times`, which a format may carry out as it likes (`peft_jax.quant.kernels`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from peft_jax.sharding import arrays_like, mesh_of
from peft_jax.weights import Weight, linear, unembed


def placement() -> Any:
    """The field `Frozen.use`: part of a leaf's type, but nothing that a checkpoint has to agree with."""
    return dataclasses.field(default=None, metadata={"static": True, "placement": True})


class Frozen(Weight):
    """A leaf that stores one array, and trains nothing.

    A subclass has `codes`, two axes behind the leading ones; the static fields `matrix`, the shape of one layer, and
    `stored`, the dtype that it stands for; and it defines `dequantise`, the array of one layer.  `implementation` says
    which code multiplies by it: see `peft_jax.quant.kernels`.

    `use` says how the matrix ``[in, out]`` is split at the moment it is multiplied by, a PartitionSpec, or None: where
    a mesh keeps a leaf in more pieces than that (FSDP), its codes and scales are gathered, and not the numbers that
    they stand for, which the compiler would gather.  `peft_jax.sharding.shard` sets it.
    """

    codes: Any
    matrix: Any
    stored: str
    implementation: str = "xla"
    use: Any = None

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    def dequantise(self) -> Array:
        raise TypeError(f"{type(self).__name__} does not say which array it stands for")

    def like(self, array: Array) -> "Frozen":
        """Another array, stored as this one is."""
        raise TypeError(f"{type(self).__name__} does not say how it stores an array")

    def times(self, x: Array, transpose: bool) -> Array:
        """``x W``, or ``x Wᵀ``, of one layer, in the dtype of `x`; without a backward rule of its own."""
        return (unembed if transpose else linear)(x, tied(self, x).dequantise())

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
        return gathered(w).times(x, transpose)

    def forth(x: Array, w: Frozen) -> tuple[Array, Frozen]:
        return product(x, w), w

    def back(w: Frozen, g: Array) -> tuple[Array, None]:
        return gathered(w).times(g, not transpose), None

    product.defvjp(forth, back)
    return product(x, w)


def gathered(w: Frozen) -> Frozen:
    """One layer's leaf, its codes and scales in the pieces in which they are used."""
    mesh = mesh_of(w.codes)
    if w.use is None or mesh is None:
        return w
    return jax.tree.map(jax.lax.with_sharding_constraint, w, arrays_like(w, NamedSharding(mesh, w.use)))


def tied(w: Frozen, x: Array) -> Frozen:
    """The same leaf, whose codes and scales depend on what they meet, so that nothing is made of them before.

    Otherwise the compiler would dequantise all layers at once, or find that the forward pass has dequantised the same
    codes, and keep the result all the way (an optimization_barrier is gone before it looks).
    """
    flag = never(x)

    def each(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return x ^ flag.astype(x.dtype)
        return jnp.where(flag, jnp.zeros((), x.dtype), x)  # a scale for each number is as large as the numbers

    return jax.tree.map(each, w)


@jax.custom_batching.custom_vmap
def never(x: Array) -> Array:
    """False, of any number and of NaN; no compiler looks through it."""
    first = x[(0,) * x.ndim]
    return (first != first) & (first == first)


@never.def_vmap
def _never_of_several(size: int, batched: list[bool], x: Array) -> tuple[Array, bool]:
    return never(x[0]), False  # one flag for all: the codes they share are dequantised once


def each_layer(fn: Callable[..., Any], array: Array, *options: Any) -> Any:
    """``fn(*options, matrix)`` of each layer, a layer at a time: several at once would need many times the memory.

    `fn` and `options` must be hashable: leaves of one shape share one program, and layers that come one by one
    (`peft_jax.on_disk`) give the bits that they give together.
    """
    return _each_layer(fn, options, array)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _each_layer(fn: Callable[..., Any], options: tuple[Any, ...], array: Array) -> Any:
    lead = array.shape[:-2]
    flat = array.reshape(math.prod(lead), *array.shape[-2:])
    found = jax.lax.map(lambda w: fn(*options, w), flat)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def refuse_unfinite(scales: Any) -> None:
    """Raises where a scale is not finite, which happens where a number is not."""
    for scale in jax.tree.leaves(scales):
        if isinstance(scale, jax.core.Tracer) or not jnp.issubdtype(scale.dtype, jnp.floating):
            continue
        if not np.isfinite(np.asarray(scale)).all():
            raise ValueError("the array holds NaN or Inf, which no quantised format can: look for what made it")
