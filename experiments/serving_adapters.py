"""Many adapters on disk, in HF PEFT's format, for demonstrations and measurements of serving.

They are LoRA of a base, drawn and not trained: A as LoRA starts it, B normal.  What a server does with an adapter
(reads, transfers, multiplies) does not depend on what it has learnt.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from peft_jax import interop, methods, trees

STRENGTH = 0.02  # the sd of B: changes what the model writes, and leaves it a language


def write(
    folder: Path,
    model: Any,
    count: int,
    *,
    ranks: Sequence[int] = (8,),
    select: str = "(q|v)_proj",
    dtype: Any = np.float32,
) -> list[str]:
    """Writes `count` adapters, their ranks in turn, into directories of their own, and gives their names.

    What is there already is kept.
    """
    templates = {rank: _template(model, rank, select) for rank in sorted(set(ranks))}
    names = [f"adapter-{i:04d}" for i in range(count)]
    for i, name in enumerate(names):
        if (folder / name / "adapter_config.json").is_file():
            continue
        config, tensors = templates[ranks[i % len(ranks)]]
        random = np.random.default_rng(i)
        drawn = {
            key: random.standard_normal(x.shape, np.float32) * (STRENGTH if "lora_B" in key else x.shape[-1] ** -0.5)
            for key, x in tensors.items()
        }
        drawn = {key: x.astype(dtype) for key, x in drawn.items()}
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(drawn, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return names


def _template(model: Any, rank: int, select: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors of one adapter, as `interop.hf_peft.save` writes them."""
    params, _ = methods.lora(rank, 2 * rank, select)(jax.random.key(0), model.params, model.forward)
    ones = lambda path, w: dataclasses.replace(w, b=jnp.ones_like(w.b))  # noqa: E731
    with tempfile.TemporaryDirectory() as place:
        interop.hf_peft.save(place, trees.rewrite(params, "lora", ones), model.forward)
        config = json.loads((Path(place) / "adapter_config.json").read_text())
        return config, load_file(Path(place) / "adapter_model.safetensors")
