"""S-LoRA's claims, in counts that no machine changes: forward passes, rows gathered and moved, programs compiled.

The engine is the real one, on a tiny random Llama; a clock that ticks once a forward pass stands for time.  That mixed
batches write the right tokens is `test_serving_engine`'s.
"""

import concurrent.futures
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zoo

from experiments import serving_adapters, serving_load, serving_sides
from experiments.serving_load import Served
from experiments.serving_trace import Asked, Load, draw
from peft_jax import models
from peft_jax.serving import step
from peft_jax.serving.engine import Engine
from peft_jax.serving.policies import Abort, Cluster
from peft_jax.serving.rounds import Limits
from peft_jax.serving.step import Shapes

pytestmark = pytest.mark.usefixtures("quick_compiles")
MODEL = models.from_config(zoo.CONFIGS["llama"], zoo.KEY)
BATCH, ROWS, RANK = 4, 420, 8
SHAPES = Shapes(rows=(BATCH,), prompts=2, chunk=8, context=(32,), ranks=(RANK,))
ADAPTER = sum(-(-RANK * n // zoo.KV) for n in (zoo.WIDTH, zoo.WIDTH, zoo.WIDTH, zoo.KV))  # rows: A and B of q and of v


@pytest.fixture(scope="module")
def places(tmp_path_factory: Any) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [folder / name for name in serving_adapters.write(folder, MODEL, 4, ranks=(RANK,))]


class AtOnce(concurrent.futures.Executor):
    """Reads an adapter when it is asked to, not on another thread: what a round finds is then no matter of luck."""

    def submit(self, call: Any, /, *given: Any, **named: Any) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(call(*given, **named))
        return future


class Passes:
    """An engine's forward passes: how many, what each gathered of adapters, and a clock that they move.

    A pass takes one second; while nothing is to be done, `sleep` moves the clock.
    """

    def __init__(self, kind: Any = Engine, **options: Any):
        self.count, self.gathered, self.slept = 0, 0, 0.0
        self.engine = kind(MODEL, rows=ROWS, shapes=SHAPES, limits=Limits(max_batch=BATCH), clock=self.clock, **options)
        self.engine.store.copies._executor = AtOnce()
        run = self.engine.device.step

        def counted(batch: Any) -> Any:
            self.count += 1
            self.gathered += np.count_nonzero(batch.adapters)
            return run(batch)

        self.engine.device.step = counted

    def clock(self) -> float:
        return self.count + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds

    def register(self, count: int, places: list[Path]) -> Served:
        """So many adapters: each a load of its own, of files in turn."""
        names = [f"a{i}" for i in range(count)]
        for i, name in enumerate(names):
            self.engine.load(name, places[i % len(places)])
        return Served(self.engine, names)

    def drive(self, system: Any, trace: list[Asked], limit: float = 1e6) -> list[serving_load.Outcome]:
        return serving_load.drive(system, trace, zoo.VOCAB, limit, self.clock, self.sleep)[0]

    def until(self, system: Any, asked: Iterable[Asked], passes: int) -> int:
        """All asked at once; the tokens written after so many passes, while there was still work."""
        for i, each in enumerate(asked):
            system.submit([1 + i % 7] * each.prompt, each.new, each.adapter)
        while self.count < passes:
            system.step()
        assert system.busy
        return int(self.engine.stats()["tokens_generated_total"])


def asked(n: int, count: int = 60) -> list[Asked]:
    return draw(Load(n, 1.0, count, prompt=(4, 9), new=(4, 9)), seed=n)


def test_a_thousand_adapters_cost_what_five_do(places: list[Path]) -> None:
    """(a) in equal passes nine tenths of the work or more; the same rows a pass, and no other programs."""
    found = {}
    for n in (5, 1000):
        passes = Passes()
        work = passes.until(passes.register(n, places), asked(n), 60)
        found[n] = SimpleNamespace(work=work, gathered=passes.gathered, stats=passes.engine.stats())
        found[n].compiled = step._step._cache_size(), step._write._cache_size()
    few, many = found[5], found[1000]
    assert many.work >= 0.9 * few.work > 100
    assert many.gathered <= 1.1 * few.gathered
    assert many.stats["adapters_registered"] == 1000
    assert many.compiled == few.compiled and many.stats["compilations_total"] == few.stats["compilations_total"] == 3
    # What grows is what is moved: from five loads to one a request, of as many rows as the adapter has.
    assert few.stats["adapter_loads_total"] == 5 and many.stats["adapter_loads_total"] > 20
    assert many.stats["rows_adapters"] == ADAPTER * many.stats["adapters_resident"] > 0


def test_ahead_of_one_adapter_a_batch_the_more_adapters_there_are(places: list[Path]) -> None:
    """(b) by tokens in equal passes."""
    ratios = []
    for n in (1, 16, 256):
        mixed, alone = Passes(), Passes(policy=Cluster(adapters=1))
        work = [p.until(p.register(n, places), asked(n), 40) for p in (mixed, alone)]
        ratios.append(work[0] / work[1])
    assert ratios[0] == 1 and ratios[1] > 1.1 and ratios[2] > 1.5 * ratios[1], ratios


def test_one_pool_does_as_well_as_the_best_split_and_better_as_loads_change(places: list[Path]) -> None:
    """(c) passes until all is done: many adapters with short requests, then one with long ones; the same rows."""
    short = [Asked(0.0, i, 4, 4) for i in range(16)]
    long = [Asked(0.0, 0, 10, 20) for _ in range(8)]

    def needed(kind: Any = Engine, **options: Any) -> list[int]:
        counts = []
        for load in (short, long):
            passes = Passes(kind, **options)
            outcomes = passes.drive(passes.register(16, places), load)
            assert {outcome.finish for outcome in outcomes} == {"length"}
            counts.append(passes.count)
        return counts

    one = needed()
    split = {share: needed(serving_sides.SplitEngine, share=share) for share in (0.25, 0.4, 0.55, 0.75)}
    assert one[0] <= min(counts[0] for counts in split.values())
    assert one[1] <= min(counts[1] for counts in split.values())
    assert sum(one) < min(map(sum, split.values())), (one, split)
    # Each load has a split that serves it as well, and no split serves both.
    assert min(counts[0] for counts in split.values()) == one[0]
    assert min(counts[1] for counts in split.values()) == one[1]


def test_merging_wins_with_one_adapter_and_loses_with_two(places: list[Path]) -> None:
    """(d) in passes, and in rows of adapters that they gather."""
    passes, gathered = dict[int, list[int]](), dict[int, list[int]]()
    for n in (1, 2, 4):
        trace = [Asked(2.0 * i, i % n, 4, 8) for i in range(16)]
        ours, swapped = Passes(), Passes()
        read = lambda i: serving_sides.deltas(places[i], MODEL)  # noqa: E731
        merge = serving_sides.MergeSwap(swapped.engine, read, patience=8.0, clock=swapped.clock)
        for side, system in ((ours, ours.register(n, places)), (swapped, merge)):
            assert {outcome.finish for outcome in side.drive(system, trace)} == {"length"}
        passes[n], gathered[n] = [ours.count, swapped.count], [ours.gathered, swapped.gathered]
        assert merge.swaps == 1 if n == 1 else merge.swaps >= n
    assert passes[1][0] == passes[1][1] and gathered[1][0] > 0 == gathered[1][1]
    assert passes[2][1] > 1.1 * passes[2][0] and passes[4][1] > passes[2][1], passes
    assert gathered[1][0] % ADAPTER == 0


def test_early_abort_keeps_more_deadlines_under_overload(places: list[Path]) -> None:
    """(e) twice as many requests as can be served, a second a pass."""
    deadline = 12.0
    trace = draw(Load(8, 0.8, 100, prompt=(4, 9), new=(4, 9)), seed=0)
    attained, busy = {}, {}
    for name, policy in (("fcfs", None), ("abort", Abort(deadline))):
        passes = Passes(policy=policy)
        outcomes = passes.drive(passes.register(8, places), trace)
        assert {outcome.finish for outcome in outcomes} <= {"length", "aborted"}
        found = serving_load.measures(outcomes, passes.clock(), deadline)
        attained[name], busy[name] = found["attainment"], found
    assert busy["fcfs"]["aborted"] == 0 < busy["abort"]["aborted"]
    assert attained["abort"] > 1.5 * attained["fcfs"] > 0, attained
