"""Laws of whole programs: scan, remat, devices, precision, and what a compiled step holds."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
import zoo
from checks import close, copied, differs, without_compiling
from zoo import BATCH, KEY, TOKENS

import peft_jax as pj
from peft_jax import methods
from peft_jax.models import llama
from peft_jax.training import init_state, make_step, next_token
from peft_jax.training.step import shardings_of

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_training_on_eight_devices_is_training_on_one() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    over = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))  # noqa: E731
    method, tx = pj.chain(methods.lora(4, 8), methods.unfreeze("norm")), optax.sgd(0.1, momentum=0.9)
    params, forward = method(KEY, zoo.base("llama"), zoo.build("llama"))
    trained, frozen = pj.partition(params)
    kernels = jax.tree.map(lambda x: over(*[None] * (x.ndim - 1), "model") if x.ndim > 1 else over(), frozen)
    spread = pj.combine(pj.place(trained, over()), pj.place(frozen, kernels))
    batches = [BATCH, jax.device_put(BATCH, over("data"))]
    ends = []
    for given, batch in zip((params, spread), batches, strict=True):
        state, rest = init_state(given, tx, KEY)
        step = make_step(forward, tx, shardings=shardings_of(state))
        state, metrics = step(state, rest, batch)
        for _ in range(2):
            state, metrics = without_compiling(step, state, rest, batch)
        ends.append(copied((state.trainables, metrics["loss"])))
    close(*ends, rtol=1e-4, atol=1e-5)


def test_scan_and_remat_change_nothing() -> None:
    """Losses and gradients, dropout included: the same names draw the same masks."""
    method, port = pj.chain(methods.lora(4, 8, dropout=0.2), methods.unfreeze("norm")), pj.Ports(micro_key=KEY)
    found = []
    for options in ({}, {"remat": "dots"}, {"remat": "none", "scan": False}):
        base = zoo.base("llama") if options.get("scan", True) else zoo.unrolled(zoo.base("llama"))
        params, forward = method(KEY, base, zoo.build("llama", **options))
        trained, frozen = pj.partition(params)

        @jax.jit
        def run(trained: Any, frozen: Any, forward: pj.Forward = forward) -> Any:
            total = lambda t: next_token(forward, pj.combine(t, frozen), BATCH, port)[0]  # noqa: E731
            return jax.value_and_grad(total)(trained)

        loss, gradient = run(trained, frozen)
        model = gradient["model"]
        layers = [model["layers"]] if "layers" in model else [model[f"layers_{i}"] for i in range(zoo.LAYERS)]
        stacks = zip(*map(jax.tree.leaves, layers), strict=True)
        found.append((loss, model["norm"]["scale"].value, [jnp.stack(x) if len(x) > 1 else x[0] for x in stacks]))
    assert len(found[0][2]) == 6 and all(differs(g, 0 * g) for g in found[0][2][:2])
    for other in found[1:]:
        close(found[0], other, rtol=1e-4, atol=1e-4)


def test_compiled_and_eager_agree() -> None:
    method = pj.chain(methods.dora(4, 8, dropout=0.2), methods.unfreeze("norm"))
    params, forward = method(KEY, zoo.base("llama"), zoo.build("llama"))
    noisy, port = zoo.disturbed(params), pj.Ports(micro_key=KEY)
    close(forward(noisy, TOKENS, port), jax.jit(forward)(noisy, TOKENS, port))


def test_half_precision_stays_close_to_full() -> None:
    """A bf16 base: activations and logits within its rounding; the adapter and its gradient stay fp32."""
    full, half = (
        methods.lora(4, 8)(KEY, zoo.base("llama", d), zoo.build("llama"))[0] for d in (jnp.float32, jnp.bfloat16)
    )
    trained = pj.partition(zoo.disturbed(full))[0]
    gradients = []
    for params in (full, half):
        # JAX's attention promotes half precision while its gradient is lowered, which strictness forbids.
        @jax.numpy_dtype_promotion("standard")
        @jax.jit
        def run(trained: Any, frozen: Any) -> Any:
            return jax.value_and_grad(lambda t: next_token(zoo.build("llama"), pj.combine(t, frozen), BATCH)[0])(
                trained
            )

        loss, gradient = run(trained, pj.partition(params)[1])
        gradients.append((loss / 96, np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient)])))
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))
    (a, f), (b, h) = gradients
    assert float(a) == pytest.approx(float(b), rel=0.02) and float(a) != float(b)
    assert f @ h / np.linalg.norm(f) / np.linalg.norm(h) > 0.98


def test_no_gradient_of_a_frozen_kernel_is_formed() -> None:
    """In the compiled program of the step: two thirds of full fine-tuning's products, none of a kernel's shape."""
    sizes = zoo.SIZES | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 80}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    base, forward = llama.init(KEY, config), llama.build(config, remat="none")
    tokens = np.random.RandomState(0).randint(0, 80, (8, 17)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 16), np.float32)}
    shapes = {x.shape[-2:] for x in jax.tree.leaves(base) if x.ndim > 1 and min(x.shape[-2:]) > zoo.LAYERS}
    assert shapes == {(64, 64), (64, 32), (64, 96), (96, 64), (80, 64), (64, 80)}

    def program(method: pj.Method) -> Any:
        params, adapted = method(KEY, base, forward)
        tx = optax.sgd(0.1)
        state, frozen = init_state(params, tx, KEY)
        lowered = make_step(adapted, tx).lower(state, frozen, batch)
        outputs = [x.shape for x in jax.tree.leaves(lowered.out_info) if x.shape]
        assert sorted(outputs) == sorted(x.shape for x in jax.tree.leaves(state) if x.shape), "frozen leaves came out"
        return lowered.compile()

    def products(compiled: Any) -> set[tuple[int, ...]]:
        found = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", compiled.as_text())
        return {tuple(map(int, dims.split(",")))[-2:] for dims in found}

    def of_kernels(compiled: Any) -> set[tuple[int, ...]]:
        return {shape for shape in products(compiled) if shape in shapes or shape[::-1] in shapes}

    ours, full = program(methods.lora(2)), program(methods.unfreeze(""))
    forth = jax.jit(lambda p: next_token(forward, p, batch)[0]).lower(base).compile()
    assert not of_kernels(ours) and len(of_kernels(full)) >= 5
    flops = [program.cost_analysis()["flops"] for program in (forth, ours, full)]
    assert 1.7 * flops[0] < flops[1] < 2.4 * flops[0]
    assert flops[2] > 2.7 * flops[0]
