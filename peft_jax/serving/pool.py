"""One array for everything that comes and goes: the keys and values of all requests, and the adapters that they use.

    rows [layers, R, width]        width = kv_heads · head_dim

A row is one token's keys, or its values, in every layer; or a part of an adapter's matrices, in every layer.  A matrix
of r directions, ``A [r, in]`` or ``B [r, out]`` with the scale taken into B, lies flat in ⌈r · in / width⌉ rows: r of
them where the matrix is as wide as a row, as in the paper, and no more than it needs where it is not (grouped queries,
feed-forward layers).  Which rows is a table of numbers, so any free rows will do.  Row 0 is zeros, belongs to nobody,
and is what every table is filled up with.

Inside a call the array is only read.  The new tokens' keys and values are gathered layer by layer in an array of their
own (`Paged`), and written behind the last layer, all at once and in place where the array is donated (`commit`).

Source: section 4 (unified paging).  Departures: the paper's rows are as wide as the model and its matrices are those of
attention, without grouped queries.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from peft_jax import sharding, trees
from peft_jax.attention import Visible
from peft_jax.core import Forward, Inputs, Params, Path, Spec
from peft_jax.sequence import Sequence
from peft_jax.serving import kernels, tensor
from peft_jax.serving.stored import dtype_of, kept_in, stored
from peft_jax.weights import Weight, linear, materialise, static

NAME = "pool"


class Target(NamedTuple):
    """A matrix that adapters may act on, in every layer."""

    path: Path
    inputs: int
    outputs: int
    devices: int = 1
    """Over which it is split: on its outputs, or on its inputs if it `ends` a block."""
    ends: bool = False

    def rows(self, rank: int, width: int) -> tuple[int, int]:
        """How many rows hold A, and B."""
        mine, share = -(-rank // self.devices), width // self.devices
        a = rank * (self.inputs // self.devices) if self.ends else mine * self.inputs
        b = (rank if self.ends else mine * self.devices) * -(-self.outputs // self.devices)
        return -(-a // share), -(-b // share)


def width_of(spec: Spec) -> int:
    return spec.kv_heads * spec.head_dim


def empty(spec: Spec, rows: int, dtype: Any, mesh: Mesh | None = None) -> Shaped[Array, "layers rows width"]:
    where = None if mesh is None else NamedSharding(mesh, tensor.ROWS)
    return jnp.zeros((spec.layers, rows, width_of(spec)), kept_in(dtype), device=where)


def write(
    rows: Shaped[Array, "layers rows width"], ids: Int[Array, "n"], block: Float[Array, "layers n width"]
) -> Shaped[Array, "layers rows width"]:
    """The array with a block in these rows; ids beyond the last are left out."""

    def own(rows: Array, ids: Array, block: Array) -> Array:
        return rows.at[:, ids].set(stored(block, rows), mode="drop")

    return tensor.each_device(own, rows, (tensor.ROWS, P(), tensor.ROWS), tensor.ROWS)(rows, ids, block)


# -- adapters ---------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pooled(Weight):
    """``base`` plus, for each row of the batch, the product of low rank that its table names.

    layer   int32 ``[*layers]``, where the leaf lies in the pool
    ends    whether a mesh splits the base on its inputs
    a_rows, b_rows   int32 ``[*layers, batch, n]``, there during a call only, as is `rows`, the pool; `rank` is then how
            many directions the tables have room for
    """

    shares = ("rows",)

    base: Any
    layer: Any
    a_rows: Any = None
    b_rows: Any = None
    rows: Any = None
    rank: int = static(default=0)
    ends: bool = static(default=False)
    name: str = static(default=NAME)

    def materialise(self) -> Array:
        return materialise(self.base)

    def linear(self, x: Array) -> Array:
        if self.a_rows is None or not self.rank:
            return linear(x, self.base)
        tables = (self.rows, self.layer, self.a_rows, self.b_rows, self.rank)
        mesh, outputs = tensor.mesh_of(self.rows), self.shape[-1]
        each = x.reshape(len(self.a_rows), -1, x.shape[-1])  # the tokens of a row of the batch follow one another
        if mesh is None:
            added = kernels.lowrank(each, *tables, outputs)
        elif self.ends:
            return tensor.split_inputs(each, self.base, *tables, mesh).reshape(*x.shape[:-1], outputs)
        else:
            added = tensor.split_outputs(each, *tables, outputs, mesh)
        return linear(x, self.base) + added.reshape(*x.shape[:-1], outputs)


def adapt(params: Params, targets: tuple[Target, ...], layers: int) -> Params:
    """The base's tree with a `Pooled` leaf at each target."""
    ends = {target.path: target.ends for target in targets}

    def each(path: Path, leaf: Any) -> Any:
        return Pooled(leaf, jnp.arange(layers, dtype=jnp.int32), ends=ends[path]) if path in ends else leaf

    return trees.map_leaves(each, params)


def given(params: Params, rows: Array, tables: Mapping[Path, tuple[Array, Array]], rank: int) -> Params:
    """The tree for one call: each leaf with the pool, and with the tables ``[batch, n]`` of the batch's rows."""

    def each(path: Path, w: Any) -> Any:
        # Every layer has the same table, at its own place in the pool.
        a, b = (jnp.broadcast_to(ids[None], (len(w.layer), *ids.shape)) for ids in tables[path])
        return dataclasses.replace(w, a_rows=a, b_rows=b, rank=rank)

    params = trees.rewrite(params, NAME, each) if rank else params
    return trees.share(params | {"methods": {**params.get("methods", {}), NAME: {"rows": rows}}})


def targets_of(forward: Forward, params: Params, mesh: Mesh | None = None) -> tuple[Target, ...]:
    """Every matrix of the layers that an adapter may act on; experts, which meet tokens of many rows, are none.

    Raises:
        ValueError: if there is none, or the mesh splits one neither on its inputs nor on its outputs.
    """
    spec, found = forward.spec, list[Target]()
    for path, leaf in trees.leaves(params).items():
        if path[-1] == "kernel" and spec.stacked(path) and not spec.experts(path):
            split = None if mesh is None else sharding.matrix_sharding(path, leaf, mesh)
            target = Target(path, *leaf.shape[-2:])
            found.append(target if split is None else _over(target, split))
    if not found:
        raise ValueError("this model has no stacked matrices to adapt: load it with scan=True, as models.load does")
    return tuple(found)


def _over(target: Target, split: NamedSharding) -> Target:
    """A matrix on the devices that split it."""
    devices = split.mesh.shape[tensor.AXIS]
    if devices > 1 and tensor.AXIS not in split.spec:
        raise ValueError(
            f"{'/'.join(target.path)} is {target.inputs} x {target.outputs}, and the mesh's axis {tensor.AXIS!r} of "
            f"{devices} divides neither: choose a size that does"
        )
    return target._replace(devices=devices, ends=devices > 1 and split.spec[0] == tensor.AXIS)


class Tables(NamedTuple):
    """How the rows of one adapter's matrices follow one another in one array of numbers, with room for `rank`
    directions at every target."""

    targets: tuple[Target, ...]
    width: int
    rank: int

    @property
    def size(self) -> int:
        return sum(sum(t.rows(self.rank, self.width)) for t in self.targets)

    def fill(self, ids: Mapping[Path, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """One adapter's table; row 0 where it has none."""
        none = np.zeros(0, np.int32)
        parts = [
            np.pad(x, (0, n - len(x)))
            for t in self.targets
            for x, n in zip(ids.get(t.path, (none, none)), t.rows(self.rank, self.width), strict=True)
        ]
        return np.concatenate(parts).astype(np.int32)

    def split(self, table: Int[Array, "batch size"]) -> dict[Path, tuple[Array, Array]]:
        sizes = [n for t in self.targets for n in t.rows(self.rank, self.width)]
        parts = iter(jnp.split(table, np.cumsum(sizes)[:-1].tolist(), axis=1))
        return {t.path: (next(parts), next(parts)) for t in self.targets}


# -- keys and values --------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Paged:
    """A key-value cache whose rows lie in the pool: what a call reads there, and what it will have to write.

    rows         the pool
    context      int32 ``[batch, earlier, 2]``: where the keys and values of earlier tokens lie; 0 behind the last
    past, new    int32 ``[batch]``: how many earlier tokens there are, and how many of the call's are real
    keys, values ``[layers, batch, time, kv_heads, dim]``: those of the call's tokens
    """

    rows: Any
    context: Any
    past: Any
    new: Any
    keys: Any
    values: Any

    @classmethod
    def start(cls, spec: Spec, rows: Array, context: Array, past: Array, new: Array, time: int) -> "Paged":
        fresh = jnp.zeros((spec.layers, len(past), time, spec.kv_heads, spec.head_dim), dtype_of(rows))
        fresh = tensor.placed(fresh, tensor.mesh_of(rows), P(None, None, None, tensor.AXIS))
        return cls(rows, context, past, new, fresh, fresh)

    def arrange(self, inputs: Inputs, x: Array) -> Sequence:
        """The call's tokens behind the earlier ones, whose positions are their places in the table."""
        time, context = x.shape[1], self.context.shape[1]
        steps, slots = (jnp.arange(n, dtype=jnp.int32)[None] for n in (time, context))
        positions = self.past[:, None] + steps
        real = (steps < self.new[:, None]).astype(jnp.int32)
        before = (slots < self.past[:, None]).astype(jnp.int32)
        keys = jnp.concatenate([jnp.broadcast_to(slots, (len(x), context)), positions], 1)
        visible = Visible(positions, keys, real, jnp.concatenate([before, real], 1))
        return Sequence(x, positions, keys, visible, None, self, (0, 0))

    def attend(
        self,
        attend: Callable[..., Array],
        layer: Array,
        query: Array,
        key: Array,
        value: Array,
        visible: Visible,
        scale: float,
    ) -> tuple[Array, "Paged"]:
        """Attention over the earlier tokens and the call's own."""
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (layer, 0, 0, 0, 0))  # noqa: E731
        cache = dataclasses.replace(self, keys=put(self.keys, key), values=put(self.values, value))
        # As they will be read from the pool by later calls, to the bit.
        key, value = (x.astype(dtype_of(self.rows)).astype(query.dtype) for x in (key, value))
        if visible.bias is not None:
            raise ValueError("attention over the pool knows no bias on scores")

        def own(
            q: Array,
            k: Array,
            v: Array,
            rows: Array,
            layer: Array,
            earlier: Array,
            past: Array,
            new: Array,
            window: Any,
        ) -> Array:
            tables = earlier[..., 0], earlier[..., 1]
            return kernels.paged_attention(q, k, v, rows, layer, *tables, past, new, scale, window, visible.cap)

        heads = tensor.HEADS
        over = tensor.each_device(own, self.rows, (heads, heads, heads, tensor.ROWS, *[P()] * 5), heads)
        return over(query, key, value, self.rows, layer, self.context, self.past, self.new, visible.window), cache

    def advance(self, rows: int) -> "Paged":
        return self

    def commit(self, ids: Int[Array, "batch time 2"]) -> Shaped[Array, "layers rows width"]:
        """The pool with the call's keys and values in these rows; ids beyond the last are left out."""
        layers, _, width = self.rows.shape
        block = jnp.concatenate([x.reshape(layers, -1, width) for x in (self.keys, self.values)], 1)
        return write(self.rows, jnp.moveaxis(ids, 2, 0).reshape(-1), block)
