"""Kernels of quantised leaves on an NVIDIA GPU: checked against fp64, timed against the card's own ceilings.

    python -m experiments.bench_kernels [--skip-models]

One command measures all that docs/kernels.md lists as owed, and leaves experiments/results/bench_kernels.json:

- the ceilings: a large copy, bytes read and written, and a bf16 product of 8192³;
- dequantising a 4096 x 14336 kernel, by XLA and by each table look-up of the kernel: share of the copy's bandwidth;
- products of 1 to 64 rows, several tilings each: share of the bandwidth, and the time of the bf16 product;
- products of 4096 rows, forward and backward: dequantise and multiply, against the bf16 product;
- whole models (`experiments.bench_kernels_model`), each in a process of its own.

A time is the median of several batches of calls; a batch runs over several leaves in one program, more bytes than a
cache holds, so that neither the cache nor the launch of a program is what is measured.  An error is ‖y − y₆₄‖ / ‖y₆₄‖.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import peft_jax as pj
from experiments import provenance
from peft_jax import quant
from peft_jax.quant.kernels import four_bit, grouped_int, mosaic, xla
from peft_jax.quant.nf4 import FourBit

RESULT = Path(__file__).parent / "results" / "bench_kernels.json"
FORMATS: dict[str, Any] = {
    "nf4": quant.nf4(),
    "int4": quant.grouped(4, 32),
    "int3": quant.grouped(3, 32),
    "int2": quant.grouped(2, 32),
}
TILES: dict[str, list[Any]] = {
    "nf4": [four_bit.Blocks(outputs=n, bytes=b, table=t, warps=w) for n in (8, 16, 32) for b in (64, 128, 256)
            for t in ("gather", "select") for w in (4, 8)],
    "int4": [grouped_int.Blocks(outputs=n, warps=w, by_sum=s) for n in (32, 64, 128) for w in (2, 4, 8)
             for s in (0, 4)],
}  # fmt: skip


class Plan(NamedTuple):
    """What is measured: smaller in tests, where kernels are interpreted."""

    inputs: int = 4096
    outputs: int = 14336
    leaves: int = 8
    few: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    many: int = 4096
    square: int = 8192
    copied: int = 2**30
    batches: int = 15
    tiles: int | None = None  # how many of TILES
    interpret: bool = False


def require_gpu() -> None:
    """Raises where JAX has no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        raise SystemExit(
            f"these kernels are for an NVIDIA GPU, and JAX runs on {jax.default_backend()!r} here: install "
            "jax[cuda12] on a machine with one, and run this again"
        )


def seconds(fn: Callable[..., Any], args: tuple[Any, ...], leaves: list[Any], plan: Plan) -> float:
    """Of one call ``fn(*args, leaf)``, all leaves being called in one program."""
    program = jax.jit(lambda args, leaves: [fn(*args, leaf) for leaf in leaves])
    jax.block_until_ready(program(args, leaves))
    times = []
    for _ in range(plan.batches):
        begin = time.perf_counter()
        jax.block_until_ready(program(args, leaves))
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / len(leaves)


def ceilings(plan: Plan) -> dict[str, float]:
    large = jnp.arange(plan.copied // 4, dtype=jnp.uint32)
    copy = seconds(lambda x: x ^ 1, (), [large, large + 1], plan)
    a, b = (jax.random.normal(jax.random.key(i), (plan.square, plan.square), jnp.bfloat16) for i in range(2))
    product = seconds(lambda x, y: x @ y, (a,), [b, b.T], plan)
    return {"copy_bytes_per_second": 2 * plan.copied / copy, "bf16_flops": 2 * plan.square**3 / product}


def leaves_of(name: str, plan: Plan) -> list[Any]:
    def one(seed: int) -> Any:
        w = jax.random.normal(jax.random.key(seed), (plan.inputs, plan.outputs), jnp.bfloat16)
        return FORMATS[name].quantise(w)

    return [one(seed) for seed in range(plan.leaves)]


def stored_bytes(leaf: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(leaf))


def error(found: Any, x: Any, leaf: Any, transpose: bool = False) -> float:
    """Of a product, of its first rows, against fp64 on the host."""
    w = np.asarray(jax.device_get(pj.materialise(leaf)).astype(np.float32), np.float64)
    expected = np.asarray(x[:8].astype(jnp.float32), np.float64) @ (w.T if transpose else w)
    return float(np.linalg.norm(np.asarray(found[:8].astype(jnp.float32)) - expected) / np.linalg.norm(expected))


def dequantising(name: str, plan: Plan, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    leaves = leaves_of(name, plan)
    module: Any = four_bit if isinstance(leaves[0], FourBit) else grouped_int
    if module is four_bit:
        tilings: list[Any] = [
            four_bit.Blocks(numbers=n, table=t, warps=w)
            for n in (2048, 4096, 8192) for t in ("gather", "select") for w in (4, 8)
        ]  # fmt: skip
    else:
        tilings = [grouped_int.Blocks(columns=n, warps=w) for n in (256, 512, 1024) for w in (2, 4, 8)]
    moved = stored_bytes(leaves[0]) + 2 * plan.inputs * plan.outputs
    expected = jax.jit(xla.as_stored)(leaves[0])
    rows = []
    sides: dict[str, Any] = {"xla": xla.as_stored}
    for tiling in tilings[: plan.tiles]:
        sides[str(tiling)] = functools.partial(module.dequantise, interpret=plan.interpret, blocks=tiling)
    if module is grouped_int and mosaic.refuse(leaves[0]) is None and not plan.interpret:
        sides |= {f"mosaic, tile={n}": functools.partial(mosaic.dequantise, tile=n) for n in (256, 512, 1024)}
    for by, fn in sides.items():
        took = seconds(fn, (), leaves, plan)
        row = {"what": f"dequantise {name}", "by": by, "seconds": took}
        exact = bool((jax.jit(fn)(leaves[0]) == expected).all())
        rows.append(row | {"exact": exact, "of_copy": moved / took / ceiling["copy_bytes_per_second"]})
    return rows


def few_rows(name: str, plan: Plan, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    leaves = leaves_of(name, plan)
    module: Any = four_bit if isinstance(leaves[0], FourBit) else grouped_int
    dense = [jnp.asarray(pj.materialise(leaf)) for leaf in leaves]
    rows = []
    for m in plan.few:
        x = jax.random.normal(jax.random.key(m), (m, plan.inputs), jnp.bfloat16)
        plain = seconds(pj.linear, (x,), dense, plan)
        moved = stored_bytes(leaves[0]) + 2 * m * (plan.inputs + plan.outputs)
        for tiling in [None, *TILES[name][: plan.tiles]]:

            def fn(x: Any, leaf: Any, tiling: Any = tiling) -> Any:
                return module.fused(x, leaf, interpret=plan.interpret, blocks=tiling) if tiling else pj.linear(x, leaf)

            took = seconds(fn, (x,), leaves, plan)
            row = {"what": f"{m} rows, {name}", "by": str(tiling or "xla"), "seconds": took, "bf16_seconds": plain}
            row |= {"error": error(jax.jit(fn)(x, leaves[0]), x, leaves[0])}
            rows.append(row | {"of_copy": moved / took / ceiling["copy_bytes_per_second"]})
    return rows


def many_rows(name: str, plan: Plan) -> list[dict[str, Any]]:
    leaves, rows = leaves_of(name, plan)[:2], []
    dense = [jnp.asarray(pj.materialise(leaf)) for leaf in leaves]
    x = jax.random.normal(jax.random.key(0), (plan.many, plan.inputs), jnp.bfloat16)
    g = jax.random.normal(jax.random.key(1), (plan.many, plan.outputs), jnp.bfloat16)
    for what, fn, given, transpose in (("forward", pj.linear, x, False), ("backward", pj.unembed, g, True)):
        plain = seconds(fn, (given,), dense, plan)
        for by in ("xla", "interpret" if plan.interpret else "triton"):
            chosen = [quant.use_kernels({"w": leaf}, by)["w"] for leaf in leaves]
            took = seconds(fn, (given,), chosen, plan)
            row = {"what": f"{plan.many} rows, {name}, {what}", "by": by, "seconds": took, "bf16_seconds": plain}
            row |= {"error": error(jax.jit(fn)(given, chosen[0]), given, leaves[0], transpose)}
            rows.append(row | {"of_bf16": plain / took})
    return rows


def measure(plan: Plan) -> dict[str, Any]:
    ceiling = ceilings(plan)
    rows = [row for name in FORMATS for row in dequantising(name, plan, ceiling)]
    rows += [row for name in TILES for row in few_rows(name, plan, ceiling)]
    rows += [row for name in TILES for row in many_rows(name, plan)]
    return {"ceilings": ceiling, "rows": rows}


def models(names: list[str]) -> list[dict[str, Any]]:
    """A process each, so that each one's peak is its own; one that fails leaves what it said."""
    found = []
    for name in names:
        command = [sys.executable, "-m", "experiments.bench_kernels_model", name]
        done = subprocess.run(command, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        said = {"what": name, "failed": done.stderr[-500:]} if done.returncode else json.loads(last)
        print(said, file=sys.stderr)
        found.append(said)
    return found


def report(result: dict[str, Any]) -> str:
    """The fastest of each kind of row."""
    lines = ["| what | by | µs | of copy's bandwidth | bf16's time / this | error |", "|---|---|---|---|---|---|"]
    best: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in result["rows"]:
        key = row["what"], row["by"] == "xla"
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    for row in best.values():
        share = f"{row['of_copy']:.0%}" if "of_copy" in row else ""
        beside = f"{row['bf16_seconds'] / row['seconds']:.2f}x" if "bf16_seconds" in row else ""
        off = f"{row['error']:.1e}" if "error" in row else {True: "exact", False: "WRONG"}[row["exact"]]
        lines.append(f"| {row['what']} | {row['by']} | {1e6 * row['seconds']:.1f} | {share} | {beside} | {off} |")
    ceiling = result["ceilings"]
    lines += ["", "| model | tokens/s | MFU | peak GB |", "|---|---|---|---|"] if result.get("models") else []
    for row in result.get("models", []):
        if "failed" in row:
            lines.append(f"| {row['what']} | failed: {row['failed'].strip().splitlines()[-1]} | | |")
            continue
        mfu = f"{row['flops_per_second'] / ceiling['bf16_flops']:.0%}" if "flops_per_second" in row else ""
        lines.append(
            f"| {row['what']} | {row['tokens_per_second']:.0f} | {mfu} | {row.get('peak_bytes', 0) / 1e9:.1f} |"
        )
    copied, flops = ceiling["copy_bytes_per_second"] / 1e9, ceiling["bf16_flops"] / 1e12
    return "\n".join(lines) + f"\n\nCopy {copied:.0f} GB/s, bf16 product {flops:.0f} TFLOP/s.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-models", action="store_true", help="kernels alone")
    given = parser.parse_args()
    require_gpu()
    from experiments import bench_kernels_model

    # The models first: this process takes most of the card's memory once it measures.
    rows = [] if given.skip_models else models(list(bench_kernels_model.ROWS))
    here, dirty = provenance.commit()
    where = {"commit": here, "dirty": dirty, "versions": provenance.versions(), "machine": provenance.machine()}
    result = measure(Plan()) | {"models": rows} | where
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()
