"""HF PEFT's prompts and prefixes: one tensor, ``prompt_embeddings``.

PROMPT_TUNING   ``[p, width]``: a `Prompt` as it is
PREFIX_TUNING   ``[l, layers · 2 · kv_heads · head_dim]``, a row's keys and values layer by layer: a `Prefix`.  An MLP
                is baked away, as HF PEFT does when it saves, so a loaded prefix trains on without one

For encoder-decoder models its prompts hold a second half that no model reads, and its prefixes stand in the decoder
alone: layer i takes pair 2i modulo the number of pairs.  Loaded, each layer has its own; saved, the pairs between are
zeros and ``num_layers`` is twice the model's.

A head that trains too lies beside them, ``base_model.classifier.weight``.

Source: HF PEFT 0.21.2, peft_model.py (``get_prompt``), tuners/{prompt,prefix}_tuning/config.py.
"""

from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import ports, trees
from peft_jax.core import Forward, Params, Path
from peft_jax.interop.hf_peft.names import names_of
from peft_jax.methods.prefix_tuning import Prefix, Reparametrised, flatten, prefix_tuning, unflatten
from peft_jax.methods.prompt_tuning import Prompt, prompt_tuning
from peft_jax.weights import Leaf, Unfrozen, innermost

KINDS = ("PROMPT_TUNING", "PREFIX_TUNING")
TENSOR = "prompt_embeddings"
PREFIX = "base_model."  # of a head's tensors
HEADS = ("classifier", "score", "qa_outputs", "pooler.dense")  # the modules that HF PEFT saves with a prompt

# Fields that say nothing about the numbers, or are read here.
UNDERSTOOD = """
    auto_mapping base_model_name_or_path encoder_hidden_size inference_mode init_weights num_attention_heads num_layers
    num_transformer_submodules num_virtual_tokens peft_type peft_version prefix_projection prompt_tuning_init
    prompt_tuning_init_text revision runtime_config task_type token_dim tokenizer_kwargs tokenizer_name_or_path
"""


def describe(name: str, leaf: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A port's leaf as tensors, and the fields of the config that are its own.

    Raises:
        ValueError: on a leaf that the format cannot hold, or half of one.
    """
    doubled = isinstance(leaf, dict)
    if isinstance(leaf, dict):
        if leaf.keys() != {"decoder"}:
            raise ValueError(
                f"ports/{name} stands before {', '.join(leaf)}, and HF PEFT's prefix of an encoder-decoder model "
                "before the decoder's attention alone: prefix_tuning(parts=['decoder'])"
            )
        leaf = leaf["decoder"]
    if any(x is None for x in (getattr(leaf, field) for field in getattr(leaf, "trains", ()))):
        raise ValueError(f"ports/{name} has holes: combine the two halves of the partition first")
    if isinstance(leaf, Prompt):
        found, kind = np.asarray(leaf.value), "PROMPT_TUNING"
        sizes = {"token_dim": found.shape[1]}
        extra: dict[str, Any] = {"prompt_tuning_init": "RANDOM"}
    elif isinstance(leaf, Prefix | Reparametrised):
        keys, values = jax.jit(type(leaf).rows)(leaf)
        if doubled:
            keys, values = (jnp.stack([x, jnp.zeros_like(x)], 1).reshape(-1, *x.shape[1:]) for x in (keys, values))
        found, kind = np.asarray(flatten(keys, values)), "PREFIX_TUNING"
        heads, dim = keys.shape[2:]
        sizes = {"token_dim": heads * dim, "num_attention_heads": heads, "num_layers": keys.shape[0]}
        extra = {"prefix_projection": False, "encoder_hidden_size": heads * dim}
    else:
        raise ValueError(f"ports/{name} is a {type(leaf).__name__}, for which HF PEFT has no format")
    common = {"peft_type": kind, "num_virtual_tokens": found.shape[0], "num_transformer_submodules": 1 + doubled}
    return {TENSOR: np.ascontiguousarray(found)}, common | sizes | extra


def refuse_pooled(kind: str, task: str | None, where: str) -> None:
    """Raises on a prompt for classifying: HF PEFT does so by the first soft token's features."""
    if kind == "PROMPT_TUNING" and task == "SEQ_CLS":
        raise ValueError(
            f"{where} is a prompt with a head for classes, which HF PEFT lets read the first soft token and this "
            "library (as the code of P-tuning v2) [CLS]: its outputs would be others"
        )


def load(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: Any, name: str, dtype: Any, file: File
) -> tuple[Params, Forward]:
    """``(params, forward)``: the model with a prompt or prefix.

    Raises:
        ValueError: on an option that is not supported, and on a tensor that is missing, extra or misshapen.
    """
    refuse_pooled(config["peft_type"], config.get("task_type"), str(file))
    for option, value in config.items():
        if option == "modules_to_save" and set(value or ()) <= set(HEADS):
            continue
        if option not in UNDERSTOOD.split() and value not in (None, False, [], {}):
            raise ValueError(f"{file} comes with {option} ({value!r}), which is not supported")
    if TENSOR not in tensors:
        raise ValueError(f"{file} lacks the tensor {TENSOR}")
    spec, found = model.forward.spec, tensors[TENSOR]
    both = bool(spec.attentions)
    halves = config.get("num_transformer_submodules") or 1 + (config.get("task_type") == "SEQ_2_SEQ_LM")
    if halves > 1 and not both:
        raise ValueError(f"{file} is for an encoder-decoder model, and this is a decoder")
    prompt = config["peft_type"] == "PROMPT_TUNING"
    if both and not prompt and halves == 1:
        raise ValueError(f"{file} is a prefix of a single decoder, and this is an encoder-decoder model")
    layers, kv_heads, dim = dict(spec.attentions).get("decoder", (spec.layers, spec.kv_heads, spec.head_dim))
    pairs = config.get("num_layers") or layers if both else layers
    length: Any = config.get("num_virtual_tokens")
    wanted = (length * halves, spec.width) if prompt else (length, 2 * pairs * kv_heads * dim)
    if found.shape != wanted:
        raise ValueError(
            f"{file} holds {TENSOR} with shape {list(found.shape)}, and its config and this model ask for "
            f"{list(wanted)}: it is for another base, or does not match its config"
        )
    rows = jnp.asarray(found, dtype or found.dtype)
    leaf: Any
    if prompt:
        leaf, method = Prompt(rows[:length], name), prompt_tuning(length, name=name)
    else:
        keys, values = unflatten(rows, (pairs, kv_heads, dim))
        if both:
            keys, values = (x[2 * np.arange(layers) % pairs] for x in (keys, values))
        leaf = {"decoder": Prefix(keys, values, name=name)} if both else Prefix(keys, values, name=name)
        method = prefix_tuning(length, hidden=None, parts=["decoder"] if both else None, name=name)
    if name in model.params.get("ports", ()):
        raise ValueError(f"a method named {name!r} is already applied: give this one another name=")
    params, forward = _with_head(tensors, model, f"{name}.head", file)
    return ports.put(params, name, leaf), method.wrap(forward)


def _with_head(tensors: Mapping[str, np.ndarray], model: Any, name: str, file: File) -> tuple[Params, Forward]:
    """The model with the head that was saved beside a prompt, which trains on."""
    extra = tensors.keys() - {TENSOR}
    if not extra:
        return model.params, model.forward
    names = names_of(model.params, model.forward.spec)
    heads = {PREFIX + s.name: s for s in names.sources.values() if s.name.startswith(HEADS)}
    for key in sorted(extra):
        if key not in heads:
            raise ValueError(
                f"{file} holds the tensor {key} {list(tensors[key].shape)}, which this model does not have"
            )
        if tensors[key].shape != heads[key].shape:
            raise ValueError(
                f"{file} holds {key} with shape {list(tensors[key].shape)}, and {heads[key].where} of this model asks "
                f"for {list(heads[key].shape)}: it is for another head"
            )
    values = {s.parts[0].path: tensors[k].T if s.transpose else tensors[k] for k, s in heads.items() if k in extra}

    def each(path: Path, leaf: Leaf) -> Leaf:
        if path not in values:
            return leaf
        base = innermost(leaf) if isinstance(leaf, Unfrozen) else leaf
        return Unfrozen(base, jnp.asarray(values[path], base.dtype), None, name)

    return trees.map_leaves(each, model.params), trees.bare(model.forward, name)
