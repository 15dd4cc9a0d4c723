"""Leaves that are still in their file: a model can be adapted, and stored in few bits, before it is read.

    model = models.load(folder, lazy=True)                  # every matrix an OnDisk leaf: nothing is read
    params, forward = chain(quantise(nf4()), lora(8))(...)  # reads, packs and frees one layer at a time
    params = pj.place(params)                               # reads what is left

The peak of memory is then the quantised model and about one layer.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax.weights import Leaf, Weight, rebase, static

Index = tuple[slice, ...]  # a region of an array, each slice with its start and stop


@runtime_checkable
class Reader(Protocol):
    """A checkpoint whose tensors can be read by their Hugging Face names, a region at a time."""

    @property
    def source(self) -> str:
        """The file or folder, for messages."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: Index) -> np.ndarray: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OnDisk(Weight):
    """An array in a file.  It holds no array, so a tree of them is a tree without children.

    shape, stored   of the array, with its leading axes, and its dtype
    read            gives a region of it
    names           where each layer lies, for messages: the tensor and the file

    `pj.materialise` reads it; `linear`, `embed` and `unembed` raise, for a model would read it at every call.
    """

    shape: tuple[int, ...] = static(default=())
    stored: str = static(default="float32")
    read: Any = static(default=None)  # noqa: RUF009
    names: tuple[str, ...] = static(default=())

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.stored)

    @property
    def lead(self) -> tuple[int, ...]:
        return self.shape[:-2]

    def layer(self, number: int) -> np.ndarray:
        """One matrix, the leading axes counted as one."""
        at = np.unravel_index(number, self.lead) if self.lead else ()
        index = (*(slice(int(i), int(i) + 1) for i in at), *whole(self.shape[-2:]))
        return np.asarray(self.read(index)).reshape(self.shape[-2:])

    def materialise(self) -> Array:
        return jnp.asarray(self.read(whole(self.shape)))

    def linear(self, x: Array) -> Array:
        raise self._unread()

    def embed(self, ids: Array) -> Array:
        raise self._unread()

    def unembed(self, x: Array) -> Array:
        raise self._unread()

    def _unread(self) -> RuntimeError:
        more = f" (and {len(self.names) - 1} more layers)" if len(self.names) > 1 else ""
        return RuntimeError(
            f"{self.names[0] if self.names else 'a leaf'}{more} is still on disk: read what is left by "
            "params = pj.place(params), or store it in few bits by quant.quantise, before the model is called"
        )

    def numbers(self) -> tuple[int, int]:
        return 0, math.prod(self.shape)


def is_on_disk(node: Any) -> bool:
    return isinstance(node, OnDisk)


def read(leaf: Leaf) -> Leaf:
    """A leaf whose base is read, if it was on disk."""
    return rebase(leaf, lambda base: base.materialise() if is_on_disk(base) else base)


def place(leaf: OnDisk, sharding: Any) -> Array:
    """The array in a sharding: each device gets its own slices, and what several hold is read once."""
    if not isinstance(sharding, jax.sharding.Sharding):
        return jax.device_put(leaf.read(whole(leaf.shape)), sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, once(leaf.read, leaf.shape))


def put(x: Any, sharding: Any) -> Array:
    """An array in a sharding or on a device.

    Where the devices are several processes', each of them has the whole array and gives its own devices their pieces:
    nothing is sent, and nothing compared.
    """
    if not isinstance(sharding, jax.sharding.Sharding) or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)


def whole(shape: Sequence[int]) -> Index:
    return tuple(slice(0, n) for n in shape)


def once(fill: Callable[[Index], np.ndarray], shape: Sequence[int]) -> Callable[[Any], np.ndarray]:
    """Devices that hold the same region share one read."""
    seen: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def region(index: Any) -> np.ndarray:
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        if key not in seen:
            seen[key] = fill(tuple(slice(start, stop) for start, stop, _ in key))
        return seen[key]

    return region


def aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array that JAX's CPU backend can take over without a copy, which it does at 64-byte addresses."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def stacked(lead: Sequence[int], make: Callable[[int], Leaf]) -> Leaf:
    """The leaf whose layers are ``make(0)``, ``make(1)``, …: its arrays are allocated once and filled one by one.

    Raises:
        ValueError: if a layer is not of the first one's type, static fields and shapes.
    """
    if not lead:
        return jax.tree.map(jax.device_put, make(0))
    layer = make(0)
    kind = _kind(layer)
    buffers = [aligned((math.prod(lead), *x.shape), x.dtype) for x in jax.tree.leaves(layer)]
    for i in range(math.prod(lead)):
        layer = make(i) if i else layer
        if _kind(layer) != kind:
            raise ValueError(f"layer {i} is stored in another way than the layers before it")
        for buffer, x in zip(buffers, jax.tree.leaves(layer), strict=True):
            buffer[i] = x
    arrays = [jax.device_put(buffer.reshape(*lead, *buffer.shape[1:])) for buffer in buffers]
    return jax.tree.unflatten(kind[0], arrays)


def _kind(leaf: Leaf) -> Any:
    return jax.tree.structure(leaf), [(x.shape, x.dtype) for x in jax.tree.leaves(leaf)]
