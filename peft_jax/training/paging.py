"""Paged optimiser state: in host memory between steps, on the device while the step uses it.

    moments in pinned_host  →  device  →  the optimiser's update  →  pinned_host

Arrays that lie in host memory have a type of their own under jit (``float32<host>[4096,64]``), from which `fetch` and
`put_back` know what to move, and where to; JAX refuses to compute with what was not fetched.  The transfers are part of
the compiled step, so that the compiler can overlap them with the backward pass; donation, `training.fit`, checkpoints
and exact resume are as they are without.

Source: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3, "Paged Optimizers"; bitsandbytes 0.50,
optim/optimizer.py, which pages states of 100,000 numbers and more; JAX's guide to memories and host offloading.

Departures: bitsandbytes uses CUDA's unified memory, whose pages move when memory runs short; here they always move.
"""

from typing import Any

import jax
import optax

from peft_jax.core import Params
from peft_jax.trees import Optimiser, transformation

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"


def page(tx: Optimiser, min_size: int = 100_000) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose large state arrays lie in host memory between steps.

    Updates and states are those of `tx` bit for bit.  Wraps, or is wrapped by, `pj.freeze`, `methods.allocate_rank`,
    `optax.chain` and the like.

    Args:
        tx: the optimiser.
        min_size: how many numbers an array must have to be paged, over all devices: small ones are not worth a
            transfer.

    Raises:
        ValueError: if `min_size` is negative.
        RuntimeError: when a state is made, if the backend has no pinned host memory.

    >>> import jax.numpy as jnp, optax
    >>> from peft_jax import training
    >>> state = training.page(optax.adam(1e-3), min_size=64).init({"a": jnp.ones((8, 8)), "b": jnp.ones(8)})
    >>> [state[0].mu[name].sharding.memory_kind for name in "ab"]
    ['pinned_host', 'device']
    """
    if min_size < 0:
        raise ValueError(f"min_size is {min_size}: give the number of an array's numbers from which it is paged")
    inner = transformation(tx)

    def init(params: Params) -> optax.OptState:
        check_backend()
        return jax.tree.map(lambda x: jax.device_put(x, HOST) if x.size >= min_size else x, inner.init(params))

    def update(grads: Params, state: optax.OptState, params: Params | None = None, **extra: Any) -> Any:
        updates, moved = inner.update(grads, fetch(state), params, **extra)
        return updates, put_back(moved, state)

    return optax.GradientTransformationExtraArgs(init, update)


def check_backend() -> None:
    """Raises where arrays cannot be kept in host memory."""
    device = jax.devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if KIND not in kinds:
        raise RuntimeError(
            f"paging needs a backend with {KIND} memory, and {device.device_kind} has {', '.join(sorted(kinds))} "
            "alone: train without training.page"
        )


def is_paged(x: Any) -> bool:
    """Whether an array, concrete or traced, lies in host memory."""
    return jax.typeof(x).memory_space == HOST


def fetch(tree: Any) -> Any:
    """The tree with everything on the device."""
    return jax.tree.map(lambda x: jax.device_put(x, DEVICE) if is_paged(x) else x, tree)


def put_back(tree: Any, like: Any) -> Any:
    """The tree with every array in the memory in which `like` has it."""
    return jax.tree.map(lambda x, y: jax.device_put(x, HOST) if is_paged(y) else x, tree, like)
