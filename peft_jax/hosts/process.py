"""Making this process one of several: where it belongs, the meeting, and then JAX's own start."""

import atexit
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from peft_jax.hosts.meeting import meet, split
from peft_jax.hosts.variables import LOOPBACK, Place, check, read


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = 120,
    local_devices: Sequence[int] | None = None,
    heartbeat: int = 100,
) -> Place:
    """Makes this process one of several, before anything else is asked of JAX; alone, it does nothing.

    What is not given is read from the environment (`hosts.read`); arguments win.  Processes of the CPU talk by gloo.

    A process that ends with an error ends at once, without waiting for the others as JAX would: they find their
    connection closed, and end too.

    Args:
        coordinator: ``host:port`` of process 0, where it listens.  A loopback address is bound to that interface alone.
        processes, process: how many there are, and which one this is, from 0.  ``processes=1`` runs alone, whatever the
            environment says.
        timeout: seconds to wait for the other processes.
        local_devices: which of the machine's accelerators this process takes; by default all of them, or one each where
            a machine runs several processes.
        heartbeat: seconds after which a process that has fallen silent is held for dead, and all others end.

    Raises:
        ValueError: if the place is incomplete or cannot be, or processes contradict one another.
        TimeoutError: if process 0 cannot be reached, or processes are missing, with the address and what to do.
        RuntimeError: if it was called before, or JAX has already looked for devices.

    >>> from peft_jax import hosts
    >>> hosts.start(processes=1).process
    0
    """
    place = _place(coordinator, processes, process)
    if place.processes == 1:
        return place
    if jax.distributed.is_initialized():
        raise RuntimeError("hosts.start() was called before in this process: call it once, at the top of the script")
    meet(place, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host, port = split(place.coordinator)
    local = f"[{host}]" if ":" in host else host
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=_devices(place) if local_devices is None else list(local_devices),
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(timeout)),
        heartbeat_timeout_seconds=heartbeat,
        coordinator_bind_address=f"{local}:{port}" if local in LOOPBACK else None,
    )
    atexit.register(_end_at_once_on_errors)
    return place


def _place(coordinator: str | None, processes: int | None, process: int | None) -> Place:
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if processes == 1 and process in (None, 0):
        return Place("", 1, 0)
    if None not in given.values():
        return check(Place(coordinator, processes, process))  # type: ignore[arg-type]
    found = read(os.environ)
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if found is not None:
        return check(found._replace(**known))
    if known:
        missing = " and ".join(name for name in given if name not in known)
        raise ValueError(f"hosts.start() has {', '.join(known)} and the environment says nothing: give {missing} too")
    return Place("", 1, 0, told_by="nobody")


def _devices(place: Place) -> list[int] | None:
    """One accelerator each where several processes share a machine, unless the scheduler has shared them out."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if place.neighbours == 1 or (visible is not None and len(visible.split(",")) < place.neighbours):
        return None
    return [place.local]


def _end_at_once_on_errors() -> None:
    """Runs before JAX's own farewell, which waits for all processes: these wait for this one, in a collective."""
    error = getattr(sys, "last_value", None)
    if error is not None and not hasattr(sys, "ps1"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
