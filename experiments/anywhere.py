"""One script for one CPU, eight devices, and several processes or hosts: LoRA on a small language model.

    python -m experiments.anywhere                                                     one CPU, or the GPUs there are
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.anywhere  eight (fake) devices
    python -m peft_jax.launch --processes 2 --devices 4 -m experiments.anywhere        two processes of four
    srun python -m experiments.anywhere                                                the hosts that Slurm gives

All devices form one mesh, over which the rows of a batch and the weights are split.  With ``--checkpoints`` a run that
was interrupted goes on where it was, with any number of processes and on any mesh.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import peft_jax as pj
from experiments.data import smollm2
from peft_jax import hosts, methods, models, sharding, training

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def tiny() -> models.Model:
    """A Llama of 23 thousand numbers, drawn at random."""
    from transformers import LlamaConfig

    return models.from_config(LlamaConfig(**TINY), jax.random.key(0), remat="none")


def text() -> list[list[int]]:
    """Two hundred texts of a language of 64 words, each of which four may follow."""
    draw = np.random.default_rng(0)
    follow, walks = draw.integers(0, 64, (64, 4)), [draw.integers(0, 64, 200)]
    for _ in range(32):
        walks.append(follow[walks[-1], draw.integers(0, 4, 200)])
    return np.stack(walks, axis=1).tolist()


def train(model: models.Model, mesh: Any, steps: int, **options: Any) -> training.Run:
    method = pj.chain(methods.lora(rank=4, dropout=0.1, select=r"(q|v)_proj"), methods.unfreeze("embed|lm_head"))
    params, forward = method(jax.random.key(1), model.params, model.forward)
    params = sharding.shard(params, forward, mesh)
    tx = pj.freeze(optax.adamw(1e-2), params)
    data = training.batches(training.pad(text(), length=32), batch_size=16)
    return training.fit(forward, params, tx, hosts.batches(data, mesh), steps, **options)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="LoRA on whatever devices there are.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoints", help="a directory that all processes see (default: nothing is saved)")
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--data", type=int, default=1, help="devices along the mesh's data axis (the others: fsdp)")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M instead of a tiny random model")
    given = parser.parse_args(arguments)

    place = hosts.start()
    mesh = sharding.mesh(data=given.data, fsdp=-1)
    model = models.load(smollm2()) if given.smollm2 else tiny()
    run = train(model, mesh, given.steps, checkpoints=given.checkpoints, save_every=given.save_every)
    if place.process == 0:
        first, last = (run.history[i]["loss"] for i in (0, -1))
        print(f"{place.processes} processes, {mesh.size} devices: loss {first:.4f}, after {run.step} steps {last:.4f}")


if __name__ == "__main__":
    main()
