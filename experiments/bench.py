"""The training step against Hugging Face PEFT on torch: LoRA and its family, a prefix, full fine-tuning; and writing.

    make bench       (or: python -m experiments.bench [--rounds 5] [--only ours,peft])

SmolLM2-135M in fp32, LoRA rank 8 on queries and values, AdamW, batch 8 x 128.  Each side is a process of its own
(`experiments.bench_sides`) that keeps its model warm; rounds alternate between the sides of a turn, so that a noisy
machine is noisy for all.  Printed: seconds a step (median), tokens a second, the ratio to PEFT's at equal
checkpointing, and peak resident memory less what importing the libraries took.  ``matmuls`` runs nothing but the step's
matrix products with frozen weights: the limit.  The prefix has as many trained numbers as LoRA; ``write`` is greedy
generation of 64 tokens behind 8 prompts of 64, without a prefix and with one.  LoRA's family takes the second turn,
with LoRA again beside it: DyLoRA up to the same rank, AdaLoRA from rank 12 to 8, pruning at every step, and VeRA with
1024 directions, these two against PEFT's too.  The result is kept in experiments/results/bench.json, of which
`make tables` makes the README's paragraph.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments import provenance
from experiments.bench_sides import INITIAL, NEW, PREFIX, RANK, ROWS, SIDES, TIME, TURNS, UNROLLED, VERA
from experiments.data import smollm2
from peft_jax import models

RESULT = Path(__file__).parent / "results" / "bench.json"


class Side:
    """A worker process, asked for one step at a time."""

    def __init__(self, name: str, folder: str, module: str = "experiments.bench_sides") -> None:
        command = [sys.executable, "-m", module, name, folder]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.read()
        self.steps: list[dict[str, float]] = []

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} stopped with {self.process.wait()}")  # type: ignore[arg-type]
        return json.loads(line)

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self.read())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def compare(names: list[str], rounds: int) -> dict[str, Any]:
    spec = models.load(smollm2()).forward.spec
    cache_row = 2 * 4 * ROWS * spec.layers * spec.kv_heads * spec.head_dim  # keys and values, fp32
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Without its tokenizer, which PEFT's side does not load.
        models.save(f"{folder}/smollm2", dataclasses.replace(models.load(smollm2()), tokenizer=None))
        for turn in TURNS:
            sides |= take_turns([name for name in turn if name in names], rounds, f"{folder}/smollm2")
        compiles = compile_times(sides, f"{folder}/smollm2")
    rows = {name: row(side) for name, side in sides.items()}
    for name, found in rows.items():
        reference = rows.get(SIDES[name].reference)
        if reference:
            found["speed_ratio"] = reference["seconds"] / found["seconds"]
            found["memory_ratio"] = found["peak_bytes"] / reference["peak_bytes"]
    here, dirty = provenance.commit()
    versions = provenance.versions() | {name: version(name) for name in ("torch", "peft")}
    where = {"commit": here, "dirty": dirty, "versions": versions, "machine": provenance.machine()}
    return {
        "rows": rows,
        "compile_seconds": compiles,
        "rounds": rounds,
        "batch": [ROWS, TIME],
        "cache_row_bytes": cache_row,
        **where,
    }


def take_turns(names: list[str], rounds: int, folder: str, module: str = "experiments.bench_sides") -> dict[str, Side]:
    """Runs some sides, one step of each in a round."""
    sides: dict[str, Side] = {}
    try:
        for name in names:
            print(f"starting {name}", file=sys.stderr)
            sides[name] = Side(name, folder, module)
        for index in range(rounds):
            print(f"round {index + 1} of {rounds}", file=sys.stderr)
            for side in sides.values():
                side.step()
    finally:
        for side in sides.values():
            side.close()
    return sides


def row(side: Side, tokens: int = ROWS * TIME) -> dict[str, Any]:
    seconds = statistics.median(s["seconds"] for s in side.steps)
    found = {
        "seconds": seconds,
        "tokens_per_second": side.facts.get("tokens", tokens) / seconds,
        "peak_bytes": max(s["peak"] for s in side.steps) - side.facts["baseline"],
        "losses": [s["loss"] for s in side.steps],
    }
    return found | {k: v for k, v in side.facts.items() if k != "baseline"}


def compile_times(sides: dict[str, Side], folder: str) -> dict[str, float]:
    """Compile time of the step, layers scanned and unrolled."""
    if "ours-checkpointed" not in sides:
        return {}
    unrolled = Side(UNROLLED, folder)
    unrolled.close()
    found = {"scanned": sides["ours-checkpointed"], "unrolled": unrolled}
    return {name: side.facts["compile_seconds"] for name, side in found.items()}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| step | checkpointing | s | tokens/s | peak memory, GB | speed vs PEFT | memory vs PEFT |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in result["rows"].items():
        what, checkpointing, _ = SIDES[name]
        speed, memory = (f"{found[k]:.2f}x" if k in found else "" for k in ("speed_ratio", "memory_ratio"))
        lines.append(
            f"| {what} | {checkpointing} | {found['seconds']:.2f} | {found['tokens_per_second']:.0f} "
            f"| {found['peak_bytes'] / 1e9:.2f} | {speed} | {memory} |"
        )
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """The table and what it says, for the README."""
    rows, compiles = result["rows"], result["compile_seconds"]
    kept, every, plain = rows["ours"], rows["ours-checkpointed"], rows["peft"]
    rest = every["peak_bytes"] - every["weight_bytes"] - every["temporary_bytes"]
    reached = every["speed_ratio"] >= 1.1 and every["memory_ratio"] <= 0.5
    full, matmuls, prefix = rows["full"], rows["matmuls"]["seconds"], rows["prefix"]
    write, longer = rows["write"], rows["write-prefix"]

    def gb(number: float) -> str:
        return f"{number / 1e9:.2f} GB"

    compiling = " and ".join(f"{seconds:.1f} s with layers {name}" for name, seconds in compiles.items())
    sentences = [
        f"At equal checkpointing the step is {kept['speed_ratio']:.2f}x (products kept) and",
        f"{every['speed_ratio']:.2f}x (every layer) as fast as PEFT's, in {kept['memory_ratio']:.2f}x and",
        f"{every['memory_ratio']:.2f}x of its memory; the checkpointed step against PEFT's plain one,",
        f"{plain['seconds'] / every['seconds']:.2f}x and {every['peak_bytes'] / plain['peak_bytes']:.2f}x.",
        "The aim, 1.1x the speed in half the memory with every layer checkpointed, is",
        "reached." if reached else "missed.",
        f"Of the time, the products that no step with frozen weights can avoid take {matmuls:.2f} s,",
        f"{matmuls / kept['seconds']:.0%} of the plain step: they run in XLA's own library here,",
        "in oneMKL under torch, and which is ahead depends on the processor.",
        f"Of the memory, {gb(every['weight_bytes'])} are fp32 weights, which both sides hold,",
        f"{gb(every['temporary_bytes'])} temporaries ({gb(kept['temporary_bytes'])} where products are kept), and",
        f"{gb(rest)} the runtime's and the compiler's.",
        f"LoRA against full fine-tuning, the same step: {full['seconds'] / every['seconds']:.2f}x the throughput in",
        f"{every['peak_bytes'] / full['peak_bytes']:.2f}x of the memory.",
        f"A prefix with as many trained numbers ({prefix['trained']:,}) against LoRA:",
        f"{every['seconds'] / prefix['seconds']:.2f}x the throughput in",
        f"{prefix['peak_bytes'] / every['peak_bytes']:.2f}x of the memory; against full fine-tuning,",
        f"{full['seconds'] / prefix['seconds']:.2f}x in {prefix['peak_bytes'] / full['peak_bytes']:.2f}x.",
        f"Behind it, {NEW} tokens are written in {longer['seconds'] / write['seconds']:.2f}x of the time, with",
        f"{(longer['temporary_bytes'] - write['temporary_bytes']) / 1e6:.1f} MB more of temporaries, where its cache",
        f"rows are {result['cache_row_bytes'] * PREFIX / 1e6:.1f} MB.",
        f"Compiling the checkpointed step takes {compiling}.",
    ]
    sentences += family(rows)
    return f"{table(result)}\n\n{' '.join(sentences)}\n\n{provenance.origin(result)}"


def family(rows: dict[str, Any]) -> list[str]:
    """What LoRA's family costs beside LoRA of rank 8; nothing where it has not been measured."""
    if "lora" not in rows:
        return []
    lora, adalora, vera = (rows[name] for name in ("lora", "adalora", "vera"))

    def beside(found: dict[str, Any]) -> str:
        time, memory = (found[key] / lora[key] for key in ("seconds", "peak_bytes"))
        return f"{time:.2f}x of its time and {memory:.2f}x of its memory"

    def against(found: dict[str, Any]) -> str:
        return f"{found['speed_ratio']:.2f}x as fast as PEFT's in {found['memory_ratio']:.2f}x of its memory"

    return [
        f"LoRA of rank {RANK} and its family, checkpointed: DyLoRA takes {beside(rows['dylora'])};",
        f"AdaLoRA from rank {INITIAL} to {RANK} {beside(adalora)} (its paper prints 1.11x of the time), and is",
        f"{against(adalora)}; VeRA with {VERA} directions, {vera['trained']:,} trained numbers, {beside(vera)},",
        f"and is {against(vera)}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(SIDES), help="sides to run, separated by commas")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(SIDES):
        parser.error(f"there is no side {sorted(unknown)[0]!r}: choose from {', '.join(SIDES)}")
    result = compare(names, given.rounds)
    if set(names) == set(SIDES):  # a part of the comparison is shown, and not kept
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result) if set(names) == set(SIDES) else table(result))


if __name__ == "__main__":
    main()
