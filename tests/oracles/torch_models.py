"""The oracle of every model family: a tiny random transformers model in torch, and our tree with the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from peft_jax import Forward
from peft_jax.models import families
from peft_jax.models.tensors import Tensor, unrolled


def family(config: Any) -> Any:
    return families.family(config.model_type)


def torch_model(config: Any, seed: int = 0) -> torch.nn.Module:
    """Eager attention, and every parameter random (biases and norms too), so large that logits vary by O(1)."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name or ".ln_" in name
            if parameter.ndim == 1:
                parameter.copy_((1 + 0.3 * noise) if norm and name.endswith("weight") else 0.3 * noise)
            else:
                parameter.copy_(noise * (1.5 / max(parameter.shape) ** 0.5))
    return model


def numbers(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return on_disk(model, model.state_dict())


def on_disk(model: Any, named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A model's tensors by the names it saves them under: transformers fuses what its files hold expert by expert."""
    if any(".experts." in name for name in named):
        named = revert_weight_conversion(model, named)
    return {name: tensor.detach().numpy().copy() for name, tensor in named.items()}


def fill(table: tuple[Tensor, ...], named: dict[str, np.ndarray], abstract: Any, layers: int, scan: bool) -> Any:
    """Our tree, from a family's table of tensors and arrays by their source names.  Also fits gradients."""
    flat: dict[tuple[str, ...], jax.Array] = {}
    for tensor in table:
        own = range((tensor.layers or layers) if tensor.layered else 1)
        arrays = []
        for i in own:
            sources = [tensor.source.format(layer=i, expert=e) for e in range(tensor.experts or 1)]
            mine = [named[source].T if tensor.transpose else named[source] for source in sources]
            arrays.append(np.stack(mine) if tensor.experts else mine[0])
        pieces = [np.split(array, len(tensor.paths), axis=-1) for array in arrays]
        for i, path in enumerate(tensor.paths):
            mine = [piece[i] for piece in pieces]
            if not tensor.layered or scan:
                flat[tuple(path.split("/"))] = jnp.asarray(np.stack(mine) if tensor.layered else mine[0])
            else:
                flat |= {unrolled(path, layer): jnp.asarray(array) for layer, array in enumerate(mine)}

    def place(keys: Any, leaf: Any) -> jax.Array:
        array = flat.pop(tuple(key.key for key in keys))
        assert array.shape == leaf.shape, (keys, array.shape, leaf.shape)
        return array

    tree = jax.tree_util.tree_map_with_path(place, abstract)
    assert not flat, f"the tree has no place for {sorted(flat)}"
    return tree


def pair(config: Any, *, seed: int = 0, scan: bool = True, **options: Any) -> tuple[torch.nn.Module, Any, Forward]:
    """``(torch model, params, forward)`` of the same random numbers."""
    model = torch_model(config, seed)
    return model, *ours(config, numbers(model), scan=scan, **options)


def ours(config: Any, named: dict[str, np.ndarray], *, scan: bool = True, **options: Any) -> tuple[Any, Forward]:
    """``(params, forward)`` from arrays by their source names."""
    module = family(config)
    abstract = jax.eval_shape(lambda key: module.init(key, config, scan=scan), jax.random.key(0))
    params = fill(module.tensors(config), named, abstract, config.num_hidden_layers, scan)
    return params, module.build(config, scan=scan, **options)


def torch_logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits in fp32, positions counted over real tokens."""
    extra = {}
    if mask is not None:
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        extra = {"attention_mask": torch.tensor(mask).long(), "position_ids": torch.tensor(positions).long()}
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), use_cache=False, **extra).logits.numpy()
