"""What an adapter's files must hold, by its config and the model: no tensor more, none less, each of its shape."""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

import numpy as np

from peft_jax import trees
from peft_jax.core import Params
from peft_jax.interop.hf_peft import config as configs
from peft_jax.interop.hf_peft.kinds import Kind, Shapes
from peft_jax.interop.hf_peft.names import PREFIX, Names, Source
from peft_jax.weights import is_weight


class Contract(NamedTuple):
    """The tensors of each adapted module, and those of none; and by their full names, the source's tensors that are
    trained whole."""

    adapted: dict[str, Shapes]
    shared: Shapes
    whole: dict[str, Source]


def draw_up(config: Mapping[str, Any], names: Names, kind: Kind) -> Contract:
    """What a config promises of this model.

    Raises:
        ValueError: if the config trains one half of a tied embedding, or adapts what it also trains whole.
    """
    linear = {module for module, source in names.matrices.items() if not source.embedding and module != "lm_head"}
    modules = configs.targets(config, [*names.matrices, *names.tied], linear)
    whole = {PREFIX + s.name: s for s in names.sources.values() if configs.saved(config, s.module)}
    for head, embedding in names.tied.items():
        together = config.get("ensure_weight_tying")
        if together and {head, embedding} & set(modules):
            modules += [one for one in (embedding, head) if one not in modules]
        if saved := [one for one in (head, embedding) if configs.saved(config, one)]:
            if len(saved) == 1 and not together:
                raise ValueError(tied_apart(head, embedding, f"trains {saved[0]} alone"))
            whole |= {f"{PREFIX}{one}.weight": names.matrices[embedding] for one in (embedding, head)}
    for module in modules:
        if f"{PREFIX}{module}.weight" in whole:
            raise ValueError(f"the adapter's config both adapts {module} and lists it in modules_to_save")
    for source in names.sources.values():
        if source.bias and PREFIX + source.name not in whole:
            inside = ".base_layer" if source.module in modules else ""
            if config.get("bias") == "all" or (config.get("bias") == kind.bias and inside):
                whole[f"{PREFIX}{source.module}{inside}.bias"] = source
    return Contract(*kind.wanted(modules, config, names), whole)


def tied_apart(head: str, embedding: str, what: str) -> str:
    return (
        f"this model's {head} is its embedding {embedding}, one leaf here, and the adapter {what}: make it in HF PEFT "
        "with ensure_weight_tying=True, or untie the model (tie_word_embeddings=False)"
    )


def compare(
    tensors: Mapping[str, np.ndarray],
    contract: Contract,
    names: Names,
    params: Params,
    config: Mapping[str, Any],
    file: File,
) -> None:
    """Whether a file keeps the contract.

    Raises:
        ValueError: on the first tensor that is misshapen, extra or missing, in this order.
    """
    wanted = {key: (source.shape, source.where) for key, source in contract.whole.items()}
    for module, shapes in contract.adapted.items():
        where = names.matrices[names.tied.get(module, module)].where
        wanted |= {key: (shape, where) for key, shape in shapes.items()}
    wanted |= {key: (shape, "all its layers") for key, shape in contract.shared.items()}
    for key, (shape, where) in wanted.items():
        if key in tensors and tensors[key].shape != shape:
            raise ValueError(
                f"{file} holds {key} with shape {list(tensors[key].shape)}, and {where} of this model asks for "
                f"{list(shape)}: the adapter is for another base, or does not match its config"
            )
    for key in sorted(tensors.keys() - wanted.keys()):
        if not _repeats(key, tensors, names, params, config):
            known = any(key.startswith(f"{PREFIX}{source.module}.") for source in names.sources.values())
            known |= not key.startswith(PREFIX)  # of no module
            why = "which its config does not account for" if known else "which this model does not have: another base?"
            raise ValueError(f"{file} holds the tensor {key} {list(tensors[key].shape)}, {why}")
    for key, (shape, where) in wanted.items():
        if key not in tensors:
            raise ValueError(f"{file} lacks the tensor {key} {list(shape)}, which its config promises for {where}")
    if not wanted:
        raise ValueError(f"{file} adapts nothing: its config's target_modules match no module of this model")


def _repeats(
    key: str, tensors: Mapping[str, np.ndarray], names: Names, params: Params, config: Mapping[str, Any]
) -> bool:
    """Whether a tensor only says again what the model or another tensor says: HF PEFT writes some twice."""
    if config.get("bias") == "all" and key.endswith((".original_module.bias", ".modules_to_save.bias")):
        return True  # a module that is saved whole, under its own name too
    if not key.endswith(".weight"):
        return False
    # Adapted embeddings are written whole beside their adapters: they must be this model's.
    module = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    source = names.matrices.get(names.tied.get(module, module))
    if source is None or tensors[key].shape != source.shape:
        return False
    part = source.parts[0]
    leaf = trees.leaves(params)[part.path]
    if is_weight(leaf):
        return True  # quantised, say: not the same numbers, and not the adapter's
    ours = np.asarray(leaf if part.layer is None else leaf[part.layer])
    theirs = tensors[key].T if source.transpose else tensors[key]
    return bool(np.array_equal(theirs.astype(ours.dtype), ours) or np.array_equal(theirs, ours.astype(theirs.dtype)))
