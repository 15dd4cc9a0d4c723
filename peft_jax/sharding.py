"""Meshes, and where each array of a tree, a batch and an optimiser's state lies on one.

    mesh = sharding.mesh(fsdp=-1)             # every device there is, of every process
    batch = sharding.spread(batch, mesh)      # rows split over the devices

A mesh has four axes, in this order, each of size 1 unless it is asked for:

    data        rows are split, weights are not
    fsdp        rows are split, and so is every weight: gathered a layer at a time, where it is used
    tensor      the heads and hidden units of a layer are split
    sequence    the tokens of a text are split

Axes are Auto: the compiler chooses the collectives, and the arrays' shardings tell it what is wanted.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")  # the axes that split a batch's rows


def mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of named axes over `devices`, by default all there are, those of other processes included.

    Args:
        data, fsdp, tensor, sequence: the size of each axis; one of them may be −1, for what the others leave.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.

    >>> from peft_jax import sharding
    >>> dict(sharding.mesh(fsdp=-1).shape)["tensor"]
    1
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence), strict=True))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"the mesh's sizes are {sizes}: give 1 or more, and −1 for one of them at most")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % taken == 0:
        sizes[free[0]] = len(devices) // taken
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"a mesh of {sizes} does not fit {len(devices)} devices: the sizes must multiply to that number "
            "(−1 takes what the others leave), or give devices="
        )
    grid = np.array(devices, dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch this process's devices hold, in order: those that it has to read, and no others.

    Raises:
        ValueError: if the mesh does not split the batch evenly.

    >>> from peft_jax import sharding
    >>> sharding.rows(8, sharding.mesh(fsdp=-1)).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    parts = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch_size % parts:
        raise ValueError(
            f"a batch of {batch_size} rows does not split over data × fsdp = {parts}: give a multiple of {parts} rows"
        )
    places = NamedSharding(mesh, PartitionSpec(ROWS)).addressable_devices_indices_map((batch_size,))
    return np.unique([np.arange(batch_size)[index] for index in places.values()])


def spread(batch: Any, mesh: Mesh) -> Any:
    """A batch on a mesh: rows split over ``data`` and ``fsdp``, tokens over ``sequence``.

    Every process gives its own rows, as `rows` counts them, and all tokens of them; the global batch is all of them.
    """
    parts = math.prod(mesh.shape[axis] for axis in ROWS)
    mine = len(rows(parts, mesh))  # of so many equal parts

    def each(x: Any) -> jax.Array:
        x = np.asarray(x)
        if x.shape[0] % mine:
            raise ValueError(
                f"this process's {x.shape[0]} rows do not split over its {mine} of {parts} parts of a batch: give a "
                f"multiple of {mine}"
            )
        held = rows(x.shape[0] // mine * parts, mesh)

        def part(index: Any) -> np.ndarray:
            wanted = np.arange(len(x) // mine * parts)[index[0]]
            return np.asarray(x[np.searchsorted(held, wanted)][(slice(None), *index[1:])])

        spec = PartitionSpec(ROWS, *(("sequence",) if x.ndim > 1 else ()))
        shape = (x.shape[0] // mine * parts, *x.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)

    return jax.tree.map(each, batch)
