"""The map between a source checkpoint and our tree: one table a family, read in both directions.

A family lists its `Tensor`s once; loading, saving, and the names that `select` searches all come from that table.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peft_jax.core import Path


class Tensor(NamedTuple):
    """One tensor of the source model, and the leaf (or leaves) of ours that hold it.

    source      its name in a Hugging Face checkpoint; ``{layer}`` stands for the layer's index
    paths       where it goes, as slash-separated paths of the stacked tree.  Several paths: the source stores
                matrices side by side along the last axis of our layout (GPT-2's c_attn holds q, k, v)
    transpose   whether the source keeps ``[out, in]`` (torch's Linear) where we keep ``[in, out]``
    names       what `select` calls each path; by default the source's name without ``.weight``
    layers      how many there are, where a model's stacks differ in that; by default the model's number
    """

    source: str
    paths: tuple[str, ...]
    transpose: bool = False
    names: tuple[str, ...] = ()
    layers: int | None = None

    @property
    def layered(self) -> bool:
        return "{layer}" in self.source

    def selected_names(self) -> tuple[str, ...]:
        return self.names or (self.source.removesuffix(".weight"),) * len(self.paths)


def unrolled(path: str, layer: int) -> Path:
    """The path of one layer's leaf in an unrolled tree: ``layers`` becomes ``layers_3``."""
    return tuple(f"layers_{layer}" if part == "layers" else part for part in path.split("/"))


def naming(
    tensors: Sequence[Tensor], layers: int, scan: bool
) -> tuple[Callable[[Path], tuple[str, ...]], Callable[[Path], bool]]:
    """The `names` and `stacked` functions of a model's `Spec`."""
    names: dict[Path, tuple[str, ...]] = {}
    stacked: set[Path] = set()
    for tensor in tensors:
        for path, name in zip(tensor.paths, tensor.selected_names(), strict=True):
            if not tensor.layered:
                names[tuple(path.split("/"))] = (name,)
            elif scan:
                stacked.add(tuple(path.split("/")))
                names[tuple(path.split("/"))] = tuple(name.format(layer=i) for i in range(tensor.layers or layers))
            else:
                names |= {unrolled(path, i): (name.format(layer=i),) for i in range(tensor.layers or layers)}
    return names.__getitem__, stacked.__contains__
