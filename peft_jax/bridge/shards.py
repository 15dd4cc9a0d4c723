"""A typed leaf in a `jax.shard_map`: how each of its arrays is split where the kernel in its place would be.

A product with a part of LoRA's matrices is that part's share of the product, summed over or kept as the function does
with its own.  Leaves of which that is not so (DoRA's norms are of whole columns) go in whole, or not at all.
"""

import dataclasses
from typing import Any

from jax.sharding import PartitionSpec as P

from peft_jax.bridge.follow import Followed, Nothing, start
from peft_jax.methods.dylora import DyLoRA
from peft_jax.methods.lora import LoRA
from peft_jax.views import View
from peft_jax.weights import Leaf, is_weight

SHARDED = "it is split over devices there, which only LoRA leaves on plain arrays can be"


def can_shard(value: Followed, spec: Any) -> bool:
    """Whether a leaf can be split so.  Anything can be there whole."""
    if not any(spec):
        return True
    leaf = value.leaf
    if isinstance(leaf, Nothing):
        return all(len(dim) == 1 for dim in value.dims)
    while type(leaf) in (LoRA, DyLoRA):
        leaf = leaf.base
    plain = not is_weight(leaf.base if isinstance(leaf, View) else leaf)
    # Of several axes that are one side of the matrix only the first can be split: a part is then a run of the side.
    first = all(axis.place == (0,) for part, dim in zip(spec, value.dims, strict=False) if part for axis in dim)
    return plain and first and value.dims == start(value.path, value.leaf).dims


def shard_specs(value: Followed, spec: Any) -> Any:
    """The partition of every array of a leaf, from that of the kernel in its place."""
    if not any(spec) or isinstance(value.leaf, Nothing):
        return P()
    found: dict[str, list[Any]] = {"layers": [], "in": [], "out": []}
    for part, dim in zip(spec, value.dims, strict=False):
        for axis in dim:
            found[axis.kind].append(part)
    layers = found["layers"]
    sides = {"in": (found["in"] or [None])[0], "out": (found["out"] or [None])[0], None: None}

    def each(leaf: Leaf) -> Any:
        if isinstance(leaf, View):
            return dataclasses.replace(leaf, base=spec)
        if not isinstance(leaf, LoRA):
            return spec
        names = {f.name for f in dataclasses.fields(leaf) if not f.metadata.get("static")} - {"base"}
        along = leaf.axes()
        own: Any = {
            name: P(*layers, *(sides[side] for side in along.get(name, ())))
            for name in names
            if getattr(leaf, name) is not None
        }
        return dataclasses.replace(leaf, base=each(leaf.base), **own)

    return dataclasses.replace(value, leaf=each(value.leaf))


def a_part(value: Followed, shape: tuple[int, ...]) -> Followed:
    """A leaf that is split, as one device has it: its sizes are a part's."""
    if isinstance(value.leaf, Nothing):
        pairs = zip(value.dims, shape, strict=True)
        return value.to(tuple((axis._replace(size=size),) for (axis,), size in pairs))

    def each(leaf: Leaf) -> Leaf:
        if isinstance(leaf, View):
            return dataclasses.replace(leaf, own=tuple(leaf.base.shape[-len(leaf.own) :]))
        return dataclasses.replace(leaf, base=each(leaf.base)) if isinstance(leaf, LoRA) else leaf

    return dataclasses.replace(start(value.path, each(value.leaf)), dtype=value.dtype)
