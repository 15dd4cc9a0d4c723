"""The model families: which module implements an architecture, and which one a parameter tree belongs to."""

import itertools
import re
from types import ModuleType
from typing import Any

from peft_jax import trees
from peft_jax.core import Params, Spec
from peft_jax.models import bart, bert, deberta, gemma, gpt2, llama, moe, t5
from peft_jax.models.tensors import Tensor, expert_counts, naming, unrolled

FAMILIES: tuple[ModuleType, ...] = (llama, moe, gemma, gpt2, bert, deberta, t5, bart)


def family(model_type: str) -> ModuleType:
    """The module that implements a transformers ``model_type``.

    Raises:
        ValueError: if none does, with the list of those that are supported.
    """
    for module in FAMILIES:
        if model_type in module.MODEL_TYPES:
            return module
    supported = ", ".join(kind for module in FAMILIES for kind in module.MODEL_TYPES)
    raise ValueError(f"the architecture {model_type!r} is not supported: {supported} are")


def spec_of(params: Params) -> Spec:
    """What names a tree's leaves have, read off the tree alone: the families differ in their paths.

    Only the fields that concern names are filled.

    Raises:
        ValueError: if the tree is of no family here.
    """
    tree = {"/".join(path): leaf for path, leaf in trees.leaves(params).items()}
    stacked: dict[str, Any] = {re.sub(r"(^|/)layers_\d+/", r"\1layers/", path): leaf for path, leaf in tree.items()}
    scan = stacked.keys() <= tree.keys()
    for embedding, every in (pair for module in FAMILIES for pair in module.EVERY):
        tensors = [tensor for tensor in every if stacked.keys() >= set(tensor.paths)]
        inside = [path for tensor in tensors if tensor.layered for path in tensor.paths]
        if not inside or stacked.keys() != {path for tensor in tensors for path in tensor.paths}:
            continue
        tensors = [t._replace(layers=_layers(t, tree)) if t.layered else t for t in tensors]
        tensors = [t._replace(experts=_experts(t, tree, scan)) if t.experts else t for t in tensors]
        layers = next(t.layers for t in tensors if t.layered) or 0
        names, is_stacked = naming(tensors, layers, scan)
        heads = {tensor.source for tensor in every} - {tensor.source for tensor in tensors}
        tied = (("lm_head", embedding),) if "lm_head.weight" in heads else ()
        experts = expert_counts(tensors, layers, scan)
        return Spec(layers=layers, names=names, stacked=is_stacked, experts=experts, tensors=tuple(tensors), tied=tied)
    some = ", ".join(sorted(tree)[:2]) or "nothing"
    raise ValueError(f"this tree is of no model family here (it holds {some}): give its forward function too")


def _experts(tensor: Tensor, tree: dict[str, Any], scan: bool) -> int:
    """How many experts a layer of a tree has."""
    path = tensor.paths[0]
    return int(tree[path if scan else "/".join(unrolled(path, 0))].shape[-3])


def _layers(tensor: Tensor, tree: dict[str, Any]) -> int:
    """How many of a layered tensor's leaves a tree holds, stacked or each by itself."""
    path = tensor.paths[0]
    if path in tree:
        return int(tree[path].shape[0])
    return next(i for i in itertools.count() if "/".join(unrolled(path, i)) not in tree)
