"""Checkpoints by tensor name: from safetensors (or anything with a `Reader`) to our tree, and back.

A family's table of `Tensor`s says where each tensor goes.  Reading is strict: the first missing, extra or misshapen
tensor raises.  Nothing holds two copies of a model: a leaf is filled layer by layer, in blocks, straight from the
mapped file, and with shardings each device gets only the slices it keeps.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path as File
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peft_jax.core import Params, Path
from peft_jax.models.tensors import Tensor, unrolled
from peft_jax.trees import leaves, path_of

Index = tuple[slice, ...]  # a region of an array, each slice with its start and stop
BLOCK = 64 << 20  # bytes of a source that are read, converted and transposed at a time

# Buffers that old checkpoints carry and no model needs: they are computed from the config.
# What may repeat an embedding, and what may be there if it is zero: older encoder-decoder models store both.
COPY, ZERO = re.compile(r"^lm_head\.weight$|\.embed_tokens\.weight$"), re.compile(r"^final_logits_bias$")
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)attn\.(masked_)?bias$|embeddings\.position_ids$")


@runtime_checkable
class Reader(Protocol):
    """A checkpoint whose tensors can be read by their Hugging Face names, a region at a time."""

    @property
    def source(self) -> str:
        """The file or folder, for messages."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: Index) -> np.ndarray: ...


# -- safetensors ------------------------------------------------------------------------------------------------------


class SafeTensors(NamedTuple):
    """A `Reader` of safetensors: where each tensor lies, and its shape."""

    source: str
    tensors: Mapping[str, tuple[File, tuple[int, ...]]]

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def read(self, name: str, index: Index) -> np.ndarray:
        # The file is mapped for one read only, so that pages already copied do not count as ours.
        with safe_open(self.tensors[name][0], "numpy") as mapped:
            return mapped.get_slice(name)[index]


def open_safetensors(folder: File) -> SafeTensors:
    """Opens ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists.

    Raises:
        ValueError: if the folder holds no safetensors, a listed shard or tensor is missing, or a file is damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    listed: dict[str, str] = {}
    if single.is_file():
        files = [single]
    elif index.is_file():
        listed = read_json(index).get("weight_map", {})
        if strays := sorted({name for name in listed.values() if File(name).name != name}):
            raise ValueError(f"{index} points outside its folder, to {strays[0]}")
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        raise ValueError(_no_weights(folder))
    tensors: dict[str, tuple[File, tuple[int, ...]]] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{index} lists {file.name}, which is not there: download it again")
        try:
            with safe_open(file, "numpy") as mapped:
                tensors |= {name: (file, tuple(mapped.get_slice(name).get_shape())) for name in mapped.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is cut short or is not a safetensors file: download it again ({error})") from None
    if absent := sorted(listed.keys() - tensors.keys()):
        raise ValueError(f"{index} lists {absent[0]}, which {listed[absent[0]]} does not hold")
    return SafeTensors(str(folder), tensors)


def _no_weights(folder: File) -> str:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is opened: in an environment that "
            "you trust it with, convert it by transformers' AutoModelForCausalLM (an encoder: AutoModel)"
            ".from_pretrained(folder).save_pretrained(new_folder)"
        )
    return f"{folder} holds neither model.safetensors nor model.safetensors.index.json"


def read_json(file: File) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


# -- the plan ---------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """Where one layer's matrix of a leaf lies in the source: from column `start` of a tensor, in our layout."""

    source: str
    transpose: bool
    start: int


class Plan(NamedTuple):
    """A family's table, matched with a tree.

    slots     for each leaf, where its layers' matrices lie
    parts     for each tensor, whether it is transposed, and the leaves it is made of (each with a layer, if stacked)
    shapes    for each tensor, its shape in the source
    """

    slots: dict[Path, list[Slot]]
    parts: dict[str, tuple[bool, list[tuple[Path, int | None]]]]
    shapes: dict[str, tuple[int, ...]]


def plan(params: Params, tensors: Sequence[Tensor], layers: int, scan: bool) -> Plan:
    """Matches a family's table with a tree, which may be abstract.

    Raises:
        ValueError: if the tree lacks a leaf of the table, or the table a leaf of the tree.
    """
    tree, made = leaves(params), Plan({}, {}, {})
    for tensor in tensors:
        for layer in range(tensor.layers or layers) if tensor.layered else (0,):
            source, start, parts = tensor.source.format(layer=layer), 0, []
            for path in tensor.paths:
                where = unrolled(path, layer) if tensor.layered and not scan else tuple(path.split("/"))
                if where not in tree:
                    raise ValueError(f"the tree lacks {'/'.join(where)}, which holds {source}")
                stacked = tensor.layered and scan
                shape = tuple(tree[where].shape[1:] if stacked else tree[where].shape)
                made.slots.setdefault(where, []).append(Slot(source, tensor.transpose, start))
                parts.append((where, layer if stacked else None))
                start += shape[-1]
            shape = (*shape[:-1], start)
            made.parts[source] = tensor.transpose, parts
            made.shapes[source] = shape[::-1] if tensor.transpose else shape
    if strays := tree.keys() - made.slots.keys():
        raise ValueError(f"the leaf {'/'.join(min(strays))} is not part of the source model, so no tensor can hold it")
    return made


def locate(reader: Reader, shapes: Mapping[str, tuple[int, ...]], unused: str = "") -> dict[str, str]:
    """The name under which a checkpoint holds each tensor, after checking that it holds these and nothing else.

    A checkpoint saved from the bare model lacks the first part of the names (``transformer.h.0…`` is ``h.0…``), and one
    saved with a head has it where the bare model does not (``encoder.layer.0…`` is ``bert.encoder.layer.0…``).
    """
    stored = set(reader.names())
    inner = {name.partition(".")[2]: name for name in stored}
    bare = {source: source.partition(".")[2] for source in shapes}
    options = {source: (source, bare[source], inner.get(source, "")) for source in shapes}
    found = {source: next((name for name in names if name in stored), "") for source, names in options.items()}
    found = {source: name for source, name in found.items() if name}
    if missing := [source for source in shapes if source not in found]:
        more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{reader.source} does not hold the tensor {missing[0]} {list(shapes[missing[0]])}{more}")
    for source, name in found.items():
        if tuple(reader.shape(name)) != shapes[source]:
            raise ValueError(
                f"{reader.source} holds {name} with shape {list(reader.shape(name))}, "
                f"and its config asks for {list(shapes[source])}"
            )
    for name in sorted(stored - set(found.values())):
        if unused and re.search(unused, name):
            continue
        if ZERO.search(name) and not np.any(reader.read(name, tuple(slice(0, n) for n in reader.shape(name)))):
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
) -> Params:
    """Fills an abstract tree from a checkpoint, each leaf in the dtype that the tree asks for.

    Args:
        reader: the checkpoint.
        tensors, layers, scan: the family's table, and how the tree lays out its layers.
        abstract: the tree as `jax.ShapeDtypeStruct`s.
        shardings: a sharding, or a tree of them that `abstract` refines; each device then gets only its own slices.
        unused: a pattern of the names that the checkpoint may hold beside: other heads, say.

    Raises:
        ValueError: if a tensor is missing, extra or misshapen, with its name, its shapes and the file.
    """
    made = plan(abstract, tensors, layers, scan)
    names = locate(reader, made.shapes, unused)

    def create(keys: Any, leaf: Any, sharding: Any = None) -> jax.Array:
        slots = [slot._replace(source=names[slot.source]) for slot in made.slots[path_of(keys)]]
        fill = functools.partial(_fill, reader, slots, leaf)
        if sharding is None:
            return jax.device_put(fill(_whole(leaf.shape)))
        return jax.make_array_from_callback(leaf.shape, sharding, _once(fill, leaf.shape))

    if shardings is None:
        return jax.tree_util.tree_map_with_path(create, abstract)
    spread = jax.tree.map(lambda sharding, part: jax.tree.map(lambda _: sharding, part), shardings, abstract)
    return jax.tree_util.tree_map_with_path(create, abstract, spread)


def _whole(shape: Sequence[int]) -> Index:
    return tuple(slice(0, n) for n in shape)


def _once(fill: Callable[[Index], np.ndarray], shape: Sequence[int]) -> Callable[[Any], np.ndarray]:
    """Devices that hold the same region share one read."""
    seen: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def region(index: Any) -> np.ndarray:
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        if key not in seen:
            seen[key] = fill(tuple(slice(start, stop) for start, stop, _ in key))
        return seen[key]

    return region


def _fill(reader: Reader, slots: Sequence[Slot], leaf: Any, index: Index) -> np.ndarray:
    """A region of a leaf, read matrix by matrix."""
    out = _aligned(tuple(s.stop - s.start for s in index), leaf.dtype)
    if len(index) == len(reader.shape(slots[0].source)):  # not stacked
        _read_matrix(reader, slots[0], index, out)
        return out
    for row, layer in enumerate(range(index[0].start, index[0].stop)):
        _read_matrix(reader, slots[layer], index[1:], out[row])
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


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that JAX's CPU backend can take over without a copy, which it does at 64-byte addresses."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


# -- writing ----------------------------------------------------------------------------------------------------------


def write_params(
    folder: File,
    params: Params,
    tensors: Sequence[Tensor],
    layers: int,
    scan: bool = True,
    *,
    shard_bytes: int = 2_000_000_000,
) -> None:
    """Writes plain arrays as safetensors under their Hugging Face names, in shards of at most `shard_bytes`.

    One shard is held in memory at a time.  A tensor larger than `shard_bytes` gets a shard of its own.
    """
    made, tree = plan(params, tensors, layers, scan), leaves(params)
    sizes = {
        source: int(np.prod(shape)) * np.dtype(tree[made.parts[source][1][0][0]].dtype).itemsize
        for source, shape in made.shapes.items()
    }
    shards: list[list[str]] = [[]]
    for source, size in sizes.items():
        if shards[-1] and sum(sizes[name] for name in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(source)

    def gather(source: str) -> np.ndarray:
        transpose, parts = made.parts[source]
        arrays = [np.asarray(tree[path] if layer is None else tree[path][layer]) for path, layer in parts]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)
        return np.ascontiguousarray(whole.T if transpose else whole)

    weight_map: dict[str, str] = {}
    for number, sources in enumerate(shards, 1):
        one = len(shards) == 1
        name = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # transformers refuses files that do not name a format.
        save_file({source: gather(source) for source in sources}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sources, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
