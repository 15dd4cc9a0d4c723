"""One whole-model row of `experiments.bench_kernels`, in a process of its own.

    python -m experiments.bench_kernels_model NAME        prints one line of JSON

Llama-3-8B's shape with random numbers for weights, 4 x 2048 tokens, every layer checkpointed, LoRA rank 16 on every
kernel of the layers: a training step in tokens a second, operations a second and peak bytes; and 64 tokens written for
one prompt, in tokens a second.  ``hf-lora`` and ``hf-qlora`` are HF PEFT, the latter on bitsandbytes' NF4, on the same
GPU.  Operations are 4 a weight and token, forward and the inputs' backward: what is computed again does not count.
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5,
}  # fmt: skip
BATCH, TIME, RANK, NEW, STEPS = 4, 2048, 16, 64, 5
# name: (method, format, implementation); the last three are written, not trained.
ROWS = {
    "lora": ("lora", None, "xla"),
    "qlora-xla": ("lora", "nf4", "xla"),
    "qlora-triton": ("lora", "nf4", "triton"),
    "qalora-xla": ("qalora", "int4", "xla"),
    "qalora-triton": ("qalora", "int4", "triton"),
    "write-qlora-triton": ("lora", "nf4", "triton"),
    "write-merged-int4-triton": ("merged", "int4", "triton"),
    "write-merged-int4-xla": ("merged", "int4", "xla"),
    "hf-lora": ("hf", None, ""),
    "hf-qlora": ("hf", "nf4", ""),
}


def median_of(run: Callable[[], Any], steps: int) -> float:
    run()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def ours(name: str, shape: dict[str, Any], batch: int, length: int, new: int, steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax
    import transformers

    import peft_jax as pj
    from peft_jax import methods, quant, training
    from peft_jax.models import generation, llama

    kind, form, implementation = ROWS[name]
    written = name.startswith("write")
    config = transformers.LlamaConfig(**shape)
    # A kernel must be handed a layer's codes whole: a scan would copy them out of the stack first.
    scan = not (written and implementation == "triton")
    forward = llama.build(config, scan=scan, remat="none" if written else "full", compute_dtype=jnp.bfloat16)
    formats: dict[str, Any] = {"nf4": quant.nf4(), "int4": quant.grouped(4, 32)}
    parts = [quant.quantise(formats[form])] if form else []
    if kind == "lora":
        parts.append(methods.lora(RANK, 16, "proj"))
    elif kind == "qalora":
        parts.append(methods.qalora(RANK, 16, "proj"))
    made = []

    def init() -> Any:
        plain = llama.init(jax.random.key(0), config, scan=scan, dtype=jnp.bfloat16)
        params, adapted = pj.chain(*parts)(jax.random.key(1), plain, forward)
        made.append(adapted)
        return quant.use_kernels(params, implementation) if form else params

    params = jax.tree_util.tree_map_with_path(_numbers, jax.eval_shape(init))
    adapted = made[0]
    random, facts = np.random.default_rng(0), {"what": name, "layers": shape["num_hidden_layers"]}
    if written:
        prompt = random.integers(0, shape["vocab_size"], (1, 64)).astype(np.int32)
        took = median_of(lambda: generation.generate_tokens(adapted, params, prompt, max_new_tokens=new), steps)
        return facts | {"tokens_per_second": new / took, "seconds": took} | memory()
    ids = random.integers(0, shape["vocab_size"], (batch, length)).astype(np.int32)
    data = {"tokens": ids, "targets": np.roll(ids, -1, 1), "weights": np.ones(ids.shape, np.float32)}
    tx = optax.adamw(1e-4)
    state, frozen = training.init_state(params, tx, jax.random.key(0))
    step = training.make_step(adapted, tx)
    losses = []

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, data)
        losses.append(float(metrics["loss"]))

    took = median_of(run, steps)
    weights = pj.count(params).frozen
    facts |= {"tokens_per_second": batch * length / took, "seconds": took, "losses": losses}
    return facts | {"flops_per_second": 4 * weights * batch * length / took} | memory()


LEVELS = {"norm": 1.0, "scale": 1.0, ".zero": 8.0, ".step": 0.005, ".offset": 0.05, ".nested": 0.001, ".b": 0.0}


def _numbers(path: Any, like: Any) -> Any:
    """Numbers of a size that a trained model has, made on the device: nothing larger was there before the step."""
    import jax
    import jax.numpy as jnp

    name = jax.tree_util.keystr(path)
    if jnp.issubdtype(like.dtype, jnp.integer):
        return jax.random.bits(jax.random.key(zlib.crc32(name.encode())), like.shape, like.dtype)
    for word, level in LEVELS.items():
        if name.endswith(word) or (word == "norm" and word in name):
            return jnp.full(like.shape, level, like.dtype)
    return jax.random.normal(jax.random.key(zlib.crc32(name.encode())), like.shape, like.dtype) / 50


def memory() -> dict[str, int]:
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_bytes": int(stats["peak_bytes_in_use"])} if "peak_bytes_in_use" in stats else {}


def theirs(name: str, shape: dict[str, Any], batch: int, length: int, steps: int) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(**shape, dtype=torch.bfloat16)
    with torch.device("cuda"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if ROWS[name][1]:
        import bitsandbytes

        for module in list(model.model.layers.modules()):
            for key, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    made = bitsandbytes.nn.Linear4bit(
                        child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                        quant_type="nf4", compress_statistics=True,
                    )  # fmt: skip
                    made.weight = bitsandbytes.nn.Params4bit(
                        child.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                    )
                    setattr(module, key, made.cuda())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=targets)).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, shape["vocab_size"], (batch, length), device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    def run() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        tx.step()
        tx.zero_grad()
        torch.cuda.synchronize()

    took = median_of(run, steps)
    facts = {"what": name, "layers": shape["num_hidden_layers"], "seconds": took}
    return facts | {"tokens_per_second": batch * length / took, "peak_bytes": torch.cuda.max_memory_allocated()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ROWS)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer, for a smaller card")
    given = parser.parse_args()
    from experiments.bench_kernels import require_gpu

    require_gpu()
    shape = SHAPE | {"num_hidden_layers": given.layers}
    if ROWS[given.name][0] == "hf":
        found = theirs(given.name, shape, BATCH, TIME, STEPS)
    else:
        found = ours(given.name, shape, BATCH, TIME, NEW, STEPS)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
