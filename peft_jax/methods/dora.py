"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv 2402.09353).

    V = W + s A B;   y = x V · m / ‖V‖        ‖·‖ the norm of each output's column, m ``[out]`` trained, from ‖W‖

The norm is a constant in the backward pass (section 4.3), which saves its gradient's memory.

Source: section 4; HF PEFT tuners/lora/dora.py.

Departures: with dropout, HF PEFT also drops the input of the base's share of the rescaling; here only A's input is
dropped, as the paper's equation 5 has it.  Without dropout the two agree.  A column of zeros has no direction and is
not rescaled (HF PEFT divides by zero there).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Path, chain
from peft_jax.methods.lora import QUERY_VALUE, LoRA, lora
from peft_jax.trees import Pattern
from peft_jax.weights import Leaf, Weight, embed, linear, materialise, static, unembed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DoRA(Weight):
    """``base · magnitude / ‖base‖`` by columns: base a LoRA leaf, magnitude ``[*layers, out]``.

    `active` ``[*layers]`` is False where a layer was not selected: its magnitude must not act, whatever an optimiser
    makes of it.
    """

    trains = ("magnitude",)

    base: Any
    magnitude: Any
    active: Any
    name: str = static(default="dora")

    def factor(self) -> Array:
        """m / ‖V‖, one for each output."""
        norms = jax.lax.stop_gradient(column_norms(materialise(self.base)))
        acts = self.active[..., None] & (norms > 0)
        return jnp.where(acts, self.magnitude / jnp.where(acts, norms, jnp.ones_like(norms)), jnp.ones_like(norms))

    def axes(self) -> dict[str, Any]:
        return {"magnitude": ("out",)}

    def materialise(self) -> Array:
        base = materialise(self.base)
        return (base.astype(jnp.float32) * self.factor()[..., None, :]).astype(base.dtype)

    def linear(self, x: Array) -> Array:
        return self._rescaled(linear(x, self.base))

    def embed(self, ids: Array) -> Array:
        return self._rescaled(embed(ids, self.base))

    def unembed(self, x: Array) -> Array:
        return unembed(self._rescaled(x), self.base)

    def _rescaled(self, y: Array) -> Array:
        factor = self.factor().astype(y.dtype)
        return y * factor.reshape((1,) * (y.ndim - 1) + factor.shape)

    def trained_size(self) -> int:
        if self.magnitude is None:  # the frozen half of a partition
            return 0
        ranks = self.base.ranks
        return self.magnitude.size * sum(r > 0 for r in ranks) // len(ranks)


@jax.jit
def column_norms(w: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32)), axis=-2))


def dora(
    rank: int = 8, alpha: float | None = None, select: Pattern = QUERY_VALUE, *, name: str = "dora", **options: Any
) -> Method:
    """LoRA on the direction of each weight, and a trained magnitude.  Arguments and errors as in `methods.lora`.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.numpy.eye(16)}}
    >>> params, forward = methods.dora(rank=2)(jax.random.key(0), params, forward)
    >>> pj.count(params).trainable == 2 * (16 + 16) + 16
    True
    """
    inner = f"{name}.lora"

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)

        def decompose(path: Path, w: Leaf) -> Leaf:
            assert isinstance(w, LoRA)
            active = (jnp.array(w.ranks) > 0).reshape(w.scale.shape)
            return DoRA(w, column_norms(materialise(w.base)), active, name=name)

        return trees.rewrite(params, inner, decompose)

    return chain(lora(rank, alpha, select, name=inner, **options), Method(init))
