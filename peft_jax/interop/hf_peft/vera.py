"""VeRA in HF PEFT's format: two vectors a module, ``vera_lambda_d`` and ``_b``, and the pair or the seed that gives it.

Source: HF PEFT 0.21.2, tuners/vera/{config,model,layer}.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from peft_jax import trees
from peft_jax.core import Forward, Params, Path
from peft_jax.interop.hf_peft.kinds import Config, Found, Held, Kind, Shapes, Wanted, stacked
from peft_jax.interop.hf_peft.names import PREFIX, Names, Source
from peft_jax.interop.hf_peft.reading import refuse_adapters
from peft_jax.methods.vera import VeRA, projections, vera
from peft_jax.weights import Leaf

FIELDS = "d_initial init_weights projection_prng_key r save_projection vera_dropout"
PAIR = {"down": "base_model.vera_A", "up": "base_model.vera_B"}


class Vectors(NamedTuple):
    """A module's d ``[r]`` and b ``[out]``."""

    d: np.ndarray
    b: np.ndarray


class Pair(NamedTuple):
    """What all modules share: the matrices in our layout, and the seed that gives them, or None."""

    matrices: dict[str, np.ndarray]
    seed: int | None


# -- loading ----------------------------------------------------------------------------------------------------------


def check(config: Config, where: str) -> None:
    for field, low, value in zip(("r", "projection_prng_key"), (1, 0), _rank_and_seed(config), strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**32:
            raise ValueError(f"{where} has {field}={value!r}: a whole number from {low} to 2³² - 1 is supported")


def _rank_and_seed(config: Config) -> tuple[Any, Any]:
    return config.get("r", 256), config.get("projection_prng_key", 0)


def wanted(modules: Sequence[str], config: Config, names: Names) -> Wanted:
    rank, sources = _rank_and_seed(config)[0], {module: _linear(module, names, "the adapter") for module in modules}
    adapted: dict[str, Shapes] = {}
    for module, source in sources.items():
        at = f"{PREFIX}{module}.vera_lambda_"
        adapted[module] = {f"{at}b": (source.outputs,), f"{at}d": (rank,)}
    if not sources or not config.get("save_projection", True):
        return Wanted(adapted, {})
    inputs, outputs = _largest(list(sources.values()))
    return Wanted(adapted, {PAIR["down"]: (rank, inputs), PAIR["up"]: (outputs, rank)})


def _linear(module: str, names: Names, what: str) -> Source:
    """The source of an adapted module.

    Raises:
        ValueError: where HF PEFT's VeRA and ours are not one function.
    """
    if module in names.tied or module in names.tied.values() or names.matrices[module].embedding:
        raise ValueError(
            f"{what} acts on {module}, an embedding or a head tied to one: HF PEFT's VeRA acts on linears alone"
        )
    source = names.matrices[module]
    if len(source.parts) > 1:
        raise ValueError(
            f"{what} acts on {module}, which is {len(source.parts)} leaves here: HF PEFT's VeRA has one d for all of "
            "them and ours one each, so neither can hold the other's"
        )
    return source


def _largest(sources: Sequence[Source]) -> tuple[int, int]:
    return max(source.inputs for source in sources), max(source.outputs for source in sources)


def adapt(params: Params, found: Found) -> Params:
    """The tree with the leaves that `methods.vera` makes, and the pair."""
    if not found.modules:
        return params
    rank, seed = _rank_and_seed(found.config)
    slots: dict[Path, dict[int | None, Vectors]] = {}
    for module in found.modules:
        d, b = (found.tensors[f"{PREFIX}{module}.vera_lambda_{letter}"] for letter in "db")
        (part,) = found.names.matrices[module].parts
        slots.setdefault(part.path, {})[part.layer] = Vectors(d, b)
    inputs, outputs = _largest([found.names.matrices[module] for module in found.modules])
    pair, drawn = projections(seed, rank, inputs, outputs), True
    for field, key in PAIR.items():
        if key in found.tensors and not np.array_equal(found.tensors[key].T, np.asarray(pair[field])):
            drawn = False
            if not found.options["foreign_projection"]:
                raise ValueError(
                    f"{found.file} holds {key}, which is not what its projection_prng_key {seed} gives: load it with "
                    "foreign_projection=True to use it as it is"
                )
    if not drawn:
        pair = {field: jnp.asarray(found.tensors[key].T) for field, key in PAIR.items()}

    def each(path: Path, leaf: Leaf) -> Leaf:
        if path not in slots:
            return leaf
        return _leaf(leaf, slots[path], rank, seed if drawn else None, found)

    return trees.map_leaves(each, params) | {"methods": {**params.get("methods", {}), found.name: pair}}


def _leaf(leaf: Leaf, mine: Mapping[int | None, Vectors], rank: int, seed: int | None, found: Found) -> VeRA:
    layers: list[int | None] = [None] if None in mine else list(range(leaf.shape[0]))
    dtype = found.dtype or np.result_type(*(x.dtype for one in mine.values() for x in one))
    d, b = (
        stacked({layer: one[i] for layer, one in mine.items()}, layers, shape, dtype)
        for i, shape in enumerate([(rank,), leaf.shape[-1:]])
    )
    ranks = tuple(rank if layer in mine else 0 for layer in layers)
    return VeRA(leaf, d, b, jnp.ones(d.shape[:-1]), ranks=ranks, seed=seed, name=found.name)


def wrap(found: Found) -> Callable[[Forward], Forward]:
    return vera(dropout=found.config.get("vera_dropout") or 0.0, name=found.name).wrap


# -- saving -----------------------------------------------------------------------------------------------------------


def holds(leaf: Leaf) -> bool:
    return any(isinstance(w, VeRA) for w in trees.weights(leaf))


def read(params: Params, names: Names) -> Held:
    leaves = trees.leaves(params)
    found = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, VeRA)}
    bases = leaves | {path: leaf.base for path, leaf in found.items()}
    for path, base in bases.items():
        refuse_adapters(path, base, "VeRA")
    called = sorted({leaf.name for leaf in found.values()} | params["methods"].keys())
    if len(called) > 1:
        raise ValueError(f"the tree holds {' and '.join(called)}, each with a pair of its own: HF PEFT's VeRA has one")
    adapted = {}
    for module, source in names.matrices.items():
        if any(_acts(found.get(part.path), part.layer) for part in source.parts):
            _linear(module, names, source.where)
            path, layer, *_ = source.parts[0]
            leaf = found[path]
            d, b, scale = (np.asarray(x if layer is None else x[layer]) for x in (leaf.d, leaf.b, leaf.scale))
            adapted[module] = Vectors(d, b if scale == 1 else (b * scale).astype(b.dtype))
    pair = {field: np.asarray(x) for field, x in params["methods"][called[0]].items()}
    return Held(adapted, bases, Pair(pair, next(iter(found.values())).seed))


def _acts(leaf: VeRA | None, layer: int | None) -> bool:
    return leaf is not None and leaf.ranks[layer or 0] > 0


def describe(held: Held, names: Names, options: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    tensors: dict[str, np.ndarray] = {}
    for module, vectors in held.adapted.items():
        at = f"{PREFIX}{module}.vera_lambda_"
        tensors |= {f"{at}d": vectors.d, f"{at}b": vectors.b}
    pair: Pair = held.shared
    if options["save_projection"]:
        tensors |= {key: np.ascontiguousarray(pair.matrices[field].T) for field, key in PAIR.items()}
    elif pair.seed is None:
        raise ValueError("no seed gives this tree's pair, which was loaded as a foreign one: save_projection=True")
    return tensors, {
        "r": pair.matrices["down"].shape[-1],
        "projection_prng_key": pair.seed or 0,
        "save_projection": options["save_projection"],
        "vera_dropout": options["dropout"],
        "d_initial": 0.1,
        "init_weights": True,
    }


KIND = Kind("VERA", FIELDS, "vera_only", check, wanted, adapt, wrap, holds, read, describe)
