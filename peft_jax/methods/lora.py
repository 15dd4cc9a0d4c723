"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

    y = x W + s · drop(x) A B        s = α/r, or α/√r (rsLoRA, arXiv 2312.03732)

W ``[in, out]`` is frozen; A ``[in, r]`` and B ``[r, out]`` train (the paper's matrices, transposed).  A kernel starts
with A ~ U(±1/√in), B = 0; an embedding with A = 0, B ~ N(0, 1), so the model's output is unchanged at the start
either way.

Source: sections 4.1 and 4.2; microsoft/LoRA, loralib/layers.py.

Departures: the paper says A is Gaussian, its code draws Kaiming-uniform with a = √5, which is U(±1/√in): we follow the
code.  Dropout, which the paper applies to the adapter's input, is left out of embeddings, whose input is an index.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Path, Ports, chain
from peft_jax.methods.unfreeze import unfreeze
from peft_jax.trees import Pattern, Site
from peft_jax.weights import Leaf, Weight, embed, linear, materialise, static, unembed

# The paper's choice, in the spelling of every family here; a projection of positions (DeBERTa) is neither.
QUERY_VALUE = r"(^|(?<!\.pos)[._])(q|v|query|value)(_proj)?$"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoRA(Weight):
    """``base + scale · a b``: a ``[*layers, in, r]``, b ``[*layers, r, out]``, scale ``[*layers]``.

    `ranks` holds each layer's rank; smaller ranks are padded with zeros in both a and b, which is a fixed point of
    every optimiser with decay.  `key` and `rate` are there during a call only: dropout.
    """

    trains = ("a", "b")

    base: Any
    a: Any
    b: Any
    scale: Any
    key: Any = None
    rate: Any = None
    ranks: tuple[int, ...] = static(default=())
    name: str = static(default="lora")

    def axes(self) -> dict[str, Any]:
        return {"a": ("in", None), "b": (None, "out")}

    def materialise(self) -> Array:
        return plus_product(materialise(self.base), self.scale, self.a, self.b)

    def linear(self, x: Array) -> Array:
        return linear(x, self.base) + scaled_product(
            dropped(x, self.key, self.rate) @ self.a.astype(x.dtype), self.scale, self.b
        )

    def embed(self, ids: Array) -> Array:
        rows = embed(ids, self.base)
        return rows + scaled_product(embed(ids, self.a).astype(rows.dtype), self.scale, self.b)

    def unembed(self, x: Array) -> Array:
        return unembed(x, self.base) + scaled_product(x @ self.b.T.astype(x.dtype), self.scale, self.a.T)

    def trained_size(self) -> int:
        if self.a is None or self.b is None:  # the frozen half of a partition
            return 0
        inputs, outputs = self.a.shape[-2], self.b.shape[-1]
        return sum(self.ranks) * (inputs + outputs)


def plus_product(base: Array, scale: Array, a: Array, b: Array) -> Array:
    """``base + scale · a b`` with its leading axes, rounded once to the base's dtype."""
    wide = np.promote_types(base.dtype, np.float32)
    product = scale.astype(wide)[..., None, None] * (a.astype(wide) @ b.astype(wide))
    return (base.astype(wide) + product).astype(base.dtype)


def scaled_product(inner: Array, scale: Array, outer: Array) -> Array:
    """``scale · inner outer`` in the dtype of `inner`: the second half of a product of low rank."""
    return (inner * scale.astype(inner.dtype)) @ outer.astype(inner.dtype)


def dropped(x: Array, key: Array | None, rate: Array | None) -> Array:
    """Dropout, scaled so that the expectation is `x`; without a key, `x` itself."""
    if key is None or rate is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), jnp.zeros((), x.dtype))


def check_numbers(ranks: Sequence[float], alphas: Sequence[float] = ()) -> None:
    for rank in ranks:
        if rank <= 0 or rank != int(rank):
            raise ValueError(f"rank must be a positive integer, got {rank}")
    for alpha in alphas:
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"alpha must be positive, got {alpha}")


def check_dropout(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {rate}")


def dropping(forward: Forward, rate: float, name: str) -> Forward:
    """A forward function that hands each leaf of a method a dropout key for the call, and the rate.

    The leaves have `key`, `rate` and, with their leading axes alone, `scale`; ports without a `micro_key` drop nothing.
    """

    def drop(params: Params, ports: Ports) -> tuple[Params, Ports]:
        if ports.micro_key is None:
            return params, ports

        def give(path: Path, w: Any) -> Weight:
            keys = trees.site(path, forward.spec).keys(ports.micro_key, name)
            return dataclasses.replace(w, key=keys, rate=jnp.full(w.scale.shape, rate, jnp.float32))

        return trees.rewrite(params, name, give), ports

    return forward.rewritten(drop) if rate else forward


def lora(
    rank: int = 8,
    alpha: float | None = None,
    select: Pattern = QUERY_VALUE,
    *,
    dropout: float = 0.0,
    bias: str = "none",
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    name: str = "lora",
) -> Method:
    """LoRA on every kernel and embedding that `select` matches.

    Args:
        rank: r.  A rank above a matrix's own warns.
        alpha: α; by default `rank`, which makes the scale 1.
        select: a pattern over the model's names (see `pj.select`); by default queries and values, as in the paper.
        dropout: the rate on the adapter's input, active when a call's ports carry a `micro_key` (training).
        bias: 'none', 'all' (every bias trains) or 'lora_only' (those of the adapted modules).
        rslora: the scale is α/√r instead of α/r.
        rank_pattern, alpha_pattern: exceptions, by a pattern searched for in the names; the first that matches counts.
        layers: restricts the adapters to these layer indices.
        dtype: of a and b; fp32 even on a base in half precision, as HF PEFT has it.
        name: what tells this method from another of its kind in one chain; also seeds its draws.

    Raises:
        ValueError: on a rank, alpha, dropout or bias out of range, or a pattern that matches nothing.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.numpy.eye(64)}, "o_proj": {"kernel": jax.numpy.eye(64)}}
    >>> params, forward = methods.lora(rank=4, alpha=8, select="q_proj")(jax.random.key(0), params, forward)
    >>> pj.count(params).trainable == 4 * (64 + 64)
    True
    """
    return low_rank(
        _start,
        rank=rank,
        alpha=alpha,
        select=select,
        dropout=dropout,
        bias=bias,
        rslora=rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        layers=layers,
        dtype=dtype,
        name=name,
    )


# (key, site, leaf, rank, scale, name) -> (a, b): how an adapter starts.  PiSSA and OLoRA bring their own, and with it
# (leaf, a, b, scale, name) -> base: what is left of the leaf once the adapter has taken its part.
Start = Callable[[Array, Site, Leaf, int, Array, str], tuple[Array, Array]]
Rest = Callable[[Leaf, Array, Array, Array, str], Leaf]


def _all_of_it(leaf: Leaf, a: Array, b: Array, scale: Array, name: str) -> Leaf:
    return leaf


def low_rank(
    start: Start,
    rest: Rest = _all_of_it,
    *,
    rank: int,
    alpha: float | None,
    select: Pattern,
    dropout: float = 0.0,
    bias: str = "none",
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    name: str = "lora",
) -> Method:
    """LoRA with a start of one's own: what `lora`, `pissa` and `olora` share.  Arguments as in `lora`."""
    alpha = float(rank if alpha is None else alpha)
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    check_numbers((rank, *ranks.values()), (alpha, *alphas.values()))
    check_dropout(dropout)
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias is {bias!r}: choose 'none', 'all' or 'lora_only'")

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)
        found = trees.select(select, params, forward, layers=layers)
        adapted = [n for site in found.values() for n, hit in zip(site.names, site.chosen, strict=True) if hit]
        for pattern in (*ranks, *alphas):
            if not any(re.search(pattern, n) for n in adapted):
                raise ValueError(
                    f"the exception {pattern!r} matches no adapted leaf (their names look like {adapted[0]})"
                )

        def adapt(path: Path, leaf: Leaf) -> Leaf:
            if path not in found:
                return leaf
            site = found[path]
            chosen = [r * hit for r, hit in zip(_by_name(site.names, ranks, rank), site.chosen, strict=True)]
            scales = [
                a / (math.sqrt(r) if rslora else r) if r else 0.0
                for a, r in zip(_by_name(site.names, alphas, alpha), chosen, strict=True)
            ]
            return _adapter(start, rest, key, site, leaf, tuple(chosen), scales, dtype, name)

        return trees.map_leaves(adapt, params)

    adapted = Method(init, lambda forward: dropping(forward, dropout, name))
    if bias == "none":
        return adapted
    return chain(_biases(select, layers, bias, f"{name}.bias"), adapted)


def _by_name(names: Sequence[str], exceptions: Mapping[str, Any], default: Any) -> list[Any]:
    return [next((v for p, v in exceptions.items() if re.search(p, name)), default) for name in names]


def _adapter(
    start: Start,
    rest: Rest,
    key: Array,
    site: Site,
    leaf: Leaf,
    ranks: tuple[int, ...],
    scales: list[float],
    dtype: Any,
    name: str,
) -> LoRA:
    """The leaf of one site; ranks that differ by layer are padded to the largest."""
    inputs, outputs = site.matrix_shape(leaf)
    rank = max(ranks)
    if rank > min(inputs, outputs):
        warnings.warn(
            f"{site.names[0]} is a {inputs} x {outputs} matrix: rank {rank} is above its own", UserWarning, stacklevel=2
        )
    scale = site.arranged(scales, jnp.float32)
    a, b = start(key, site, leaf, rank, scale, name)
    if len(set(ranks)) > 1:
        used = jax.lax.broadcasted_iota(jnp.int32, (*site.lead, rank), len(site.lead)) < site.arranged(ranks)[..., None]
        a = jnp.where(used[..., None, :], a, 0)
        b = jnp.where(used[..., None], b, 0)
    a, b = a.astype(dtype), b.astype(dtype)
    return LoRA(rest(leaf, a, b, scale, name), a, b, scale, ranks=ranks, name=name)


def _start(key: Array, site: Site, leaf: Leaf, rank: int, scale: Array, name: str) -> tuple[Array, Array]:
    inputs, outputs = site.matrix_shape(leaf)
    lead = leaf.shape[:-2]
    if site.embedding:
        return jnp.zeros((*lead, inputs, rank)), site.draw(key, name, _gaussian_rows, rank, outputs)
    return site.draw(key, name, _kaiming_columns, inputs, rank), jnp.zeros((*lead, rank, outputs))


# Drawn direction by direction: a smaller rank draws the beginning of a larger one, so padding changes no number.
def _kaiming_columns(key: Array, inputs: int, rank: int) -> Array:
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rank))
    # ±1 is drawn exactly, and scaled with one rounding: the same bits from every compiler.
    one = jax.vmap(lambda k: jax.random.uniform(k, (inputs,), minval=-1, maxval=1), out_axes=1)(keys)
    return one * (1 / math.sqrt(inputs))


def _gaussian_rows(key: Array, rank: int, outputs: int) -> Array:
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rank))
    return jax.vmap(lambda k: jax.random.normal(k, (outputs,)))(keys)


def _biases(select: Pattern, layers: Sequence[int] | None, bias: str, name: str) -> Method:
    """Trains every bias, or those of the modules that `select` adapts."""

    def init(key: Array, params: Params, forward: Forward) -> Params:
        if bias == "all":
            return unfreeze(r"\.bias$", name=name).init(key, params, forward)
        found = trees.select(select, params, forward, layers=layers)
        modules = {n for site in found.values() for n, hit in zip(site.names, site.chosen, strict=True) if hit}

        def bias_of_an_adapted_module(n: str) -> bool:
            return n.endswith(".bias") and n.removesuffix(".bias") in modules

        return unfreeze(bias_of_an_adapted_module, name=name).init(key, params, forward)

    return Method(init, unfreeze(".", name=name).wrap)
