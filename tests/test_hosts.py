"""What schedulers say, how processes meet, which rows each reads, and the launcher: without a second JAX process."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import jax
import numpy as np
import pytest

from peft_jax import hosts, launch, sharding, training
from peft_jax.hosts.meeting import meet

LAUNCH = [sys.executable, launch.__file__]  # by path: it needs nothing of the package

# -- variables --------------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-005,009],login1",
    "SLURM_STEP_NUM_TASKS": "14",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3(x2)",
    "SLURM_NTASKS": "99",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "400"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "job-workers-0-0.job"}


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, None),
        ({"MASTER_ADDR": "left over"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # a batch script that no srun has started
        (TORCHRUN, ("10.0.0.1:400", 2, 1, 0, 1)),
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, ("10.0.0.1:401", 2, 1, 0, 1)),
        (TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, ("10.0.0.1:400", 2, 1, 1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "fe80::1"}, ("[fe80::1]:29500", 2, 0, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("", 1, 0, 0, 1)),
        (SLURM | {"MASTER_PORT": "9"}, ("gpu003:9", 14, 9, 1, 3)),
        (SLURM | {"MASTER_PORT": "9", "MASTER_ADDR": "ib7"}, ("ib7:9", 14, 9, 1, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "b2,a1", "MASTER_PORT": "9"}, ("b2:9", 14, 9, 1, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[1,4]-ib", "MASTER_PORT": "9"}, ("n1-ib:9", 14, 9, 1, 3)),
        # mpirun inside Slurm: its own numbers count
        (SLURM | OPEN_MPI | {"MASTER_ADDR": "a", "MASTER_PORT": "9"}, ("a:9", 4, 3, 1, 2)),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "8.0;tcp://10.1.0.2,10.2.0.2:34", "MASTER_PORT": "9"},
            ("10.1.0.2:9", 4, 3, 1, 2),
        ),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_PORT": "9"}, ("127.0.0.1:9", 4, 3, 1, 4)),
        (KUBERNETES, ("job-workers-0-0.job:29500", 4, 2, 0, 1)),
    ],
)
def test_a_place_is_read_from_what_a_scheduler_sets(variables, wanted):
    found = hosts.read(variables)
    assert found == wanted if wanted is None else found[:5] == wanted


def test_processes_of_one_slurm_step_agree_on_a_port_and_two_steps_do_not():
    port = lambda **changed: hosts.read(SLURM | changed).coordinator  # noqa: E731
    assert port() == port(SLURM_PROCID="0", SLURM_NODEID="0") != port(SLURM_STEP_ID="1")
    assert 61440 <= int(port().rpartition(":")[2]) < 65536


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK says process 2 of 2: processes count from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "process -1 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set and MASTER_ADDR is not: set it to the host name"),
        ({"RANK": "0", "MASTER_ADDR": "a"}, "RANK is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK is 'one': give a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a b"}, "at 'a b:29500', which is no address"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX is set and WORLD_SIZE is not"),
        (OPEN_MPI, "OMPI_COMM_WORLD_RANK is set and MASTER_ADDR is not"),
    ],
)
def test_wrong_variables_are_an_error_with_their_names(variables, words, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(words)):
        hosts.read(variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(words)):
        hosts.start(timeout=0.1)


def test_arguments_win_and_an_incomplete_place_is_refused(monkeypatch):
    assert hosts.start().processes == hosts.start(processes=1).processes == 1
    assert not jax.distributed.is_initialized()
    with pytest.raises(
        ValueError, match="has processes and the environment says nothing: give coordinator and process"
    ):
        hosts.start(processes=2)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        TimeoutError, match=r"process 1 of 2 cannot reach the coordinator at 127\.0\.0\.1:1 after 0\.1 s"
    ):
        hosts.start("127.0.0.1:1", timeout=0.1)


# -- meeting ----------------------------------------------------------------------------------------------------------


def places(count, port=None):
    address = f"127.0.0.1:{port or launch.free_port()}"
    return [hosts.Place(address, count, i) for i in range(count)]


def together(places, timeout):
    """What meeting raises in each of several threads, and how long it took."""
    found = [None] * len(places)

    def one(index):
        try:
            meet(places[index], timeout)
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(places))]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.monotonic() - start


def test_processes_meet_whoever_comes_first_and_whoever_else_calls():
    late = places(3)
    stranger = threading.Thread(
        target=lambda: [shout(late[0].coordinator, b"GET / HTTP/1.1\r\n\r\n\xff\n") for _ in "12"]
    )
    stranger.start()
    assert together([late[2], late[1], late[0]], timeout=10)[0] == [None] * 3
    stranger.join()
    assert together(late, timeout=10)[0] == [None] * 3  # the port is free again at once


def shout(address, data):
    host, _, port = address.partition(":")
    for _ in range(100):
        try:
            with socket.create_connection((host, int(port)), timeout=1) as line:
                return line.sendall(data)
        except OSError:
            time.sleep(0.01)


def test_a_missing_process_and_a_missing_coordinator_are_named_within_the_bound():
    all_four = places(4)
    found, seconds = together([all_four[0], all_four[2]], timeout=0.5)
    assert seconds < 3
    for error in found:
        assert isinstance(error, TimeoutError | ValueError)
        assert f"processes 1, 3 of 4 did not come to {all_four[0].coordinator} within 0.5 s" in str(error)

    found, seconds = together([all_four[1]], timeout=0.5)
    assert seconds < 3
    assert isinstance(found[0], TimeoutError) and re.search(
        rf"process 1 of 4 cannot reach the coordinator at {all_four[0].coordinator} after 0.5 s "
        r"\(Connection refused\): see that process 0 runs there",
        str(found[0]),
    )
    unknown = hosts.Place("no-such-host.invalid:1", 2, 1)
    (error,), seconds = together([unknown], timeout=0.2)
    assert isinstance(error, TimeoutError) and "no-such-host.invalid:1" in str(error) and seconds < 6


def test_processes_that_contradict_one_another_are_all_told():
    a, b, c = places(3)
    found, _ = together([a, b, c._replace(process=1)], timeout=10)
    assert ["two processes say that they are process 1 of 3" in str(error) for error in found] == [True] * 3
    found, _ = together([a, b._replace(processes=2)], timeout=10)
    assert ["process 1 says that there are 2 processes, and process 0 says 3" in str(e) for e in found] == [True] * 2


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen at 127\.0\.0\.1:{port} \(Address already in use\)"):
            meet(places(2, port)[0], 1)


# -- data -------------------------------------------------------------------------------------------------------------


def test_batches_lie_on_the_mesh_and_are_the_whole_ones():
    mesh = sharding.mesh(fsdp=2, tensor=2, sequence=2)
    rows = {"tokens": np.arange(40 * 4).reshape(40, 4).astype(np.int32), "labels": np.arange(40)}
    data = training.batches(rows, batch_size=8, seed=3)
    for source in (data, data.batch, lambda step: data.batch(step)):
        found = hosts.batches(source, mesh).batch(7)
        for name, x in data.batch(7).items():
            np.testing.assert_array_equal(found[name], x)
    assert found["tokens"].sharding.spec == jax.P(("data", "fsdp"), "sequence")
    whole = [data.batch(0), data.batch(1)]
    for found, wanted in zip(hosts.batches(whole, mesh), whole, strict=True):
        np.testing.assert_array_equal(found["tokens"], wanted["tokens"])
    with pytest.raises(
        ValueError, match=r"a batch of 9 rows does not split over data × fsdp = 2: give a multiple of 2"
    ):
        hosts.batches(lambda step: {"tokens": np.zeros((9, 2))}, mesh).batch(0)
    with pytest.raises(TypeError, match="data is a int"):
        hosts.batches(3, mesh)


def test_a_loader_reads_the_order_of_the_run_and_goes_on_from_its_state():
    mesh = sharding.mesh(fsdp=-1)
    examples = grain.MapDataset.source([{"tokens": np.full(2, i)} for i in range(20)]).shuffle(seed=1).repeat()
    wanted = [np.stack([examples[8 * step + row]["tokens"] for row in range(8)]) for step in range(6)]
    loader = hosts.loader(examples, 8, mesh, threads=2, ahead=3)
    found = []
    for step in range(6):
        if step == 3:
            state = loader.get_state()
        found.append(np.asarray(next(loader)["tokens"]))
    np.testing.assert_array_equal(found, wanted)
    again = hosts.loader(examples, 8, mesh)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], wanted[3])
    with pytest.raises(ValueError, match="a batch takes 32 rows and the data set has 20"):
        hosts.loader(examples[:20], 32, mesh)


# -- the launcher -----------------------------------------------------------------------------------------------------


def launched(script, *options, **run):
    start = time.monotonic()
    command = [*LAUNCH, *options, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **run)
    return done.returncode, done.stderr, time.monotonic() - start


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "script.py"
        path.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{text}")
        return str(path)

    return write


def test_the_launcher_sets_the_variables_and_marks_the_output(script):
    path = script("print(*map(os.environ.get, sys.argv[1].split(',')))\nsys.stdout.write('1%\\r2%\\r3%')")
    names = "WORLD_SIZE,LOCAL_RANK,LOCAL_WORLD_SIZE,MASTER_ADDR,JAX_PLATFORMS,XLA_FLAGS,SLURM_PROCID"
    environment = {**os.environ, "XLA_FLAGS": "--a --xla_force_host_platform_device_count=8 --b", "SLURM_PROCID": "7"}
    command = [*LAUNCH, "-n", "3", "-d", "4", path, names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0
    flags = "--a --b --xla_force_host_platform_device_count=4"
    wanted = [f"[{i}] 3 {i} 3 127.0.0.1 cpu {flags} None" for i in range(3)] + [f"[{i}] 3%" for i in range(3)]
    assert sorted(done.stderr.splitlines()) == sorted(wanted)
    assert hosts.read(launch.environment(environment, 2, 3, 77, None))[:5] == ("127.0.0.1:77", 3, 2, 2, 3)


DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def test_a_death_ends_the_others_within_the_bound_with_one_error(script):
    path = script(f"{DEAF}print('here', flush=True)\ntime.sleep(0.3 if rank else 60)\nos.kill(os.getpid(), 9)")
    status, output, seconds = launched(path, "-n", "2", "--grace", "0.5")
    assert status == 128 + 9 and seconds < 10
    assert output.splitlines()[-1].startswith("launch: process 1 of 2 was killed by SIGKILL (by hand, or because")
    assert "training.fit goes on from the latest of its checkpoints" in output.splitlines()[-1]
    status, output, _ = launched(script("sys.exit(3)"))
    assert status == 3 and "launch: process 0 of 1 ended with exit status 3; its last words" in output


def test_the_launcher_starts_all_again_as_often_as_it_is_told(script, tmp_path):
    path = script(
        f"mark = {str(tmp_path)!r} + f'/{{rank}}'\nprint('again' if os.path.exists(mark) else 'first')\n"
        "if rank and not os.path.exists(mark):\n  open(mark, 'w').close()\n  sys.exit(1)\nopen(mark, 'w').close()"
    )
    status, output, _ = launched(path, "-n", "2", "--restarts", "2")
    assert status == 0
    assert output.count("[1] first") == output.count("[1] again") == 1
    assert "launch: starting all 2 again (2 left)" in output and "(1 left)" not in output


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_to_the_launcher_ends_all(script, number, status):
    path = script(f"{DEAF}signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    command = [*LAUNCH, "-n", "2", "--grace", "0.3", path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        pids = [int(launcher.stderr.readline().split()[1]) for _ in range(2)]
        launcher.send_signal(number)
        assert launcher.wait(timeout=10) == status
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_launcher_refuses_what_it_cannot_start(script):
    for options, words in (((), "nothing.py is not a file"), (("-n", "0"), "give 1 or more processes")):
        status, output, _ = launched("nothing.py" if not options else script(""), *options)
        assert status == 2 and words in output
