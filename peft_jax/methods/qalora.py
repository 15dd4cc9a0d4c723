"""QA-LoRA: an adapter that merges into the zero points of its base (Xu et al. 2023, arXiv 2309.14717).

    y = x W̃ + s · pool(x) A B        W̃ = α (q − β), by groups of inputs;  s = the adapter's own α/r
    β' = β − s · p · (A B) / α       merged: the same integers q, the same steps α (`step` here), other zero points

A ``[in/g, r]`` and B ``[r, out]`` train (the paper's matrices, transposed).  pool adds up x over each group of g
inputs, times p, so that the adapter adds one number to all weights of a group: which is what a zero point does.
Merged, the model is in as few bits as before, with no adapter, and computes what the adapted one did, to fp32 rounding.

    pooling   p                        that of
    'sum'     1                        the paper, equation 3
    'mean'    1/g                      the authors' code
    'peft'    the number of groups/g   HF PEFT's ``use_qalora``, which cannot merge

A ~ U(±√(6/(in/g + r))) and B = 0: the output is the base's at the start.

Source: section 3.3, algorithm 1; yuhuixu1993/qa-lora, peft_utils.py and merge.py; HF PEFT tuners/lora/variants.py.

Departures: zero points are float32 once merged, whatever the steps are: rounding them would undo the adapter.  A starts
as in the authors' code (HF PEFT: U(±√(g/in))), and dropout acts behind the pooling, as there (HF PEFT: before it).  The
base may be in another format, or plain: such an adapter trains alike, and merges into a plain array.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params
from peft_jax.methods.lora import check_dropout, check_numbers, dropped, dropping, scaled_product
from peft_jax.quant.grouped import GroupedInt
from peft_jax.trees import LAYER_MATRICES, Pattern, Site
from peft_jax.weights import Leaf, Weight, base_of, embed, innermost, linear, materialise, static, unembed

POOLINGS = ("sum", "mean", "peft")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QALoRA(Weight):
    """``base + scale · p · a b``, a row of ``a b`` for each group: a ``[*layers, groups, r]``, b ``[*layers, r, out]``.

    scale is ``[*layers]``.  `ranks` is 0 for a layer that is not adapted, whose a and b are zeros: a fixed point, since
    each is the other's gradient.  `key` and `rate` are there during a call only: dropout.
    """

    trains = ("a", "b")

    base: Any
    a: Any
    b: Any
    scale: Any
    key: Any = None
    rate: Any = None
    group_size: int = static(default=32)
    pooling: str = static(default="sum")
    ranks: tuple[int, ...] = static(default=())
    name: str = static(default="qalora")

    @property
    def factor(self) -> float:
        """p of the equation."""
        groups = self.a.shape[-2]
        return {"sum": 1.0, "mean": 1 / self.group_size, "peft": groups / self.group_size}[self.pooling]

    def change(self) -> Array:
        """``s · p · A B`` in fp32, ``[*layers, groups, out]``: what each weight of a group gains."""
        a, b, scale = (x.astype(jnp.float32) for x in (self.a, self.b, self.scale))
        return (self.factor * scale)[..., None, None] * (a @ b)

    def axes(self) -> dict[str, Any]:
        return {"a": ("in", None), "b": (None, "out")}  # a group is some inputs

    def materialise(self) -> Array:
        base = materialise(self.base)
        wide = np.promote_types(base.dtype, np.float32)
        change = jnp.repeat(self.change().astype(wide), self.group_size, axis=-2)
        return (base.astype(wide) + change).astype(base.dtype)

    def merged(self) -> Leaf:
        base = self.base.merged() if base_of(self.base) is not None else self.base
        return into_zeros(base, self.change(), self.group_size) if isinstance(base, GroupedInt) else self.materialise()

    def linear(self, x: Array) -> Array:
        pooled = dropped(self.pool(x), self.key, self.rate)
        return linear(x, self.base) + scaled_product(pooled @ self.a.astype(x.dtype), self.scale, self.b)

    def embed(self, ids: Array) -> Array:
        rows = embed(ids, self.base)
        own = embed(ids // self.group_size, self.a).astype(rows.dtype) * jnp.asarray(self.factor, rows.dtype)
        return rows + scaled_product(own, self.scale, self.b)

    def unembed(self, x: Array) -> Array:
        grouped = scaled_product(x @ self.b.T.astype(x.dtype), self.scale, self.a.T) * jnp.asarray(self.factor, x.dtype)
        return unembed(x, self.base) + jnp.repeat(grouped, self.group_size, axis=-1)

    def pool(self, x: Array) -> Array:
        """``[..., in] -> [..., groups]``, added up in fp32 at least."""
        wide = np.promote_types(x.dtype, np.float32)
        grouped = x.reshape(*x.shape[:-1], -1, self.group_size)
        return (jnp.sum(grouped, axis=-1, dtype=wide) * jnp.asarray(self.factor, wide)).astype(x.dtype)

    def trained_size(self) -> int:
        if self.a is None or self.b is None:  # the frozen half of a partition
            return 0
        return sum(self.ranks) * (self.a.shape[-2] + self.b.shape[-1])


def into_zeros(base: GroupedInt, change: Array, group_size: int) -> GroupedInt:
    """The leaf whose weights are larger by ``change`` ``[*layers, in/group_size, out]``: other zero points, in fp32.

    A step that is too small for its change is enlarged to the change's last bits, where it had nothing to say: a step
    of 0 is no division by 0.

    Raises:
        ValueError: unless `group_size` is a whole number of the base's groups.
    """
    _check_groups(base, group_size)
    change = jnp.repeat(change.astype(jnp.float32), group_size // base.group_size, axis=-2)
    step, zero = base.step.astype(jnp.float32), base.zero.astype(jnp.float32)
    least = max(float(jnp.finfo(base.step.dtype).smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    enough = jnp.maximum(jnp.abs(change) * 2.0**-28, least)
    kept = jnp.where(jnp.abs(step) < enough, enough, step).astype(base.step.dtype)
    wide = kept.astype(jnp.float32)
    return dataclasses.replace(base, step=kept, zero=zero * (step / wide) - change / wide)


def _check_groups(base: GroupedInt, group_size: int) -> None:
    if group_size % base.group_size:
        raise ValueError(
            f"the base has groups of {base.group_size} inputs and the adapter groups of {group_size}, which have no "
            f"zero points of their own: give qalora() a multiple of {base.group_size} as its group_size"
        )


def qalora(
    rank: int = 64,
    alpha: float | None = 16,
    select: Pattern = LAYER_MATRICES,
    *,
    group_size: int = 32,
    pooling: str = "sum",
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    name: str = "qalora",
) -> Method:
    """QA-LoRA on every kernel that `select` matches.

    Args:
        rank: r; more than there are groups adds nothing.
        alpha: α of the scale α/r; None for `rank`.
        select: a pattern over the model's names (see `pj.select`); by default every matrix of the layers.
        group_size: inputs a group, a number that divides the kernel's inputs, and a multiple of the base's own.
        pooling: 'sum' (the paper), 'mean' (its code) or 'peft' (HF PEFT).
        dropout: the rate on the pooled input, active when a call's ports carry a `micro_key` (training).
        layers: restricts the adapters to these layer indices.
        dtype: of a and b.
        name: what tells this method from another of its kind in one chain; also seeds its draws.

    Raises:
        ValueError: on a rank, alpha, group size, pooling or dropout out of range; on groups that do not divide a
            kernel's inputs, or do not consist of whole groups of its base; on a pattern that matches nothing.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods, quant
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.random.normal(jax.random.key(1), (64, 48))}}
    >>> int4 = quant.quantise(quant.grouped(bits=4, group_size=32), "q_proj")
    >>> method = pj.chain(int4, methods.qalora(rank=2, select="q_proj"))
    >>> params, forward = method(jax.random.key(0), params, forward)
    >>> pj.count(params).trainable == 2 * (64 // 32 + 48)
    True
    >>> type(pj.merge(params)["q_proj"]["kernel"]).__name__
    'GroupedInt'
    """
    alpha = rank if alpha is None else alpha
    check_numbers((rank,), (alpha,))
    if group_size <= 0 or group_size != int(group_size):
        raise ValueError(f"group_size is {group_size}: give the number of inputs a group, 1 or more")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}: choose 'sum', 'mean' or 'peft'")
    check_dropout(dropout)

    def kernel(site: Site, leaf: Leaf) -> bool:
        return trees.is_matrix(site, leaf) and not site.embedding

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)
        found = trees.select(select, params, forward, layers=layers, adaptable=kernel)
        return trees.map_leaves(lambda path, leaf: _adapter(key, found[path], leaf) if path in found else leaf, params)

    def _adapter(key: Array, site: Site, leaf: Leaf) -> QALoRA:
        where, (inputs, outputs) = "/".join(site.path), site.matrix_shape(leaf)
        if inputs % group_size:
            raise ValueError(
                f"{where}: {inputs} inputs are not a whole number of groups of {group_size}: choose a group_size that "
                "divides them, or leave this leaf out of select"
            )
        if isinstance(base := innermost(leaf), GroupedInt):
            try:
                _check_groups(base, group_size)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        chosen = site.arranged(site.chosen)
        a = site.draw(key, name, _xavier, inputs // group_size, rank)
        a = jnp.where(chosen[..., None, None], a, 0).astype(dtype)
        b = jnp.zeros((*leaf.shape[:-2], rank, outputs), dtype)
        ranks = tuple(rank * hit for hit in site.chosen)
        scale = jnp.where(chosen, jnp.float32(alpha / rank), 0)
        return QALoRA(leaf, a, b, scale, group_size=group_size, pooling=pooling, ranks=ranks, name=name)

    return Method(init, lambda forward: dropping(forward, dropout, name))


# Drawn direction by direction, and scaled with one rounding (see `methods.lora`).
def _xavier(key: Array, groups: int, rank: int) -> Array:
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rank))
    one = jax.vmap(lambda k: jax.random.uniform(k, (groups,), minval=-1, maxval=1), out_axes=1)(keys)
    return one * math.sqrt(6 / (groups + rank))
