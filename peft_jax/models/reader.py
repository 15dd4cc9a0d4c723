"""The `Reader` of safetensors."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from peft_jax.on_disk import Index


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
