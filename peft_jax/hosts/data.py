"""Data for several processes: each reads its own rows of a batch, and no process's position depends on how many read.

Rows are numbered over the whole run: row r of the batch of step s is example ``s · batch_size + r``.  Which of them a
process reads follows from the mesh, so a run goes on exactly with another number of processes, or on another mesh.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from peft_jax.sharding import rows, spread

Batch = Mapping[str, Any]


class Batches:
    """Whole batches, of which this process puts its rows on the mesh: by step, or in a row for evaluation."""

    def __init__(self, data: Any, mesh: Mesh) -> None:
        self.data, self.mesh = data, mesh
        by_step = getattr(data, "batch", None)
        if callable(by_step) and "batch_size" not in inspect.signature(by_step).parameters:
            self.at = by_step
        elif callable(data):
            self.at = data
        elif hasattr(data, "__iter__") and not isinstance(data, Iterator):
            self.at = None
        else:
            raise TypeError(
                f"data is a {type(data).__name__}: give training.batches, a function of the step, or a list of whole "
                "batches (hosts.loader reads a data set of examples)"
            )

    def batch(self, step: int) -> Batch:
        if self.at is None:
            raise TypeError(f"a {type(self.data).__name__} of batches has no batch of step {step}: give batch(step)")
        if hasattr(self.data, "part") and hasattr(self.data, "batch_size"):
            return spread(self.data.part(step, rows(self.data.batch_size, self.mesh)), self.mesh)
        return self._cut(self.at(step))

    def __iter__(self) -> Iterator[Batch]:
        return map(self._cut, self.data)

    def _cut(self, batch: Batch) -> Batch:
        return spread({name: np.asarray(x)[rows(len(x), self.mesh)] for name, x in batch.items()}, self.mesh)


def batches(data: Any, mesh: Mesh) -> Batches:
    """Data for `training.fit` on a mesh, whichever processes its devices belong to.

    Args:
        data: `training.batches`, of which each process touches its own rows alone; an object with ``batch(step)`` or a
            function of the step, which gives every process the whole batch; or, for evaluation, a list of whole
            batches.
        mesh: see `sharding.mesh`.

    Raises:
        TypeError: if `data` is something else.
        ValueError: when a batch is made, if the mesh does not split its rows evenly.

    >>> import numpy as np
    >>> from peft_jax import hosts, sharding, training
    >>> mesh = sharding.mesh(fsdp=-1)
    >>> data = training.batches({"tokens": np.arange(80).reshape(40, 2)}, batch_size=mesh.size)
    >>> hosts.batches(data, mesh).batch(0)["tokens"].shape == (mesh.size, 2)
    True
    """
    return Batches(data, mesh)


class Share:
    """What this process reads of a data set, in the order in which it reads it: itself a data set of examples.

    Example i of it is row ``rows[i mod n]`` of the batch of step ``i div n``, n being how many rows are this process's.
    """

    def __init__(self, data: Any, batch_size: int, mesh: Mesh) -> None:
        self.data, self.batch_size, self.rows = data, batch_size, rows(batch_size, mesh)

    def __len__(self) -> int:
        return len(self.data) // self.batch_size * len(self.rows)

    def __getitem__(self, index: int) -> Any:
        step, row = divmod(index, len(self.rows))
        return self.data[step * self.batch_size + int(self.rows[row])]

    def __repr__(self) -> str:  # grain keeps it beside an iterator's state
        return f"Share(batch_size={self.batch_size})"


class Loader:
    """An iterator of batches on a mesh, whose state is how many batches it has given: the same on every process."""

    def __init__(self, source: Any, mesh: Mesh) -> None:
        self.source, self.mesh = source, mesh

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return spread(next(self.source), self.mesh)

    def get_state(self) -> Any:
        return self.source.get_state()

    def set_state(self, state: Any) -> None:
        self.source.set_state(state)


def loader(data: Any, batch_size: int, mesh: Mesh, *, threads: int = 4, ahead: int = 16) -> Loader:
    """Examples by number, read ahead by grain's threads, as batches on a mesh; each process reads its own rows alone.

    Args:
        data: a `grain.MapDataset` (shuffled, repeated and mapped as one likes: it is the order of the whole run), or
            anything with a length and ``[i]``.  An example is a dict of arrays of one shape.
        batch_size: rows of a batch, over all processes.
        mesh: see `sharding.mesh`.
        threads, ahead: of this process: how many read, and how many examples ahead.

    Raises:
        ValueError: if the mesh does not split the batch evenly, or the data set does not fill one.

    >>> import grain, numpy as np
    >>> from peft_jax import hosts, sharding
    >>> mesh = sharding.mesh(fsdp=-1)
    >>> examples = grain.MapDataset.source([{"tokens": np.array([i])} for i in range(9)]).shuffle(seed=1).repeat()
    >>> next(hosts.loader(examples, mesh.size, mesh))["tokens"].shape == (mesh.size, 1)
    True
    """
    import grain

    share = Share(data, batch_size, mesh)
    if not len(share):
        raise ValueError(f"a batch takes {batch_size} rows and the data set has {len(data)}: choose a smaller one")
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    own = grain.MapDataset.source(share).to_iter_dataset(reading).batch(len(share.rows), drop_remainder=True)
    return Loader(iter(own), mesh)
