"""Who owns which row of the pool.

The pool is one array `[layers, rows, width]` on the device.  All that lives there is made of whole rows, any rows, in
any order: a token takes two (its key and its value), an adapter as many as its matrices fill.  So there is one free
list for both, nothing is fragmented, and no share of the pool is set apart for either (S-LoRA's unified paging).

A row may have several owners: requests with a common beginning, and the cache of such beginnings.  The allocator counts
them, and a row is free when the last one has given it back.  Row 0 is the row of zeros that padding reads: it is never
given out.  To give back what one does not own is a fault of the caller's that would hand one row to two requests, and
so it raises, and changes nothing.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int32

TOKEN_ROWS = 2


class OutOfRows(Exception):
    """The pool has fewer free rows than were wanted: `wanted` and `free` say how many."""

    def __init__(self, wanted: int, free: int):
        super().__init__(f"{wanted} rows of the pool were wanted and {free} are free: evict or preempt something first")
        self.wanted = wanted
        self.free = free


class Allocator:
    """The free list of a pool, with an owner count for each row.

    `take` and `give_back` cost O(n) for n rows, however large the pool is.

    Args:
        rows: of the pool, with row 0, which is never given out: `total` is one less.

    Raises:
        ValueError: if no row is left beside row 0.

    >>> allocator = Allocator(6)
    >>> ids = allocator.take(3)
    >>> ids.tolist(), allocator.free, allocator.total
    ([1, 2, 3], 2, 5)
    >>> allocator.share(ids[:1])
    >>> allocator.give_back(ids)
    >>> allocator.free  # row 1 has an owner left
    4
    """

    def __init__(self, rows: int):
        if rows < 2:
            raise ValueError(f"a pool of {rows} rows has none to give out beside row 0: give 2 or more")
        self.total = rows - 1
        self._owners = np.zeros(rows, np.int32)
        self._stack = np.arange(rows - 1, 0, -1, dtype=np.int32)  # the free rows are its first `free` entries
        self.free = rows - 1

    def take(self, n: int) -> Int32[np.ndarray, "n"]:
        """Gives out `n` free rows, each with one owner.

        Raises:
            OutOfRows: if fewer are free; none is taken then.
        """
        if n < 0:
            raise ValueError(f"{n} rows cannot be taken: give 0 or more")
        if n > self.free:
            raise OutOfRows(n, self.free)
        ids = self._stack[self.free - n : self.free][::-1].copy()
        self.free -= n
        self._owners[ids] = 1
        return ids

    def share(self, ids: Int32[np.ndarray, "n"]) -> None:
        """Adds an owner to each of these rows.

        Raises:
            ValueError: if one of them is free, row 0, or not of this pool.
        """
        self._counted(ids, "shared")
        np.add.at(self._owners, ids, 1)

    def give_back(self, ids: Int32[np.ndarray, "n"]) -> None:
        """Takes an owner from each of these rows, and those that have none left are free.

        Raises:
            ValueError: if one of them is free, row 0, not of this pool, or here more often than it has owners.
        """
        unique, times = self._counted(ids, "given back")
        left = self._owners[unique] - times
        if (left < 0).any():
            worst = int(unique[left < 0][0])
            raise ValueError(f"row {worst} is given back more often than it has owners: each owner gives it back once")
        self._owners[unique] = left
        freed = unique[left == 0][::-1]
        self._stack[self.free : self.free + len(freed)] = freed
        self.free += len(freed)

    def owners(self, ids: Int32[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
        """How many owners each of these rows has; 0 for a free row and for row 0."""
        return self._owners[ids]

    def _counted(self, ids: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
        unique, times = np.unique(ids, return_counts=True)
        if len(unique) and (unique[0] < 1 or unique[-1] > self.total):
            wrong = int(unique[0] if unique[0] < 1 else unique[-1])
            raise ValueError(f"row {wrong} cannot be {what}: this pool gives out rows 1 to {self.total}")
        if (self._owners[unique] == 0).any():
            wrong = int(unique[self._owners[unique] == 0][0])
            raise ValueError(f"row {wrong} cannot be {what}: it has no owner")
        return unique, times


def adapter_rows(matrices: Iterable[tuple[int, int, int]], width: int) -> int:
    """How many rows of the pool an adapter takes.

        Σ ⌈in · r / W⌉ + ⌈r · out / W⌉        over the matrices of one layer: a row lies in all layers

    With W = in = out that is 2 r for each matrix, S-LoRA's own accounting.

    Args:
        matrices: inputs, outputs and rank of each adapted matrix of a layer.
        width: numbers in a row of one layer, W = key-value heads · head dimension.

    >>> adapter_rows([(4096, 4096, 8), (4096, 1024, 8)], width=1024)
    104

    Source: Sheng et al. 2023, section 5.1.

    Departures: there, W is the model's width and each matrix is as wide; here A and B of any shape are cut into rows.
    """
    return sum(-(-inputs * rank // width) + -(-rank * outputs // width) for inputs, outputs, rank in matrices)
