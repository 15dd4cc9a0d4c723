"""Products with the matrices of many experts, of which each token meets a few.

A leaf of experts is ``[experts, in, out]``: one more leading axis behind the layers', on every array of a `Weight`.
Tokens are sorted by expert and laid out in blocks of rows, each of one expert alone (`Route`).  A block's product is
`linear` on that expert's slice of the leaf, so whatever a leaf does (adapters, few bits, dropout) it does to experts.

No token is dropped, and no expert's matrix is multiplied by tokens that did not choose it.  The price is the empty rows
at each expert's end: of R = tokens · k choices, at most half as many again are computed.  Blocks come one after
another; the more experts, the smaller they are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peft_jax import trees
from peft_jax.weights import Leaf, linear

LARGEST = 512  # rows a block: more would not make a product faster


class Route(NamedTuple):
    """Where the choices of a batch's tokens lie.

    tokens    int32 ``[blocks, rows]``: the token of each row; one beyond the last where the row is empty
    experts   int32 ``[blocks]``: the expert of each block
    rows      int32 ``[tokens, k]``: the row of each token's choices, counted through all blocks
    """

    tokens: Array
    experts: Array
    rows: Array

    def spread(self, x: Float[Array, "tokens width"]) -> Float[Array, "blocks rows width"]:
        """The tokens' numbers in their blocks, zeros in empty rows."""
        return jnp.take(x, self.tokens, axis=0, mode="fill", fill_value=0)

    def gather(
        self, y: Float[Array, "blocks rows width"], shares: Float[Array, "tokens k"]
    ) -> Float[Array, "tokens width"]:
        """The sum of each token's choices, each by its share, added up in fp32."""
        mine = y.reshape(-1, y.shape[-1])[self.rows].astype(jnp.float32)
        return jnp.einsum("tkd,tk->td", mine, shares.astype(jnp.float32)).astype(y.dtype)


def block_size(choices: int, experts: int) -> int:
    """Rows a block: the largest power of two that is at most half an expert's even part of the choices."""
    part = max(1, choices // (2 * experts))
    return min(LARGEST, 1 << (part.bit_length() - 1))


def route(chosen: Int[Array, "tokens k"], experts: int) -> Route:
    """Lays out each token's chosen experts.

    >>> import jax.numpy as jnp
    >>> route(jnp.array([[2], [0], [2]]), experts=3).experts.tolist()
    [0, 2, 2]
    """
    tokens, k = chosen.shape
    flat = chosen.reshape(-1).astype(jnp.int32)
    rows = block_size(flat.size, experts)
    blocks = (flat.size + min(experts, flat.size) * (rows - 1)) // rows  # the most that any choice needs
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1)
    needed = -(-counts // rows)
    ends = jnp.cumsum(needed)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    mine = flat[order]
    among = jnp.arange(flat.size, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[mine]
    places = jnp.zeros_like(flat).at[order].set((ends - needed)[mine] * rows + among)
    held = jnp.full(blocks * rows, tokens, jnp.int32).at[places].set(jnp.arange(flat.size, dtype=jnp.int32) // k)
    whose = jnp.searchsorted(ends, jnp.arange(blocks, dtype=jnp.int32), side="right").astype(jnp.int32)
    return Route(held.reshape(blocks, rows), jnp.minimum(whose, experts - 1), places.reshape(tokens, k))


def routed(
    x: Float[Array, "blocks rows inputs"], w: Leaf, experts: Int[Array, "blocks"]
) -> Float[Array, "blocks rows outputs"]:
    """``x[i] W[experts[i]]`` of every block, for an array or a `Weight` of shape ``[experts, in, out]``.

    The backward pass slices each block's expert anew: nothing of the leaf is kept for a block.

    >>> import jax.numpy as jnp
    >>> w = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
    >>> routed(jnp.ones((3, 1, 2)), w, jnp.array([0, 1, 1])).tolist()
    [[[1.0, 1.0]], [[10.0, 10.0]], [[10.0, 10.0]]]
    """
    sliced, shared = trees.unshare(w)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(given: tuple[Array, Array, Array]) -> Array:
        rows, expert, block = given
        mine = jax.tree.map(lambda array: _of(array, expert, block), sliced)
        return linear(rows, trees.fill(mine, shared))

    return jax.lax.map(one, (x, experts, jnp.arange(len(experts), dtype=jnp.int32)))


def _of(array: Any, expert: Array, block: Array) -> Array:
    """One expert's slice; of a key, another for each of its blocks, so that no two drop alike."""
    mine = jax.lax.dynamic_index_in_dim(array, expert, keepdims=False)
    return jax.random.fold_in(mine, block) if jnp.issubdtype(mine.dtype, jax.dtypes.prng_key) else mine
