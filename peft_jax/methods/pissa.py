"""PiSSA: principal singular values and vectors adaptation (Meng et al. 2024, arXiv 2404.02948).

    W = U Σ Vᵀ;   A₀ = U_r √(Σ_r/s),  B₀ = √(Σ_r/s) V_rᵀ;   y = x (W − s A₀B₀) + s x A B,   A, B from A₀, B₀

LoRA that starts at the principal part of W and leaves the residual frozen.  The output is unchanged at the start.

Source: section 3; HF PEFT tuners/lora/layer.py, pissa_init.

Departures: the reference overwrites W by the residual.  Here W stays as it was loaded and the residual is a leaf,
``Residual(W, A₀, B₀)``, so that `pj.strip` gives W back bit for bit; it costs one more low-rank product a call.
An adapter leaves as a LoRA of rank 2r: ``[A, A₀] [B; −B₀]``.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.core import Method
from peft_jax.methods.lora import QUERY_VALUE, low_rank, plus_product, scaled_product
from peft_jax.trees import Pattern, Site
from peft_jax.weights import Leaf, Weight, embed, linear, materialise, static, unembed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Residual(Weight):
    """``base − scale · a b``, all frozen: what is left of a weight when its adapter starts at ``a b``."""

    base: Any
    a: Any
    b: Any
    scale: Any
    name: str = static(default="residual")

    def axes(self) -> dict[str, Any]:
        return {"a": ("in", None), "b": (None, "out")}

    def materialise(self) -> Array:
        return plus_product(materialise(self.base), -self.scale, self.a, self.b)

    def linear(self, x: Array) -> Array:
        return linear(x, self.base) - scaled_product(x @ self.a.astype(x.dtype), self.scale, self.b)

    def embed(self, ids: Array) -> Array:
        rows = embed(ids, self.base)
        return rows - scaled_product(embed(ids, self.a).astype(rows.dtype), self.scale, self.b)

    def unembed(self, x: Array) -> Array:
        return unembed(x, self.base) - scaled_product(x @ self.b.T.astype(x.dtype), self.scale, self.a.T)


def pissa(
    rank: int = 8, alpha: float | None = None, select: Pattern = QUERY_VALUE, *, name: str = "pissa", **options: Any
) -> Method:
    """LoRA started at the r principal singular directions of each weight.  Arguments and errors as in `methods.lora`.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> base = {"q_proj": {"kernel": jax.random.normal(jax.random.key(1), (16, 16))}}
    >>> params, forward = methods.pissa(rank=2)(jax.random.key(0), base, forward)
    >>> bool(jax.numpy.allclose(pj.merge(params)["q_proj"]["kernel"], base["q_proj"]["kernel"], atol=1e-5))
    True
    """
    return low_rank(_principal, residual, rank=rank, alpha=alpha, select=select, name=name, **options)


def _principal(key: Array, site: Site, leaf: Leaf, rank: int, scale: Array, name: str) -> tuple[Array, Array]:
    return factors(_svd, site, leaf, rank, scale)


def _svd(w: Array, rank: int, scale: Array) -> tuple[Array, Array]:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root[None, :], root[:, None] * vt[:rank]


def factors(factor: Any, site: Site, leaf: Leaf, rank: int, scale: Array) -> tuple[Array, Array]:
    """``factor(w, rank, scale) -> (a, b)`` of each layer's array; a layer that is not adapted has scale 0."""
    if rank > min(site.matrix_shape(leaf)):
        raise ValueError(f"{site.names[0]} is {site.matrix_shape(leaf)}: it has no {rank} directions to start from")

    return _factors(factor, rank, materialise(leaf), scale)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _factors(factor: Any, rank: int, w: Array, scale: Array) -> tuple[Array, Array]:
    def one(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        w, s = pair
        return factor(w.astype(jnp.float32), rank, jnp.where(s > 0, s, jnp.ones_like(s)))

    # A layer at a time: the factors of all layers at once would need many times the leaf's own memory.
    found = jax.lax.map(one, (w.reshape(-1, *w.shape[-2:]), scale.reshape(-1)))
    return jax.tree.map(lambda x: x.reshape(*scale.shape, *x.shape[1:]), found)


def residual(leaf: Leaf, a: Array, b: Array, scale: Array, name: str) -> Residual:
    """What is left of `leaf` when its adapter starts at ``a b``."""
    # Copies: the adapter's own arrays are trained and donated.
    return Residual(leaf, jnp.copy(a), jnp.copy(b), jnp.copy(scale), name=f"{name}.residual")
