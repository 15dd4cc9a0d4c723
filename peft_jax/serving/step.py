"""What the device does: one compiled step for every batch, and the writing of adapters into the pool.

A step reads a batch of rows, each a piece of one request (a chunk of its prompt, or its last token), through the model
with each row's own adapter, writes their keys and values into the pool, and chooses a token behind each.  A draw
depends on the request's seed and the token's number alone, not on the rows beside it.

Shapes are few (`Shapes`), since each one compiles: rows, tokens, earlier tokens, directions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from peft_jax import sharding
from peft_jax.core import Forward, Inputs, Params, Path, Ports
from peft_jax.sampling import restrict
from peft_jax.serving import pool, tensor
from peft_jax.serving.pool import Paged, Tables, Target

MOST_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes that batches are filled up to, each in rising order.

    rows     of a batch of single tokens
    prompts  of a batch of chunks
    chunk    tokens of a prompt in one step
    context  earlier tokens
    ranks    directions of an adapter
    """

    rows: tuple[int, ...] = (4, 16)
    prompts: int = 4
    chunk: int = 64
    context: tuple[int, ...] = (128, 512, 2048)
    ranks: tuple[int, ...] = (8, 64)

    def count(self) -> int:
        """How many programs there can be."""
        return (len(self.rows) + 1) * (len(self.context) + 1) * (len(self.ranks) + 1)


def fit(wanted: int, sizes: tuple[int, ...], what: str) -> int:
    """The smallest size that holds so many; none is 0."""
    if not wanted:
        return 0
    for size in sizes:
        if size >= wanted:
            return size
    raise ValueError(f"{wanted} {what} are more than the largest shape, {sizes[-1]}: give the engine larger ones")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One step's rows.

    tokens   int32 ``[batch, time]``
    past, new   int32 ``[batch]``: each row's earlier tokens, and how many of `tokens` are real (0 in an empty row)
    context  int32 ``[batch, earlier, 2]``: where the earlier ones' keys and values lie
    ids      int32 ``[batch, time, 2]``: where these are to lie; beyond the pool for what is not real
    adapters int32 ``[batch, size]``: each row's table (`pool.Tables`); zeros for the base
    temperature, top_p   fp32 ``[batch]``; a temperature of 0 takes the most probable token
    top_k    int32 ``[batch]``; seed uint32 ``[batch]``; number int32 ``[batch]``, of the token that is chosen
    ranked   bool: whether any row wants the probabilities of the most probable tokens
    rank     how many directions the tables have room for
    """

    tokens: Any
    past: Any
    new: Any
    context: Any
    ids: Any
    adapters: Any
    temperature: Any
    top_p: Any
    top_k: Any
    seed: Any
    number: Any
    ranked: Any
    rank: int = dataclasses.field(default=0, metadata={"static": True})


class Chosen(NamedTuple):
    """token ``[batch]``; its log-probability; the most probable tokens ``[batch, MOST_LOGPROBS]`` and theirs, zeros
    where none was wanted; the distance of the two largest logits."""

    token: Any
    logprob: Any
    top: Any
    top_logprob: Any
    gap: Any


def run(
    forward: Forward,
    targets: tuple[Target, ...],
    params: Params,
    rows: Shaped[Array, "layers rows width"],
    batch: Batch,
) -> tuple[Shaped[Array, "layers rows width"], Chosen]:
    """The pool with the batch's keys and values in it, and each row's next token."""
    tables = Tables(targets, rows.shape[-1], batch.rank).split(batch.adapters) if batch.rank else {}
    params = pool.given(params, rows, tables, batch.rank)
    cache = Paged.start(forward.spec, rows, batch.context, batch.past, batch.new, batch.tokens.shape[1])
    features, cache = forward.features(params, Inputs(batch.tokens, cache=cache), Ports())
    last = jnp.maximum(batch.new - 1, 0)[:, None, None]
    logits = forward.head(params, jnp.take_along_axis(features, last, axis=1), Ports())[:, 0].astype(jnp.float32)
    logits = tensor.placed(logits, tensor.mesh_of(rows), P())  # once, and not in every step of a search among them
    return cache.commit(batch.ids), choose(logits, batch)


def choose(logits: Float[Array, "batch vocab"], batch: Batch) -> Chosen:
    """The most probable tokens, or drawn ones; what nobody asks for is not computed."""

    def drawn() -> Int[Array, "batch"]:
        cold = batch.temperature <= 0
        each = lambda x: x[:, None]  # noqa: E731
        wide = jnp.where(batch.top_k > 0, batch.top_k, logits.shape[1])
        kept = restrict(logits, each(jnp.where(cold, 1.0, batch.temperature)), each(wide), each(batch.top_p))
        keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(batch.seed, batch.number)
        return jnp.where(cold, best, jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32))

    two, order = jax.lax.top_k(logits, 2)
    best = order[:, 0].astype(jnp.int32)
    token = jax.lax.cond(jnp.any(batch.temperature > 0), drawn, lambda: best)

    def ranked() -> tuple[Array, Array, Array]:
        shares = jax.nn.log_softmax(logits)
        value, top = jax.lax.top_k(shares, MOST_LOGPROBS)
        return jnp.take_along_axis(shares, token[:, None], axis=1)[:, 0], top.astype(jnp.int32), value

    none = (
        jnp.zeros(len(logits)),
        jnp.zeros((len(logits), MOST_LOGPROBS), jnp.int32),
        jnp.zeros((len(logits), MOST_LOGPROBS)),
    )
    logprob, top, top_logprob = jax.lax.cond(batch.ranked, ranked, lambda: none)
    return Chosen(token, logprob, top, top_logprob, two[:, 0] - two[:, 1])


# One for all engines of a process: those of one model and size share their programs.
_step = jax.jit(run, static_argnums=(0, 1), donate_argnums=3)
_write = jax.jit(pool.write, donate_argnums=0)


class Device:
    """The base with a leaf at every target, the pool, and the programs that run over both.

    A step's arrays go to the device and come back by themselves; the pool never leaves it, and no step copies it.
    """

    def __init__(
        self,
        forward: Forward,
        params: Params,
        targets: tuple[Target, ...],
        rows: int,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ) -> None:
        spec, self.mesh = forward.spec, mesh
        tensor.check(spec, params, mesh)
        if mesh is not None:
            params = sharding.shard(params, forward, mesh)
        self.targets, self.layers, self.width, self.total = targets, spec.layers, pool.width_of(spec), rows
        self.forward, self.params = forward, pool.adapt(params, targets, spec.layers)
        self.dtype, self.rows = jnp.dtype(dtype), pool.empty(spec, rows, dtype, mesh)
        self.programs = set[tuple[int, ...]]()
        """What was compiled for this device, by shape."""

    def step(self, batch: Batch) -> Chosen:
        """Starts a step; reading what it gives waits for it."""
        self.programs.add((*batch.tokens.shape, batch.context.shape[1], batch.rank))
        self.rows, chosen = _step(self.forward, self.targets, self.params, self.rows, batch)
        return chosen

    def put(self, ids: Int[np.ndarray, "n"], block: Float[np.ndarray, "layers n width"]) -> None:
        """Writes an adapter's rows; a block is filled up to a power of two, so that few sizes compile."""
        more = (1 << (len(ids) - 1).bit_length()) - len(ids)
        padded = np.pad(ids.astype(np.int32), (0, more), constant_values=self.total)
        self.programs.add((len(padded),))
        # Of one dtype, whatever is given: another would be another program.
        block = np.pad(block.astype(self.dtype, copy=False), ((0, 0), (0, more), (0, 0)))
        if self.mesh is not None:  # to each device its own columns
            block = jax.device_put(block, NamedSharding(self.mesh, tensor.ROWS))
        self.rows = _write(self.rows, padded, block)

    def table(self, ids: Mapping[Path, tuple[np.ndarray, np.ndarray]], rank: int) -> np.ndarray:
        return Tables(self.targets, self.width, rank).fill(ids)

    def lower(self, batch: Batch) -> Any:
        """The step for a batch of such shapes, lowered: to be compiled and looked into."""
        return _step.lower(self.forward, self.targets, self.params, self.rows, batch)

    @property
    def nbytes(self) -> int:
        return int(self.rows.nbytes)
