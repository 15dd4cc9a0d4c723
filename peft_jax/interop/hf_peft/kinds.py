"""What each kind of adapter has of its own; which modules it adapts, and what trains whole beside it, all share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import Forward, Params, Path
from peft_jax.interop.hf_peft.names import Names
from peft_jax.weights import Leaf

Config = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]  # by their full names
Shapes = dict[str, tuple[int, ...]]  # by the tensor's full name


class Wanted(NamedTuple):
    """The tensors that a config promises: of each adapted module, and those that belong to none."""

    adapted: dict[str, Shapes]
    shared: Shapes


class Found(NamedTuple):
    """An adapter's files as they are read: what is known of them when its leaves are made."""

    config: Config
    tensors: Tensors
    names: Names
    modules: Sequence[str]  # those that are adapted
    name: str  # of the method
    dtype: Any  # of what trains, None for the file's own
    file: Any  # for messages
    options: Mapping[str, Any]  # of `load`, where a kind has its own


class Held(NamedTuple):
    """What a tree holds: each adapted module's part, of a type of the kind's own; all leaves without adapters; and what
    the modules share."""

    adapted: dict[str, Any]
    bases: dict[Path, Leaf]
    shared: Any = None


class Kind(NamedTuple):
    """One kind of adapter.

    peft_type   what HF PEFT calls it
    fields      the config's fields that it reads, or that say nothing about the numbers, beside those of every kind
    bias        the bias mode of the adapted modules' biases
    check       ``(config, where)``: raises on what cannot be read
    wanted      ``(modules, config, names)``: the tensors of the modules that the config adapts
    adapt       ``(params, found)``: the tree with the adapter's leaves
    wrap        ``(found)`` -> forward -> forward: what its leaves need of a call
    holds       whether a leaf is of this kind
    read        ``(params, names)``: what a tree holds
    describe    ``(held, names, options)``: its tensors, and the config's fields that are its own
    """

    peft_type: str
    fields: str
    bias: str
    check: Callable[[Config, str], None]
    wanted: Callable[[Sequence[str], Config, Names], Wanted]
    adapt: Callable[[Params, Found], Params]
    wrap: Callable[[Found], Callable[[Forward], Forward]]
    holds: Callable[[Leaf], bool]
    read: Callable[[Params, Names], Held]
    describe: Callable[[Held, Names, Mapping[str, Any]], tuple[dict[str, np.ndarray], dict[str, Any]]]


def stacked(
    arrays: Mapping[int | None, np.ndarray], layers: Sequence[int | None], shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Each layer's array in the corner of its place, zeros where there is none; not stacked where the layer is None."""
    out = np.zeros((len(layers), *shape), dtype)
    for index, layer in enumerate(layers):
        if layer in arrays:
            corner: tuple[Any, ...] = (index, *map(slice, arrays[layer].shape))
            out[corner] = arrays[layer]
    return jnp.asarray(out if layers != [None] else out[0])
