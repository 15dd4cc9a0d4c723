"""Starts one script in several processes on this machine, and watches over them.

    python -m peft_jax.launch --processes 2 --devices 4 script.py --its own arguments

Each process finds RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, which `hosts.start()` reads; their
output comes line by line, each with its process's number.  When one dies the others are ended: they would wait for it.
Several machines have a scheduler to start and watch processes: there `hosts.start()` is enough (see docs/hosts.md).
"""

import argparse
import contextlib
import ctypes
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

GRACE = 5.0


def run(
    command: Sequence[str],
    processes: int,
    *,
    devices: int | None = None,
    grace: float = GRACE,
    restarts: int = 0,
    out: Any = None,
) -> int:
    """Runs `command` in `processes` processes that find one another over loopback; gives the exit status.

    Args:
        command: what each process runs.
        devices: fake CPU devices a process; by default, the machine's own devices.
        grace: seconds from a death (or a signal to this process) until the processes that are left are killed.
        restarts: how often all of them are started again after a death.
        out: a text stream for their output and the errors, by default the standard error stream.

    Raises:
        ValueError: if a number is out of range.
    """
    if processes < 1 or restarts < 0 or grace < 0 or (devices is not None and devices < 1):
        raise ValueError(
            f"processes={processes}, devices={devices}, restarts={restarts}, grace={grace}: give 1 or more processes "
            "and devices, and 0 or more of the others"
        )
    say = _speaker(out or sys.stderr)
    for left in range(restarts, -1, -1):
        status, error = _once(command, processes, devices, grace, say)
        if error:
            say(f"launch: {error}\n")
        if status == 0 or not error or status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            break
        if left:
            say(f"launch: starting all {processes} again ({left} left)\n")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m peft_jax.launch",
        description="Runs one script in several processes on this machine; when one dies, the others are ended.",
        epilog="A script makes itself one of several by peft_jax.hosts.start().",
    )
    parser.add_argument("--processes", "-n", type=int, default=1, help="how many processes (default: 1)")
    parser.add_argument("--devices", "-d", type=int, help="fake CPU devices a process (default: the machine's devices)")
    parser.add_argument("--restarts", type=int, default=0, help="how often all start again after a death (default: 0)")
    parser.add_argument("--grace", type=float, default=GRACE, help="seconds until the rest is killed (default: 5)")
    parser.add_argument("-m", dest="module", action="store_true", help="the script is a module's name")
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the script")
    given = parser.parse_args(arguments)
    if not given.module and not os.path.isfile(given.script):
        parser.error(f"{given.script} is not a file: give a Python script, or -m and a module")
    command = [sys.executable, "-u", *(["-m"] if given.module else []), given.script, *given.arguments]
    try:
        return run(command, given.processes, devices=given.devices, grace=given.grace, restarts=given.restarts)
    except ValueError as error:
        parser.error(str(error))


# -- one start of all processes ---------------------------------------------------------------------------------------


def _once(command: Sequence[str], processes: int, devices: int | None, grace: float, say: Any) -> tuple[int, str]:
    """``(exit status, what went wrong)``"""
    events: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
    port = free_port()
    with _signals(lambda number: events.put(("signal", number, 0))):
        running, readers = {}, []
        for index in range(processes):
            child = subprocess.Popen(
                command,
                env=environment(os.environ, index, processes, port, devices),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its children are ended with it, and Ctrl-C reaches it through us alone
                preexec_fn=_die_with_parent,
            )
            running[index] = child
            readers.append(threading.Thread(target=_copy, args=(child, f"[{index}] ", say), daemon=True))
            threading.Thread(target=_wait, args=(child, index, events), daemon=True).start()
            readers[-1].start()
        status, error = 0, ""
        while running and not error:
            kind, which, code = events.get()
            if kind == "signal":
                status, error = 128 + which, f"{signal.Signals(which).name}: all processes were ended"
                _end(running, which, grace, events)
            else:
                _kill(running.pop(which), signal.SIGKILL)  # whatever it has left behind
                if code:
                    status = code if code > 0 else 128 - code
                    error = _tell(which, processes, code)
                    _end(running, signal.SIGTERM, grace, events)
        for reader in readers:
            reader.join(timeout=2)
    return status, error


def environment(given: Any, process: int, processes: int, port: int, devices: int | None) -> dict[str, str]:
    """The variables of one process; without those by which a scheduler would tell it something else."""
    names = ("RANK", "OMPI_COMM_WORLD_", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "TORCHELASTIC_")
    variables = {name: value for name, value in given.items() if not name.startswith(names)}
    if devices is not None:
        flags = re.sub(r"\s*--xla_force_host_platform_device_count=\S+", "", variables.get("XLA_FLAGS", ""))
        variables["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
        variables["JAX_PLATFORMS"] = "cpu"
    return variables | {
        "RANK": str(process),
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": str(process),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _tell(process: int, processes: int, code: int) -> str:
    how = f"ended with exit status {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (by hand, or because the machine ran out of memory)"
    others = "" if processes == 1 else ", and the others were ended"
    return (
        f"process {process} of {processes} {how}{others}; its last words are above, marked [{process}]. Start the "
        "same command again: training.fit goes on from the latest of its checkpoints"
    )


def _end(running: dict[int, Any], number: int, grace: float, events: Any) -> None:
    """Ends what is left: asked first, killed after `grace` seconds (JAX itself takes no notice of SIGTERM)."""
    for child in running.values():
        _kill(child, number)
    timer = threading.Timer(grace, lambda: events.put(("time", 0, 0)))
    timer.daemon = True
    timer.start()
    while running:
        kind, which, _ = events.get()
        if kind == "died":
            _kill(running.pop(which), signal.SIGKILL)
        else:  # the time is up, or somebody is impatient
            for child in running.values():
                _kill(child, signal.SIGKILL)
    timer.cancel()


def _kill(child: Any, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _wait(child: Any, index: int, events: Any) -> None:
    events.put(("died", index, child.wait()))


def _die_with_parent() -> None:
    """On Linux a process ends with the launcher, even one that is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def _signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Hands SIGINT and SIGTERM to `handle`, where this is the main thread: nobody else may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, lambda number, frame: handle(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- output -----------------------------------------------------------------------------------------------------------


def _speaker(out: Any) -> Callable[[str], None]:
    lock = threading.Lock()

    def say(text: str) -> None:
        with lock:
            out.write(text)
            out.flush()

    return say


def _copy(child: Any, prefix: str, say: Callable[[str], None]) -> None:
    """The output of a process, line by line.  Of a line that is written over, as progress bars do, the last state."""
    with child.stdout as lines:
        for line in lines:
            last = line.rstrip(b"\n").rstrip(b"\r").rpartition(b"\r")[2]
            say(f"{prefix}{last.decode(errors='replace')}\n")


if __name__ == "__main__":
    sys.exit(main())
