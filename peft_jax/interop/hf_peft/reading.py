"""What the leaves of a tree say: low-rank products, magnitudes, and what trains whole, each by the source's module."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from peft_jax import trees
from peft_jax.core import Params, Path
from peft_jax.interop.hf_peft.names import Source
from peft_jax.methods.dora import DoRA, column_norms
from peft_jax.methods.dylora import DyLoRA, shorten
from peft_jax.methods.lora import LoRA
from peft_jax.methods.pissa import Residual
from peft_jax.methods.qalora import QALoRA
from peft_jax.methods.slora import Adapters
from peft_jax.ports import Stored
from peft_jax.weights import Leaf, Unfrozen, base_of, innermost, is_weight, materialise


class Term(NamedTuple):
    """``scale · a b``: one low-rank product of a matrix.  a ``[in, r]``, b ``[r, out]``.

    With a `group_size`, QA-LoRA's: a has a row for each group of inputs, and scale is that of HF PEFT's pooling.
    """

    a: np.ndarray
    b: np.ndarray
    scale: np.float32
    group_size: int = 0


class Adapter(NamedTuple):
    """What a module of the source gets: one term, and DoRA's magnitude."""

    term: Term
    magnitude: np.ndarray | None


class Read(NamedTuple):
    """What a leaf holds: terms (a, b, scale, each layer's rank, inputs a group) and magnitudes, on the host, layers
    first; its base."""

    terms: list[tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...], int]]
    magnitude: np.ndarray | None
    base: Leaf

    def at(self, layer: int) -> list[Term]:
        return [Term(a[layer, :, :r], b[layer, :r], s[layer], g) for a, b, s, rs, g in self.terms if (r := rs[layer])]


def one_of_a_stack(params: Params, adapter: str | None) -> Params:
    """The tree with one adapter of each stack in its place."""

    def each(path: Path, leaf: Leaf) -> Leaf:
        if not isinstance(leaf, Adapters | Stored):
            return leaf
        if adapter not in leaf.names:
            known = ", ".join(leaf.names)
            raise ValueError(f"the tree holds the adapters {known}: say which to save, adapter=… (got {adapter!r})")
        if isinstance(leaf, Stored):
            return leaf.at(leaf.names.index(adapter))
        return leaf.alone(leaf.names.index(adapter))

    def of_a_port(w: Any) -> Any:
        return each((), w) if isinstance(w, Stored) else w

    chosen = trees.map_leaves(each, params)
    if isinstance(chosen, Mapping) and "ports" in chosen:
        chosen = {**chosen, "ports": trees.map_weights(of_a_port, chosen["ports"])}
    if adapter is not None and not any(isinstance(w, Adapters | Stored) for w in trees.weights(params)):
        raise ValueError(f"there is no adapter {adapter!r}: the tree holds no stack of adapters")
    return chosen


def refuse_holes(params: Params) -> None:
    """Raises on half of a partition."""
    for path, leaf in trees.leaves(params).items():
        lost = [w for w in trees.weights(leaf) if any(getattr(w, field) is None for field in w.trains)]
        bottom = innermost(leaf)
        if lost or (hasattr(bottom, "base") and not isinstance(bottom, Unfrozen)):
            raise ValueError(f"{'/'.join(path)} has holes: combine the two halves of the partition first")


def refuse_adapters(path: Path, base: Leaf, kind: str) -> None:
    """Raises on a leaf that adapts or trains, once what the format holds of it is taken off."""
    if not isinstance(base, Unfrozen) and (base_of(base) is not None or (is_weight(base) and base.trains)):
        raise ValueError(
            f"{'/'.join(path)} holds a {type(base).__name__} leaf, which HF PEFT's {kind} format cannot hold"
        )


def read_leaf(path: Path, leaf: Leaf) -> Read:
    """What a leaf holds.

    Raises:
        ValueError: on a leaf that the format cannot hold.
    """
    terms, magnitude = [], None
    if isinstance(leaf, DoRA):
        magnitude, leaf = np.atleast_2d(np.asarray(leaf.magnitude)), leaf.base
    while type(leaf) in (LoRA, DyLoRA, Residual, QALoRA):
        leaf = shorten(leaf) if isinstance(leaf, DyLoRA) else leaf
        scale = np.asarray(leaf.scale, np.float32).reshape(-1)
        a, b = (np.asarray(x).reshape(len(scale), *x.shape[-2:]) for x in (leaf.a, leaf.b))
        group = leaf.group_size if isinstance(leaf, QALoRA) else 0
        if group:
            scale = scale * np.float32(leaf.factor / dataclasses.replace(leaf, pooling="peft").factor)
        if isinstance(leaf, LoRA | QALoRA):
            ranks = leaf.ranks
        else:
            scale, ranks = -scale, tuple(_used(*pair) for pair in zip(a, b, scale, strict=True))
        terms.append((a, b, scale, ranks, group))
        leaf = leaf.base
    refuse_adapters(path, leaf, "LoRA")
    return Read(terms, magnitude, leaf)


def _used(a: np.ndarray, b: np.ndarray, scale: np.float32) -> int:
    """The rank of a product padded with zeros; 0 where its scale is."""
    used = np.any(a != 0, 0) & np.any(b != 0, 1)
    return int(used.nonzero()[0].max(initial=-1)) + 1 if scale else 0


def adapter_of(source: Source, read: dict[Path, Read]) -> Adapter | None:
    """A module's adapter: its parts' and their terms side by side, as one product of the summed rank."""
    terms = [read[part.path].at(part.layer or 0) for part in source.parts]
    everything = [term for mine in terms for term in mine]
    if not everything:
        return None
    scale = next((term.scale for term in everything if term.scale), np.float32(0))
    group, *others = sorted({term.group_size for term in everything})
    if others:
        raise ValueError(f"{source.where} pools {group} and {others[0]} inputs (0 is LoRA): HF PEFT has one size")
    magnitude = _magnitude(source, read, [bool(mine) for mine in terms])
    if len(terms) > 1 and _share_a(terms):
        b = np.concatenate([term.b for term in everything], -1)
        return Adapter(Term(everything[0].a, b, scale, group), magnitude)
    rows = []
    for part, mine in zip(source.parts, terms, strict=True):
        for term in mine:
            mine_b = _rescaled(term, scale)
            b = np.zeros((len(mine_b), source.outputs), mine_b.dtype)
            b[:, part.start : part.stop] = mine_b
            rows.append(b)
    a = np.concatenate([term.a for term in everything], -1)
    return Adapter(Term(a, np.concatenate(rows), scale, group), magnitude)


def _share_a(terms: list[list[Term]]) -> bool:
    """Whether a fused pair was split among these parts: one A, one scale."""
    if any(len(mine) != 1 for mine in terms):
        return False
    first, *rest = [term for mine in terms for term in mine]
    return all(term.scale == first.scale and np.array_equal(term.a, first.a) for term in rest)


def _rescaled(term: Term, scale: np.float32) -> np.ndarray:
    """A term's b under another scale."""
    if abs(term.scale) == abs(scale):
        return term.b if term.scale == scale else -term.b
    return term.b.astype(np.float32) * (term.scale / scale)


def _magnitude(source: Source, read: dict[Path, Read], adapted: list[bool]) -> np.ndarray | None:
    """DoRA's magnitudes of all parts.  A part that is not adapted has the norm of its base, which rescales nothing."""
    mine = [read[part.path].magnitude if on else None for part, on in zip(source.parts, adapted, strict=True)]
    if all(magnitude is None for magnitude in mine):
        return None
    pieces = []
    for part, on, magnitude in zip(source.parts, adapted, mine, strict=True):
        if on and magnitude is None:
            raise ValueError(f"{'/'.join(part.path)} has LoRA where another part of {source.module} has DoRA")
        if magnitude is None:
            magnitude = np.atleast_2d(np.asarray(column_norms(materialise(read[part.path].base))))
        pieces.append(magnitude[part.layer or 0])
    return np.concatenate(pieces)
