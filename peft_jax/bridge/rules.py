"""What a function may do with a typed leaf: multiply by it, look rows up in it, and rearrange or slice what it holds.

A rule maps ``(equation, values)`` to the equation's results; a value is an array, or a `Followed` leaf.  It raises
`NotFollowed` on a use that it does not know.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode
from jaxtyping import Array

from peft_jax import trees
from peft_jax.bridge.follow import Axis, Followed, NotFollowed, in_order, reordered, reshape, sizes, transpose
from peft_jax.weights import Leaf, embed, linear, unembed

Rule = Callable[[Any, list[Any]], list[Any]]


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """An equation as it is, of arrays."""
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


# -- rearranging: the leaf stays ---------------------------------------------------------------------------------------


def _same(eqn: Any, values: list[Any]) -> list[Any]:
    return [values[0]]


def _each_array(eqn: Any, values: list[Any]) -> list[Any]:
    leaf = jax.tree.map(lambda x: bind(eqn, [x])[0], values[0].leaf)
    return [values[0].to(values[0].dims, leaf=leaf)]


def _transpose(eqn: Any, values: list[Any]) -> list[Any]:
    return [values[0].transposed(eqn.params["permutation"])]


def _squeeze(eqn: Any, values: list[Any]) -> list[Any]:
    return [values[0].squeezed(eqn.params["dimensions"])]


def _reshape(eqn: Any, values: list[Any]) -> list[Any]:
    return [values[0].reshaped(eqn.params["new_sizes"])]


def _broadcast(eqn: Any, values: list[Any]) -> list[Any]:
    return [values[0].expanded(eqn.params["shape"], [int(i) for i in eqn.params["broadcast_dimensions"]])]


def _convert(eqn: Any, values: list[Any]) -> list[Any]:
    dtype = jnp.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        raise NotFollowed(f"its numbers are made {dtype.name}, as an index or a mask would be")
    return [values[0].to(values[0].dims, dtype=dtype)]


REARRANGING: dict[str, Rule] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "sharding_constraint": _same,  # of a kernel that does not exist: the leaf's arrays have shardings of their own
    "pvary": _each_array,
    "pcast": _each_array,
}


# -- using -------------------------------------------------------------------------------------------------------------


def dot_general(eqn: Any, values: list[Any]) -> list[Any]:
    """A product with a leaf: `linear`, or `unembed` where the outputs are summed over; batched over layers."""
    if isinstance(values[0], Followed) and isinstance(values[1], Followed):
        raise NotFollowed(f"it is multiplied by another adapted leaf, {values[1].path}")
    side = 0 if isinstance(values[0], Followed) else 1
    kernel, x = values[side], values[1 - side]
    contracted, batched = eqn.params["dimension_numbers"]
    (summed, x_summed), (shared, x_shared) = [(pair[side], pair[1 - side]) for pair in (contracted, batched)]
    free = [i for i in range(len(kernel.dims)) if i not in summed and i not in shared]
    x_free = [i for i in range(x.ndim) if i not in x_summed and i not in x_shared]
    if eqn.params.get("out_sharding") is not None:
        raise NotFollowed("the product names an explicit sharding: use a mesh of Auto axes")

    axes = [axis for i in summed for axis in kernel.dims[i]]
    left = [axis for i in free for axis in kernel.dims[i]]
    layers = [axis for i in shared for axis in kernel.dims[i]]
    kinds, others = {axis.kind for axis in axes}, {axis.kind for axis in left}
    if kinds <= {"in"} and others <= {"out"}:
        rule = linear
    elif kinds <= {"out"} and others <= {"in"}:
        rule = unembed
    else:
        raise NotFollowed(f"the product sums over {_named(axes)} and keeps {_named(left)}")
    if {axis.kind for axis in layers} - {"layers"}:
        raise NotFollowed(f"the product runs over {_named(layers)} side by side")

    # x as [*layers, *free, in], all in the leaf's own order
    by_layer = [x_shared[layers.index(axis)] for axis in in_order(layers)] if layers else []
    if len(by_layer) != len(x_shared):
        raise NotFollowed("several layers are one dimension of a product")
    x = transpose(x, (*by_layer, *x_free, *x_summed))
    x = reordered(x, len(x_summed), axes, in_order(axes))
    x = reshape(x, (*x.shape[: len(by_layer) + len(x_free)], math.prod(axis.size for axis in axes)))
    out = eqn.outvars[0].aval.dtype
    with _precision(eqn.params["precision"]):
        # In the dtype of the result where that is wider: what a product of bf16 summed in fp32 asks for.
        y = _each_layer(rule, x.astype(np.promote_types(x.dtype, out)), kernel.leaf, len(by_layer))
    y = reordered(y, 1, in_order(left), left)
    y = reshape(y, (*y.shape[: len(by_layer) + len(x_free)], *sizes([kernel.dims[i] for i in free])))

    # [*layers, *x's, *kernel's] as [*batch, *left's, *right's]
    count = len(by_layer)
    batch = [by_layer.index(i) for i in x_shared]
    mine = [count + len(x_free) + i for i in range(len(free))]
    its = [count + i for i in range(len(x_free))]
    return [transpose(y, (*batch, *(mine + its if side == 0 else its + mine))).astype(out)]


def _named(axes: Sequence[Axis]) -> str:
    return " and ".join(sorted({{"in": "inputs", "out": "outputs"}.get(a.kind, a.kind) for a in axes})) or "nothing"


def _each_layer(rule: Callable[..., Array], x: Array, leaf: Leaf, layers: int) -> Array:
    if layers == 0:
        return rule(x, leaf)
    sliced, shared = trees.unshare(leaf)
    return jax.vmap(lambda x, w: _each_layer(rule, x, trees.fill(w, shared), layers - 1))(x, sliced)


def _precision(asked: Any) -> contextlib.AbstractContextManager[Any]:
    """The precision that a product asks for, for the products within."""
    if asked is None:
        return contextlib.nullcontext()
    highest = max(asked, key=lambda p: p.value) if isinstance(asked, tuple) else asked
    return jax.default_matmul_precision(
        highest.name.lower() if isinstance(highest, jax.lax.Precision) else highest.name
    )


def gather(eqn: Any, values: list[Any]) -> list[Any]:
    """Rows looked up: `embed`."""
    table, places = values
    if isinstance(places, Followed):
        raise NotFollowed("it is used as an index")
    numbers, widths, mode = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.params["mode"]
    cut = [i for i, size in enumerate(widths) if size != table.shape[i]]
    filled = mode == GatherScatterMode.FILL_OR_DROP
    if numbers.operand_batching_dims or len(cut) > 1 or (filled and len(numbers.start_index_map) > 1):
        raise NotFollowed("it is indexed along several of its axes")
    if filled and not (eqn.params["fill_value"] is None or np.isnan(eqn.params["fill_value"])):
        raise NotFollowed("rows beyond its end are given a value other than NaN")
    if not cut:
        raise NotFollowed("it is indexed as a whole")
    (row,) = cut
    places = places[..., numbers.start_index_map.index(row)]
    end = table.shape[row]
    places = jnp.where(places < 0, end, places) if filled else jnp.clip(places, 0, end - 1)
    rows = look_up(table, row, widths[row], places)
    if row in numbers.collapsed_slice_dims:
        rows = jnp.squeeze(rows, places.ndim + row)
    batch = [i for i in range(rows.ndim) if i not in numbers.offset_dims]
    back = [0] * rows.ndim
    for i, to in enumerate((*batch, *numbers.offset_dims)):
        back[to] = i
    return [transpose(rows, back)]


def look_up(table: Followed, row: int, width: int, places: Array) -> Array:
    """``[*places, *table's dimensions]``, that of rows being 1."""
    left = [axis for i, dim in enumerate(table.dims) if i != row for axis in dim]
    rows = list(table.dims[row])
    if width != 1 or {a.kind for a in rows} != {"in"} or {a.kind for a in left} - {"out"} or rows != in_order(rows):
        raise NotFollowed("what is looked up are no rows of its inputs")
    found = embed(places, table.leaf).astype(table.dtype)
    dims = [() if i == row else dim for i, dim in enumerate(table.dims)]
    return reshape(reordered(found, 1, in_order(left), left), (*places.shape, *sizes(dims)))


def dynamic_slice(eqn: Any, values: list[Any]) -> list[Any]:
    """One layer, or one row."""
    kernel, *starts = values
    if any(isinstance(start, Followed) for start in starts):
        raise NotFollowed("it is used as an index")
    cut = [i for i, size in enumerate(eqn.params["slice_sizes"]) if size != kernel.shape[i]]
    if len(cut) != 1 or eqn.params["slice_sizes"][cut[0]] != 1:
        raise NotFollowed("a part of it is cut out")
    (at,) = cut
    if len(kernel.dims[at]) == 1 and kernel.dims[at][0].kind == "layers":
        index = starts[at]
        return [
            kernel.layer(kernel.dims[at][0], lambda x, i: jax.lax.dynamic_index_in_dim(x, index, i, keepdims=False))
        ]
    return [look_up(kernel, at, 1, jnp.clip(starts[at], 0, kernel.shape[at] - 1))]


def static_slice(eqn: Any, values: list[Any]) -> list[Any]:
    """One layer, or one row, of a known number."""
    (kernel,), begin, end = values, eqn.params["start_indices"], eqn.params["limit_indices"]
    cut = [i for i, size in enumerate(kernel.shape) if end[i] - begin[i] != size]
    if len(cut) != 1 or end[cut[0]] - begin[cut[0]] != 1:
        raise NotFollowed("a part of it is cut out")
    (at,) = cut
    if len(kernel.dims[at]) == 1 and kernel.dims[at][0].kind == "layers":
        return [kernel.layer(kernel.dims[at][0], lambda x, i: jax.lax.index_in_dim(x, begin[at], i, keepdims=False))]
    return [look_up(kernel, at, 1, jnp.int32(begin[at]))]


USING: dict[str, Rule] = {
    "dot_general": dot_general,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "slice": static_slice,
}

REFUSED = {
    "new_ref": "it is put into a mutable reference",
    "ref": "it is put into a mutable reference",
    "swap": "it is written into a mutable reference",
    "addupdate": "it is added to a mutable reference",
    "masked_swap": "it is written into a mutable reference",
    "scatter": "it is written to, or used as an index",
    "scatter-add": "it is written to, or used as an index",
    "dynamic_update_slice": "it is written to",
}
