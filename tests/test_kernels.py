"""Kernels of quantised leaves: interpreted on the CPU against numpy and the reference, and lowered for CUDA."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from checks import close
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not public in this JAX
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import peft_jax as pj
from peft_jax import methods, quant
from peft_jax.quant import kernels
from peft_jax.quant.grouped import GroupedInt
from peft_jax.quant.kernels import four_bit, grouped_int, mosaic

RANDOM = np.random.RandomState(0)
ROUNDING = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 1e-3}  # of a product: operands and result, against fp64
# Small blocks, so that small arrays have several, and partial ones.
SMALL = {four_bit: four_bit.Blocks(numbers=256, bytes=16), grouped_int: grouped_int.Blocks(columns=16, outputs=16)}


def array(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32).astype(dtype)


def leaf_of(form: Any, inputs: int, outputs: int, dtype: str = "float32") -> Any:
    leaf = form.quantise(array(inputs, outputs, dtype=dtype))
    # Zero points that are no integers, as QA-LoRA's merge leaves them.
    return dataclasses.replace(leaf, zero=leaf.zero + 0.3) if isinstance(leaf, GroupedInt) else leaf


def module_of(leaf: Any) -> Any:
    return grouped_int if isinstance(leaf, GroupedInt) else four_bit


def error(found: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found.astype(jnp.float32)) - expected) / np.linalg.norm(expected))


def for_cuda(fn: Any, *args: Any) -> str:
    """What a function becomes on a CUDA device; none need be there."""
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=h100)):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def triton_calls(fn: Any, *args: Any) -> int:
    return for_cuda(fn, *args).count("__gpu$xla.gpu.triton")


# inputs, outputs: whole blocks; blocks left over; one row of an odd length.
DEQUANTISED = [
    (quant.nf4(16, True), 64, 48, "float32"),
    (quant.nf4(64, True), 128, 70, "bfloat16"),
    (quant.nf4(64, False), 192, 33, "float16"),
    (quant.fp4(64, True), 33, 7, "float32"),
    (quant.grouped(4, 32), 64, 48, "bfloat16"),
    (quant.grouped(3, 32), 96, 40, "float32"),
    (quant.grouped(3, 8), 40, 9, "float32"),
    (quant.grouped(4, 12), 60, 9, "float16"),
    (quant.grouped(2, 16), 48, 33, "float32"),
    (quant.grouped(8, 64), 128, 10, "float32"),
]


@pytest.mark.parametrize(("form", "inputs", "outputs", "dtype"), DEQUANTISED)
def test_dequantised_bit_for_bit(form: Any, inputs: int, outputs: int, dtype: str) -> None:
    leaf = leaf_of(form, inputs, outputs, dtype)
    module, blocks = module_of(leaf), SMALL[module_of(leaf)]
    expected = jax.jit(pj.materialise)(leaf)
    tables = ("gather", "select") if module is four_bit else ("",)
    for table in tables:
        chosen = blocks._replace(table=table) if table else blocks
        found = jax.jit(lambda w, b=chosen: module.dequantise(w, interpret=True, blocks=b))(leaf)
        assert found.dtype == leaf.dtype
        found = found.T if module is four_bit else found
        np.testing.assert_array_equal(found.astype(jnp.float32), expected.astype(jnp.float32))
    assert triton_calls(module.dequantise, leaf) == 1


def test_dequantised_by_mosaic() -> None:
    leaf = leaf_of(quant.grouped(4, 32), 64, 256, "bfloat16")
    found = jax.jit(lambda w: mosaic.dequantise(w, interpret=InterpretGPUParams()))(leaf)
    np.testing.assert_array_equal(found.astype(jnp.float32), jax.jit(pj.materialise)(leaf).astype(jnp.float32))
    assert "@mosaic_gpu" in for_cuda(mosaic.dequantise, leaf)
    with pytest.raises(ValueError, match="groups of 32 codes of 3 bits, which fill no whole words: use 'triton'"):
        mosaic.dequantise(leaf_of(quant.grouped(3, 32), 64, 256))


FUSED = [
    (quant.nf4(16, True), 48, 40, "float32"),
    (quant.fp4(64, False), 192, 33, "bfloat16"),
    (quant.grouped(4, 32), 96, 40, "bfloat16"),
    (quant.grouped(3, 32), 96, 33, "float32"),
    (quant.grouped(2, 16), 48, 20, "float32"),
    (quant.grouped(8, 128), 128, 20, "float32"),
]


ROWS = {"float32": [(1, "float32"), (17, "float16")], "bfloat16": [(3, "bfloat16"), (5, "float32"), (64, "bfloat16")]}


@pytest.mark.parametrize(("form", "inputs", "outputs", "stored"), FUSED)
def test_products_of_few_rows(form: Any, inputs: int, outputs: int, stored: str) -> None:
    leaf = leaf_of(form, inputs, outputs, stored)
    module, blocks = module_of(leaf), SMALL[module_of(leaf)]
    # The grouped kernel does not round a weight to the stored dtype, the other does.
    exact = dataclasses.replace(leaf, stored="float32") if module is grouped_int else leaf
    w = np.asarray(jax.jit(pj.materialise)(exact).astype(jnp.float32), np.float64)
    for rows, dtype in ROWS[stored]:
        x = array(rows, inputs, dtype=dtype)
        found = jax.jit(lambda x, w: module.fused(x, w, interpret=True, blocks=blocks))(x, leaf)
        assert (found.shape, found.dtype) == ((rows, outputs), x.dtype)
        assert error(found, np.asarray(x.astype(jnp.float32), np.float64) @ w) < ROUNDING[dtype]
        assert triton_calls(module.fused, x, leaf) == 1


def grouped_and_four_bit() -> list[Any]:
    return [leaf_of(quant.nf4(16), 48, 40), leaf_of(quant.grouped(4, 16), 48, 40)]


@pytest.mark.parametrize("implementation", ["interpret", "tiled"])
def test_a_leaf_acts_the_same_by_every_implementation(implementation: str) -> None:
    """Forward and backward, few rows and many, one row and vmapped ones; a NaN spoils its own row."""

    def all_of(w: Any, x: jax.Array, many: jax.Array, y: jax.Array) -> Any:
        slope = jax.grad(lambda x: (pj.linear(x, w) ** 2).sum())
        of_several = jax.vmap(pj.linear, (0, None))(x, w)
        return pj.linear(x[0, 0], w), slope(x), pj.linear(many, w), slope(many), pj.unembed(y, w), of_several

    x, many, y = array(2, 3, 48), array(70, 48), array(2, 40)
    for leaf in grouped_and_four_bit():
        other = quant.use_kernels({"w": leaf}, implementation)["w"]
        expected, found = jax.jit(all_of)(leaf, x, many, y), jax.jit(all_of)(other, x, many, y)
        close(found, expected, rtol=1e-4, atol=1e-3)
        spoiled = jax.jit(pj.linear)(x[0].at[1].set(jnp.nan), other)
        assert np.isnan(spoiled).any(1).tolist() == [False, True, False]
        close(spoiled[0], x[0, 0] @ pj.materialise(leaf), atol=1e-4)


def test_tiles() -> None:
    """Leaves with more rows than a tile, cut along what is multiplied and along what is not."""
    for form in (quant.nf4(), quant.grouped(3, 32)):
        leaf = quant.use_kernels({"w": leaf_of(form, 2048, 2048)}, "tiled")["w"]
        w = np.asarray(pj.materialise(leaf), np.float64)
        x = array(2, 2048)
        assert error(jax.jit(pj.linear)(x, leaf), np.asarray(x, np.float64) @ w) < 2e-6
        assert error(jax.jit(pj.unembed)(x, leaf), np.asarray(x, np.float64) @ w.T) < 2e-6
        if isinstance(leaf, GroupedInt):
            continue
        half = x.astype(jnp.bfloat16)
        found = jax.jit(pj.linear)(half, leaf)
        assert found.dtype == half.dtype
        assert error(found, np.asarray(half.astype(jnp.float32), np.float64) @ w) < ROUNDING["bfloat16"]
        analysis = jax.jit(pj.linear).lower(x, leaf).compile().memory_analysis()
        assert analysis is not None
        assert analysis.temp_size_in_bytes < 4 * w.size / 1.5  # a whole weight would be 4 bytes a number


def test_group_sums_are_shared() -> None:
    leaf = quant.use_kernels({"w": leaf_of(quant.grouped(4, 16), 48, 40)}, "interpret")["w"]
    x = array(2, 3, 48)

    def run(x: jax.Array, shared: bool) -> jax.Array:
        sums = kernels.group_sums(x, 16)
        y = kernels.grouped_matmul(x, leaf, sums) if shared else pj.linear(x, leaf)
        return (y**2).sum() + (sums**3).sum()

    found, expected = (jax.jit(jax.value_and_grad(run), static_argnums=1)(x, shared) for shared in (True, False))
    close(found, expected, rtol=1e-4, atol=1e-3)
    # Whoever gives other sums is taken at his word: the kernel reads them.
    doubled = kernels.grouped_matmul(x, leaf, 2 * kernels.group_sums(x, 16))
    offset = kernels.group_sums(x, 16) @ (leaf.step * leaf.zero)
    close(doubled, pj.linear(x, leaf) - offset, rtol=1e-3, atol=1e-3)


def test_qalora_adds_its_inputs_up_once() -> None:
    base = quant.use_kernels({"w": leaf_of(quant.grouped(4, 16), 48, 40)}, "interpret")["w"]
    adapter = methods.qalora(2, 4, "q_proj", group_size=16)
    params, forward = adapter(zoo.KEY, {"q_proj": {"kernel": base}}, projection())
    compiled = jax.jit(forward).lower(params, array(5, 48)).compile().as_text()
    assert len(re.findall(r"f32\[5,3\]\S* reduce\(", compiled)) == 1


def projection() -> pj.Forward:
    return pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))


def test_a_scanned_model_trains_by_kernels() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    method = pj.chain(quant.quantise(quant.nf4(16)), methods.lora(4, 8))
    params, adapted = method(zoo.KEY, base, forward)

    def slopes(params: Any) -> Any:
        trained, frozen = pj.partition(params)
        return jax.value_and_grad(lambda t: (adapted(pj.combine(t, frozen), zoo.TOKENS) ** 2).mean())(trained)

    loss, slope = jax.jit(slopes)(params)
    other_loss, other_slope = jax.jit(slopes)(quant.use_kernels(params, "interpret"))
    close((other_loss, jax.tree.leaves(other_slope)), (loss, jax.tree.leaves(slope)), rtol=1e-3, atol=1e-5)
    # Each of seven kernels, in the scanned layer's forward and backward pass.
    assert triton_calls(slopes, quant.use_kernels(params, "triton")) >= 14


def test_errors_name_what_is_wrong() -> None:
    leaf = leaf_of(quant.nf4(10), 20, 8)
    with pytest.raises(ValueError, match="there is no implementation 'cuda': choose from xla, tiled, triton"):
        quant.use_kernels({"w": leaf}, "cuda")
    with pytest.raises(ValueError, match="w/kernel has blocks of 10 numbers, where a kernel needs a power of two"):
        quant.use_kernels({"w": {"kernel": leaf}}, "triton")
    with pytest.raises(ValueError, match="no leaf is stored in NF4, FP4 or grouped integers"):
        quant.use_kernels({"w": array(4, 4)}, "triton")
    chosen = quant.use_kernels({"w": leaf_of(quant.nf4(16), 32, 8)}, "triton")["w"]
    with pytest.raises(TypeError, match="the input is int32: the kernels multiply float32, bfloat16, float16"):
        chosen.times(jnp.ones((1, 32), jnp.int32), False)
