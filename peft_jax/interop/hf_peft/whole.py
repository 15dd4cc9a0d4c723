"""What trains whole beside an adapter of any kind: modules to save, and biases."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from peft_jax import trees
from peft_jax.core import Forward, Params, Path
from peft_jax.interop.hf_peft import config as configs
from peft_jax.interop.hf_peft.contract import tied_apart
from peft_jax.interop.hf_peft.kinds import Config, Tensors
from peft_jax.interop.hf_peft.names import PREFIX, Names, Source
from peft_jax.weights import Leaf, Unfrozen, is_weight, materialise

Bases = Mapping[Path, Leaf]  # the leaves without their adapters

# -- loading ----------------------------------------------------------------------------------------------------------


def untied(whole: Mapping[str, Source], tensors: Tensors, names: Names) -> dict[str, Source]:
    """Without a tied head's copy, which must say what its embedding says."""
    left = dict(whole)
    for head, embedding in names.tied.items():
        copy = f"{PREFIX}{head}.weight"
        if left.pop(copy, None) and not np.array_equal(tensors[copy], tensors[f"{PREFIX}{embedding}.weight"]):
            raise ValueError(tied_apart(head, embedding, "trains them apart"))
    return left


def put(
    params: Params, forward: Forward, whole: Mapping[str, Source], tensors: Tensors, config: Config, name: str
) -> tuple[Params, Forward]:
    """The model with these tensors in their places, which train on."""
    values: dict[Path, dict[int | None, np.ndarray]] = {}
    biases = {key for key, source in whole.items() if source.bias and not configs.saved(config, source.module)}
    for key, source in whole.items():
        for part in source.parts:
            array = tensors[key].T if source.transpose else tensors[key]
            values.setdefault(part.path, {})[part.layer] = array[..., part.start : part.stop]
    bias_paths = {part.path for key in biases for part in whole[key].parts}
    called = (f"{name}.bias", f"{name}.whole")

    def each(path: Path, leaf: Leaf) -> Leaf:
        if path not in values:
            return leaf
        return _unfrozen(path, leaf, values[path], called[0] if path in bias_paths else called[1])

    for taken in called:
        trees.claim(taken, params)
        forward = trees.bare(forward, taken)
    return trees.map_leaves(each, params), forward


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


# -- saving -----------------------------------------------------------------------------------------------------------


def trains(bases: Bases, source: Source) -> bool:
    """Whether a tensor, or a part of it, is trained whole."""

    def part_trains(path: Path, layer: int | None) -> bool:
        leaf = bases[path]
        return isinstance(leaf, Unfrozen) and (leaf.layers is None or layer in leaf.layers)

    return any(part_trains(part.path, part.layer) for part in source.parts)


def value_of(source: Source, bases: Bases) -> np.ndarray:
    """A tensor as the source holds it, adapters apart."""
    pieces = []
    for part in source.parts:
        leaf = bases[part.path]
        if is_weight(leaf) and not isinstance(leaf, Unfrozen):
            raise ValueError(
                f"{source.where} is a {type(leaf).__name__} in a module that trains whole: HF PEFT needs plain values"
            )
        array = np.asarray(materialise(leaf))
        pieces.append(array if part.layer is None else array[part.layer])
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, -1)
    return np.ascontiguousarray(whole.T if source.transpose else whole)


class Whole(NamedTuple):
    """The bias mode, its name for the adapted modules' biases, and the tensors to write: what trains, and what comes
    with it."""

    bias: str
    mode: str
    sources: list[Source]


def trained(bases: Bases, adapted: Collection[str], names: Names, mode: str) -> Whole:
    """What trains whole; `mode` is the bias mode of the adapted modules' biases.

    Raises:
        ValueError: if it trains whole beside an adapter of the same module.
    """
    moving = [source for source in names.sources.values() if trains(bases, source)]
    biases = [source for source in names.sources.values() if source.bias]
    mine = {source.name for source in moving if source.bias}
    beside = {source.name for source in biases if source.module in adapted}
    if mine and mine == {source.name for source in biases} and not mine <= beside:
        bias = "all"
    else:
        bias = mode if mine & beside else "none"
    modules = set()
    for source in moving:
        if is_covered(source, bias, mode, adapted):
            continue
        if source.module in adapted:
            raise ValueError(
                f"{source.where} trains whole beside an adapter of {source.module}: HF PEFT holds one of them"
            )
        modules.add(source.module)
    covered = [source for source in biases if is_covered(source, bias, mode, adapted)]
    return Whole(bias, mode, [s for s in names.sources.values() if s.module in modules or s in covered])


def is_covered(source: Source, bias: str, mode: str, adapted: Collection[str]) -> bool:
    """Whether a tensor is one of the biases that the mode speaks of."""
    return source.bias and (bias == "all" or (bias == mode and source.module in adapted))


def written(whole: Whole, bases: Bases, adapted: Collection[str], names: Names) -> dict[str, np.ndarray]:
    """The tensors as HF PEFT has them, those of tied heads too."""
    tensors = {}
    for source in whole.sources:
        inside = ".base_layer" if source.module in adapted else ""
        tensors[f"{PREFIX}{source.module}{inside}.{source.name.rpartition('.')[2]}"] = value_of(source, bases)
    for head, embedding in names.tied.items():
        if embedding in to_save(whole, adapted):
            tensors[f"{PREFIX}{head}.weight"] = tensors[f"{PREFIX}{embedding}.weight"]
    return tensors


def to_save(whole: Whole, adapted: Collection[str]) -> set[str]:
    """The modules that are saved whole, biases by the mode apart."""
    return {source.module for source in whole.sources if not is_covered(source, whole.bias, whole.mode, adapted)}


def modules_to_save(modules: set[str], names: Names) -> list[str] | None:
    """Their names for the config, a head of several linears by the name that holds them all."""
    heads = {module.partition(".")[0] for module in modules if module.startswith("classifier.")}
    inside: dict[str, Any] = {head: {m for m in names.matrices if m.startswith(f"{head}.")} for head in heads}
    held = {head for head, mine in inside.items() if mine <= modules}
    return sorted({module for module in modules if module.partition(".")[0] not in held} | held) or None
