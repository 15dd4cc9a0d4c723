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

from peft_jax.core import Params
from peft_jax.methods.adalora import SVD
from peft_jax.methods.dylora import DyLoRA, shorten
from peft_jax.methods.lora import LoRA
from peft_jax.methods.vera import VeRA
from peft_jax.weights import Leaf

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
    return Pairs(*(_padded([pair[i] for pair in rows]) for i in range(2)), begin)


def _padded(arrays: Sequence[Array]) -> Array:
    width = max(x.shape[-1] for x in arrays)
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, width - x.shape[-1]))) for x in arrays])
