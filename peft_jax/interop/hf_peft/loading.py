"""From an adapter's files to a tree."""

import os
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import trees
from peft_jax.core import Forward, Params, Path
from peft_jax.interop.hf_peft import config as configs
from peft_jax.interop.hf_peft import files, prompts
from peft_jax.interop.hf_peft.contract import compare, draw_up, keys_of, tied_apart
from peft_jax.interop.hf_peft.names import PREFIX, Names, Part, Source, names_of, refuse_copies, refuse_unreached
from peft_jax.methods.dora import DoRA, column_norms
from peft_jax.methods.lora import LoRA, lora
from peft_jax.methods.pissa import Residual
from peft_jax.weights import Leaf, Unfrozen, is_weight, materialise


class Adapter(NamedTuple):
    """A module's adapter, in our layout: a ``[in, r]``, b ``[r, out]``; `start` is what its residual base lost."""

    a: np.ndarray
    b: np.ndarray
    scale: np.float32
    magnitude: np.ndarray | None
    start: tuple[np.ndarray, np.ndarray] | None = None


def load(
    directory: str | os.PathLike[str],
    model: Any,
    *,
    adapter: str | None = None,
    name: str | None = None,
    dtype: Any = None,
) -> tuple[Params, Forward]:
    """``(params, forward)``: the model with an adapter that HF PEFT, or `save`, has written; it can train on.

    The leaves are those that `methods.lora`, `methods.dora` and `methods.unfreeze` make, on the model's own arrays.
    See `peft_jax.interop.hf_peft` for what becomes of each option.

    Args:
        directory: the adapter's directory.
        model: what to adapt: anything with `params` and `forward`, such as `models.load` gives.
        adapter: the sub-folder, where HF PEFT has saved several adapters in one directory.
        name: what the method is called, as in `methods.lora`; by default "lora", "prompt_tuning" or "prefix_tuning".
        dtype: of what trains; by default as it was saved.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if a file is damaged; if a tensor is missing, extra or misshapen (the adapter is for another base);
            if the adapter is of another kind, or uses an option that is not supported.  Each is named.

    Departures: HF PEFT only warns about missing and extra tensors, and passes over options that it does not know.
    """
    folder = File(directory).expanduser() / (adapter or "")
    config = files.read_config(folder)
    if config["peft_type"] in prompts.KINDS:
        found_in = folder / files.WEIGHTS
        return prompts.load(
            config, files.read_tensors(folder), model, name or config["peft_type"].lower(), dtype, found_in
        )
    configs.check(config, str(folder))
    name = name or "lora"
    names = names_of(model.params, model.forward.spec)
    tensors = files.read_tensors(folder)
    contract = draw_up(config, names)
    refuse_copies([*contract.adapted, *(source.module for source in contract.whole.values())], str(folder))
    refuse_unreached(contract.adapted, str(folder))
    compare(tensors, contract, names, model.params, config, folder / files.WEIGHTS)
    whole = dict(contract.whole)
    found = {module: _adapter(module, tensors, config, names, model.params) for module in contract.adapted}
    _untie(found, whole, tensors, names)

    slots: dict[Path, dict[int | None, Adapter]] = {}
    for module, one in found.items():
        source = names.matrices[module]
        for part, mine in zip(source.parts, _divide(one, source), strict=True):
            if mine.a.shape[1]:
                slots.setdefault(part.path, {})[part.layer] = mine
    values: dict[Path, dict[int | None, np.ndarray]] = {}
    biases = {key for key, source in whole.items() if source.bias and not configs.saved(config, source.module)}
    for key, source in whole.items():
        for part in source.parts:
            array = tensors[key].T if source.transpose else tensors[key]
            values.setdefault(part.path, {})[part.layer] = array[..., part.start : part.stop]
    bias_paths = {part.path for key in biases for part in whole[key].parts}
    called = (f"{name}.bias", f"{name}.whole")

    def each(path: Path, leaf: Leaf) -> Leaf:
        if path in values:  # before the adapter: they can be of different layers of one leaf
            leaf = _unfrozen(path, leaf, values[path], called[0] if path in bias_paths else called[1])
        return _low_rank(leaf, slots[path], name, dtype) if path in slots else leaf

    for taken in (name, *called):
        trees.claim(taken, model.params)
    params, forward = trees.map_leaves(each, model.params), model.forward
    for trained in called:
        forward = trees.bare(forward, trained)
    rate = config.get("lora_dropout") or 0.0
    inner = f"{name}.lora" if config.get("use_dora") else name
    return params, lora(dropout=rate, name=inner).wrap(forward)


# -- reading it -------------------------------------------------------------------------------------------------------


def _adapter(module: str, tensors: Any, config: Mapping[str, Any], names: Names, params: Params) -> Adapter:
    rank, scale = configs.rank_and_scale(config, module)
    source = names.matrices[names.tied.get(module, module)]
    a, b = (tensors[key].T for key in keys_of(module, names))
    adapter = Adapter(a, b, scale, tensors.get(f"{PREFIX}{module}.lora_magnitude_vector"))
    start = config.get("init_lora_weights", True)
    if start not in configs.RESIDUAL_STARTS or source.embedding:  # HF PEFT starts embeddings in the plain way
        return adapter
    if start == "olora" and not source.transpose:
        raise ValueError(f"{module} is a Conv1D, on which HF PEFT's OLoRA does not start at the base's own factors")
    return adapter._replace(start=_start(start, source, rank, scale, params))


def _start(start: str, source: Source, rank: int, scale: np.float32, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """Where PiSSA or OLoRA started: the principal part of the base, or the first part of its QR factors."""
    tree = trees.leaves(params)
    one = lambda part: jax.tree.map(lambda x: x if part.layer is None else x[part.layer], tree[part.path])  # noqa: E731
    w = np.concatenate([np.asarray(materialise(one(part)), np.float32) for part in source.parts], -1)
    if start == "olora":
        q, r = np.linalg.qr(w.T)
        return r[:rank].T, q[:, :rank].T
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _untie(found: dict[str, Adapter], whole: dict[str, Source], tensors: Any, names: Names) -> None:
    """Drops a tied head's half, which must say what its embedding's says."""
    for head, embedding in names.tied.items():
        mine, theirs = found.pop(head, None), found.get(embedding)
        if (mine is None) != (theirs is None):
            raise ValueError(tied_apart(head, embedding, f"adapts {head if theirs is None else embedding} alone"))
        if mine is not None and theirs is not None:
            if mine.magnitude is not None:
                raise ValueError(tied_apart(head, embedding, "rescales each on its own (DoRA)"))
            if not (
                np.array_equal(mine.a.T, theirs.b) and np.array_equal(mine.b.T, theirs.a) and mine.scale == theirs.scale
            ):
                raise ValueError(tied_apart(head, embedding, "adapts them differently"))
        copy = f"{PREFIX}{head}.weight"
        if whole.pop(copy, None) and not np.array_equal(tensors[copy], tensors[f"{PREFIX}{embedding}.weight"]):
            raise ValueError(tied_apart(head, embedding, "trains them apart"))


def _split(one: Adapter, source: Source) -> list[int] | None:
    """How the directions of a fused pair divide among its parts, where each acts on one part alone."""
    acts = np.stack([np.any(one.b[:, part.start : part.stop] != 0, 1) for part in source.parts], 1)  # [r, parts]
    owner = np.argmax(acts, 1)
    if len(source.parts) == 1 or np.any(acts.sum(1) != 1) or np.any(np.diff(owner) < 0):
        return None
    split = [int(np.sum(owner == part)) for part in range(len(source.parts))]
    # A part without directions of its own can still have a magnitude.
    return None if one.magnitude is not None and not all(split) else split


def _divide(one: Adapter, source: Source) -> list[Adapter]:
    """Each part's adapter: A copied and B sliced, or (in blocks) only the directions that are the part's own."""
    split = _split(one, source)
    edges = np.cumsum([0, *split]) if split else None

    def mine(index: int, part: Part) -> Adapter:
        rows = slice(None) if edges is None else slice(edges[index], edges[index + 1])
        columns = slice(part.start, part.stop)
        magnitude = None if one.magnitude is None else one.magnitude[columns]
        start = None if one.start is None else (one.start[0], one.start[1][:, columns])
        return Adapter(one.a[:, rows], one.b[rows, columns], one.scale, magnitude, start)

    return [mine(index, part) for index, part in enumerate(source.parts)]


# -- leaves -----------------------------------------------------------------------------------------------------------


def _low_rank(leaf: Leaf, mine: Mapping[int | None, Adapter], name: str, dtype: Any) -> Leaf:
    """The leaf of a module, or of its layers: those without an adapter have rank 0."""
    layers = [None] if None in mine else list(range(leaf.shape[0]))
    dtype = dtype or np.result_type(*(x.dtype for one in mine.values() for x in (one.a, one.b)))
    rank = max(one.a.shape[1] for one in mine.values())
    ranks = tuple(mine[layer].a.shape[1] if layer in mine else 0 for layer in layers)

    def stacked(arrays: Mapping[int | None, np.ndarray], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        out = np.zeros((len(layers), *shape), dtype)
        for index, layer in enumerate(layers):
            if layer in arrays:
                corner: tuple[Any, ...] = (index, *map(slice, arrays[layer].shape))
                out[corner] = arrays[layer]
        return jnp.asarray(out if None not in mine else out[0])

    inputs, outputs = leaf.shape[-2:]
    scale = stacked({layer: np.asarray(one.scale) for layer, one in mine.items()}, (), np.float32)
    base = leaf
    if any(one.start is not None for one in mine.values()):
        a, b = (
            stacked({layer: one.start[i] for layer, one in mine.items() if one.start}, shape, np.float32)
            for i, shape in enumerate([(inputs, rank), (rank, outputs)])
        )
        base = Residual(leaf, a, b, jnp.copy(scale), name=f"{name}.residual")
    a = stacked({layer: one.a for layer, one in mine.items()}, (inputs, rank), dtype)
    b = stacked({layer: one.b for layer, one in mine.items()}, (rank, outputs), dtype)
    magnitudes = {layer: one.magnitude for layer, one in mine.items() if one.magnitude is not None}
    if not magnitudes:
        return LoRA(base, a, b, scale, ranks=ranks, name=name)
    inner = LoRA(base, a, b, scale, ranks=ranks, name=f"{name}.lora")
    active = jnp.array([r > 0 for r in ranks] if None not in mine else ranks[0] > 0)
    magnitude = stacked(magnitudes, (outputs,), np.float32)
    if not all(ranks):
        magnitude = jnp.where(active[..., None], magnitude, column_norms(materialise(leaf)))
    return DoRA(inner, magnitude, active, name=name)


def _unfrozen(path: Path, leaf: Leaf, mine: Mapping[int | None, np.ndarray], name: str) -> Unfrozen:
    if None in mine:
        return Unfrozen(leaf, jnp.asarray(mine[None], leaf.dtype), None, name)
    layers = tuple(sorted(layer for layer in mine if layer is not None))
    value = jnp.asarray(np.stack([mine[layer] for layer in layers]), leaf.dtype)
    if len(layers) == leaf.shape[0]:
        return Unfrozen(leaf, value, None, name)
    if is_weight(leaf):
        raise ValueError(f"{'/'.join(path)} is a {type(leaf).__name__}, of which single layers cannot be replaced")
    return Unfrozen(leaf, value, layers, name)
