"""An engine from a command line: which model, which adapters, how much memory."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax import models, quant, sharding, trees
from peft_jax.serving import pool
from peft_jax.serving.engine import Engine
from peft_jax.serving.policies import Abort, Cluster, Fair, Fcfs, Policy
from peft_jax.serving.step import Shapes

POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": Fcfs, "cluster": Cluster, "abort": Abort, "fair": Fair}
FORMATS: dict[str, Callable[[], Any]] = {"nf4": quant.nf4, "int4": lambda: quant.grouped(4, 32)}
MEMORY = 0.5  # the share of the device's memory for model and pool, where nothing else is said
MOST = 2 << 30  # bytes of the pool on a CPU, whose memory is others' too
logger = logging.getLogger(__name__)


def build_engine(
    model: str | os.PathLike[str],
    *,
    adapters: str | os.PathLike[str] | None = None,
    rows: int | None = None,
    memory: float = MEMORY,
    max_batch: int = 16,
    context: int = 1024,
    policy: str = "fcfs",
    dtype: str = "float32",
    quantise: str = "none",
    tensor: int = 1,
    warm_up: bool = True,
    **options: Any,
) -> Engine:
    """The engine for a model and the adapters in a directory, each in one of its own, ready to serve.

    Args:
        model: as `models.load` takes it.
        adapters: a directory of directories; what of them holds an ``adapter_config.json`` is registered by its name.
        rows: of the pool; by default what `memory` leaves.
        memory: the share of the device's memory for the model and the pool together.
        max_batch: requests that run at once.
        context: tokens of prompt and answer together.
        policy: "fcfs", "cluster", "abort" or "fair".
        dtype: of weights, activations and the pool.
        quantise: "none", "nf4" or "int4": the base's matrices in four bits.
        tensor: how many devices share the model and the pool.
        warm_up: compiles all that requests can need before it is given back; else what they need, when they do.
        options: further ones of `Engine`.

    Raises:
        ValueError: if an option is none of those, there are not so many devices or they do not divide the model's
            heads, or the memory does not hold the model and a pool.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}: choose one of {', '.join(POLICIES)}")
    if quantise != "none" and quantise not in FORMATS:
        raise ValueError(f"quantise is {quantise!r}: choose 'none', {' or '.join(map(repr, FORMATS))}")
    mesh = over(tensor)
    whole = None if quantise != "none" else mesh  # what is quantised first is read by the quantising
    loaded = models.load(model, dtype=jnp.dtype(dtype), remat="none", lazy=quantise != "none", mesh=whole)
    if quantise != "none":
        method = quant.quantise(FORMATS[quantise](), trees.LAYER_MATRICES)
        params, forward = method(jax.random.key(0), loaded.params, loaded.forward)
        params = trees.place(params) if mesh is None else sharding.shard(params, forward, mesh)
        loaded = models.Model(params, forward, loaded.config, loaded.tokenizer, loaded.generation, loaded.head)
    spec = loaded.forward.spec
    longest = min(context, spec.positions or context)
    row = spec.layers * pool.width_of(spec) * jnp.dtype(dtype).itemsize // tensor  # on each device
    if rows is None:
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(loaded.params))
        on_cpu = jax.default_backend() == "cpu"
        most, shared = (MOST / tensor, tensor) if on_cpu else (float("inf"), 1)  # devices of one machine's memory
        rows = int(min(memory * device_memory() / shared - held, most)) // row
    if rows < 2 * longest:
        raise ValueError(
            f"the pool has {max(0, rows)} rows of {row} bytes, and a request of {longest} tokens takes {2 * longest}: "
            "give it more memory, or a shorter context"
        )
    shapes = Shapes(
        rows=(*(n for n in (4, 16, 64, 256) if n < max_batch), max_batch),
        prompts=min(4, max_batch),
        context=(*(n for n in (256, 1024, 4096, 16384) if n < longest), longest),
    )
    name = Path(model).name.removesuffix(".gguf")
    engine = Engine(
        loaded,
        rows=rows,
        mesh=mesh,
        name=name,
        dtype=jnp.dtype(dtype),
        context=longest,
        shapes=options.pop("shapes", shapes),
        policy=POLICIES[policy](),
        **options,
    )
    found = sorted(p.parent for p in Path(adapters).glob("*/adapter_config.json")) if adapters else []
    for folder in found:
        engine.load(folder.name, folder)
    logger.info("%s: %d rows (%.2f GB on each device), %d adapters", name, rows, rows * row / 1e9, len(found))
    if warm_up:
        logger.info("%d programs are compiled", engine.warm_up())
    return engine


def over(devices: int) -> Mesh | None:
    """A mesh of so many devices; None of one."""
    found = jax.devices()
    if devices > len(found):
        raise ValueError(f"tensor is {devices} and JAX finds {len(found)} devices: give at most so many")
    return None if devices == 1 else sharding.mesh(tensor=devices, devices=found[:devices])


def device_memory() -> int:
    """Bytes of the first device's memory; of a CPU, the machine's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
