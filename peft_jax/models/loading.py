"""Models from files: GGUF, a Hugging Face directory, the Hub by name; and back to a directory for transformers."""

import copy
import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import transformers
from jaxtyping import Array
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from peft_jax import sharding, trees
from peft_jax.core import Forward, Params
from peft_jax.files import replacing
from peft_jax.interop import gguf
from peft_jax.interop.gguf_tokenizer import read_tokenizer
from peft_jax.models import quantised, rotary
from peft_jax.models.checkpoint import read_params
from peft_jax.models.families import family
from peft_jax.models.reader import open_safetensors, read_json
from peft_jax.models.writing import write_params
from peft_jax.on_disk import OnDisk, Reader
from peft_jax.quant.frozen import Frozen
from peft_jax.trees import ADDED, leaves, weights
from peft_jax.weights import Unfrozen

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm.model")
WANTED = ["model*.safetensors", "*.json", "*.jinja", "*.txt", *SENTENCEPIECE]
OURS = (".safetensors", ".json", ".jinja", ".txt", ".model")  # what a saved model consists of, by suffix
ARCHITECTURES = {
    None: MODEL_MAPPING_NAMES,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "tokens": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "answers": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
NEW = ("classifier", "qa_outputs", "pooler.dense")  # where heads lie, which a pretrained checkpoint lacks
TOKENIZERS = ("tokenizer.json", *SENTENCEPIECE, "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model.

    params      its parameter tree: plain arrays, or what the source keeps in few bits as such leaves
    forward     its pure forward function: ``forward(params, tokens) -> logits``
    config      its transformers config
    tokenizer   its transformers tokenizer, or None
    generation  its transformers generation config (when to stop, how to sample), or None
    head        what an encoder ends in, or None
    """

    params: Params
    forward: Forward
    config: Any
    tokenizer: Any = None
    generation: Any = None
    head: str | None = None


def from_config(
    config: Any,
    key: Array,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    scan: bool = True,
    remat: str = "full",
    head: str | None = None,
    labels: int | None = None,
) -> Model:
    """A model with random weights, from a transformers config.

    Under `jax.eval_shape` the tree is abstract, and no weight is made.  `head` and `labels` are as in `load`, but all
    leaves are plain arrays.

    Raises:
        ValueError: if the architecture is not supported, or has no such head.

    >>> import jax, transformers
    >>> from peft_jax import models
    >>> config = transformers.LlamaConfig(hidden_size=4096, vocab_size=32000, num_hidden_layers=32)
    >>> params = jax.eval_shape(lambda key: models.from_config(config, key).params, jax.random.key(0))
    >>> params["model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape
    (32, 4096, 4096)
    """
    module, headed = family(config.model_type), _headed(config, head, labels)
    forward = module.build(config, scan=scan, remat=remat, compute_dtype=compute_dtype, **headed)
    params = jax.jit(functools.partial(module.init, config=config, scan=scan, dtype=dtype, **headed))(key)
    return Model(params, forward, config, head=head)


def _headed(config: Any, head: str | None, labels: int | None) -> dict[str, Any]:
    """The options of a family's functions that concern its heads."""
    heads = family(config.model_type).HEADS
    if head is not None and head not in heads:
        raise ValueError(f"{config.model_type} has no head {head!r}: it has {', '.join(heads) or 'its own alone'}")
    if labels is not None and (head is None or labels < 2):
        raise ValueError(f"labels is {labels}: give 2 or more, for a model with head='classification' or 'tokens'")
    return {"head": head, "labels": labels} if heads else {}


def load(
    source: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    scan: bool = True,
    remat: str = "full",
    shardings: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    tokenizer: Any = None,
    head: str | None = None,
    labels: int | None = None,
    key: Array | None = None,
    lazy: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
) -> Model:
    """A pretrained model, from a ``.gguf`` file, a Hugging Face directory, or (online) a name on the Hugging Face Hub.

    Args:
        source: the file, directory or name.
        dtype: what the weights are kept in.
        compute_dtype: what the layers compute in; by default `dtype`.
        scan: stacks the layers and scans over them; otherwise the tree holds ``layers_0``, ``layers_1`` and so on.
        remat: what the backward pass recomputes: "full", "dots" or "none".
        shardings: a sharding, or a tree of them that the parameter tree refines, in which arrays are created directly.
        mesh: a mesh (`peft_jax.sharding`), in whose own shardings arrays are created; what comes after it, adapters
            and codes, `sharding.shard` puts there.
        tokenizer: a tokenizer, or the directory of one, in place of the source's own.
        head: of an encoder, "classification", "tokens" or "answers"; None gives its features.  A head that the source
            does not hold is new: random, and it trains (its leaves are those of `methods.unfreeze`).
        labels: how many labels the head chooses from; by default the config's.
        key: from which a new head is drawn; by default ``jax.random.key(0)``.
        lazy: leaves matrices on disk, but for what the source keeps in few bits.  `quant.quantise` then reads, packs
            and frees one layer at a time, adapters go on top without reading, and `pj.place` reads the rest, into
            shardings if need be.
        rope_scaling: scales rotary positions to longer texts, as ``{"rope_type": "linear", "factor": 4.0}``, "dynamic"
            or "yarn" (`peft_jax.models.rotary`); the model's config, which `save` writes, then has it.

    Raises:
        ValueError: if the source is damaged, pickled, of an unknown architecture, or does not match its config: a
            missing, extra or misshapen tensor is named.
        FileNotFoundError: if the source is not there.
        ConnectionError: if a Hub name cannot be fetched.

    Departures: transformers fills missing tensors with random numbers and passes over extra ones, with a warning.
    """
    if lazy and (shardings is not None or mesh is not None):
        raise ValueError(
            "lazy=True leaves matrices on disk: give the shardings to pj.place, or the mesh to sharding.shard, which "
            "read them"
        )
    if shardings is not None and mesh is not None:
        raise ValueError("give load() a mesh or shardings, not both")
    path = File(source).expanduser()
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = _tokenizer(File(tokenizer))
    if path.is_file():
        found = _open_gguf(path, tokenizer)
    else:
        found = _open_folder(path if path.is_dir() else _download(os.fspath(source)), tokenizer)
    if rope_scaling is not None:
        found = found._replace(config=rotary.rescaled(found.config, rope_scaling))
    module, headed = family(found.config.model_type), _headed(found.config, head, labels)
    if labels is not None:
        found.config.num_labels = labels
    forward = module.build(found.config, scan=scan, remat=remat, compute_dtype=compute_dtype, **headed)
    init = functools.partial(module.init, config=found.config, scan=scan, dtype=dtype, **headed)
    key = jax.random.key(0) if key is None else key
    abstract, layers = jax.eval_shape(init, key), found.config.num_hidden_layers
    if mesh is not None:
        shardings = sharding.shardings(abstract, forward, mesh)
    tensors = module.tensors(found.config, head) if module.HEADS else module.tensors(found.config)
    fields = getattr(found.config, "quantization_config", None)
    fields = quantised.check(fields, str(path)) if fields else None
    new = [t for t in tensors if head is not None and t.source.startswith(NEW)]
    if new and not any(t.source in found.reader.names() for t in new):
        tensors = tuple(t for t in tensors if t not in new)
        tops = {t.paths[0].split("/")[0] for t in new}
        rest = {name: part for name, part in abstract.items() if name not in tops}
        own = {name: shardings[name] for name in rest} if mesh is not None else shardings
        params = read_params(found.reader, tensors, rest, layers, scan, own, module.UNUSED, lazy, fields)
        fresh = jax.jit(lambda key: {name: init(key)[name] for name in tops})(key)
        if mesh is not None:
            fresh = trees.place(fresh, {name: shardings[name] for name in tops})
        params |= jax.tree.map(lambda x: Unfrozen(x, jnp.copy(x), name="head"), fresh)
        forward = trees.bare(forward, "head")
    else:
        params = read_params(found.reader, tensors, abstract, layers, scan, shardings, module.UNUSED, lazy, fields)
    params = params if mesh is None else sharding.told(params, mesh)
    return Model(params, forward, found.config, found.tokenizer, found.generation, head)


class _Source(NamedTuple):
    config: Any
    reader: Reader
    tokenizer: Any
    generation: Any = None


def _open_gguf(path: File, tokenizer: Any) -> _Source:
    file = gguf.open_file(path)
    config = gguf.read_config(file)
    return _Source(config, gguf.open_tensors(file, config), tokenizer or read_tokenizer(file))


def _open_folder(path: File, tokenizer: Any) -> _Source:
    config, generation = _config(path), None
    if (path / "generation_config.json").is_file():
        generation = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    return _Source(config, open_safetensors(path), tokenizer or _tokenizer(path), generation)


def _config(folder: File) -> Any:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json: it is not a model's directory")
    fields = read_json(file)
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ValueError(f"{file} does not name a model_type")
    family(fields["model_type"])
    if "quantization_config" in fields:
        quantised.check(fields["quantization_config"], str(folder))
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def _tokenizer(folder: File) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    source = next((name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    if source and not (folder / "tokenizer.json").is_file() and not importlib.util.find_spec("sentencepiece"):
        raise ValueError(
            f"{folder} keeps its tokenizer in {source}, which takes the package sentencepiece to read: install it, or "
            "give tokenizer= a directory with the model's tokenizer.json"
        )
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _download(name: str) -> File:
    """The local snapshot of a model on the Hub, fetched if need be: safetensors, JSON and text only."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or name.endswith(".gguf"):
        raise FileNotFoundError(
            f"{name} is not there: give the path of a GGUF file or of a Hugging Face directory, or a name on the Hub"
        )
    import huggingface_hub  # loaded when it is needed: nothing else here touches the network

    try:
        return File(huggingface_hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns="*/*"))
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither a file or directory here nor a model on the Hugging Face Hub that you may read: {error}"
        ) from None
    except Exception as error:  # whatever the network layer raises
        raise ConnectionError(
            f"{name} is not a file or directory here, and the Hugging Face Hub could not be reached: go online, or "
            "give the path of a GGUF file or of a directory with config.json and safetensors "
            f"({type(error).__name__}: {error})"
        ) from error


# -- saving -----------------------------------------------------------------------------------------------------------


def save(
    folder: str | os.PathLike[str], model: Model, params: Params | None = None, *, shard_bytes: int = 2_000_000_000
) -> None:
    """Writes a directory that transformers loads: safetensors, config, generation config and tokenizer.

    Leaves stored in few bits are saved as they are: in bitsandbytes' or GPTQ's format where that loses nothing and all
    are alike, or else in our own, which `load` alone reads (`peft_jax.models.quantised`).

    The directory appears whole or not at all: it is written beside its place, then renamed; a saved model that was
    there is replaced.

    Args:
        folder: the directory.
        model: what to save.
        params: the tree to save in place of `model.params`: stacked or unrolled, as the model was loaded.
        shard_bytes: the largest file, unless a single tensor is larger.

    Raises:
        ValueError: if the tree holds adapters (merge them first), or is not a tree of this model.
        FileExistsError: if the directory holds anything that is not part of a saved model.
    """
    params = model.params if params is None else params
    if typed := [w for w in weights(params) if not isinstance(w, Frozen | OnDisk)]:
        raise ValueError(
            f"the tree holds {type(typed[0]).__name__} leaves: merge them first, save(…, pj.merge(params))"
        )
    if added := [entry for entry in ADDED if entry in params]:
        raise ValueError(f"the tree holds {added[0]}, which a model's directory has no place for: save the adapter")
    folder = File(folder).expanduser()
    if strays := sorted(f.name for f in folder.glob("*") if f.is_dir() or f.suffix not in OURS):
        raise FileExistsError(f"{folder} holds {strays[0]}, which saving would delete: choose another directory")
    with replacing(folder) as fresh:
        _write(fresh, model, params, shard_bytes)


def _write(folder: File, model: Model, params: Params, shard_bytes: int) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [_architecture(config, model.head)]
    plain = [leaf for leaf in leaves(params).values() if not isinstance(leaf, Frozen)]
    config.dtype = str(plain[0].dtype)
    scan = not any(name.startswith("layers_") for name in _names(params))
    module = family(config.model_type)
    tensors = module.tensors(config, model.head) if module.HEADS else module.tensors(config)
    layers, bare = config.num_hidden_layers, bool(module.HEADS) and model.head is None
    fields = write_params(folder, params, tensors, layers, scan, shard_bytes=shard_bytes, bare=bare)
    config.__dict__.pop("quantization_config", None)
    if fields:
        config.quantization_config = fields
    config.save_pretrained(folder)
    if model.generation is not None:
        model.generation.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _architecture(config: Any, head: str | None) -> str:
    """What transformers calls the class."""
    writes = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if config.is_encoder_decoder else None
    names = ARCHITECTURES[head] if family(config.model_type).HEADS else writes or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return names[config.model_type]


def _names(params: Params) -> set[str]:
    return {jax.tree_util.keystr((key,), simple=True) for keys, _ in jax.tree.leaves_with_path(params) for key in keys}
