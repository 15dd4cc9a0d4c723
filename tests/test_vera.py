"""VeRA: the pair that layers share, in memory and in files, against HF PEFT on torch; and rates by group."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
import zoo
from checks import close, copied, differs, same
from oracles.peft_models import (
    PREFIX,
    TOKENS,
    adapted,
    assert_same_bits,
    assert_same_files,
    base,
    config,
    from_peft,
    in_peft,
    logits,
    tensors,
    unmerged,
)
from oracles.torch_models import torch_logits
from peft.tuners.vera.model import _kaiming_init
from test_hf_peft_strict import spoil

import peft_jax as pj
from peft_jax import methods, trees
from peft_jax.interop import hf_peft
from peft_jax.methods.vera import projections
from peft_jax.models import Model, bert, llama
from peft_jax.training import Checkpoints, init_state

KEY = jax.random.key(0)


@pytest.mark.parametrize(("seed", "rank", "inputs", "outputs"), [(0, 4, 16, 8), (7, 13, 33, 57), (2**32 - 1, 3, 5, 7)])
def test_the_pair_is_that_of_peft(seed: int, rank: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (_kaiming_init(shape, generator).numpy() for shape in ((rank, inputs), (outputs, rank)))
    assert_same_bits(projections(seed, rank, inputs, outputs), {"down": jnp.asarray(a.T), "up": jnp.asarray(b.T)})


def test_counts_of_the_paper() -> None:
    """L · (r + out) for each of query and value: RoBERTa-base, section 4."""
    roberta = transformers.RobertaConfig(vocab_size=50265)
    forward, abstract = bert.build(roberta), jax.eval_shape(lambda key: bert.init(key, roberta), KEY)
    for rank, numbers in {1: 18_456, 16: 18_816, 256: 24_576, 1024: 43_008}.items():
        counted = pj.count(jax.eval_shape(lambda p, r=rank: methods.vera(r).init(KEY, p, forward), abstract))
        assert counted.trainable == numbers
        assert counted.frozen == pj.count(abstract).frozen + 2 * rank * 768  # the pair, once


# -- what layers share ------------------------------------------------------------------------------------------------


def gradient(layers: int, scan: bool, remat: str = "full", width: int = 256, rank: int = 512) -> Any:
    """A compiled gradient of an abstract model."""
    sizes = {"hidden_size": width, "intermediate_size": 16, "vocab_size": 16, "max_position_embeddings": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = transformers.LlamaConfig(**sizes, **heads, num_hidden_layers=layers, tie_word_embeddings=True)
    forward, method = llama.build(made, scan=scan, remat=remat), methods.vera(rank)
    params = jax.eval_shape(lambda key: method.init(key, llama.init(key, made, scan=scan), forward), KEY)
    run, (trained, frozen) = method.wrap(forward), pj.partition(params)
    total = lambda trained, frozen, tokens: run(pj.combine(trained, frozen), tokens).sum()  # noqa: E731
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return jax.jit(jax.grad(total)).lower(trained, frozen, tokens).compile().memory_analysis(), pj.count(params).bytes


@pytest.mark.parametrize("scan", [True, False])
def test_the_pair_is_held_once_however_many_layers(scan: bool) -> None:
    pair = 2 * 256 * 512 * 4
    few, many = (gradient(layers, scan) for layers in (2, 8))
    for memory, stored in (few, many):
        assert memory.argument_size_in_bytes <= stored + 1024  # which counts it once
        assert memory.temp_size_in_bytes < 2.5 * pair  # what one layer works on
    assert many[0].temp_size_in_bytes - few[0].temp_size_in_bytes < 0.2 * pair


@pytest.mark.usefixtures("quick_compiles")
def test_rematerialised_layers_have_the_same_gradient() -> None:
    found = {}
    for remat in ("none", "dots", "full"):
        params, forward = methods.vera(8)(KEY, zoo.base("llama"), zoo.build("llama", remat=remat))
        trained, frozen = pj.partition(zoo.disturbed(params))
        total = lambda t, f, forward=forward: jnp.square(forward(pj.combine(t, f), zoo.TOKENS)).mean()  # noqa: E731
        found[remat] = jax.jit(jax.grad(total))(trained, frozen)
    close(found["none"], found["full"], atol=1e-5)
    close(found["none"], found["dots"], atol=1e-5)


def test_two_pairs_in_one_tree() -> None:
    one, two = methods.vera(3, "q_proj", seed=1, name="one"), methods.vera(5, "(q|v)_proj", seed=2, name="two")
    params, _ = pj.chain(one, two)(KEY, zoo.base("llama"), zoo.build("llama"))
    assert {name: pair["down"].shape for name, pair in params["methods"].items()} == {"one": (32, 3), "two": (32, 5)}
    both = pj.merge(zoo.disturbed(params))  # without a forward function
    shared = trees.share(params)
    assert same(trees.share(shared), shared)
    leaf = shared["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert leaf.down is params["methods"]["two"]["down"] and leaf.base.down is params["methods"]["one"]["down"]
    assert jax.tree.structure(both) == jax.tree.structure(zoo.base("llama"))
    lost = {entry: value for entry, value in params.items() if entry != "methods"}
    with pytest.raises(ValueError, match="the tree lacks methods/one, which its leaves share: give the method's whole"):
        pj.merge(lost)
    with pytest.raises(ValueError, match=r"a leaf of two lacks the pair .* call the method's own forward"):
        zoo.build("llama")(params, zoo.TOKENS)


@pytest.mark.usefixtures("quick_compiles")
def test_layers_that_are_not_selected_never_move() -> None:
    params, forward = methods.vera(4, layers=[1])(KEY, zoo.base("llama"), zoo.build("llama"))
    leaf = lambda tree: tree["model"]["layers"]["self_attn"]["v_proj"]["kernel"]  # noqa: E731
    assert leaf(params).ranks == (0, 4, 0) and pj.count(params).trainable == 2 * 4 + 32 + 16
    trained, frozen = pj.partition(params)
    total = lambda t: jnp.square(forward(pj.combine(t, frozen), zoo.TOKENS)).mean()  # noqa: E731
    grads = jax.jit(jax.grad(total))(trained)
    for field in ("d", "b"):
        still = np.asarray(getattr(leaf(grads), field))[[0, 2]]
        assert not still.any()
    assert np.asarray(leaf(grads).b)[1].any()


def test_dropout_is_lora_s() -> None:
    """On the adapter's input: with A = 1, what is left of a row of ones counts what was kept."""
    bare = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    params, forward = methods.vera(1, dropout=0.25, start=1.0)(KEY, {"q_proj": {"kernel": jnp.zeros((400, 1))}}, bare)
    leaf = params["q_proj"]["kernel"]
    params = {
        "q_proj": {"kernel": dataclasses.replace(leaf, b=jnp.ones(1))},
        "methods": {"vera": jax.tree.map(jnp.ones_like, params["methods"]["vera"])},
    }
    x = jnp.ones((1, 400))
    assert float(forward(params, x)[0, 0]) == 400
    kept = float(forward(params, x, pj.Ports(micro_key=KEY))[0, 0]) * 0.75
    assert 260 < kept < 340 and kept == pytest.approx(round(kept), abs=1e-2)


def test_options_out_of_range() -> None:
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2³² - 1"):
            methods.vera(4, seed=seed)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        methods.vera(4, dropout=1)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    def begun(seed: int) -> Any:
        params, _ = methods.vera(4, seed=seed)(KEY, zoo.base("llama"), zoo.build("llama"))
        return init_state(params, pj.freeze(optax.adam(1e-3), params), KEY)

    with Checkpoints(tmp_path) as store:
        store.save(*begun(0))
        assert same(copied(store.restore(*begun(0)).state), copied(begun(0)[0]))
        with pytest.raises(ValueError, match=r"q_proj/kernel it has VeRA\(.*seed=0.*and the run has VeRA\(.*seed=1"):
            store.restore(*begun(1))


# -- rates by group ---------------------------------------------------------------------------------------------------


def test_a_head_has_a_rate_of_its_own() -> None:
    method = pj.chain(methods.vera(4, "query|value"), methods.unfreeze("classifier"))
    forward = zoo.build("bert")
    params, forward = method(KEY, zoo.base("bert"), forward)
    labels = pj.labels(params, forward, {"head": "^classifier"})
    tx = optax.partition({"head": optax.sgd(0.5), "rest": optax.sgd(0.125)}, labels)
    ones = lambda tree: jax.tree.map(jnp.ones_like, tree)  # noqa: E731
    for tree in (params, pj.partition(params)[0]):
        assert jax.tree.structure(pj.labels(tree, forward, {"head": "^classifier"})) == jax.tree.structure(labels)
        frozen = pj.freeze(tx, tree)
        updates, _ = frozen.update(ones(tree), frozen.init(tree), tree)
        moved = {
            path[0]: {float(x.max()) for x in jax.tree.leaves(leaf)} for path, leaf in trees.leaves(updates).items()
        }
        assert moved == {"classifier": {-0.5}, "bert": {-0.125}}
        assert len(jax.tree.leaves(updates)) == 2 + 2 * 2


def test_labels_that_cannot_be() -> None:
    params, forward = methods.vera(4)(KEY, zoo.base("llama"), zoo.build("llama"))
    with pytest.raises(ValueError, match=r"'lm_head' matches none of the model's 6 adaptable leaves"):
        pj.labels(params, forward, {"head": "lm_head"})
    with pytest.raises(ValueError, match=r"some layers only of model/layers/self_attn/q_proj/kernel"):
        pj.labels(params, forward, {"first": r"layers\.0\..*q_proj"})
    both = pj.labels(params, forward, {"q": "q_proj", "all": "."})
    assert sorted(jax.tree.leaves(both)) == ["all", "all", "q", "q"]


# -- HF PEFT ----------------------------------------------------------------------------------------------------------

SAVED: dict[str, tuple[str, pj.Method]] = {
    "queries and values": ("llama", methods.vera(4, seed=11)),
    "all linears, some layers": ("llama", methods.vera(5, r"layers\.[02]\..*_proj|lm_head")),
    "biases": ("qwen2", pj.chain(methods.vera(3), methods.unfreeze(r"(q|v)_proj\.bias"))),
    "conv1d, whole modules": ("gpt2", pj.chain(methods.vera(3, "c_fc|mlp.c_proj"), methods.unfreeze("ln_f"))),
}


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("kept", [True, False])
def test_peft_gives_the_same_logits(case: str, kept: bool, tmp_path: Path) -> None:
    name, method = SAVED[case]
    params, forward = adapted(name, method)
    hf_peft.save(tmp_path / "a", params, forward, save_projection=kept)
    assert ("base_model.vera_A" in tensors(tmp_path / "a")) == kept
    wanted = logits(name, params)
    assert differs(wanted, logits(name, base(name).params), 0.1)
    np.testing.assert_allclose(torch_logits(in_peft(name, tmp_path / "a"), TOKENS), wanted, atol=1e-4)

    again, _ = hf_peft.load(tmp_path / "a", base(name).model)
    assert_same_bits(again["methods"], params["methods"])
    np.testing.assert_array_equal(logits(name, again), wanted)
    hf_peft.save(tmp_path / "b", again, save_projection=kept)
    assert_same_files(tmp_path / "a", tmp_path / "b")


READ: dict[str, tuple[str, dict[str, Any]]] = {
    "queries and values": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "projection_prng_key": 9}),
    "no pair": ("llama", {"target_modules": "all-linear", "r": 6, "save_projection": False}),
    "vera_only": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "vera_only", "layers_to_transform": [1]}),
    "whole modules": ("gpt2", {"target_modules": ["c_fc"], "r": 3, "modules_to_save": ["ln_f"]}),
}


@pytest.mark.parametrize("case", READ)
def test_we_give_the_logits_of_peft(case: str, tmp_path: Path) -> None:
    name, options = READ[case]
    model = from_peft(name, tmp_path / "theirs", kind=peft.VeraConfig, **options)
    params, forward = hf_peft.load(tmp_path / "theirs", base(name).model)
    wanted = torch_logits(model, TOKENS)
    assert differs(wanted, logits(name, base(name).params), 0.1)
    run = unmerged(forward, params) if case == "queries and values" else logits(name, params)
    np.testing.assert_allclose(run, wanted, atol=1e-4)
    hf_peft.save(tmp_path / "ours", params, forward, save_projection=options.get("save_projection", True))
    assert_same_bits(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs"))
    for field in ("r", "bias", "peft_type", "projection_prng_key", "save_projection"):
        assert config(tmp_path / "ours")[field] == config(tmp_path / "theirs")[field], field


def test_a_pair_that_no_seed_gives(tmp_path: Path) -> None:
    params, forward = adapted("llama", methods.vera(4, seed=1))
    hf_peft.save(tmp_path / "a", params, forward)
    foreign = spoil(tmp_path / "a", tmp_path / "b", projection_prng_key=2)
    with pytest.raises(ValueError, match=r"base_model.vera_A, which is not what its projection_prng_key 2 gives"):
        hf_peft.load(foreign, base("llama").model)
    loaded, _ = hf_peft.load(foreign, base("llama").model, foreign_projection=True)
    np.testing.assert_array_equal(logits("llama", loaded), logits("llama", params))
    with pytest.raises(ValueError, match=r"no seed gives this tree's pair"):
        hf_peft.save(tmp_path / "c", loaded, save_projection=False)
    hf_peft.save(tmp_path / "c", loaded)
    assert_same_bits(tensors(tmp_path / "c"), tensors(tmp_path / "a"))


def test_a_scale_is_saved_in_b(tmp_path: Path) -> None:
    params, forward = adapted("llama", methods.vera(4))
    louder = pj.set_scale(params, 2.0)
    hf_peft.save(tmp_path, louder, forward)
    again, _ = hf_peft.load(tmp_path, base("llama").model)
    np.testing.assert_allclose(logits("llama", again), logits("llama", louder), atol=1e-5)
    np.testing.assert_array_equal(logits("llama", pj.set_scale(params, 0.0)), logits("llama", base("llama").params))


Q = f"{PREFIX}model.layers.1.self_attn.q_proj."
STRICT: list[tuple[Any, dict[str, Any], str]] = [
    (lambda t: t.pop(f"{Q}vera_lambda_b"), {}, rf"lacks the tensor {Q}vera_lambda_b \[16\], which its config"),
    (lambda t: t.pop("base_model.vera_B"), {}, r"lacks the tensor base_model.vera_B \[16, 4\]"),
    (lambda t: t.update({f"{Q}vera_lambda_c": np.zeros(3)}), {}, r"vera_lambda_c \[3\], which its config"),
    (lambda t: t.update({f"{Q}vera_lambda_d": np.zeros(5)}), {}, r"vera_lambda_d with shape \[5\], and .* for \[4\]"),
    (None, {"save_projection": False}, r"the tensor base_model.vera_A \[4, 16\], which its config does not account"),
    (None, {"r": 0}, "r=0: a whole number"),
    (None, {"projection_prng_key": -1}, "projection_prng_key=-1: a whole number"),
    (None, {"use_dora": True}, "uses use_dora"),
    (None, {"bias": "lora_only"}, "none, all and vera_only are supported"),
    (None, {"target_modules": ["embed_tokens"]}, "acts on model.embed_tokens, an embedding"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    hf_peft.save(folder, *adapted("llama", methods.vera(4)))
    return folder


@pytest.mark.parametrize(("change", "fields", "message"), STRICT, ids=[message for *_, message in STRICT])
def test_files_are_read_strictly(
    change: Any, fields: dict[str, Any], message: str, sound: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        hf_peft.load(spoil(sound, tmp_path / "a", change, **fields), base("llama").model)


def test_trees_that_the_format_cannot_hold(tmp_path: Path) -> None:
    def refused(name: str, message: str, *made_by: pj.Method) -> None:
        params = pj.chain(*made_by).init(KEY, base(name).params, base(name).forward)
        with pytest.raises(ValueError, match=message):
            hf_peft.save(tmp_path / "a", params, base(name).forward)
        assert not list(tmp_path.iterdir())

    vera = methods.vera(2)
    refused("llama", r"embed_tokens.*HF PEFT's VeRA acts on linears alone", methods.vera(2, "embed"))
    refused("tied", r"embed_tokens.*HF PEFT's VeRA acts on linears alone", methods.vera(2, "embed|q_proj"))
    refused("gpt2", r"c_attn, which is 3 leaves here", methods.vera(2, r"c_attn\.q"))
    refused("llama", r"another and vera, each with a pair", vera, methods.vera(2, "k_proj", name="another"))
    refused("llama", r"k_proj/kernel holds a LoRA leaf, which HF PEFT's VeRA", vera, methods.lora(2, select="k_proj"))
    refused("llama", r"q_proj/kernel holds a LoRA leaf, which HF PEFT's VeRA", methods.lora(2), vera)
    refused("tied", r"tied to the head, which HF PEFT's VERA unties", vera, methods.unfreeze("embed"))
    params, forward = vera.init(KEY, base("llama").params, base("llama").forward), base("llama").forward
    with pytest.raises(ValueError, match="q_proj/kernel has holes"):
        hf_peft.save(tmp_path / "a", pj.partition(params)[1], forward)
    hf_peft.save(tmp_path / "b", params, forward)
    with pytest.raises(ValueError, match="'vera' is already applied"):
        hf_peft.load(tmp_path / "b", Model(params, forward, None))
    from_peft("gpt2", tmp_path / "fused", kind=peft.VeraConfig, target_modules=["c_attn"], r=2)
    with pytest.raises(ValueError, match="c_attn, which is 3 leaves"):
        hf_peft.load(tmp_path / "fused", base("gpt2").model)
