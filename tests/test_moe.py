"""Mixtures of experts against transformers in torch; every kind of leaf on experts; routes; bad input."""

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers as tf
import zoo
from checks import close, differs, one_layer, same, three_steps
from oracles.parity import check_gradients, compiled, tokens_for
from oracles.torch_models import numbers, ours, pair, torch_logits, torch_model
from safetensors import safe_open

import peft_jax as pj
from peft_jax import Inputs, adapters, arithmetic, experts, methods, models, quant, trees
from peft_jax.interop import hf_peft
from peft_jax.methods.lora import LoRA
from peft_jax.models import Model, families, generate_tokens, moe

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": tf.MixtralConfig(**SHAPE, intermediate_size=24, num_local_experts=4),
    "qwen3": tf.Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=32, num_experts=6, head_dim=16, norm_topk_prob=False, tie_word_embeddings=True
    ),
}
KEY = jax.random.key(0)
GATES = ("model", "layers", "mlp", "experts", "gate_proj", "kernel")


@pytest.fixture(scope="module")
def qwen() -> Model:
    config = CONFIGS["qwen3"]
    return Model(*ours(config, numbers(torch_model(config))), config)


@pytest.mark.parametrize(("name", "scan"), [("mixtral", False), ("qwen3", True)])
def test_logits_equal_torch(name: str, scan: bool) -> None:
    """Unrolled and stacked, padded on the right; what attention sees is the Llama family's."""
    model, params, forward = pair(CONFIGS[name], scan=scan)
    tokens = tokens_for(CONFIGS[name])
    mask = np.arange(12)[None] < np.array([[12], [7], [9]])
    logits = compiled(forward)(params, Inputs(tokens, mask=mask))
    np.testing.assert_allclose(logits[mask], torch_logits(model, tokens, mask)[mask], atol=1e-4)


def test_gradients_equal_torch() -> None:
    check_gradients(CONFIGS["mixtral"])


def test_files_hold_each_expert_by_itself(qwen: Model, tmp_path: Path) -> None:
    """As transformers saves them; loaded lazily too; saved, loaded by transformers, and named from the tree alone."""
    theirs = torch_model(CONFIGS["mixtral"])
    theirs.save_pretrained(tmp_path / "theirs")
    model = models.load(tmp_path / "theirs")
    models.save(tmp_path / "ours", model, shard_bytes=30_000)
    back = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    state = theirs.state_dict()
    assert back.state_dict().keys() == state.keys() and type(back) is type(theirs)
    assert all(torch.equal(tensor, state[key]) for key, tensor in back.state_dict().items())

    last = {"mixtral": "block_sparse_moe.experts.3.w1", "qwen3": "mlp.experts.5.gate_proj"}
    for name, one in (("mixtral", model), ("qwen3", qwen)):
        spec, found = families.spec_of(one.params), one.forward.spec
        assert spec.names(GATES)[-1] == f"model.layers.1.{last[name]}" and spec.experts(GATES) == found.experts(GATES)
        assert all(spec.names(path) == found.names(path) for path in trees.leaves(one.params))
    lazy = models.load(tmp_path / "theirs", lazy=True).params
    packed, _ = quant.quantise(quant.int8(), "experts", progress=False)(KEY, lazy, model.forward)
    wanted, _ = quant.quantise(quant.int8(), "experts")(KEY, model.params, model.forward)
    assert same(trees.leaves(packed)[GATES], trees.leaves(wanted)[GATES])
    models.save(tmp_path / "few", model, pj.place(packed))
    assert same(models.load(tmp_path / "few").params, wanted)
    unrolled = models.load(tmp_path / "theirs", scan=False)
    leaf = unrolled.params["model"]["layers_1"]["mlp"]["experts"]["down_proj"]["kernel"]
    assert same(leaf, model.params["model"]["layers"]["mlp"]["experts"]["down_proj"]["kernel"][1])
    path = ("model", "layers_1", *GATES[2:])
    assert unrolled.forward.spec.names(path)[-1] == f"model.layers.1.{last['mixtral']}"


def test_generation_equals_transformers(qwen: Model) -> None:
    """With a cache, from prompts of which one is padded."""
    tokens, mask = tokens_for(qwen.config, rows=2)[:, :6], np.arange(6)[None] >= np.array([[0], [2]])
    found = generate_tokens(qwen.forward, qwen.params, tokens, mask, max_new_tokens=6)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.tensor(mask).long()}
    wanted = torch_model(qwen.config).generate(torch.tensor(tokens).long(), **given)
    np.testing.assert_array_equal(found, wanted[:, 6:])


@pytest.mark.parametrize(("tokens", "k", "many"), [(40, 2, 4), (3, 2, 8), (1, 1, 1), (300, 8, 16)])
def test_routes_drop_nothing_and_waste_little(tokens: int, k: int, many: int) -> None:
    random = np.random.RandomState(tokens)
    even = np.stack([random.permutation(many)[:k] for _ in range(tokens)]).astype(np.int32)
    for chosen in (even, np.zeros_like(even) + np.arange(k, dtype=np.int32)):  # all on the same
        found = jax.jit(experts.route, static_argnums=1)(chosen, many)
        blocks, rows = found.tokens.shape
        assert blocks * rows <= max(1.5 * chosen.size, 1), "more than half as many again"
        held = np.asarray(found.tokens).reshape(-1)
        for token, mine in enumerate(np.asarray(found.rows)):
            assert (held[mine] == token).all()
            assert (np.asarray(found.experts)[mine // rows] == chosen[token]).all()
        assert (held < tokens).sum() == chosen.size == len(set(np.asarray(found.rows).ravel()))


# Some experts of some layers, all of others; ranks that differ by expert.
SOME = r"layers\.0\.mlp\.experts\.[12]\.gate_proj|layers\.1\.mlp\.experts\.\d\.gate_proj"
ALL = r"experts\.\d\.gate_proj"
LEAVES = {
    "lora": methods.lora(4, 8, SOME, rank_pattern={r"experts\.2\.": 2}),
    "dora": methods.dora(4, 8, SOME),
    "adalora": methods.adalora(4, select=SOME),
    "vera": methods.vera(8, SOME),
    "nf4": pj.chain(quant.quantise(quant.nf4(16), ALL), methods.dylora(4, 8, SOME)),
    "qalora": pj.chain(quant.quantise(quant.grouped(4, 16), ALL), methods.qalora(4, 8, SOME, group_size=16)),
}


@pytest.fixture(scope="module")
def gates(qwen: Model) -> Any:
    """The tree of one stacked leaf of experts, and a forward function that gives what a model would see of it."""
    kernel = trees.leaves(qwen.params)[GATES]
    tree = functools.reduce(lambda inner, name: {name: inner}, reversed(GATES), kernel)
    return tree, pj.Forward(lambda params, inputs, ports: params, spec=qwen.forward.spec), kernel


def test_every_leaf_routes_as_the_array_it_stands_for(gates: Any, quick_compiles: None) -> None:
    """Products, and gradients of what trains and of the input, against the array of each expert."""
    base, probe, kernel = gates
    which = jnp.array([0, 1, 1, 2, 3, 5, 5])
    draw = np.random.RandomState(0).standard_normal
    x, g = (jnp.asarray(draw((7, 3, 32)), jnp.float32) for _ in range(2))
    seen = {}
    for name, method in LEAVES.items():
        params, forward = method(KEY, base, probe)
        assert same(trees.leaves(pj.strip(params))[GATES], kernel) != (name in ("nf4", "qalora"))
        seen[name] = one_layer(trees.leaves(forward(zoo.disturbed(params), np.zeros((1, 1), np.int32)))[GATES], 1)

    @jax.jit
    def run(leaves: Any) -> Any:
        found = {}
        for name, w in leaves.items():
            trained, frozen = pj.partition(w)
            rule = lambda t, x, frozen=frozen: experts.routed(x, pj.combine(t, frozen), which)  # noqa: E731
            y, back = jax.vjp(rule, trained, x)
            full, theirs = jax.vjp(lambda t, frozen=frozen: pj.materialise(pj.combine(t, frozen)), trained)
            slopes = jnp.zeros_like(full).at[which].add(jnp.einsum("brd,brf->bdf", x, g))
            wanted = (
                jnp.einsum("brd,bdf->brf", x, full[which]),
                (
                    *theirs(slopes),
                    jnp.einsum("brf,bdf->brd", g, full[which]),
                ),
            )
            found[name] = (y, back(g)), wanted
        return found

    for mine, wanted in run(seen).values():
        close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_other_starts_reach_each_expert(gates: Any) -> None:
    """What is made of a leaf matrix by matrix, and put back in its place."""
    base, probe, kernel = gates
    principal, _ = methods.pissa(4, select=SOME)(KEY, base, probe)
    close(trees.leaves(pj.merge(principal))[GATES], kernel)
    few = quant.int8().quantise(kernel)
    begun, _ = quant.loftq(quant.int8(), 8, 8, ALL)(KEY, base, probe)
    off = lambda w: np.linalg.norm(np.asarray(pj.materialise(w)) - np.asarray(kernel), axis=(-2, -1))  # noqa: E731
    assert (off(trees.leaves(begun)[GATES]) < 0.95 * off(few)).all()
    whole, _ = methods.unfreeze(r"layers\.1\..*gate_proj")(KEY, base, probe)
    assert trees.leaves(whole)[GATES].value.shape == (1, 6, 32, 32) and pj.count(whole)[:2] == (6144, 6144)
    unrolled = {"model": {"layers_1": {"mlp": {"experts": {"gate_proj": {"kernel": kernel[1]}}}}}}
    alone = pj.Forward(probe.features, spec=moe.build(CONFIGS["qwen3"], scan=False).spec)
    drawn, _ = methods.lora(4, 8, SOME)(KEY, unrolled, alone)
    stacked, _ = methods.lora(4, 8, SOME)(KEY, base, probe)
    (a, b), path = (trees.leaves(tree) for tree in (drawn, stacked)), ("model", "layers_1", *GATES[2:])
    assert same(a[path].a, b[GATES].a[1]) and differs(b[GATES].a[1, 0], b[GATES].a[1, 1])

    one, two = (zoo.disturbed(stacked, seed=seed) for seed in (2, 3))
    change = lambda tree: np.asarray(trees.leaves(pj.merge(tree))[GATES]) - np.asarray(kernel)  # noqa: E731
    summed = arithmetic.weighted_sum({"one": one, "two": two}, {"one": 1.0, "two": -0.5}).params
    close(change(summed), change(one) - change(two) / 2)


def test_experts_and_attention_train_on_a_quantised_base(qwen: Model, quick_compiles: None) -> None:
    method = pj.chain(quant.quantise(quant.nf4(32, double=False), "experts"), methods.lora(2, select="experts|q_proj"))
    params, forward = method(KEY, qwen.params, qwen.forward)
    tokens = tokens_for(qwen.config)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": np.ones(tokens.shape, np.float32)}
    trained, losses = three_steps(params, forward, optax.adam(1e-2), batch)
    assert losses[2] < losses[1] < losses[0]
    found = {path: leaf for path, leaf in trees.leaves(trained).items() if isinstance(leaf, LoRA)}
    assert {path[-2] for path in found} == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    for path, leaf in found.items():
        assert np.abs(np.asarray(leaf.b)).max(axis=(-2, -1)).min() > 0, f"{path}: an expert has not moved"


def test_blocks_of_one_expert_drop_apart() -> None:
    ones = jnp.ones((2, 8, 8))
    leaf = LoRA(ones, ones, ones, jnp.ones(2), jax.random.split(KEY), jnp.full(2, 0.5), (8, 8))
    y = compiled(experts.routed)(jnp.ones((3, 2, 8)), leaf, jnp.array([0, 1, 1]))
    assert differs(y[1], y[2]) and differs(y[1, 0], y[1, 1])


def test_hf_peft_reads_adapted_experts(tmp_path: Path) -> None:
    config = CONFIGS["mixtral"]
    model = torch_model(config)
    params, forward = ours(config, numbers(model))
    adapted, wrapped = methods.lora(4, 8, r"experts|q_proj")(KEY, params, forward)
    noisy = zoo.disturbed(adapted)
    hf_peft.save(tmp_path / "ours", noisy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours"))
        result = theirs.load_adapter(str(tmp_path / "ours"), "default")
        assert not result.missing_keys and not result.unexpected_keys
        theirs.save_pretrained(str(tmp_path / "theirs"))
    tokens = tokens_for(config, rows=2)
    merged = pj.merge(noisy)
    logits, as_one = compiled(lambda a, b: (wrapped(a, tokens), forward(b, tokens)))(noisy, merged)
    close(logits, torch_logits(theirs, tokens), atol=1e-4)
    close(as_one, logits, atol=1e-4)
    loaded, _ = hf_peft.load(tmp_path / "ours", Model(params, forward, config))
    close(pj.merge(loaded), merged)
    with safe_open(tmp_path / "theirs" / "adapter_model.safetensors", "numpy") as file:
        assert any(key.endswith("experts.lora_A.weight") for key in file.keys())  # noqa: SIM118
    with pytest.raises(ValueError, match="uses target_parameters"):
        hf_peft.load(tmp_path / "theirs", Model(params, forward, config))


def test_what_experts_do_not_take_is_refused(qwen: Model, tmp_path: Path) -> None:
    make = lambda method: method(KEY, qwen.params, qwen.forward)  # noqa: E731
    for method, kind in (
        (methods.dora(2, select="gate_proj"), "DoRA"),
        (methods.vera(2, "gate_proj"), "VeRA"),
        (methods.unfreeze("gate_proj"), "Unfrozen"),
    ):
        with pytest.raises(ValueError, match=f"gate_proj/kernel holds experts, .* plain LoRA alone, not {kind}"):
            hf_peft.save(tmp_path, make(method)[0])
    with pytest.raises(ValueError, match="holds all experts of a layer, which train whole together"):
        make(methods.unfreeze(r"experts\.1\.gate_proj"))
    with pytest.raises(ValueError, match="holds experts, whose inputs are not measured"):
        make(quant.gptq([tokens_for(qwen.config)], bits=4, group_size=16, select="gate_proj"))
    one, forward = make(methods.lora(2, select="gate_proj"))
    several, serving = adapters.stack({"a": one, "b": one}, forward)
    with pytest.raises(ValueError, match=r"holds experts, .* an adapter a row"):
        serving(several, tokens_for(qwen.config, rows=2), pj.Ports(adapter=jnp.array([0, 1])))
    with pytest.raises(ValueError, match="dense layers between the sparse ones"):
        moe.build(tf.Qwen3MoeConfig(**SHAPE, mlp_only_layers=[0]))
    with pytest.raises(ValueError, match="num_experts_per_tok is 2: give 1 to 1"):
        moe.build(tf.MixtralConfig(**SHAPE, num_local_experts=1))


def test_defaults_leave_routers_alone(qwen: Model) -> None:
    found = trees.select(trees.LAYER_MATRICES, qwen.params, qwen.forward)
    assert GATES in found and ("model", "layers", "mlp", "gate", "kernel") not in found
