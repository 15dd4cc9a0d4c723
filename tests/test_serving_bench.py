"""The serving benchmark: its trace is the paper's, its systems write the same tokens, its report says what was run."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import transformers

from experiments import bench_serving, serving_exact, serving_load, serving_paper, serving_rows, serving_trace
from experiments.serving_rows import Bench, Scale, Sizes
from experiments.serving_trace import Asked, Load, draw
from peft_jax import models
from peft_jax.serving.requests import Refused
from peft_jax.serving.step import Shapes

pytestmark = pytest.mark.usefixtures("quick_compiles")
SIZES = Sizes(
    counts={"ours": (1, 3), "sequential": (3,), "merge-swap": (3,), "copies": (3, 900), "padded": (3,), "peft": (3,)},
    seconds=0.3,
    grace=5.0,
    batch=4,
    cap=400.0,
    slot=4,
    small=400,
    shares=(0.0, 0.5),
    ranks=(2, 4),
    prompt=(2, 6),
    new=(2, 6),
    long=((4, 8), (4, 8)),
    few=4,
    cluster=2,
    dtype="float32",
    shapes=Shapes(rows=(4,), prompts=2, chunk=4, context=(16,), ranks=(8,)),
    small_shapes=Shapes(rows=(4,), prompts=2, chunk=4, context=(16,), ranks=(8,)),
)
SCALE = Scale(60.0, 40.0, 0.5)
ADAPTER = 16 + 16 + 16 + 8  # rows 8 wide: rank 8 on q (16 to 16) and v (16 to 8)
WHERE = {"commit": "c" * 40, "dirty": [], "versions": {"jax": "0"}, "machine": {"cores": 2}}


# -- the trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cv", "rate"), [(1.0, 2.0), (4.0, 0.5)])
def test_gaps_have_the_mean_and_variation_asked_for(cv: float, rate: float) -> None:
    times = np.array([0.0, *(asked.time for asked in draw(Load(3, rate, 40_000 / rate, cv=cv), seed=3))])
    gaps = np.diff(times)
    assert len(gaps) == 40_000 and gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
def test_adapters_follow_the_power_law(alpha: float) -> None:
    """P(adapter < k) = P(U^(1/α) < k / n) = (k / n)^α."""
    n = 8
    chosen = np.array([asked.adapter for asked in draw(Load(n, 1.0, 40_000.0, alpha=alpha), seed=1)])
    shares = [(chosen < k).mean() for k in range(1, n + 1)]
    np.testing.assert_allclose(shares, (np.arange(1, n + 1) / n) ** alpha, atol=0.01)


def test_lengths_seeds_and_phases() -> None:
    load = Load(5, 100.0, 10.0, prompt=(8, 64), new=(3, 5))
    trace = draw(load, seed=7)
    assert trace == draw(load, seed=7) != draw(load, seed=8)
    assert {asked.new for asked in trace} == {3, 4}
    prompts = [asked.prompt for asked in trace]
    assert min(prompts) == 8 and max(prompts) == 63 and np.mean(prompts) == pytest.approx(35.5, abs=2)
    one, other = draw(load, 0), draw(load, 1, start=10.0)
    assert serving_trace.phases([load, load]) == sorted(one + other) and other[0].time >= 10
    for wrong in ({"rate": 0.0}, {"prompt": (5, 5)}, {"cv": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(load, **wrong)


# -- the loops --------------------------------------------------------------------------------------------------------


class Clockwork:
    """One request at a time, one token a second; the third one is refused in the end."""

    def __init__(self) -> None:
        self.now, self.queue, self.cancelled = 0.0, list[list[int]](), list[int]()
        self.count = 0

    @property
    def busy(self) -> bool:
        return bool(self.queue)

    def submit(self, prompt: Any, new: int, adapter: int) -> int:
        if new > 100:
            raise Refused("too long")
        self.count += 1
        self.queue.append([self.count, new])
        return self.count

    def step(self) -> list[serving_load.Said]:
        self.now += 1.0
        number, left = self.queue[0]
        if number == 3:
            self.queue.pop(0)
            return [serving_load.Said(number, (), "aborted")]
        self.queue[0][1] -= 1
        if left == 1:
            self.queue.pop(0)
        return [serving_load.Said(number, (5,), "length" if left == 1 else None)]

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_open_loop_counts_from_the_trace_s_times() -> None:
    system = Clockwork()
    trace = [Asked(2.0, 0, 4, 3), Asked(2.5, 1, 4, 2), Asked(3.0, 1, 4, 2), Asked(4.0, 0, 4, 101), Asked(20.0, 0, 4, 9)]
    outcomes, elapsed = serving_load.drive(system, trace, 10, 24.0, lambda: system.now, system.sleep)
    assert [o.first for o in outcomes[:2]] == [3.0, 6.0] and outcomes[1].last == 7.0
    assert [o.wait for o in outcomes[:2]] == [1.0, 3.5] and outcomes[0].pace == 1.0
    assert [o.finish for o in outcomes] == ["length", "length", "aborted", "refused", None] and system.cancelled == [4]
    found = serving_load.measures(outcomes, elapsed, deadline=2.0)
    assert (found["asked"], found["finished"], found["aborted"], elapsed) == (5, 2, 1, 24.0)
    assert found["requests_per_second"] == 2 / 24 and found["tokens_per_second"] == 9 / 24
    assert found["attainment"] == 0.4, "the first and the last; the second came late, the third never"
    assert found["first_token"]["p50"] == 1.0 and found["each_token"]["p99"] == 1.0
    assert found["fairness"] == pytest.approx((7 + 2) ** 2 / (2 * (7**2 + 2**2)))


def test_the_closed_loop_keeps_so_many_at_once() -> None:
    system = Clockwork()
    system.count = 3  # past the one that it refuses
    rate = serving_load.saturate(system, [Asked(0, 0, 4, 2)], 10, 3, 40.0, lambda: system.now)
    assert rate == pytest.approx(0.5, abs=0.02), "two seconds a request"
    assert system.cancelled == [24, 25], "after 20 were done"


# -- the systems ------------------------------------------------------------------------------------------------------


class Toy(Bench):
    """All its engines have pools of one size, and share their programs."""

    def rows(self, copies: int = 1) -> int:
        return self.sizes.small


@pytest.fixture(scope="module")
def bench(tmp_path_factory: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    model = models.from_config(config, jax.random.key(0))
    model = dataclasses.replace(model, params=jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, model.params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.serving_adapters.STRENGTH", 0.5)
        made = Toy(model, tmp_path_factory.mktemp("serving"), SIZES)
        made.adapters(4), made.adapters(1, (4,)), made.adapters(16, (2, 4))
        patch.setattr("peft_jax.serving.engine.Engine.warm_up", lambda self: 0)  # what is used compiles as it is used
        yield made


def test_copies_and_their_pools_stay_under_the_cap(bench: Bench) -> None:
    for copies in (1, 3, 50):
        rows, cap = Bench.rows(bench, copies), SIZES.cap * bench.bytes
        assert cap - copies * bench.row_bytes < copies * (bench.bytes + rows * bench.row_bytes) <= cap
    assert serving_rows.serving_sides.copies_that_fit(80.0, 13.5, 2.0) == 5, "an A100's 80 GB, as in the paper"


def tokens_of(system: Any, asked: list[tuple[list[int], int]]) -> list[list[int]]:
    numbers = [system.submit(prompt, 6, adapter) for prompt, adapter in asked]
    found = {number: list[int]() for number in numbers}
    while system.busy:
        for said in system.step():
            found[said.request] += said.tokens
    serving_rows.close(system)
    return [found[number] for number in numbers]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's own
def test_all_systems_write_what_hf_peft_writes(bench: Bench) -> None:
    random = np.random.default_rng(0)
    asked = [(random.integers(0, 64, n).tolist(), i % 3) for i, n in enumerate((3, 5, 2, 7, 4, 6))]
    alone = tokens_of(bench.system("peft", 3, SCALE), asked)
    assert len({tuple(tokens) for tokens in alone}) == len(asked) and {len(tokens) for tokens in alone} == {6}
    for side in ("ours", "sequential", "merge-swap", "copies", "padded"):
        system = bench.system(side, 3, SCALE)
        assert tokens_of(system, asked) == alone, side
        if side == "merge-swap":
            assert system.swaps == 3
    split = serving_rows.Served(
        bench.engine(bench.adapters(3), serving_rows.serving_sides.SplitEngine, share=0.25, rows=400),
        [f"adapter-{i:04d}" for i in range(3)],
    )
    assert tokens_of(split, asked) == alone
    rows = split.engine.stats()
    assert rows["rows_adapters"] == ADAPTER and rows["rows_kv"] == 0, "a hundred rows hold one adapter"
    assert rows["adapter_evictions_total"] >= 2
    assert rows["rows_free"] + rows["rows_adapters"] == rows["rows_total"] == 399


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_benchmark_goes_on_where_it_stopped_and_reports(bench: Bench, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "bench_serving.json"
    monkeypatch.setattr(Bench, "scale", lambda self: SCALE)
    ran = list[str]()

    def worker(command: list[str], **options: Any) -> Any:  # the process is torch's own; here it is this one
        return SimpleNamespace(stdout=f"noise\n{json.dumps(bench_serving.worker(json.loads(command[-1])))}\n")

    monkeypatch.setattr(bench_serving.subprocess, "run", worker)

    def row(self: Bench, name: str, scale: Scale, run: Any = Bench.row) -> Any:
        ran.append(name)
        if name == "pool-0" and ran.count(name) == 1:
            raise KeyboardInterrupt
        return run(self, name, scale)

    monkeypatch.setattr(Bench, "row", row)
    with pytest.raises(KeyboardInterrupt):
        bench_serving.run(bench, path, WHERE)
    assert "**Incomplete**" in bench_serving.report(json.loads(path.read_text()))
    result = bench_serving.run(bench, path, WHERE)
    expected = SIZES.names()
    expected.insert(expected.index("pool-0"), "pool-0")
    assert ran == expected, "each row once, and the one that was broken off again"
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert not result["rows"]["copies-900"].get("fits", True)
    for name, found in result["rows"].items():
        if "asked" in found:
            rate = {"pool": 2 * 1.2 * 60 / 3 + 0.8 * 60 / 3, "policy": 2 * 60}.get(name.split("-")[0], 40)
            assert abs(found["asked"] - rate * SIZES.seconds) <= 3, name
            assert found["finished"] > 0 and found["requests_per_second"] > 0, name
            assert found["finished"] + found["aborted"] <= found["asked"], name
    said = bench_serving.report(result)
    assert "**Incomplete**" not in said and "does not fit" in said
    assert "One pool against the best split" in said
    beside = bench_serving.curve(result, "requests a second", [3, 5, 1000])
    assert "| S-LoRA's paper: S-LoRA |  | 8.05 | 7.64 |" in beside and beside[2].endswith(" |  |  |")
    with pytest.raises(ValueError, match="other sizes"):
        bench_serving.run(Toy(bench.model, bench.folder, dataclasses.replace(SIZES, batch=3)), path, WHERE)


# -- exactness, and the paper's settings ------------------------------------------------------------------------------


def test_a_difference_counts_by_the_distance_of_the_largest_logits() -> None:
    alone = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    gaps = {(1, 2): 2e-4, (2, 0): 1e-6}
    found = serving_exact.compare([[1, 2, 3], [4, 5, 0], [0, 0, 0]], alone, lambda *where: gaps[where])
    assert found == [(1, 2, 2e-4), (2, 0, 1e-6)]
    assert serving_exact.compare([[1, 2]], [[1, 2, 3]], lambda *where: 1.0) == [(0, 2, 1.0)]


def test_exactness_is_checked_under_preemption_eviction_and_hits(bench: Bench, tmp_path: Path) -> None:
    kinds = {"r2": (2, "(q|k)_proj"), "r8": (8, "(q|down)_proj")}
    sizes = serving_exact.Sizes(
        lengths=(3, 9), new=6, requests=24, rows=SIZES.small, short=140, block=2, kinds=kinds, shapes=SIZES.shapes
    )
    words = np.random.default_rng(3).integers(0, 64, 60).tolist()
    result = serving_exact.check(bench.model, tmp_path, words, sizes)
    assert result["missing"] == [], result["rows"]
    assert result["failures"] == 0, result["rows"]
    assert [row["answers"] for row in result["rows"].values()] == [24, 24, 48]
    assert min(row["smallest_gap"] for row in result["rows"].values()) > serving_exact.TIE
    shown = serving_exact.report(result | {"versions": {"jax": "0"}, "commit": "c" * 40, "seconds": 1.0})
    assert "96 of 96 answers (576 tokens)" in shown
    result["rows"]["short"]["preemptions"] = 0
    assert serving_exact.missing(result["rows"]) == ["short: no preemptions"]


def test_the_paper_s_settings_run_on_a_small_model(bench: Bench, tmp_path: Path, capsys: Any) -> None:
    options = {"model": bench.saved(), "adapters": "2,3", "rate": 30, "seconds": 0.4, "shortest": 2, "longest": 6}
    options |= {"batch": 1, "dtype": "float32", "rows": 400, "folder": tmp_path, "out": tmp_path / "out.jsonl"}
    serving_paper.main(["S1", *(str(x) for key, value in options.items() for x in (f"--{key}", value))])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["adapters"] for line in lines] == [2, 3] == [line["adapters_registered"] for line in lines]
    assert all(line["asked"] == line["finished"] == 12 for line in lines)
    ranks = [json.loads((place / "adapter_config.json").read_text())["r"] for place in sorted(tmp_path.glob("S1/*"))]
    assert ranks == [8, 8, 8]
    assert len(capsys.readouterr().out.splitlines()) == 2
