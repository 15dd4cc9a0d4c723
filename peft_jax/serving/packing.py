"""An adapter as rows of the pool: read from its directory, checked against the base, laid flat.

What a row of the batch adds at a target is ``x Aᵀ B``, so every kind of adapter that is a product of low rank goes in,
with its scales taken into B: LoRA (rsLoRA, ranks that differ by module or layer), DyLoRA at its rank in use, AdaLoRA
after its pruning, VeRA with its frozen pair written out (r directions each: S-LoRA has no shared ones).
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from peft_jax import trees
from peft_jax.core import Params, Path
from peft_jax.interop import hf_peft
from peft_jax.methods.directions import directions, is_adapter
from peft_jax.methods.vera import VeRA
from peft_jax.serving.pool import Target
from peft_jax.weights import is_weight


class Packed(NamedTuple):
    """block   ``[layers, n, width]``, the adapter's rows
    spans   by target, where A begins in them, where B does, and where it ends
    rank    the largest of its ranks
    """

    block: Float[np.ndarray, "layers n width"]
    spans: Mapping[Path, tuple[int, int, int]]
    rank: int

    def ids(self, rows: np.ndarray) -> dict[Path, tuple[np.ndarray, np.ndarray]]:
        """The rows of A and of B at each target, once the block lies in these rows."""
        return {path: (rows[a:b], rows[b:end]) for path, (a, b, end) in self.spans.items()}


def read(directory: str | os.PathLike[str], model: Any, targets: tuple[Target, ...], width: int, dtype: Any) -> Packed:
    """An adapter in HF PEFT's format, for this base.

    Raises:
        FileNotFoundError, ValueError: as `interop.hf_peft.load`; where the adapter acts on what is no target, or is no
            product of low rank.
    """
    return pack(hf_peft.load(directory, model)[0], targets, width, dtype)


def pack(params: Params, targets: tuple[Target, ...], width: int, dtype: Any) -> Packed:
    """The rows of an adapted tree.

    Raises:
        ValueError: if a leaf is adapted that is no target, or in another way than by a product of low rank; if it holds
            what is no number.
    """
    wanted = {target.path: target for target in targets}
    if added := sorted(params.get("ports", {})):
        raise ValueError(f"the adapter has {added[0]} in its ports (a prompt or prefix): only products of low rank are")
    parts, spans, n, rank = list[np.ndarray](), dict[Path, tuple[int, int, int]](), 0, 0
    for path, leaf in trees.leaves(trees.share(params)).items():
        if not is_weight(leaf) or not hasattr(leaf, "base"):
            continue
        if path not in wanted:
            raise ValueError(
                f"the adapter acts on {'/'.join(path)}, which is not served: its targets are matrices of the layers"
            )
        a, b = factors(leaf, "/".join(path))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"the adapter holds NaN or Inf at {'/'.join(path)}: it is damaged, or did not train well")
        rows = [_flat(x, width, dtype) for x in parts_of(a, b, wanted[path])]
        spans[path] = (n, n + rows[0].shape[1], n + rows[0].shape[1] + rows[1].shape[1])
        n, rank = spans[path][2], max(rank, a.shape[1])
        parts += rows
    if not parts:
        raise ValueError("the adapter adapts nothing")
    return Packed(np.concatenate(parts, 1), spans, rank)


def factors(w: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """``A [layers, r, in]`` and ``B [layers, r, out]`` in fp32, with every scale in B; directions that no layer has are
    left out, and those that one lacks are zeros."""
    if not is_adapter(w) or hasattr(w.base, "base"):
        raise ValueError(f"the adapter has {type(w).__name__} at {where}, which is no product of low rank on the base")
    found = directions(w)
    if isinstance(w, VeRA):
        layers, (down, up) = len(found.held), (np.asarray(x) for x in w.pair(np.float32))
        a, b = (np.broadcast_to(x, (layers, *x.shape)) for x in (down.T, up))
    else:
        a, b = (np.asarray(x, np.float32) for x in (found.a, found.b))
    scale = np.asarray(found.scale, np.float32)[:, None]
    scale = np.where(found.held, scale if found.d is None else scale * np.asarray(found.d, np.float32), 0)
    b = b * scale[..., None]
    b = b if found.out is None else b * np.asarray(found.out, np.float32)[:, None]
    order = np.argsort(~found.held, axis=1, kind="stable")[:, : max(1, found.held.sum(1).max()), None]
    there = np.take_along_axis(found.held[..., None], order, 1)
    return tuple(np.where(there, np.take_along_axis(x, order, 1), 0) for x in (a, b))  # type: ignore[return-value]


def parts_of(
    a: Float[np.ndarray, "layers rank inputs"], b: Float[np.ndarray, "layers rank outputs"], target: Target
) -> tuple[np.ndarray, np.ndarray]:
    """A and B as each device needs them ``[layers, devices, directions, numbers]``; filled up with zeros where they do
    not divide (see `peft_jax.serving.tensor`)."""
    devices, (layers, rank, _) = target.devices, a.shape
    fill = lambda x, axis: np.pad(x, [(0, -x.shape[i] % devices * (i == axis)) for i in range(3)])  # noqa: E731
    across = lambda x: fill(x, 2).reshape(layers, rank, devices, -1).swapaxes(1, 2)  # noqa: E731
    if target.ends:
        return across(a), across(b)
    return fill(a, 1).reshape(layers, -1, devices, target.inputs).swapaxes(1, 2), across(b)


def _flat(x: np.ndarray, width: int, dtype: Any) -> np.ndarray:
    """``[layers, devices, r, d]`` to ``[layers, rows, width]``, each device's part in its own columns, direction after
    direction, the last row filled up with zeros."""
    layers, devices = x.shape[:2]
    x, share = x.reshape(layers, devices, -1), width // devices
    x = np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % share))).reshape(layers, devices, -1, share)
    return x.swapaxes(1, 2).reshape(layers, -1, width).astype(dtype)
