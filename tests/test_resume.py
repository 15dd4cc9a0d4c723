"""Checkpoints and resume: killed runs in processes of their own, and every kind of data in this one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import peft_jax as pj
from peft_jax import training

FORWARD = toy.forward(48)
STEPS, SAVE_EVERY = 12, 3
TX = optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS))


def train(folder, batches=toy.batch, steps=STEPS, params=None, tx=TX, **options):
    """A run with everything on that a resume could lose: dropout, accumulation, a schedule, clipping."""
    params = toy.params() if params is None else params
    defaults = {"accumulate": 2, "clip": 0.5, "key": jax.random.key(4), "save_every": SAVE_EVERY, "progress": False}
    return training.fit(FORWARD, params, tx, batches, steps, checkpoints=folder, **defaults | options)


def bits(run):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((run.params, run.opt_state))]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    return train(folder), folder


# -- SIGKILL ----------------------------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_step(at):
    """A callback that kills the process when step `at` is told, which is while the next step is running."""
    return lambda record: die() if record["step"] == at else None


def die_in_a_save(folder, at):
    """Kills the process as soon as the checkpoint of step `at` is half-written: something is there, but not its name.

    Renaming waits, lest a busy machine should finish the save before the watcher looks.
    """
    rename = os.rename

    def slow(source, *args, **options):
        time.sleep(10 if f"{os.sep}{at}." in os.fspath(source) else 0)
        rename(source, *args, **options)

    os.rename = slow

    def watch():
        while True:
            for path in Path(folder).glob(f"{at}.*"):
                if any(inner.is_file() for inner in path.rglob("*")):
                    die()
            time.sleep(0.0005)

    threading.Thread(target=watch, daemon=True).start()


CHILD = """
import sys
sys.path[:0] = sys.argv[3:]
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
import test_resume as t
folder, how = sys.argv[1:3]
kind, _, at = how.partition(":")
if kind == "save":
    t.die_in_a_save(folder, int(at))
run = t.train(folder, callback=t.die_in_a_step(int(at)) if kind == "step" else None)
import numpy, hashlib
print(hashlib.sha256(b"".join(t.bits(run))).hexdigest())
"""


def child(folder, how):
    here = Path(__file__).parent
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder), how, str(here), str(here.parent)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_killed_in_a_step_and_in_a_save_ends_bit_identical(tmp_path, straight):
    import hashlib

    done = child(tmp_path, "step:5")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert training.Checkpoints(tmp_path).steps == [3]
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3, 4, 5]

    done = child(tmp_path, "save:9")
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert any(name.startswith("9.") for name in left), "killed while the save was under way"
    assert "9" not in left
    assert (tmp_path / "6").is_dir()

    done = child(tmp_path, "none")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning, nor a word from what we are built on
    assert done.stdout.split() == [hashlib.sha256(b"".join(bits(straight[0]))).hexdigest()]
    assert not [path.name for path in tmp_path.iterdir() if "tmp" in path.name]
    assert training.Checkpoints(tmp_path).steps == [6, 9, 12]
    assert timeless(lines(tmp_path)) == timeless(lines(straight[1]))


# -- every kind of data -----------------------------------------------------------------------------------------------


class Stream:
    """An iterator that can say where it is, as grain's do."""

    def __init__(self, as_bytes):
        self.at, self.as_bytes = 0, as_bytes

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return toy.batch(self.at - 1)

    def get_state(self):
        return json.dumps(self.at).encode() if self.as_bytes else {"next": np.int64(self.at), "path": ["a", None]}

    def set_state(self, state):
        self.at = json.loads(state) if self.as_bytes else state["next"]


KINDS = {
    "function": lambda: toy.batch,
    "object": lambda: type("Data", (), {"batch": staticmethod(toy.batch)})(),
    "state": lambda: Stream(as_bytes=False),
    "bytes": lambda: Stream(as_bytes=True),
    "iterable": lambda: (toy.batch(step) for step in range(STEPS)),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken"), loss=toy.pull)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_data_resumes_exactly(tmp_path, unbroken, kind):
    def fault(record):
        if record["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, KINDS[kind](), loss=toy.pull, callback=fault)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a line that was being written
    data = KINDS[kind]()
    run = train(tmp_path, data, loss=toy.pull)
    assert bits(run) == bits(unbroken)
    assert timeless(run.history) == timeless(unbroken.history) == timeless(lines(tmp_path))
    if isinstance(data, Stream):
        assert data.at == STEPS  # none was read twice, none ahead


def test_a_finished_run_is_given_back(straight):
    run = train(straight[1])
    assert run.step == STEPS
    assert bits(run) == bits(straight[0])


# -- what is on disk --------------------------------------------------------------------------------------------------


def test_the_base_is_not_saved_and_old_checkpoints_go(tmp_path):
    params = toy.params(vocab=48) | {"unused": jax.random.normal(jax.random.key(0), (512, 512))}  # a megabyte
    train(tmp_path, params=params, steps=5, loss=toy.pull, save_every=1, keep=2)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert training.Checkpoints(tmp_path).steps == [4, 5]
    assert size < 100_000
    manifest = json.loads((tmp_path / "5" / "manifest" / "metadata").read_text())
    assert manifest["params"]["unused"] == "float32[512,512]"
    assert manifest["params"]["layers/kernel"] == "Nudge(rank=2)"
    assert manifest["params"]["layers/kernel/a"] == "float32[2,16,2]"
    assert manifest["optimiser"]["0/mu/layers/kernel/a"] == "float32[2,16,2]"
    assert manifest["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("key", [jax.random.key(1), jax.random.key(1, impl="rbg"), jax.random.PRNGKey(1)])
def test_a_checkpoint_restores_into_abstract_trees(tmp_path, key):
    params, tx = toy.params(), optax.adam(1e-3)
    state, frozen = training.init_state(params, tx, key)
    with training.Checkpoints(tmp_path) as store:
        store.save(state._replace(step=jnp.int32(7)), frozen, position=b"\x00\xff")
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, frozen))
        found, position = store.restore(*like)
        with pytest.raises(FileNotFoundError, match="holds no checkpoint of step 3"):
            store.restore(*like, step=3)
        with pytest.raises(TypeError, match="get_state gave a set"):
            store.save(state, frozen, position={1})
        assert store.steps == [7]
    assert position == b"\x00\xff"
    assert int(found.step) == 7
    assert found.key.dtype == key.dtype
    np.testing.assert_array_equal(jax.random.normal(found.key, (3,)), jax.random.normal(key, (3,)))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found.trainables), jax.tree.leaves(pj.partition(params)[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_of_another_run_is_refused_by_path(straight, tmp_path):
    folder = straight[1]
    wide = jax.tree.map(lambda x: x, toy.params())
    wide["embedding"] = jnp.zeros((48, 17))
    with pytest.raises(ValueError, match=r"params/embedding it has float32\[48,16\], and the run has float32\[48,17\]"):
        train(folder, params=wide)
    with pytest.raises(
        ValueError, match=r"params/layers/kernel it has Nudge\(rank=2\), and the run has Nudge\(rank=3\)"
    ):
        train(folder, params=toy.params(rank=3))
    half = toy.params(dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=r"params/layers/kernel/a it has float32\[2,16,2\], .* bfloat16\[2,16,2\]"):
        train(folder, params=half)
    with pytest.raises(ValueError, match="params/extra it has nothing, and the run has"):
        train(folder, params=toy.params() | {"extra": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"optimiser/.* and the run has nothing"):
        train(folder, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="already 12 steps long and this run asks for 5"):
        train(folder, steps=5)
    with pytest.raises(ValueError, match="another key"):
        train(folder, key=jax.random.key(5))
    assert bits(train(folder, key=None)) == bits(straight[0])  # no key given: the run's own
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ValueError, match="7 is not a checkpoint of peft_jax"):
        train(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        train(tmp_path / "file")
    with pytest.raises(ValueError, match="keep is 0"):
        train(tmp_path, keep=0)


def test_a_file_that_is_not_of_metrics_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n\nnothing happened\n")
    with pytest.raises(ValueError, match="line 1: not a line of metrics"):
        train(None, metrics=path)
    assert path.read_text() == "dear diary\n\nnothing happened\n"
