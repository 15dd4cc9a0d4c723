"""Loading and saving Hugging Face directories, against transformers with torch."""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax import models
from peft_jax.models import checkpoint, llama, reader, writing

SIZES = {"vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}


def tiny_llama(tied=False, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, tie_word_embeddings=tied, **GQA, **SIZES, **options
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An untied fp32 Llama in several shards."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    tiny_llama().save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(directory, tmp_path):
    """A copy to damage."""
    return shutil.copytree(directory, tmp_path / "copy")


def numpy(tensor):
    return tensor.detach().float().numpy()


def as_source(params, tied):
    """Our Llama tree under transformers' names, written out by hand."""
    layers = params["model"]["layers"]
    found = {
        "model.embed_tokens.weight": params["model"]["embed_tokens"]["embedding"],
        "model.norm.weight": params["model"]["norm"]["scale"],
        "lm_head.weight": params["model"]["embed_tokens"]["embedding"] if tied else params["lm_head"]["kernel"].T,
    }
    for i in range(3):
        at = f"model.layers.{i}."
        for block, names in {"self_attn": "q_proj k_proj v_proj o_proj", "mlp": "gate_proj up_proj down_proj"}.items():
            for name in names.split():
                found[f"{at}{block}.{name}.weight"] = layers[block][name]["kernel"][i].T
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = layers[name]["scale"][i]
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tied, dtype, tmp_path):
    theirs = tiny_llama(tied).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    model = models.load(tmp_path / "theirs", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    state = theirs.state_dict()
    ours = as_source(model.params, tied)
    assert ours.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(ours[name], numpy(tensor), err_msg=name)

    models.save(tmp_path / "ours", model, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    assert type(back) is transformers.LlamaForCausalLM
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    tokens = torch.tensor([[5, 17, 90, 3]])
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)
    assert back.generation_config.eos_token_id == model.generation.eos_token_id == 2


def test_logits_dtypes_and_layouts(directory):
    model = models.load(directory)
    tokens = np.array([[5, 17, 90, 3], [1, 2, 3, 4]])
    expected = numpy(transformers.AutoModelForCausalLM.from_pretrained(directory)(torch.tensor(tokens)).logits)
    np.testing.assert_allclose(jax.jit(model.forward)(model.params, tokens), expected, atol=1e-4)

    half = models.load(directory, dtype=jnp.bfloat16).params
    jax.tree.map(np.testing.assert_array_equal, half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))

    unrolled = models.load(directory, scan=False, compute_dtype=jnp.bfloat16)
    down = unrolled.params["model"]["layers_2"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(down, model.params["model"]["layers"]["mlp"]["down_proj"]["kernel"][2])
    assert jax.eval_shape(unrolled.forward.features, unrolled.params, pj.Inputs(tokens), pj.Ports()).dtype == "bfloat16"


def test_unrolled_trees_save_the_same_file(directory, tmp_path):
    for scan in (True, False):
        models.save(tmp_path / str(scan), models.load(directory, scan=scan))
    stacked, unrolled = (load_file(tmp_path / f"{scan}/model.safetensors") for scan in (True, False))
    assert stacked.keys() == unrolled.keys()
    for name in stacked:
        np.testing.assert_array_equal(stacked[name], unrolled[name])


def test_gpt2_with_bare_names_and_old_buffers(tmp_path):
    """The Hub's gpt2: saved without its head, causal masks among the weights, one fused projection."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(theirs.transformer.h[1].attn.c_attn.bias)
    theirs.transformer.save_pretrained(tmp_path / "bare")
    file = tmp_path / "bare/model.safetensors"
    old = {"h.0.attn.bias": np.ones((1, 1, 64, 64), bool), "h.1.attn.masked_bias": np.float32([-1e4])}
    save_file(load_file(file) | old | {"lm_head.weight": numpy(theirs.lm_head.weight)}, file, metadata={"format": "pt"})

    model = models.load(tmp_path / "bare")
    attention = model.params["transformer"]["layers"]["attn"]["c_attn"]
    fused = theirs.transformer.h[1].attn.c_attn
    for i, name in enumerate("qkv"):
        np.testing.assert_array_equal(attention[name]["kernel"][1], numpy(fused.weight)[:, 32 * i : 32 * (i + 1)])
        np.testing.assert_array_equal(attention[name]["bias"][1], numpy(fused.bias)[32 * i : 32 * (i + 1)])
    models.save(tmp_path / "ours", model)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(back) is transformers.GPT2LMHeadModel
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


# -- shardings --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Counted:
    """A reader that counts what is read."""

    inner: reader.SafeTensors
    read_size: int = 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def read(self, name, index):
        array = self.inner.read(name, index)
        self.read_size += array.size
        return array


def test_arrays_are_created_in_their_shardings(directory, monkeypatch):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    plain = models.load(directory).params
    readers = []
    monkeypatch.setattr(
        models.loading,
        "open_safetensors",
        lambda path: readers.append(Counted(reader.open_safetensors(path))) or readers[-1],
    )

    def rule(path, leaf):
        names = jax.tree_util.keystr(path)
        if "down_proj" in names:
            return NamedSharding(mesh, PartitionSpec(None, ("data", "model"), None))  # rows of a transposed tensor
        if leaf.ndim > 1 and "norm" not in names:
            return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "model"))
        return NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(rule, plain)
    placed = models.load(directory, shardings=shardings).params
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, placed)) == jax.tree.leaves(shardings)
    down = placed["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert {shard.data.shape for shard in down.addressable_shards} == {(3, 6, 32)}
    # Devices that hold the same slice share one read, and nothing is read that no device keeps.
    assert readers[0].read_size == pj.count(plain).frozen

    layers = NamedSharding(mesh, PartitionSpec())
    prefix = {"model": layers, "lm_head": SingleDeviceSharding(jax.devices()[3])}
    placed = models.load(directory, shardings=prefix).params
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
    assert placed["lm_head"]["kernel"].devices() == {jax.devices()[3]}
    assert placed["model"]["norm"]["scale"].sharding == layers


def test_tensors_are_read_in_blocks(directory, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK", 500)
    whole, blocks = [], models.load(directory).params
    monkeypatch.undo()
    whole = models.load(directory).params
    jax.tree.map(np.testing.assert_array_equal, blocks, whole)


def test_memory_stays_within_the_model_and_a_layer(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4
    )
    abstract = jax.eval_shape(lambda key: llama.init(key, config), jax.random.key(0))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), abstract)
    writing.write_params(tmp_path, params, llama.tensors(config), 8)
    size, layer = pj.count(abstract).bytes, pj.count(abstract["model"]["layers"]).bytes // 8
    del params
    source = reader.open_safetensors(tmp_path)
    tracemalloc.start()
    loaded = checkpoint.read_params(source, llama.tensors(config), abstract, 8)
    assert tracemalloc.get_traced_memory()[1] < size + layer
    tracemalloc.stop()
    assert loaded["model"]["layers"]["mlp"]["up_proj"]["kernel"][7, 3, 5] == 0.5


# -- what is refused --------------------------------------------------------------------------------------------------


def rewrite(folder, change):
    """Writes all tensors, changed, into one file."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def a_web_page(folder):
    sorted(folder.glob("*.safetensors"))[0].write_text("<!DOCTYPE html><html><body>Sign in to continue</body></html>")


def a_missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[2].unlink()


def a_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def a_misshapen_tensor(folder):
    name = "model.layers.2.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:8].copy()}))


def an_extra_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}))


def another_head(folder):
    configure(folder, tie_word_embeddings=True)


def pickles(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def no_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def a_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def an_index_that_leaves(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    file.write_text(json.dumps(index))


def configure(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def an_unknown_architecture(folder):
    configure(folder, model_type="mamba")


def quantised_weights(folder):
    configure(folder, quantization_config={"quant_method": "awq", "bits": 4})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, r"model-00002-of-\d+.safetensors is cut short or is not a safetensors file"),
        (a_web_page, r"model-00001-of-\d+.safetensors is cut short or is not a safetensors file"),
        (a_missing_shard, r"lists model-00003-of-\d+.safetensors, which is not there"),
        (a_missing_tensor, r"copy does not hold the tensor model.layers.1.mlp.up_proj.weight \[48, 32\]$"),
        (a_misshapen_tensor, r"k_proj.weight with shape \[8, 32\], and its config asks for \[16, 32\]"),
        (an_extra_tensor, r"no place for: model.layers.0.self_attn.q_proj.bias \[32\]"),
        (another_head, r"no place for: lm_head.weight"),
        (pickles, r"holds pytorch_model.bin, a pickle.*save_pretrained"),
        (no_weights, r"neither model.safetensors nor model.safetensors.index.json"),
        (no_config, r"holds no config.json"),
        (a_broken_config, r"config.json is not JSON"),
        (an_index_that_leaves, r"points outside its folder, to ../elsewhere"),
        (an_unknown_architecture, r"'mamba' is not supported: llama, mistral, .*, t5, bart are"),
        (quantised_weights, r"quantised by awq"),
    ],
)
def test_damaged_directories_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        models.load(copy)


def test_a_table_that_misses_a_leaf_is_an_error(directory):
    model = models.load(directory)
    table = [t for t in llama.tensors(model.config) if "norm" not in t.source]
    source = reader.open_safetensors(directory)
    with pytest.raises(ValueError, match="the leaf model/layers/input_layernorm/scale is not part of the source model"):
        checkpoint.read_params(source, table, model.params, 3)
    del model.params["lm_head"]
    with pytest.raises(ValueError, match=r"the tree lacks lm_head/kernel, which holds lm_head.weight"):
        checkpoint.read_params(source, llama.tensors(model.config), model.params, 3)


def test_names_that_are_nowhere(tmp_path, monkeypatch, directory):
    with pytest.raises(ConnectionError, match=r"someone/model is not a file or directory here.*go online"):
        models.load("someone/model")
    for missing in (tmp_path / "absent", "./absent/model", "model.gguf"):
        with pytest.raises(FileNotFoundError, match="is not there"):
            models.load(missing)
    (tmp_path / "page.gguf").write_text("<html>Not found</html>")
    with pytest.raises(ValueError, match=r"page.gguf is not a GGUF file: it starts with b'<htm'"):
        models.load(tmp_path / "page.gguf")

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(directory)
    )
    assert models.load("someone/model").config.hidden_size == 32
    assert asked["name"] == "someone/model"
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


# -- saving -----------------------------------------------------------------------------------------------------------


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def interrupted_writing(monkeypatch):
    calls = []

    def save_half(tensors, file, metadata):
        calls.append(file)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save_file(tensors, file, metadata)

    monkeypatch.setattr(writing, "save_file", save_half)


def interrupted_renaming(monkeypatch):
    calls, rename = [], Path.rename

    def rename_once(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_once)


@pytest.mark.parametrize("interrupt", [interrupted_writing, interrupted_renaming])
def test_an_interrupted_save_changes_nothing(copy, monkeypatch, interrupt):
    model, before = models.load(copy), contents(copy)
    other = jax.tree.map(lambda x: x + 1, model.params)
    interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        models.save(copy, model, other, shard_bytes=20_000)
    monkeypatch.undo()
    assert contents(copy) == before
    assert [file.name for file in copy.parent.iterdir()] == [copy.name]
    models.save(copy, model, other)
    assert sorted(contents(copy)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert [file.name for file in copy.parent.iterdir()] == [copy.name]
    jax.tree.map(np.testing.assert_array_equal, models.load(copy).params, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Doubled(pj.Weight):
    base: jax.Array


def test_what_save_refuses(directory, tmp_path):
    model = models.load(directory)
    typed = pj.trees.map_leaves(lambda path, leaf: Doubled(leaf) if path[0] == "lm_head" else leaf, model.params)
    with pytest.raises(ValueError, match=r"Doubled leaves: merge them first"):
        models.save(tmp_path / "new", model, typed)
    with pytest.raises(ValueError, match=r"the tree holds ports"):
        models.save(tmp_path / "new", model, model.params | {"ports": {"prompt": jnp.ones((2, 32))}})
    with pytest.raises(ValueError, match=r"the tree lacks lm_head/kernel"):
        models.save(tmp_path / "new", model, {"model": model.params["model"]})
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes.md, which saving would delete"):
        models.save(tmp_path, model)
    with pytest.raises(FileExistsError, match=r"notes.md is a file"):
        models.save(tmp_path / "notes.md", model)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.md"]


def test_random_weights(directory):
    config = transformers.AutoConfig.from_pretrained(directory)
    key = jax.random.key(3)
    model = models.from_config(config, key, dtype=jnp.bfloat16)
    abstract = jax.eval_shape(lambda key: models.from_config(config, key, dtype=jnp.bfloat16).params, key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), model.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    kernel = np.asarray(model.params["model"]["layers"]["mlp"]["up_proj"]["kernel"], np.float32)
    assert 0.015 < kernel.std() < 0.025
    assert abs(kernel[0] - kernel[1]).max() > 0
    with pytest.raises(ValueError, match="'mamba' is not supported: llama"):
        models.from_config(transformers.MambaConfig(), key)
