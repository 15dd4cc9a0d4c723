"""Eight-bit integers, with a scale for each output (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, section 2.1).

    W[i, o] = codes[i, o] · absmax[o] / 127

Source: bitsandbytes 0.50, functional.py (``int8_vectorwise_quant``), whose codes and absmax these are.

Departures: the paper multiplies in integers, with the input quantised too and outliers apart; here the weight alone is
in eight bits, and the product in the input's dtype.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.quant.frozen import Frozen, each_layer, placement, refuse_unfinite
from peft_jax.weights import static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Int8(Frozen):
    """A frozen array in eight bits a number: codes int8 ``[*layers, in, out]``, absmax fp32 ``[*layers, out]`` (of an
    embedding ``[*layers, tokens]``: a scale a row)."""

    codes: Any
    absmax: Any
    stored: str = static(default="float32")
    transposed: bool = static(default=True)
    use: Any = placement()  # noqa: RUF009

    @property
    def matrix(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[-2:])

    def axes(self) -> dict[str, Any]:
        return {"codes": ("in", "out"), "absmax": ("out",) if self.transposed else ("in",)}

    def like(self, array: Array) -> "Int8":
        """Another array, stored as this one is."""
        return Format().quantise(array, transposed=self.transposed)

    def dequantise(self) -> Array:
        """The array of one layer, in the weight's dtype."""
        scale = self.absmax / 127
        scale = scale[None, :] if self.transposed else scale[:, None]
        return (self.codes.astype(jnp.float32) * scale).astype(self.stored)


class Format(NamedTuple):
    """How `quantise` stores an array: `int8` makes one."""

    def quantise(self, array: Float[Array, "*layers rows columns"], *, transposed: bool = True) -> Int8:
        """The leaf of an array, stacked layers or one; `transposed` as it is for kernels, not for embeddings.

        Raises:
            ValueError: if a number is not finite.
        """
        codes, absmax = each_layer(_quantise, array, transposed)
        refuse_unfinite(absmax)
        return Int8(codes, absmax, str(array.dtype), transposed)


def int8() -> Format:
    """Eight-bit integers with a scale for each output.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import quant
    >>> w = jax.random.normal(jax.random.key(0), (256, 128))
    >>> 8 * pj.count({"kernel": quant.int8().quantise(w)}).bytes / w.size
    8.125
    """
    return Format()


def _quantise(transposed: bool, w: Array) -> tuple[Array, Array]:
    """One layer's codes and absmax."""
    wide = w.astype(jnp.float32)
    absmax = jnp.abs(wide).max(-2 if transposed else -1)
    scale = jnp.where(absmax > 0, 127 / jnp.where(absmax > 0, absmax, 1), 0)
    scale = scale[None, :] if transposed else scale[:, None]
    return jnp.round(wide * scale).astype(jnp.int8), absmax
