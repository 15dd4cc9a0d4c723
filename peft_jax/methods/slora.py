"""S-LoRA: many adapters on one base, each row of a batch under its own (Sheng et al. 2023, arXiv 2311.03285).

    y[i] = x[i] W + ((x[i] A_i) ⊙ s_i) B_i          i a row of the batch; s_i = α/r, a number a direction

x[i] W is one product for the whole batch; A_i ``[in, r]`` and B_i ``[r, out]`` are gathered, once a row and never a
token, from all adapters' directions, which lie one after another without padding.  So a call costs what the adapters
of its batch cost, however many there are.  What can be written so has a place here: LoRA of any ranks, with rsLoRA's
scales; DyLoRA at its rank in use; AdaLoRA, whose s_i has λ in it; VeRA, whose s_i has d in it, whose random directions
lie there once for all, and whose product is multiplied by b ``[out]`` at the end.

Source: sections 3 to 5 (batching what adapters add apart from the base; heterogeneous batching).

Departures: the paper serves; here gradients pass too, to the adapters that a batch uses, exact zeros to others.  The
unified pool of adapters and keys and values, and kernels that skip a small rank's padding, are a serving engine's: here
a row computes at the largest rank registered.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Path, Ports
from peft_jax.methods.directions import NOTHING, Directions, check, directions, is_adapter, lay, pairs
from peft_jax.methods.lora import LoRA
from peft_jax.methods.vera import VeRA
from peft_jax.weights import Leaf, Weight, embed, innermost, linear, materialise, static, unembed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Adapters(Weight):
    """``base`` under one of n adapters, or under another a row.

    a          ``[*layers, D, in]``, b ``[*layers, D, out]``: the directions of all adapters; None without any
    index      int32 ``[*layers, n, R]``: where each adapter's directions lie; what is beyond its rank is `NOTHING`
    scale      ``[*layers, n, R]``
    active     int32 ``[*layers]``: the adapter in use, −1 for none.  None in a call whose rows each use their own:
               n is then the batch, and adapters are its rows'
    d          ``[*layers, F]``: factors that train (AdaLoRA's λ, VeRA's d), where `d_index` ``[*layers, n, R]`` points
    out        ``[*layers, m, out]``: VeRA's b, where `out_index` ``[*layers, n]`` points
    names      of the adapters
    trained    how many numbers train, without what pads a layer whose adapters have fewer directions
    """

    trains = ("a", "b", "d", "out")

    base: Any
    a: Any
    b: Any
    index: Any
    scale: Any
    active: Any
    d: Any = None
    d_index: Any = None
    out: Any = None
    out_index: Any = None
    names: tuple[str, ...] = static(default=())
    trained: int = static(default=0)
    name: str = static(default="slora")

    def axes(self) -> dict[str, Any]:
        along = {"a": (None, "in"), "b": (None, "out"), "out": (None, "out")}
        return {field: axes for field, axes in along.items() if getattr(self, field) is not None}

    def trained_size(self) -> int:
        return 0 if all(getattr(self, field) is None for field in self.trains) else self.trained

    # -- which adapters ----------------------------------------------------------------------------------------------

    def of_rows(self, rows: Array) -> "Adapters":
        """The leaf of a call whose batch's rows use these adapters."""
        return self._at(rows, self.active.ndim)

    def _at(self, which: Array, axis: int) -> "Adapters":
        """These adapters, along `axis`, in place of all; −1 is the base, and one beyond the last gives NaN, which the
        training guard reports, not another adapter."""
        none = which < 0
        place = jnp.where(none, NOTHING, which)

        def take(x: Any, fill: Any) -> Any:
            return None if x is None else jnp.take(x, place, axis=axis, mode="fill", fill_value=fill)

        scale = take(self.scale, np.nan)
        scale = jnp.where(none.reshape((1,) * axis + (*which.shape, 1)), jnp.zeros((), scale.dtype), scale)
        index, d_index, out_index = (take(x, NOTHING) for x in (self.index, self.d_index, self.out_index))
        return dataclasses.replace(self, index=index, scale=scale, d_index=d_index, out_index=out_index, active=None)

    def _chosen(self, x: Array | None = None) -> "tuple[Adapters, str]":
        """The adapter in use, or those of the rows of `x`; and how einsum calls the rows."""
        if self.active is not None:
            return self._at(self.active, 0), ""
        if x is None:
            raise ValueError(f"each row uses an adapter of its own among {len(self.names)}: choose one (adapters.use)")
        if len(self.index) != len(x):
            raise ValueError(f"ports.adapter names {len(self.index)} rows and the batch has {len(x)}")
        return self, "n"

    # -- what they are -----------------------------------------------------------------------------------------------

    def _directions(self, field: str) -> Array:
        """A or B, ``[*rows, R, in or out]``."""
        # Filled with zeros, not multiplied by them: NaN in another adapter's directions stays there.
        return jnp.take(getattr(self, field), self.index, axis=0, mode="fill", fill_value=0)

    def _elements(self, field: str, index: Array, ids: Array) -> Array:
        """Elements of directions; ids beyond the table are the base's to report."""
        return getattr(self, field).at[index, ids].get(mode="fill", fill_value=0)

    def _factor(self) -> Array:
        if self.d is None:
            return self.scale
        return self.scale * jnp.take(self.d, self.d_index, axis=0, mode="fill", fill_value=1).astype(self.scale.dtype)

    def _out(self) -> Array | None:
        return None if self.out is None else jnp.take(self.out, self.out_index, axis=0, mode="fill", fill_value=1)

    # -- the rules ---------------------------------------------------------------------------------------------------

    def linear(self, x: Array) -> Array:
        w, n = self._chosen(x)
        inner = jnp.einsum(f"{n}...i,{n}ri->{n}...r", x, w._directions("a").astype(x.dtype))
        return linear(x, self.base) + w._outer(inner, n)

    def embed(self, ids: Array) -> Array:
        w, n = self._chosen(ids)
        rows, index = embed(ids, self.base), w.index
        index = index.reshape(*index.shape[:-1], *(1,) * (ids.ndim - len(n)), index.shape[-1])
        return rows + w._outer(w._elements("a", index, ids[..., None]).astype(rows.dtype), n)

    def _outer(self, inner: Array, n: str) -> Array:
        inner = jnp.einsum(f"{n}...r,{n}r->{n}...r", inner, self._factor().astype(inner.dtype))
        y = jnp.einsum(f"{n}...r,{n}ro->{n}...o", inner, self._directions("b").astype(inner.dtype))
        out = self._out()
        return y if out is None else jnp.einsum(f"{n}...o,{n}o->{n}...o", y, out.astype(y.dtype))

    def unembed(self, x: Array) -> Array:
        w, n = self._chosen(x)
        y, out = x, w._out()
        if out is not None:
            y = jnp.einsum(f"{n}...o,{n}o->{n}...o", y, out.astype(y.dtype))
        inner = jnp.einsum(f"{n}...o,{n}ro->{n}...r", y, w._directions("b").astype(y.dtype))
        inner = jnp.einsum(f"{n}...r,{n}r->{n}...r", inner, w._factor().astype(y.dtype))
        return unembed(x, self.base) + jnp.einsum(f"{n}...r,{n}ri->{n}...i", inner, w._directions("a").astype(y.dtype))

    def materialise(self) -> Array:
        if self.active is None:
            self._chosen()
        base = materialise(self.base)
        wide = np.promote_types(base.dtype, np.float32)
        sliced, shared = trees.unshare(dataclasses.replace(self, base=None))

        def change(one: Adapters) -> Array:
            matrix = jax.ShapeDtypeStruct(self.shape[-2:], wide)
            w, _ = dataclasses.replace(trees.fill(one, shared), base=matrix)._chosen()
            a, b = (w._directions(field).astype(wide) for field in ("a", "b"))
            product = jnp.einsum("ri,r,ro->io", a, w._factor().astype(wide), b)
            out = w._out()
            return product if out is None else product * out.astype(wide)[None]

        for _ in range(self.active.ndim):  # stacked layers
            change = jax.vmap(change)
        return (base.astype(wide) + change(sliced)).astype(base.dtype)

    def alone(self, adapter: int) -> LoRA:
        """The LoRA leaf that one adapter was, on the host; its arrays in the dtype of all.

        Raises:
            ValueError: if it was another kind of leaf.
        """
        lead = self.active.ndim
        index, scale = (np.asarray(x).take(adapter, lead) for x in (self.index, self.scale))
        factors = [np.asarray(x).take(adapter, lead) for x in (self.d_index, self.out_index) if x is not None]
        if any((x != NOTHING).any() for x in factors) or (index < 0).any():
            raise ValueError(f"adapter {self.names[adapter]!r} was AdaLoRA or VeRA: save the tree that was stacked")
        used = index != NOTHING
        rank = max(1, used.sum(-1).max())
        index, used = index[..., :rank], used[..., :rank]
        a, b = (
            np.where(used[..., None], np.take_along_axis(np.asarray(x), np.where(used, index, 0)[..., None], lead), 0)
            for x in (self.a, self.b)
        )
        ranks = tuple(used.sum(-1).reshape(-1).tolist())
        scale = np.where(used[..., 0], scale[..., 0], 0)
        return LoRA(self.base, a.swapaxes(-1, -2), b, scale, ranks=ranks, name=self.names[adapter])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SharingAdapters(Adapters):
    """Adapters of which some are VeRA's: a negative `index` −1 − k points at the k-th of the random directions, down
    ``[S, in or more]`` and up ``[S, out or more]``, which all layers share, and which are there during a call only."""

    shares = ("down", "up")

    down: Any = None
    up: Any = None

    def _shared(self, field: str) -> Array:
        found = self.down if field == "a" else self.up
        if found is None:
            raise ValueError(f"a leaf of {self.name} lacks what layers share: call the method's own forward")
        return found[:, : self.shape[-2 if field == "a" else -1]]

    def _directions(self, field: str) -> Array:
        own, shared = _split(self.index)
        found = jnp.take(self._shared(field), shared, axis=0, mode="fill", fill_value=0)
        if self.a is None:
            return found
        w = dataclasses.replace(self, index=own)
        mine = Adapters._directions(w, field)
        wide = np.promote_types(mine.dtype, found.dtype)
        return mine.astype(wide) + found.astype(wide)

    def _elements(self, field: str, index: Array, ids: Array) -> Array:
        own, shared = _split(index)
        found = self._shared(field).at[shared, ids].get(mode="fill", fill_value=0)
        if self.a is None:
            return found
        mine = Adapters._elements(self, field, own, ids)
        wide = np.promote_types(mine.dtype, found.dtype)
        return mine.astype(wide) + found.astype(wide)


def _split(index: Array) -> tuple[Array, Array]:
    """Where own and where shared directions lie."""
    return jnp.where(index < 0, NOTHING, index), jnp.where(index < 0, -1 - index, NOTHING)


# -- the method -------------------------------------------------------------------------------------------------------


def slora(adapters: Mapping[str, Params], *, name: str = "slora") -> Method:
    """Puts trained adapters side by side on one base; a call's ``Ports(adapter=rows)`` names each row's.

    `rows` is int32 ``[batch]``, counted in the order of `adapters`; −1 is the base alone.  A call without it uses one
    adapter for all: the first, until `adapters.use` says another.  Nothing recompiles when rows change.

    Args:
        adapters: adapted trees by name, on the base that `init` is given: LoRA, rsLoRA, DyLoRA (at its rank in use),
            AdaLoRA (without what was pruned) and VeRA leaves, each at the leaves and layers that it likes.
        name: what tells this group from another.

    Raises:
        ValueError: if there are none; on other leaves, or another base, with the adapter and the path; on prompts and
            prefixes, which `adapters.stack` takes along.  A call raises on experts.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> model = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> base, key = {"q_proj": {"kernel": jax.numpy.eye(8)}}, jax.random.key(0)
    >>> trees = {f"rank {r}": methods.lora(r)(key, base, model)[0] for r in (1, 2)}
    >>> params, forward = methods.slora(trees)(key, base, model)
    >>> params["q_proj"]["kernel"].a.shape, pj.count(params).trainable
    ((3, 8), 48)
    >>> rows = jax.numpy.array([1, -1, 0])
    >>> forward(params, jax.numpy.ones((3, 8)), pj.Ports(adapter=rows)).shape
    (3, 8)
    """
    if not adapters:
        raise ValueError("no adapters to stack: give at least one tree by name")

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)
        for who, tree in adapters.items():
            for entry in tree.get("ports", ()) if isinstance(tree, Mapping) else ():
                raise ValueError(f"adapter {who!r} has ports/{entry}, which is no weight: use adapters.stack")
        return side_by_side(adapters, params, name)

    return Method(init, lambda forward: by_row(forward, name))


def by_row(forward: Forward, name: str) -> Forward:
    """A forward function that hands each row's adapter to the leaves called `name`."""

    def give(params: Params, ports: Ports) -> tuple[Params, Ports]:
        params = trees.share(params)
        if ports.adapter is None:
            return params, ports

        def rows(path: Path, w: Any) -> Weight:
            if forward.spec.experts(path):
                raise ValueError(
                    f"{'/'.join(path)} holds experts, which meet tokens of many rows at once: an adapter a row is "
                    "not supported there, so choose one for all (adapters.use), or adapt other leaves"
                )
            return w.of_rows(ports.adapter.astype(jnp.int32))

        return trees.rewrite(params, name, rows), ports

    return forward.rewritten(give)


# -- putting them side by side ----------------------------------------------------------------------------------------


def side_by_side(adapters: Mapping[str, Params], params: Params, name: str) -> Params:
    """The tree of a base, `params`, with one leaf of all adapters where any acts; the first is in use."""
    found = {who: trees.leaves(tree) for who, tree in adapters.items()}
    bases = trees.leaves(params)
    for who, leaves in found.items():
        if missing := set(bases) ^ set(leaves):
            raise ValueError(
                f"adapter {who!r} is on another base: {'/'.join(sorted(missing)[0])} is only in one of them"
            )
        for path, leaf in leaves.items():
            check(who, path, leaf, innermost(bases[path]))
    veras = {who: [w for w in leaves.values() if isinstance(w, VeRA)] for who, leaves in found.items()}
    kept = pairs(adapters, veras)

    def each(path: Path, base: Leaf) -> Leaf:
        mine: dict[int, Directions] = {}
        for i, (who, leaves) in enumerate(found.items()):
            if is_adapter(w := leaves[path]):
                mine[i] = directions(w, kept.begin[who, w.name] if kept and isinstance(w, VeRA) else 0)
        if not mine:
            return base
        kind = Adapters if all(w.a is not None for w in mine.values()) else SharingAdapters
        laid, active = lay(mine, len(found)), jnp.zeros(next(iter(mine.values())).scale.shape, jnp.int32)
        trained = sum(w.trained(*base.shape[-2:]) for w in mine.values())
        return kind(base, active=active, names=tuple(found), trained=trained, name=name, **laid._asdict())

    made = trees.map_leaves(each, params)
    if kept is None:
        return made
    return made | {"methods": {**params.get("methods", {}), name: {"down": kept.down, "up": kept.up}}}
