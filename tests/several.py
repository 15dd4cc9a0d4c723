"""What two processes of four devices do for test_several_processes.py, all in one start: each takes seconds."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import peft_jax as pj
from experiments import anywhere
from peft_jax import hosts, methods, sharding, training

STEPS, SAVE_EVERY, DEATH = 6, 2, 5


def check_data(mesh):
    """A global batch is the whole one, and each process has read its own rows of it alone."""
    whole = training.batches({"tokens": np.arange(64).reshape(32, 2).astype(np.int32)}, batch_size=16)
    read = []

    class Source:
        def __len__(self):
            return 32

        def __getitem__(self, index):
            read.append(index)
            return {"tokens": np.full(2, index, np.int32)}

    loader = hosts.loader(grain.MapDataset.source(Source()), 16, mesh, threads=1, ahead=1)
    everywhere = jax.NamedSharding(mesh, jax.P())
    gathered = lambda batch: np.asarray(jax.device_put(batch["tokens"], everywhere))  # noqa: E731
    np.testing.assert_array_equal(gathered(hosts.batches(whole, mesh).batch(1)), whole.batch(1)["tokens"])
    np.testing.assert_array_equal(gathered(next(loader))[:, 0], np.arange(16))
    mine = hosts.rows(16, mesh).tolist()
    assert len(mine) == 8 and {i % 16 for i in read} == set(mine), (mine, read)
    # A tensor axis over processes: both read every row.
    assert len(hosts.rows(16, sharding.mesh(tensor=-1))) == 16
    return loader


def check_refusals(mesh, place, folder, loader):
    """What one process finds wrong, or the step does, every process raises."""
    spec = pj.Spec(vocab=8)
    forward = pj.Forward(lambda params, inputs, ports: pj.embed(inputs.tokens, params["embedding"]), spec=spec)
    params, forward = methods.unfreeze("")(jax.random.key(0), {"embedding": jnp.ones((8, 8))}, forward)
    params = pj.place(params, jax.NamedSharding(mesh, jax.P()))

    def bad(forward, params, batch, ports):
        return jnp.float32(jnp.nan) * jnp.sum(params["embedding"].value), jnp.float32(1)

    def fine(forward, params, batch, ports):
        return jnp.sum(params["embedding"].value), jnp.float32(1)

    class Apart:
        """A data iterator whose position is another on each process."""

        def __iter__(self):
            return self

        def __next__(self):
            return sharding.spread(
                {"tokens": np.zeros((8, 2), np.int32), "mask": np.arange(16).reshape(8, 2) > 2}, mesh
            )

        def get_state(self):
            return {"next_index": place.process}

        def set_state(self, state):
            raise AssertionError

    for loss, options in ((bad, {}), (fine, {"checkpoints": folder / "apart"})):
        try:
            training.fit(forward, params, optax.sgd(1.0), Apart(), 1, loss=loss, progress=False, **options)
        except (FloatingPointError, ValueError) as error:
            print(f"{type(error).__name__}: {error}")
    run = training.fit(forward, params, optax.sgd(1.0), iter(Apart().__next__, 0), 1, loss=fine, progress=False)
    assert run.history[0]["tokens"] == 2 * 13, run.history  # of both processes


def cut(source, target, step):
    """The folder of a run that had got as far as the checkpoint of `step`."""
    shutil.copytree(source / str(step), target / str(step))
    shutil.copy(source / "metrics.jsonl", target)
    return target


def main():
    folder = Path(sys.argv[1])
    place = hosts.start(timeout=100)
    mesh = sharding.mesh(fsdp=-1)
    check_refusals(mesh, place, folder, check_data(mesh))

    def die(record):
        print(f"told {record['step']} {record['loss']}")  # every process is told the same
        if record["step"] == DEATH and place.process == 1:  # while the next step is under way
            (folder / "death").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    model, first = anywhere.tiny(), 2 * SAVE_EVERY
    anywhere.train(model, mesh, first, checkpoints=folder / "straight", save_every=SAVE_EVERY, progress=False)
    if place.process == 0:
        cut(folder / "straight", folder / "killed", SAVE_EVERY)
    multihost_utils.sync_global_devices("cut")
    anywhere.train(model, mesh, STEPS, checkpoints=folder / "killed", save_every=SAVE_EVERY, callback=die)


if __name__ == "__main__":
    main()
