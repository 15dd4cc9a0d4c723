"""A load of an adapter, and the copies of loads in host memory.

A load is a directory that was registered under a name at some time, with an identity, a number that is never used
again.  A few threads read the loads that requests wait for; the copies stay as long as host memory allows, and go in
the order in which they were wanted last.  A copy may be read more than once; if the files have changed by then, the
load has failed, for what was computed with it, and is cached under its identity, was computed with another adapter.

A load fails once, with a reason that every request that wants it is told; only a new load tries again.
"""

import concurrent.futures
import dataclasses
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from peft_jax.serving.requests import Refused

AdapterState = Literal["disk", "loading", "host", "resident", "draining", "failed"]


@runtime_checkable
class Packed(Protocol):
    """An adapter in host memory: `block` is ``[layers, n, width]``, n rows of the pool; `rank` is its largest."""

    @property
    def block(self) -> np.ndarray: ...

    @property
    def rank(self) -> int: ...


class Resident(NamedTuple):
    """Where an adapter lies in the pool, and what was given back when it was put there."""

    rows: np.ndarray
    tables: Any


@dataclasses.dataclass(eq=False)
class Load:
    """One load of an adapter.

    rows, nbytes, rank   its size; 0 until it is known, which is after it was read for the first time
    users                requests that are accepted and not finished
    pins                 of them, those that run
    used                 when it was last in use, or wanted
    """

    identity: int
    name: str
    directory: str
    rows: int = 0
    nbytes: int = 0
    rank: int = 0
    users: int = 0
    pins: int = 0
    used: float = -math.inf
    draining: bool = False
    failure: Refused | None = None
    stamp: Any = None
    reading: "concurrent.futures.Future[Any] | None" = None
    packed: Packed | None = None
    resident: Resident | None = None

    @property
    def state(self) -> AdapterState:
        if self.failure:
            return "failed"
        if self.draining:
            return "draining"
        if self.resident:
            return "resident"
        if self.reading:
            return "loading"
        return "host" if self.packed else "disk"

    def fail(self, what: str, status: int = 400) -> Refused:
        """Marks it as failed, and gives the refusal that those who want it are told."""
        self.failure = Refused(f"adapter {self.name!r} from {self.directory} {what}", status)
        return self.failure


class HostCopies:
    """Reads loads, and keeps what was read within a number of bytes.

    Args:
        read: gives the adapter in a directory, packed; runs on another thread, and what it raises is the reason told.
        limit: bytes of all copies; those being read at the moment come on top.
        pool_rows: what no adapter may exceed.
        executor: runs `read`; two threads of its own by default.

    >>> from types import SimpleNamespace
    >>> copies = HostCopies(lambda directory: SimpleNamespace(block=np.ones((2, 4, 3)), rank=2), limit=999, pool_rows=8)
    >>> load = Load(1, "fr", "adapters/fr")
    >>> copies.want([load], now=0.0); copies.wait(9.0); copies.poll()
    []
    >>> load.rows, load.nbytes, load.state
    (4, 192, 'host')
    """

    def __init__(
        self,
        read: Callable[[str], Any],
        limit: int,
        pool_rows: int,
        executor: concurrent.futures.Executor | None = None,
    ):
        self.limit = limit
        self.pool_rows = pool_rows
        self.nbytes = 0
        """Bytes of all copies."""
        self._read = read
        self._executor = executor or concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="adapters")
        self._copies: OrderedDict[int, Load] = OrderedDict()  # the one that goes next first
        self._reading: dict[int, Load] = {}
        self._wanted: list[int] = []

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def reading(self) -> int:
        """How many are being read."""
        return len(self._reading)

    def want(self, loads: Sequence[Load], now: float) -> None:
        """Starts to read those that are only on disk, and keeps the copies of the others, the first before the last.

        What would not fit beside those wanted before it is not read yet, so that two never push each other out in turn.

        Args:
            loads: the one needed first in front; they replace those of the last call.
            now: the time.
        """
        self._wanted = [load.identity for load in loads]
        nbytes, full = 0, False
        for load in loads:
            load.used = now
            if load.resident or load.failure:
                continue
            full = full or (nbytes > 0 and nbytes + load.nbytes > self.limit)
            if full:
                continue
            nbytes += load.nbytes
            if not load.packed and not load.reading:
                load.reading = self._executor.submit(_read_stamped, self._read, load.directory)
                self._reading[load.identity] = load
        self._trim()

    def poll(self) -> list[Load]:
        """Takes in what has been read since; gives the loads that failed."""
        failed = []
        for load in [load for load in self._reading.values() if load.reading and load.reading.done()]:
            future, load.reading = load.reading, None
            del self._reading[load.identity]
            self._take_in(load, future)
            if load.failure:
                failed.append(load)
        self._trim()
        return failed

    def wait(self, timeout: float) -> None:
        """Blocks until something has been read, if something is being read, or for so many seconds."""
        futures = [load.reading for load in self._reading.values() if load.reading]
        if futures:
            concurrent.futures.wait(futures, timeout, concurrent.futures.FIRST_COMPLETED)

    def drop(self, load: Load) -> None:
        """Drops a copy, if there is one; what is being read of this load is not kept."""
        load.packed = None
        self._reading.pop(load.identity, None)
        if self._copies.pop(load.identity, None):
            self.nbytes -= load.nbytes

    def close(self) -> None:
        """Ends the threads, without waiting for what is being read."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _take_in(self, load: Load, future: "concurrent.futures.Future[Any] | None") -> None:
        if future is None or future.cancelled():
            return
        if (error := future.exception()) is not None:
            load.fail(f"could not be read: {first_line(error)}")
            return
        stamp, packed = future.result()
        rows, nbytes = int(packed.block.shape[1]), int(packed.block.nbytes)
        if load.stamp not in (None, stamp):
            load.fail("has changed on disk since it was loaded: load it again")
        elif rows > self.pool_rows:
            load.fail(too_large(rows, self.pool_rows), 413)
        elif nbytes > self.limit:
            load.fail(f"takes {nbytes} bytes of host memory, and all adapters have {self.limit}: allow them more")
        else:
            load.stamp, load.packed, load.rank = stamp, packed, int(packed.rank)
            load.rows, load.nbytes = rows, nbytes
            self._copies[load.identity] = load
            self.nbytes += nbytes

    def _trim(self) -> None:
        for identity in reversed(self._wanted):
            if identity in self._copies and not self._copies[identity].resident:  # a resident one can do without
                self._copies.move_to_end(identity)
        while self.nbytes > self.limit:
            self.drop(next(iter(self._copies.values())))


def too_large(rows: int, pool_rows: int) -> str:
    """What is told of an adapter that the pool can never hold."""
    return f"takes {rows} rows and the pool has {pool_rows}: serve it from a larger pool"


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_stamped(read: Callable[[str], Any], directory: str) -> tuple[Any, Any]:
    """What the files were before they were read, by their names, sizes and times, and what was read."""
    try:
        with os.scandir(directory) as files:
            stamp = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    except OSError:
        stamp = []  # `read` knows better what is wrong, or where else it reads from
    return stamp, read(directory)
