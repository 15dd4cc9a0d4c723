"""One script for one CPU, eight devices, and several processes or hosts: LoRA on a small language model.

    python -m experiments.anywhere                                                    # one CPU, or one GPU
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.anywhere     # eight (fake) devices
    python -m peft_jax.launch --processes 2 --devices 4 -m experiments.anywhere           # two processes of four
    srun python -m experiments.anywhere                                               # as many hosts as Slurm gives

All devices form one mesh, over which the rows of a batch and the weights are split.  With ``--checkpoints`` a run that
was interrupted goes on where it was, with any number of processes.  The last line is the last loss.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import peft_jax as pj
from peft_jax import hosts, methods, models, sharding, training


def tiny() -> models.Model:
    """A Llama of 31 thousand numbers, drawn at random."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
    )
    return models.from_config(config, jax.random.key(0))


def train(
    model: models.Model,
    mesh: jax.sharding.Mesh,
    steps: int,
    checkpoints: str | None = None,
    **options: Any,
) -> training.Run:
    method = methods.lora(rank=4, alpha=8, select=r"(q|v)_proj", dropout=0.1)
    params, forward = method(jax.random.key(1), model.params, model.forward)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    tx = pj.freeze(optax.adamw(3e-3), params)
    text = np.random.default_rng(0).integers(0, 64, 4000).cumsum() % 256  # random steps: few tokens follow each
    data = training.batches(training.pack([text], length=32), batch_size=16)
    return training.fit(forward, params, tx, hosts.batches(data, mesh), steps, checkpoints=checkpoints, **options)


def main(arguments: Sequence[str] | None = None, callback: Callable[..., None] | None = None) -> training.Run:
    parser = argparse.ArgumentParser(description="LoRA on whatever devices there are.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoints", help="a directory that all hosts see; by default nothing is saved")
    parser.add_argument("--save-every", type=int, default=10)
    given = parser.parse_args(arguments)

    place = hosts.start()
    mesh = sharding.mesh(fsdp=-1)
    run = train(tiny(), mesh, given.steps, given.checkpoints, save_every=given.save_every, callback=callback)
    if place.process == 0:
        print(f"{place.processes} processes, {mesh.size} devices: loss {run.history[-1]['loss']:.6f} at {run.step}")
    return run


if __name__ == "__main__":
    main()
