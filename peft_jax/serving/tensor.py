"""Serving on several devices: each has some heads and hidden units of the base, and its columns of the pool.

    rows [layers, R, width]     device d of N has the columns d · width/N … (d+1) · width/N of every row

Those columns hold what the device needs and nothing else: of keys and values its own heads, of an adapter's matrices
its own part (`peft_jax.serving.packing` lays them so).  So no device reads another's columns, and an adapter goes to
the devices in pieces.  What they exchange is the products with A, r numbers a token:

    y = x W, W split on its outputs (queries, keys, values, gates)
        A split on its directions, all-gather of x Aᵀ, B split on its outputs: y is split as W's is
    y = x W, W split on its inputs (what ends a block)
        A split on its inputs, all-reduce of x Aᵀ, B split on its outputs: each device adds its outputs to its partial
        sum of the base, before the all-reduce that the base needs anyway

Direction i of an A that is split on them is the one of device ``i mod N``, its ``i // N``-th, so that a table with room
for more directions changes none; ranks that N does not divide are filled up with zeros.

Attention reads the pool by the kernels that one device has, over its own heads; these products are plain JAX.

Source: section 6 (tensor parallelism).  Departures: that section counts attention; feed-forward layers are the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from peft_jax import sharding
from peft_jax.core import Params, Spec
from peft_jax.quant.frozen import Frozen, gathered, tied
from peft_jax.serving.kernels.xla import common, matrices, product
from peft_jax.weights import Leaf, linear, materialise

AXIS = "tensor"
ROWS = P(None, None, AXIS)  # of the pool, and of blocks of it
HEADS = P(None, None, AXIS)  # [batch, time, heads, dim]


def check(spec: Spec, params: Params, mesh: Mesh | None) -> None:
    """Refuses a mesh over which this model cannot be served.

    Raises:
        ValueError: if it has no axis ``tensor``, or others of more than one device, or does not divide the heads; if
            there is none, and the model lies on several devices.
    """
    if mesh is None:
        spread = max(
            (len(x.sharding.device_set) for x in jax.tree.leaves(params) if isinstance(x, jax.Array)), default=1
        )
        if spread > 1:
            raise ValueError(f"the model lies on {spread} devices: give the mesh that it was loaded with, as mesh=")
        return
    if AXIS not in mesh.shape:
        raise ValueError(f"the mesh has the axes {', '.join(mesh.axis_names)}: serving needs one called {AXIS!r}")
    for axis, size in mesh.shape.items():
        if axis != AXIS and size > 1:
            raise ValueError(
                f"the mesh's axis {axis!r} has {size} devices: serving splits over {AXIS!r} alone, so give it size 1"
            )
    if spec.kv_heads % mesh.shape[AXIS]:
        raise ValueError(
            f"the model's {spec.kv_heads} key heads (for {spec.heads} heads) do not divide over the {mesh.shape[AXIS]} "
            f"devices of the mesh's axis {AXIS!r}: choose a number that divides them"
        )


def mesh_of(rows: Array) -> AbstractMesh | None:
    """The mesh that the pool is split over; None on one device."""
    mesh = sharding.mesh_of(rows)
    return None if mesh is None or mesh.shape.get(AXIS, 1) == 1 else mesh


def placed(x: Array, mesh: Mesh | AbstractMesh | None, spec: P) -> Array:
    """The same array, split so inside a traced program."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def each_device(own: Callable[..., Any], rows: Array, specs: tuple[P, ...], out: P) -> Callable[..., Any]:
    """`own` on every device, over its parts; where the pool lies on one, `own` itself."""
    mesh = mesh_of(rows)
    return own if mesh is None else jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


# -- products of low rank ---------------------------------------------------------------------------------------------


def shrink(
    x: Float[Array, "batch time inputs"],
    rows: Shaped[Array, "layers rows width"],
    layer: Int[Array, ""],
    ids: Int[Array, "batch n"],
    rank: int,
) -> Float[Array, "batch time rank"]:
    """``x[i] A_iᵀ``."""
    a, dtype = matrices(rows, layer, ids, rank, x.shape[-1]), common(x, rows)
    return product("bti,bri->btr", x.astype(dtype), a.astype(dtype)).astype(x.dtype)


def expand(
    inner: Float[Array, "batch time rank"],
    rows: Shaped[Array, "layers rows width"],
    layer: Int[Array, ""],
    ids: Int[Array, "batch n"],
    outputs: int,
) -> Float[Array, "batch time outputs"]:
    """``inner[i] B_i``."""
    b, dtype = matrices(rows, layer, ids, inner.shape[-1], outputs), common(inner, rows)
    return product("btr,bro->bto", inner.astype(dtype), b.astype(dtype)).astype(inner.dtype)


def split_outputs(
    x: Float[Array, "batch time inputs"],
    rows: Shaped[Array, "layers rows width"],
    layer: Int[Array, ""],
    a_rows: Int[Array, "batch m"],
    b_rows: Int[Array, "batch n"],
    rank: int,
    outputs: int,
    mesh: AbstractMesh,
) -> Float[Array, "batch time outputs"]:
    """``x[i] A_iᵀ B_i`` beside a base that is split on its outputs, split as its product is."""
    devices = mesh.shape[AXIS]

    def own(x: Array, rows: Array, layer: Array, a_rows: Array, b_rows: Array) -> Array:
        mine = shrink(x, rows, layer, a_rows, -(-rank // devices))
        inner = jax.lax.all_gather(mine, AXIS, axis=3)  # [batch, time, directions of a device, devices]
        return expand(inner.reshape(*inner.shape[:2], -1), rows, layer, b_rows, outputs // devices)

    return each_device(own, rows, (P(), ROWS, P(), P(), P()), P(None, None, AXIS))(x, rows, layer, a_rows, b_rows)


def split_inputs(
    x: Float[Array, "batch time inputs"],
    base: Leaf,
    rows: Shaped[Array, "layers rows width"],
    layer: Int[Array, ""],
    a_rows: Int[Array, "batch m"],
    b_rows: Int[Array, "batch n"],
    rank: int,
    mesh: AbstractMesh,
) -> Float[Array, "batch time outputs"]:
    """``x[i] (W + A_iᵀ B_i)``, of a base that is split on its inputs, summed over the devices once."""

    def own(x: Array, w: Array, rows: Array, layer: Array, a_rows: Array, b_rows: Array) -> Array:
        inner = jax.lax.psum(shrink(x, rows, layer, a_rows, rank), AXIS)
        y, each = linear(x, w), -(-w.shape[1] // mesh.shape[AXIS])
        mine = expand(inner, rows, layer, b_rows, each)
        y = jnp.pad(y, ((0, 0), (0, 0), (0, -w.shape[1] % mesh.shape[AXIS])))
        start = (0, 0, jax.lax.axis_index(AXIS) * each)
        y = jax.lax.dynamic_update_slice(y, jax.lax.dynamic_slice(y, start, mine.shape) + mine, start)
        return jax.lax.psum(y[..., : w.shape[1]], AXIS)

    # A leaf in few bits has its numbers made outside, where it knows how its codes are split.
    w = tied(gathered(base), x).dequantise() if isinstance(base, Frozen) else materialise(base)
    specs = (P(None, None, AXIS), P(AXIS, None), ROWS, P(), P(), P())
    return each_device(own, rows, specs, P())(x, w, rows, layer, a_rows, b_rows)
