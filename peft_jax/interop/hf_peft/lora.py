"""LoRA and what is built on it, in HF PEFT's format: two tensors a module, and DoRA's magnitude.

Source: HF PEFT 0.21.2, tuners/lora/{config,layer,model,variants,gptq}.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import trees
from peft_jax.core import Forward, Params, Path
from peft_jax.interop.hf_peft import config as configs
from peft_jax.interop.hf_peft.contract import tied_apart
from peft_jax.interop.hf_peft.kinds import Config, Found, Held, Kind, Shapes, Wanted, stacked
from peft_jax.interop.hf_peft.names import PREFIX, Names, Part, Source
from peft_jax.interop.hf_peft.reading import Adapter as Read
from peft_jax.interop.hf_peft.reading import adapter_of, read_leaf
from peft_jax.methods.dora import DoRA, column_norms
from peft_jax.methods.lora import LoRA, lora
from peft_jax.methods.pissa import Residual
from peft_jax.methods.qalora import QALoRA
from peft_jax.on_disk import is_on_disk
from peft_jax.weights import Leaf, materialise

# Fields that say nothing about the numbers (how the adapter was made, what was recorded of it), or are read here.
FIELDS = """
    alpha_pattern corda_config ensure_weight_tying eva_config init_lora_weights loftq_config lora_alpha lora_dropout
    lora_ga_config megatron_core qalora_group_size r rank_pattern runtime_config use_dora use_qalora use_rslora
"""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the base keeps its weights
RESIDUAL_STARTS = ("pissa", "olora")  # the base loses what the adapter starts with, which can be computed again


def check(config: Config, where: str) -> None:
    """Raises on a start that changes the base in a way that the base alone does not tell."""
    start = config.get("init_lora_weights", True)
    if start not in (*PLAIN_STARTS, *RESIDUAL_STARTS):
        raise ValueError(
            f"{where} was started by init_lora_weights={start!r}, which changes the base's weights so that they cannot "
            "be computed again from the base alone: save it in HF PEFT as a plain LoRA "
            "(save_pretrained(…, path_initial_model_for_weight_conversion=…)), or merge it there"
        )
    if config.get("use_qalora"):
        size = group_size(config)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{where} has qalora_group_size={size!r}: a whole number from 1 on is supported")
        if config.get("use_dora") or start in RESIDUAL_STARTS:
            raise ValueError(
                f"{where} uses use_qalora with DoRA or init_lora_weights={start!r}, which is not supported"
            )


def group_size(config: Config) -> Any:
    """Inputs a group of a QA-LoRA adapter; 0 of a LoRA."""
    return config.get("qalora_group_size", 16) if config.get("use_qalora") else 0


def wanted(modules: Sequence[str], config: Config, names: Names) -> Wanted:
    return Wanted({module: _shapes(module, config, names) for module in modules}, {})


def _shapes(module: str, config: Mapping[str, Any], names: Names) -> Shapes:
    rank, _ = rank_and_scale(config, module)
    at, source = f"{PREFIX}{module}.", names.matrices[names.tied.get(module, module)]
    inputs, outputs = (source.outputs, source.inputs) if module in names.tied else (source.inputs, source.outputs)
    a, b = keys_of(module, names)
    if size := group_size(config):
        if source.embedding or inputs % size:
            what = "an embedding" if source.embedding else f"{inputs} inputs"
            raise ValueError(f"the adapter's config pools groups of {size} inputs, and {module} has {what}")
        inputs //= size
    shapes: Shapes = {a: (rank, inputs), b: (outputs, rank)}
    return shapes | ({f"{at}lora_magnitude_vector": (outputs,)} if config.get("use_dora") else {})


def keys_of(module: str, names: Names) -> tuple[str, str]:
    """The full names of a module's A and B."""
    look_up = module in names.matrices and names.matrices[module].embedding
    ends = ("lora_embedding_A", "lora_embedding_B") if look_up else ("lora_A.weight", "lora_B.weight")
    return f"{PREFIX}{module}.{ends[0]}", f"{PREFIX}{module}.{ends[1]}"


# -- loading ----------------------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """A module's adapter, in our layout: a ``[in, r]``, b ``[r, out]``; `start` is what its residual base lost."""

    a: np.ndarray
    b: np.ndarray
    scale: np.float32
    magnitude: np.ndarray | None
    start: tuple[np.ndarray, np.ndarray] | None = None


def adapt(params: Params, found: Found) -> Params:
    """The tree with the leaves that `methods.lora`, `methods.dora` and `methods.qalora` make."""
    mine = {module: _adapter(module, found.tensors, found.config, found.names, params) for module in found.modules}
    _untie(mine, found.names)
    slots: dict[Path, dict[int | None, Adapter]] = {}
    for module, one in mine.items():
        source = found.names.matrices[module]
        for part, its in zip(source.parts, _divide(one, source), strict=True):
            if its.a.shape[1]:
                slots.setdefault(part.path, {})[part.layer] = its

    def each(path: Path, leaf: Leaf) -> Leaf:
        return (
            _low_rank(leaf, slots[path], group_size(found.config), found.name, found.dtype) if path in slots else leaf
        )

    return trees.map_leaves(each, params)


def wrap(found: Found) -> Callable[[Forward], Forward]:
    rate = found.config.get("lora_dropout") or 0.0
    inner = f"{found.name}.lora" if found.config.get("use_dora") else found.name
    return lora(dropout=rate, name=inner).wrap


def _adapter(module: str, tensors: Any, config: Mapping[str, Any], names: Names, params: Params) -> Adapter:
    rank, scale = rank_and_scale(config, module)
    source = names.matrices[names.tied.get(module, module)]
    a, b = (tensors[key].T for key in keys_of(module, names))
    adapter = Adapter(a, b, scale, tensors.get(f"{PREFIX}{module}.lora_magnitude_vector"))
    start = config.get("init_lora_weights", True)
    if start not in RESIDUAL_STARTS or source.embedding:  # HF PEFT starts embeddings in the plain way
        return adapter
    if start == "olora" and not source.transpose:
        raise ValueError(f"{module} is a Conv1D, on which HF PEFT's OLoRA does not start at the base's own factors")
    return adapter._replace(start=_start(start, source, rank, scale, params))


def _start(start: str, source: Source, rank: int, scale: np.float32, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """Where PiSSA or OLoRA started: the principal part of the base, or the first part of its QR factors."""
    tree = trees.leaves(params)

    def one(part: Part) -> np.ndarray:
        leaf = tree[part.path]
        if is_on_disk(leaf):
            return leaf.layer(part.layer or 0)
        return np.asarray(materialise(jax.tree.map(lambda x: x if part.layer is None else x[part.layer], leaf)))

    w = np.concatenate([one(part).astype(np.float32) for part in source.parts], -1)
    if start == "olora":
        q, r = np.linalg.qr(w.T)
        return r[:rank].T, q[:, :rank].T
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _untie(mine: dict[str, Adapter], names: Names) -> None:
    """Drops a tied head's half, which must say what its embedding's says."""
    for head, embedding in names.tied.items():
        one, theirs = mine.pop(head, None), mine.get(embedding)
        if (one is None) != (theirs is None):
            raise ValueError(tied_apart(head, embedding, f"adapts {head if theirs is None else embedding} alone"))
        if one is not None and theirs is not None:
            if one.magnitude is not None:
                raise ValueError(tied_apart(head, embedding, "rescales each on its own (DoRA)"))
            if not (
                np.array_equal(one.a.T, theirs.b) and np.array_equal(one.b.T, theirs.a) and one.scale == theirs.scale
            ):
                raise ValueError(tied_apart(head, embedding, "adapts them differently"))


def split(one: Adapter, source: Source) -> list[int] | None:
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
    own = split(one, source)
    edges = np.cumsum([0, *own]) if own else None

    def mine(index: int, part: Part) -> Adapter:
        rows = slice(None) if edges is None else slice(edges[index], edges[index + 1])
        columns = slice(part.start, part.stop)
        magnitude = None if one.magnitude is None else one.magnitude[columns]
        start = None if one.start is None else (one.start[0], one.start[1][:, columns])
        return Adapter(one.a[:, rows], one.b[rows, columns], one.scale, magnitude, start)

    return [mine(index, part) for index, part in enumerate(source.parts)]


def _low_rank(leaf: Leaf, mine: Mapping[int | None, Adapter], group: int, name: str, dtype: Any) -> Leaf:
    """The leaf of a module, or of its layers: those without an adapter have rank 0."""
    lead = leaf.shape[:-2]
    layers: list[int | None] = list(range(math.prod(lead))) if lead else [None]
    dtype = dtype or np.result_type(*(x.dtype for one in mine.values() for x in (one.a, one.b)))
    rank = max(one.a.shape[1] for one in mine.values())
    ranks = tuple(mine[layer].a.shape[1] if layer in mine else 0 for layer in layers)

    def stack(arrays: Mapping[int | None, np.ndarray], shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return stacked(arrays, layers, shape, dtype).reshape((*lead, *shape))

    inputs, outputs = leaf.shape[-2:]
    scale = stack({layer: np.asarray(one.scale) for layer, one in mine.items()}, (), np.float32)
    base = leaf
    if any(one.start is not None for one in mine.values()):
        a, b = (
            stack({layer: one.start[i] for layer, one in mine.items() if one.start}, shape, np.float32)
            for i, shape in enumerate([(inputs, rank), (rank, outputs)])
        )
        base = Residual(leaf, a, b, jnp.copy(scale), name=f"{name}.residual")
    a = stack({layer: one.a for layer, one in mine.items()}, (inputs // (group or 1), rank), dtype)
    b = stack({layer: one.b for layer, one in mine.items()}, (rank, outputs), dtype)
    if group:
        return QALoRA(base, a, b, scale, group_size=group, pooling="peft", ranks=ranks, name=name)
    magnitudes = {layer: one.magnitude for layer, one in mine.items() if one.magnitude is not None}
    if not magnitudes:
        return LoRA(base, a, b, scale, ranks=ranks, name=name)
    inner = LoRA(base, a, b, scale, ranks=ranks, name=f"{name}.lora")
    active = jnp.array([r > 0 for r in ranks]).reshape(lead)
    magnitude = stack(magnitudes, (outputs,), np.float32)
    if not all(ranks):
        magnitude = jnp.where(active[..., None], magnitude, column_norms(materialise(leaf)))
    return DoRA(inner, magnitude, active, name=name)


# -- saving -----------------------------------------------------------------------------------------------------------


def read(params: Params, names: Names) -> Held:
    for name in params.get("methods", ()) if isinstance(params, Mapping) else ():
        raise ValueError(f"methods/{name} is shared by the layers: HF PEFT's LoRA format cannot hold it")
    leaves = {path: read_leaf(path, leaf) for path, leaf in trees.leaves(params).items()}
    adapted = {module: one for module, source in names.matrices.items() if (one := adapter_of(source, leaves))}
    return Held(adapted, {path: leaf.base for path, leaf in leaves.items()})


def describe(held: Held, names: Names, options: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    adapted: dict[str, Read] = held.adapted
    _check_magnitudes(adapted, names)
    tensors: dict[str, np.ndarray] = {}
    for module, found in adapted.items():
        tensors |= _keys(names, module, found)
    sizes = {module: (found.term.a.shape[1], found.term.scale) for module, found in adapted.items()}
    sizes |= {head: sizes[embedding] for head, embedding in names.tied.items() if embedding in adapted}
    magnitudes = any(found.magnitude is not None for found in adapted.values())
    own = {"lora_dropout": options["dropout"], "use_dora": magnitudes, "init_lora_weights": True}
    return tensors, scaling(sizes) | own | _pooling(adapted, names)


def _pooling(adapted: Mapping[str, Read], names: Names) -> dict[str, Any]:
    """The config's fields of QA-LoRA."""
    (size, one), *others = {found.term.group_size: module for module, found in adapted.items()}.items() or [(0, "")]
    if others:
        raise ValueError(
            f"{names.matrices[others[0][1]].where} pools groups of {others[0][0]} inputs and "
            f"{names.matrices[one].where} of {size} (0 is LoRA): an adapter of HF PEFT has one size everywhere"
        )
    return {"use_qalora": True, "qalora_group_size": size} if size else {}


def _check_magnitudes(adapted: Mapping[str, Read], names: Names) -> None:
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


def _keys(names: Names, module: str, found: Read) -> dict[str, np.ndarray]:
    """A module's tensors as HF PEFT has them, and those of the heads that are tied to it."""
    (a, b), term = keys_of(module, names), found.term
    tensors = {a: term.a.T, b: term.b.T}
    if found.magnitude is not None:
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = found.magnitude
    for head in (head for head, embedding in names.tied.items() if embedding == module):
        a, b = keys_of(head, names)
        tensors |= {a: term.b, b: term.a}  # the head's matrix is the embedding's, transposed
    return {key: np.ascontiguousarray(array) for key, array in tensors.items()}


# -- ranks and scales -------------------------------------------------------------------------------------------------


def rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, np.float32]:
    """A module's rank, and α/r or α/√r.

    Raises:
        ValueError: if either is not a number that makes sense.
    """
    rank = configs.by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = configs.by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise ValueError(f"the adapter's config gives {module} the rank {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"the adapter's config gives {module} the alpha {alpha!r}")
    return rank, np.float32(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def scaling(adapted: Mapping[str, tuple[int, np.float32]]) -> dict[str, Any]:
    """The fields of the config that give each module its rank and scale back, bit for bit.

    A tree holds scales, not α: the config says rsLoRA where only that makes every α a whole number.
    """
    plain, rooted = (
        {m: simplest(s, math.sqrt(r) if root else r) for m, (r, s) in adapted.items()} for root in (False, True)
    )
    whole = [all(isinstance(alpha, int) for alpha in alphas.values()) for alphas in (plain, rooted)]
    alphas = rooted if whole == [False, True] else plain
    rank = configs.commonest([rank for rank, _ in adapted.values()], 8)
    alpha = configs.commonest(list(alphas.values()), 8)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, (r, _) in adapted.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "use_rslora": alphas is rooted,
    }


def simplest(scale: np.float32, divisor: float) -> int | float:
    """The simplest α that, divided, gives this very scale."""
    exact = float(scale) * divisor
    if not math.isfinite(exact):
        raise ValueError(f"an adapter's scale is {scale}, which no config can hold")
    for alpha in (round(exact), round(exact, 6)):
        if np.float32(alpha / divisor) == scale:
            return alpha
    return exact


KIND = Kind("LORA", FIELDS, "lora_only", check, wanted, adapt, wrap, lambda leaf: True, read, describe)
