"""AdaLoRA: adaptive budget allocation (Zhang et al. 2023, arXiv 2303.10512).

    y = x W + s · ((drop(x) Qᵀ) ⊙ λ) Pᵀ        s = α/r₀

W is frozen; P, Q and λ train.  They stand for singular vectors and values, which a penalty (`methods.orthogonality`)
holds them to.  Every matrix starts with r₀ triplets (Pᵢ, λᵢ, Qᵢ), λ = 0 and P, Q ~ N(0, 0.02), so the model's output
is unchanged at the start.  `methods.allocate_rank`, wrapped round the optimiser, then prunes the least important ones
of all matrices until their average rank is the target.  s stays what it was.

Source: sections 3.1 and 4.1; QingruZhang/AdaLoRA, loralib/loralib/adalora.py.

Departures: s is α/(r₀ + 1e-5), as in the authors' code and in HF PEFT, so that adapters keep their bits either way.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Path, Spec
from peft_jax.methods.lora import check_dropout, check_numbers, dropped, dropping, plus_product
from peft_jax.trees import Pattern, Site
from peft_jax.weights import Leaf, Weight, embed, linear, materialise, static, unembed

STANDARD_DEVIATION = 0.02
EPSILON = 1e-5  # beside r₀ in the scale


class Triplets(NamedTuple):
    """The arrays of one leaf, or something of their shapes: q ``[*layers, in, r]``, values ``[*layers, r]``, p
    ``[*layers, r, out]``."""

    q: Any
    values: Any
    p: Any


class Allocation(NamedTuple):
    """What `methods.allocate_rank` keeps.  The dicts are by the leaf's path and its method's name, with slashes.

    count         int32, how many steps it has taken
    budget        int32, how many triplets of all matrices the last step had
    sensitivity   Ī, fp32, a `Triplets` a leaf
    uncertainty   Ū, likewise
    scores        fp32 ``[*layers, r]`` a leaf: each triplet's importance, as last computed
    kept          bool ``[*layers, r]`` a leaf: what the last pruning kept, everything before the first
    inner         the state of the wrapped optimiser
    """

    count: Array  # type: ignore[assignment]  # optax calls it so too
    budget: Array
    sensitivity: dict[str, Triplets]
    uncertainty: dict[str, Triplets]
    scores: dict[str, Array]
    kept: dict[str, Array]
    inner: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SVD(Weight):
    """``base + scale · q diag(values) p``: q ``[*layers, in, r]``, values ``[*layers, r]``, p ``[*layers, r, out]``,
    scale ``[*layers]``; the paper's Q, λ and P, Q and P transposed.

    `target` is the average rank that pruning ends at.  `triplets` says of each layer which of the r₀ that it started
    with are held here, from the first column on: "1101" has lost the third; "" is a layer that was not selected.  What
    is left of r is padding, which `active` ``[*layers, r]`` takes out: λ = 0 alone would train.
    `key` and `rate` are there during a call only: dropout.
    """

    trains = ("q", "values", "p")
    needs: ClassVar[tuple[type, str] | None] = (Allocation, "methods.allocate_rank")

    base: Any
    q: Any
    values: Any
    p: Any
    scale: Any
    active: Any
    key: Any = None
    rate: Any = None
    target: int = static(default=8)
    triplets: tuple[str, ...] = static(default=())
    name: str = static(default="adalora")

    @property
    def ranks(self) -> tuple[int, ...]:
        """How many triplets each layer holds, pruned (λ = 0) or not."""
        return tuple(held.count("1") for held in self.triplets)

    @property
    def used(self) -> np.ndarray:
        """`active` on the host, and where the frozen half is away: bool ``[*layers, r]``."""
        return self.arranged([np.arange(self.values.shape[-1]) < rank for rank in self.ranks])

    def arranged(self, layers: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Something of every layer, ``[layers, r]``, with the leaf's leading axes."""
        stacked = np.array(layers)
        return stacked.reshape(*self.values.shape[:-1], stacked.shape[-1])

    def axes(self) -> dict[str, Any]:
        return {"q": ("in", None), "p": (None, "out")}

    def materialise(self) -> Array:
        return plus_product(materialise(self.base), self.scale, self.q * self._values()[..., None, :], self.p)

    def linear(self, x: Array) -> Array:
        return linear(x, self.base) + self._low_rank(dropped(x, self.key, self.rate) @ self.q.astype(x.dtype), self.p)

    def embed(self, ids: Array) -> Array:
        rows = embed(ids, self.base)
        return rows + self._low_rank(embed(ids, self.q).astype(rows.dtype), self.p)

    def unembed(self, x: Array) -> Array:
        return unembed(x, self.base) + self._low_rank(x @ self.p.T.astype(x.dtype), self.q.T)

    def _values(self) -> Array:
        return jnp.where(self.active, self.values, jnp.zeros_like(self.values))

    def _low_rank(self, inner: Array, outer: Array) -> Array:
        factor = (self._values() * self.scale.astype(self.values.dtype)).astype(inner.dtype)
        return (inner * factor.reshape((1,) * (inner.ndim - 1) + factor.shape)) @ outer.astype(inner.dtype)

    def trained_size(self) -> int:
        if self.values is None:  # the frozen half of a partition
            return 0
        return sum(self.ranks) * (self.q.shape[-2] + self.p.shape[-1] + 1)


def adalora(
    rank: int = 8,
    alpha: float | None = None,
    select: Pattern = trees.LAYER_MATRICES,
    *,
    initial_rank: int | None = None,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    name: str = "adalora",
) -> Method:
    """Triplets on every kernel and embedding that `select` matches, for `methods.allocate_rank` to prune.

    Args:
        rank: the average rank at the end, over all matrices; their ranks will differ.
        alpha: α; by default `initial_rank`, which makes the scale 1.
        select: a pattern over the model's names (see `pj.select`); by default every matrix of the layers, as
            in the paper.
        initial_rank: r₀; by default 1.5 times `rank`.  Where the two are equal nothing is pruned.
        dropout: the rate on the adapter's input, active when a call's ports carry a `micro_key` (training).
        layers: restricts the adapters to these layer indices.
        dtype: of P, λ and Q.
        name: what tells this method from another of its kind in one chain; also seeds its draws.

    Raises:
        ValueError: on a rank, alpha or dropout out of range, or a pattern that matches nothing.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.numpy.eye(64)}}
    >>> params, forward = methods.adalora(rank=4, alpha=8, select="q_proj")(jax.random.key(0), params, forward)
    >>> pj.count(params).trainable == 6 * (64 + 64 + 1)
    True
    """
    check_numbers((rank,) if initial_rank is None else (rank, initial_rank))
    initial = (3 * rank + 1) // 2 if initial_rank is None else initial_rank
    if rank > initial:
        raise ValueError(
            f"the target rank is {rank} and initial_rank {initial}: pruning cannot end above its "
            f"start, so give initial_rank {rank} or more"
        )
    alpha = float(initial if alpha is None else alpha)
    check_numbers((), (alpha,))
    check_dropout(dropout)

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)
        found = trees.select(select, params, forward, layers=layers)

        def adapt(path: Path, leaf: Leaf) -> Leaf:
            return _adapter(key, found[path], leaf) if path in found else leaf

        return trees.map_leaves(adapt, params)

    def _adapter(key: Array, site: Site, leaf: Leaf) -> SVD:
        inputs, outputs = site.matrix_shape(leaf)
        if initial > min(inputs, outputs):
            message = f"{site.names[0]} is a {inputs} x {outputs} matrix: initial rank {initial} is above its own"
            warnings.warn(message, UserWarning, stacklevel=2)
        drawn = site.draw(key, name, _vectors, initial, inputs + outputs)  # [*layers, r, in + out]
        q, p = jnp.matrix_transpose(drawn[..., :inputs]), drawn[..., inputs:]
        chosen = site.arranged(site.chosen)
        vectors = [jnp.where(chosen[..., None, None], x, 0).astype(dtype) for x in (q, p)]
        values = jnp.zeros((*chosen.shape, initial), dtype)
        active = jnp.broadcast_to(chosen[..., None], values.shape)
        scale = jnp.where(chosen, jnp.float32(alpha / (initial + EPSILON)), 0)
        triplets = tuple("1" * initial if hit else "" for hit in site.chosen)
        return SVD(leaf, vectors[0], values, vectors[1], scale, active, target=rank, triplets=triplets, name=name)

    return Method(init, lambda forward: dropping(forward, dropout, name))


def _vectors(key: Array, rank: int, width: int) -> Array:
    return STANDARD_DEVIATION * jax.random.normal(key, (rank, width))


# -- what became of the ranks -----------------------------------------------------------------------------------------


def found(params: Params) -> dict[str, SVD]:
    """The SVD leaves of a tree, nested ones too, by path and name: the keys of an `Allocation`."""
    return {
        "/".join((*path, w.name)): w
        for path, leaf in trees.leaves(params).items()
        for w in trees.weights(leaf)
        if isinstance(w, SVD)
    }


def ranks(params: Params, forward: Forward | None = None) -> dict[str, int]:
    """How many triplets are left of each adapted matrix: λ ≠ 0.

    By the source model's names, ``model.layers.3.self_attn.q_proj``, if `forward` is given; else by the leaf's path,
    and the layer last.  `table` prints it.

    Raises:
        ValueError: if the tree holds no SVD leaf, or its trained half is away.
    """
    spec, counts = Spec() if forward is None else forward.spec, dict[str, int]()
    for path, leaf in trees.leaves(params).items():
        for w in (w for w in trees.weights(leaf) if isinstance(w, SVD)):
            left, names = _rows(_left(path, w)).sum(-1), spec.names(path)
            if len(names) != len(left):
                names = tuple(f"{names[0]}.{layer}" for layer in range(len(left)))
            for name, held, rank in zip(names, w.triplets, left, strict=True):
                if held:
                    counts[name] = counts.get(name, 0) + int(rank)
    if not counts:
        raise ValueError("the tree holds no SVD leaf, whose ranks could be counted: apply methods.adalora first")
    return counts


def _left(path: Path, w: SVD) -> np.ndarray:
    if w.values is None:
        raise ValueError(f"{'/'.join(path)} has holes: combine the two halves of the partition first")
    return (np.asarray(w.values) != 0) & w.used


def _rows(x: np.ndarray) -> np.ndarray:
    """A row a layer (or an expert of one)."""
    return x.reshape(-1, x.shape[-1])


def table(counts: Mapping[str, int]) -> str:
    """`ranks` as text: a row a module, a column a layer."""
    cells, columns = grid(counts)
    width = max(map(len, cells))
    lines = [f"{'':<{width}}" + "".join(f"{column:>5}" for column in columns)]
    for row, mine in cells.items():
        lines.append(f"{row:<{width}}" + "".join(f"{mine.get(column, ''):>5}" for column in columns))
    return "\n".join(lines)


def grid(counts: Mapping[str, int]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """`ranks` by module, then by layer ("" where a name has none); and all the layers."""
    cells: dict[str, dict[str, int]] = {}
    for name, rank in counts.items():
        layer = trees.layer_of(name)
        row = re.sub(r"^\*\.|\.\*$", "", trees.LAYER.sub("*", name, count=1))
        cells.setdefault(row, {})["" if layer is None else str(layer)] = rank
    columns = sorted({column for mine in cells.values() for column in mine}, key=lambda c: (len(c), c))
    return cells, columns


def prune(params: Params) -> Params:
    """The tree without its pruned triplets (λ = 0): the same function in fewer bytes.

    Layers of one leaf are padded to the largest rank left among them (1, where none is).  For after training: arrays
    change their shapes, so not under jit.

    Raises:
        ValueError: if the tree holds no SVD leaf, or its trained half is away.
    """
    ranks(params)

    def each(path: Path, leaf: Leaf) -> Leaf:
        return trees.map_weights(lambda w: _compact(w, _left(path, w)) if isinstance(w, SVD) else w, leaf)

    return trees.map_leaves(each, params)


def _compact(w: SVD, left: np.ndarray) -> SVD:
    rows = _rows(left)
    width = max(1, int(rows.sum(-1).max()))
    # What is left comes first, in its order; what pads the rest is cleared.
    order = jnp.asarray(w.arranged(np.argsort(~rows, axis=-1, stable=True)[:, :width]))
    active = jnp.asarray(w.arranged([np.arange(width) < row.sum() for row in rows]))
    triplets = tuple(_fewer(held, row) for held, row in zip(w.triplets, rows, strict=True))

    take, zero = jnp.take_along_axis, jnp.zeros((), w.values.dtype)
    q = jnp.where(active[..., None, :], take(w.q, order[..., None, :], -1), zero)
    values = jnp.where(active, take(w.values, order, -1), zero)
    p = jnp.where(active[..., None], take(w.p, order[..., None], -2), zero)
    return dataclasses.replace(w, q=q, values=values, p=p, active=active, triplets=triplets)


def _fewer(held: str, left: np.ndarray) -> str:
    """Which triplets are held still, if `left` says it of the columns of those that are."""
    columns = iter(left)
    return "".join("1" if mark == "1" and next(columns) else "0" for mark in held)
