"""AdaLoRA in HF PEFT's format: three tensors a module, and which of the r₀ triplets they are.

Source: HF PEFT 0.21.2, tuners/adalora/{config,model,layer}.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax import trees
from peft_jax.core import Forward, Params, Path
from peft_jax.interop.hf_peft.kinds import Config, Found, Held, Kind, Shapes, Wanted, stacked
from peft_jax.interop.hf_peft.lora import Adapter, simplest, split
from peft_jax.interop.hf_peft.names import PREFIX, Names, Source
from peft_jax.interop.hf_peft.reading import refuse_adapters
from peft_jax.methods.adalora import EPSILON, SVD, adalora
from peft_jax.weights import Leaf

# Fields that say how the adapter was made, or are read here; the schedule is the business of `methods.allocate_rank`.
FIELDS = """
    beta1 beta2 corda_config deltaT eva_config init_lora_weights init_r loftq_config lora_alpha lora_dropout
    lora_ga_config megatron_core orth_reg_weight qalora_group_size r rank_pattern runtime_config target_r tfinal tinit
    total_step
"""


class Module(NamedTuple):
    """A module's triplets in our layout, q ``[in, r]``, values ``[r]``, p ``[r, out]``; `held` is `SVD.triplets`' of a
    layer: which of those it began with."""

    q: np.ndarray
    values: np.ndarray
    p: np.ndarray
    held: str


class Settings(NamedTuple):
    """What all modules have in common."""

    initial: int
    target: int
    scale: np.float32


# -- loading ----------------------------------------------------------------------------------------------------------


def check(config: Config, where: str) -> None:
    for field, default in (("init_r", 12), ("target_r", 8)):
        value = config.get(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where} has {field}={value!r}: a whole number from 1 on is supported")
    alpha, initial = config.get("lora_alpha", 8), config.get("init_r", 12)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"{where} has lora_alpha={alpha!r}: a number is supported")
    for key, held in (config.get("rank_pattern") or {}).items():
        if not isinstance(held, list) or len(held) != initial or any(not isinstance(one, bool) for one in held):
            raise ValueError(f"{where} has no list of {initial} booleans (its init_r) in its rank_pattern for {key}")


def _settings(config: Config) -> Settings:
    initial, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
    scale = np.float32((alpha if alpha > 0 else initial) / (initial + EPSILON))  # HF PEFT's own reading of α ≤ 0
    return Settings(initial, config.get("target_r", 8), scale)


def _held(module: str, config: Config) -> str:
    pattern = (config.get("rank_pattern") or {}).get(f"{module}.lora_E", [True] * _settings(config).initial)
    return "".join("01"[one] for one in pattern)


def wanted(modules: Sequence[str], config: Config, names: Names) -> Wanted:
    for key in config.get("rank_pattern") or {}:
        if key.removesuffix(".lora_E") not in modules:
            raise ValueError(f"the adapter's rank_pattern speaks of {key}, and its config does not adapt that module")
    adapted: dict[str, Shapes] = {}
    for module in modules:
        _refuse_embeddings(module, names, "the adapter")
        source, rank = names.matrices[module], _held(module, config).count("1")
        shapes = ((rank, source.inputs), (rank, 1), (source.outputs, rank))
        adapted[module] = dict(zip(_keys(module), shapes, strict=True))
    return Wanted(adapted, {})


def _keys(module: str) -> tuple[str, str, str]:
    a, e, b = (f"{PREFIX}{module}.lora_{letter}" for letter in "AEB")
    return a, e, b


def _refuse_embeddings(module: str, names: Names, what: str) -> None:
    if module in names.tied or module in names.tied.values() or names.matrices[module].embedding:
        raise ValueError(
            f"{what} acts on {module}, an embedding or a head tied to one: HF PEFT's AdaLoRA acts on linears alone"
        )


def adapt(params: Params, found: Found) -> Params:
    """The tree with the leaves that `methods.adalora` makes."""
    slots: dict[Path, dict[int | None, Module]] = {}
    for module in found.modules:
        a, e, b = (found.tensors[key] for key in _keys(module))
        source = found.names.matrices[module]
        for part, one in zip(
            source.parts, _divide(Module(a.T, e[:, 0], b.T, _held(module, found.config)), source), strict=True
        ):
            slots.setdefault(part.path, {})[part.layer] = one
    settings = _settings(found.config)

    def each(path: Path, leaf: Leaf) -> Leaf:
        return _leaf(leaf, slots[path], settings, found) if path in slots else leaf

    return trees.map_leaves(each, params)


def _divide(one: Module, source: Source) -> list[Module]:
    """Each part's of a fused module: Q and λ copied and P sliced, or the triplets that act on the part alone."""
    edges = split(Adapter(one.q, one.p, np.float32(1), None), source)
    if edges is None:
        return [one._replace(p=one.p[:, part.start : part.stop]) for part in source.parts]
    start, parts = 0, []
    for part, count in zip(source.parts, edges, strict=True):
        mine = slice(start, start := start + count)
        held = ("1" * count).ljust(len(one.held), "0")
        parts.append(Module(one.q[:, mine], one.values[mine], one.p[mine, part.start : part.stop], held))
    return parts


def _leaf(leaf: Leaf, mine: Mapping[int | None, Module], settings: Settings, found: Found) -> SVD:
    layers: list[int | None] = [None] if None in mine else list(range(leaf.shape[0]))
    dtype = found.dtype or np.result_type(*(x.dtype for one in mine.values() for x in (one.q, one.values, one.p)))
    rank = max([1, *(len(one.values) for one in mine.values())])
    q = stacked({layer: one.q for layer, one in mine.items()}, layers, (leaf.shape[-2], rank), dtype)
    values = stacked({layer: one.values for layer, one in mine.items()}, layers, (rank,), dtype)
    p = stacked({layer: one.p for layer, one in mine.items()}, layers, (rank, leaf.shape[-1]), dtype)
    on = {layer: np.ones(len(one.values), bool) for layer, one in mine.items()}
    scales = {layer: np.asarray(settings.scale) for layer in mine}
    return SVD(
        leaf,
        q,
        values,
        p,
        stacked(scales, layers, (), np.float32),
        stacked(on, layers, (rank,), bool),
        target=settings.target,
        triplets=tuple(mine[layer].held if layer in mine else "" for layer in layers),
        name=found.name,
    )


def wrap(found: Found) -> Callable[[Forward], Forward]:
    return adalora(dropout=found.config.get("lora_dropout") or 0.0, name=found.name).wrap


# -- saving -----------------------------------------------------------------------------------------------------------


def holds(leaf: Leaf) -> bool:
    return any(isinstance(w, SVD) for w in trees.weights(leaf))


def read(params: Params, names: Names) -> Held:
    for name in params.get("methods", ()):
        raise ValueError(f"methods/{name} is shared by the layers: HF PEFT's AdaLoRA format cannot hold it")
    leaves = trees.leaves(params)
    found = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, SVD)}
    bases = leaves | {path: leaf.base for path, leaf in found.items()}
    for path, base in bases.items():
        refuse_adapters(path, base, "AdaLoRA")
    adapted, scales = dict[str, Module](), dict[np.float32, str]()
    for module, source in names.matrices.items():
        mine = [_one(found.get(part.path), part.layer, scales) for part in source.parts]
        if any(mine):
            _refuse_embeddings(module, names, source.where)
            adapted[module] = _together(mine, source)
    targets = {w.target: path for path, w in found.items()}
    for what, different in (("scale", scales), ("target rank", targets)):
        if len(different) > 1:
            raise ValueError(f"{' and '.join(map(str, different))} are {what}s in this tree: HF PEFT's AdaLoRA has one")
    initial = max((len(one.held) for one in adapted.values()), default=1)
    (target,), (scale,) = targets, scales
    return Held(adapted, bases, Settings(initial, target, scale))


def _one(leaf: SVD | None, layer: int | None, scales: dict[np.float32, str]) -> Module | None:
    """A layer's triplets, without its padding; notes its scale."""
    held = "" if leaf is None else leaf.triplets[layer or 0]
    if leaf is None or not held:
        return None
    q, values, p, scale = (
        np.asarray(x if layer is None else x[layer]) for x in (leaf.q, leaf.values, leaf.p, leaf.scale)
    )
    scales.setdefault(np.float32(scale), leaf.name)
    rank = held.count("1")
    return Module(q[:, :rank], values[:rank], p[:rank], held)


def _together(mine: Sequence[Module | None], source: Source) -> Module:
    """A module's triplets of its parts'."""
    given = [one for one in mine if one is not None]
    first, *rest = given
    shared = all(np.array_equal(first.q, one.q) and np.array_equal(first.values, one.values) for one in rest)
    if len(given) == len(mine) and shared:
        return first._replace(p=np.concatenate([one.p for one in given], -1))
    blocks = []
    for part, one in zip(source.parts, mine, strict=True):
        if one is not None:
            blocks.append(np.zeros((len(one.p), source.outputs), one.p.dtype))
            blocks[-1][:, part.start : part.stop] = one.p
    q, values = np.concatenate([one.q for one in given], -1), np.concatenate([one.values for one in given])
    held = ("1" * len(values)).ljust(max(len(one.held) for one in given), "0")
    return Module(q, values, np.concatenate(blocks), held)


def describe(held: Held, names: Names, options: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    settings: Settings = held.shared
    if not (settings.scale > 0 and np.isfinite(settings.scale)):
        raise ValueError(f"the adapter's scale is {settings.scale}, which HF PEFT's AdaLoRA cannot hold: above 0 only")
    tensors, pattern = dict[str, np.ndarray](), dict[str, list[bool]]()
    for module, one in held.adapted.items():
        arrays = (one.q.T, one.values[:, None], one.p.T)
        tensors |= {key: np.ascontiguousarray(x) for key, x in zip(_keys(module), arrays, strict=True)}
        pattern[f"{module}.lora_E"] = [mark == "1" for mark in one.held.ljust(settings.initial, "0")]
    return tensors, {
        "init_r": settings.initial,
        "target_r": settings.target,
        "lora_alpha": simplest(settings.scale, settings.initial + EPSILON),
        "lora_dropout": options["dropout"],
        "rank_pattern": None if all(map(all, pattern.values())) else pattern,
        "init_lora_weights": True,
        "total_step": 1,  # a schedule without which HF PEFT refuses the file; whoever trains on in it gives their own
    }


KIND = Kind("ADALORA", FIELDS, "lora_only", check, wanted, adapt, wrap, holds, read, describe)
