"""Which implementation multiplies, and what the tables must hold."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from peft_jax.serving.kernels import low_rank, paged, xla

IMPLEMENTATIONS = ("xla", "triton", "interpret")
EVERYTHING = 2**30  # tokens: a window that hides none


def lowrank(
    x: Float[Array, "batch time inputs"],
    rows: Shaped[Array, "layers R W"],
    layer: Int32[Array, ""] | int,
    a_rows: Int32[Array, "batch na"],
    b_rows: Int32[Array, "batch nb"],
    rank: int,
    outputs: int,
    implementation: str | None = None,
) -> Float[Array, "batch time outputs"]:
    """The products of a batch with adapters that lie in the pool, a row of the batch with its own.

        y[b] = x[b] A_bᵀ B_b        A_b [rank, inputs], B_b [rank, outputs], accumulated in fp32

    A_b is what lies in the rows ``a_rows[b]`` one after the other, read as one vector, cut into directions of `inputs`
    numbers; B_b likewise.  A table entry 0 is zeros, so an adapter of a smaller rank than the bucket fills its last
    row up with zeros and its table with 0, and a batch row without an adapter is a row of zeros.

    Args:
        x: fp32 or bf16, as the pool is, or the other one; the result has its dtype.
        rows: the pool, of which `layer` is read.
        a_rows, b_rows: ``ceil(rank · inputs / W)`` rows, and ``ceil(rank · outputs / W)``; more are not read.
        rank: the bucket: the largest rank in the batch, or more.
        implementation: one of `IMPLEMENTATIONS`; None for 'triton' on a GPU and 'xla' elsewhere.

    Raises:
        ValueError: where a table is too narrow for the rank, and on another implementation.

    >>> import jax.numpy as jnp
    >>> rows = jnp.arange(5.0).reshape(1, 5, 1) * jnp.ones((1, 5, 4))     # row i holds the number i
    >>> a_rows, b_rows = jnp.array([[1], [3], [0]]), jnp.array([[2], [4], [0]])
    >>> lowrank(jnp.ones((3, 1, 4)), rows, 0, a_rows, b_rows, 1, 2)[:, 0].tolist()
    [[8.0, 8.0], [48.0, 48.0], [0.0, 0.0]]

    Source: Sheng et al. 2023 (S-LoRA), section 5: MBGMV where time is 1, MBGMM where it is more.

    Departures: there a row is a direction of a square matrix; here directions run through rows of any width.
    """
    wide = rows.shape[2]
    for name, table, each in (("a_rows", a_rows, x.shape[-1]), ("b_rows", b_rows, outputs)):
        if (needs := math.ceil(rank * each / wide)) > table.shape[1]:
            raise ValueError(
                f"{name} has {table.shape[1]} rows of {wide} numbers, where {rank} directions of {each} take {needs}: "
                "widen the table with 0, or give a smaller rank"
            )
    return _chosen(implementation, xla.lowrank, low_rank.lowrank)(
        x, rows, jnp.asarray(layer, jnp.int32), a_rows, b_rows, rank, outputs
    )


def paged_attention(
    query: Float[Array, "batch time heads dim"],
    new_key: Float[Array, "batch time kv_heads dim"],
    new_value: Float[Array, "batch time kv_heads dim"],
    rows: Shaped[Array, "layers R W"],
    layer: Int32[Array, ""] | int,
    key_rows: Int32[Array, "batch context"],
    value_rows: Int32[Array, "batch context"],
    past: Int32[Array, "batch"],
    new: Int32[Array, "batch"],
    scale: float,
    window: Int32[Array, ""] | int | None = None,
    cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch time heads dim"]:
    """Attention of new tokens over the past ones, whose keys and values lie in the pool, and over themselves.

        y[t] = Σ_j softmax_j(cap(scale · q_t · k_j)) v_j        j ≤ past + t, and past + t − j < window

    Token j of the past has its keys of all heads in row ``key_rows[b, j]`` and its values in ``value_rows[b, j]``.

    Args:
        query: fp32 or bf16, its heads a multiple of kv_heads; the result has its dtype.
        rows: the pool, rows of ``kv_heads · dim`` numbers, of which `layer` is read.
        past: how many entries of a row's tables are filled; the others are not read, whatever they are.
        new: how many of its new tokens are real; the others are not seen, and their results are zeros.
        window: how many tokens a query reaches back over, itself included; None for all.  It may be an array, so that
            layers of one scan differ.
        cap: the scores' soft cap, ``cap · tanh(score / cap)``; None for none.
        implementation: one of `IMPLEMENTATIONS`; None for 'triton' on a GPU and 'xla' elsewhere.

    Raises:
        ValueError: where a row of the pool is no token's, heads do not share evenly, or on another implementation.

    >>> import jax.numpy as jnp
    >>> rows = jnp.arange(3.0).reshape(1, 3, 1) * jnp.ones((1, 3, 4))     # row i holds the number i
    >>> one = jnp.ones((1, 1, 1, 4))
    >>> tables = jnp.array([[1, 0]]), jnp.array([[2, 0]])                 # one token of the past: key 1, value 2
    >>> count = jnp.array([1])
    >>> paged_attention(one, one, 4 * one, rows, 0, *tables, count, count, 1.0)[0, 0, 0].tolist()
    [3.0, 3.0, 3.0, 3.0]

    Source: Kwon et al. 2023 (PagedAttention), section 4, with pages of one token; Sheng et al. 2023, section 4.3.

    Departures: keys and values are rows of one pool with adapters, any two rows for a token.
    """
    (*_, heads, dim), kv_heads = query.shape, new_key.shape[2]
    if kv_heads * dim != rows.shape[2]:
        raise ValueError(
            f"a row of the pool has {rows.shape[2]} numbers, where {kv_heads} heads of {dim} are {kv_heads * dim}: "
            "make the pool with the model's own kv_heads and dim"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} heads do not share {kv_heads} key heads evenly: give a multiple of them")
    reach = jnp.asarray(EVERYTHING if window is None else window, jnp.int32)
    tables = jnp.asarray(layer, jnp.int32), key_rows, value_rows, past, new
    run = _chosen(implementation, xla.paged_attention, paged.paged_attention)
    return run(query, new_key, new_value, rows, *tables, scale, reach, cap)


def _chosen(implementation: str | None, plain: Callable[..., Array], kernel: Callable[..., Array]) -> Any:
    if implementation is None:
        implementation = "triton" if jax.default_backend() == "gpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"there is no implementation {implementation!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla":
        return plain
    return lambda *args: kernel(*args, interpret=implementation == "interpret")
