"""Weights as bitsandbytes keeps them in safetensors: NF4 and FP4 with or without double quantisation, and int8.

Four bits, for a module called `m` (sizes for n numbers in blocks of b):

    m.weight                                 two numbers a byte, the first in the high nibble: [n/2, 1] bytes, or the
                                             same bytes as another storage dtype
    m.weight.absmax                          fp32 [n/b]; uint8 with double quantisation, and then also
    m.weight.nested_absmax, nested_quant_map fp32 [n/b/256], fp32 [256]
    m.weight.quant_map                       fp32 [16], the code
    m.weight.quant_state.bitsandbytes__nf4   JSON as bytes: quant_type, blocksize, dtype, shape [out, in], nested_…

Eight bits: m.weight int8 [out, in], m.SCB fp32 [out], m.weight_format (0: by rows).

Numbers count along torch's [out, in], as `FourBit` stores kernels, so the codes are taken as they are.

Source: bitsandbytes 0.50, functional.py (``QuantState.as_dict``), nn/modules.py (``Linear8bitLt``).

Departures: a nested_quant_map that is not the built-in table (other versions and machines may round its last bits
otherwise) is honoured by expanding absmax to fp32 with it, which loses nothing; another quant_map is refused.
"""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from peft_jax.on_disk import Reader, whole
from peft_jax.quant.int8 import Int8
from peft_jax.quant.nf4 import CODES, DYNAMIC, NESTED, FourBit, Nested

STATE = "weight.quant_state.bitsandbytes__"
DTYPES = ("float32", "float16", "bfloat16")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # the block sizes that bitsandbytes has kernels for


class Matrix(NamedTuple):
    """One matrix of a checkpoint.

    stem        its module's name there
    shape       as the model sees it: of a kernel [in, out]
    transposed  whether it is a kernel, which torch keeps as [out, in]; an embedding is not
    dtype       what plain weights are loaded in
    """

    stem: str
    shape: tuple[int, ...]
    transposed: bool
    dtype: str

    @property
    def theirs(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


def kind(names: Collection[str], stem: str) -> str:
    """How a checkpoint keeps a module: 'nf4', 'fp4', 'int8', or '' for none of them."""
    found = [k for k in CODES if f"{stem}.{STATE}{k}" in names]
    return found[0] if found else "int8" if f"{stem}.SCB" in names else ""


def tensors(names: Collection[str], stem: str) -> list[str]:
    """The names of all that a checkpoint keeps of a module's weight."""
    parts = (
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        *(f"quant_state.bitsandbytes__{k}" for k in CODES),
    )
    mine = (f"{stem}.weight", f"{stem}.SCB", f"{stem}.weight_format", *(f"{stem}.weight.{part}" for part in parts))
    return [name for name in mine if name in names]


def read(reader: Reader, matrix: Matrix) -> FourBit | Int8:
    """The leaf of a module's weight, its arrays on the host.

    Raises:
        ValueError: if a tensor is missing or misshapen, or the quant_state does not fit the others, with the name.
    """
    found = kind(reader.names(), matrix.stem)
    return _int8(reader, matrix) if found == "int8" else _four_bit(reader, matrix, found)


def get(reader: Reader, name: str, shape: tuple[int, ...] | None, dtype: Any = None) -> np.ndarray:
    """A whole tensor, which must be there and have this shape and dtype."""
    if name not in reader.names():
        raise ValueError(f"{reader.source} does not hold the tensor {name} {list(shape or ())}")
    found = tuple(reader.shape(name))
    if shape is not None and found != shape:
        raise ValueError(f"{reader.source} holds {name} with shape {list(found)}, and {list(shape)} is due")
    array = reader.read(name, whole(found))
    if dtype is not None and array.dtype != np.dtype(dtype):
        raise ValueError(f"{reader.source} holds {name} as {array.dtype}, and {np.dtype(dtype)} is due")
    return array


def read_state(reader: Reader, name: str) -> dict[str, Any]:
    """A JSON object that is kept as the bytes of a tensor."""
    try:
        state = json.loads(get(reader, name, None, np.uint8).tobytes())
    except ValueError as error:
        raise ValueError(f"{reader.source}: {name} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{reader.source}: {name} is not a JSON object")
    return state


def as_bytes(state: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def need(reader: Reader, name: str, state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises unless a state says what is wanted; a tuple of values means any of them."""
    for key, value in wanted.items():
        given = state.get(key)
        if given not in value if isinstance(value, tuple) else given != value:
            expected = " or ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"{reader.source}: {name} says {key} {given}, and {expected} is due")


def _four_bit(reader: Reader, matrix: Matrix, found: str) -> FourBit:
    stem, shape = matrix.stem, matrix.shape
    name, at, size = f"{stem}.{STATE}{found}", f"{stem}.weight", math.prod(shape)
    state = read_state(reader, name)
    need(reader, name, state, {"quant_type": found, "shape": list(matrix.theirs), "dtype": DTYPES})
    block = state.get("blocksize")
    if not isinstance(block, int) or block < 2 or block % 2:
        raise ValueError(f"{reader.source}: {name} says blocksize {block}, and an even number is due")
    raw = get(reader, at, None)
    if raw.nbytes != (due := (size + 1) // 2):
        raise ValueError(f"{reader.source}: {at} has {raw.nbytes} bytes, and {name} says {size} numbers, {due} bytes")
    if not np.array_equal(get(reader, f"{at}.quant_map", (16,), np.float32), CODES[found]):
        raise ValueError(f"{reader.source}: {at}.quant_map is not the code of {found}: no leaf can stand for it")
    rows = matrix.theirs[0] if matrix.theirs[1] % block == 0 else 1
    codes, blocks = np.ascontiguousarray(raw).view(np.uint8).reshape(rows, -1), -(-size // block)
    absmax: Any
    if "nested_offset" in state:
        need(reader, name, state, {"nested_blocksize": NESTED, "nested_dtype": "float32"})
        eight = get(reader, f"{at}.absmax", (blocks,), np.uint8)
        nested = get(reader, f"{at}.nested_absmax", (-(-blocks // NESTED),), np.float32)
        table = get(reader, f"{at}.nested_quant_map", (256,), np.float32)
        offset = np.asarray(state["nested_offset"], np.float32)
        if np.array_equal(table, DYNAMIC):
            absmax = Nested(eight.reshape(rows, -1), nested, offset)
        else:
            absmax = (table[eight] * np.repeat(nested, NESTED)[:blocks] + offset).reshape(rows, -1)
    else:
        absmax = get(reader, f"{at}.absmax", (blocks,), np.float32).reshape(rows, -1)
    return FourBit(codes, absmax, shape, state["dtype"], block, found, matrix.transposed)


def _int8(reader: Reader, matrix: Matrix) -> Int8:
    stem, name = matrix.stem, f"{matrix.stem}.weight_format"
    if name in reader.names() and np.any(order := get(reader, name, None)):
        raise ValueError(f"{reader.source}: {name} is {order}: only weights kept by rows (0) can be read")
    codes = get(reader, f"{stem}.weight", matrix.theirs, np.int8)
    absmax = get(reader, f"{stem}.SCB", matrix.theirs[:1], np.float32)
    return Int8(codes.T if matrix.transposed else codes, absmax, matrix.dtype, matrix.transposed)


# -- writing ----------------------------------------------------------------------------------------------------------


def write(stem: str, leaf: FourBit | Int8) -> dict[str, np.ndarray]:
    """The tensors of one layer's leaf."""
    if isinstance(leaf, Int8):
        codes = leaf.codes.T if leaf.transposed else leaf.codes
        found = {"weight": codes, "SCB": leaf.absmax, "weight_format": np.zeros((), np.uint8)}
        return {f"{stem}.{key}": np.ascontiguousarray(x) for key, x in found.items()}
    shape = leaf.matrix[::-1] if leaf.transposed else leaf.matrix
    state = {"quant_type": leaf.kind, "blocksize": leaf.block_size, "dtype": leaf.stored, "shape": list(shape)}
    arrays = {"weight": leaf.codes.reshape(-1, 1), "weight.quant_map": CODES[leaf.kind]}
    if isinstance(leaf.absmax, Nested):
        eight, nested, offset = leaf.absmax
        arrays |= {"weight.absmax": eight.reshape(-1), "weight.nested_absmax": nested}
        arrays |= {"weight.nested_quant_map": DYNAMIC}
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(offset)}
    else:
        arrays["weight.absmax"] = leaf.absmax.reshape(-1)
    arrays[f"{STATE}{leaf.kind}"] = as_bytes(state)
    return {f"{stem}.{key}": np.asarray(x) for key, x in arrays.items()}


def config(leaves: Collection[Any], plain: Collection[str], dtype: str) -> dict[str, Any] | None:
    """The quantization_config with which transformers loads these leaves, or None where it cannot.

    Args:
        leaves: all that are stored in few bits, each the weight of a linear layer.
        plain: the modules that are not.
        dtype: of what is not.
    """
    skipped = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": sorted(plain)}
    if all(isinstance(leaf, Int8) for leaf in leaves):
        return {**skipped, "load_in_4bit": False, "load_in_8bit": True}
    if not all(isinstance(leaf, FourBit) for leaf in leaves):
        return None
    kinds = {(leaf.kind, leaf.block_size, isinstance(leaf.absmax, Nested)) for leaf in leaves}
    if len(kinds) > 1:
        return None
    ((kind, block, double),) = kinds
    if block not in BLOCKS:
        return None
    four = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": dtype}
    return {**skipped, "load_in_4bit": True, "load_in_8bit": False, **four, "bnb_4bit_quant_storage": "uint8"}
