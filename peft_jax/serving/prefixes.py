"""Keys and values of beginnings that requests have in common, kept for the next request that begins so.

Tokens are kept in blocks.  A block is known by the load of the adapter under which it was computed (0 for the base: the
same tokens have other keys under another adapter), by the block before it, and by its own tokens; so a lookup goes from
block to block, and what it finds is equal to the last token.  A block before is named by a serial number that no other
block ever has, where others chain hashes: two different beginnings can then not be taken for one another.

The cache is one owner of a block's rows, and each request that uses it is another; a block that nobody else owns is
idle and may be evicted.  Two rules keep that simple:

* A user of a block also uses all blocks before it, since `match` shares from the start, and since `insert` makes a
  request that computed what is already here use these rows, and give back its own.  So behind an idle block there are
  idle ones only.
* Blocks are kept in order of use, and of one chain the later blocks count as used earlier.  So the least recently used
  idle block is always the last of its chain, and no block loses the one before it.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from peft_jax.serving.rows import TOKEN_ROWS, Allocator

Key = tuple[int, int, bytes]


class _Block(NamedTuple):
    serial: int
    slot: int
    rows: np.ndarray  # [2, block]
    used: float


class PrefixCache:
    """Blocks of tokens whose keys and values are in the pool.

    Args:
        allocator: of the pool.
        block: tokens in a block; 0 keeps nothing.

    >>> allocator = Allocator(100)
    >>> cache = PrefixCache(allocator, block=2)
    >>> keys, values = allocator.take(4), allocator.take(4)
    >>> cache.insert(0, [7, 8, 9, 10], keys, values)
    4
    >>> cache.match(0, [7, 8, 9, 11, 12])[0], cache.match(0, [7, 8])[0], cache.match(1, [7, 8, 9])[0]
    (2, 0, 0)
    """

    def __init__(self, allocator: Allocator, block: int = 16):
        if block < 0:
            raise ValueError(f"block={block}: give the tokens of a block, or 0 to keep nothing")
        self.allocator = allocator
        self.block = block
        self._blocks: OrderedDict[Key, _Block] = OrderedDict()  # least recently used first
        self._serial = 0
        self._firsts = np.zeros(16, np.int32)  # by slot: a block's first row, whose owners tell whether it is idle
        self._slots = list(range(16))

    def match(
        self, identity: int, tokens: Sequence[int], now: float = 0.0
    ) -> tuple[int, Int32[np.ndarray, "n"], Int32[np.ndarray, "n"]]:
        """The longest beginning of `tokens` that is here, but never all of them: the last one's logits are wanted.

        Args:
            identity: of the adapter's load; 0 for the base.
            tokens: prompt and what was drawn.
            now: the time of use.

        Returns:
            How many tokens, and their key rows and value rows, of which the caller is an owner now.
        """
        chain = []
        for _, key in self._keys(identity, tokens[: len(tokens) - 1]):
            if key not in self._blocks:
                break
            chain.append(key)
        rows = [self._blocks[key].rows for key in chain]
        self._touch(chain, now)
        found = np.concatenate(rows, axis=1) if rows else np.empty((2, 0), np.int32)
        self.allocator.share(found.reshape(-1))
        return found.shape[1], found[0], found[1]

    def insert(
        self,
        identity: int,
        tokens: Sequence[int],
        key_rows: Int32[np.ndarray, "n"],
        value_rows: Int32[np.ndarray, "n"],
        now: float = 0.0,
    ) -> int:
        """Keeps what a request has computed; the caller stays an owner of its rows.

        Where the cache has the same tokens in other rows already, the caller's are given back, and the arrays are
        changed, in place, to name the cache's, of which the caller is an owner instead.

        Args:
            identity: of the adapter's load; 0 for the base.
            tokens: those whose keys and values are in the pool; an unfinished block at the end is left out.
            key_rows: their rows, one or more for each token.
            value_rows: likewise.
            now: the time of use.

        Returns:
            How many of the tokens, from the first, lie in rows of the cache now.
        """
        chain = []
        for start, key in self._keys(identity, tokens):
            part = slice(start, start + self.block)
            own = np.stack([key_rows[part], value_rows[part]])
            block = self._blocks.get(key)
            if block is None:
                self.allocator.share(own.reshape(-1))
                self._serial += 1
                self._blocks[key] = _Block(self._serial, self._slot(int(own[0, 0])), own, now)
            elif not np.array_equal(block.rows, own):
                self.allocator.share(block.rows.reshape(-1))
                self.allocator.give_back(own.reshape(-1))
                key_rows[part], value_rows[part] = block.rows
            chain.append(key)
        self._touch(chain, now)
        return len(chain) * self.block

    def evict(self, rows: int, before: float = math.inf) -> int:
        """Frees idle blocks, the least recently used first, until `rows` rows are free or no block is left to free.

        Args:
            rows: to free.
            before: blocks used later than this stay.

        Returns:
            How many rows were freed.
        """
        freed, gone = 0, []
        for key, block in self._blocks.items():
            if freed >= rows or block.used > before:
                break
            if self.allocator.owners(block.rows[0, :1])[0] == 1:
                gone.append(key)
                freed += block.rows.size
        for key in gone:
            self._remove(key)
        return freed

    def forget(self, identity: int) -> None:
        """Drops all that was computed under one load of an adapter; requests that use it stay owners of their rows."""
        for key in [key for key in self._blocks if key[0] == identity]:
            self._remove(key)

    @property
    def rows(self) -> int:
        """Rows of all blocks."""
        return len(self._blocks) * self.block * TOKEN_ROWS

    @property
    def idle_rows(self) -> int:
        """Rows of the blocks that no request uses: `evict` can free them all."""
        return int((self.allocator.owners(self._firsts) == 1).sum()) * self.block * TOKEN_ROWS

    @property
    def busy_rows(self) -> int:
        """Rows of the blocks that a request uses."""
        return self.rows - self.idle_rows

    def _keys(self, identity: int, tokens: Sequence[int]) -> Iterator[tuple[int, Key]]:
        """Start and key of each whole block; a key is made when it is asked for, after the block before it was made."""
        if not self.block:
            return
        array = np.asarray(tokens, np.int32)
        before = 0
        for start in range(0, len(array) - self.block + 1, self.block):
            key = (identity, before, array[start : start + self.block].tobytes())
            yield start, key
            before = self._blocks[key].serial

    def _touch(self, chain: list[Key], now: float) -> None:
        for key in reversed(chain):
            self._blocks[key] = self._blocks[key]._replace(used=now)
            self._blocks.move_to_end(key)

    def _slot(self, first: int) -> int:
        if not self._slots:
            size = len(self._firsts)
            self._firsts = np.concatenate([self._firsts, np.zeros(size, np.int32)])
            self._slots = list(range(size, 2 * size))
        slot = self._slots.pop()
        self._firsts[slot] = first
        return slot

    def _remove(self, key: Key) -> None:
        block = self._blocks.pop(key)
        self._firsts[block.slot] = 0  # row 0 has no owners, so an empty slot is not idle
        self._slots.append(block.slot)
        self.allocator.give_back(block.rows.reshape(-1))
