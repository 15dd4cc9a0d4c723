"""An adapter's directory: written whole or not at all, read strictly."""

import json
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peft_jax.files import replacing
from peft_jax.models.reader import read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write(folder: File, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """Writes both files beside their place, then renames; what else the directory holds stays.

    Raises:
        FileExistsError: if `folder` is a file.
    """
    with replacing(folder, (WEIGHTS, CONFIG)) as fresh:
        save_file(dict(tensors), fresh / WEIGHTS, metadata={"format": "pt"})  # as HF PEFT has it
        (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def read_config(folder: File) -> dict[str, Any]:
    """The adapter's config.

    Raises:
        FileNotFoundError: if the directory is not there or holds no adapter, with the adapters in its sub-folders.
        ValueError: if the config is damaged.
    """
    file = folder / CONFIG
    if not file.is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; its sub-folders hold the adapters {', '.join(inside)}: say which, adapter=…" if inside else ""
        raise FileNotFoundError(f"{folder} holds no {CONFIG}{hint}")
    config = read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{file} is not the config of an adapter: it names no peft_type")
    return config


def read_tensors(folder: File) -> dict[str, np.ndarray]:
    """The adapter's tensors by name.

    Raises:
        FileNotFoundError: if there is no safetensors file.
        ValueError: if the file is cut short, is not safetensors, or holds anything but floating-point numbers.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise FileNotFoundError(
                f"{folder} holds adapter_model.bin, a pickle, which can run any code when it is opened: in an "
                "environment that you trust it with, load it with HF PEFT and save it again"
            )
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}")
    try:
        with safe_open(file, "numpy") as mapped:
            tensors = {name: mapped.get_tensor(name) for name in mapped.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:  # a type that numpy lacks is a TypeError
        raise ValueError(f"{file} is cut short or is not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{file} holds {name} as {tensor.dtype}: an adapter's tensors are floating-point numbers")
    return tensors
