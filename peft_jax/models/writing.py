"""A tree under its Hugging Face names, as safetensors."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from peft_jax.core import Params
from peft_jax.models import quantised
from peft_jax.models.checkpoint import plan
from peft_jax.models.tensors import Tensor
from peft_jax.on_disk import is_on_disk
from peft_jax.quant.frozen import Frozen
from peft_jax.trees import leaves
from peft_jax.weights import Leaf


def write_params(
    folder: File,
    params: Params,
    tensors: Sequence[Tensor],
    layers: int,
    scan: bool = True,
    *,
    shard_bytes: int = 2_000_000_000,
    bare: bool = False,
) -> dict[str, Any] | None:
    """Writes a tree as safetensors under its Hugging Face names, in shards of at most `shard_bytes`.

    Gives the quantization_config of what is stored in few bits (`peft_jax.models.quantised`), None where nothing is.
    One shard is held in memory at a time.  A tensor larger than `shard_bytes` gets a shard of its own.  `bare` as in
    `peft_jax.models.quantised.choose`.
    """
    made, tree = plan(params, tensors, layers, scan), leaves(params)
    config = quantised.choose(made, tree, bare)

    def size(source: str) -> int:
        found = [tree[path] for path, _ in made.parts[source][1]]
        return sum(_bytes(leaf) // math.prod(_lead(leaf, made.shapes[source])) for leaf in found)

    def gather(source: str) -> dict[str, np.ndarray]:
        transpose, parts = made.parts[source]
        found = [_matrix(tree[path], index, made.shapes[source]) for path, index in parts]
        if isinstance(found[0], Frozen):
            pairs = zip(made.stems[source], found, strict=True)
            return {name: x for stem, leaf in pairs for name, x in quantised.write(stem, leaf, config).items()}
        whole = found[0] if len(found) == 1 else np.concatenate(found, -1)
        return {source: np.ascontiguousarray(whole.T if transpose else whole)}

    shards: list[list[str]] = [[]]
    for source in made.shapes:
        if shards[-1] and sum(map(size, shards[-1])) + size(source) > shard_bytes:
            shards.append([])
        shards[-1].append(source)
    weight_map: dict[str, str] = {}
    total = 0
    for number, sources in enumerate(shards, 1):
        one = len(shards) == 1
        name = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays: Mapping[str, np.ndarray] = {key: x for source in sources for key, x in gather(source).items()}
        # transformers refuses files that do not name a format.
        save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(x.nbytes for x in arrays.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return config


def _bytes(leaf: Leaf) -> int:
    if isinstance(leaf, Frozen):
        return sum(x.nbytes for x in jax.tree.leaves(leaf))
    return int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def _lead(leaf: Leaf, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes of a leaf whose matrices, or vectors, have this shape in the source."""
    return tuple(leaf.shape[: len(leaf.shape) - len(shape)])


def _matrix(leaf: Leaf, index: int | None, shape: tuple[int, ...]) -> Leaf:
    """One layer of a leaf, or one expert of one, on the host."""
    if is_on_disk(leaf):
        return leaf.layer(index or 0)
    at = () if index is None else tuple(int(i) for i in np.unravel_index(index, _lead(leaf, shape)))
    return jax.tree.map(lambda x: np.asarray(x[at]), leaf)
