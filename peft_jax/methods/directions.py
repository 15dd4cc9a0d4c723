"""What an adapter of low rank is made of: directions, a number and perhaps a factor for each, and perhaps a vector.

    x → ((x A) ⊙ scale ⊙ d) B ⊙ out        A ``[in, r]``, B ``[r, out]``

LoRA and DyLoRA at its rank in use have neither d nor out; AdaLoRA has d = λ; VeRA has both, and directions that all its
leaves share.  `methods.slora` lays those of many adapters side by side.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax.core import Params, Path
from peft_jax.methods.adalora import SVD
from peft_jax.methods.dylora import DyLoRA, shorten
from peft_jax.methods.lora import LoRA
from peft_jax.methods.vera import VeRA
from peft_jax.weights import Leaf, is_weight

NOTHING = np.int32(2**31 - 1)  # where an index points at nothing: beyond every array, so that `jnp.take` fills in

Adapter = LoRA | SVD | VeRA


class Directions(NamedTuple):
    """One adapter's at one leaf, layers first.

    held     bool ``[layers, r]``, on the host: which of r directions a layer has
    a, b     ``[*layers, r, in]``, ``[*layers, r, out]``; None where they are the shared ones
    shared   where those begin
    scale    ``[*layers]``
    d, out   ``[*layers, r]``, ``[*layers, out]``, or None
    """

    held: np.ndarray
    scale: Array
    a: Any = None
    b: Any = None
    shared: int = 0
    d: Any = None
    out: Any = None

    def trained(self, inputs: int, outputs: int) -> int:
        """How many numbers train."""
        each = (0 if self.a is None else inputs + outputs) + (0 if self.d is None else 1)
        vectors = 0 if self.out is None else outputs
        return int(self.held.sum()) * each + int(self.held.any(1).sum()) * vectors


def is_adapter(leaf: Leaf) -> bool:
    """Whether a leaf can be written so; its base is another question."""
    return type(leaf) in (LoRA, DyLoRA, SVD, VeRA)


def directions(w: Adapter, shared: int = 0) -> Directions:
    """Those of a leaf; `shared` is where its pair's directions begin, of VeRA."""
    if isinstance(w, VeRA):
        return Directions(_first(w.ranks, w.d.shape[-1]), w.scale, shared=shared, d=w.d, out=w.b)
    if isinstance(w, SVD):
        held = w.used
        if not isinstance(w.values, jax.core.Tracer):  # a pruned triplet's λ is zero
            held = held & (np.asarray(w.values) != 0)
        return Directions(held.reshape(-1, held.shape[-1]), w.scale, jnp.matrix_transpose(w.q), w.p, d=w.values)
    w = shorten(w) if isinstance(w, DyLoRA) else w
    return Directions(_first(w.ranks, w.a.shape[-1]), w.scale, jnp.matrix_transpose(w.a), w.b)


def _first(ranks: Sequence[int], rank: int) -> np.ndarray:
    return np.arange(rank)[None] < np.array(ranks)[:, None]


def check(who: str, path: Path, leaf: Leaf, like: Leaf) -> None:
    """Raises on a leaf that cannot be one of several, or that is on another base than `like`."""
    base = leaf.base if is_adapter(leaf) else leaf
    if hasattr(base, "base"):
        kind = f"{type(leaf).__name__} on {type(base).__name__}" if is_adapter(leaf) else type(leaf).__name__
        raise ValueError(
            f"adapter {who!r} has {kind} at {'/'.join(path)}: only LoRA, DyLoRA, AdaLoRA and VeRA on the bare base "
            "can be stacked"
        )
    if (kind := _kind(base)) != _kind(like):
        raise ValueError(f"adapter {who!r} is on another base: {'/'.join(path)} is {kind}, not {_kind(like)}")
    if not all(map(_same, jax.tree.leaves(base), jax.tree.leaves(like))):
        raise ValueError(f"adapter {who!r} is on another base: {'/'.join(path)} holds other numbers")


def _kind(base: Leaf) -> str:
    return f"{type(base).__name__ if is_weight(base) else 'an array'} of {tuple(base.shape)}"


def _same(x: Any, y: Any) -> bool:
    """Whether two arrays hold the same numbers, as far as this process can see."""
    seen = all(
        isinstance(z, jax.Array) and not isinstance(z, jax.core.Tracer) and z.is_fully_addressable for z in (x, y)
    )
    return x is y or not seen or np.array_equal(x, y)


# -- side by side -----------------------------------------------------------------------------------------------------


class Flat(NamedTuple):
    """Rows of several arrays one after another: ``[*layers, D, width]``, padded where layers hold fewer; and of each
    array, where its rows lie, int32 ``[layers, r]``."""

    rows: Array
    places: list[np.ndarray]


def flat(arrays: Sequence[Array], held: Sequence[np.ndarray]) -> Flat:
    """The rows that are held of arrays ``[*layers, r, width]``, in the widest of their dtypes."""
    dtype = np.result_type(*{x.dtype for x in arrays}) if len({x.dtype for x in arrays}) > 1 else arrays[0].dtype
    axis = arrays[0].ndim - 2
    rows, all_held = jnp.concatenate([x.astype(dtype) for x in arrays], axis), np.concatenate(held, 1)
    places = np.where(all_held, np.cumsum(all_held, 1) - 1, NOTHING).astype(np.int32)
    if not all_held.all():
        size = max(1, int(all_held.sum(1).max()))
        order = np.argsort(~all_held, axis=1, kind="stable")[:, :size]
        there = np.take_along_axis(all_held, order, 1)
        lead = rows.shape[:axis]
        order, there = (x.reshape(*lead, size, 1) for x in (order, there))
        rows = jnp.where(jnp.asarray(there), jnp.take_along_axis(rows, jnp.asarray(order), axis), jnp.zeros((), dtype))
    return Flat(rows, np.split(places, np.cumsum([x.shape[1] for x in held])[:-1], axis=1))


class Laid(NamedTuple):
    """Several adapters' directions side by side, and where each one's lie: the fields of `methods.slora`'s leaf."""

    a: Any
    b: Any
    index: Array  # type: ignore[assignment]  # a tuple has a method of this name
    scale: Array
    d: Any
    d_index: Any
    out: Any
    out_index: Any


def lay(mine: Mapping[int, Directions], n: int) -> Laid:
    """The directions of some of n adapters, given by their numbers."""
    like = next(iter(mine.values()))
    lead, layers = like.scale.shape, len(like.held)
    rank = max(1, *(int(w.held.sum(1).max()) for w in mine.values()))
    nowhere = np.full((layers, n, rank), NOTHING)

    def field(rows: Mapping[int, Array], held: Mapping[int, np.ndarray]) -> tuple[Any, Any]:
        """One field of those that have it; and where it lies, what a layer holds first."""
        if not rows:
            return None, None
        laid, places = flat([*rows.values()], [held[i] for i in rows])
        index = nowhere.copy()
        for i, found in zip(rows, places, strict=True):
            _put(index[:, i], found, held[i])
        return laid, index

    held = {i: w.held for i, w in mine.items()}
    of = lambda name: {i: x for i, w in mine.items() if (x := getattr(w, name)) is not None}  # noqa: E731
    a, index = field(of("a"), held)
    b, _ = field(of("b"), held)
    d, d_index = field({i: x[..., None] for i, x in of("d").items()}, held)
    any_held = {i: np.asarray(x.any(1, keepdims=True)) for i, x in held.items()}
    out, out_index = field({i: x[..., None, :] for i, x in of("out").items()}, any_held)
    index = nowhere.copy() if index is None else index
    for i, w in mine.items():
        if w.a is None:
            _put(index[:, i], -1 - w.shared - np.broadcast_to(np.arange(w.held.shape[1]), w.held.shape), w.held)

    none = jnp.zeros(lead, jnp.float32)
    scale = jnp.stack([mine[i].scale.astype(jnp.float32) if i in mine else none for i in range(n)], -1)
    arranged = lambda x: None if x is None else jnp.asarray(x.reshape(*lead, *x.shape[1:]), jnp.int32)  # noqa: E731
    return Laid(
        a,
        b,
        jnp.asarray(index.reshape(*lead, n, rank), jnp.int32),
        jnp.broadcast_to(scale[..., None], (*lead, n, rank)),
        None if d is None else d[..., 0],
        arranged(d_index),
        out,
        None if out_index is None else arranged(out_index[..., 0]),
    )


def _put(into: np.ndarray, places: np.ndarray, held: np.ndarray) -> None:
    """Where an adapter's directions lie, those that a layer holds first."""
    order = np.argsort(~held, axis=1, kind="stable")[:, : into.shape[1]]
    there = np.take_along_axis(held, order, 1)
    into[:, : order.shape[1]] = np.where(there, np.take_along_axis(places, order, 1), NOTHING)


# -- what VeRA's leaves share -----------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """The random directions of several VeRAs, each pair once: ``[S, in]``, ``[S, out]`` of the largest matrices; and
    by adapter and method's name, where they begin."""

    down: Any
    up: Any
    begin: dict[tuple[str, str], int]


def pairs(adapters: Mapping[str, Params], found: Mapping[str, Sequence[VeRA]]) -> Pairs | None:
    """The pairs of the VeRA leaves that each adapter holds; None of none.

    Raises:
        ValueError: if a tree lacks its pair.
    """
    begin, drawn, rows, size = dict[tuple[str, str], int](), dict[Any, int](), list[tuple[Array, Array]](), 0
    for who, leaves in found.items():
        for w in leaves:
            if (who, w.name) in begin:
                continue
            kept = adapters[who].get("methods", {}).get(w.name)
            if kept is None:
                raise ValueError(f"adapter {who!r} lacks methods/{w.name}, which its leaves share: give its whole tree")
            down, up = kept["down"].T, kept["up"]
            # A seed gives the same numbers for the same shapes; without one, the numbers themselves tell.
            same = w.seed if w.seed is not None else np.asarray(down).tobytes() + np.asarray(up).tobytes()
            key = (same, down.shape, up.shape)
            if key not in drawn:
                drawn[key] = size
                rows.append((down, up))
                size += len(down)
            begin[who, w.name] = drawn[key]
    if not rows:
        return None
    return Pairs(_padded([down for down, _ in rows]), _padded([up for _, up in rows]), begin)


def _padded(arrays: Sequence[Array]) -> Array:
    width = max(x.shape[-1] for x in arrays)
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, width - x.shape[-1]))) for x in arrays])
