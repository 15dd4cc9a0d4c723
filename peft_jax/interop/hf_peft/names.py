"""Where the source model's tensors lie in our tree: the leaf, the layer and the columns of each."""

from collections.abc import Collection
from typing import NamedTuple

from peft_jax import trees
from peft_jax.core import Params, Path, Spec
from peft_jax.models.checkpoint import plan

PREFIX = "base_model.model."  # what HF PEFT puts before the model's own names


class Part(NamedTuple):
    """The columns `start` to `stop` of a tensor, in our layout, and the leaf (and layer of it) that holds them."""

    path: Path
    layer: int | None
    start: int
    stop: int


class Source(NamedTuple):
    """One tensor of the source model.  Several parts: the source stores matrices side by side (GPT-2's c_attn)."""

    name: str
    shape: tuple[int, ...]
    transpose: bool
    parts: tuple[Part, ...]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def where(self) -> str:
        """Its place in our tree, for messages."""
        path, layer, *_ = self.parts[0]
        return "/".join(path) + (f"[{layer}]" if layer is not None else "")

    @property
    def embedding(self) -> bool:
        return self.parts[0].path[-1] == "embedding"

    @property
    def matrix(self) -> bool:
        """Whether an adapter can act on it."""
        return self.parts[0].path[-1] in ("kernel", "embedding") and len(self.shape) == 2

    @property
    def bias(self) -> bool:
        return self.name.endswith(".bias")

    @property
    def inputs(self) -> int:
        return self.shape[-1] if self.transpose else self.shape[0]

    @property
    def outputs(self) -> int:
        return self.parts[-1].stop


class Names(NamedTuple):
    """The source's tensors, in the model's order.

    sources     by name
    matrices    what can be adapted, by module
    tied        the modules that are heads of their own only in name, each with the embedding it reuses
    """

    sources: dict[str, Source]
    matrices: dict[str, Source]
    tied: dict[str, str]


def names_of(params: Params, spec: Spec) -> Names:
    """The source's tensors, from the model's table, or from the leaves' names where it has none (torch's conventions).

    Raises:
        ValueError: if tree and table do not match.
    """
    sources = (_from_table if spec.tensors else _from_leaves)(params, spec)
    matrices = {source.module: source for source in sources.values() if source.matrix}
    return Names(sources, matrices, dict(spec.tied))


def refuse_copies(modules: Collection[str], where: str) -> None:
    """Raises on an adapter of the embedding that an encoder-decoder model's two stacks share."""
    for module in modules:
        if module in ("shared", "model.shared"):
            raise ValueError(
                f"{where} adapts {module}, the embedding of both stacks: transformers looks words up in two copies of "
                "it, which an adapter of HF PEFT would not reach"
            )


def refuse_unreached(modules: Collection[str], where: str) -> None:
    """Raises on an adapter of DeBERTa's table of distances."""
    for module in modules:
        if module.endswith("encoder.rel_embeddings"):
            raise ValueError(
                f"{where} adapts {module}, whose numbers transformers reads past an adapter of HF PEFT: leave it out, "
                "or train it whole (methods.unfreeze)"
            )


def refuse_experts(paths: Collection[Path], spec: Spec, what: str) -> None:
    """Raises where `what` acts on experts, of which HF PEFT knows plain LoRA alone."""
    for path in paths:
        if spec.experts(path):
            raise ValueError(f"{'/'.join(path)} holds experts, on which HF PEFT has plain LoRA alone, not {what}")


def _from_table(params: Params, spec: Spec) -> dict[str, Source]:
    tree = trees.leaves(params)
    made, sources = plan(params, spec.tensors, spec.layers, any(map(spec.stacked, tree))), {}
    for name, (transpose, parts) in made.parts.items():
        placed, start = [], 0
        for path, layer in parts:
            stop = start + tree[path].shape[-1]
            placed.append(Part(path, layer, start, stop))
            start = stop
        sources[name] = Source(name, made.shapes[name], transpose, tuple(placed))
    return sources


def _from_leaves(params: Params, spec: Spec) -> dict[str, Source]:
    sources = {}
    for path, leaf in trees.leaves(params).items():
        site = trees.site(path, spec)
        shape, transpose = site.matrix_shape(leaf), path[-1] == "kernel"
        for layer, name in enumerate(site.names):
            name = name if name.endswith(f".{path[-1]}") else f"{name}.weight"
            part = Part(path, layer if site.stacked else None, 0, shape[-1] if shape else 1)
            sources[name] = Source(name, shape[::-1] if transpose else shape, transpose, (part,))
    return sources
