"""From a tree to an adapter's files."""

import os
import re
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

from peft_jax import trees
from peft_jax.core import Forward, Params
from peft_jax.interop.hf_peft import config as configs
from peft_jax.interop.hf_peft import files, lora, prompts, whole
from peft_jax.interop.hf_peft.loading import KINDS
from peft_jax.interop.hf_peft.names import Names, names_of, refuse_copies, refuse_experts, refuse_unreached
from peft_jax.interop.hf_peft.reading import one_of_a_stack, refuse_holes
from peft_jax.methods.lora import LoRA
from peft_jax.models.families import spec_of


def save(
    directory: str | os.PathLike[str],
    params: Params,
    forward: Forward | None = None,
    *,
    adapter: str | None = None,
    dropout: float = 0.0,
    save_projection: bool = True,
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
        save_projection: whether VeRA's frozen pair is written too, which its seed gives as well.
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
    refuse_holes(params)
    spec = spec_of(params) if forward is None else forward.spec
    names = names_of(params, spec)
    for path, leaf in trees.leaves(params).items():
        for w in trees.weights(leaf):
            if w.trains and not isinstance(w, LoRA):
                refuse_experts([path], spec, type(w).__name__)
    kind = next(kind for kind in KINDS.values() if any(map(kind.holds, trees.leaves(params).values())))
    held = kind.read(params, names)
    adapted, bases = held.adapted, held.bases
    refuse_copies(adapted, "the tree")
    refuse_unreached(adapted, "the tree")
    mine, own = kind.describe(held, names, {"dropout": dropout, "save_projection": save_projection})
    beside = whole.trained(bases, adapted, names, kind.bias)
    if not adapted and not beside.sources:
        raise ValueError("the tree holds no adapter to save: apply a method such as methods.lora first")
    to_save = whole.to_save(beside, adapted)
    refuse_copies(to_save, "the tree")
    targets, tied = set(adapted), False
    for head, embedding in names.tied.items():  # what becomes of the embedding becomes of its head
        tied |= embedding in adapted or embedding in to_save
        targets |= {head} if embedding in adapted else set()
        to_save |= {head} if embedding in to_save else set()
    if tied and "ensure_weight_tying" not in kind.fields:
        raise ValueError(
            f"the tree trains an embedding that is tied to the head, which HF PEFT's {kind.peft_type} unties"
        )
    linear = [module for module, source in names.matrices.items() if not source.embedding]
    config = _common(task_type, base_model_name_or_path, names) | own
    config |= {
        "peft_type": kind.peft_type,
        "target_modules": _targets(targets, linear) or configs.NOTHING_ADAPTED,
        "modules_to_save": whole.modules_to_save(to_save, names),
        "bias": beside.bias,
        "fan_in_fan_out": any(module in linear and not names.matrices[module].transpose for module in adapted),
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    tensors = mine | whole.written(beside, bases, adapted, names)
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


def _save_port(folder: File, params: Params, forward: Forward | None, task_type: str | None, base: str | None) -> None:
    """A prompt or a prefix, and the head that trains with it."""
    (name, leaf), *more = params["ports"].items()
    names = names_of(params, spec_of(params) if forward is None else forward.spec)
    held = lora.read(params, names)
    trained = [source for source in names.sources.values() if whole.trains(held.bases, source)]
    strange = [source.module for source in trained if not source.name.startswith(prompts.HEADS)]
    strange += held.adapted
    if more or strange:
        other = f"ports/{more[0][0]}" if more else f"an adapter of {strange[0]}"
        raise ValueError(
            f"the tree holds ports/{name} and {other}, and a directory of HF PEFT holds one of them: save them apart, "
            "pj.strip(params) | {'ports': …} and the tree without its ports"
        )
    mine, own = prompts.describe(name, leaf)
    modules = {source.module for source in trained}
    heads = {
        prompts.PREFIX + s.name: whole.value_of(s, held.bases) for s in names.sources.values() if s.module in modules
    }
    common = _common(task_type, base, names)
    prompts.refuse_pooled(own["peft_type"], common["task_type"], f"ports/{name}")
    files.write(folder, mine | heads, own | common)


def _targets(adapted: set[str], linear: list[str]) -> list[str]:
    # HF PEFT saves the whole embedding beside its adapter when it is targeted by its last name: give the full one.
    short = configs.shortest([module for module in adapted if module in linear], linear)
    return sorted({*short, *(module for module in adapted if module not in linear)})
