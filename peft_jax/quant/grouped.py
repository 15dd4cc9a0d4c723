"""Group-wise asymmetric integers of 2, 3, 4 or 8 bits.

    W[i, o] = step[g, o] · (q[i, o] − zero[g, o])      g = i // group_size
    step = (max − min) / (2^bits − 1),  zero = round(−min / step)       over the group, which includes 0

Codes are packed as GPTQ packs them: along the inputs, low bits first, in 32-bit words of one output each; 32 codes of 3
bits fill 3 words.  `zero` may be any number, not only an integer: that is what lets QA-LoRA merge exactly.

Source: Xu et al. 2023 (QA-LoRA, arXiv 2309.14717), section 3.2; AutoGPTQ, quantization/quantizer.py.

Departures: the group's range always includes 0, as in GPTQ's code, so that 0 is stored exactly.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from peft_jax.quant.frozen import Frozen, each_layer, placement, refuse_unfinite
from peft_jax.weights import static

WORD = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GroupedInt(Frozen):
    """A frozen kernel in a few bits a number.

    codes    uint32 ``[*layers, words, out]``
    step     ``[*layers, groups, out]``, the scale α of the equation: `scale` is an adapter's
    zero     ``[*layers, groups, out]``
    matrix   ``[in, out]``
    """

    codes: Any
    step: Any
    zero: Any
    matrix: tuple[int, ...] = static(default=())
    stored: str = static(default="float32")
    bits: int = static(default=4)
    group_size: int = static(default=32)
    implementation: str = static(default="xla")
    use: Any = placement()  # noqa: RUF009

    def axes(self) -> dict[str, Any]:
        return dict.fromkeys(("codes", "step", "zero"), ("in", "out"))

    def like(self, array: Array) -> "GroupedInt":
        """Another array, stored as this one is."""
        made = Format(self.bits, self.group_size, self.step.dtype).quantise(array)
        return dataclasses.replace(made, implementation=self.implementation)

    def dequantise(self) -> Array:
        """The array ``[in, out]`` of one layer, in the weight's dtype."""
        inputs, outputs = self.matrix
        codes = unpack(self.codes, self.bits, inputs)
        grouped = codes.reshape(-1, self.group_size, outputs).astype(jnp.float32)
        step, zero = (x.astype(jnp.float32)[:, None, :] for x in (self.step, self.zero))
        return (step * (grouped - zero)).reshape(inputs, outputs).astype(self.stored)

    def times(self, x: Array, transpose: bool) -> Array:
        from peft_jax.quant import kernels  # which know this leaf

        return kernels.times(x, self, transpose)


class Format(NamedTuple):
    """How `quantise` stores an array: `grouped` makes one."""

    bits: int
    group_size: int
    dtype: Any

    def quantise(self, array: Float[Array, "*layers inputs outputs"], *, transposed: bool = True) -> GroupedInt:
        """The leaf of an array, stacked layers or one.

        Raises:
            ValueError: on an embedding; if the inputs are no whole number of groups, or a number is not finite.
        """
        if not transposed:
            raise ValueError("groups lie along a kernel's inputs, and this is an embedding: use nf4() or int8()")
        inputs = array.shape[-2]
        if inputs % self.group_size:
            raise ValueError(
                f"{inputs} inputs are not a whole number of groups of {self.group_size}: choose a group_size that "
                "divides them, or leave this leaf out of select"
            )
        codes, step, zero = each_layer(_quantise, array, self)
        refuse_unfinite((step, zero))
        return GroupedInt(codes, step, zero, tuple(array.shape[-2:]), str(array.dtype), self.bits, self.group_size)


def grouped(bits: int = 4, group_size: int = 32, dtype: Any = jnp.float32) -> Format:
    """Integers of `bits` bits with a step and a zero point, of `dtype`, for every `group_size` inputs of an output.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import quant
    >>> w = jax.random.normal(jax.random.key(0), (256, 128))
    >>> leaf = quant.grouped(bits=3, group_size=64).quantise(w)
    >>> 8 * pj.count({"kernel": leaf}).bytes / w.size
    4.0
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"bits is {bits}: choose 2, 3, 4 or 8")
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}: give the number of inputs a group, 1 or more")
    return Format(bits, group_size, jnp.dtype(dtype))


def _quantise(form: Format, w: Array) -> tuple[Array, Array, Array]:
    """One layer's codes, steps and zero points."""
    inputs, outputs = w.shape
    grouped = w.astype(jnp.float32).reshape(-1, form.group_size, outputs)
    step, zero = fit_range(grouped.min(1), grouped.max(1), form.bits)
    step = step.astype(form.dtype).astype(jnp.float32)  # the codes are for the step that is kept
    codes = jnp.clip(jnp.round(grouped / step[:, None]) + zero[:, None], 0, 2**form.bits - 1)
    packed = pack(codes.reshape(inputs, outputs).astype(jnp.uint8), form.bits)
    return packed, step.astype(form.dtype), zero.astype(form.dtype)


def fit_range(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """The step and the zero point of groups that reach from `low` to `high`."""
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    step = (high - low) / (2**bits - 1)
    step = jnp.where(step > 0, step, 1)  # a group of zeros
    return step, jnp.round(-low / step)


# -- packing ----------------------------------------------------------------------------------------------------------


def _places(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of the 32 codes of `bits` words: the word in which it begins, and at which bit."""
    first = np.arange(WORD) * bits
    return first // WORD, first % WORD


def pack(codes: UInt8[Array, "inputs outputs"], bits: int) -> UInt32[Array, "words outputs"]:
    """GPTQ's packing: codes of one output one after another, low bits first."""
    inputs, outputs = codes.shape
    wide = jnp.pad(codes, ((0, -inputs % WORD), (0, 0))).astype(jnp.uint32).reshape(-1, WORD, outputs)
    words = [jnp.zeros((len(wide), outputs), jnp.uint32) for _ in range(bits)]
    for i, (word, shift) in enumerate(zip(*_places(bits), strict=True)):
        words[word] |= wide[:, i] << np.uint32(shift)
        if shift + bits > WORD:
            words[word + 1] |= wide[:, i] >> np.uint32(WORD - shift)
    return jnp.stack(words, 1).reshape(-1, outputs)[: -(-inputs * bits // WORD)]


def unpack(words: UInt32[Array, "words outputs"], bits: int, inputs: int) -> UInt8[Array, "inputs outputs"]:
    """The inverse of `pack`."""
    outputs = words.shape[-1]
    mask = np.uint32(2**bits - 1)
    if WORD % bits == 0:  # no code straddles two words
        shifts = np.arange(0, WORD, bits, dtype=np.uint32)[None, :, None]
        return (words[:, None] >> shifts & mask).astype(jnp.uint8).reshape(-1, outputs)[:inputs]
    wide = jnp.pad(words, ((0, -words.shape[0] % bits), (0, 0))).reshape(-1, bits, outputs)
    word, shift = _places(bits)
    low = jnp.take(wide, word, axis=1, mode="clip") >> shift.astype(np.uint32)[None, :, None]
    left = np.minimum(WORD - shift, WORD - 1).astype(np.uint32)[None, :, None]
    high = jnp.take(wide, word + 1, axis=1, mode="clip") << left
    straddles = jnp.asarray(shift + bits > WORD)[None, :, None]
    codes = jnp.where(straddles, low | high, low) & mask
    return codes.astype(jnp.uint8).reshape(-1, outputs)[:inputs]
