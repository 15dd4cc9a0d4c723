"""LoftQ: a quantised base and an adapter that begin, together, at the weight (Li et al. 2023, arXiv 2310.08659).

    Q_t = q(W − s · A_{t−1} B_{t−1}),    s · A_t B_t = SVD_r(W − Q_t),    t = 1 … steps,    A_0 B_0 = 0

Plain QLoRA begins at q(W), this at the ``Q + s · A B`` that the alternation finds, which is nearer to W.  Each of A and
B takes the square root of the r largest singular values.  The first step gains most; later ones may lose some.

Source: Algorithm 1; yxli2123/LoftQ, utils.py; HF PEFT utils/loftq_utils.py, whose loop this is.

Departures: the authors' code and PEFT leave the scale s = α/r out, and so begin at the weight only where it is 1; here
A and B are divided by its root.  The formats are this library's own (the authors' code has its own quantile table).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Path
from peft_jax.methods.lora import lora, low_rank
from peft_jax.on_disk import is_on_disk
from peft_jax.quant.frozen import Frozen
from peft_jax.quant.method import Format, check
from peft_jax.trees import Pattern, Site
from peft_jax.views import View
from peft_jax.weights import Leaf, is_weight, materialise


def loftq(
    format: Format,
    rank: int = 8,
    alpha: float | None = None,
    select: Pattern = trees.LAYER_MATRICES,
    *,
    steps: int = 1,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    name: str = "loftq",
) -> Method:
    """Quantises every weight that `select` matches and adapts it by LoRA, so that both together begin near the weight.

    `pj.strip` gives the quantised base Q, which is not the nearest to W by itself.

    Args:
        format: `nf4(…)`, `int8()`, `grouped(…)` and so on.
        rank, alpha, dropout, dtype: as in `methods.lora`.
        select: a pattern over the model's names (see `pj.select`); by default every matrix of the layers.
        steps: T, how often to quantise and to decompose; the paper's is 5, its code's and PEFT's default 1.
        name: what tells this method from another of its kind in one chain.

    Raises:
        ValueError: if steps is below 1, or the rank above a matrix's own; as `quant.quantise` and `methods.lora` do.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import quant
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> w = jax.random.normal(jax.random.key(1), (64, 64))
    >>> method = quant.loftq(quant.nf4(), rank=8, select="q_proj", steps=2)
    >>> params, forward = method(jax.random.key(0), {"q_proj": {"kernel": w}}, forward)
    >>> norm = lambda leaf: jax.numpy.linalg.norm(pj.materialise(leaf) - w)
    >>> bool(norm(params["q_proj"]["kernel"]) < 0.9 * norm(quant.nf4().quantise(w)))
    True
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: give how often to quantise and to decompose, 1 or more")
    options: dict[str, Any] = {"alpha": alpha, "select": select, "dropout": dropout, "dtype": dtype, "name": name}
    plain = lora(rank, **options)
    scale = float((rank if alpha is None else alpha) / rank)

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)
        found = trees.select(select, params, forward)
        begun: dict[Path, tuple[Array, Array]] = {}

        def store(path: Path, leaf: Leaf) -> Leaf:
            if path not in found:
                return leaf
            site, where = found[path], "/".join(path)
            check(site, leaf, name)
            view = leaf if isinstance(leaf, View) else None
            leaf = materialise(leaf) if is_on_disk(leaf) or view is not None else leaf
            if is_weight(leaf):
                raise ValueError(f"{where} is adapted already: begin with loftq, and adapt what it makes")
            if rank > min(site.matrix_shape(leaf)):
                raise ValueError(f"{where} is {site.matrix_shape(leaf)}: it has no {rank} directions to start from")
            try:
                base, a, b = alternate(format, leaf, rank, steps, scale, transposed=not site.embedding)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            begun[path] = a, b
            return base if view is None else view.over(base)

        def start(key: Array, site: Site, leaf: Leaf, rank: int, scale: Array, name: str) -> tuple[Array, Array]:
            return begun[site.path]

        quantised = trees.map_leaves(store, params)
        return low_rank(start, rank=rank, **options).init(key, quantised, forward)

    return Method(init, plain.wrap)


def alternate(
    format: Format, w: Array, rank: int, steps: int = 1, scale: float = 1.0, *, transposed: bool = True
) -> tuple[Frozen, Array, Array]:
    """``(Q, A, B)`` of one leaf, stacked layers or one, with ``Q + scale · A B`` near `w`."""
    left = w
    for step in range(steps):
        base: Any = format.quantise(left, transposed=transposed)
        a, b = _principal(w, base, rank, scale)
        if step + 1 < steps:
            left = _without(w, a, b, scale)
    return base, a, b


@functools.partial(jax.jit, static_argnums=(2, 3))
def _principal(w: Array, base: Frozen, rank: int, scale: float) -> tuple[Array, Array]:
    def one(pair: tuple[Array, Frozen]) -> tuple[Array, Array]:
        array, stored = (materialise(x).astype(jnp.float32) for x in pair)
        u, s, vt = jnp.linalg.svd(array - stored, full_matrices=False)
        root = jnp.sqrt(s[:rank] / scale)
        return u[:, :rank] * root[None, :], root[:, None] * vt[:rank]

    each = one
    for _ in w.shape[:-2]:  # a matrix at a time
        each = functools.partial(jax.lax.map, each)
    return each((w, base))


@functools.partial(jax.jit, static_argnums=3)
def _without(w: Array, a: Array, b: Array, scale: float) -> Array:
    return (w.astype(jnp.float32) - scale * (a @ b)).astype(w.dtype)
