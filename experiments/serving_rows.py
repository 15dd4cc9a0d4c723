"""The rows of the serving benchmark: which system, under which load; `experiments.bench_serving` runs them.

curves    a system by the number of adapters that are registered, under the paper's trace at 80 % of capacity
pools     one pool against pools with a share of the rows for adapters; many adapters of ranks 8 to 64 with short
          requests, then a few of rank 8 with long ones, then the first again
policies  the engine's policies where twice as many requests come as it can serve, for a few adapters above all
"""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import serving_adapters, serving_load, serving_sides
from experiments.serving_load import Served, System
from experiments.serving_trace import Asked, Load, draw, phases
from peft_jax import trees
from peft_jax.interop import hf_peft
from peft_jax.methods.lora import LoRA
from peft_jax.serving import pool
from peft_jax.serving.engine import Engine
from peft_jax.serving.policies import Abort, Cluster, Fair, Fcfs, Policy
from peft_jax.serving.rounds import Limits
from peft_jax.serving.step import Shapes

PAPER_CAP = 80e9 / 13.5e9  # an A100-80's memory, in copies of Llama-7B in fp16
PAPER_GAPS = 12  # the paper's deadline, 6 s, at its usual rate, 2 requests a second: so many gaps between requests
SELECT = "(q|v)_proj"
SHAPES = Shapes(rows=(1, 4, 16), prompts=4, chunk=64, context=(128,), ranks=(8,))
SMALL = Shapes(rows=(1, 4, 16), prompts=4, chunk=64, context=(192,), ranks=(8, 64))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is; a test has smaller ones.

    counts       of adapters, by system
    seconds      of a trace, and `grace` more before what is left is cancelled
    batch        requests at once, in every system
    share        of capacity, that the curves' rate is
    cap          bytes for models and pools, in copies of the base
    slot         rank of the padded slots: that of the largest adapter that there might be
    small        rows of the pool in the comparison of pools
    shares       of these, for adapters; 0 is one pool for both
    ranks, long  there: ranks in turn, and lengths of the long requests
    few          adapters in the overload, of which at most `cluster` run at once under that policy
    """

    counts: dict[str, tuple[int, ...]] = dataclasses.field(
        default_factory=lambda: {
            "ours": (1, 2, 5, 100, 1000, 2000),
            "sequential": (1, 5, 100, 1000, 2000),
            "merge-swap": (1, 2, 5, 100),
            "copies": (1, 2, 5),
            "padded": (5, 100),
            "peft": (1, 5, 100),
        }
    )
    seconds: float = 24.0
    grace: float = 10.0
    batch: int = 16
    share: float = 0.8
    cap: float = PAPER_CAP
    slot: int = 64
    small: int = 4000
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    prompt: tuple[int, int] = (8, 64)
    new: tuple[int, int] = (8, 64)
    long: tuple[tuple[int, int], tuple[int, int]] = ((64, 128), (32, 64))
    few: int = 100
    cluster: int = 4
    dtype: str = "bfloat16"
    shapes: Shapes = SHAPES
    small_shapes: Shapes = SMALL
    seed: int = 0

    def names(self) -> list[str]:
        """All rows, in the order in which they run."""
        curves = [f"{side}-{n}" for side, counts in self.counts.items() for n in counts]
        return [*curves, *(f"pool-{share:g}" for share in self.shares), *(f"policy-{name}" for name in POLICIES)]


POLICIES = ("fcfs", "cluster", "abort", "fair")


class Scale(NamedTuple):
    """What was measured before all rows: requests a second in a closed loop, and what follows from them."""

    capacity: float
    rate: float
    deadline: float


class Bench:
    """A model, its adapters on disk, and what has been compiled so far."""

    def __init__(self, model: Any, folder: Path, sizes: Sizes):
        self.model, self.folder, self.sizes = model, folder, sizes
        self.words = model.forward.spec.vocab
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(model.params))
        spec = model.forward.spec
        self.row_bytes = spec.layers * pool.width_of(spec) * jnp.dtype(sizes.dtype).itemsize
        self._warm = set[Any]()

    # -- what there is -------------------------------------------------------------------------------------------------

    def adapters(self, count: int, ranks: tuple[int, ...] = (8,)) -> list[Path]:
        """Directories of so many adapters; those that there are already are kept."""
        place = self.folder / "-".join(map(str, ranks))
        names = serving_adapters.write(
            place, self.model, count, ranks=ranks, select=SELECT, dtype=jnp.dtype(self.sizes.dtype)
        )
        return [place / name for name in names]

    def rows(self, copies: int = 1) -> int:
        """Rows of the pool of one of so many copies of the model, under the cap."""
        return int((self.sizes.cap / copies - 1) * self.bytes) // self.row_bytes

    def engine(self, adapters: Sequence[Path] = (), kind: Any = Engine, **options: Any) -> Any:
        """An engine with these adapters registered and its programs compiled."""
        given: dict[str, Any] = {"rows": self.rows(), "shapes": self.sizes.shapes} | options
        limits = Limits(max_batch=self.sizes.batch, patience=given.pop("patience", 30.0))
        engine = kind(self.model, dtype=jnp.dtype(self.sizes.dtype), limits=limits, **given)
        for place in adapters:
            engine.load(place.name, place)
        key = given["rows"], given["shapes"]
        if kind is not serving_sides.Padded and key not in self._warm:
            engine.warm_up()
            self._warm.add(key)
        return engine

    # -- systems -------------------------------------------------------------------------------------------------------

    def system(self, side: str, count: int, scale: Scale) -> System | None:
        """One of the curves' systems, with so many adapters; None where the cap does not hold it."""
        places = self.adapters(count)
        if side == "peft":
            from experiments.serving_torch import Peft

            return Peft(self.saved(), places, self.sizes.batch)
        found: System | None = getattr(self, f"_{side.replace('-', '_')}")(places, scale)
        return found

    def saved(self) -> str:
        """The base as a Hugging Face directory, which PEFT's side loads."""
        from peft_jax import models

        place = self.folder / "base"
        if not (place / "config.json").is_file():
            models.save(place, dataclasses.replace(self.model, tokenizer=None))
        return str(place)

    def _ours(self, places: list[Path], scale: Scale) -> System:
        return Served(self.engine(places), [place.name for place in places])

    def _sequential(self, places: list[Path], scale: Scale) -> System:
        engine = self.engine(places, policy=Cluster(adapters=1), patience=scale.deadline)
        return Served(engine, [place.name for place in places])

    def _merge_swap(self, places: list[Path], scale: Scale) -> System:
        read = lambda i: serving_sides.deltas(places[i], self.model)  # noqa: E731
        return serving_sides.MergeSwap(self.engine(prefix_block=0), read, scale.deadline)

    def _copies(self, places: list[Path], scale: Scale) -> System:
        engines = []
        for place in places:
            engine = self.engine(rows=self.rows(len(places)), prefix_block=0)
            base = engine.device.params if place is places[0] else jax.tree.map(jnp.copy, engine.device.params)
            engine.device.params = serving_sides.merged(base, serving_sides.deltas(place, self.model))
            engines.append(engine)
        return serving_sides.Copies(engines)

    def _padded(self, places: list[Path], scale: Scale) -> System | None:
        """Slots as large as an adapter of rank `slot`, which is in the last one; the pool has what they leave."""
        (largest,) = self.adapters(1, (self.sizes.slot,))
        found = {place.name: hf_peft.load(place, self.model)[0] for place in places}
        found["largest"] = hf_peft.load(largest, self.model)[0]
        leaves = [w for w in trees.leaves(found["largest"]).values() if isinstance(w, LoRA)]
        slots = len(found) * sum(w.a.nbytes + w.b.nbytes for w in leaves)
        rows = self.rows() - slots // self.row_bytes
        if rows < self.least():
            return None
        return serving_sides.PaddedSide(self.engine(kind=serving_sides.Padded, trees_by_name=found, rows=rows), ())

    def least(self) -> int:
        """Rows of the longest request."""
        return 2 * (self.sizes.prompt[1] + self.sizes.new[1])

    # -- rows ----------------------------------------------------------------------------------------------------------

    def load(self, count: int, rate: float, **options: Any) -> Load:
        given = {"prompt": self.sizes.prompt, "new": self.sizes.new} | options
        return Load(count, rate, given.pop("seconds", self.sizes.seconds), **given)

    def scale(self) -> Scale:
        """Requests a second of ours with 5 adapters in a closed loop, and the rate and deadline that follow."""
        places = self.adapters(5)
        system, trace = self._ours(places, Scale(0, 0, 0)), draw(self.load(5, 100.0), self.sizes.seed)
        at_once = self.sizes.batch + self.sizes.batch // 2
        capacity = serving_load.saturate(system, trace, self.words, at_once, self.sizes.seconds)
        return Scale(capacity, self.sizes.share * capacity, PAPER_GAPS / capacity)

    def row(self, name: str, scale: Scale) -> dict[str, Any]:
        """One row, run.  The measures, and of our engine its counters."""
        side, _, what = name.rpartition("-")
        system, trace = {"pool": self._of_pool, "policy": self._of_policy}.get(side, self._of_curve)(side, what, scale)
        if system is None:
            return {"fits": False}
        self._touch(system, trace)
        before = counters(system)
        limit = trace_end(trace, self.sizes.seconds) + max(self.sizes.grace, scale.deadline)
        outcomes, elapsed = serving_load.drive(system, trace, self.words, limit)
        found = serving_load.measures(outcomes, elapsed, scale.deadline)
        after = counters(system)
        close(system)
        del system
        gc.collect()  # an engine and its store know each other
        return found | {key: after[key] - before[key] for key in after}

    def _of_curve(self, side: str, count: str, scale: Scale) -> tuple[System | None, list[Asked]]:
        n = int(count)
        trace = draw(self.load(n, scale.rate), self.sizes.seed)
        least = self.least() * self.row_bytes
        if side == "copies" and n > serving_sides.copies_that_fit(self.sizes.cap * self.bytes, self.bytes, least):
            return None, trace
        return self.system(side, n, scale), trace

    def _of_pool(self, side: str, share: str, scale: Scale) -> tuple[System, list[Asked]]:
        count, third = 4 * self.sizes.batch, self.sizes.seconds / 3
        places = self.adapters(count, self.sizes.ranks)
        prompt, new = self.sizes.long
        many = self.load(count, 1.2 * scale.capacity, seconds=third)
        # The long requests are for the first adapter, which has the first rank.
        few = self.load(1, 0.8 * scale.capacity, seconds=third, prompt=prompt, new=new)
        trace = phases([many, few, many], self.sizes.seed)
        options: dict[str, Any] = {"rows": self.sizes.small, "shapes": self.sizes.small_shapes}
        options |= {"kind": serving_sides.SplitEngine, "share": float(share)} if float(share) else {"prefix_block": 0}
        return Served(self.engine(places, **options), [place.name for place in places]), trace

    def _of_policy(self, side: str, name: str, scale: Scale) -> tuple[System, list[Asked]]:
        made: dict[str, Callable[[], Policy]] = {
            "fcfs": Fcfs,
            "cluster": lambda: Cluster(self.sizes.cluster),
            "abort": lambda: Abort(scale.deadline),
            "fair": Fair,
        }
        places = self.adapters(self.sizes.few)
        trace = draw(self.load(self.sizes.few, 2 * scale.capacity, alpha=0.3), self.sizes.seed)
        return Served(self.engine(places, policy=made[name]()), [place.name for place in places]), trace

    def _touch(self, system: System, trace: Sequence[Asked]) -> None:
        """A few requests before the clock runs: what compiles on its first call has then compiled."""
        for count in (1, self.sizes.batch // 4, self.sizes.batch):
            for asked in trace[:count]:  # of few adapters: the others are still on disk when the clock starts
                system.submit([1] * asked.prompt, 2, asked.adapter % 5)
            while system.busy:
                system.step()


def trace_end(trace: Sequence[Asked], seconds: float) -> float:
    return max([seconds, *(asked.time for asked in trace)])


def engines_of(system: Any) -> list[Engine]:
    sides = getattr(system, "sides", [getattr(system, "plain", system)])
    return [side.engine for side in sides if hasattr(side, "engine")]


def counters(system: Any) -> dict[str, float]:
    """What our engine counts: steps, loads, evictions, preemptions; and swaps of merged weights."""
    names = ("steps_total", "adapter_loads_total", "adapter_evictions_total", "preemptions_total")
    stats = [engine.stats() for engine in engines_of(system)]
    found = {name.removesuffix("_total"): sum(each[name] for each in stats) for name in names} if stats else {}
    return found | ({"swaps": system.swaps} if hasattr(system, "swaps") else {})


def close(system: Any) -> None:
    for engine in engines_of(system):
        engine.close()
