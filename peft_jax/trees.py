"""What can be read off a tree of typed leaves: which leaves a pattern names, what trains, what it costs, what to keep.

The leaf types are the one source: optimiser masks, partitions, parameter counts and adapter files all come from
`trainable`, and none of them keeps a list of its own.
"""

import dataclasses
import difflib
import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from peft_jax import on_disk
from peft_jax.core import Forward, Params, Path, Spec
from peft_jax.views import View, view_of
from peft_jax.weights import Leaf, Weight, base_of, innermost, is_weight, materialise, numbers

# Top-level entries that methods add: what belongs to ports, and what layers share.  They are not the model's, and never
# selected; the second is not called "shared", because T5 and BART call their embedding so.
ADDED = ("ports", "methods")

Pattern = str | Callable[[str], bool]

# The first number between dots in a name is the layer; later ones are experts.
LAYER = re.compile(r"(?<![^.])\d+(?![^.])")

# Every matrix of the layers: not the embedding or the head, nor T5's table of distances, which is in its first layers,
# nor what chooses among experts, which is small and sensitive.
LAYER_MATRICES = r"(^|\.)\d+\.(?!.*(relative_attention_bias|\.gate)$)"


# -- walking ----------------------------------------------------------------------------------------------------------


def path_of(keys: Sequence[Any]) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def is_added(path: Path) -> bool:
    return bool(path) and path[0] in ADDED


def leaves(params: Params) -> dict[Path, Leaf]:
    """The model's own leaves by path; a `Weight` is one leaf."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]
    found = {path_of(keys): leaf for keys, leaf in flat}
    return {path: leaf for path, leaf in found.items() if not is_added(path)}


def map_leaves(fn: Callable[[Path, Leaf], Leaf], params: Params) -> Params:
    """Rebuilds the tree with `fn(path, leaf)` in place of each of the model's own leaves."""

    def each(keys: Sequence[Any], leaf: Leaf) -> Leaf:
        path = path_of(keys)
        return leaf if is_added(path) else fn(path, leaf)

    return jax.tree_util.tree_map_with_path(each, params, is_leaf=is_weight)


def map_weights(fn: Callable[[Weight], Leaf], params: Params) -> Params:
    """Rebuilds the tree with `fn(weight)` in place of each `Weight`, nested ones first."""

    def each(node: Any) -> Any:
        if not is_weight(node):
            return node
        fields = [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]
        return fn(dataclasses.replace(node, **{name: map_weights(fn, getattr(node, name)) for name in fields}))

    return jax.tree.map(each, params, is_leaf=is_weight)


# -- selecting --------------------------------------------------------------------------------------------------------


def layer_of(name: str) -> int | None:
    """The layer that a name belongs to: the first number between its dots."""
    number = LAYER.search(name)
    return int(number[0]) if number else None


class Site(NamedTuple):
    """A leaf that a method may act on.

    names     the source model's names for it, one for each matrix of a stacked leaf: layer by layer, experts in order
    chosen    which of those are meant
    stacked   whether the leaf's first axis is layers
    experts   how many experts the next axis counts, 0 where there is none
    embedding whether it is a table whose rows are looked up
    """

    path: Path
    names: tuple[str, ...]
    chosen: tuple[bool, ...]
    stacked: bool
    experts: int = 0
    embedding: bool = False

    @property
    def lead(self) -> tuple[int, ...]:
        """The leaf's leading axes."""
        experts = (self.experts,) if self.experts else ()
        return ((len(self.names) // max(self.experts, 1),) if self.stacked else ()) + experts

    def arranged(self, values: Sequence[Any], dtype: Any = None) -> Array:
        """Something of every name, on the leaf's leading axes."""
        return jnp.array(values, dtype).reshape(self.lead)

    def keys(self, key: Array, method: str) -> Array:
        """A key for each name, from names alone: ``fold_in`` of crc32(method), crc32(canonical name), layer index.

        The canonical name writes ``*`` for the layer, so the stacked and the unrolled model draw the same numbers.
        """
        canonical = [LAYER.sub("*", name, count=1) + "/" + self.path[-1] for name in self.names]
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)  # an old-style key: one row of numbers, not a stack of keys
        key = jax.random.fold_in(key, zlib.crc32(method.encode()))
        sums = jnp.array([zlib.crc32(name.encode()) for name in canonical], jnp.uint32)
        indices = jnp.array([layer_of(name) or 0 for name in self.names])
        keys = jax.vmap(lambda s, i: jax.random.fold_in(jax.random.fold_in(key, s), i))(sums, indices)
        return keys.reshape(self.lead)

    def draw(self, key: Array, method: str, sample: Callable[..., Array], *args: Any) -> Array:
        """``sample(key, *args)`` for each name, stacked as the leaf is.  `sample` and `args` must be hashable."""
        return _draw(self.keys(key, method), sample, args)

    def matrix_shape(self, leaf: Leaf) -> tuple[int, ...]:
        """The shape of one layer's (one expert's) array."""
        return tuple(leaf.shape[len(self.lead) :])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(keys: Array, sample: Callable[..., Array], args: tuple[Any, ...]) -> Array:
    # Jitted, because eager and compiled draws can differ in the last bit.
    draw = lambda key: sample(key, *args)  # noqa: E731
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    return draw(keys)


def site(path: Path, spec: Spec) -> Site:
    """A leaf's names, all layers chosen."""
    names = spec.names(path)
    return Site(path, names, (True,) * len(names), spec.stacked(path), spec.experts(path), spec.looked_up(path))


def is_matrix(site: Site, leaf: Leaf) -> bool:
    """Whether `linear`, `embed` and `unembed` apply to a leaf: a kernel or an embedding of two axes, layers apart, or
    what is seen as one (`peft_jax.views`)."""
    named = site.path[-1] in ("kernel", "embedding") or view_of(leaf) is not None
    return named and len(site.matrix_shape(leaf)) == 2


def select(
    pattern: Pattern,
    params: Params,
    forward: Forward,
    *,
    layers: Sequence[int] | None = None,
    adaptable: Callable[[Site, Leaf], bool] = is_matrix,
) -> dict[Path, Site]:
    """The leaves whose names a pattern matches, by path; a stacked leaf may be hit in some layers only.

    Args:
        pattern: a regular expression, searched for in the source model's own names
            (``model.layers.3.self_attn.q_proj``; a bias is ``….q_proj.bias``), or a function of a name.
        params, forward: the model.
        layers: restricts the match to these layer indices.
        adaptable: which leaves the method can act on; by default kernels and embeddings.

    Raises:
        ValueError: if nothing matches, with the names that come nearest; if the pattern is not a regular expression.
    """
    try:
        matches = pattern if callable(pattern) else re.compile(pattern).search
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from error
    found, offered, others = dict[Path, Site](), list[str](), list[str]()
    for path, leaf in leaves(params).items():
        here = site(path, forward.spec)
        if adaptable(here, leaf):
            offered += here.names
            inside = (layers is None or layer_of(name) in layers for name in here.names)
            chosen = tuple(bool(matches(name)) and within for name, within in zip(here.names, inside, strict=True))
            if any(chosen):
                found[path] = here._replace(chosen=chosen)
        elif len(leaf.shape) > 2 and any(map(matches, here.names)):
            others.append(f"{here.names[0]} of shape {tuple(leaf.shape)}")
    if not found:
        hint = f"; {others[0]} is no matrix unless forward.traced(params, inputs) sees it as one" if others else ""
        raise ValueError(_nothing_matched(pattern, offered, layers) + hint)
    return found


def _nothing_matched(pattern: Pattern, offered: Sequence[str], layers: Sequence[int] | None) -> str:
    words = sorted({name.rsplit(".", 1)[-1] for name in offered})
    wanted = re.findall(r"\w+", pattern) if isinstance(pattern, str) else []
    near = [w for word in wanted for w in difflib.get_close_matches(word, words, n=3, cutoff=0.5)] or words[:12]
    where = f" in layers {list(layers)}" if layers is not None else ""
    shown = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", pattern)
    return (
        f"the pattern {shown!r} matches none of the model's {len(offered)} adaptable leaves{where}; "
        f"near misses: {', '.join(dict.fromkeys(near)) or 'none'} "
        f"(full names look like {offered[0] if offered else '?'})"
    )


def claim(name: str, params: Params) -> None:
    """Raises if a method of this name has already put its leaves into the tree."""
    taken = {getattr(w, "name", None) for w in weights(params)}
    taken |= {entry for added in ADDED if isinstance(params, Mapping) for entry in params.get(added, ())}
    if name in taken:
        raise ValueError(f"a method named {name!r} is already applied: give this one another name=")


def weights(params: Params) -> list[Any]:
    """Every `Weight` of the tree, nested ones included."""
    found: list[Any] = []
    map_weights(lambda w: (found.append(w), w)[1], params)  # type: ignore[func-returns-value]
    return found


def rewrite(params: Params, name: str, fn: Callable[[Path, Weight], Leaf]) -> Params:
    """Rebuilds the tree with `fn(path, weight)` in place of each leaf that the method called `name` put there."""
    mine = lambda path: lambda w: fn(path, w) if getattr(w, "name", None) == name else w  # noqa: E731
    return map_leaves(lambda path, leaf: map_weights(mine(path), leaf), params)


def bare(forward: Forward, name: str) -> Forward:
    """A forward function that sees the leaves of the method called `name` as the bare arrays they stand for.

    For leaves trained whole that no rule reads: norms, biases, heads.
    """
    return forward.rewritten(lambda params, ports: (rewrite(params, name, lambda path, w: materialise(w)), ports))


# -- what layers share ------------------------------------------------------------------------------------------------

Shared = Mapping[str, Any]  # by the method's name: its arrays, by the leaf's field


def share(params: Params) -> Params:
    """The tree for one call: each leaf has what its layers share (`Weight.shares`) from ``params["methods"]``.

    Idempotent, and without a copy: the same array is in every leaf.

    Raises:
        ValueError: if the tree lacks it.
    """
    kept: Shared = params.get("methods", {}) if isinstance(params, Mapping) else {}
    return map_leaves(lambda path, leaf: fill(leaf, kept), params)


def fill(leaf: Leaf, shared: Shared) -> Leaf:
    """A leaf with what its layers share."""

    def give(w: Any) -> Weight:
        if w.shares and w.name not in shared:
            raise ValueError(f"the tree lacks methods/{w.name}, which its leaves share: give the method's whole tree")
        return dataclasses.replace(w, **{field: shared[w.name][field] for field in w.shares}) if w.shares else w

    return map_weights(give, leaf)


def unshare(params: Params) -> tuple[Params, PyTree[Shared]]:
    """The inverse of `fill`, leaf by leaf: what a scan may slice by layer, and in a tree like it what it may not."""

    def without(w: Any) -> Weight:
        return dataclasses.replace(w, **dict.fromkeys(w.shares))

    def shared(leaf: Any) -> Shared:
        return {w.name: {field: getattr(w, field) for field in w.shares} for w in weights(leaf) if w.shares}

    return map_weights(without, params), jax.tree.map(shared, params, is_leaf=is_weight)


# -- training ---------------------------------------------------------------------------------------------------------


def trainable(params: Params) -> PyTree[bool]:
    """A tree of booleans of the same structure: what an optimiser may move.

    A plain array is frozen; a `Weight` says which of its fields train, and its base answers for itself.
    """

    def mark(leaf: Leaf) -> Any:
        if not is_weight(leaf):
            return False
        fields = [f.name for f in dataclasses.fields(leaf) if not f.metadata.get("static")]
        marks = {
            name: jax.tree.map(lambda _: True, getattr(leaf, name))
            if name in leaf.trains
            else trainable(getattr(leaf, name))
            for name in fields
        }
        return dataclasses.replace(leaf, **marks)

    return jax.tree.map(mark, params, is_leaf=is_weight)


def _is_hole(node: Any) -> bool:
    return node is None


def _keep(mask: PyTree[bool], tree: Any, wanted: bool) -> Any:
    return jax.tree.map(lambda marked, x: x if marked is wanted else None, mask, tree)


def partition(params: Params) -> tuple[Params, Params]:
    """``(trainable, frozen)``: two trees of the same structure, each with None where the other has an array."""
    mask = trainable(params)
    return _keep(mask, params, True), _keep(mask, params, False)


def combine(first: Params, second: Params) -> Params:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=_is_hole)


Optimiser = optax.GradientTransformation | optax.MultiSteps  # which is no transformation itself, but is used as one


def transformation(tx: Optimiser) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx)


def freeze(tx: Optimiser, params: Params) -> optax.GradientTransformationExtraArgs:
    """An optimiser that sees, stores and moves the trainable leaves only.

    Works on whole trees and on the trainable half of `partition`; the updates it returns hold None for frozen leaves,
    which `apply_updates` passes over.  `params` is only looked at: a tree that trains nothing raises.

    >>> import jax.numpy as jnp, optax, peft_jax as pj
    >>> params = {"kernel": jnp.ones((4, 4))}
    >>> pj.freeze(optax.adam(1e-3), params)
    Traceback (most recent call last):
        ...
    ValueError: nothing in this tree trains: apply a method (or methods.unfreeze) before freezing the rest
    """
    if not any(jax.tree.leaves(trainable(params))):
        raise ValueError("nothing in this tree trains: apply a method (or methods.unfreeze) before freezing the rest")
    inner = transformation(tx)

    def init(params: Params) -> optax.OptState:
        return inner.init(partition(params)[0])

    def update(grads: Params, state: optax.OptState, params: Params | None = None, **extra: Any) -> Any:
        weights = None if params is None else partition(params)[0]
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counters, whatever its caller's strictness
            return inner.update(partition(grads)[0], state, weights, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def apply_updates(params: Params, updates: Params) -> Params:
    """``params + updates`` in the dtype of `params`; a leaf whose update is None is returned as it is."""
    move = lambda p, u: p if u is None else (p + u).astype(p.dtype)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):  # the sum in the wider dtype, rounded once
        return jax.tree.map(move, params, updates, is_leaf=_is_hole)


def labels(params: Params, forward: Forward, groups: Mapping[str, Pattern], rest: str = "rest") -> PyTree[str]:
    """A label for every array that trains, for `optax.partition`: the first group whose pattern matches its leaf.

    Args:
        params: the whole tree, or the trainable half of `partition`.
        forward: the model.
        groups: patterns over the model's names (see `select`), by label.
        rest: the label of what no pattern matches.

    Raises:
        ValueError: if a pattern matches nothing that trains, or some layers only of a stacked leaf.

    >>> import jax, jax.numpy as jnp, optax, peft_jax as pj
    >>> forward = pj.Forward(lambda params, inputs, ports: inputs.tokens @ params["up"]["kernel"])
    >>> params = {"up": {"kernel": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones((3, 1))}}
    >>> params, forward = pj.methods.unfreeze(".")(jax.random.key(0), params, forward)
    >>> labels = pj.labels(params, forward, {"head": "^head$"})
    >>> tx = pj.freeze(optax.partition({"head": optax.adam(1e-3), "rest": optax.adam(1e-2)}, labels), params)
    """
    moves = lambda site, leaf: any(jax.tree.leaves(trainable(leaf)))  # noqa: E731
    found: dict[Path, str] = {}
    for label, pattern in groups.items():
        for path, here in select(pattern, params, forward, adaptable=moves).items():
            if not all(here.chosen):
                raise ValueError(
                    f"the pattern {pattern!r} matches some layers only of {'/'.join(path)}, which has one label: "
                    "match all of them, or unroll the model (scan=False)"
                )
            found.setdefault(path, label)
    everywhere = jax.tree.map(lambda _: rest, params)
    marked = map_leaves(lambda path, leaf: jax.tree.map(lambda _: found.get(path, rest), leaf), everywhere)
    return _keep(trainable(params), marked, True)


# -- leaving ----------------------------------------------------------------------------------------------------------


def merge(params: Params) -> Params:
    """Every adapter taken into its base: plain arrays in the base's dtype, at no inference cost.

    What nothing adapts stays as it is stored, in few bits or not.  The base is never changed, so keeping `params` is
    the exact way back.

    Raises:
        ValueError: if the tree holds a port's entry (a prompt, a prefix): no weight can stand for it; on an adapter
            that its base cannot take in, with the path.
    """
    for name in params.get("ports", ()) if isinstance(params, Mapping) else ():
        raise ValueError(f"ports/{name} acts beside the weights and cannot be merged into them: keep the adapter")

    def each(path: Path, leaf: Leaf) -> Leaf:
        if isinstance(leaf, View):
            return leaf if leaf.packed else materialise(leaf.base)
        try:
            return _merged(on_disk.read(leaf)) if is_weight(leaf) and hasattr(leaf, "base") else leaf
        except ValueError as error:
            raise ValueError(f"{'/'.join(path)}: {error}") from None

    merged = map_leaves(each, share(params))
    return without_added(merged)


@jax.jit
def _merged(leaf: Weight) -> Leaf:
    view = view_of(leaf)
    return leaf.merged() if view is None else view.over(leaf.merged())


def strip(params: Params) -> Params:
    """The base model as it was loaded, bit for bit and without a copy (the reference model of DPO, say).

    Raises:
        ValueError: if a leaf was unfrozen without keeping its base.
    """

    def bottom(path: Path, leaf: Leaf) -> Leaf:
        found = innermost(leaf)
        if hasattr(found, "base"):
            raise ValueError(f"{'/'.join(path)} was changed without keeping its base: nothing is left to strip to")
        view = view_of(leaf)
        return found if view is None or not is_weight(found) else view.over(found)

    bare = map_leaves(bottom, params)
    return without_added(bare)


def without_added(params: Params) -> Params:
    """The model's own part of a tree."""
    if not isinstance(params, Mapping) or not any(name in params for name in ADDED):
        return params
    return {name: value for name, value in params.items() if name not in ADDED}


def set_scale(params: Params, scale: float, name: str | None = None) -> Params:
    """Sets the scale (α/r) of every adapter, or of the one called `name`; 0 turns it off.  Nothing recompiles.

    A method may put leaves under names of its own, ``name.part``: they answer to `name` too.

    Raises:
        ValueError: if there is no such adapter.
    """
    adapters = [w for w in weights(params) if hasattr(w, "base") and getattr(w, "scale", None) is not None]
    names = {getattr(w, "name", "") for w in adapters}
    wanted = names if name is None else {n for n in names if n == name or n.startswith(f"{name}.")}
    if not wanted:
        called = "" if name is None else f" called {name!r}"
        raise ValueError(f"there is no adapter{called} here: {', '.join(sorted(names)) or 'none has a scale'}")

    def each(w: Any) -> Any:
        mine = hasattr(w, "base") and getattr(w, "name", "") in wanted and getattr(w, "scale", None) is not None
        return dataclasses.replace(w, scale=jnp.full_like(w.scale, scale)) if mine else w

    return map_weights(each, params)


def place(params: Params, shardings: Any = None) -> Params:
    """Puts a tree on devices, and reads what is still on disk (``models.load(..., lazy=True)``) straight into place.

    Args:
        params: the tree.
        shardings: a sharding, or a tree of them that `params`' structure refines; None leaves arrays where they are
            and reads the rest onto the default device.  Of a sharding over several processes each gives its own pieces.
    """
    unread = any(map(on_disk.is_on_disk, weights(params)))

    def put(sharding: Any, part: Params) -> Params:
        def each(leaf: Any) -> Any:
            return on_disk.place(leaf, sharding) if on_disk.is_on_disk(leaf) else on_disk.put(leaf, sharding)

        return jax.tree.map(each, part, is_leaf=on_disk.is_on_disk)

    placed = params if shardings is None else jax.tree.map(put, shardings, params)
    return map_weights(lambda w: w.materialise() if on_disk.is_on_disk(w) else w, placed) if unread else placed


# -- counting ---------------------------------------------------------------------------------------------------------


class Count(NamedTuple):
    trainable: int
    frozen: int
    bytes: int


def count(params: Params) -> Count:
    """Numbers that train, numbers that do not (as the model counts them), and bytes in all.

    Also takes abstract trees (`jax.eval_shape`), so a 70B model is counted without a weight.

    >>> import jax.numpy as jnp, peft_jax as pj
    >>> pj.count({"kernel": jnp.ones((4, 8))})
    Count(trainable=0, frozen=32, bytes=128)
    """
    sizes = [numbers(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_weight)]
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return Count(sum(t for t, _ in sizes), sum(f for _, f in sizes), stored)


def summary(params: Params) -> str:
    """A table of the tree by leaf type: leaves, trainable and frozen numbers, bytes."""

    def kind(leaf: Leaf) -> str:
        name = type(leaf).__name__ if is_weight(leaf) else "array"
        return name if base_of(leaf) is None else f"{name}({kind(leaf.base)})"

    groups: dict[str, list[Leaf]] = {}
    for leaf in jax.tree.leaves(params, is_leaf=is_weight):
        groups.setdefault(kind(leaf), []).append(leaf)
    rows = [(name, len(group), *count(group)) for name, group in sorted(groups.items())]
    total = count(params)
    rows.append(("total", sum(row[1] for row in rows), *total))
    lines = [f"{'leaf':<24}{'leaves':>8}{'trainable':>15}{'frozen':>17}{'bytes':>17}"]
    lines += [f"{name:<24}{n:>8,}{t:>15,}{f:>17,}{b:>17,}" for name, n, t, f, b in rows]
    share = 100 * total.trainable / max(total.trainable + total.frozen, 1)
    return "\n".join(lines) + f"\ntrainable: {share:.4f}% of {total.trainable + total.frozen:,}"
