"""Several adapters trained at once on one base, against one after another.

    python -m experiments.bench_many [--rounds 5]

SmolLM2-135M in fp32, LoRA rank 8 on queries and values, AdamW; each run has a seed and a learning rate of its own, and
a short batch, 2 x 32, of all runs.  ``one`` is `training.make_step`; one after another takes n times its time.  Each
side is a process of its own, and rounds alternate between them, as in `experiments.bench`.  The result is kept in
experiments/results/bench_many.json, of which `make tables` makes the README's paragraph.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import bench, bench_sides, provenance

ROWS, TIME, RANK, ALPHA = 2, 32, 8, 16
SIDES = {"one": 1, "many-1": 1, "many-4": 4, "many-8": 8}  # name: how many adapters
RESULT = Path(__file__).parent / "results" / "bench_many.json"


def side(name: str, folder: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """One side, compiled."""
    import jax
    import optax

    from peft_jax import methods, models, training
    from peft_jax.training import many

    baseline = bench_sides.peak()
    model = models.load(folder)
    trees = {
        f"seed {i}": methods.lora(RANK, ALPHA).init(jax.random.key(i), model.params, model.forward)
        for i in range(SIDES[name])
    }
    ids = np.random.default_rng(0).integers(0, 49152, (ROWS, TIME)).astype(np.int32)
    weights = np.ones((ROWS, TIME), np.float32)
    weights[:, -1] = 0
    batch = {"tokens": ids, "targets": np.roll(ids, -1, axis=1), "weights": weights}
    step: Any
    if name == "one":
        state, frozen = training.init_state(trees["seed 0"], optax.adamw(1e-4), jax.random.key(0))
        step = training.make_step(model.forward, optax.adamw(1e-4))
    else:
        made = many.stack(trees, optax.adamw(1.0), {run: 1e-4 * (i + 1) for i, run in enumerate(trees)})
        state, frozen = made.state, made.frozen
        step = many.make_many_step(model.forward, optax.adamw(1.0), training.next_token, made.stacked)
    begin = time.perf_counter()
    compiled = training.compile_step(step, state, frozen, batch)
    facts: dict[str, Any] = {"baseline": baseline, "compile_seconds": time.perf_counter() - begin}
    analysis = compiled.memory_analysis()
    assert analysis is not None
    facts |= {"argument_bytes": analysis.argument_size_in_bytes, "temporary_bytes": analysis.temp_size_in_bytes}

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return float(np.mean(metrics["loss"]))

    return run, facts


def compare(rounds: int) -> dict[str, Any]:
    from experiments.data import smollm2
    from peft_jax import models

    with tempfile.TemporaryDirectory() as folder:
        models.save(f"{folder}/smollm2", dataclasses.replace(models.load(smollm2()), tokenizer=None))
        sides = bench.take_turns(list(SIDES), rounds, f"{folder}/smollm2", "experiments.bench_many")
    rows = {name: bench.row(each, ROWS * TIME * SIDES[name]) for name, each in sides.items()}
    for name, found in rows.items():
        found["speed_ratio"] = SIDES[name] * rows["one"]["seconds"] / found["seconds"]
        found["memory_ratio"] = found["peak_bytes"] / rows["one"]["peak_bytes"]
    here, dirty = provenance.commit()
    where = {"commit": here, "dirty": dirty, "versions": provenance.versions(), "machine": provenance.machine()}
    return {"rows": rows, "rounds": rounds, "batch": [ROWS, TIME], **where}


def report(result: dict[str, Any]) -> str:
    """The table and where it comes from, for the README."""
    lines = [
        "| adapters at once | s a step | s one after another | speed | tokens/s | peak memory, GB | memory vs one "
        "| arguments, GB | temporaries, GB | compiling, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["rows"].items():
        n = SIDES[name]
        what = "1, by `training.make_step`" if name == "one" else n
        sizes = (found[f"{kind}_bytes"] / 1e9 for kind in ("argument", "temporary"))
        lines.append(
            f"| {what} | {found['seconds']:.2f} | {n * result['rows']['one']['seconds']:.2f} "
            f"| {found['speed_ratio']:.2f}x | {found['tokens_per_second']:.0f} | {found['peak_bytes'] / 1e9:.2f} "
            f"| {found['memory_ratio']:.2f}x | {' | '.join(f'{size:.2f}' for size in sizes)} "
            f"| {found['compile_seconds']:.1f} |"
        )
    return "\n".join(lines) + f"\n\n{provenance.origin(result)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("worker", nargs="*", help=argparse.SUPPRESS)  # a side's name and the model's folder
    given = parser.parse_args()
    if given.worker:
        return bench_sides.serve(*side(*given.worker))
    result = compare(given.rounds)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()
