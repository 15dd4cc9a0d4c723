"""Quantised checkpoints: which tensors stand for a matrix, and in which format a tree is saved.

Three formats are read: bitsandbytes' (`peft_jax.interop.bitsandbytes`), GPTQ's (`peft_jax.interop.gptq`), and our own,
which takes what the other two would lose.  A leaf gets the very codes of its file: nothing is quantised again.

Our own format is bitsandbytes' for `FourBit` and `Int8`, with any block size and embeddings too, and for `GroupedInt`

    m.qweight                   int32 [words, out]: `GroupedInt.codes`
    m.scales, m.zeros           floats [groups, out]: `step` and `zero`, in their own dtypes
    m.quant_state.peft_jax      JSON as bytes: kind, dtype and shape [in, out]; of grouped integers bits, group_size

where `m` is the module, or one part of a fused tensor by the name that `select` knows (GPT-2's ``….attn.c_attn.q``).
config.json has ``"quantization_config": {"quant_method": "peft_jax", "format": 1}``.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core import Path
from peft_jax.interop import bitsandbytes, gptq
from peft_jax.interop.bitsandbytes import Matrix, as_bytes, get, need, read_state
from peft_jax.on_disk import Reader, stacked
from peft_jax.quant.frozen import Frozen
from peft_jax.quant.grouped import GroupedInt
from peft_jax.quant.int8 import Int8
from peft_jax.quant.nf4 import FourBit
from peft_jax.weights import Leaf

FORMAT = 1
OURS = {"quant_method": "peft_jax", "format": FORMAT}
STATE = "quant_state.peft_jax"


class Packed(NamedTuple):
    """What a checkpoint keeps in few bits.

    leaves      for each path, what makes its leaf
    tensors     the names of all the tensors that they are made of
    zeros       the names of tensors that may be there if they are zero: biases, which AutoGPTQ adds
    """

    leaves: Mapping[Path, Callable[[], Leaf]]
    tensors: frozenset[str] = frozenset()
    zeros: frozenset[str] = frozenset()


EMPTY = Packed({})


def check(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config's quantization_config, if its format is one that can be read.

    Raises:
        ValueError: if it is not.
    """
    legacy = "bitsandbytes" if fields.get("load_in_4bit") or fields.get("load_in_8bit") else "?"
    found = {"quant_method": legacy, **fields}
    if found["quant_method"] == "gptq":
        gptq.check(found, where)
    elif found["quant_method"] == "peft_jax" and found.get("format") != FORMAT:
        raise ValueError(f"{where} has format {found.get('format')!r} of ours, and this version reads {FORMAT}")
    elif found["quant_method"] not in ("bitsandbytes", "peft_jax"):
        raise ValueError(
            f"{where} holds weights quantised by {found['quant_method']}: load the original model, and quantise it here"
        )
    return found


# -- reading ----------------------------------------------------------------------------------------------------------


def find(
    reader: Reader,
    slots: Mapping[Path, Sequence[Any]],
    tree: Mapping[Path, Any],
    fields: Mapping[str, Any],
    resolver: Callable[[Collection[str]], Callable[[str], str]],
) -> Packed:
    """What a checkpoint keeps in few bits of a tree's leaves.

    Args:
        reader: the checkpoint.
        slots, tree: the tree's plan (`peft_jax.models.checkpoint.Plan`), and its abstract leaves.
        fields: its quantization_config.
        resolver: `peft_jax.models.checkpoint.resolver`.

    Raises:
        ValueError: if some layers of a stacked leaf are kept in few bits and others not, or a fused tensor is.
    """
    names = reader.names()
    held = {stem for name in names if (stem := _stem(name, names, fields["quant_method"]))}
    resolve, found, taken, zeros = resolver(held), dict[Path, Callable[[], Leaf]](), set[str](), set[str]()
    for path, parts in slots.items():
        stems = [resolve(slot.stem) for slot in parts]
        one = parts[0].source.removesuffix(".weight")
        if one != parts[0].stem and resolve(one):
            raise ValueError(
                f"{reader.source} keeps {one}, of which {parts[0].stem} is a part, as one matrix in few bits, which no "
                "leaf can: load the original model, and quantise it here"
            )
        if path[-1] not in ("kernel", "embedding") or not any(stems):
            continue
        if not all(stems):
            here, other = (
                next(slot.stem for slot, s in zip(parts, stems, strict=True) if bool(s) is kept)
                for kept in (True, False)
            )
            raise ValueError(
                f"{reader.source} keeps {here} in few bits and {other} not, and {'/'.join(path)} holds all layers in "
                "one leaf: load it with scan=False, where each layer has its own"
            )
        shape, dtype = tuple(tree[path].shape[-2:]), str(tree[path].dtype)
        matrices = [Matrix(stem, shape, path[-1] == "kernel", dtype) for stem in stems]
        found[path] = functools.partial(_make, reader, matrices, tuple(tree[path].shape[:-2]), fields)
        for stem in stems:
            taken |= {*bitsandbytes.tensors(names, stem), *gptq.tensors(names, stem)}
            taken |= {name for key in ("zeros", STATE) if (name := f"{stem}.{key}") in names}
            zeros |= {f"{stem}.bias"} if fields["quant_method"] == "gptq" else set()
    return Packed(found, frozenset(taken), frozenset(zeros))


def _stem(name: str, names: Collection[str], method: str) -> str:
    """The module that a tensor shows to be kept in few bits, or ""."""
    stem, _, key = name.rpartition(".")
    if key == "qweight":
        return stem if method != "bitsandbytes" else ""
    if method != "gptq" and key in ("SCB", "bitsandbytes__nf4", "bitsandbytes__fp4"):
        return stem.removesuffix(".weight.quant_state")
    return ""


def _make(reader: Reader, matrices: Sequence[Matrix], lead: tuple[int, ...], fields: Mapping[str, Any]) -> Leaf:
    try:
        return stacked(lead, lambda i: _read(reader, matrices[i], fields))
    except ValueError as error:
        if not str(error).startswith("layer "):
            raise
        raise ValueError(f"{reader.source}: {matrices[0].stem}: {error}: load it with scan=False") from None


def _read(reader: Reader, matrix: Matrix, fields: Mapping[str, Any]) -> Leaf:
    if fields["quant_method"] == "gptq":
        return gptq.read(reader, matrix, fields)
    if bitsandbytes.kind(reader.names(), matrix.stem) in ("nf4", "fp4"):
        return bitsandbytes.read(reader, matrix)
    if fields["quant_method"] == "bitsandbytes":
        return bitsandbytes.read(reader, matrix)
    name = f"{matrix.stem}.{STATE}"
    state = read_state(reader, name)
    grouped = gptq.holds(reader.names(), matrix.stem)
    wanted = {"kind": "grouped" if grouped else "int8", "shape": list(matrix.shape), "dtype": bitsandbytes.DTYPES}
    need(reader, name, state, wanted)
    if not grouped:
        return bitsandbytes.read(reader, matrix._replace(dtype=state["dtype"]))
    need(reader, name, state, {"bits": (2, 3, 4, 8), "group_size": tuple(range(1, matrix.shape[0] + 1))})
    (inputs, outputs), bits, size = matrix.shape, state["bits"], state["group_size"]
    codes = get(reader, f"{matrix.stem}.qweight", (-(-inputs * bits // 32), outputs), np.int32).view(np.uint32)
    step, zero = (get(reader, f"{matrix.stem}.{key}", (inputs // size, outputs)) for key in ("scales", "zeros"))
    return GroupedInt(codes, step, zero, matrix.shape, state["dtype"], bits, size)


# -- writing ----------------------------------------------------------------------------------------------------------


def choose(made: Any, tree: Mapping[Path, Leaf], bare: bool = False) -> dict[str, Any] | None:
    """The quantization_config to save a tree under: bitsandbytes' or GPTQ's where that loses nothing, or else ours.

    None where nothing is stored in few bits.

    Args:
        made: the tree's plan (`peft_jax.models.checkpoint.Plan`).
        tree: its leaves.
        bare: whether transformers will load it as a model without a head, whose modules lack the first part of their
            names, and to which it adds a pooler.

    Raises:
        ValueError: if some parts of a fused tensor are stored in few bits and others not.
    """
    packed, linear, stems, plain = dict[Path, Leaf](), True, set[str](), set[str]()
    for source, (transpose, parts) in made.parts.items():
        kinds = [isinstance(tree[path], Frozen) for path, _ in parts]
        if any(kinds) and not all(kinds):
            one = made.stems[source][kinds.index(False)]
            raise ValueError(
                f"{source} is one tensor, and {one} is not in few bits as its other parts are: quantise all"
            )
        if all(kinds):
            if unknown := [tree[path] for path, _ in parts if not isinstance(tree[path], FourBit | Int8 | GroupedInt)]:
                raise ValueError(f"{source} is stored as {type(unknown[0]).__name__}, for which no file has a format")
            packed |= {path: tree[path] for path, _ in parts}
            linear &= transpose and len(parts) == 1
            stems |= set(made.stems[source])
        elif parts[0][0][-1] == "kernel":
            plain |= {source.removesuffix(".weight")}
    if not packed:
        return None
    leaves, dtype = list(packed.values()), next(str(x.dtype) for x in tree.values() if not isinstance(x, Frozen))
    head = set() if "lm_head" in stems else {"lm_head"}
    if bare:
        plain |= {name.partition(".")[2] for name in plain if "." in name} | {"pooler"}
    theirs = bitsandbytes.config(leaves, plain | head, dtype) or gptq.config(leaves, stems, plain) if linear else None
    return theirs or OURS


def write(stem: str, leaf: Leaf, fields: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """The tensors of one layer's leaf, in the format that `choose` gave."""
    method = (fields or OURS)["quant_method"]
    if method == "gptq":
        return gptq.write(stem, leaf, fields or OURS)
    state = {"kind": "int8", "dtype": leaf.stored, "shape": list(leaf.matrix)}
    if not isinstance(leaf, GroupedInt):
        own = {f"{stem}.{STATE}": as_bytes(state)} if method == "peft_jax" and isinstance(leaf, Int8) else {}
        return bitsandbytes.write(stem, leaf) | own
    state |= {"kind": "grouped", "bits": leaf.bits, "group_size": leaf.group_size}
    arrays = {"qweight": leaf.codes.view(np.int32), "scales": leaf.step, "zeros": leaf.zero, STATE: as_bytes(state)}
    return {f"{stem}.{key}": np.ascontiguousarray(x) for key, x in arrays.items()}
