"""Adapters on their way: registered (a directory), in host memory (an array of rows), resident (rows of the pool).

Thousands are registered, which costs nothing but a name; those that requests wait for are read into host memory; those
that run are resident.  What limits each stage is bytes of host memory and rows of the pool, never a count of adapters.

A name stands for its latest load.  A request is bound to that load when it comes, by the load's identity; a load that
is unloaded, or replaced by another of its name, drains: it takes no new users, serves those that it has, and is gone
after the last.  A load is pinned while requests run with it, and what is pinned is never evicted; the others, idle,
stay resident until their rows are wanted, and the least recently used goes first.
"""

import concurrent.futures
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from peft_jax.serving.loads import AdapterState, HostCopies, Load, Resident, first_line, too_large
from peft_jax.serving.requests import Refused
from peft_jax.serving.rows import Allocator


class AdapterInfo(NamedTuple):
    """What is told of an adapter; `rank` and `rows` are 0 until it has been read."""

    name: str
    directory: str
    rank: int
    rows: int
    state: AdapterState
    users: int


class AdapterStore:
    """All adapters, and who uses them.  Identity 0, the base, takes no rows and is always there.

    Args:
        allocator: of the pool.
        read: gives the adapter in a directory as a `Packed`; runs on another thread.
        put: writes a `Packed` into these rows of the pool; what it gives back is kept with the resident.
        host_bytes: of the copies in host memory.
        executor: runs `read`; two threads of its own by default.

    >>> from types import SimpleNamespace
    >>> read = lambda directory: SimpleNamespace(block=np.ones((2, 4, 3)), rank=2)
    >>> store = AdapterStore(Allocator(9), read, put=lambda rows, packed: None, host_bytes=999)
    >>> identity = store.register("fr", "adapters/fr")
    >>> store.prefetch([identity]); store.wait(9.0); store.poll()
    >>> store.make_resident(identity).rows.tolist(), store.infos()[0].state
    ([1, 2, 3, 4], 'resident')
    """

    def __init__(
        self,
        allocator: Allocator,
        read: Callable[[str], Any],
        put: Callable[[np.ndarray, Any], Any],
        host_bytes: int,
        executor: concurrent.futures.Executor | None = None,
    ):
        self.allocator = allocator
        self.copies = HostCopies(read, host_bytes, allocator.total, executor)
        self.puts = 0
        """Adapters put into the pool so far."""
        self.evictions = 0
        """Residents whose rows were wanted for something else so far."""
        self._put = put
        self._names: dict[str, int] = {}
        self._loads: dict[int, Load] = {}
        self._residents: dict[int, Load] = {}
        self._gone: list[int] = []
        self._last = 0

    # What is registered, and who uses it.

    def register(self, name: str, directory: str | os.PathLike[str], rows: int = 0) -> int:
        """A new load under a name, and its identity; an older one of the name drains.

        Args:
            name: what requests call it.
            directory: what `read` is given, once a request wants it.
            rows: of the pool that it takes, where the caller knows; else it is known when it has been read.

        Raises:
            Refused: if it is larger than the pool.
        """
        if rows > self.allocator.total:
            raise Refused(f"adapter {name!r} from {directory} {too_large(rows, self.allocator.total)}", 413)
        if name in self._names:
            self.unregister(name)
        self._last += 1
        self._names[name] = self._last
        self._loads[self._last] = Load(self._last, name, os.fspath(directory), rows)
        return self._last

    def unregister(self, name: str) -> None:
        """Takes no new users for a name; the load is gone when its last user is done, which may be at once.

        Raises:
            Refused: if no adapter has this name.
        """
        load = self._named(name)
        del self._names[name]
        load.draining = True
        self._end(load)

    def find(self, name: str) -> int:
        """The identity of the load that a name stands for.

        Raises:
            Refused: if there is none, or it has failed, with the reason.
        """
        load = self._named(name)
        if load.failure:
            raise Refused(load.failure.reason, load.failure.status)
        return load.identity

    def join(self, identity: int) -> None:
        """Adds a user: a request that is accepted and not finished."""
        if identity:
            self._loads[identity].users += 1

    def leave(self, identity: int) -> None:
        """Takes a user away; the last one of a draining load takes it along."""
        if identity:
            self._loads[identity].users -= 1
            self._end(self._loads[identity])

    def take_gone(self) -> list[int]:
        """Identities of loads that ended since the last call, so that what is cached of them can be dropped."""
        gone, self._gone = self._gone, []
        return gone

    def size(self, identity: int) -> int:
        """Rows of the pool; 0 where not known yet."""
        return self._loads[identity].rows if identity else 0

    def failure(self, identity: int) -> Refused | None:
        """Why a load has failed, if it has."""
        return self._loads[identity].failure if identity else None

    def infos(self) -> list[AdapterInfo]:
        """All loads, the oldest first."""
        return [AdapterInfo(x.name, x.directory, x.rank, x.rows, x.state, x.users) for x in self._loads.values()]

    @property
    def counts(self) -> dict[str, int]:
        """Names registered, copies in host memory and their bytes, residents."""
        return {
            "adapters_registered": len(self._names),
            "adapters_host": len(self.copies),
            "host_bytes": self.copies.nbytes,
            "adapters_resident": len(self._residents),
        }

    # From disk into host memory.

    def prefetch(self, identities: Sequence[int], now: float = 0.0) -> None:
        """Says which adapters are wanted, the one needed first in front: they are read, and kept before others."""
        self.copies.want([self._loads[identity] for identity in identities], now)

    def poll(self) -> None:
        """Takes in what has been read since."""
        self.copies.poll()

    def wait(self, timeout: float) -> None:
        """Blocks until something has been read, if something is being read, or for so many seconds."""
        self.copies.wait(timeout)

    def ready(self, identity: int) -> bool:
        """Whether it is resident, or can be made so without waiting."""
        return not identity or bool(self._loads[identity].resident or self._loads[identity].packed)

    def close(self) -> None:
        """Ends the threads that read."""
        self.copies.close()

    # From host memory into the pool.

    def make_resident(self, identity: int) -> Resident:
        """Puts an adapter that is in host memory into the pool, and gives its place there; where it is there, no more.

        Raises:
            OutOfRows: if the pool has too few free rows: evict first.
            Refused: if `put` raised: the load has failed.
            ValueError: if it is not in host memory.
        """
        load = self._loads[identity]
        if load.resident:
            return load.resident
        if load.packed is None:
            raise ValueError(f"adapter {load.name!r} is not in host memory: prefetch it, and poll until it is ready")
        rows = self.allocator.take(load.rows)
        try:
            load.resident = Resident(rows, self._put(rows, load.packed))
        except Exception as error:
            self.allocator.give_back(rows)
            self.copies.drop(load)
            raise load.fail(f"could not be put into the pool: {first_line(error)}") from error
        self.puts += 1
        self._residents[identity] = load
        return load.resident

    def resident(self, identity: int) -> Resident:
        """Where it lies.

        Raises:
            ValueError: if it is not in the pool.
        """
        found = self._loads[identity].resident
        if found is None:
            raise ValueError(f"adapter {self._loads[identity].name!r} is not in the pool: make it resident first")
        return found

    def is_resident(self, identity: int) -> bool:
        """Whether it is in the pool."""
        return not identity or self._loads[identity].resident is not None

    def pin(self, identity: int) -> None:
        """Keeps it resident, once it is, until `unpin` was called as often."""
        if identity:
            self._loads[identity].pins += 1

    def unpin(self, identity: int, now: float = 0.0) -> None:
        """Takes a pin back; with none left it is idle, used last at this time."""
        if identity:
            self._loads[identity].pins -= 1
            self._loads[identity].used = now

    def oldest(self) -> float:
        """When the least recently used idle resident was used; infinity if there is none."""
        return min((load.used for load in self._idle()), default=math.inf)

    def evict(self, before: float = math.inf) -> int:
        """Takes the rows of the least recently used idle resident, if it was used no later; gives how many."""
        load = min(self._idle(), key=lambda load: load.used, default=None)
        if load is None or load.used > before:
            return 0
        self.evictions += 1
        self._leave_pool(load)
        return load.rows

    @property
    def rows(self) -> int:
        """Rows of all residents."""
        return sum(load.rows for load in self._residents.values())

    @property
    def idle_rows(self) -> int:
        """Rows of the residents that nothing runs with: `evict` can free them all."""
        return sum(load.rows for load in self._idle())

    def _idle(self) -> list[Load]:
        return [load for load in self._residents.values() if not load.pins]

    def _named(self, name: str) -> Load:
        if name not in self._names:
            raise Refused(f"no adapter is loaded as {name!r}: load it, or ask for one that is", 404)
        return self._loads[self._names[name]]

    def _leave_pool(self, load: Load) -> None:
        del self._residents[load.identity]
        assert load.resident is not None
        self.allocator.give_back(load.resident.rows)
        load.resident = None

    def _end(self, load: Load) -> None:
        if load.draining and not load.users:
            if load.resident:
                self._leave_pool(load)
            self.copies.drop(load)
            del self._loads[load.identity]
            self._gone.append(load.identity)
