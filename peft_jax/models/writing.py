"""A tree under its Hugging Face names, as safetensors."""

import json
from collections.abc import Sequence
from pathlib import Path as File

import numpy as np
from safetensors.numpy import save_file

from peft_jax.core import Params
from peft_jax.models.checkpoint import plan
from peft_jax.models.tensors import Tensor
from peft_jax.trees import leaves


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
