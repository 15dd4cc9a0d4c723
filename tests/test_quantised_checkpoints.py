"""Quantised checkpoints in and out: against bitsandbytes and transformers on the CPU, and GPTQ's formula in numpy."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import zoo
from checks import close, same
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax import methods, models, quant, trees
from peft_jax.models.reader import open_safetensors
from peft_jax.quant.grouped import GroupedInt
from peft_jax.quant.int8 import Int8
from peft_jax.quant.nf4 import DYNAMIC, FourBit, Nested

RANDOM = np.random.RandomState(0)
CONFIG = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=64,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
TOKENS = RANDOM.randint(0, 64, (2, 8)).astype(np.int32)
MODULES = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def random_model(folder: Path, **sizes: Any) -> Path:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_dict() | sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Path:
    return random_model(tmp_path_factory.mktemp("plain") / "model")


def load_theirs(folder: Path, **options: Any) -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)
    return found.eval()


def quantised_by_them(plain: Path, folder: Path, dtype: str = "float32", **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**options)
    theirs = load_theirs(plain, dtype=getattr(torch, dtype), quantization_config=config)
    theirs.save_pretrained(folder)
    return theirs


def ours(params: Any, layer: int, module: str) -> Any:
    """The kernel of a module, from a stacked or an unrolled tree."""
    tree = params["model"]
    block, name = module.split(".")
    leaf = (tree["layers"] if "layers" in tree else tree[f"layers_{layer}"])[block][name]["kernel"]
    return jax.tree.map(lambda x: x[layer], leaf) if "layers" in tree else leaf


def weights_of(theirs: Any) -> dict[tuple[int, str], Any]:
    return {(i, m): theirs.get_submodule(f"model.layers.{i}.{m}").weight for i in range(2) for m in MODULES}


def dequantised(weight: Any) -> torch.Tensor:
    """bitsandbytes' numbers.  Given the shape, its kernel for CPUs begins a block with each row, which quantising does
    not: so it is given one row."""
    state = copy.deepcopy(weight.quant_state)
    state.shape = torch.Size([state.shape.numel()])
    return bnb.dequantize_4bit(weight.data, state).reshape(weight.quant_state.shape)


# -- bitsandbytes -----------------------------------------------------------------------------------------------------

FOUR = {
    "nf4, double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4, bf16 in fp32 storage": {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_quant_storage": torch.float32,
        "dtype": "bfloat16",
    },
    "nf4, fp16 in bf16 storage, half of it": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["lm_head", "gate_proj", "v_proj"],
        "dtype": "float16",
    },
}


@pytest.mark.parametrize("name", FOUR)
def test_four_bits_in_and_out(name: str, plain: Path, tmp_path: Path) -> None:
    if "half" in name:
        plain = random_model(tmp_path / "plain", intermediate_size=96)  # of 64s, so down_proj is stored in one row
    theirs = quantised_by_them(plain, tmp_path / "theirs", load_in_4bit=True, **FOUR[name])
    model = models.load(tmp_path / "theirs")
    unrolled = models.load(tmp_path / "theirs", scan=False)
    read = jax.jit(quant.dequantise)(model.params)
    for (layer, module), weight in weights_of(theirs).items():
        leaf = ours(model.params, layer, module)
        assert same(leaf, ours(unrolled.params, layer, module))
        if not hasattr(weight, "quant_state"):
            close(leaf, weight.detach().float().T.numpy(), 0, 0)
            continue
        assert isinstance(leaf, FourBit) and leaf.dtype == str(weight.quant_state.dtype).removeprefix("torch.")
        stored = weight.data.view(torch.uint8).reshape(-1).numpy()
        np.testing.assert_array_equal(leaf.codes.reshape(-1), stored)
        expected = dequantised(weight).float().T.numpy()
        np.testing.assert_array_equal(ours(read, layer, module).astype(jnp.float32), expected)
    if theirs.dtype == torch.float32:
        expected = theirs(torch.tensor(TOKENS)).logits.detach().numpy()
        close(jax.jit(model.forward)(model.params, TOKENS), expected, rtol=0, atol=1e-4)
    # Saved, it is theirs again, and ours.
    for source, folder in ((model, tmp_path / "stacked"), (unrolled, tmp_path / "unrolled")):
        models.save(folder, source, shard_bytes=30_000)
        assert same(models.load(folder).params, model.params)
    back = load_theirs(tmp_path / "stacked")
    for key, weight in weights_of(theirs).items():
        again = weights_of(back)[key]
        assert hasattr(again, "quant_state") is hasattr(weight, "quant_state")
        if hasattr(weight, "quant_state"):
            assert torch.equal(dequantised(again), dequantised(weight))
    # Once dequantised, it is saved as any other model.
    models.save(tmp_path / "whole", model, quant.dequantise(model.params))
    assert "quantization_config" not in json.loads((tmp_path / "whole/config.json").read_text())


def test_int8_in_and_out(plain: Path, tmp_path: Path) -> None:
    theirs = quantised_by_them(plain, tmp_path / "theirs", load_in_8bit=True)
    model = models.load(tmp_path / "theirs", dtype=jnp.bfloat16)
    for (layer, module), weight in weights_of(theirs).items():
        leaf = ours(model.params, layer, module)
        assert isinstance(leaf, Int8) and leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf.codes.T, weight.data.numpy())
        np.testing.assert_array_equal(leaf.absmax, weight.SCB.numpy())
    wide = ours(models.load(tmp_path / "theirs").params, 1, "mlp.down_proj")
    weight = weights_of(theirs)[1, "mlp.down_proj"]
    close(pj.materialise(wide).T, bnb.int8_vectorwise_dequant(weight.data, weight.SCB).numpy(), rtol=1e-6, atol=0)
    models.save(tmp_path / "ours", model)
    assert same(models.load(tmp_path / "ours", dtype=jnp.bfloat16).params, model.params)
    for number, (damage, message) in enumerate(
        [
            ({"SCB": np.ones(32, np.float32)}, rf"{Q}.SCB with shape \[32\], and \[64\] is due"),
            ({"weight": np.ones((64, 64), np.uint8)}, rf"{Q}.weight as uint8, and int8 is due"),
            ({"weight_format": np.uint8(1)}, rf"{Q}.weight_format is 1: only weights kept by rows"),
        ]
    ):
        folder = shutil.copytree(tmp_path / "ours", tmp_path / str(number))
        change(folder, **damage)
        with pytest.raises(ValueError, match=message):
            models.load(folder)
    again = weights_of(load_theirs(tmp_path / "ours"))
    assert all(torch.equal(again[key].data, w.data) for key, w in weights_of(theirs).items())
    assert all(torch.equal(again[key].SCB, w.SCB) for key, w in weights_of(theirs).items())


def test_ours_loads_there(plain: Path, tmp_path: Path) -> None:
    """What `quantise` made, lazily and in part: an untouched module, one in bf16, a head in few bits."""
    model = models.load(plain, lazy=True)
    method = quant.quantise(quant.nf4(32), r"q_proj|down_proj|lm_head", progress=False)
    params, _ = method(jax.random.key(0), model.params, model.forward)
    models.save(tmp_path / "ours", model, params)  # the rest straight from disk
    assert same(models.load(tmp_path / "ours").params, pj.place(params))
    theirs = load_theirs(tmp_path / "ours")
    assert hasattr(theirs.lm_head.weight, "quant_state") and not hasattr(
        theirs.model.layers[0].mlp.up_proj.weight, "quant_state"
    )
    expected = theirs(torch.tensor(TOKENS)).logits.detach().numpy()
    close(jax.jit(model.forward)(pj.place(params), TOKENS), expected, rtol=0, atol=1e-4)
    # Adapters go on what was loaded.
    loaded = models.load(tmp_path / "ours")
    adapted, _ = methods.lora(2, select="down_proj")(jax.random.key(1), loaded.params, loaded.forward)
    with pytest.raises(ValueError, match="LoRA leaves: merge them first"):
        models.save(tmp_path / "adapted", loaded, adapted)
    assert not (tmp_path / "adapted").exists()
    models.save(tmp_path / "adapted", loaded, pj.merge(adapted))
    assert json.loads((tmp_path / "adapted/config.json").read_text())["quantization_config"]["load_in_4bit"]


# -- GPTQ -------------------------------------------------------------------------------------------------------------


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the first axis as 32-bit words, written out bit by bit."""
    flat = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    flat = flat.reshape(-1, 32, codes.shape[1]).astype(np.uint64)
    return (flat << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1).astype(np.uint32).view(np.int32)


def write_gptq(plain: Path, folder: Path, bits: int, size: int, version: str, **fields: Any) -> dict[str, np.ndarray]:
    """A GPTQ checkpoint of random integers, and the weights that it stands for, by module."""
    shutil.copytree(plain, folder)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for i in range(2):
        for module in MODULES:
            stem = f"model.layers.{i}.{module}"
            outputs, inputs = tensors.pop(f"{stem}.weight").shape
            groups = 1 if size == -1 else inputs // size
            codes = RANDOM.randint(0, 2**bits, (inputs, outputs))
            zero = RANDOM.randint(0, 2**bits, (groups, outputs))
            scales = (0.01 + 0.02 * RANDOM.rand(groups, outputs)).astype(np.float16)
            g_idx = (np.arange(inputs) // (inputs // groups)).astype(np.int32)
            kept = (zero - 1) % 2**bits if version == "gptq" else zero
            tensors |= {f"{stem}.qweight": stream(codes, bits), f"{stem}.scales": scales, f"{stem}.g_idx": g_idx}
            tensors[f"{stem}.qzeros"] = np.ascontiguousarray(stream(kept.T, bits).T)
            meant[stem] = scales.astype(np.float32)[g_idx] * (codes - zero[g_idx]).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    given = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": version, **fields}
    configure(folder, quantization_config=given)
    return meant


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("bits", "size", "version"),
    [(4, 32, "gptq"), (3, 32, "gptq_v2"), (2, 16, "gptq"), (8, -1, "gptq_v2"), (3, -1, "gptq")],
)
def test_gptq_in_and_out(bits: int, size: int, version: str, plain: Path, tmp_path: Path) -> None:
    meant = write_gptq(plain, tmp_path / "theirs", bits, size, version, sym=False, desc_act=False)
    model = models.load(tmp_path / "theirs")
    unrolled = models.load(tmp_path / "theirs", scan=False)
    stored = load_file(tmp_path / "theirs/model.safetensors")
    read = jax.jit(quant.dequantise)(model.params)
    for stem, expected in meant.items():
        layer, module = int(stem.split(".")[2]), stem.split(".", 3)[3]
        leaf = ours(model.params, layer, module)
        assert isinstance(leaf, GroupedInt) and same(leaf, ours(unrolled.params, layer, module))
        np.testing.assert_array_equal(np.asarray(leaf.codes).view(np.int32), stored[f"{stem}.qweight"])
        np.testing.assert_array_equal(ours(read, layer, module), expected)
    models.save(tmp_path / "ours", model)
    config = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", bits, size)
    assert same(models.load(tmp_path / "ours").params, model.params)
    saved = load_file(tmp_path / "ours/model.safetensors")
    assert config["checkpoint_format"] == "gptq_v2"  # some zero point is 0
    same_version = {k: v for k, v in stored.items() if version == "gptq_v2" or not k.endswith("qzeros")}
    assert saved.keys() == stored.keys() and all(np.array_equal(saved[k], v) for k, v in same_version.items())


def test_gptq_saves_the_first_version_where_it_can(plain: Path, tmp_path: Path) -> None:
    write_gptq(plain, tmp_path / "theirs", 4, 32, "gptq_v2")
    model = models.load(tmp_path / "theirs")
    params = trees.map_weights(
        lambda w: type(w)(w.codes, w.step, jnp.maximum(w.zero, 1), w.matrix, w.stored, w.bits, w.group_size),
        model.params,
    )
    models.save(tmp_path / "ours", model, params)
    assert json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq"
    assert same(models.load(tmp_path / "ours").params, params)


# -- our own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
def test_what_no_other_format_holds_is_saved_in_ours(scan: bool, plain: Path, tmp_path: Path) -> None:
    model = models.load(plain, scan=scan)
    key = jax.random.key(0)

    def quantised(*steps: Any) -> Any:
        return pj.chain(*(quant.quantise(form, select) for form, select in steps)).init(
            key, model.params, model.forward
        )

    mixed = quantised(
        (quant.nf4(16), "q_proj"),  # a block size that bitsandbytes lacks
        (quant.fp4(64, double=False), "k_proj"),
        (quant.int8(), r"v_proj|embed_tokens"),
        (quant.grouped(3, 16, jnp.bfloat16), "o_proj"),
        (quant.grouped(4, 32), "mlp"),  # fp32 steps
    )
    models.save(tmp_path / "mixed", model, mixed)
    assert same(models.load(tmp_path / "mixed", scan=scan).params, mixed)
    assert json.loads((tmp_path / "mixed/config.json").read_text())["quantization_config"] == {
        "quant_method": "peft_jax",
        "format": 1,
    }
    if scan:
        # A zero point that is no integer, as QA-LoRA's merge leaves it; and steps in fp16 with one that is.
        whole = quantised((quant.grouped(4, 32, jnp.float16), trees.LAYER_MATRICES))
        moved = trees.map_weights(
            lambda w: type(w)(w.codes, w.step, w.zero + jnp.float16(0.25), w.matrix, w.stored, w.bits, w.group_size),
            whole,
        )
        for params, method in ((whole, "gptq"), (moved, "peft_jax")):
            models.save(tmp_path / method, model, params)
            assert (
                json.loads((tmp_path / method / "config.json").read_text())["quantization_config"]["quant_method"]
                == method
            )
        assert same(models.load(tmp_path / "peft_jax").params, moved)
        read, down = jax.jit(pj.materialise), (1, "mlp.down_proj")
        assert same(read(ours(models.load(tmp_path / "gptq").params, *down)), read(ours(whole, *down)))


def test_a_merged_qalora_is_saved_in_gptqs_format_where_that_is_lossless(plain: Path, tmp_path: Path) -> None:
    write_gptq(plain, tmp_path / "base", 4, 32, "gptq_v2")
    model = models.load(tmp_path / "base")
    params, _ = methods.qalora(2, 4, "o_proj", group_size=32)(jax.random.key(0), model.params, model.forward)
    for tree, method in ((params, "gptq"), (zoo.disturbed(params), "peft_jax")):
        merged = pj.merge(tree)
        models.save(tmp_path / method, model, merged)
        config = json.loads((tmp_path / method / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == method
        assert same(models.load(tmp_path / method).params, merged)


def test_fused_tensors_are_saved_in_parts(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = models.from_config(config, jax.random.key(0))
    params, _ = quant.quantise(quant.nf4(32))(jax.random.key(0), model.params, model.forward)
    models.save(tmp_path / "gpt2", model, params)
    assert same(models.load(tmp_path / "gpt2").params, params)
    some, _ = quant.quantise(quant.nf4(32), r"c_attn\.q")(jax.random.key(0), model.params, model.forward)
    with pytest.raises(ValueError, match=r"c_attn.weight is one tensor, and .*c_attn.k is not in few bits"):
        models.save(tmp_path / "some", model, some)
    assert [file.name for file in tmp_path.iterdir()] == ["gpt2"]
    models.save(tmp_path / "plain", model)
    quantised_by_them(tmp_path / "plain", tmp_path / "theirs", load_in_4bit=True)
    with pytest.raises(ValueError, match=r"keeps transformer.h.0.attn.c_attn, of which .*c_attn.q is a part, as one"):
        models.load(tmp_path / "theirs")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def double(plain: Path, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("double") / "model"
    model = models.load(plain)
    models.save(folder, model, quant.quantise(quant.nf4()).init(jax.random.key(0), model.params, model.forward))
    return folder


Q = "model.layers.1.self_attn.q_proj"
NAME = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def change(folder: Path, **tensors: Any) -> None:
    """Replaces tensors of a module, or takes them away."""
    found = load_file(folder / "model.safetensors")
    for key, array in tensors.items():
        name = f"{Q}.{key.replace('__nf4', '#').replace('_of_', '.').replace('#', '__nf4')}"
        found.pop(name, None)
        if array is not None:
            found[name] = np.asarray(array)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def state(folder: Path, **fields: Any) -> None:
    old = json.loads(load_file(folder / "model.safetensors")[NAME].tobytes())
    found = load_file(folder / "model.safetensors")
    found[NAME] = np.frombuffer(json.dumps(old | fields).encode(), np.uint8)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: state(f, shape=[64, 32]), rf"{NAME} says shape \[64, 32\], and \[64, 64\] is due"),
        (lambda f: state(f, blocksize=32), r"q_proj.weight.absmax with shape \[64\], and \[128\] is due"),
        (lambda f: state(f, blocksize=0), rf"{NAME} says blocksize 0, and an even number is due"),
        (lambda f: state(f, quant_type="fp4"), rf"{NAME} says quant_type fp4, and nf4 is due"),
        (lambda f: state(f, dtype="int32"), rf"{NAME} says dtype int32, and float32 or float16 or bfloat16 is due"),
        (lambda f: state(f, nested_blocksize=128), rf"{NAME} says nested_blocksize 128, and 256 is due"),
        (lambda f: change(f, weight_of_quant_state_of_bitsandbytes__nf4=np.uint8([123])), rf"{NAME} is not JSON"),
        (
            lambda f: change(f, weight=np.zeros((7, 1), np.uint8)),
            rf"{Q}.weight has 7 bytes, .* says 4096 numbers, 2048",
        ),
        (lambda f: change(f, weight_of_absmax=None), rf"does not hold the tensor {Q}.weight.absmax \[64\]"),
        (lambda f: change(f, weight_of_absmax=np.zeros(64, np.float32)), r"absmax as float32, and uint8 is due"),
        (lambda f: change(f, weight_of_extra=np.zeros(3, np.uint8)), rf"no place for: {Q}.weight.extra \[3\]"),
        (lambda f: change(f, weight_of_quant_map=np.zeros(16, np.float32)), rf"{Q}.weight.quant_map is not the code"),
        (
            lambda f: change(f, weight_of_quant_state_of_bitsandbytes__nf4=None),
            rf"keeps model.layers.0.self_attn.q_proj in few bits and {Q} not, .* load it with scan=False",
        ),
        (lambda f: configure(f, quantization_config={"quant_method": "awq"}), "quantised by awq: load the original"),
        (
            lambda f: configure(f, quantization_config={"quant_method": "peft_jax"}),
            "has format None of ours, .* reads 1",
        ),
    ],
)
def test_a_damaged_quant_state_is_named(damage: Any, message: str, double: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(double, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_a_shipped_nested_map_is_honoured(double: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(double, tmp_path / "copy")
    table = DYNAMIC * np.float32(1 + 1e-6)
    found = load_file(folder / "model.safetensors")
    found |= {name: table for name in found if name.endswith("nested_quant_map")}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    leaf, plain = (ours(models.load(f).params, 1, "self_attn.q_proj") for f in (folder, double))
    assert isinstance(plain.absmax, Nested)
    np.testing.assert_array_equal(leaf.codes, plain.codes)
    eight, nested, offset = plain.absmax
    expected = table[np.asarray(eight)] * np.repeat(nested, 256)[: eight.size].reshape(eight.shape) + np.asarray(offset)
    np.testing.assert_array_equal(leaf.absmax, expected)


def test_layers_that_differ_load_unrolled(double: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(double, tmp_path / "copy")
    model = models.load(double, scan=False)
    plain = quant.dequantise(model.params["model"]["layers_1"])
    models.save(folder, model, model.params | {"model": model.params["model"] | {"layers_1": plain}})
    assert isinstance(ours(models.load(folder, scan=False).params, 0, "mlp.up_proj"), FourBit)
    with pytest.raises(ValueError, match=r"in few bits and .* not, .* load it with scan=False"):
        models.load(folder)
    replicated = jax.sharding.SingleDeviceSharding(jax.devices()[2])
    placed = models.load(double, shardings=replicated).params
    assert {x.devices().pop() for x in jax.tree.leaves(placed)} == {jax.devices()[2]}
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    columns, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((None, None, "model"), ())
    )
    shardings = jax.tree.map(lambda x: columns if x.ndim == 3 else whole, quant.dequantise(models.load(double).params))
    placed = models.load(double, shardings=shardings).params
    codes = placed["model"]["layers"]["mlp"]["up_proj"]["kernel"].codes
    assert codes.sharding.spec == jax.P(None, "model", None)  # stored output by output
    jax.tree.map(np.testing.assert_array_equal, placed, models.load(double).params)


def test_a_new_head_on_a_base_in_few_bits(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=64, max_position_embeddings=32, pad_token_id=0)
    model = models.from_config(config, jax.random.key(0))
    some = r"layer\.\d+\.attention.*(query|dense)"
    params, _ = quant.quantise(quant.nf4(32), some)(jax.random.key(0), model.params, model.forward)
    models.save(tmp_path / "bert", model, params)
    headed = models.load(tmp_path / "bert", head="tokens", labels=3, lazy=True)
    base = {name: part for name, part in headed.params.items() if name != "classifier"}
    assert same(pj.place(base), params)  # only plain matrices were left on disk
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "bert", device_map="cpu", add_pooling_layer=False).eval()
    assert hasattr(theirs.encoder.layer[1].attention.self.query.weight, "quant_state")
    assert not hasattr(theirs.encoder.layer[1].attention.self.key.weight, "quant_state")
    mask = np.ones(TOKENS.shape, np.int64)
    expected = theirs(torch.tensor(TOKENS.astype(np.int64)), torch.tensor(mask)).last_hidden_state.detach().numpy()
    close(jax.jit(model.forward)(params, TOKENS), expected, rtol=0, atol=1e-4)


def test_gptq_is_checked(plain: Path, tmp_path: Path) -> None:
    write_gptq(plain, tmp_path / "good", 4, 32, "gptq", desc_act=True)
    models.load(tmp_path / "good")  # in order all the same
    scattered = RANDOM.permutation(64).astype(np.int32) // 32
    for number, (damage, message) in enumerate(
        [
            (lambda f: change(f, g_idx=scattered), rf"the groups of {Q} lie scattered .*act-order.* desc_act=False"),
            (lambda f: change(f, qzeros=None), rf"does not hold the tensor {Q}.qzeros \[2, 8\]"),
            (
                lambda f: change(f, scales=np.ones((3, 64), np.float16)),
                r"scales with shape \[3, 64\], which is no whole",
            ),
            (lambda f: change(f, qweight=np.ones((7, 64), np.int32)), rf"{Q}.qweight has 7 words for 64 inputs"),
            (lambda f: change(f, bias=np.ones(64, np.float16)), rf"no place for: {Q}.bias"),
            (lambda f: change(f, bias=np.zeros(64, np.float16)), None),  # as AutoGPTQ adds it
            (
                lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
                r"has 4 bits and groups of 32, and its quantization_config says bits 4 and group_size 128",
            ),
            (
                lambda f: configure(f, quantization_config={"quant_method": "gptq", "checkpoint_format": "marlin"}),
                r"in the format 'marlin', and \('gptq', 'gptq_v2'\) can be read",
            ),
        ]
    ):
        folder = shutil.copytree(tmp_path / "good", tmp_path / str(number))
        damage(folder)
        if message is None:
            models.load(folder)
            continue
        with pytest.raises(ValueError, match=message):
            models.load(folder)
    assert open_safetensors(tmp_path / "good").names()
