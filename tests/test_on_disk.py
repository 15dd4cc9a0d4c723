"""Leaves that are still on disk: adapted, quantised a layer at a time, placed; and what that costs in memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
import zoo
from checks import close, same
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax import methods, models, quant, training, trees
from peft_jax.interop import hf_peft
from peft_jax.models import llama, writing
from peft_jax.on_disk import OnDisk

ROOT = Path(__file__).parent.parent
QLORA = pj.chain(methods.lora(4, 8), quant.quantise(quant.nf4(16), progress=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A Llama in several shards, in bf16."""
    place = tmp_path_factory.mktemp("lazy") / "model"
    model = models.Model(zoo.base("llama", jnp.bfloat16), zoo.build("llama"), zoo.CONFIGS["llama"])
    models.save(place, model, shard_bytes=20_000)
    assert len(list(place.glob("*.safetensors"))) > 2
    return place


def test_leaves_on_disk_are_what_loading_gives(folder: Path) -> None:
    lazy, whole = models.load(folder, lazy=True), models.load(folder)
    left = trees.leaves(lazy.params)
    assert {type(leaf) is OnDisk for path, leaf in left.items() if path[-1] in ("kernel", "embedding")} == {True}
    for path, leaf in trees.leaves(whole.params).items():
        assert (left[path].shape, left[path].dtype) == (leaf.shape, leaf.dtype)
        close(pj.materialise(left[path]), leaf, 0, 0)
    assert pj.count(lazy.params)[:2] == pj.count(whole.params)[:2]
    down = lazy.params["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    close(down.layer(2), whole.params["model"]["layers"]["mlp"]["down_proj"]["kernel"][2], 0, 0)
    # A tree without children, which JAX compares and hashes.
    assert not jax.tree.leaves(down)
    assert jax.tree.structure(lazy.params) == jax.tree.structure(jax.tree.map(lambda x: x, lazy.params))
    assert jax.tree.structure(down) != jax.tree.structure(lazy.params["lm_head"]["kernel"])
    assert len({jax.tree.structure(down), jax.tree.structure(down)}) == 1
    assert same(pj.place(lazy.params), whole.params)


def test_they_are_placed_straight_into_shardings(folder: Path) -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    replicated, columns = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "model")))
    lazy = models.load(folder, lazy=True)
    adapted, _ = methods.lora(4, 8)(zoo.KEY, lazy.params, lazy.forward)
    whole, _ = methods.lora(4, 8)(zoo.KEY, models.load(folder).params, lazy.forward)
    placed = pj.place(adapted, {"model": replicated, "lm_head": columns})
    assert same(placed, whole)
    assert placed["lm_head"]["kernel"].sharding == columns
    assert {x.sharding for x in jax.tree.leaves(placed["model"])} == {replicated}
    placed = pj.place(adapted, jax.devices()[3])
    assert {x.devices().pop() for x in jax.tree.leaves(placed)} == {jax.devices()[3]}


@pytest.mark.parametrize("scan", [True, False])
def test_streaming_gives_the_very_bits(folder: Path, scan: bool) -> None:
    lazy, whole = (models.load(folder, lazy=lazy, scan=scan) for lazy in (True, False))
    formats = [(quant.nf4(16), trees.LAYER_MATRICES), (quant.int8(), "k_proj"), (quant.grouped(3, 16), "k_proj")]
    for form, select in formats if scan else formats[:1]:
        method = quant.quantise(form, select, progress=False)
        streamed, _ = method(zoo.KEY, lazy.params, lazy.forward)
        assert type(streamed["lm_head"]["kernel"]) is OnDisk  # what select leaves out
        assert same(pj.place(streamed), method(zoo.KEY, whole.params, whole.forward)[0])
    # Adapters go on top, before or after; an embedding is stored by rows.
    streamed, _ = QLORA(zoo.KEY, lazy.params, lazy.forward)
    assert same(pj.place(streamed), QLORA(zoo.KEY, whole.params, whole.forward)[0])
    table = quant.quantise(quant.nf4(16), "embed_tokens", progress=False)
    streamed, expected = (table(zoo.KEY, m.params, m.forward)[0]["model"]["embed_tokens"] for m in (lazy, whole))
    assert same(streamed, expected)


def test_what_is_left_on_disk_raises_or_is_read(folder: Path) -> None:
    lazy, whole = models.load(folder, lazy=True), models.load(folder)
    with pytest.raises(RuntimeError, match=r"model.embed_tokens.weight of .*model is still on disk: read what is left"):
        lazy.forward(lazy.params, zoo.TOKENS)
    params, forward = QLORA(zoo.KEY, lazy.params, lazy.forward)
    with pytest.raises(RuntimeError, match=r"lm_head.weight of .* is still on disk"):
        jax.eval_shape(forward.head, params, jnp.ones((1, 32)), pj.Ports())
    # What needs numbers reads them.
    for method in (methods.unfreeze("lm_head"), methods.pissa(2), pj.chain(methods.lora(2), methods.dora())):
        found, _ = method(zoo.KEY, lazy.params, lazy.forward)
        assert same(pj.place(found), method(zoo.KEY, whole.params, whole.forward)[0])
    adapted, _ = methods.lora(2)(zoo.KEY, lazy.params, lazy.forward)
    expected, _ = methods.lora(2)(zoo.KEY, whole.params, whole.forward)
    merged = pj.merge(adapted)
    assert type(merged["lm_head"]["kernel"]) is OnDisk
    assert same(pj.place(merged), pj.merge(expected))
    with pytest.raises(ValueError, match=r"lazy=True leaves matrices on disk: give the shardings to pj.place"):
        models.load(folder, lazy=True, shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_of_hf_peft_is_computed_from_disk(folder: Path, tmp_path: Path, start: str) -> None:
    lazy, whole = models.load(folder, lazy=True), models.load(folder)
    hf_peft.save(tmp_path, methods.lora(4, select="q_proj")(zoo.KEY, whole.params, whole.forward)[0], whole.forward)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": start}))
    assert same(pj.place(hf_peft.load(tmp_path, lazy)[0]), hf_peft.load(tmp_path, whole)[0])


def test_a_number_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    broken = "model.layers.1.mlp.up_proj.weight"
    tensors[broken] = tensors[broken].copy()
    tensors[broken][3, 5] = np.inf
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    method = quant.quantise(quant.nf4(16), progress=False)
    lazy, whole = (models.load(tmp_path, lazy=lazy) for lazy in (True, False))
    with pytest.raises(ValueError, match=rf"up_proj/kernel: {broken} of {tmp_path}: the array holds NaN or Inf"):
        method(zoo.KEY, lazy.params, lazy.forward)
    with pytest.raises(ValueError, match=r"up_proj/kernel, model.layers.1.mlp.up_proj: the array holds NaN or Inf"):
        method(zoo.KEY, whole.params, whole.forward)


def test_the_bar_counts_matrices(folder: Path, capsys: Any) -> None:
    lazy, whole = (models.load(folder, lazy=lazy) for lazy in (True, False))
    quant.quantise(quant.int8(), "mlp")(zoo.KEY, lazy.params, lazy.forward)
    assert "9/9" in capsys.readouterr().err  # three kernels of three layers
    quant.quantise(quant.int8(), "mlp")(zoo.KEY, whole.params, whole.forward)
    assert not capsys.readouterr().err


# Run by itself: what it prints is its own peak, in bytes above what it took before.
PEAK = """
import re, sys, jax, jax.numpy as jnp, peft_jax as pj
from peft_jax import models, quant
folder, method = sys.argv[1], quant.quantise(quant.nf4(), progress=False)
models.load(folder, lazy=True)
for shape in ((512, 512), (512, 1536), (1536, 512)):
    jax.block_until_ready(quant.nf4().quantise(jnp.zeros((1, *shape))))  # the programs, which are memory too
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
start = peak()
for lazy in (True, False):
    model = models.load(folder, lazy=lazy)
    params = jax.block_until_ready(pj.place(method(jax.random.key(0), model.params, model.forward)[0]))
    print(peak() - start, pj.count(params).bytes)
    del model, params
"""


def test_the_peak_is_the_quantised_model_and_a_layer(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=4, vocab_size=64
    )
    abstract = jax.eval_shape(lambda key: llama.init(key, config), zoo.KEY)
    layer = pj.count(abstract["model"]["layers"]).bytes // 12
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, jnp.bfloat16), abstract)
    writing.write_params(tmp_path, params, llama.tensors(config), 12, shard_bytes=20_000_000)
    config.save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, text=True, capture_output=True, check=True
    )
    (streamed, quantised), (whole, _) = (map(int, line.split()) for line in run.stdout.splitlines())
    # A layer and a matrix or two: what the allocator keeps of what is freed weighs more, the smaller the model is.
    assert streamed < quantised + 3 * layer
    assert whole > 12 * layer > 2 * streamed


def test_checkpoints_of_a_quantised_base(folder: Path, tmp_path: Path) -> None:
    """Adapters and optimiser state alone are saved, whatever the base is stored in; another base is refused."""
    model = models.load(folder, lazy=True)
    params = pj.place(QLORA(zoo.KEY, model.params, model.forward)[0])
    tx = pj.freeze(optax.adam(1e-2), params)
    state, frozen = training.init_state(zoo.disturbed(params), tx, zoo.KEY)
    with training.Checkpoints(tmp_path / "run") as store:
        store.save(state, frozen)
        fresh, _ = training.init_state(params, tx, zoo.KEY)
        assert same(store.restore(fresh, frozen).state, state)
        other = trees.map_weights(
            lambda w: quant.int8().quantise(pj.materialise(w)) if type(w).__name__ == "FourBit" else w, params
        )
        with pytest.raises(ValueError, match=r"at params/.* it has FourBit.*and the run has Int8"):
            store.restore(*training.init_state(other, tx, zoo.KEY))
