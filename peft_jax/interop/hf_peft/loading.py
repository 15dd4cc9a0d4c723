"""From an adapter's files to a tree."""

import os
from pathlib import Path as File
from typing import Any

from peft_jax import trees
from peft_jax.core import Forward, Params
from peft_jax.interop.hf_peft import adalora, files, lora, prompts, vera, whole
from peft_jax.interop.hf_peft import config as configs
from peft_jax.interop.hf_peft.contract import compare, draw_up
from peft_jax.interop.hf_peft.kinds import Config, Found, Kind
from peft_jax.interop.hf_peft.names import names_of, refuse_copies, refuse_experts, refuse_unreached

KINDS = {kind.peft_type: kind for kind in (adalora.KIND, vera.KIND, lora.KIND)}  # the last holds what no other does


def load(
    directory: str | os.PathLike[str],
    model: Any,
    *,
    adapter: str | None = None,
    name: str | None = None,
    dtype: Any = None,
    foreign_projection: bool = False,
) -> tuple[Params, Forward]:
    """``(params, forward)``: the model with an adapter that HF PEFT, or `save`, has written; it can train on.

    The leaves are those that our own methods make, on the model's own arrays.  See `peft_jax.interop.hf_peft` for what
    becomes of each option.

    Args:
        directory: the adapter's directory.
        model: what to adapt: anything with `params` and `forward`, such as `models.load` gives.
        adapter: the sub-folder, where HF PEFT has saved several adapters in one directory.
        name: what the method is called, as in `methods.lora`; by default its kind, "lora" or "prefix_tuning".
        dtype: of what trains; by default as it was saved.
        foreign_projection: takes VeRA's frozen pair from the file even where it is not the one that its seed gives.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if a file is damaged; if a tensor is missing, extra or misshapen (the adapter is for another base);
            if the adapter is of another kind, or uses an option that is not supported.  Each is named.

    Departures: HF PEFT only warns about missing and extra tensors, and passes over options that it does not know.
    """
    folder = File(directory).expanduser() / (adapter or "")
    config, where = files.read_config(folder), folder / files.WEIGHTS
    peft_type = config["peft_type"]
    name = name or peft_type.lower()
    if peft_type in prompts.KINDS:
        return prompts.load(config, files.read_tensors(folder), model, name, dtype, where)
    if peft_type not in KINDS:
        supported = ", ".join((*KINDS, *prompts.KINDS))
        raise ValueError(f"{folder} is an adapter of the type {peft_type}, and these are supported: {supported}")
    kind = KINDS[peft_type]
    configs.check(config, kind.fields, kind.bias, str(folder))
    kind.check(config, str(folder))
    names, tensors = names_of(model.params, model.forward.spec), files.read_tensors(folder)
    contract = draw_up(config, names, kind)
    modules = list(contract.adapted)
    refuse_copies([*modules, *(source.module for source in contract.whole.values())], str(folder))
    refuse_unreached(modules, str(folder))
    spec = model.forward.spec
    refuse_experts([part.path for source in contract.whole.values() for part in source.parts], spec, "whole modules")
    if other := _beyond_lora(kind, config):
        mine = [names.matrices[module] for module in modules if module not in names.tied]
        refuse_experts([part.path for source in mine for part in source.parts], spec, other)
    compare(tensors, contract, names, model.params, config, where)

    trees.claim(name, model.params)
    beside = whole.untied(contract.whole, tensors, names)
    # Before the adapter: they can be of different layers of one leaf.
    params, forward = whole.put(model.params, model.forward, beside, tensors, config, name)
    found = Found(config, tensors, names, modules, name, dtype, where, {"foreign_projection": foreign_projection})
    return kind.adapt(params, found), kind.wrap(found)(forward)


def _beyond_lora(kind: Kind, config: Config) -> str:
    """What makes an adapter more than plain LoRA, or ""."""
    if kind is not lora.KIND:
        return kind.peft_type
    start = config.get("init_lora_weights")
    return str(start) if start in lora.RESIDUAL_STARTS else next(filter(config.get, ("use_dora", "use_qalora")), "")
