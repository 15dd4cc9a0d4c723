"""From a tree to an adapter's files."""

import os
import re
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import numpy as np

from peft_jax import trees
from peft_jax.core import Forward, Params
from peft_jax.interop.hf_peft import config as configs
from peft_jax.interop.hf_peft import files, prompts
from peft_jax.interop.hf_peft.contract import keys_of
from peft_jax.interop.hf_peft.names import PREFIX, Names, Source, names_of, refuse_copies, refuse_unreached
from peft_jax.interop.hf_peft.reading import Adapter, adapter_of, one_of_a_stack, read_leaf, trains, value_of
from peft_jax.models.families import spec_of


def save(
    directory: str | os.PathLike[str],
    params: Params,
    forward: Forward | None = None,
    *,
    adapter: str | None = None,
    dropout: float = 0.0,
    base_model_name_or_path: str | None = None,
    task_type: str | None = "auto",
) -> None:
    """Writes the adapter of a tree as HF PEFT's ``adapter_model.safetensors`` and ``adapter_config.json``.

    What the base holds is not written; HF PEFT on the same base gives the same outputs.  See
    `peft_jax.interop.hf_peft` for what becomes of each kind of leaf.  Both files appear together or not at all; what
    else the directory holds stays.

    Args:
        directory: the adapter's directory.
        params: the tree with its adapters.
        forward: the model's forward function, whose `spec` knows the source model's names.  A tree of one of
            `models.FAMILIES` shows them itself; any other needs it.
        adapter: which one to write, of a tree made by `pj.adapters.stack`.
        dropout: the rate to record for whoever trains on: a tree does not know it.
        base_model_name_or_path: the base to record.
        task_type: the task to record; by default, what the model's head is for.

    Raises:
        ValueError: if the tree holds what the format cannot, with the leaf's path; or nothing to save.

    >>> import jax, pathlib, tempfile, peft_jax as pj
    >>> from peft_jax import interop, methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.numpy.eye(64)}}
    >>> params, forward = methods.lora(rank=4, alpha=8)(jax.random.key(0), params, forward)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     interop.hf_peft.save(f"{folder}/adapter", params, forward)
    ...     sorted(file.name for file in pathlib.Path(folder, "adapter").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    params = one_of_a_stack(params, adapter)
    if isinstance(params, Mapping) and params.get("ports"):
        return _save_port(File(directory), params, forward, task_type, base_model_name_or_path)
    for name in params.get("methods", ()) if isinstance(params, Mapping) else ():
        raise ValueError(f"methods/{name} is shared by the layers: HF PEFT's LoRA format cannot hold it")
    read = {path: read_leaf(path, leaf) for path, leaf in trees.leaves(params).items()}
    names = names_of(params, spec_of(params) if forward is None else forward.spec)
    adapted = {module: found for module, source in names.matrices.items() if (found := adapter_of(source, read))}
    refuse_copies(adapted, "the tree")
    refuse_unreached(adapted, "the tree")
    _check_magnitudes(adapted, names)
    trained = [s for s in names.sources.values() if any(trains(read[part.path], part.layer) for part in s.parts)]
    bias, whole = _trained_whole(trained, adapted, names)
    if not adapted and not whole:
        raise ValueError("the tree holds no adapter to save: apply a method such as methods.lora first")

    tensors: dict[str, np.ndarray] = {}
    for module, found in adapted.items():
        tensors |= _keys(names, module, found)
    for source in whole:
        inside = ".base_layer" if source.module in adapted else ""
        tensors[f"{PREFIX}{source.module}{inside}.{source.name.rpartition('.')[2]}"] = value_of(source, read)
    to_save = {source.module for source in whole if not _is_covered(source, bias, adapted)}
    refuse_copies(to_save, "the tree")
    sizes = {module: (found.term.a.shape[1], found.term.scale) for module, found in adapted.items()}
    tied = False
    for head, embedding in names.tied.items():  # what becomes of the embedding becomes of its head
        tied |= embedding in adapted or embedding in to_save
        if embedding in adapted:
            sizes[head] = sizes[embedding]
        if embedding in to_save:
            to_save.add(head)
            tensors[f"{PREFIX}{head}.weight"] = tensors[f"{PREFIX}{embedding}.weight"]
    linear = [module for module, source in names.matrices.items() if not source.embedding]
    config = (
        _common(task_type, base_model_name_or_path, names)
        | configs.scaling(sizes)
        | {
            "peft_type": "LORA",
            "target_modules": _targets(set(sizes), linear) or configs.NOTHING_ADAPTED,
            "modules_to_save": sorted(_whole_modules(to_save, names)) or None,
            "bias": bias,
            "lora_dropout": dropout,
            "use_dora": any(found.magnitude is not None for found in adapted.values()),
            "fan_in_fan_out": any(module in linear and not names.matrices[module].transpose for module in adapted),
            "init_lora_weights": True,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    )
    files.write(File(directory), tensors, config | ({"ensure_weight_tying": True} if tied else {}))


def _common(task_type: str | None, base: str | None, names: Names) -> dict[str, Any]:
    task = _task(names) if task_type == "auto" else task_type
    return {"task_type": task, "base_model_name_or_path": base, "inference_mode": True, "revision": None}


def _task(names: Names) -> str:
    """What HF PEFT calls the task of a model with these modules."""
    modules = names.matrices.keys()
    if "qa_outputs" in modules:
        return "QUESTION_ANS"
    if "classifier.dense" in modules or any(module.endswith("pooler.dense") for module in modules):
        return "SEQ_CLS"
    if "classifier" in modules:
        return "TOKEN_CLS"
    if any(re.search(r"\.(EncDecAttention|encoder_attn)\.", module) for module in modules):
        return "SEQ_2_SEQ_LM"
    return "FEATURE_EXTRACTION" if any(module.endswith("word_embeddings") for module in modules) else "CAUSAL_LM"


def _whole_modules(to_save: set[str], names: Names) -> set[str]:
    """Their names for the config, a head of several linears by the name that holds them all."""
    heads = {module.partition(".")[0] for module in to_save if module.startswith("classifier.")}
    inside = {head: {m for m in names.matrices if m.startswith(f"{head}.")} for head in heads}
    held = {head for head, modules in inside.items() if modules <= to_save}
    return {module for module in to_save if module.partition(".")[0] not in held} | held


def _save_port(folder: File, params: Params, forward: Forward | None, task_type: str | None, base: str | None) -> None:
    """A prompt or a prefix, and the head that trains with it."""
    (name, leaf), *more = params["ports"].items()
    read = {path: read_leaf(path, leaf) for path, leaf in trees.leaves(params).items()}
    names = names_of(params, spec_of(params) if forward is None else forward.spec)
    whole = [s for s in names.sources.values() if any(trains(read[part.path], part.layer) for part in s.parts)]
    strange = [source.module for source in whole if not source.name.startswith(prompts.HEADS)]
    strange += [m for m, source in names.matrices.items() if adapter_of(source, read)]
    if more or strange:
        other = f"ports/{more[0][0]}" if more else f"an adapter of {strange[0]}"
        raise ValueError(
            f"the tree holds ports/{name} and {other}, and a directory of HF PEFT holds one of them: save them apart, "
            "pj.strip(params) | {'ports': …} and the tree without its ports"
        )
    mine, own = prompts.describe(name, leaf)
    modules = {source.module for source in whole}
    heads = {prompts.PREFIX + s.name: value_of(s, read) for s in names.sources.values() if s.module in modules}
    common = _common(task_type, base, names)
    prompts.refuse_pooled(own["peft_type"], common["task_type"], f"ports/{name}")
    files.write(folder, mine | heads, own | common)


def _targets(adapted: set[str], linear: list[str]) -> list[str]:
    # HF PEFT saves the whole embedding beside its adapter when it is targeted by its last name: give the full one.
    short = configs.shortest([module for module in adapted if module in linear], linear)
    return sorted({*short, *(module for module in adapted if module not in linear)})


def _check_magnitudes(adapted: dict[str, Adapter], names: Names) -> None:
    for head, embedding in names.tied.items():
        if embedding in adapted and adapted[embedding].magnitude is not None:
            raise ValueError(
                f"{names.matrices[embedding].where} is a tied embedding with DoRA: HF PEFT rescales {head} by token, "
                "not by feature, so it cannot hold this one"
            )
    if with_magnitude := [m for m, found in adapted.items() if found.magnitude is not None]:
        for module, found in adapted.items():
            if found.magnitude is None:
                raise ValueError(
                    f"{names.matrices[module].where} has LoRA where {names.matrices[with_magnitude[0]].where} has "
                    "DoRA: an adapter of HF PEFT has DoRA everywhere or nowhere"
                )


def _keys(names: Names, module: str, found: Adapter) -> dict[str, np.ndarray]:
    """A module's tensors as HF PEFT has them, and those of the heads that are tied to it."""
    (a, b), term = keys_of(module, names), found.term
    tensors = {a: term.a.T, b: term.b.T}
    if found.magnitude is not None:
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = found.magnitude
    for head in (head for head, embedding in names.tied.items() if embedding == module):
        a, b = keys_of(head, names)
        tensors |= {a: term.b, b: term.a}  # the head's matrix is the embedding's, transposed
    return {key: np.ascontiguousarray(array) for key, array in tensors.items()}


# -- tensors trained whole --------------------------------------------------------------------------------------------


def _trained_whole(trained: list[Source], adapted: dict[str, Adapter], names: Names) -> tuple[str, list[Source]]:
    """The bias mode, and the tensors to write: what trains, and what must come with it."""
    biases = [source for source in names.sources.values() if source.bias]
    mine = {source.name for source in trained if source.bias}
    beside = {source.name for source in biases if source.module in adapted}
    if mine and mine == {source.name for source in biases} and not mine <= beside:
        bias = "all"
    else:
        bias = "lora_only" if mine & beside else "none"
    modules = set()
    for source in trained:
        if _is_covered(source, bias, adapted):
            continue
        if source.module in adapted:
            raise ValueError(
                f"{source.where} trains whole beside an adapter of {source.module}: HF PEFT holds one of them"
            )
        modules.add(source.module)
    covered = [source for source in biases if _is_covered(source, bias, adapted)]
    return bias, [s for s in names.sources.values() if s.module in modules or s in covered]


def _is_covered(source: Source, bias: str, adapted: dict[str, Adapter]) -> bool:
    """Whether a tensor is one of the biases that the mode speaks of."""
    return source.bias and (bias == "all" or (bias == "lora_only" and source.module in adapted))
