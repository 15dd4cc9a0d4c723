"""Checkpoints by tensor name: from safetensors (or anything with a `Reader`) to our tree.

A family's table of `Tensor`s says where each tensor goes.  Reading is strict: the first missing, extra or misshapen
tensor raises.  Nothing holds two copies of a model: a leaf is filled layer by layer, in blocks, straight from the
mapped file, and with shardings each device gets only the slices it keeps.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax.core import Params, Path
from peft_jax.models.quantised import EMPTY, Packed, find
from peft_jax.models.tensors import Tensor, place
from peft_jax.on_disk import Index, OnDisk, Reader, aligned, once, put, whole
from peft_jax.sharding import arrays_like
from peft_jax.trees import leaves, path_of
from peft_jax.weights import Leaf

BLOCK = 64 << 20  # bytes of a source that are read, converted and transposed at a time

# Buffers that old checkpoints carry and no model needs: they are computed from the config.
# What may repeat an embedding, and what may be there if it is zero: older encoder-decoder models store both.
COPY, ZERO = re.compile(r"^lm_head\.weight$|\.embed_tokens\.weight$"), re.compile(r"^final_logits_bias$")
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)attn\.(masked_)?bias$|embeddings\.position_ids$")


# -- the plan ---------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """Where one layer's (one expert's) matrix of a leaf lies in the source: from column `start` of a tensor, laid out
    as ours.

    `stem` is the name of its module: what the source calls it, or what `select` calls a part of a tensor.
    """

    source: str
    transpose: bool
    start: int
    stem: str


class Plan(NamedTuple):
    """A family's table, matched with a tree.

    slots     for each leaf, where its layers' matrices lie
    parts     for each tensor, whether it is transposed, and the leaves it is made of, each with the index of its
              matrix on the leaf's leading axes, counted as one (None where it has none)
    stems     for each tensor, the names of its parts' modules
    shapes    for each tensor, its shape in the source
    """

    slots: dict[Path, list[Slot]]
    parts: dict[str, tuple[bool, list[tuple[Path, int | None]]]]
    stems: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]


def plan(params: Params, tensors: Sequence[Tensor], layers: int, scan: bool) -> Plan:
    """Matches a family's table with a tree, which may be abstract.

    Raises:
        ValueError: if the tree lacks a leaf of the table, or the table a leaf of the tree.
    """
    tree, made = leaves(params), Plan({}, {}, {}, {})
    for tensor in tensors:
        stacked = tensor.layered and scan
        lead = stacked + bool(tensor.experts)
        for layer, expert in tensor.places(layers):
            source, start, parts = tensor.source.format(layer=layer, expert=expert), 0, []
            alone = (tensor.source.removesuffix(".weight"),)
            named = tensor.names if len(tensor.paths) > 1 else alone
            stems = tuple(name.format(layer=layer, expert=expert) for name in named)
            for path, stem in zip(tensor.paths, stems, strict=True):
                where = place(path, tensor, layer, scan)
                if where not in tree:
                    raise ValueError(f"the tree lacks {'/'.join(where)}, which holds {source}")
                shape = tuple(tree[where].shape[lead:])
                mine = made.slots.setdefault(where, [])
                parts.append((where, len(mine) if lead else None))
                mine.append(Slot(source, tensor.transpose, start, stem))
                start += shape[-1]
            shape = (*shape[:-1], start)
            made.parts[source], made.stems[source] = (tensor.transpose, parts), stems
            made.shapes[source] = shape[::-1] if tensor.transpose else shape
    if strays := tree.keys() - made.slots.keys():
        raise ValueError(f"the leaf {'/'.join(min(strays))} is not part of the source model, so no tensor can hold it")
    return made


def resolver(names: Collection[str]) -> Callable[[str], str]:
    """From our name of a tensor or module to the one that a checkpoint has among `names`, or "".

    A checkpoint saved from the bare model lacks the first part of the names (``transformer.h.0…`` is ``h.0…``), and one
    saved with a head has it where the bare model does not (``encoder.layer.0…`` is ``bert.encoder.layer.0…``).
    """
    stored = set(names)
    inner = {name.partition(".")[2]: name for name in stored}

    def resolve(name: str) -> str:
        options = (name, name.partition(".")[2], inner.get(name, ""))
        return next((option for option in options if option in stored), "")

    return resolve


def locate(
    reader: Reader, shapes: Mapping[str, tuple[int, ...]], unused: str = "", packed: Packed = EMPTY
) -> dict[str, str]:
    """The name under which a checkpoint holds each tensor, after checking that it holds these, `packed`, no other."""
    stored, resolve = set(reader.names()), resolver(reader.names())
    found = {source: name for source in shapes if (name := resolve(source))}
    if missing := [source for source in shapes if source not in found]:
        more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{reader.source} does not hold the tensor {missing[0]} {list(shapes[missing[0]])}{more}")
    for source, name in found.items():
        if tuple(reader.shape(name)) != shapes[source]:
            raise ValueError(
                f"{reader.source} holds {name} with shape {list(reader.shape(name))}, "
                f"and its config asks for {list(shapes[source])}"
            )
    for name in sorted(stored - set(found.values()) - packed.tensors):
        if unused and re.search(unused, name):
            continue
        may_be_zero = ZERO.search(name) or name in packed.zeros
        if may_be_zero and not np.any(reader.read(name, whole(reader.shape(name)))):
            continue
        if not HARMLESS.search(name) and not (COPY.search(name) and _is_copy(reader, name, found.values())):
            raise ValueError(
                f"{reader.source} holds a tensor that the model has no place for: {name} {list(reader.shape(name))}"
            )
    return found


def _is_copy(reader: Reader, copy: str, names: Collection[str]) -> bool:
    """Whether a tensor is a copy of an embedding, so that a model with tied embeddings may pass over it."""
    shape = tuple(reader.shape(copy))
    rows = max(1, BLOCK // (4 * shape[-1]))
    blocks = [(slice(i, min(i + rows, shape[0])), slice(0, shape[1])) for i in range(0, shape[0], rows)]
    return any(
        all(np.array_equal(reader.read(name, block), reader.read(copy, block)) for block in blocks)
        for name in names
        if tuple(reader.shape(name)) == shape
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def read_params(
    reader: Reader,
    tensors: Sequence[Tensor],
    abstract: Params,
    layers: int,
    scan: bool = True,
    shardings: Any = None,
    unused: str = "",
    lazy: bool = False,
    quantised: Any = None,
) -> Params:
    """Fills an abstract tree from a checkpoint, each leaf in the dtype that the tree asks for.

    Args:
        reader: the checkpoint.
        tensors, layers, scan: the family's table, and how the tree lays out its layers.
        abstract: the tree as `jax.ShapeDtypeStruct`s.
        shardings: a sharding, or a tree of them that `abstract` refines; each device then gets only its own slices.
        unused: a pattern of the names that the checkpoint may hold beside: other heads, say.
        lazy: leaves matrices on disk (`peft_jax.on_disk`), and reads vectors, which are small.
        quantised: the checkpoint's quantization_config: what it keeps in few bits becomes leaves that hold the same.

    Raises:
        ValueError: if a tensor is missing, extra or misshapen, with its name, its shapes and the file.
    """
    made = plan(abstract, tensors, layers, scan)
    packed = find(reader, made.slots, leaves(abstract), quantised, resolver) if quantised else EMPTY
    left = {slot.source for path, slots in made.slots.items() if path not in packed.leaves for slot in slots}
    names = locate(reader, {name: shape for name, shape in made.shapes.items() if name in left}, unused, packed)

    def create(keys: Any, leaf: Any, sharding: Any = None) -> Leaf:
        if path_of(keys) in packed.leaves:
            return _unpacked(packed.leaves[path_of(keys)], sharding)
        slots = [slot._replace(source=names[slot.source]) for slot in made.slots[path_of(keys)]]
        fill = functools.partial(_fill, reader, slots, leaf)
        if lazy and len(reader.shape(slots[0].source)) == 2:
            where = tuple(f"{slot.source} of {reader.source}" for slot in slots)
            return OnDisk(tuple(leaf.shape), str(leaf.dtype), fill, where)
        if sharding is None:
            return jax.device_put(fill(whole(leaf.shape)))
        return jax.make_array_from_callback(leaf.shape, sharding, once(fill, leaf.shape))

    if shardings is None:
        return jax.tree_util.tree_map_with_path(create, abstract)
    spread = jax.tree.map(lambda sharding, part: jax.tree.map(lambda _: sharding, part), shardings, abstract)
    return jax.tree_util.tree_map_with_path(create, abstract, spread)


def _unpacked(make: Callable[[], Leaf], sharding: Any) -> Leaf:
    """A leaf in few bits, whose arrays lie as `sharding` would have its matrix lie."""
    leaf = make()
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return leaf if sharding is None else jax.device_put(leaf, sharding)
    spec = (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim][-2:]
    split = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
    return jax.tree.map(put, leaf, arrays_like(leaf, split))


def _fill(reader: Reader, slots: Sequence[Slot], leaf: Any, index: Index) -> np.ndarray:
    """A region of a leaf, read matrix by matrix."""
    out = aligned(tuple(s.stop - s.start for s in index), leaf.dtype)
    lead = len(index) - len(reader.shape(slots[0].source))  # how many axes are not the matrix's own
    numbers = np.arange(len(slots)).reshape(leaf.shape[:lead])[index[:lead]]
    for at, number in np.ndenumerate(numbers):
        _read_matrix(reader, slots[number], index[lead:], out[at])
    return out


def _read_matrix(reader: Reader, slot: Slot, index: Index, out: np.ndarray) -> None:
    """Copies a region of one matrix into `out`, a block of the source's rows at a time."""
    index = (*index[:-1], slice(index[-1].start + slot.start, index[-1].stop + slot.start))
    first, *rest = index[::-1] if slot.transpose else index
    out = out.T if slot.transpose else out
    step = max(1, BLOCK // max(4, 4 * out[:1].size))
    for start in range(first.start, first.stop, step):
        stop = min(start + step, first.stop)
        block = reader.read(slot.source, (slice(start, stop), *rest))
        out[start - first.start : stop - first.start] = block.astype(out.dtype)
