"""Quantised products on a CPU, side by side with bitsandbytes.

    python -m experiments.bench_quant [--rounds 9] [--size 4096]

A square NF4 kernel with blocks of 64 and double quantisation, of the same weight on both sides; fp32 and bf16 inputs of
1 to 256 rows.  Both libraries run in one process, all sides of a row in turn in each round, so that a noisy machine is
noisy for all; medians are printed, and the ratio to bitsandbytes' time.  ``stored`` is the weight as bitsandbytes gives
it, [out, in]; ``[in, out]`` the same turned over, which only a merge needs.  ``dense`` is the product with a plain
weight: no product that dequantises first can be faster.  The result is kept in experiments/results/bench_quant.json.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "bench_quant.json"
ROWS = (1, 8, 64, 256)
DTYPES = ("float32", "bfloat16")
OURS, THEIRS = ("xla", "tiled"), "bitsandbytes"


def sides(size: int, rows: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """Each side of one row of the table: a call that ends when its result is there.  No rows: dequantising."""
    import bitsandbytes
    import bitsandbytes.functional as bnb
    import jax
    import jax.numpy as jnp
    import torch

    import peft_jax as pj
    from peft_jax import quant

    random = np.random.default_rng(0)
    w = random.standard_normal((size, size), np.float32)  # [out, in]
    there = torch.tensor(w).to(getattr(torch, dtype))
    codes, state = bnb.quantize_4bit(there, blocksize=64, quant_type="nf4", compress_statistics=True)
    leaf = quant.nf4().quantise(jnp.asarray(w.T).astype(dtype))
    if not rows:
        as_stored, turned = jax.jit(lambda w: w.rows()), jax.jit(pj.materialise)
        return {
            "stored": lambda: jax.block_until_ready(as_stored(leaf)),
            THEIRS: lambda: bnb.dequantize_4bit(codes, state),
            "[in, out]": lambda: jax.block_until_ready(turned(leaf)),
            f"{THEIRS} [in, out]": lambda: bnb.dequantize_4bit(codes, state).T.contiguous(),
        }
    x = random.standard_normal((rows, size), np.float32)
    ours, theirs = jnp.asarray(x).astype(dtype), torch.tensor(x).to(getattr(torch, dtype))
    product, dense = jax.jit(pj.linear), jnp.asarray(w.T).astype(dtype)
    chosen = {name: quant.use_kernels({"w": leaf}, name)["w"] for name in OURS}

    def multiply(w: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(product(ours, w))

    return {
        **{name: multiply(each) for name, each in chosen.items()},
        THEIRS: lambda: bitsandbytes.matmul_4bit(theirs, codes.t(), quant_state=state),
        "dense": multiply(dense),
        "dense, torch": lambda: theirs @ there.T,
    }


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median milliseconds of each side, and the ratio to bitsandbytes'."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if index:  # the first compiles
                times[name].append(1e3 * (time.perf_counter() - begin))
    medians = {name: statistics.median(each) for name, each in times.items()}
    turned = medians.get(f"{THEIRS} [in, out]")
    ratios = {
        name: found / (turned if turned and "[in, out]" in name else medians[THEIRS]) for name, found in medians.items()
    }
    return {"milliseconds": medians, "ratio": ratios, "all": times}


def compare(rounds: int, size: int) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    from experiments import provenance

    torch.set_num_threads(os.cpu_count() or 1)
    with torch.no_grad():
        found = {
            f"{'dequantise' if not n else f'{n} rows'}, {dtype}": measure(sides(size, n, dtype), rounds)
            for dtype in DTYPES
            for n in (0, *ROWS)
        }
    here, dirty = provenance.commit()
    versions = provenance.versions() | {name: version(name) for name in ("torch", "bitsandbytes")}
    where = {"commit": here, "dirty": dirty, "versions": versions, "machine": provenance.machine()}
    return {"rows": found, "rounds": rounds, "size": size, **where}


def report(result: dict[str, Any]) -> str:
    from experiments import provenance

    lines = ["| what | side | ms | time / bitsandbytes' |", "|---|---|---|---|"]
    for what, found in result["rows"].items():
        for name, median in found["milliseconds"].items():
            lines.append(f"| {what} | {name} | {median:.1f} | {found['ratio'][name]:.2f} |")
    return "\n".join(lines) + f"\n\n{result['size']}², {provenance.origin(result)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=4096)
    given = parser.parse_args()
    result = compare(given.rounds, given.size)
    if given.size == 4096:  # a smaller comparison is shown, and not kept
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()
