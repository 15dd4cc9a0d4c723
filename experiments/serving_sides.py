"""What the engine is compared with: other ways to serve many adapters on one base, on the same compiled step.

    MergeSwap    one adapter at a time, merged into the base's matrices; a batch of its requests; then the next adapter
    Copies       a merged model and a pool of its own for every adapter, in turns
    Padded       all adapters on the device in slots of one rank (`adapters.stack`), each row of the batch with its own
    SplitEngine  the engine, with a share of the pool's rows set apart for adapters

One adapter a batch, on rows of the pool, is the engine itself under ``Cluster(adapters=1)``.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.serving_load import Said, Served
from peft_jax import adapters, trees
from peft_jax.core import Params
from peft_jax.core import Path as LeafPath
from peft_jax.interop import hf_peft
from peft_jax.methods.lora import LoRA
from peft_jax.serving import packing
from peft_jax.serving.engine import Engine
from peft_jax.serving.prefixes import PrefixCache
from peft_jax.serving.requests import Refused, Request, Sampling
from peft_jax.serving.rounds import Plan
from peft_jax.serving.rows import Allocator
from peft_jax.serving.scheduler import Scheduler
from peft_jax.serving.step import Chosen, fit
from peft_jax.serving.store import AdapterStore

Deltas = Mapping[LeafPath, tuple[np.ndarray, np.ndarray]]


def deltas(directory: Path, model: Any) -> Deltas:
    """An adapter's products by matrix: A ``[layers, r, in]`` and B ``[layers, r, out]``, the scale in B."""
    found = trees.leaves(hf_peft.load(directory, model)[0])
    return {path: packing.factors(leaf, "/".join(path)) for path, leaf in found.items() if isinstance(leaf, LoRA)}


@jax.jit
def _added(base: Any, a: Any, b: Any) -> Any:
    return base + jnp.einsum("lri,lro->lio", a, b).astype(base.dtype)


def merged(params: Params, products: Deltas) -> Params:
    """The engine's tree with these products in its matrices; `params` keeps its own."""

    def each(path: LeafPath, leaf: Any) -> Any:
        if path not in products:
            return leaf
        return dataclasses.replace(leaf, base=_added(leaf.base, *products[path]))

    return trees.map_leaves(each, params)


class Plain(Served):
    """An engine without adapters, which has one merged in."""

    def submit(self, prompt: Sequence[int], new: int, adapter: int) -> int:
        return self.engine.submit(prompt, Sampling(max_tokens=new, ignore_end=True))


class MergeSwap:
    """Merges an adapter, runs its requests as one batch, and swaps it for that of the one that waits longest.

    Requests for the merged adapter join its batch while none of the others has waited for `patience` seconds.

    Args:
        engine: without adapters and without a prefix cache.
        read: gives an adapter's products by its place in the list; they stay in host memory, as many as `kept`.
    """

    def __init__(
        self,
        engine: Engine,
        read: Callable[[int], Deltas],
        patience: float,
        kept: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.plain, self.base, self.patience, self.clock = Plain(engine, ()), engine.device.params, patience, clock
        self.read = functools.lru_cache(kept)(read)
        self.current = -1
        self.swaps = 0
        """Adapters merged so far."""
        self._waiting = deque[tuple[int, Sequence[int], int, int, float]]()
        self._numbers = dict[int, int]()  # the engine's of a request: ours
        self._last = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self.plain.busy

    def submit(self, prompt: Sequence[int], new: int, adapter: int) -> int:
        self._last += 1
        self._waiting.append((self._last, prompt, new, adapter, self.clock()))
        return self._last

    def step(self) -> list[Said]:
        if not self.plain.busy and self._waiting and self._waiting[0][3] != self.current:
            self.current = self._waiting[0][3]
            self.plain.engine.device.params = merged(self.base, self.read(self.current))
            self.swaps += 1
        others = [came for *_, adapter, came in self._waiting if adapter != self.current]
        if not self.plain.busy or not others or self.clock() - others[0] < self.patience:
            mine = [each for each in self._waiting if each[3] == self.current]
            self._waiting = deque(each for each in self._waiting if each[3] != self.current)
            for number, prompt, new, adapter, _ in mine:
                self._numbers[self.plain.submit(prompt, new, adapter)] = number
        return [said._replace(request=self._numbers[said.request]) for said in self.plain.step()]

    def cancel(self, request: int) -> None:
        self._waiting = deque(each for each in self._waiting if each[0] != request)
        for inner, number in self._numbers.items():
            if number == request:
                self.plain.cancel(inner)


class Copies:
    """Several merged models side by side, each for one adapter, with a pool of its own; a step is one of theirs."""

    def __init__(self, engines: Sequence[Engine]):
        self.sides = [Plain(engine, ()) for engine in engines]
        self._numbers = dict[tuple[int, int], int]()
        self._turn = 0

    @property
    def busy(self) -> bool:
        return any(side.busy for side in self.sides)

    def submit(self, prompt: Sequence[int], new: int, adapter: int) -> int:
        inner = self.sides[adapter].submit(prompt, new, adapter)
        self._numbers[adapter, inner] = len(self._numbers)
        return len(self._numbers) - 1

    def step(self) -> list[Said]:
        count = len(self.sides)
        self._turn = next(
            t % count for t in range(self._turn + 1, self._turn + 1 + count) if self.sides[t % count].busy
        )
        said = self.sides[self._turn].step()
        return [each._replace(request=self._numbers[self._turn, each.request]) for each in said]

    def cancel(self, request: int) -> None:
        for (side, inner), number in self._numbers.items():
            if number == request:
                self.sides[side].cancel(inner)


def copies_that_fit(cap: float, model: float, least: float) -> int:
    """How many models, each with a pool of `least` bytes or more, there is room for in `cap` bytes."""
    return int(cap // (model + least))


class Padded(Engine):
    """All adapters in slots of one rank on the device, as large as the largest; the pool holds keys and values alone.

    Args:
        model: as of `Engine`.
        trees_by_name: adapted trees of `hf_peft.load`, in the order of the slots.
    """

    def __init__(self, model: Any, trees_by_name: Mapping[str, Params], **options: Any):
        super().__init__(model, prefix_block=0, **options)
        stacked, _ = adapters.stack(trees_by_name, model.forward)
        slots = {path: w for path, w in trees.leaves(stacked).items() if isinstance(w, adapters.Adapters)}
        self._slots, self._stacked = dict[int, int](), slots
        nest = lambda path, leaf: dataclasses.replace(leaf, base=slots[path]) if path in slots else leaf  # noqa: E731
        self.device.params = trees.map_leaves(nest, self.device.params)

    def _start(self, rows: list[tuple[Request, int]]) -> Chosen:
        decode = all(r.uncached == 1 for r, _ in rows)
        batch = fit(len(rows), self.shapes.rows, "rows") if decode else self.shapes.prompts
        used = np.full(batch, -1, np.int32)
        used[: len(rows)] = [self._slots[r.id] for r, _ in rows]

        def each(path: LeafPath, leaf: Any) -> Any:
            if path not in self._stacked:
                return leaf
            return dataclasses.replace(leaf, base=self._stacked[path].of_rows(jnp.asarray(used)))

        self.device.params = trees.map_leaves(each, self.device.params)
        return super()._start(rows)

    def submit_to(self, slot: int, prompt: Sequence[int], sampling: Sampling) -> int:
        number = self.submit(prompt, sampling)
        self._slots[number] = slot
        return number


class PaddedSide(Served):
    engine: Padded

    def submit(self, prompt: Sequence[int], new: int, adapter: int) -> int:
        return self.engine.submit_to(adapter, prompt, Sampling(max_tokens=new, ignore_end=True))


# -- two pools --------------------------------------------------------------------------------------------------------


class Behind(Allocator):
    """Gives out rows behind the first `start`."""

    def __init__(self, rows: int, start: int):
        super().__init__(rows + 1)
        self.start = start

    def take(self, n: int) -> np.ndarray:
        return super().take(n) + np.int32(self.start)

    def share(self, ids: np.ndarray) -> None:
        super().share(ids - np.int32(self.start))

    def give_back(self, ids: np.ndarray) -> None:
        super().give_back(ids - np.int32(self.start))


class SplitStore(AdapterStore):
    """Adapters in rows of their own: they evict one another, and nobody else does."""

    def make_resident(self, identity: int) -> Any:
        while not self.is_resident(identity) and self.allocator.free < self.size(identity) and super().evict():
            pass
        return super().make_resident(identity)

    def evict(self, before: float = float("inf")) -> int:
        return 0


class SplitScheduler(Scheduler):
    """Requests in rows of their own; a request joins when its keys fit in these, and its adapter in the others."""

    def _fits(self, batch: Sequence[Request], identities: set[int], now: float) -> bool:
        if sum(self.store.size(identity) for identity in identities) > self.store.allocator.total:
            return False
        return super()._fits(batch, {0}, now)

    def _too_large(self, request: Request, identity: int) -> Refused | None:
        if self.store.size(identity) > self.store.allocator.total:
            return Refused(f"the adapter takes {self.store.size(identity)} rows, and adapters have fewer", 413)
        return super()._too_large(request, 0)

    def bring(self, plan: Plan) -> list[int]:
        brought = list[int]()
        for identity in plan.prefetch:
            if self.store.ready(identity) and self.store.size(identity) <= self.store.allocator.free:
                self.store.make_resident(identity)
                brought.append(identity)
        return brought

    def _room(self, rows: int, before: float = float("inf")) -> bool:
        if (short := rows - self.allocator.free) > 0:
            self.prefixes.evict(short, before)
        return self.allocator.free >= rows

    def rows(self) -> dict[str, int]:
        found = super().rows()
        of_adapters = self.store.allocator
        return found | {
            "rows_total": self.allocator.total + of_adapters.total,
            "rows_free": self.allocator.free + of_adapters.free,
            "rows_kv": found["rows_kv"] + found["rows_adapters"],
        }


class SplitEngine(Engine):
    """The engine with `share` of its rows for adapters, and the others for keys and values."""

    def __init__(self, model: Any, *, rows: int, share: float, host_bytes: int = 1 << 30, **options: Any):
        super().__init__(model, rows=rows, host_bytes=host_bytes, prefix_block=0, **options)
        for_adapters = round(share * (rows - 1))
        whole, width, dtype = self.scheduler, self.device.width, self.device.rows.dtype
        self.store.close()
        self.store = SplitStore(
            Behind(for_adapters, rows - 1 - for_adapters),
            lambda directory: packing.read(directory, model, self.targets, width, dtype),
            self._put,
            host_bytes,
        )
        allocator = Allocator(rows - for_adapters)
        self.scheduler = SplitScheduler(
            allocator, self.store, PrefixCache(allocator, 0), policy=whole.policy, limits=whole.limits
        )
