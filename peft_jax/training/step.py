"""One optimiser step, as a pure compiled function of the trainable leaves alone.

    trainables, frozen = partition(params)
    gradient = ∇ Σ loss / Σ weight   with respect to the trainables, over all micro-batches
    trainables = apply_updates(trainables, tx.update(gradient, …))

Frozen leaves go in and never come out: they would be copied.  Everything else is one `State`, donated to the step.
"""

import contextlib
import ctypes
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.core import Forward, Params, Ports
from peft_jax.on_disk import put
from peft_jax.training.losses import Batch, Loss, next_token
from peft_jax.training.paging import fetch, is_paged, put_back
from peft_jax.trees import Optimiser, apply_updates, combine, partition, transformation, weights
from peft_jax.weights import Weight


class State(NamedTuple):
    """What training changes, and nothing else: the trainable half of the tree, the optimiser's state, how many steps
    have been taken, and the run's key, from which every step's randomness is folded."""

    trainables: Params
    opt_state: Any
    step: Array
    key: Array


Step = Callable[[State, Params, Batch], tuple[State, dict[str, Array]]]


def init_state(params: Params, tx: Optimiser, key: Array, *, allocate: bool = True) -> tuple[State, Params]:
    """``(state, frozen)`` at step 0.  The state is a copy, because the step that it is given to destroys it.

    Args:
        allocate: whether leaves that need an optimiser of their own (AdaLoRA's) must have it.

    Raises:
        ValueError: if nothing in the tree trains; if `tx` lacks what a leaf needs, or changes what comes out of it.
    """
    trainables, frozen = partition(params)
    if not jax.tree.leaves(trainables):
        raise ValueError("nothing in this tree trains: apply a method (or methods.unfreeze) before training")
    # Copied after the optimiser has looked at it: some optimisers keep the parameters themselves in their state.
    with lenient():
        opt_state = tx.init(trainables)
    for w in weights(params) if allocate else ():
        _check_needs(w, opt_state)
    given = State(trainables, opt_state, jnp.int32(0), key)
    state = put_back(jax.tree.map(_settled, fetch(given)), given)
    if any(map(is_paged, jax.tree.leaves(state))):  # which ties a state to its device; all of it, as after a step
        state = jax.tree.map(lambda x: jax.device_put(x, x.sharding), state)
    return _spread(state), frozen


def _check_needs(w: Weight, opt_state: Any) -> None:
    if w.needs is None:
        return
    kind, maker = w.needs

    def holds(node: Any) -> bool:
        return any(isinstance(x, kind) for x in jax.tree.leaves(node, is_leaf=lambda x: isinstance(x, kind)))

    def is_followed(node: Any) -> bool:
        if isinstance(node, kind) or not isinstance(node, tuple | list | dict):
            return False
        inside = list(node.values()) if isinstance(node, dict) else list(node)
        # optax.chain's state is a bare tuple; those of single transformations have names.
        return (type(node) is tuple and any(map(holds, inside[:-1]))) or any(map(is_followed, inside))

    name = f"{type(w).__name__} leaves of {getattr(w, 'name', '?')!r}"
    if not holds(opt_state):
        raise ValueError(
            f"the {name} train under {maker}, which this optimiser is without: give {maker}(tx, steps), tx being the "
            "whole optimiser, or allocate=False to train them as they are"
        )
    if is_followed(opt_state):
        raise ValueError(
            f"{maker} is followed by another transformation of an optax.chain, which would change what it does to the "
            f"{name}: give {maker}(optax.chain(…), steps)"
        )


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Optimisers are not ours, and several mix dtypes and ranks: a user's strict settings end where they begin."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _settled(x: Array) -> Array:
    """A copy without a weak type, so that the first step's types are every step's types."""
    x = jnp.copy(x)
    return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else jax.lax.convert_element_type(x, x.dtype)


def _spread(state: State) -> State:
    """Puts scalars and counters on the mesh of the trainables, if they are on one: the step would, and recompile."""
    meshes = [x.sharding.mesh for x in jax.tree.leaves(state) if isinstance(x.sharding, jax.NamedSharding)]
    if not meshes:
        return state
    everywhere = jax.NamedSharding(meshes[0], jax.P())
    onto = lambda x: x if isinstance(x.sharding, jax.NamedSharding) else put(x, everywhere)  # noqa: E731
    return jax.tree.map(onto, state)


def shardings_of(state: State) -> State | None:
    """The shardings of a state that lies on a mesh, for the step to keep; None on a single device, where all is one."""
    kinds = jax.tree.map(lambda x: x.sharding, state)
    return kinds if isinstance(kinds.step, jax.NamedSharding) else None


def make_step(
    forward: Forward,
    tx: Optimiser,
    loss: Loss = next_token,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    shardings: State | None = None,
) -> Step:
    """A compiled ``step(state, frozen, batch) -> (state, metrics)``; `state` is donated.

    Args:
        forward: the adapted model's forward function.
        tx: the optimiser, wrapped by `pj.freeze` or not.
        loss: ``loss(forward, params, batch, ports) -> (loss_sum, weight_sum)``.
        accumulate: how many micro-batches a batch is split into, one after another.  Exact for uneven weights, because
            sums are accumulated and divided once.
        shardings: where the new state lies (`shardings_of` the first); by default, wherever the compiler likes.
        clip: the largest global norm of the gradient; a longer one is scaled down to it (arXiv 1211.5063, section 3.2).

    The metrics are fp32 scalars: loss, weight, grad_norm (before clipping), finite, and the learning rate where
    `optax.inject_hyperparams` shows it.  Where the loss, the gradient or the update is not finite, `finite`
    is False and the state comes back as it was.

    Each call's ports carry ``step_key``, the same for the whole step, and ``micro_key``, fresh for each micro-batch;
    both are folded from the run's key and the step's number, so that a resumed run draws what the first would have
    drawn.

    Raises (when the step is called):
        ValueError: if the batch's rows cannot be split into `accumulate` equal parts.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}: give the number of micro-batches, 1 or more")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}: give the largest gradient norm, above 0")
    optimiser = transformation(tx)

    def micro(trainables: Params, frozen: Params, batch: Batch, step_key: Array, micro_key: Array) -> Any:
        """``(loss_sum, weight_sum), gradient of loss_sum`` of one micro-batch, in fp32."""

        def total(trainables: Params) -> tuple[Array, Array]:
            ports = Ports(step_key=step_key, micro_key=micro_key)
            value, weight = loss(forward, combine(trainables, frozen), batch, ports)
            return jnp.asarray(value, jnp.float32), jnp.asarray(weight, jnp.float32)

        sums, gradient = jax.value_and_grad(total, has_aux=True)(trainables)
        return sums, jax.tree.map(_wide, gradient)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Array]]:
        paged, state = state, state._replace(opt_state=fetch(state.opt_state))
        step_key = _named(state.key, "step", state.step)
        micro_keys = jax.vmap(functools.partial(jax.random.fold_in, _named(state.key, "micro", state.step)))(
            jnp.arange(accumulate)
        )
        at = functools.partial(micro, state.trainables, frozen)
        if accumulate == 1:
            (total, weight), gradient = at(batch, step_key, micro_keys[0])
        else:

            def add(sums: Any, given: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, at(given[0], step_key, given[1])), None

            zeros = jax.tree.map(lambda x: jnp.zeros_like(x, _wide_type(x)), state.trainables)
            start = ((jnp.float32(0), jnp.float32(0)), zeros)
            ((total, weight), gradient), _ = jax.lax.scan(add, start, (split(batch, accumulate), micro_keys))

        inverse = 1 / jnp.where(weight == 0, 1.0, weight)  # a batch that asks for nothing has a gradient of nothing
        gradient = jax.tree.map(lambda g: g * inverse.astype(g.dtype), gradient)
        norm = global_norm(gradient)
        if clip is not None:
            shrink = clip / jnp.maximum(norm, clip)
            gradient = jax.tree.map(lambda g: g * shrink.astype(g.dtype), gradient)
        gradient = jax.tree.map(lambda g, t: g.astype(t.dtype), gradient, state.trainables)
        value = total * inverse
        with lenient():
            updates, opt_state = optimiser.update(gradient, state.opt_state, state.trainables, value=value)
            moved = State(apply_updates(state.trainables, updates), opt_state, state.step + 1, state.key)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(global_norm(updates))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        metrics = {"loss": value, "weight": weight, "grad_norm": norm, "finite": finite, **learning_rates(opt_state)}
        return put_back(kept, paged), metrics

    return step


def compile_step(step: Any, state: State, frozen: Params, batch: Batch) -> jax.stages.Compiled:
    """Compiles a step for the shapes of `batch` before its first call, which then finds it compiled.

    On Linux the compiler's memory, more than a small model's step needs, goes back to the system: the C library would
    keep it, beside the step's own.
    """
    compiled = step.lower(state, frozen, batch).compile()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system's C library
        ctypes.CDLL(None).malloc_trim(0)
    return compiled


def _named(key: Array, name: str, step: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def _wide_type(x: Array) -> Any:
    return jnp.float32 if x.dtype.itemsize < 4 else x.dtype


def _wide(x: Array) -> Array:
    return x.astype(_wide_type(x))


def split(batch: Batch, parts: int) -> Batch:
    """The batch as `parts` micro-batches along a new first axis: micro-batch i holds the rows i, i + parts, …

    Strided, so that a batch whose rows lie on several devices is split without moving a row.
    """

    def each(keys: Any, x: Any) -> Array:
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[0] % parts:
            name, rows = jax.tree_util.keystr(keys, simple=True, separator="/"), x.shape[0] if x.ndim else "no"
            raise ValueError(f"{name} has {rows} rows, which accumulate={parts} does not split equally")
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    return jax.tree_util.tree_map_with_path(each, batch)


def global_norm(tree: Any) -> Array:
    """The Euclidean norm of all numbers of a tree, in fp32."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(_wide(x))) for x in jax.tree.leaves(tree)), jnp.float32(0)))


def learning_rates(opt_state: Any) -> dict[str, Array]:
    """The learning rates that `optax.inject_hyperparams` shows in a state; a second one is numbered."""
    found: dict[str, Array] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: hasattr(node, "hyperparams")):
        if "learning_rate" in getattr(node, "hyperparams", {}):
            name = f"learning_rate/{len(found) + 1}" if found else "learning_rate"
            found[name] = jnp.asarray(node.hyperparams["learning_rate"], jnp.float32)
    return found
