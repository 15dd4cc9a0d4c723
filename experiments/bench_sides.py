"""One side of the benchmark, a process of its own that keeps its model warm: `experiments.bench` asks for its steps.

python -m experiments.bench_sides NAME FOLDER
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROWS, TIME, RANK, ALPHA, RATE = 8, 128, 8, 16, 1e-4
PREFIX = 40  # rows: 2 · layers · kv_heads · head_dim · 40 numbers are those of LoRA
NEW = 64  # tokens written, behind as many
VERA = 1024  # directions, as in the paper
INITIAL = 3 * RANK // 2  # AdaLoRA's rank at the start, as in the paper; it ends at RANK
# Of AdaLoRA, on both sides: it prunes at every step.
BUDGET: dict[str, Any] = {"steps": 1000, "initial_steps": 0, "final_steps": 100, "every": 1, "orthogonality": 0.1}


class Setting(NamedTuple):
    """What runs, with which checkpointing, and the side that its ratios are to."""

    what: str
    checkpointing: str
    reference: str = ""


# Sides of one turn run side by side, one step each in a round; so many at once as memory has room for.
TURNS = (
    {
        "peft": Setting("HF PEFT, torch", "none"),
        "ours": Setting("peft_jax, products kept", "none", "peft"),
        "peft-checkpointed": Setting("HF PEFT, torch", "every layer"),
        "ours-checkpointed": Setting("peft_jax", "every layer", "peft-checkpointed"),
        "prefix": Setting(f"peft_jax, a prefix of {PREFIX} rows", "every layer"),
        "full": Setting("peft_jax, full fine-tuning", "every layer"),
        "matmuls": Setting("matrix products alone", "none"),
        "write": Setting("peft_jax, writing", ""),
        "write-prefix": Setting(f"peft_jax, writing behind a prefix of {PREFIX} rows", ""),
    },
    {
        "lora": Setting("peft_jax, LoRA again, beside those below", "every layer"),
        "dylora": Setting("peft_jax, DyLoRA", "every layer"),
        "adalora": Setting("peft_jax, AdaLoRA", "every layer", "peft-adalora"),
        "peft-adalora": Setting("HF PEFT, torch, AdaLoRA", "every layer"),
        "vera": Setting("peft_jax, VeRA", "every layer", "peft-vera"),
        "peft-vera": Setting("HF PEFT, torch, VeRA", "every layer"),
    },
)
SIDES = {name: setting for turn in TURNS for name, setting in turn.items()}
UNROLLED = "unrolled"  # LoRA's checkpointed step with a layer after another: only ever compiled


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 49152, (ROWS, TIME), dtype=np.int64)


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
    shared = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    adapter: Any = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **shared)
    if name == "peft-adalora":
        adapter = peft.AdaLoraConfig(
            init_r=INITIAL,
            target_r=RANK,
            lora_alpha=ALPHA,
            total_step=BUDGET["steps"],
            tinit=BUDGET["initial_steps"],
            tfinal=BUDGET["final_steps"],
            deltaT=BUDGET["every"],
            orth_reg_weight=BUDGET["orthogonality"],
            **shared,
        )
    elif name == "peft-vera":
        adapter = peft.VeraConfig(r=VERA, **shared)
    model = peft.get_peft_model(model, adapter).train()
    if SIDES[name].checkpointing == "every layer":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    ids = torch.tensor(tokens())
    count = itertools.count()

    def run() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        tx.step()
        if name == "peft-adalora":
            model.base_model.update_and_allocate(next(count))
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
    remat = "dots" if name == "ours" else "full"
    model = models.load(folder, remat=remat, scan=name != UNROLLED)
    if name == "matmuls":
        return products(model), {"baseline": baseline}
    if name == "write":
        return writing(model.forward, model.params, baseline)
    make = {
        "full": lambda: methods.unfreeze("", keep_base=False),
        "prefix": lambda: methods.prefix_tuning(PREFIX, hidden=None),
        "write-prefix": lambda: methods.prefix_tuning(PREFIX, hidden=None),
        "dylora": lambda: methods.dylora(RANK, ALPHA),
        "adalora": lambda: methods.adalora(RANK, ALPHA, "(q|v)_proj", initial_rank=INITIAL),
        "vera": lambda: methods.vera(VERA),
    }.get(name, lambda: methods.lora(RANK, ALPHA))
    params, forward = make()(jax.random.key(0), model.params, model.forward)
    del model
    if name == "write-prefix":
        return writing(forward, params, baseline)
    weight_bytes = pj.count(params).bytes
    ids = tokens().astype(np.int32)
    weights = np.ones((ROWS, TIME), np.float32)
    weights[:, -1] = 0
    batch = {"tokens": ids, "targets": np.roll(ids, -1, axis=1), "weights": weights}
    tx = optax.adamw(RATE)
    tx = pj.freeze(methods.allocate_rank(tx, **BUDGET) if name == "adalora" else tx, params)
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


if __name__ == "__main__":
    worker(*sys.argv[1:])
