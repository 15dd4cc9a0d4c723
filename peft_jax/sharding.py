"""Meshes, and where each array of a tree, a batch and an optimiser's state lies on one.

    mesh = sharding.mesh(fsdp=-1)             # every device there is, of every process
    model = models.load("Llama-3-8B", mesh=mesh)      # every array is created in its pieces
    params = sharding.shard(params, forward, mesh)    # adapters, codes and scales too
    batch = sharding.spread(batch, mesh)      # rows split over the devices

A mesh has four axes, in this order, each of size 1 unless it is asked for:

    data        rows are split, weights are not
    fsdp        rows are split, and so is every weight: gathered a layer at a time, where it is used
    tensor      the heads and hidden units of a layer are split
    sequence    the tokens of a text are split, and weights as by fsdp

Axes are Auto: the compiler chooses the collectives, and the arrays' shardings tell it what is wanted.

Where a weight ``[in, out]`` is split follows from what it does, which its path says, and nothing is listed by family:

    leaf                                    in             out
    a kernel                                fsdp           tensor     queries, keys, values, gates, heads
    a kernel that ends a block (`ENDS`)     tensor         fsdp       adds to the residual stream
    an embedding, rows by tokens            tensor         fsdp
    anything else of `BIG` numbers          fsdp, on the longest axis that it divides
    norms, biases, prompts, ranks, scales   whole on every device

and so do the arrays of a typed leaf, by `Weight.axes`: LoRA's a goes with ``in``, its b with ``out``, codes and their
scales with both.  An axis of the mesh that does not divide one of the two goes to the other; where it divides neither,
a small weight stays whole and a big one raises.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from peft_jax import trees
from peft_jax.core import Forward, Params, Path
from peft_jax.hlo import Collective as Collective
from peft_jax.hlo import collectives as collectives
from peft_jax.weights import Leaf, is_weight, rebase

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")  # the axes that split a batch's rows
PIECES = ("fsdp", "sequence")  # the axes that keep a weight in pieces, which are gathered where it is used
BIG = 2**20  # numbers of a matrix from which it is not kept whole on every device without being asked

# The kernels whose outputs are added to the residual stream: their inputs are what the block's other kernels put out.
ENDS = re.compile(r"(^|/)(o|o_proj|out_proj|down_proj|c_proj|fc2|wo|w2|output/dense)/kernel$")


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


def mesh_of(x: jax.Array) -> AbstractMesh | None:
    """The mesh that an array lies on, known of traced arrays too; None of one device, and inside a `jax.shard_map`."""
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types) else mesh


def pin(x: jax.Array) -> jax.Array:
    """Activations ``[batch, time, …]``, whose rows and tokens lie as those of the batch that `spread` gave.

    Models say so where they embed and multiply.  Without it the compiler finds it cheaper to split the width, as the
    weights are, and to exchange activations.  Where `x` lies on no mesh, or an axis does not divide, nothing is said.
    """
    mesh = mesh_of(x)
    if mesh is None or x.ndim < 3:
        return x
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    for i, axes in enumerate((ROWS, ("sequence",))):
        axes = tuple(a for a in axes if mesh.shape.get(a, 1) > 1)
        if x.shape[i] % math.prod(mesh.shape[a] for a in axes) == 0:
            spec[i] = _entry(axes)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


# -- weights ----------------------------------------------------------------------------------------------------------


def shard(params: Params, forward: Forward, mesh: Mesh) -> Params:
    """The tree on a mesh, every array in its own pieces; what is still on disk is read straight into them.

    It is ``pj.place(params, shardings(params, forward, mesh))``, and tells leaves in few bits how they are split where
    they are used (`peft_jax.quant.frozen.Frozen`), so that codes travel and not the numbers that they stand for.

    Raises:
        ValueError: as `shardings` does.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import sharding
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> mesh = sharding.mesh(fsdp=-1)
    >>> params = sharding.shard({"q_proj": {"kernel": jax.numpy.ones((64, 16))}}, forward, mesh)
    >>> params["q_proj"]["kernel"].sharding.spec
    PartitionSpec('fsdp', None)
    """

    params = told(params, mesh)
    return trees.place(params, shardings(params, forward, mesh))


def told(params: Params, mesh: Mesh) -> Params:
    """The same tree, abstract or not, whose leaves in few bits know how `mesh` splits them where they are used."""

    def tell(path: Path, leaf: Leaf) -> Leaf:
        split = matrix_sharding(path, leaf, mesh)
        if split is None:
            return leaf
        kept = [tuple(axis for axis in _names(entry) if axis not in PIECES) for entry in split.spec]
        use = PartitionSpec(*map(_entry, kept))
        return rebase(leaf, lambda base: dataclasses.replace(base, use=use) if hasattr(base, "use") else base)

    return trees.map_leaves(tell, params)


def shardings(params: Params, forward: Forward, mesh: Mesh) -> PyTree[NamedSharding]:
    """Where each array of a tree lies: a tree like `params`, for `pj.place`.

    Args:
        params: the tree, which may be abstract, or on disk.
        forward: its forward function, which says what is stacked: layers are never split.
        mesh: of axes called as here, all Auto; an axis that it lacks splits nothing.

    Raises:
        ValueError: on a weight of `BIG` numbers or more of which the mesh's axis divides neither dimension, with its
            path; on a mesh whose axes are not Auto.
    """
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(f"the mesh's axes are {mesh.axis_types}: make it by sharding.mesh, whose axes are Auto")

    def each(keys: Any, leaf: Leaf) -> Any:
        path = trees.path_of(keys)
        split = matrix_sharding(path, leaf, mesh)
        if split is not None:
            return arrays_like(leaf, split)
        lead = int(not trees.is_added(path) and forward.spec.stacked(path))
        return jax.tree.map(lambda x: _alone("/".join(path), x, lead, mesh), leaf)

    return jax.tree_util.tree_map_with_path(each, params, is_leaf=is_weight)


def matrix_sharding(path: Path, leaf: Leaf, mesh: Mesh) -> NamedSharding | None:
    """How a mesh splits the matrix ``[in, out]`` that a leaf stands for, by what its path says; None of what is none.

    Raises:
        ValueError: as `shardings` does.
    """
    if trees.is_added(path) or path[-1] not in ("kernel", "embedding") or len(leaf.shape) < 2:
        return None
    where, shape = "/".join(path), tuple(leaf.shape[-2:])
    tensor = 0 if path[-1] == "embedding" or ENDS.search(where) else 1
    dims: list[tuple[str, ...]] = [(), ()]
    for axis in ("tensor", *PIECES):
        order = (tensor, 1 - tensor) if axis == "tensor" else (1 - tensor, tensor)
        taken = [mesh.shape.get(axis, 1) * math.prod(mesh.shape[a] for a in dims[d]) for d in order]
        if mesh.shape.get(axis, 1) == 1:
            continue
        free = [d for d, n in zip(order, taken, strict=True) if shape[d] % n == 0]
        if free:
            dims[free[0]] += (axis,)
        elif math.prod(shape) >= BIG and axis != "sequence":
            raise _indivisible(where, shape, axis, mesh)
    return NamedSharding(mesh, PartitionSpec(*(_entry(axes) for axes in dims)))


def arrays_like(leaf: Leaf, split: NamedSharding) -> PyTree[NamedSharding]:
    """The shardings of a leaf's arrays, where `split` is that of one matrix ``[in, out]`` that it stands for.

    An array that an axis of the mesh does not divide (few groups, few ranks) is not split by it.
    """
    mesh = split.mesh
    inputs, outputs = split.spec
    along = {"in": _names(inputs), "out": _names(outputs), None: ()}

    def array(x: Any, names: tuple[str | None, ...]) -> NamedSharding:
        spec: list[Any] = [None] * len(x.shape)
        for i, name in enumerate(names, len(spec) - len(names)):
            axes = along[name]
            while math.prod(mesh.shape[a] for a in axes) > 1 and x.shape[i] % math.prod(mesh.shape[a] for a in axes):
                axes = axes[:-1]
            spec[i] = _entry(axes)
        return NamedSharding(mesh, PartitionSpec(*spec))

    if not is_weight(leaf) or trees.on_disk.is_on_disk(leaf):
        return array(leaf, ("in", "out"))
    own, found = leaf.axes(), dict[str, Any]()
    for name in (field.name for field in dataclasses.fields(leaf) if not field.metadata.get("static")):
        value = getattr(leaf, name)
        if name in own:
            found[name] = jax.tree.map(array, value, own[name])
        elif name == "base" and value is not None:
            found[name] = arrays_like(value, split)
        else:
            inside = lambda x: arrays_like(x, split) if is_weight(x) else array(x, ())  # noqa: E731
            found[name] = jax.tree.map(inside, value, is_leaf=is_weight)
    return dataclasses.replace(leaf, **found)


def _alone(where: str, x: Any, lead: int, mesh: Mesh) -> NamedSharding:
    """Of an array that is no matrix of the model's: whole, or over fsdp where it is big."""
    shape, size = tuple(x.shape), mesh.shape.get("fsdp", 1)
    spec: list[Any] = [None] * len(shape)
    if size > 1 and math.prod(shape[lead:]) >= BIG:
        free = [i for i in range(lead, len(shape)) if shape[i] % size == 0]
        if not free:
            raise _indivisible(where, shape[lead:], "fsdp", mesh)
        spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))


def _indivisible(where: str, shape: tuple[int, ...], axis: str, mesh: Mesh) -> ValueError:
    sizes = " x ".join(map(str, shape))
    return ValueError(
        f"{where} is {sizes}, and the mesh's axis {axis!r} of {mesh.shape[axis]} divides none of these: choose a size "
        "that does, or place this array by shardings of your own"
    )


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh's axes of an entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(axes: tuple[str, ...]) -> Any:
    return axes[0] if len(axes) == 1 else axes or None
