"""GPTQ: rounding that knows what the weight will meet (Frantar et al. 2022, arXiv 2210.17323).

    H = Σ (2/n) xᵀx over the n inputs x of the kernel,  + damping · mean(diag H) on its diagonal
    H⁻¹ = UᵀU, U upper triangular; then for each input i = 1 … in, in order, of all outputs at once:
    q_i = clip(round(w_i / step) + zero),  e = (w_i − step · (q_i − zero)) / U_ii,  w_j ← w_j − U_ij e for j > i

The numbers not rounded yet make up for the error of those that are, so that ``‖X W − X Ŵ‖²``, and not ``‖W − Ŵ‖²``, is
kept small.  The result is a `GroupedInt`, as `quant.grouped` makes it by rounding to the nearest.

Source: Algorithm 1 and section 4, "grouping"; IST-DASLab/gptq, gptq.py and llama.py; AutoGPTQ 0.7,
quantization/gptq.py.

Departures: a group's range is taken from the weights as they are when its first input is reached, as the paper has it;
the authors' code looks at weights that lack the updates of the current block (the two are alike where a group begins at
a block).  U comes from one Cholesky factor of H in reverse order, without inverting H first: the same matrix.  Layers
are calibrated by running the whole model once for each, so that nothing need be known of the model: what a layer meets
is the same.  All kernels of a layer are measured before any is rounded (the code's default; its `true-sequential` is
not here).
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Path
from peft_jax.quant.frozen import refuse_unfinite
from peft_jax.quant.grouped import Format, GroupedInt, fit_range, grouped, pack
from peft_jax.quant.method import check
from peft_jax.quant.observe import Place, as_calibration, gram, measure
from peft_jax.trees import Pattern, Site, layer_of
from peft_jax.views import view_of
from peft_jax.weights import Leaf, materialise, rebase

# -- one matrix -------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How `solve` rounds: `order` is by falling diagonal of H if set, else as the inputs come."""

    store: Format
    damping: float
    block_size: int
    act_order: bool


def hessian(x: Float[Array, "*rows inputs"]) -> Float[Array, "inputs inputs"]:
    """``(2/n) Σ xᵀx`` of a kernel's n inputs, in fp32."""
    rows = x.reshape(-1, x.shape[-1])
    return gram(rows) * (2 / len(rows))


def solve(
    w: Float[Array, "inputs outputs"],
    h: Float[Array, "inputs inputs"],
    *,
    bits: int = 4,
    group_size: int | None = 128,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    dtype: Any = jnp.float32,
) -> GroupedInt:
    """Rounds one kernel, given the Hessian of its inputs (`hessian`); arguments as in `gptq`.

    Raises:
        ValueError: if the groups do not divide the inputs, or H or the kernel is not finite.

    >>> import jax
    >>> from peft_jax.quant.gptq import hessian, solve
    >>> x, w = (jax.random.normal(jax.random.key(i), (64, 32)) for i in range(2))
    >>> solve(w[:32], hessian(x), bits=3, group_size=16).shape
    (32, 32)
    """
    form = _form(bits, group_size, damping, block_size, act_order, dtype)
    return _rounded(form, w, h)


def _form(bits: int, group_size: int | None, damping: float, block_size: int, act_order: bool, dtype: Any) -> Form:
    store = grouped(bits, 1 if group_size is None else group_size, dtype)
    if not damping > 0:
        raise ValueError(f"damping is {damping}: give a share of H's mean diagonal, above 0")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: give how many inputs are worked on at once, 1 or more")
    return Form(store._replace(group_size=0) if group_size is None else store, damping, block_size, act_order)


def _rounded(form: Form, w: Array, h: Array) -> GroupedInt:
    inputs = w.shape[0]
    store = form.store._replace(group_size=form.store.group_size or inputs)  # 0: the whole width
    if inputs % store.group_size:
        raise ValueError(
            f"{inputs} inputs are not a whole number of groups of {store.group_size}: choose a group_size that divides "
            "them, or leave this leaf out of select"
        )
    codes, step, zero = _solve(form._replace(store=store), w, h)
    refuse_unfinite((step, zero, h))
    return GroupedInt(codes, step, zero, tuple(w.shape), str(w.dtype), store.bits, store.group_size)


@functools.partial(jax.jit, static_argnums=0)
def _solve(form: Form, w: Array, h: Array) -> tuple[Array, Array, Array]:
    """One layer's codes, packed, and their groups' steps and zero points."""
    inputs, outputs = w.shape
    bits, size, dtype = form.store
    dead = jnp.diagonal(h) == 0
    w, h = jnp.where(dead[:, None], 0, w.astype(jnp.float32)), h + jnp.diag(dead.astype(jnp.float32))
    h += jnp.eye(inputs) * (form.damping * jnp.diagonal(h).mean())
    order = jnp.argsort(-jnp.diagonal(h)) if form.act_order else jnp.arange(inputs)
    upper = _factor(h[order][:, order])
    first = _fit(w.reshape(-1, size, outputs), bits, dtype)  # of all groups, before any update

    # Whole blocks: an input beyond the last has no weight, and nothing to do with the others.
    block = min(form.block_size, inputs)
    beyond = -inputs % block
    w = jnp.pad(w[order], ((0, beyond), (0, 0)))
    upper = jnp.pad(upper, ((0, beyond), (0, beyond))) + jnp.diag(
        (jnp.arange(inputs + beyond) >= inputs).astype(jnp.float32)
    )
    order = jnp.pad(order, (0, beyond), mode="edge")

    def one_block(carry: Any, start: Array) -> Any:
        w, ranges = carry
        own = jax.lax.dynamic_slice(upper, (start, 0), (block, inputs + beyond))
        inside = jax.lax.dynamic_slice(own, (0, start), (block, block))

        def one_input(i: Array, carry: Any) -> Any:
            here, errors, codes, (step, zero) = carry
            at = start + i
            group = order[at] // size

            def fit() -> Any:
                # What the block has left to do to the group's rows that lie beyond it, or in it and not yet reached.
                rows = jax.lax.dynamic_slice(w, (at, 0), (size, outputs))
                left = jax.lax.dynamic_slice(own, (0, at), (block, size))
                new = _fit((rows - jnp.matmul(left.T, errors, precision="highest"))[None], bits, dtype)
                return step.at[group].set(new[0][0]), zero.at[group].set(new[1][0])

            if not form.act_order:
                step, zero = jax.lax.cond((at % size == 0) & (at < inputs), fit, lambda: (step, zero))
            code = jnp.clip(jnp.round(here[i] / step[group]) + zero[group], 0, 2**bits - 1)
            error = (here[i] - step[group] * (code - zero[group])) / inside[i, i]
            here -= inside[i][:, None] * error[None, :]
            return here, errors.at[i].set(error), codes.at[i].set(code.astype(jnp.uint8)), (step, zero)

        here = jax.lax.dynamic_slice(w, (start, 0), (block, outputs))
        blank = (here, jnp.zeros_like(here), jnp.zeros(here.shape, jnp.uint8), ranges)
        _, errors, codes, ranges = jax.lax.fori_loop(0, block, one_input, blank)
        return (w - jnp.matmul(own.T, errors, precision="highest"), ranges), codes

    (_, (step, zero)), codes = jax.lax.scan(one_block, (w, first), jnp.arange(0, inputs + beyond, block))
    codes = codes.reshape(-1, outputs)[:inputs]
    if form.act_order:
        codes = jnp.zeros_like(codes).at[order[:inputs]].set(codes)
    return pack(codes, bits), step.astype(dtype), zero.astype(dtype)


def _fit(rows: Float[Array, "groups size outputs"], bits: int, dtype: Any) -> tuple[Array, Array]:
    """Steps, rounded as they will be kept, and zero points, of groups."""
    step, zero = fit_range(rows.min(1), rows.max(1), bits)
    return step.astype(dtype).astype(jnp.float32), zero


def _factor(h: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The upper U with UᵀU = H⁻¹: where J turns the order round and J H J = L Lᵀ, it is J L⁻¹ J."""
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    inverse = jax.lax.linalg.triangular_solve(lower, jnp.eye(len(h)), left_side=True, lower=True)
    return inverse[::-1, ::-1]


# -- a model ----------------------------------------------------------------------------------------------------------


class Error(NamedTuple):
    """What rounding one layer of a leaf costs: ``‖X (Ŵ − W)‖ / ‖X W‖`` on the calibration batches, by GPTQ and by
    rounding to the nearest in the same format."""

    name: str
    gptq: float
    nearest: float


def gptq(
    batches: Iterable[Any],
    bits: int = 4,
    group_size: int | None = 128,
    select: Pattern = trees.LAYER_MATRICES,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    dtype: Any = jnp.float32,
    passes: int | None = None,
    report: Callable[[Error], Any] | None = None,
    name: str = "gptq",
) -> Method:
    """Stores every kernel that `select` matches as a `GroupedInt`, rounded so that its outputs change least.

    Layers are taken in order, each measured in the model whose earlier layers are rounded already.  What adapts a leaf
    goes on adapting it, and is left out of what is measured.

    Args:
        batches: what to calibrate on: token arrays ``[batch, time]``, `Inputs`, or dicts of their fields.  Padding
            (`mask`, `segments`) does not count.  The paper takes 128 rows of 2,048 tokens.
        bits, dtype: as in `quant.grouped`.
        group_size: inputs with one step; None for one step an output.
        select: a pattern over the model's names (see `pj.select`); by default every matrix of the layers.
        damping: the share of the mean diagonal that is added to H's diagonal.
        block_size: inputs whose updates of later ones are done at once; changes time, and the result by rounding alone.
        act_order: takes inputs by falling diagonal of H, within groups that are fixed beforehand, so that a group's
            inputs stay together.
        passes: how many times the model is run over the batches.  By default once for each layer, as published: one
            layer's Hessians are held at a time.  Less takes less time, and several layers, held at once, are measured
            in the model as it was before any of them was rounded; 1 measures the unrounded model alone.
        report: is given an `Error` for each layer of a leaf.
        name: what messages call it.

    Raises:
        ValueError: on a number out of range; without batches, or with padding alone; as `quant.quantise` does; on a
            kernel that the batches do not reach; on an embedding, which has rows and no inputs (so a tied head stays
            as it is).

    >>> import jax, peft_jax as pj
    >>> from peft_jax import quant
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["up"]["kernel"]))
    >>> x, w = (jax.random.normal(jax.random.key(i), (64, 32)) for i in range(2))
    >>> errors = []
    >>> method = quant.gptq([x], bits=3, group_size=32, select="up", report=errors.append)
    >>> params, forward = method(jax.random.key(0), {"up": {"kernel": w[:32]}}, forward)
    >>> type(params["up"]["kernel"]).__name__, errors[0].gptq < errors[0].nearest
    ('GroupedInt', True)
    """
    form = _form(bits, group_size, damping, block_size, act_order, dtype)
    if passes is not None and passes < 1:
        raise ValueError(f"passes is {passes}: give how often the model is run over the batches, 1 or more")
    inputs = as_calibration(batches)

    def init(key: Array, params: Params, forward: Forward) -> Params:
        found = trees.select(select, params, forward)
        leaves = trees.leaves(params)
        for path, site in found.items():
            check(site, leaves[path], name)
            if view_of(leaves[path]) is not None:
                raise ValueError(f"{'/'.join(path)} is no matrix of its own: use nf4(), int8() or grouped() for it")
            if site.experts:
                raise ValueError(
                    f"{'/'.join(path)} holds experts, whose inputs are not measured: use nf4(), int8() or grouped()"
                )
            if site.embedding:
                raise ValueError(f"{'/'.join(path)} is an embedding, which has no inputs: use nf4() or int8() for it")
        base = trees.strip(params)  # what is measured, and rounded on the way
        base = trees.map_leaves(lambda path, leaf: jnp.copy(materialise(leaf)) if path in found else leaf, base)
        made: dict[Place, GroupedInt] = {}
        stages = _stages(found, passes)
        for number, stage in enumerate(stages):
            for place, h in zip(stage, measure(forward, base, inputs, found, stage), strict=True):
                site, array = found[place.path], trees.leaves(base)[place.path]
                w = array[place.layer] if site.stacked else array
                if not isinstance(h, jax.core.Tracer) and not h.any():
                    raise ValueError(
                        f"{site.names[place.layer]} meets no number but 0 in these batches: leave it out of select, or "
                        "calibrate on batches that reach it"
                    )
                try:
                    made[place] = _rounded(form, w, h)
                except ValueError as error:
                    raise ValueError(f"{'/'.join(place.path)}: {error}") from None
                if report is not None:
                    nearest = made[place].like(w)
                    report(Error(site.names[place.layer], *(float(_lost(x, w, h)) for x in (made[place], nearest))))
            if number + 1 < len(stages):
                base = _written(base, found, {place: made[place] for place in stage})

        def store(path: Path, leaf: Leaf) -> Leaf:
            if path not in found:
                return leaf
            layers = [made[Place(path, index)] for index in range(len(found[path].names))]
            whole = jax.tree.map(lambda *x: jnp.stack(x), *layers) if found[path].stacked else layers[0]
            return rebase(leaf, lambda _: whole)

        return trees.map_leaves(store, params)

    return Method(init)


def _stages(sites: Mapping[Path, Site], passes: int | None) -> list[list[Place]]:
    """What is rounded after each pass: layers in order, an encoder's before its decoder's, what is in no layer last."""

    def depth(name: str) -> tuple[bool, float]:
        layer = layer_of(name)
        return "decoder" in name or layer is None, float("inf") if layer is None else layer

    at: dict[tuple[bool, float], list[Place]] = {}
    for path, site in sites.items():
        for index, name in enumerate(site.names):
            at.setdefault(depth(name), []).append(Place(path, index))
    order = sorted(at)
    parts = np.array_split(np.arange(len(order)), min(passes or len(order), len(order)))
    return [[place for i in part for place in at[order[i]]] for part in parts]


def _written(params: Params, sites: Mapping[Path, Site], made: Mapping[Place, GroupedInt]) -> Params:
    """The tree with what was rounded in place of what was there, whose buffers it takes."""

    def write(path: Path, leaf: Leaf) -> Leaf:
        for place, small in made.items():
            if place.path == path:
                leaf = _put(leaf, small, place.layer) if sites[path].stacked else jax.jit(materialise)(small)
        return leaf

    return trees.map_leaves(write, params)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Array, small: GroupedInt, index: Any) -> Array:
    return stack.at[index].set(small.dequantise())


@jax.jit
def _lost(small: GroupedInt, w: Array, h: Array) -> Array:
    """``‖X (Ŵ − W)‖ / ‖X W‖``, from ``XᵀX`` alone."""
    wide = w.astype(jnp.float32)

    def size(d: Array) -> Array:
        return jnp.sqrt((d * jnp.matmul(h, d, precision="highest")).sum())

    return size(small.dequantise().astype(jnp.float32) - wide) / size(wide)
