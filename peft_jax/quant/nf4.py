"""NF4 and FP4: four bits a weight and a scale a block, themselves in eight bits (QLoRA, arXiv 2305.14314, section 3).

    W[i] = code[nibble i] · absmax[i // block_size]
    absmax[j] = dynamic[q j] · nested[j // 256] + offset        double quantisation

`i` counts a kernel's numbers output by output, so a block lies along the inputs; an embedding's row by row.  NF4's 16
codes are quantiles of the normal distribution, FP4's a sign, two bits of exponent and one of mantissa.  A weight costs
4 + 32/64 = 4.5 bits, and 4 + 8/64 + 32/(64·256) = 4.127 with double quantisation.

Dequantised values are bitsandbytes' own, bit for bit: fp32 product, fp32 sum, one rounding to the weight's dtype.
Quantising agrees with it but for numbers within a rounding of the midpoint between two codes.

Source: sections 2 and 3; bitsandbytes 0.50, functional.py (``quantize_4bit``, ``create_dynamic_map``) and
backends/default/ops.py.

Departures: the paper says that absmax is stored in FP8; its code, which this follows, has the signed dynamic map of
arXiv 2110.02861.  A block may have any even size, and an all-zero block is stored with an absmax of 0.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from peft_jax.quant.frozen import Frozen, each_layer, placement, refuse_unfinite
from peft_jax.weights import static

NESTED = 256  # absmax values to a nested block

# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)
# fmt: on
CODES = {"nf4": NF4, "fp4": FP4}


def _dynamic_map() -> np.ndarray:
    """The 256 values of the signed dynamic map: for each power of ten, twice as many as for the one below it."""
    start = np.float32(0.1)
    values: list[np.ndarray] = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for power in range(7):
        n = 2**power + 1
        step, k = np.float32((np.float32(1) - start) / np.float32(n - 1)), np.arange(n)
        low = (np.float64(start) + np.float64(step) * k).astype(np.float32)
        high = (1 - np.float64(step) * (n - 1 - k)).astype(np.float32)
        edges = np.where(k < n // 2, low, high)
        means = np.float32(10.0 ** (power - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [means, -means]
    return np.sort(np.concatenate(values))


DYNAMIC = _dynamic_map()


class Nested(NamedTuple):
    """Double quantisation: absmax in eight bits.  codes as `FourBit.absmax`, nested ``[*layers, blocks of 256]``,
    offset ``[*layers]``."""

    codes: Any
    nested: Any
    offset: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FourBit(Frozen):
    """A frozen array in four bits a number.

    codes       uint8 ``[*layers, rows, bytes]``, two numbers a byte, the first in the high nibble
    absmax      fp32 ``[*layers, rows, blocks]``, or `Nested`
    matrix      the shape of one layer, as the model sees it
    kind        'nf4' or 'fp4'
    transposed  whether it is stored output by output, as kernels are

    Rows are a kernel's outputs (an embedding's tokens) where blocks fill them evenly, else there is one row.
    """

    codes: Any
    absmax: Any
    matrix: tuple[int, ...] = static(default=())
    stored: str = static(default="float32")
    block_size: int = static(default=64)
    kind: str = static(default="nf4")
    transposed: bool = static(default=True)
    implementation: str = static(default="xla")
    use: Any = placement()  # noqa: RUF009

    def axes(self) -> dict[str, Any]:
        if self.codes.shape[-2] != self.matrix[self.transposed]:  # one row of all numbers
            return {}
        rows = ("out", "in") if self.transposed else ("in", "out")
        return {"codes": rows, "absmax": Nested(rows, (None,), ()) if isinstance(self.absmax, Nested) else rows}

    def scales(self) -> Float[Array, "rows blocks"]:
        """absmax of one layer, in fp32."""
        if not isinstance(self.absmax, Nested):
            return self.absmax
        codes, nested, offset = self.absmax
        flat = codes.reshape(-1)
        wide = jnp.repeat(nested, NESTED, total_repeat_length=flat.size)
        # The product and the sum are rounded apart, as in bitsandbytes: a comparison that changes nothing stands
        # between them, for compilers fuse what follows directly (and see through lax.optimization_barrier).
        product = jnp.maximum(_look_up(DYNAMIC, flat) * wide, jnp.finfo(jnp.float32).min)
        return (product + offset).reshape(codes.shape)

    def like(self, array: Array) -> "FourBit":
        """Another array, stored as this one is."""
        form = Format(self.kind, self.block_size, isinstance(self.absmax, Nested))
        made = form.quantise(array, transposed=self.transposed)
        return dataclasses.replace(made, implementation=self.implementation)

    def rows(self) -> Array:
        """The numbers of one layer as they are stored, a kernel's outputs (an embedding's tokens) in rows."""
        values = self._rows(self.codes, self.scales())
        stored = self.matrix[::-1] if self.transposed else self.matrix
        return values.reshape(-1)[: math.prod(stored)].reshape(stored)

    def dequantise(self) -> Array:
        """The array of one layer, in the weight's dtype."""
        return _turned(self) if self.transposed else self.rows()

    def times(self, x: Array, transpose: bool) -> Array:
        from peft_jax.quant import kernels  # which know this leaf

        return kernels.times(x, self, transpose)

    def embed(self, ids: Int[Array, "..."]) -> Array:
        if self.transposed or self.codes.shape[0] == 1:
            return super().embed(ids)
        # As of an array: an id beyond the table gives NaN, which the training guard reports, and -1 the last row.
        codes = jnp.take(self.codes, ids, axis=0, mode="fill")
        scales = jnp.take(self.scales(), ids, axis=0, mode="fill")
        return self._rows(codes, scales)

    def _rows(self, codes: UInt8[Array, "... bytes"], scales: Float[Array, "... blocks"]) -> Array:
        """The numbers of whole rows: fp32 products, rounded once."""
        nibbles = jnp.stack([codes >> 4, codes & 15], -1).reshape(*codes.shape[:-1], -1)
        size, whole = self.block_size, nibbles.shape[-1] % self.block_size == 0
        values = _look_up(CODES[self.kind], nibbles)
        if whole:
            wide = values.reshape(*scales.shape, size) * scales[..., None]
        else:
            wide = values * jnp.repeat(scales, size, axis=-1, total_repeat_length=nibbles.shape[-1])
        return wide.reshape(nibbles.shape).astype(self.stored)


def _look_up(table: np.ndarray, index: UInt8[Array, "..."]) -> Float[Array, "..."]:
    # No index is beyond the table; to say so spares a comparison each, which costs more than the look-up.
    return jnp.take(jnp.asarray(table), index, axis=0, mode="clip")


TURNED = 64  # rows at once


@jax.jit
def _turned(w: FourBit) -> Array:
    """The transpose of the rows, some at a time: what is turned over stays in the processor's cache."""
    outputs = w.codes.shape[0]
    if outputs <= TURNED:
        return w.rows().T
    scales = w.scales()
    # Bits, not numbers: where a processor has no bf16, the whole array would be widened and narrowed at every turn.
    bits = jnp.dtype(f"uint{8 * jnp.dtype(w.stored).itemsize}")

    def turn(i: Array, whole: Array) -> Array:
        first = jnp.minimum(i * TURNED, outputs - TURNED)
        codes, scale = (jax.lax.dynamic_slice_in_dim(a, first, TURNED) for a in (w.codes, scales))
        rows = jax.lax.bitcast_convert_type(w._rows(codes, scale), bits)
        return jax.lax.dynamic_update_slice(whole, rows.T, (0, first))

    turned = jax.lax.fori_loop(0, -(-outputs // TURNED), turn, jnp.zeros(w.matrix, bits))
    return jax.lax.bitcast_convert_type(turned, w.stored)


class Format(NamedTuple):
    """How `quantise` stores an array: `nf4` and `fp4` make one."""

    kind: str
    block_size: int
    double: bool

    def quantise(self, array: Float[Array, "*layers rows columns"], *, transposed: bool = True) -> FourBit:
        """The leaf of an array, stacked layers or one; `transposed` as it is for kernels, not for embeddings.

        Raises:
            ValueError: if a number is not finite.
        """
        matrix = tuple(array.shape[-2:])
        length = matrix[0] if transposed else matrix[1]
        rows = math.prod(matrix) // length if length % self.block_size == 0 else 1
        codes, absmax = each_layer(_quantise, array, self, rows, transposed)
        refuse_unfinite(absmax)
        return FourBit(codes, absmax, matrix, str(array.dtype), self.block_size, self.kind, transposed)


def nf4(block_size: int = 64, double: bool = True) -> Format:
    """NF4 with a scale for every `block_size` numbers, the scales in eight bits where `double` is set.

    >>> import jax, jax.numpy as jnp, peft_jax as pj
    >>> from peft_jax import quant
    >>> w = jax.random.normal(jax.random.key(0), (256, 128))
    >>> leaf = quant.nf4().quantise(w)
    >>> 8 * pj.count({"kernel": leaf}).bytes / w.size
    4.1279296875
    """
    return _format("nf4", block_size, double)


def fp4(block_size: int = 64, double: bool = True) -> Format:
    """FP4 (a sign, two bits of exponent, one of mantissa); arguments as in `nf4`."""
    return _format("fp4", block_size, double)


def _format(kind: str, block_size: int, double: bool) -> Format:
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size is {block_size}: give an even number of weights a block, 2 or more")
    return Format(kind, block_size, double)


def _quantise(form: Format, rows: int, transposed: bool, w: Array) -> tuple[Array, Any]:
    """One layer's codes and absmax."""
    flat = (w.T if transposed else w).astype(jnp.float32).reshape(rows, -1)
    n = flat.shape[-1]
    blocks = -(-n // form.block_size)
    flat = jnp.pad(flat, ((0, 0), (0, blocks * form.block_size - n))).reshape(rows, blocks, form.block_size)
    absmax = jnp.abs(flat).max(-1)
    inverse = jnp.where(absmax > 0, 1 / jnp.where(absmax > 0, absmax, 1), 0)
    codes = _nearest(CODES[form.kind], flat * inverse[..., None]).reshape(rows, -1)[:, : n + n % 2]
    packed = codes[:, 0::2] << 4 | codes[:, 1::2]
    return packed, _nested(absmax) if form.double else absmax


def _nested(absmax: Float[Array, "rows blocks"]) -> Nested:
    offset = jnp.maximum(absmax.mean(), 0.0)  # which it is: an FMA of mean and difference would round otherwise
    flat = (absmax - offset).reshape(-1)
    blocks = -(-flat.size // NESTED)
    padded = jnp.pad(flat, (0, blocks * NESTED - flat.size)).reshape(blocks, NESTED)
    largest = jnp.abs(padded).max(-1)
    scaled = padded / jnp.where(largest > 0, largest, 1)[:, None]
    codes = _nearest(DYNAMIC, scaled).reshape(-1)[: flat.size]
    return Nested(codes.reshape(absmax.shape), largest, offset)


def _nearest(table: np.ndarray, x: Array) -> UInt8[Array, "..."]:
    """The index of the table's entry nearest to each number; a tie goes to the lower entry."""
    order = np.argsort(table, kind="stable")
    middles = (table[order][:-1] + table[order][1:]) / np.float32(2)
    if len(table) <= 16:  # sums of comparisons fuse into one pass
        index = sum(((x > middle).astype(jnp.uint8) for middle in middles), jnp.zeros(x.shape, jnp.uint8))
    else:
        index = jnp.searchsorted(jnp.asarray(middles), x).astype(jnp.uint8)
    return jnp.asarray(order.astype(np.uint8))[index]
