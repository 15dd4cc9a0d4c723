"""Processes on loopback that train together: the same run as one process's, killed and gone on with, on other meshes.

Eight fake devices are not eight GPUs, and two processes on one machine are not two hosts: what is tested is that they
compute the same, not that they are fast.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as orbax
import pytest
from several import DEATH, SAVE_EVERY, STEPS

from experiments import anywhere
from peft_jax import launch, training

TESTS = Path(__file__).parent
GRACE = 2.0
SCRIPT = ["-m", "experiments.anywhere", "--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Starts a command in several processes, and gives its exit status and output."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS / "without_torch", TESTS, TESTS.parent))),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }

    def start(command, processes, devices):
        options = ["--processes", str(processes), "--devices", str(devices), "--grace", str(GRACE)]
        done = subprocess.run(
            [sys.executable, launch.__file__, *options, *command],  # by path: it needs nothing of the package
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stderr

    return start


@pytest.fixture(scope="module")
def killed(started, tmp_path_factory):
    """Two processes of four devices, of which process 1 is killed in a step: folder, output, and when all had ended."""
    folder = tmp_path_factory.mktemp("two")
    status, output = started([str(TESTS / "several.py"), str(folder)], 2, 4)
    ended = time.time()
    assert status == 128 + 9, output
    return folder, output, ended


@pytest.fixture(scope="module")
def eight(tmp_path_factory, quick_compiles):
    """The same script in this process, with its eight devices."""
    folder = tmp_path_factory.mktemp("eight")
    anywhere.main([*SCRIPT[2:], "--checkpoints", str(folder)])
    return folder


def measured(folder):
    """Loss and gradient norm of each step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in map(json.loads, lines)}


def losses(folder):
    return {step: loss for step, (loss, _) in measured(folder).items()}


def bits(folder, step):
    """The whole state of a checkpoint, as orbax alone reads it."""
    reader, path = orbax.PyTreeCheckpointer(), folder / str(step) / "state"
    tree = reader.metadata(path).item_metadata.tree
    plain = jax.tree.map(lambda _: orbax.RestoreArgs(restore_type=np.ndarray), tree)
    return [(x.shape, x.tobytes()) for x in jax.tree.leaves(reader.restore(path, restore_args=plain))]


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for step, loss in found.items():
        assert loss == pytest.approx(wanted[step], rel=1e-5)


def test_a_killed_process_ends_the_others_with_one_error(killed):
    folder, output, ended = killed
    assert ended - float((folder / "death").read_text()) < GRACE + 5
    lines = output.splitlines()
    assert lines[-1].startswith("launch: process 1 of 2 was killed by SIGKILL")
    assert sum(line.startswith("launch: ") for line in lines) == 1
    assert training.Checkpoints(folder / "killed").steps == [s for s in range(1, DEATH) if s % SAVE_EVERY == 0]
    told = [re.findall(rf"\[{process}\].*(told \d+ .*)", output) for process in (0, 1)]
    assert [line.split()[1] for line in told[1]] == [str(step) for step in range(SAVE_EVERY + 1, DEATH + 1)]
    assert told[0][: len(told[1])] == told[1]
    shown = {line[:3] for line in lines if "step/s" in line}
    assert shown == {"[0]"}


def test_every_process_refuses_what_one_finds_wrong(killed):
    for words in (
        "FloatingPointError: step 1 is not finite",
        "ValueError: the processes' data iterators are at differ",
    ):
        assert {line[:3] for line in killed[1].splitlines() if words in line} == {"[0]", "[1]"}


def test_a_run_goes_on_bit_for_bit_on_the_same_mesh(killed):
    straight, again = (killed[0] / name for name in ("straight", "killed"))
    step = 2 * SAVE_EVERY
    assert {i: numbers for i, numbers in measured(again).items() if i <= step} == measured(straight)
    assert bits(again, step) == bits(straight, step) != bits(straight, SAVE_EVERY)
    assert (again / str(step) / "state" / "ocdbt.process_1").is_dir()  # both have written


def test_the_killed_run_goes_on_with_twice_the_processes_on_another_mesh(killed, eight, started):
    folder = killed[0] / "killed"
    told = losses(folder)
    assert max(told) >= DEATH
    status, output = started([*SCRIPT, "--data", "2", "--checkpoints", str(folder)], 4, 2)
    assert status == 0, output
    assert f"[0] 4 processes, 8 devices: loss {told[1]:.4f}, after {STEPS} steps" in output
    found = losses(folder)
    close(found, losses(eight))
    close({step: found[step] for step in told}, told)


def test_one_cpu_runs_the_same_script(eight, started, tmp_path):
    status, output = started([*SCRIPT, "--checkpoints", str(tmp_path)], 1, 1)
    assert status == 0, output
    assert "[0] 1 processes, 1 devices" in output
    close(losses(tmp_path), losses(eight))
