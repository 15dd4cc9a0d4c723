"""Weights as AutoGPTQ and GPTQModel keep them: integers of 2, 3, 4 or 8 bits with a step and a zero point a group.

For a module called `m`, of `in` inputs in groups of g:

    m.qweight   int32 [in · bits / 32, out]    codes along the inputs, low bits first: `GroupedInt.codes`
    m.qzeros    int32 [in / g, out · bits / 32] integer zero points, packed the same way along the outputs
    m.scales    fp16  [in / g, out]
    m.g_idx     int32 [in]                     which group each input belongs to

    W = scales[g_idx] · (q − zero)

The first version of the format ('gptq') stores zero − 1, the second ('gptq_v2') the zero point itself.

Source: AutoGPTQ, nn_modules/qlinear/qlinear_cuda_old.py; GPTQModel 7.7, utils/model.py
(``convert_gptq_v1_to_v2_format_module``).

Departures: groups must be runs of inputs.  Act-order checkpoints (desc_act), whose groups lie scattered, are refused.
"""

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from peft_jax.interop.bitsandbytes import Matrix, get
from peft_jax.on_disk import Reader
from peft_jax.quant.grouped import WORD, GroupedInt, pack, unpack

VERSIONS = ("gptq", "gptq_v2")


def check(fields: Mapping[str, Any], where: str) -> None:
    """Raises on a quantization_config that is of no version known here."""
    if version(fields) not in VERSIONS:
        raise ValueError(f"{where} holds GPTQ weights in the format {version(fields)!r}, and {VERSIONS} can be read")


def version(fields: Mapping[str, Any]) -> str:
    return str(fields.get("checkpoint_format") or fields.get("format") or VERSIONS[0])


def holds(names: Collection[str], stem: str) -> bool:
    return f"{stem}.qweight" in names


def tensors(names: Collection[str], stem: str) -> list[str]:
    """The names of all that a checkpoint keeps of a module's weight."""
    return [f"{stem}.{key}" for key in ("qweight", "qzeros", "scales", "g_idx") if f"{stem}.{key}" in names]


def read(reader: Reader, matrix: Matrix, fields: Mapping[str, Any]) -> GroupedInt:
    """The leaf of a module's weight, its arrays on the host.

    Raises:
        ValueError: if a tensor is missing or misshapen, the tensors do not fit the quantization_config, or the groups
            are not runs of inputs, with the name.
    """
    stem, (inputs, outputs) = matrix.stem, matrix.shape
    words, scales = f"{stem}.qweight", f"{stem}.scales"
    if not matrix.transposed:
        raise ValueError(f"{reader.source} keeps {stem} as GPTQ's integers, and embeddings cannot be read so")
    rows = reader.shape(words)[0]
    bits = rows * WORD // inputs
    if bits not in (2, 3, 4, 8) or rows * WORD != bits * inputs:
        raise ValueError(f"{reader.source}: {words} has {rows} words for {inputs} inputs, which is 2, 3, 4 nor 8 bits")
    step = get(reader, scales, None)
    groups = step.shape[0]
    if step.shape != (groups, outputs) or not groups or inputs % groups:
        raise ValueError(
            f"{reader.source} holds {scales} with shape {list(step.shape)}, which is no whole number of groups of "
            f"{inputs} inputs for {outputs} outputs"
        )
    size = inputs // groups
    exceptions = [key for key in fields.get("dynamic") or {} if not key.startswith("-:")]  # GPTQModel's, by module
    wanted = fields.get("bits"), fields.get("group_size")
    if not exceptions and (wanted[0] != bits or wanted[1] not in ((size, -1) if groups == 1 else (size,))):
        raise ValueError(
            f"{reader.source}: {stem} has {bits} bits and groups of {size}, and its quantization_config says bits "
            f"{wanted[0]} and group_size {wanted[1]}"
        )
    _check_order(reader, stem, inputs, size, bool(fields.get("desc_act")))
    codes = get(reader, words, (rows, outputs), np.int32).view(np.uint32)
    packed = get(reader, f"{stem}.qzeros", (groups, outputs * bits // WORD), np.int32).view(np.uint32)
    zero = np.asarray(_unpack(np.ascontiguousarray(packed.T), bits, outputs)).T
    if version(fields) == "gptq":
        zero = (zero + np.uint8(1)) & np.uint8(2**bits - 1)
    return GroupedInt(codes, step, zero.astype(np.float32), (inputs, outputs), matrix.dtype, bits, size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unpack(words: Any, bits: int, outputs: int) -> UInt8[Any, "outputs groups"]:
    return unpack(words, bits, outputs)


def _check_order(reader: Reader, stem: str, inputs: int, size: int, scattered: bool) -> None:
    name = f"{stem}.g_idx"
    if name in reader.names():
        scattered = not np.array_equal(get(reader, name, (inputs,)), np.arange(inputs) // size)
    if scattered:
        raise ValueError(
            f"{reader.source}: the groups of {stem} lie scattered over its inputs (act-order, desc_act), so no group's "
            "inputs can be pooled, as QA-LoRA does: quantise the original model here, or with desc_act=False"
        )


# -- writing ----------------------------------------------------------------------------------------------------------


def write(stem: str, leaf: GroupedInt, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of one layer's leaf, for a quantization_config that `config` gave."""
    inputs, mask = leaf.matrix[0], np.uint8(2**leaf.bits - 1)
    zero = np.asarray(leaf.zero).astype(np.uint8)
    if version(fields) == "gptq":
        zero = (zero - np.uint8(1)) & mask
    packed = np.asarray(_pack(np.ascontiguousarray(zero.T), leaf.bits))
    found = {
        "qweight": np.asarray(leaf.codes).view(np.int32),
        "qzeros": np.ascontiguousarray(packed.T).view(np.int32),
        "scales": np.asarray(leaf.step).astype(np.float16),
        "g_idx": (np.arange(inputs) // leaf.group_size).astype(np.int32),
    }
    return {f"{stem}.{key}": np.ascontiguousarray(x) for key, x in found.items()}


_pack = jax.jit(pack, static_argnums=1)


def config(leaves: Collection[Any], stems: Collection[str], plain: Collection[str]) -> dict[str, Any] | None:
    """The quantization_config of these leaves, or None where the format would lose something.

    It loses nothing where bits and group sizes are alike, rows and columns fill words, steps are exact in fp16, and
    zero points are integers within range.  The first version is chosen, which every reader knows, unless a zero point
    is 0, of which readers of zero − 1 make different things.

    Args:
        leaves: all that are stored in few bits, each the weight of a linear layer.
        stems, plain: the modules that are, and that are not.
    """
    if not all(isinstance(leaf, GroupedInt) and _is_lossless(leaf) for leaf in leaves):
        return None
    bits, sizes = {leaf.bits for leaf in leaves}, {leaf.group_size for leaf in leaves}
    rows = all(leaf.group_size == leaf.matrix[0] for leaf in leaves)
    if len(bits) > 1 or (len(sizes) > 1 and not rows):
        return None
    found = {"quant_method": "gptq", "bits": bits.pop(), "group_size": -1 if rows else sizes.pop(), "desc_act": False}
    lowest = min(float(jnp.min(leaf.zero)) for leaf in leaves)
    found |= {"sym": False, "lm_head": "lm_head" in stems, "pack_dtype": "int32"}
    found["checkpoint_format"] = VERSIONS[0] if lowest > 0 else VERSIONS[1]
    skipped = {f"-:^{re.escape(name)}$": dict[str, Any]() for name in sorted(plain)}
    return found | ({"dynamic": skipped} if skipped else {})


def _is_lossless(leaf: GroupedInt) -> bool:
    if any(size * leaf.bits % WORD for size in leaf.matrix):
        return False
    step, zero = (np.asarray(x).astype(np.float32) for x in (leaf.step, leaf.zero))
    with np.errstate(over="ignore"):  # a step beyond fp16 becomes infinite, and so is not the same
        exact = np.array_equal(step.astype(np.float16).astype(np.float32), step)
    return exact and np.array_equal(np.clip(np.rint(zero), 0, 2**leaf.bits - 1), zero)
