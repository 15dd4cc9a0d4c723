"""Kernels of the serving pool on an NVIDIA GPU: checked against the reference, timed against what they replace.

    python -m experiments.bench_serving_kernels

On a GPU it measures shapes of Llama-7B in bf16 and leaves experiments/results/bench_serving_kernels.json.  Elsewhere
it runs a toy size with interpreted kernels, says so, and leaves nothing: there its errors mean something, and its times
do not.

    kernel      mbgmv or mbgmm, the fastest of some tilings; and paged attention likewise
    reference   the same in plain JAX: a gather, then products
    padded      adapters padded to the largest rank of the batch, each lying in one piece; past tokens in one piece,
                padded to the longest
    dense       a whole matrix for each row of the batch, as a copy of the model for each adapter would be

A time is of one call, the median of several programs that each call once a layer, so that the numbers read come from
all layers' memory.  An error is ‖y − y₆₄‖ / ‖y₆₄‖ of one layer against fp64 on the host.
"""

import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import provenance
from peft_jax import attention
from peft_jax.serving.kernels import low_rank, paged, xla

RESULT = Path(__file__).parent / "results" / "bench_serving_kernels.json"
TILINGS: dict[str, list[Any]] = {
    "decode": [low_rank.Blocks(directions=k, inputs=n, outputs=n, splits=s, warps=w) for n in (256, 512, 128)
               for k in (16, 32) for s in (0, 1) for w in (4, 2, 8)],
    "prefill": [low_rank.Blocks(directions=64, inputs=i, outputs=o, tokens=t, warps=w) for t in (64, 128, 32)
                for i in (64, 128) for o in (128, 64) for w in (4, 8)],
    "attention": [paged.Blocks(queries=q, keys=k, splits=s, warps=w) for q in (64, 128) for k in (32, 64, 128)
                  for s in (0, 1, 16) for w in (4, 8)],
}  # fmt: skip


class Plan(NamedTuple):
    """What is measured.  wide: of a row of the pool, and of the matrices; context: of the longest past."""

    wide: int = 4096
    heads: int = 32
    layers: int = 8
    dense_layers: int = 2  # whose matrices are whole
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    batches: tuple[int, ...] = (1, 4, 16, 64)
    prefills: tuple[int, ...] = (1, 4, 16)
    chunk: int = 256
    context: int = 2048
    repeats: int = 15
    tilings: int | None = None  # how many of each of TILINGS
    dtype: str = "bfloat16"
    interpret: bool = False


TOY = Plan(32, 2, 1, 1, (1, 5), (3,), (2,), 7, 12, 1, 1, "float32", True)


def normal(seed: int, *shape: int, dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def exact(a: Any) -> np.ndarray:
    return np.asarray(jax.device_get(a).astype(np.float32), np.float64)


def error(found: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(exact(found) - expected) / np.linalg.norm(expected))


def scrambled(counts: list[int], most: int, taken: int) -> tuple[np.ndarray, int]:
    """A table of rows, none of them twice, padded with 0, and how many rows are taken then."""
    table = np.zeros((len(counts), most), np.int32)
    order = np.random.RandomState(0).permutation(sum(counts)) + taken
    for row, count in zip(table, counts, strict=True):
        row[:count], order = order[:count], order[count:]
    return table, taken + sum(counts)


def pool(plan: Plan, count: int) -> jax.Array:
    rows = normal(1, plan.layers, count, plan.wide, dtype=plan.dtype) * jnp.asarray(plan.wide**-0.5, plan.dtype)
    return rows.at[:, 0].set(0)


def rows_of(what: str, sides: dict[str, Any], expected: np.ndarray, plan: Plan) -> list[dict[str, Any]]:
    """A row a side: its time a call, one for each layer's leaf, and its error in the last layer that it has."""
    found = []
    for by, (fn, args, leaves) in sides.items():
        program = jax.jit(lambda args, leaves, fn=fn: [fn(*args, leaf) for leaf in leaves])
        off = error(program(args, leaves)[-1][:4], expected)
        times = []
        for _ in range(plan.repeats):
            begin = time.perf_counter()
            jax.block_until_ready(program(args, leaves))
            times.append(time.perf_counter() - begin)
        row = {"what": what, "by": by.split(":")[0], "tiling": by.partition(":")[2], "error": off}
        found.append(row | {"seconds": statistics.median(times) / len(leaves)})
        print(found[-1], file=sys.stderr)
    return found


def products(batch: int, tokens: int, plan: Plan) -> list[dict[str, Any]]:
    """One projection of the model for a batch whose ranks are mixed."""
    ranks = [plan.ranks[-1 - i % len(plan.ranks)] for i in range(batch)]
    most = max(ranks)
    a_rows, taken = scrambled(ranks, most, 1)
    b_rows, taken = scrambled(ranks, most, taken)
    rows, tables = pool(plan, taken), (jnp.asarray(a_rows), jnp.asarray(b_rows))
    x = normal(2, batch, tokens, plan.wide, dtype=plan.dtype)
    layers = [jnp.int32(i) for i in range(plan.layers)]

    def by_pool(product: Any, x: Any, rows: Any, a_rows: Any, b_rows: Any, layer: Any) -> Any:
        return product(x, rows, layer, a_rows, b_rows, most, plan.wide)

    def by_pair(x: Any, pair: Any) -> Any:
        h = jnp.einsum("bti,bri->btr", x, pair[0])
        return jnp.einsum("btr,bro->bto", h, pair[1])

    def by_matrix(x: Any, w: Any) -> Any:
        return jnp.einsum("bti,bio->bto", x, w)

    def pair_of(layer: Any) -> Any:
        return [xla.matrices(rows, layer, each, most, plan.wide) for each in tables]

    last = min(plan.dense_layers, plan.layers)
    pairs = [pair_of(layer) for layer in layers]
    whole = [jnp.einsum("bri,bro->bio", *pair) for pair in pairs[:last]]
    sides: dict[str, Any] = {}
    kind = "decode" if tokens == 1 else "prefill"
    for tiling in TILINGS[kind][: plan.tilings]:
        kernel = functools.partial(low_rank.lowrank, interpret=plan.interpret, blocks=tiling)
        sides[f"kernel:{tiling}"] = functools.partial(by_pool, kernel), (x, rows, *tables), layers
    sides["reference"] = functools.partial(by_pool, xla.lowrank), (x, rows, *tables), layers
    sides["padded"] = by_pair, (x,), pairs
    a, b = (exact(each)[:4] for each in pairs[-1])
    expected = np.einsum("bti,bri,bro->bto", exact(x)[:4], a, b, optimize=True)
    what = f"{kind}, {batch} rows" + ("" if tokens == 1 else f" of {tokens} tokens")
    found = rows_of(what, sides, expected, plan)
    a, b = (exact(each)[:4] for each in pairs[last - 1])
    expected = np.einsum("bti,bri,bro->bto", exact(x)[:4], a, b, optimize=True)
    read = 2 * sum(ranks) * plan.wide * rows.dtype.itemsize
    return [row | {"read": read} for row in found + rows_of(what, {"dense": (by_matrix, (x,), whole)}, expected, plan)]


def attended(batch: int, tokens: int, plan: Plan) -> list[dict[str, Any]]:
    """One layer's attention for a batch whose pasts are an eighth to the whole of the longest."""
    dim = plan.wide // plan.heads
    past = [max(1, plan.context * (8 - i % 8) // 8) for i in range(batch)]
    keys, taken = scrambled(past, plan.context, 1)
    seen, taken = scrambled(past, plan.context, taken)
    rows = pool(plan, taken) * jnp.asarray(plan.wide**0.5, plan.dtype)
    q, k, v = (normal(i, batch, tokens, plan.heads, dim, dtype=plan.dtype) for i in (3, 4, 5))
    layers, scale = [jnp.int32(i) for i in range(plan.layers)], dim**-0.5
    arguments = q, k, v, rows, jnp.asarray(keys), jnp.asarray(seen), jnp.asarray(past, jnp.int32)

    def by_pool(run: Any, q: Any, k: Any, v: Any, rows: Any, keys: Any, seen: Any, past: Any, layer: Any) -> Any:
        new = jnp.full(batch, tokens, jnp.int32)
        return run(q, k, v, rows, layer, keys, seen, past, new, scale, jnp.int32(2**30), None)

    def by_piece(q: Any, k: Any, v: Any, past: Any, pair: Any) -> Any:
        """Keys and values in one piece, the new ones behind the padding."""
        at, steps = jnp.arange(plan.context, dtype=jnp.int32), jnp.arange(tokens, dtype=jnp.int32)
        order = past[:, None] + steps[None]
        held = jnp.concatenate([jnp.where(at[None] < past[:, None], at[None], 2**30), order], 1)
        key, value = (jnp.concatenate([old, new], 1) for old, new in zip(pair, (k, v), strict=True))
        return attention.dot_product_attention(q, key, value, attention.Visible(order, held), scale)

    pieces = [
        [xla.gathered(rows, layer, table).reshape(batch, plan.context, plan.heads, dim) for table in arguments[4:6]]
        for layer in layers
    ]
    sides: dict[str, Any] = {}
    for tiling in TILINGS["attention"][: plan.tilings]:
        kernel = functools.partial(paged.paged_attention, interpret=plan.interpret, blocks=tiling)
        sides[f"kernel:{tiling}"] = functools.partial(by_pool, kernel), arguments, layers
    sides["reference"] = functools.partial(by_pool, xla.paged_attention), arguments, layers
    sides["padded"] = by_piece, (q, k, v, arguments[6]), pieces
    expected = []
    for b in range(min(batch, 4)):
        key, value = (np.concatenate([exact(old[b, : past[b]]), exact(new[b])])
                      for old, new in zip(pieces[-1], (k, v), strict=True))  # fmt: skip
        scores = np.einsum("thd,jhd->htj", exact(q[b]), key) * scale
        hidden = np.arange(len(key))[None] > past[b] + np.arange(tokens)[:, None]
        shares = np.exp(np.where(hidden[None], -np.inf, scores - scores.max()))
        expected.append(np.einsum("htj,jhd->thd", shares / shares.sum(-1, keepdims=True), value))
    what = f"attention, {batch} rows" + ("" if tokens == 1 else f" of {tokens} tokens")
    read = 2 * sum(past) * plan.wide * rows.dtype.itemsize
    return [row | {"read": read} for row in rows_of(what, sides, np.stack(expected), plan)]


def measure(plan: Plan) -> dict[str, Any]:
    rows = []
    for measured in (products, attended):
        for batch in plan.batches:
            rows += measured(batch, 1, plan)
        for batch in plan.prefills:
            rows += measured(batch, plan.chunk, plan)
    device = jax.devices()[0]
    return {"device": f"{device.platform}: {device.device_kind}", "plan": plan._asdict(), "rows": rows}


def report(result: dict[str, Any]) -> str:
    """A line for each shape, the kernel by its fastest tiling."""
    what = dict.fromkeys(row["what"] for row in result["rows"])
    lines = [f"Device: {result['device']}.", ""]
    if result["plan"]["interpret"]:
        lines += ["A toy size, the kernels interpreted: the errors are what they are, the times say nothing.", ""]
    lines += [
        "| what | kernel, µs | GB/s of what it names | reference | padded | dense | error | tiling |",
        "|" + 8 * "---|",
    ]
    for each in what:
        rows = [row for row in result["rows"] if row["what"] == each]
        best = {by: min((row for row in rows if row["by"] == by), key=lambda row: row["seconds"], default=None)
                for by in ("kernel", "reference", "padded", "dense")}  # fmt: skip
        cells = [f"{1e6 * row['seconds']:.1f}" if row else "" for row in best.values()]
        kernel = best["kernel"]
        assert kernel is not None
        speed = f"{kernel['read'] / kernel['seconds'] / 1e9:.0f}"
        line = [each, cells[0], speed, *cells[1:], f"{kernel['error']:.1e}", kernel["tiling"]]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    on_gpu = jax.default_backend() == "gpu"
    result = measure(Plan() if on_gpu else TOY)
    if on_gpu:
        here, dirty = provenance.commit()
        where = {"commit": here, "dirty": dirty, "versions": provenance.versions(), "machine": provenance.machine()}
        RESULT.write_text(json.dumps(result | where, indent=2) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()
