"""Which implementation multiplies by a leaf: the leaf's own choice, and how it is set."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax import trees
from peft_jax.core import Params
from peft_jax.quant.frozen import Frozen, never
from peft_jax.quant.grouped import GroupedInt
from peft_jax.quant.kernels import four_bit, grouped_int, xla
from peft_jax.quant.nf4 import FourBit
from peft_jax.weights import Leaf, linear, rebase

IMPLEMENTATIONS = ("xla", "tiled", "triton", "interpret")
FUSED_ROWS = 64  # of x, at most, for the product that dequantises in registers: beyond, W is read too often
DTYPES = ("float32", "bfloat16", "float16")


def use_kernels(params: Params, implementation: str) -> Params:
    """The same tree, whose NF4, FP4 and grouped-integer leaves are multiplied by another implementation.

    Args:
        params: of any method, whole (before `pj.partition`); adapters stay where they are.
        implementation: 'xla', 'tiled', 'triton' or 'interpret' (see `peft_jax.quant.kernels`).  An 8-bit leaf
            (`quant.int8`) has no kernel and is left as it is.

    Raises:
        ValueError: on another word; where no leaf has a kernel; on a leaf that no kernel takes, with its path.

    >>> import jax, jax.numpy as jnp, peft_jax as pj
    >>> from peft_jax import quant
    >>> leaf = quant.nf4().quantise(jax.random.normal(jax.random.key(0), (256, 128)))
    >>> x, tiled = jnp.ones((2, 256)), quant.use_kernels({"kernel": leaf}, "tiled")["kernel"]
    >>> tiled.implementation, bool(jnp.allclose(pj.linear(x, tiled), pj.linear(x, leaf), atol=1e-4))
    ('tiled', True)
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"there is no implementation {implementation!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    found = 0

    def choose(path: tuple[str, ...], base: Leaf) -> Leaf:
        nonlocal found
        if not isinstance(base, FourBit | GroupedInt):
            return base
        if implementation in ("triton", "interpret") and (why := _module(base).refuse(base)):
            raise ValueError(f"{'/'.join(path)} has {why}: leave it with 'xla', or quantise it otherwise")
        found += 1
        return dataclasses.replace(base, implementation=implementation)

    chosen = trees.map_leaves(lambda path, leaf: rebase(leaf, functools.partial(choose, path)), params)
    if not found:
        raise ValueError("no leaf is stored in NF4, FP4 or grouped integers: quantise the model first")
    return chosen


def times(x: Array, w: Frozen, transpose: bool) -> Array:
    """``x W``, or ``x Wᵀ``, as the leaf says; without a backward rule, which `frozen` has."""
    if w.implementation in ("xla", "tiled"):
        return (xla.whole if w.implementation == "xla" else xla.tiled)(x, w, transpose)
    if str(x.dtype) not in DTYPES:
        raise TypeError(f"the input is {x.dtype}: the kernels multiply {', '.join(DTYPES)}; cast it, or use 'xla'")

    @jax.custom_batching.custom_vmap
    def product(x: Array, w: Frozen) -> Array:
        return _by_kernel(x, w, transpose)

    @product.def_vmap
    def several(size: int, batched: Any, x: Array, w: Frozen) -> tuple[Array, bool]:
        if not any(jax.tree.leaves(batched[1])):  # a batch of inputs is more rows, of one product
            return times(x, w, transpose), True

        def one(i: Array) -> Array:
            x_one, w_one = jax.tree.map(lambda a, mapped: a[i] if mapped else a, [x, w], list(batched))
            return times(x_one, w_one, transpose)

        return jax.lax.map(one, jnp.arange(size)), True

    return product(x, w)


def _module(w: Any) -> Any:
    return four_bit if isinstance(w, FourBit) else grouped_int


def _by_kernel(x: Array, w: Any, transpose: bool) -> Array:
    kernels, interpret = _module(w), w.implementation == "interpret"
    axis, rows = xla.axis_of(w, transpose), math.prod(x.shape[:-1])
    if 0 < rows <= FUSED_ROWS and axis == kernels.AXIS and kernels.fusable(w):
        found = kernels.fused(x.reshape(rows, -1), w, interpret=interpret)
        return found.reshape(*x.shape[:-1], -1)
    return xla.contract(x, kernels.dequantise(w, never(x), interpret=interpret), axis)


def grouped_matmul(
    x: Float[Array, "... inputs"], w: GroupedInt, sums: Float[Array, "... groups"] | None = None
) -> Float[Array, "... outputs"]:
    """``x W`` of grouped integers, with the inputs' group sums, which QA-LoRA's adapter pools too, computed once.

        y = Σ_g step_g · (Σ_i x_i q_i − zero_g · s_g)        s_g = Σ_i x_i

    Args:
        x: the inputs; their dtype is the result's.
        w: one layer; its `implementation` is obeyed, and only a fused kernel reads `sums`.
        sums: `group_sums(x, w.group_size)`.  They are taken for what they are, sums of `x`: the gradient reaches `x` by
            the product, and none goes through them.

    >>> import jax, jax.numpy as jnp, peft_jax as pj
    >>> from peft_jax import quant
    >>> from peft_jax.quant import kernels
    >>> leaf = quant.grouped(4, 32).quantise(jax.random.normal(jax.random.key(0), (64, 16)))
    >>> x = jnp.ones((2, 64))
    >>> y = kernels.grouped_matmul(x, leaf, kernels.group_sums(x, 32))
    >>> bool(jnp.allclose(y, pj.linear(x, leaf)))
    True
    """
    rows = math.prod(x.shape[:-1])
    fused = w.implementation in ("triton", "interpret") and 0 < rows <= FUSED_ROWS and grouped_int.fusable(w)
    if sums is None or not fused:
        return linear(x, w)

    @jax.custom_vjp
    def product(x: Array, w: GroupedInt, sums: Array) -> Array:
        flat = sums.reshape(rows, -1)
        found = grouped_int.fused(x.reshape(rows, -1), w, flat, interpret=w.implementation == "interpret")
        return found.reshape(*x.shape[:-1], -1)

    def forth(x: Array, w: GroupedInt, sums: Array) -> tuple[Array, Any]:
        return product(x, w, sums), (w, jnp.zeros_like(sums))

    def back(kept: Any, g: Array) -> tuple[Array, None, Array]:
        w, none = kept
        return w.times(g, True), None, none

    product.defvjp(forth, back)
    return product(x, w, sums)
