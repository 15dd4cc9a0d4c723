"""How long a bridged model takes to trace, beside the same model as it is: CPU seconds, no compilation.

    python -m experiments.bench_bridge

The model is a Llama of SmolLM2-135M's sizes with random weights, LoRA on every projection; what is traced is the
gradient.  Best of three.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import transformers

import peft_jax as pj
from peft_jax import methods, models

SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def seconds(fn: Any, *args: Any) -> tuple[float, Any]:
    begun = time.process_time()
    result = fn(*args)
    return time.process_time() - begun, result


def tracing(forward: Any, params: Any, tokens: Any) -> float:
    """Of the gradient, with nothing remembered from before."""
    trained, frozen = pj.partition(params)
    best = float("inf")
    for _ in range(3):
        jax.clear_caches()
        total = lambda t: forward(pj.combine(t, frozen), tokens).astype(jnp.float32).sum()  # noqa: E731
        best = min(best, seconds(jax.jit(jax.grad(total)).trace, trained)[0])
    return best


def main() -> None:
    tokens, method = jnp.zeros((1, 512), jnp.int32), methods.lora(8, select="_proj")
    print(f"{'layers':<10}{'native':>8}{'bridged':>9}{'traced()':>10}  seconds")
    for scan in (True, False):
        model = models.from_config(transformers.LlamaConfig(**SIZES), jax.random.key(0), scan=scan)
        native = method(jax.random.key(0), model.params, model.forward)
        plain = pj.bridge(lambda params, tokens, model=model: model.forward(params, tokens))
        looking, seen = seconds(plain.traced, model.params, tokens)
        bridged = method(jax.random.key(0), *seen)
        times = [tracing(forward, params, tokens) for params, forward in (native, bridged)]
        print(f"{'scanned' if scan else 'unrolled':<10}{times[0]:>8.2f}{times[1]:>9.2f}{looking:>10.2f}")


if __name__ == "__main__":
    main()
