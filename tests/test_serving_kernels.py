"""Kernels of the serving pool: interpreted on the CPU against the reference and literal numpy, lowered for CUDA."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from experiments import bench_serving_kernels
from peft_jax.serving.kernels import low_rank, lowrank, paged, paged_attention

RANDOM = np.random.RandomState(0)
ROUNDING = {"float32": 2e-6, "bfloat16": 8e-3}  # of a product, against fp64
RANKS = (1, 5, 8, 24, 64)
BUCKET = 64
Shape = jax.ShapeDtypeStruct


def values(*shape: int, dtype: str = "float32") -> np.ndarray:
    """Random numbers that `dtype` holds exactly."""
    drawn = jnp.asarray(RANDOM.standard_normal(shape), jnp.float32).astype(dtype)
    return np.array(drawn.astype(jnp.float32))


def error(found: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found.astype(jnp.float32)) - expected) / np.linalg.norm(expected))


# -- what is paid -----------------------------------------------------------------------------------------------------


def operands(count: int, time: int, dtype: Any = jnp.float32, wide: int = 64, dim: int = 16) -> dict[str, Any]:
    """Of both functions, abstract: a batch of 3, adapters of rank 8 from 96 to 32, 40 tokens of the past."""
    kv_heads = wide // dim
    return {
        "x": Shape((3, time, 96), dtype),
        "query": Shape((3, time, 2 * kv_heads, dim), dtype),
        "new": Shape((3, time, kv_heads, dim), dtype),
        "rows": Shape((4, count, wide), dtype),
        "a_rows": Shape((3, -(-8 * 96 // wide)), jnp.int32),
        "b_rows": Shape((3, -(-8 * 32 // wide)), jnp.int32),
        "tokens": Shape((3, 40), jnp.int32),
        "counts": Shape((3,), jnp.int32),
    }


def step(given: dict[str, Any], rows: Any, index: Any, implementation: str) -> tuple[Any, Any]:
    """A model's step in small: a scan over layers (windows differ) reads the pool, one scatter writes."""

    def layer(x: Any, i: Any) -> Any:
        y = lowrank(given["x"], rows, i, given["a_rows"], given["b_rows"], 8, 32, implementation=implementation)
        rest = (given["tokens"], given["tokens"], given["counts"], given["counts"])
        z = paged_attention(
            given["query"], given["new"], given["new"], rows, i, *rest, 0.3, window=20 + i, cap=50.0,
            implementation=implementation,
        )  # fmt: skip
        x = x + y.sum().astype(jnp.float32) + z.sum().astype(jnp.float32)
        return x, jnp.full((3, rows.shape[2]), x).astype(rows.dtype)

    x, fresh = jax.lax.scan(layer, jnp.zeros(()), jnp.arange(rows.shape[0], dtype=jnp.int32))
    return x, rows.at[:, index].set(fresh, mode="drop")


@pytest.mark.parametrize("time", [1, 7])
def test_cost_and_memory_do_not_follow_the_pool(time: int) -> None:
    found = []
    for count in (1_000, 100_000):
        given = operands(count, time)
        rows = given.pop("rows")
        run = functools.partial(step, implementation="xla")
        compiled = jax.jit(run, donate_argnums=1).lower(given, rows, Shape((3,), jnp.int32)).compile()
        cost: Any = compiled.cost_analysis()
        memory: Any = compiled.memory_analysis()
        size = rows.size * 4
        assert memory.alias_size_in_bytes >= size  # it is written in place
        assert memory.temp_size_in_bytes < size / rows.shape[0]  # not even one layer of it
        found.append((cost["flops"], memory.temp_size_in_bytes))
    assert found[0] == found[1]


def for_cuda(fn: Any, *args: Any) -> str:
    """What a function becomes on a CUDA device; none need be there."""
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=h100)):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("time", [1, 7, 200])
def test_lowered_for_cuda(time: int) -> None:
    """Three custom calls a layer, each given the whole pool, of which nothing is sliced; pools beyond 4 GB too."""
    for dtype, wide, dim in ((jnp.float32, 192, 64), (jnp.bfloat16, 80, 80), (jnp.bfloat16, 4096, 128)):
        given = operands(200_000, time, dtype, wide, dim)
        rows = given.pop("rows")
        text = for_cuda(functools.partial(step, implementation="triton"), given, rows, Shape((3,), jnp.int32))
        assert text.count("@__gpu$xla.gpu.triton(") == 3
        name = f"tensor<4x200000x{wide}x{'f32' if dtype == jnp.float32 else 'bf16'}>"
        lines = [line for line in text.splitlines() if name in line]
        readers = {found[1] for line in lines if (found := re.search(r"%[\w:]+ = \"?([\w.]+)", line))}
        assert readers - {"func.call"} == {"stablehlo.custom_call", "stablehlo.while"}


# -- products ---------------------------------------------------------------------------------------------------------


class Pool:
    """Two layers of rows, NaN but for row 0 and what is written into the second layer, at scrambled places."""

    def __init__(self, count: int, wide: int) -> None:
        self.rows = np.full((2, count, wide), np.nan, np.float32)
        self.rows[:, 0] = 0
        self.free = list(RANDOM.permutation(np.arange(1, count)))

    def write(self, numbers: np.ndarray) -> list[int]:
        """Numbers one after the other, the last row's tail zeros."""
        wide = self.rows.shape[2]
        flat = np.ravel(numbers)
        ids = [int(self.free.pop()) for _ in range(-(-flat.size // wide))]
        self.rows[1, ids] = np.pad(flat, (0, len(ids) * wide - flat.size)).reshape(-1, wide)
        return ids

    def array(self, dtype: str) -> jax.Array:
        return jnp.asarray(self.rows).astype(dtype)


def table(rows: list[list[int]], wide: int) -> jax.Array:
    return jnp.asarray([[*row, *[0] * (wide - len(row))] for row in rows], jnp.int32)


# inputs, outputs, W: neither need divide another.
SHAPES = [(576, 1536, 192), (1536, 576, 192), (64, 40, 96), (40, 24, 16), (64, 64, 64)]
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("time", [1, 7])
@pytest.mark.parametrize(("inputs", "outputs", "wide"), SHAPES)
def test_each_row_meets_its_own_adapter(inputs: int, outputs: int, wide: int, time: int) -> None:
    """Of every rank, at scrambled rows, two batch rows with one adapter and one with none."""
    for dtype, stored in DTYPES if (inputs, wide) == (64, 96) else DTYPES[:1]:
        pool = Pool(40 + 103 * (inputs + outputs) // wide, wide)
        adapters = [(values(r, inputs, dtype=stored), values(r, outputs, dtype=stored)) for r in RANKS]
        written = [(pool.write(a), pool.write(b)) for a, b in adapters]
        order = [3, 0, None, 4, 1, 3, 2]
        a_rows, b_rows = (
            table([[] if i is None else written[i][side] for i in order], -(-BUCKET * each // wide))
            for side, each in enumerate((inputs, outputs))
        )
        x = values(len(order), time, inputs, dtype=dtype)
        expected = np.stack([
            np.zeros((time, outputs)) if i is None else x[b].astype(np.float64) @ adapters[i][0].T @ adapters[i][1]
            for b, i in enumerate(order)
        ])  # fmt: skip
        arguments = jnp.asarray(x).astype(dtype), pool.array(stored), jnp.int32(1), a_rows, b_rows
        for implementation in ("xla", "interpret"):
            fn = functools.partial(lowrank, rank=BUCKET, outputs=outputs, implementation=implementation)
            found = jax.jit(fn)(*arguments)
            assert (found.shape, found.dtype) == ((len(order), time, outputs), jnp.dtype(dtype))
            assert error(found, expected) < ROUNDING["bfloat16" if "bfloat16" in (dtype, stored) else "float32"]
            assert not found[order.index(None)].any()


@pytest.mark.usefixtures("quick_compiles")
def test_tiles_of_tokens_directions_and_inputs() -> None:
    """Small tiles, so that each loop runs several times and has a part of a tile left over; 0 is not even read."""
    pool = Pool(200, 16)
    pool.rows[:, 0] = np.nan
    a, b = values(20, 40), values(20, 24)
    a_rows, b_rows = table([pool.write(a), []], 60), table([pool.write(b), []], 36)
    for time in (1, 19):
        blocks = low_rank.Blocks(directions=16, inputs=16, outputs=16, tokens=16, splits=2)
        fn = functools.partial(low_rank.lowrank, rank=24, outputs=24, interpret=True, blocks=blocks)
        x = values(2, time, 40)
        found = jax.jit(fn)(jnp.asarray(x), pool.array("float32"), jnp.int32(1), a_rows, b_rows)
        assert error(found[0], x[0].astype(np.float64) @ a.T @ b) < 2e-6
        assert not found[1].any()


def test_no_work_beyond_an_adapters_own_rank() -> None:
    a_rows, b_rows = table([[7] * 13, [7] * 5, [], [7, 0, 7]], 20), table([[3] * 8, [3] * 3, [3] * 8, [3] * 8], 12)
    # 13 rows of 16 hold 5 directions of 40 and 8 numbers of a sixth; 8 rows hold 5 of 24 and 8 numbers more.
    assert low_rank.ranks_of(a_rows, b_rows, 8, 16, 40, 24).tolist() == [6, 2, 0, 2]
    assert low_rank.ranks_of(a_rows, b_rows, 4, 16, 40, 24).tolist() == [4, 2, 0, 2]


# -- attention --------------------------------------------------------------------------------------------------------


def attended(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, past: int, window: int | None, cap: float | None
) -> np.ndarray:
    """Of one row of the batch, a query and a head at a time: query t is at place past + t of all keys."""
    y = np.zeros(q.shape)
    group = q.shape[1] // keys.shape[1]
    for t in range(len(q)):
        first = 0 if window is None else max(0, past + t - window + 1)
        for h in range(q.shape[1]):
            scores = 0.3 * keys[first : past + t + 1, h // group].astype(np.float64) @ q[t, h]
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            shares = np.exp(scores - scores.max())
            y[t, h] = shares / shares.sum() @ values[first : past + t + 1, h // group]
    return y


# heads, kv_heads, dim
HEADS = [(4, 2, 8), (9, 3, 12)]


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("time", [1, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_attention_over_the_pool(heads: int, kv_heads: int, dim: int, time: int) -> None:
    """Past 0, ragged and whole; no, some and all new tokens real; a prefix shared; windows and caps; bf16."""
    context, past, new = 70, [0, 33, 70, 5, 40], [time, 1, time, 0, min(3, time)]
    for dtype, stored in DTYPES[:3] if heads == 4 and time == 7 else DTYPES[:1]:
        pool = Pool(400, kv_heads * dim)
        keys, seen = (values(5, context + time, kv_heads, dim, dtype=stored) for _ in range(2))
        tables = [[[pool.write(each[b, j])[0] for j in range(past[b])] for b in range(5)] for each in (keys, seen)]
        # The last row shares the second's first 20 tokens.
        for each, ids in zip((keys, seen), tables, strict=True):
            ids[4][:20] = ids[1][:20]
            each[4, :20] = each[1, :20]
        q = values(5, time, heads, dim, dtype=dtype)
        fresh = [np.stack([each[b, past[b] : past[b] + time] for b in range(5)]) for each in (keys, seen)]
        fresh = [np.array(jnp.asarray(each).astype(dtype).astype(jnp.float32)) for each in fresh]
        for b in range(5):
            for each, part in zip((keys, seen), fresh, strict=True):
                each[b, past[b] : past[b] + time] = part[b]
                part[b, new[b] :] = np.nan  # what is not real is not seen
        arguments = [jnp.asarray(each).astype(dtype) for each in (q, *fresh)]
        arguments += [pool.array(stored), jnp.int32(1)]
        # Entries that are not filled name a row of NaNs.
        arguments += [jnp.where(ids == 0, pool.free[0], ids) for ids in (table(each, context) for each in tables)]
        arguments += [jnp.asarray(past, jnp.int32), jnp.asarray(new, jnp.int32)]
        cap = 2.0 if dtype == "bfloat16" else None
        for implementation in ("xla", "interpret"):
            fn = jax.jit(functools.partial(paged_attention, scale=0.3, cap=cap, implementation=implementation))
            for window in (1000, 9):
                expected = np.zeros(q.shape)
                for b in range(5):
                    expected[b, : new[b]] = attended(q[b, : new[b]], keys[b], seen[b], past[b], window, cap)
                found = fn(*arguments, window=jnp.int32(window))
                assert found.dtype == jnp.dtype(dtype)
                rounding = 1e-2 if "bfloat16" in (dtype, stored) else 2e-6
                assert error(found, expected) < rounding, (implementation, window)
                assert not found[3].any() and not found[1, 1:].any()


@pytest.mark.usefixtures("quick_compiles")
def test_attention_in_shares_and_without_a_table() -> None:
    """One share or several of the past, several tiles of tokens, a window that may differ by layer; no past at all."""
    pool, heads, dim = Pool(300, 16), 4, 8
    keys, seen = (values(2, 120, 2, dim) for _ in range(2))
    past = [100, 0]
    tables = [table([[pool.write(row)[0] for row in each[0, :100]], []], 100) for each in (keys, seen)]
    for time in (1, 20):
        q = values(2, time, heads, dim)
        fresh = [np.stack([each[0, 100 : 100 + time], each[1, :time]]) for each in (keys, seen)]
        expected = np.stack([attended(q[b], keys[b], seen[b], past[b], 50, None) for b in range(2)])
        rest = (jnp.asarray(past, jnp.int32), jnp.full(2, time, jnp.int32))
        for splits in (1, 3):
            blocks = paged.Blocks(queries=16, keys=16, splits=splits)
            run = functools.partial(paged.paged_attention, scale=0.3, cap=None, interpret=True, blocks=blocks)
            arguments = [jnp.asarray(each) for each in (q, *fresh)] + [pool.array("float32"), jnp.int32(1), *tables]
            assert error(jax.jit(run)(*arguments, *rest, window=jnp.int32(50)), expected) < 2e-6
    none = jnp.zeros((2, 0), jnp.int32)
    rest = (jnp.zeros(2, jnp.int32), rest[1])
    expected = np.stack([attended(q[b], fresh[0][b], fresh[1][b], 0, None, None) for b in range(2)])
    for implementation in ("xla", "interpret"):
        run = functools.partial(paged_attention, scale=0.3, implementation=implementation)
        assert error(jax.jit(run)(*arguments[:5], none, none, *rest), expected) < 2e-6


def test_errors_name_what_is_wrong() -> None:
    x, rows, tables = jnp.ones((2, 1, 40)), jnp.ones((1, 9, 16)), jnp.zeros((2, 13), jnp.int32)
    with pytest.raises(ValueError, match="a_rows has 13 rows of 16 numbers, where 6 directions of 40 take 15: widen"):
        lowrank(x, rows, 0, tables, tables, 6, 24)
    with pytest.raises(ValueError, match="b_rows has 13 rows of 16 numbers, where 5 directions of 48 take 15"):
        lowrank(x, rows, 0, tables, tables, 5, 48)
    with pytest.raises(ValueError, match="there is no implementation 'cuda': choose from xla, triton, interpret"):
        lowrank(x, rows, 0, tables, tables, 5, 24, implementation="cuda")
    q, new, counts = jnp.ones((2, 1, 3, 8)), jnp.ones((2, 1, 2, 8)), jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="3 heads do not share 2 key heads evenly"):
        paged_attention(q, new, new, rows, 0, tables, tables, counts, counts, 1.0)
    with pytest.raises(ValueError, match="a row of the pool has 16 numbers, where 3 heads of 8 are 24"):
        paged_attention(q, q, q, rows, 0, tables, tables, counts, counts, 1.0)


@pytest.mark.usefixtures("quick_compiles")
def test_the_benchmark_at_a_toy_size(capsys: pytest.CaptureFixture[str]) -> None:
    bench_serving_kernels.main()
    shown = capsys.readouterr().out
    assert "Device: cpu" in shown and "the times say nothing" in shown
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith(("| decode", "| p", "| a"))]
    assert [row[0] for row in rows] == [
        "decode, 3 rows",
        "prefill, 2 rows of 7 tokens",
        "attention, 3 rows",
        "attention, 2 rows of 7 tokens",
    ]
    assert all(float(row[6]) < 1e-6 for row in rows)
