"""The map between a source checkpoint and our tree: one table a family, read in both directions.

A family lists its `Tensor`s once; loading, saving, and the names that `select` searches all come from that table.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from peft_jax.core import Path


class Tensor(NamedTuple):
    """One tensor of the source model, and the leaf (or leaves) of ours that hold it.

    source      its name in a Hugging Face checkpoint; ``{layer}`` stands for the layer's index, ``{expert}`` for that
                of one of its experts
    paths       where it goes, as slash-separated paths of the stacked tree.  Several paths: the source stores
                matrices side by side along the last axis of our layout (GPT-2's c_attn holds q, k, v)
    transpose   whether the source keeps ``[out, in]`` (torch's Linear) where we keep ``[in, out]``
    names       what `select` calls each path; by default the source's name without ``.weight``
    layers      how many there are, where a model's stacks differ in that; by default the model's number
    experts     how many each layer has, of a mixture's; each is a tensor of its own
    """

    source: str
    paths: tuple[str, ...]
    transpose: bool = False
    names: tuple[str, ...] = ()
    layers: int | None = None
    experts: int = 0

    @property
    def layered(self) -> bool:
        return "{layer}" in self.source

    def places(self, layers: int) -> Iterator[tuple[int, int]]:
        """The (layer, expert) of each tensor, of a model of so many layers; 0 where there are none."""
        own = (self.layers or layers) if self.layered else 1
        return itertools.product(range(own), range(self.experts or 1))

    def selected_names(self) -> tuple[str, ...]:
        return self.names or (self.source.removesuffix(".weight"),) * len(self.paths)


def unrolled(path: str, layer: int) -> Path:
    """The path of one layer's leaf in an unrolled tree: ``layers`` becomes ``layers_3``."""
    return tuple(f"layers_{layer}" if part == "layers" else part for part in path.split("/"))


def place(path: str, tensor: Tensor, layer: int, scan: bool) -> Path:
    """Where a layer's leaf lies in the tree, stacked with the others or by itself."""
    return unrolled(path, layer) if tensor.layered and not scan else tuple(path.split("/"))


def naming(
    tensors: Sequence[Tensor], layers: int, scan: bool
) -> tuple[Callable[[Path], tuple[str, ...]], Callable[[Path], bool]]:
    """The `names` and `stacked` functions of a model's `Spec`."""
    found: dict[Path, list[str]] = {}
    stacked: set[Path] = set()
    for tensor in tensors:
        for path, name in zip(tensor.paths, tensor.selected_names(), strict=True):
            for layer, expert in tensor.places(layers):
                found.setdefault(place(path, tensor, layer, scan), []).append(name.format(layer=layer, expert=expert))
            if tensor.layered and scan:
                stacked.add(tuple(path.split("/")))
    names = {path: tuple(mine) for path, mine in found.items()}
    return names.__getitem__, stacked.__contains__


def expert_counts(tensors: Sequence[Tensor], layers: int, scan: bool) -> Callable[[Path], int]:
    """The `experts` function of a model's `Spec`."""
    found = {
        place(path, tensor, layer, scan): tensor.experts
        for tensor in tensors
        if tensor.experts
        for path in tensor.paths
        for layer, _ in tensor.places(layers)
    }
    return lambda path: found.get(path, 0)
