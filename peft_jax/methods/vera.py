"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv 2310.11454).

    h = W₀ x + Λ_b B Λ_d A x        here  y = x W + s · (drop(x) A ⊙ d) B ⊙ b,  with s = 1

A ``[in, r]`` and B ``[r, out]`` are random, frozen, and one pair for all layers and all adapted matrices; d ``[r]`` and
b ``[out]`` train, r + out numbers a matrix.  d starts at 0.1 and b at 0, so the model's output is unchanged at first.
VeRA has no α/r: the scale s is there for `pj.set_scale`, which turns the adapter off and on as it does any other.

The pair lies once in ``params["methods"]["vera"]``, counted among the frozen numbers; a call lends it to the leaves
(`peft_jax.trees.share`).  It is as large as the largest adapted matrix asks for; smaller ones take its first rows of A
and columns of B.

Source: sections 3.1 and 3.2, Table 6 for the start of d; HF PEFT tuners/vera/{model,layer}.py (the authors released no
code).

Departures: the pair comes from `seed` alone, not from the run's key and the method's name as every other draw here:
an adapter is then d, b and a number, in HF PEFT's files too, whose random stream this is, bit for bit.  The slices for
matrices of several shapes are HF PEFT's; it adapts linears alone, embeddings are ours.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Path
from peft_jax.methods.lora import QUERY_VALUE, check_dropout, check_numbers, dropped, dropping
from peft_jax.trees import Pattern, Site
from peft_jax.weights import Leaf, Weight, embed, linear, materialise, static, unembed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class VeRA(Weight):
    """``base + scale · down diag(d) up diag(b)``: d ``[*layers, r]``, b ``[*layers, out]``, scale ``[*layers]``.

    down ``[in or more, r]`` and up ``[r, out or more]`` are the paper's A and B, there during a call only, as are `key`
    and `rate`: dropout.  `ranks` is 0 for a layer that is not adapted, whose d and b are zeros: a fixed point, since
    each is the other's gradient.  `seed` is None for a pair that was not drawn here.
    """

    trains = ("d", "b")
    shares = ("down", "up")

    base: Any
    d: Any
    b: Any
    scale: Any
    down: Any = None
    up: Any = None
    key: Any = None
    rate: Any = None
    ranks: tuple[int, ...] = static(default=())
    seed: int | None = static(default=0)
    name: str = static(default="vera")

    def pair(self, dtype: Any) -> tuple[Array, Array]:
        """A and B as this matrix needs them."""
        if self.down is None:
            raise ValueError(f"a leaf of {self.name} lacks the pair that layers share: call the method's own forward")
        inputs, outputs = self.shape[-2:]
        return self.down[:inputs].astype(dtype), self.up[:, :outputs].astype(dtype)

    def axes(self) -> dict[str, Any]:
        return {"b": ("out",)}

    def materialise(self) -> Array:
        base = materialise(self.base)
        wide = np.promote_types(base.dtype, np.float32)
        (down, up), d, b = self.pair(wide), self._scaled_d(wide), self.b.astype(wide)
        change = jnp.einsum("ir,...r,ro,...o->...io", down, d, up, b)
        return (base.astype(wide) + change).astype(base.dtype)

    def linear(self, x: Array) -> Array:
        down, up = self.pair(x.dtype)
        return linear(x, self.base) + self._low_rank(dropped(x, self.key, self.rate) @ down, up)

    def embed(self, ids: Array) -> Array:
        rows = embed(ids, self.base)
        down, up = self.pair(rows.dtype)
        return rows + self._low_rank(embed(ids, down), up)

    def unembed(self, x: Array) -> Array:
        down, up = self.pair(x.dtype)
        return unembed(x, self.base) + _times(_times(x, self.b) @ up.T, self._scaled_d(x.dtype)) @ down.T

    def _low_rank(self, inner: Array, up: Array) -> Array:
        return _times(_times(inner, self._scaled_d(inner.dtype)) @ up, self.b)

    def _scaled_d(self, dtype: Any) -> Array:
        return self.d.astype(dtype) * self.scale.astype(dtype)[..., None]

    def trained_size(self) -> int:
        if self.d is None or self.b is None:  # the frozen half of a partition
            return 0
        return sum(r + self.b.shape[-1] for r in self.ranks if r)


def _times(x: Array, vector: Array) -> Array:
    return x * vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


def projections(seed: int, rank: int, inputs: int, outputs: int) -> dict[str, Array]:
    """The frozen pair, uniform with bound √(6 / fan-in): HF PEFT's numbers for a `projection_prng_key`, bit for bit.

    >>> from peft_jax.methods.vera import projections
    >>> {name: x.shape for name, x in projections(0, 2, 8, 4).items()}
    {'down': (8, 2), 'up': (2, 4)}
    """
    random = np.random.RandomState(seed)

    def uniform(outputs: int, inputs: int) -> Array:
        # torch's stream on a CPU, [out, in]: 24 bits a number, scaled by the fp32 bound in fp64, and rounded once.
        bits = random.randint(0, 2**32, (outputs, inputs), np.uint32) & 0xFFFFFF
        bound = np.float64(np.float32(math.sqrt(3) * (math.sqrt(2) / math.sqrt(inputs))))
        return jnp.asarray((bits * 2.0**-24 * (2 * bound) - bound).astype(np.float32).T)

    down = uniform(rank, inputs)  # before the other
    return {"down": down, "up": uniform(outputs, rank)}


def vera(
    rank: int = 256,
    select: Pattern = QUERY_VALUE,
    *,
    start: float = 0.1,
    seed: int = 0,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    name: str = "vera",
) -> Method:
    """VeRA on every kernel and embedding that `select` matches.

    Args:
        rank: r, of the pair that all share; the paper's are 256 to 1024.
        select: a pattern over the model's names (see `pj.select`); by default queries and values, as in the paper.
        start: of every d; smaller ones train slower and, on some of the paper's tasks, better.
        seed: of the pair.
        dropout: the rate on the adapter's input, active when a call's ports carry a `micro_key` (training).
        layers: restricts the adapters to these layer indices.
        dtype: of d and b; the pair is fp32, and cast to the activations' dtype in a call.
        name: what tells this method from another of its kind in one chain.

    Raises:
        ValueError: on a rank, seed or dropout out of range, or a pattern that matches nothing.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.numpy.eye(64)}, "o_proj": {"kernel": jax.numpy.eye(64)}}
    >>> params, forward = methods.vera(rank=16)(jax.random.key(0), params, forward)
    >>> pj.count(params)[:2] == (16 + 64, 2 * 64 * 64 + 2 * 16 * 64)
    True
    """
    check_numbers((rank,))
    if not (0 <= seed < 2**32 and seed == int(seed)):
        raise ValueError(f"seed must be an integer from 0 to 2³² - 1, got {seed}")
    check_dropout(dropout)

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)
        found = trees.select(select, params, forward, layers=layers)

        def adapt(path: Path, leaf: Leaf) -> Leaf:
            return _adapter(found[path], leaf) if path in found else leaf

        shapes = [site.matrix_shape(leaf) for path, leaf in trees.leaves(params).items() if (site := found.get(path))]
        inputs, outputs = map(max, zip(*shapes, strict=True))
        pair = projections(seed, rank, inputs, outputs)
        return trees.map_leaves(adapt, params) | {"methods": {**params.get("methods", {}), name: pair}}

    def _adapter(site: Site, leaf: Leaf) -> VeRA:
        chosen = site.arranged(site.chosen)
        d = jnp.full((*chosen.shape, rank), jnp.where(chosen, start, 0)[..., None], dtype)
        b = jnp.zeros((*leaf.shape[:-2], leaf.shape[-1]), dtype)
        ranks = tuple(rank * hit for hit in site.chosen)
        return VeRA(leaf, d, b, jnp.ones(chosen.shape), ranks=ranks, seed=seed, name=name)

    def wrap(forward: Forward) -> Forward:
        return dropping(forward.rewritten(lambda params, ports: (trees.share(params), ports)), dropout, name)

    return Method(init, wrap)
