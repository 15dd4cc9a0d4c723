"""Quantised leaves: bitsandbytes' numbers, bit for bit; memory; and life among methods."""

import dataclasses
import hashlib
from typing import Any

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
import zoo
from checks import close, same, three_steps

import peft_jax as pj
from peft_jax import methods, quant, trees
from peft_jax.models import llama
from peft_jax.quant.grouped import pack, unpack
from peft_jax.quant.nf4 import CODES, DYNAMIC, FourBit, Nested

RANDOM = np.random.RandomState(0)
# Rows that fill blocks, and rows that do not; odd sizes; one row.
SHAPES = [(64, 64), (128, 48), (33, 7), (1, 5), (256, 320)]


def weight(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, torch.Tensor]:
    """The same numbers as ``[in, out]`` and as torch's ``[out, in]``; one block of zeros where there is room."""
    w = RANDOM.standard_normal(shape).astype(np.float32)
    w[:, :1] = 0
    return jnp.asarray(w).astype(dtype), torch.tensor(w).to(getattr(torch, dtype)).T.contiguous()


def theirs(leaf: FourBit, codes: Any, state: Any) -> FourBit:
    """Our leaf of bitsandbytes' own numbers."""
    absmax: Any = jnp.asarray(state.absmax.numpy())
    if state.nested:
        nested, offset = jnp.asarray(state.state2.absmax.numpy()), jnp.asarray(state.offset.numpy())
        absmax = Nested(absmax.reshape(leaf.absmax.codes.shape), nested, offset)
    else:
        absmax = absmax.reshape(leaf.absmax.shape)
    return dataclasses.replace(leaf, codes=jnp.asarray(codes.numpy()).reshape(leaf.codes.shape), absmax=absmax)


def test_tables_are_bitsandbytes_own() -> None:
    for kind, table in CODES.items():
        np.testing.assert_array_equal(table, bnb.get_4bit_type(kind, device="cpu").numpy())
    digest = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(DYNAMIC.astype("<f4").tobytes()).hexdigest() == digest
    np.testing.assert_array_equal(DYNAMIC, bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_are_bitsandbytes_own(shape: tuple[int, int], dtype: str) -> None:
    ours, torchs = weight(shape, dtype)
    for kind, double in (("nf4", False), ("nf4", True), ("fp4", True)):
        codes, state = bnb.quantize_4bit(torchs, blocksize=64, quant_type=kind, compress_statistics=double)
        leaf = getattr(quant, kind)(64, double).quantise(ours)
        given = theirs(leaf, codes, state)
        expected = bnb.dequantize_4bit(codes, state).T.float().numpy()
        np.testing.assert_array_equal(jax.jit(pj.materialise)(given).astype(jnp.float32), expected)
        assert (leaf.shape, leaf.dtype) == (ours.shape, ours.dtype)
        # Quantising: the same codes; the mean of absmax sums in another order, which may move an offset's last bit and
        # with it what lies between two eight-bit codes.
        np.testing.assert_array_equal(leaf.codes, given.codes)
        if double:
            if leaf.absmax.nested.any():  # else all codes are alike
                off = np.abs(leaf.absmax.codes.astype(int) - given.absmax.codes.astype(int))
                assert off.max() <= 1 and off.mean() <= 0.05
            close(leaf.absmax[1:], given.absmax[1:], rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(leaf.absmax, given.absmax)


def test_int8_is_bitsandbytes_own() -> None:
    ours, torchs = weight((96, 40), "float32")
    leaf = quant.int8().quantise(ours)
    codes, absmax, _ = bnb.int8_vectorwise_quant(torchs.half().float().to(torch.float16))
    exact = quant.int8().quantise(ours.astype(jnp.float16))
    np.testing.assert_array_equal(exact.codes.T, codes.numpy())
    np.testing.assert_array_equal(exact.absmax, absmax.numpy())
    close(pj.materialise(leaf), ours, rtol=0, atol=float(jnp.abs(ours).max()) / 127 / 2 + 1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing(bits: int) -> None:
    for inputs in (32, 40, 33):
        codes = RANDOM.randint(0, 2**bits, (inputs, 5)).astype(np.uint8)
        words = pack(jnp.asarray(codes), bits)
        assert words.shape == (-(-inputs * bits // 32), 5)
        stream = [sum(int(code) << (bits * i) for i, code in enumerate(codes[:, o])) for o in range(5)]
        expected = [[value >> (32 * k) & 0xFFFFFFFF for value in stream] for k in range(len(words))]
        np.testing.assert_array_equal(words, np.array(expected, np.uint32))
        np.testing.assert_array_equal(unpack(words, bits, inputs), codes)


def test_groups_are_rounded_to_the_nearest() -> None:
    w = jnp.asarray(RANDOM.standard_normal((96, 10)), jnp.float32)
    for bits in (2, 3, 4, 8):
        leaf = quant.grouped(bits, 32).quantise(w)
        groups = np.asarray(w).reshape(3, 32, 10)
        low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
        step = (high - low) / (2**bits - 1)
        close(leaf.step, step, rtol=1e-6)
        off = np.abs(np.asarray(pj.materialise(leaf)).reshape(3, 32, 10) - groups)
        # Half a step, and another half where rounding the zero point has cut an end off.
        assert (off <= step[:, None] * 1.001).all() and np.mean(off <= step[:, None] * 0.501) > 0.9
    again = quant.grouped(4, 32).quantise(pj.materialise(quant.grouped(4, 32).quantise(w)))
    close(pj.materialise(again), pj.materialise(quant.grouped(4, 32).quantise(w)), atol=1e-6)


FORMATS = {
    "nf4": quant.nf4(16),
    "nf4, one row": quant.nf4(10, double=False),
    "fp4": quant.fp4(16),
    "int8": quant.int8(),
    "int3": quant.grouped(3, 16),
}


@pytest.mark.parametrize("name", FORMATS)
def test_leaves_act_as_the_arrays_they_stand_for(name: str) -> None:
    w = jnp.asarray(RANDOM.standard_normal((3, 32, 48)), jnp.float32)
    stacked = FORMATS[name].quantise(w)
    leaf = jax.tree.map(lambda x: x[1], stacked)
    assert stacked.shape == w.shape and leaf.shape == w.shape[1:]
    assert same(leaf, FORMATS[name].quantise(w[1]))
    x, y = (jnp.asarray(RANDOM.standard_normal((2, 5, n)), jnp.float32) for n in (32, 48))
    ids = jnp.array([[0, 31], [7, 7]])
    full = pj.materialise(leaf)
    close(pj.materialise(stacked)[1], full, rtol=1e-6)

    @jax.jit
    def run(leaf: Any, x: Any, y: Any) -> Any:
        forth = lambda x: pj.linear(x, leaf)  # noqa: E731
        slope = jax.grad(lambda x: (forth(x) ** 2).sum())(x)
        back = jax.grad(lambda y: (pj.unembed(y, leaf) ** 2).sum())(y)
        return forth(x), pj.unembed(y, leaf), pj.embed(ids, leaf), slope, back

    forth, unembedded, embedded, slope, back = run(leaf, x, y)
    close(forth, x @ full, atol=1e-4)
    close(unembedded, y @ full.T, atol=1e-4)
    close(embedded, full[ids])
    close(slope, 2 * (x @ full) @ full.T, rtol=1e-4, atol=1e-3)
    close(back, 2 * (y @ full.T) @ full, rtol=1e-4, atol=1e-3)


def test_an_embedding_is_looked_up_by_rows() -> None:
    table = jnp.asarray(RANDOM.standard_normal((30, 32)), jnp.float32)
    for form in (quant.nf4(16), quant.int8()):
        leaf = form.quantise(table, transposed=False)
        ids = jnp.array([[0, 29], [3, -1]])  # an array gives its last row for -1
        close(pj.embed(ids, leaf), pj.materialise(leaf)[ids], rtol=1e-6)
    assert np.isnan(pj.embed(jnp.array([30]), quant.nf4(16).quantise(table, transposed=False))).all()


def test_a_row_of_nans_spoils_no_other() -> None:
    leaf = quant.nf4(16).quantise(jnp.asarray(RANDOM.standard_normal((32, 48)), jnp.float32))
    x = jnp.asarray(RANDOM.standard_normal((3, 32)), jnp.float32)
    found = jax.jit(pj.linear)(x.at[0].set(jnp.nan), leaf)
    assert np.isnan(found[0]).all()
    close(found[1:], x[1:] @ pj.materialise(leaf), atol=1e-4)
    # Each under vmap, as `training.fit_many` has its runs.
    found = jax.jit(jax.vmap(pj.linear, (0, None)))(x[:, None].at[0].set(jnp.nan), leaf)
    close(found[1:, 0], x[1:] @ pj.materialise(leaf), atol=1e-4)


def test_several_inputs_share_one_dequantised_weight() -> None:
    leaf = quant.nf4().quantise(jnp.ones((256, 256)))
    x = jnp.ones((16, 4, 256))
    compiled = jax.jit(jax.vmap(jax.grad(lambda x, w: pj.linear(x, w).sum()), (0, None))).lower(x, leaf).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 4 * (4 * 256 * 256)  # of 16 that several weights would need


# -- among methods ----------------------------------------------------------------------------------------------------

QLORA = pj.chain(quant.quantise(quant.nf4(16)), methods.lora(4, 8))


def test_either_order_is_one_tree_and_it_trains() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    params, adapted = QLORA(zoo.KEY, base, forward)
    assert same(params, pj.chain(methods.lora(4, 8), quant.quantise(quant.nf4(16)))(zoo.KEY, base, forward)[0])
    frozen = pj.partition(params)[1]
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (frozen["lm_head"], base["lm_head"])), strict=True))
    trained, losses = three_steps(params, adapted, optax.adam(1e-2), zoo.BATCH)
    assert losses[2] < losses[1] < losses[0]
    # Merged into plain arrays: the codes stay what they are.
    merged = pj.merge(trained)
    close(zoo.compiled("llama")(merged, zoo.TOKENS), jax.jit(adapted)(trained, zoo.TOKENS), atol=1e-4)
    assert isinstance(trees.innermost(pj.strip(trained)["model"]["layers"]["self_attn"]["q_proj"]["kernel"]), FourBit)


def temporaries(layers: int, form: Any, scan: bool, remat: str) -> tuple[int, int]:
    """Bytes of temporaries of a gradient, and of the layers' dequantised weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=32)
    forward = llama.build(config, scan=scan, remat=remat)
    method = pj.chain(*([quant.quantise(form)] if form else []), methods.lora(2, select="proj"))
    made = []

    def init(key: Any) -> Any:
        params, adapted = method(key, llama.init(key, config, scan=scan), forward)
        made.append(adapted)
        return params

    params = jax.eval_shape(init, zoo.KEY)
    trained, frozen = pj.partition(params)
    tokens = jnp.zeros((1, 8), jnp.int32)

    def loss(trained: Any, frozen: Any) -> Any:
        return (made[0](pj.combine(trained, frozen), tokens) ** 2).mean()

    analysis = jax.jit(jax.grad(loss)).lower(trained, frozen).compile().memory_analysis()
    kernels = 4 * layers * (4 * 256 * 256 + 3 * 256 * 512)
    return analysis.temp_size_in_bytes, kernels


PLAIN = quant.nf4(double=False)  # whose scales no integer stands before


@pytest.mark.parametrize(
    ("form", "scan", "remat"),
    [(quant.nf4(), True, "full"), (quant.nf4(), True, "none"), (quant.nf4(), False, "none"), (PLAIN, False, "none")],
    ids=["scanned", "scanned-kept", "unrolled", "unrolled-plain-scales"],
)
def test_the_backward_pass_keeps_codes_alone(form: Any, scan: bool, remat: str) -> None:
    """Where layers are added, temporaries grow by no more than activations do, and 5% of the added weights."""
    grown = {}
    for used in (None, form):
        (few, small), (many, large) = (temporaries(n, used, scan, remat) for n in ((4, 16) if scan else (2, 6)))
        grown[used is form] = many - few
    assert grown[True] - grown[False] <= 0.05 * (large - small)


def test_errors_name_what_is_wrong() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    with pytest.raises(ValueError, match="block_size is 0: give an even number"):
        quant.nf4(0)
    with pytest.raises(ValueError, match="bits is 5: choose 2, 3, 4 or 8"):
        quant.grouped(5)
    with pytest.raises(ValueError, match=r"down_proj/kernel: 48 inputs are not a whole number of groups of 32"):
        quant.quantise(quant.grouped(4, 32), "down_proj")(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match=r"q_proj/kernel holds all layers .* leaves out model.layers.0.self"):
        quant.quantise(quant.nf4(16), r"layers\.1\..*q_proj")(zoo.KEY, base, forward)
    broken = base | {"lm_head": {"kernel": base["lm_head"]["kernel"].at[3, 3].set(jnp.nan)}}
    with pytest.raises(ValueError, match="lm_head/kernel: the array holds NaN or Inf"):
        quant.quantise(quant.nf4(16), "lm_head")(zoo.KEY, broken, forward)
    with pytest.raises(ValueError, match="q_proj/kernel is stored as FourBit already"):
        pj.chain(quant.quantise(quant.nf4(16)), quant.quantise(quant.int8(), "q_proj"))(zoo.KEY, base, forward)
    with pytest.raises(TypeError, match="v_proj/kernel trains whole and cannot be stored in few bits"):
        pj.chain(methods.unfreeze("v_proj"), quant.quantise(quant.int8(), "v_proj"))(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match="this is an embedding: use nf4"):
        quant.quantise(quant.grouped(4, 16), "embed_tokens")(zoo.KEY, base, forward)
