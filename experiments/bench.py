"""The training step against Hugging Face PEFT on torch: LoRA, a prefix, full fine-tuning; and writing with a prefix.

    make bench       (or: python -m experiments.bench [--rounds 5] [--only ours,peft])

SmolLM2-135M in fp32, LoRA rank 8 on queries and values, AdamW, batch 8 x 128.  Each side is a process of its own that
keeps its model warm; rounds alternate between the sides, so that a noisy machine is noisy for all.  Printed: seconds a
step (median), tokens a second, the ratio to PEFT's at equal checkpointing, and peak resident memory less what importing
the libraries took.  ``matmuls`` runs nothing but the step's matrix products with frozen weights: the limit.  The prefix
has as many trained numbers as LoRA; ``write`` is greedy generation of 64 tokens behind 8 prompts of 64, without a
prefix and with one.  The result is kept in experiments/results/bench.json, of which `make tables` makes the README's
paragraph.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROWS, TIME, RANK, ALPHA, RATE = 8, 128, 8, 16, 1e-4
PREFIX = 40  # rows: 2 · layers · kv_heads · head_dim · 40 numbers are those of LoRA
NEW = 64  # tokens written, behind as many
RESULT = Path(__file__).parent / "results" / "bench.json"

# name: (what runs, checkpointing, whose ratio it is)
SIDES = {
    "peft": ("HF PEFT, torch", "none", None),
    "ours": ("peft_jax, products kept", "none", "peft"),
    "peft-checkpointed": ("HF PEFT, torch", "every layer", None),
    "ours-checkpointed": ("peft_jax", "every layer", "peft-checkpointed"),
    "prefix": (f"peft_jax, a prefix of {PREFIX} rows", "every layer", None),
    "full": ("peft_jax, full fine-tuning", "every layer", None),
    "matmuls": ("matrix products alone", "none", None),
    "write": ("peft_jax, writing", "", None),
    "write-prefix": (f"peft_jax, writing behind a prefix of {PREFIX} rows", "", None),
}


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 49152, (ROWS, TIME), dtype=np.int64)


# -- one side, in a process of its own --------------------------------------------------------------------------------


def worker(name: str, folder: str) -> None:
    make = torch_side if name.startswith("peft") else jax_side
    serve(*make(name, folder))


def serve(run: Callable[[], float], facts: dict[str, Any]) -> None:
    """Answers each line on standard input with one step's seconds and loss; first of all with facts about itself."""
    run()  # the first step allocates
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = run()
        print(json.dumps({"seconds": time.perf_counter() - begin, "loss": loss, "peak": peak()}), flush=True)


def peak() -> int:
    """The largest resident size so far, in bytes.  Not getrusage's, which a child inherits from its parent."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def torch_side(name: str, folder: str) -> tuple[Callable[[], float], dict[str, Any]]:
    import peft
    import torch
    import transformers

    baseline = peak()
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapter).train()
    if name.endswith("checkpointed"):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    ids = torch.tensor(tokens())

    def run() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        tx.step()
        tx.zero_grad()
        return loss.item()

    return run, {"baseline": baseline}


def jax_side(name: str, folder: str) -> tuple[Callable[[], float], dict[str, Any]]:
    import jax
    import optax

    import peft_jax as pj
    from peft_jax import methods, models, training

    baseline = peak()
    jax.devices()
    unrolled = name.endswith("unrolled")
    remat = "dots" if name.split("-")[0] == "ours" and "checkpointed" not in name else "full"
    model = models.load(folder, remat=remat, scan=not unrolled)
    if name == "matmuls":
        return products(model), {"baseline": baseline}
    if name == "write":
        return writing(model.forward, model.params, baseline)
    if name == "full":
        method = methods.unfreeze("", keep_base=False)
    else:
        with_prefix = name in ("prefix", "write-prefix")
        method = methods.prefix_tuning(PREFIX, hidden=None) if with_prefix else methods.lora(RANK, ALPHA)
    params, forward = method(jax.random.key(0), model.params, model.forward)
    del model
    if name == "write-prefix":
        return writing(forward, params, baseline)
    weight_bytes = pj.count(params).bytes
    ids = tokens().astype(np.int32)
    weights = np.ones((ROWS, TIME), np.float32)
    weights[:, -1] = 0
    batch = {"tokens": ids, "targets": np.roll(ids, -1, axis=1), "weights": weights}
    tx = pj.freeze(optax.adamw(RATE), params)
    step: Any = training.make_step(forward, tx)
    state, frozen = training.init_state(params, tx, jax.random.key(1))
    kept = jax.eval_shape(lambda: params)
    del params
    begin = time.perf_counter()
    compiled = training.compile_step(step, state, frozen, batch)
    facts = {"baseline": baseline, "compile_seconds": time.perf_counter() - begin, "trained": pj.count(kept).trainable}
    analysis = compiled.memory_analysis()
    assert analysis is not None
    facts["temporary_bytes"] = analysis.temp_size_in_bytes
    facts["weight_bytes"] = weight_bytes

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return float(metrics["loss"])

    return run, facts


def writing(forward: Any, params: Any, baseline: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """Greedy generation, compiled ahead."""
    import jax.numpy as jnp

    from peft_jax import Inputs, Ports
    from peft_jax.models import decoding

    given = Inputs(jnp.asarray(tokens()[:, :NEW], jnp.int32), mask=jnp.ones((ROWS, NEW), bool))
    arguments = (params, given, jnp.zeros(0, jnp.int32), jnp.int32(0), Ports())
    compiled = decoding.write.lower(forward, *arguments, new=NEW, sampling=None).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    facts = {"baseline": baseline, "temporary_bytes": analysis.temp_size_in_bytes, "tokens": ROWS * NEW}
    return lambda: float(jnp.sum(compiled(*arguments, sampling=None))), facts


def products(model: Any) -> Callable[[], float]:
    """The matrix products that a step with frozen weights cannot avoid: x W and dy Wᵀ for every kernel and the head."""
    import jax
    import jax.numpy as jnp

    layers = model.params["model"]["layers"]
    kernels = [m["kernel"] for part in ("self_attn", "mlp") for m in layers[part].values() if "kernel" in m]
    head = model.params["model"]["embed_tokens"]["embedding"]

    def one(x: Any, ws: list[Any]) -> tuple[Any, None]:
        ys = [x[: w.shape[0]].T @ w for w in ws]
        back = [y @ w.T for y, w in zip(ys, ws, strict=True)]
        return x + 1e-9 * sum(jnp.max(b) for b in back), None  # all of each product is used

    @jax.jit
    def run(x: Any, kernels: list[Any], head: Any) -> Any:
        x, _ = jax.lax.scan(one, x, kernels)
        logits = x[: head.shape[1]].T @ head.T
        return jnp.max(logits @ head)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1536, ROWS * TIME)), jnp.float32)
    return lambda: float(run(x, kernels, head))


# -- the comparison ---------------------------------------------------------------------------------------------------


class Side:
    """A worker process, asked for one step at a time."""

    def __init__(self, name: str, folder: str, module: str = "experiments.bench") -> None:
        command = [sys.executable, "-m", module, "--worker", name, "--folder", folder]
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
    from experiments import provenance  # imported late: a worker on torch must not import JAX
    from experiments.data import smollm2
    from peft_jax import models

    spec = models.load(smollm2()).forward.spec
    cache_row = 2 * 4 * ROWS * spec.layers * spec.kv_heads * spec.head_dim  # keys and values, fp32
    with tempfile.TemporaryDirectory() as folder:
        # Without its tokenizer, which PEFT's side does not load.
        models.save(f"{folder}/smollm2", dataclasses.replace(models.load(smollm2()), tokenizer=None))
        sides: dict[str, Side] = {}
        try:
            for name in names:
                print(f"starting {name}", file=sys.stderr)
                sides[name] = Side(name, f"{folder}/smollm2")
            for index in range(rounds):
                print(f"round {index + 1} of {rounds}", file=sys.stderr)
                for side in sides.values():
                    side.step()
            compiles = compile_times(sides, f"{folder}/smollm2")
        finally:
            for side in sides.values():
                side.close()
    rows = {name: row(side) for name, side in sides.items()}
    for name, found in rows.items():
        reference = rows.get(SIDES[name][2] or "")
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
    unrolled = Side("ours-checkpointed-unrolled", folder)
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
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    cores, commit = result["machine"]["cores"], result["commit"][:12]
    origin = f"{result['rounds']} rounds on {cores} CPU cores; commit {commit}; {versions}"
    return f"{table(result)}\n\n{' '.join(sentences)}\n\n{origin}. No GPU has been measured yet.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(SIDES), help="sides to run, separated by commas")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(given.worker, given.folder)
    names = given.only.split(",")
    if unknown := set(names) - set(SIDES):
        parser.error(f"there is no side {sorted(unknown)[0]!r}: choose from {', '.join(SIDES)}")
    result = compare(names, given.rounds)
    if set(names) == set(SIDES):  # a part of the comparison is shown, and not kept
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result) if set(names) == set(SIDES) else table(result))


if __name__ == "__main__":
    main()
