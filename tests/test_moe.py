"""Mixtures of experts against transformers in torch; every kind of leaf on experts; routes; bad input."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers as tf
import zoo
from checks import close, differs, one_layer, same
from oracles.parity import check_gradients, check_logits, compiled, tokens_for
from oracles.torch_models import numbers, ours, torch_logits, torch_model
from safetensors import safe_open

import peft_jax as pj
from peft_jax import adapters, experts, methods, models, quant, trees
from peft_jax.interop import hf_peft
from peft_jax.models import Model, families, generate_tokens, moe
from peft_jax.quant.frozen import Frozen

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


def test_logits_equal_torch(qwen: Model) -> None:
    """Mixtral, unrolled, in all ways; Qwen3, whose shares do not add up to one, stacked and plain."""
    check_logits(CONFIGS["mixtral"], scan=False)
    tokens = tokens_for(qwen.config)
    close(compiled(qwen.forward)(qwen.params, tokens), torch_logits(torch_model(qwen.config), tokens), atol=1e-4)


def test_gradients_equal_torch() -> None:
    check_gradients(CONFIGS["mixtral"])


@pytest.mark.parametrize("name", CONFIGS)
def test_files_hold_each_expert_by_itself(name: str, tmp_path: Path) -> None:
    """As transformers saves them; loaded lazily too; saved, loaded by transformers, and named from the tree alone."""
    theirs = torch_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    model = models.load(tmp_path / "theirs")
    models.save(tmp_path / "ours", model, shard_bytes=30_000)
    back = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    state = theirs.state_dict()
    assert back.state_dict().keys() == state.keys() and type(back) is type(theirs)
    assert all(torch.equal(tensor, state[key]) for key, tensor in back.state_dict().items())

    spec, found = families.spec_of(model.params), model.forward.spec
    last = {
        "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1",
        "qwen3": "model.layers.1.mlp.experts.5.gate_proj",
    }
    assert spec.names(GATES)[-1] == last[name] and spec.experts(GATES) == found.experts(GATES)
    assert all(spec.names(path) == found.names(path) for path in trees.leaves(model.params))
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
    assert unrolled.forward.spec.names(path)[-1] == last[name]


def test_generation_equals_transformers(qwen: Model) -> None:
    tokens = tokens_for(qwen.config, rows=2)[:, :5]
    found = generate_tokens(qwen.forward, qwen.params, tokens, max_new_tokens=6)
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = torch_model(qwen.config).generate(torch.tensor(tokens).long(), **given)
    np.testing.assert_array_equal(found, wanted[:, 5:])


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
LEAVES = {
    "lora": methods.lora(4, 8, SOME, rank_pattern={r"experts\.2\.": 2}),
    "dora": methods.dora(4, 8, SOME),
    "dylora": methods.dylora(4, 8, SOME),
    "adalora": methods.adalora(4, select=SOME),
    "vera": methods.vera(8, SOME),
    "pissa": methods.pissa(4, select=SOME),
    "nf4": pj.chain(quant.quantise(quant.nf4(16), "gate_proj"), methods.lora(4, 8, SOME)),
    "qalora": pj.chain(quant.quantise(quant.grouped(4, 16), "gate_proj"), methods.qalora(4, 8, SOME, group_size=16)),
    "loftq": quant.loftq(quant.int8(), 4, 8, "gate_proj"),
    "unfreeze": methods.unfreeze(r"layers\.1\.mlp\.experts\.\d\.gate_proj"),
}


def test_every_leaf_routes_as_the_array_it_stands_for(qwen: Model, quick_compiles: None) -> None:
    """Products and gradients of a layer's blocks against the array of each expert; draws do not depend on stacking."""
    spec = qwen.forward.spec
    probe = pj.Forward(lambda params, inputs, ports: params, spec=spec)
    base = {"model": {"layers": {"mlp": {"experts": {"gate_proj": {"kernel": trees.leaves(qwen.params)[GATES]}}}}}}
    which = jnp.array([0, 1, 1, 2, 3, 5, 5])
    x = jnp.asarray(np.random.RandomState(0).standard_normal((7, 3, 32)), jnp.float32)
    seen = {}
    for name, method in LEAVES.items():
        params, forward = method(KEY, base, probe)
        assert pj.count(params).trainable == pj.count(jax.eval_shape(lambda p: p, params)).trainable > 0
        stripped = trees.leaves(pj.strip(params))[GATES]
        assert not isinstance(stripped, jax.Array) or same(stripped, trees.leaves(base)[GATES])
        leaf = trees.leaves(forward(zoo.disturbed(params), np.zeros((1, 1), np.int32)))[GATES]
        seen[name] = one_layer(leaf, 1) if isinstance(leaf, pj.Weight) else leaf[1]

    def run(leaves: Any) -> Any:
        def total(rule: Any) -> Any:
            def each(trained: Any, frozen: Any, x: jax.Array) -> jax.Array:
                return jnp.sin(rule(pj.combine(trained, frozen), x)).sum()

            return each

        def directly(w: Any, x: jax.Array) -> jax.Array:
            return jnp.einsum("brd,bdf->brf", x, pj.materialise(w)[which])

        found = {}
        for name, w in leaves.items():
            halves = pj.partition(w)
            rules = [lambda w, x: experts.routed(x, w, which), directly]
            found[name] = [(rule(w, x), jax.grad(total(rule), (0, 2))(*halves, x)) for rule in rules]
        return found

    for mine, wanted in jax.jit(run)(seen).values():
        close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_an_adapted_mixture_merges(qwen: Model, quick_compiles: None) -> None:
    """Experts in few bits under LoRA, others under VeRA, attention and router too; dropout acts."""
    method = pj.chain(
        quant.quantise(quant.nf4(16), "up_proj"),
        methods.lora(4, 8, r"(up|q)_proj|mlp\.gate$", dropout=0.2),
        methods.vera(8, r"experts\.[0-4]\.down_proj"),
    )
    params, forward = method(KEY, qwen.params, qwen.forward)
    noisy, tokens = zoo.disturbed(params), tokens_for(qwen.config, rows=2)

    @jax.jit
    def run(params: Any, merged: Any) -> Any:
        return forward(params, tokens), forward(params, tokens, pj.Ports(micro_key=KEY)), qwen.forward(merged, tokens)

    moved, dropping, merged = run(noisy, pj.merge(noisy))
    close(merged, moved, atol=1e-4)
    assert differs(dropping, moved)
    assert isinstance(trees.leaves(pj.strip(noisy))[(*GATES[:4], "up_proj", "kernel")], Frozen)


def test_blocks_of_one_expert_drop_apart() -> None:
    spec = pj.Spec(names=lambda path: ("experts.0.up", "experts.1.up"), experts=lambda path: 2)
    forward = pj.Forward(lambda params, inputs, ports: params, spec=spec)
    params, forward = methods.lora(2, select="up", dropout=0.5)(KEY, {"up": {"kernel": jnp.zeros((2, 8, 4))}}, forward)
    leaf = forward(zoo.disturbed(params), np.zeros((1, 1), np.int32), pj.Ports(micro_key=KEY))["up"]["kernel"]
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
    close(compiled(wrapped)(noisy, tokens), torch_logits(theirs, tokens), atol=1e-4)
    loaded, _ = hf_peft.load(tmp_path / "ours", Model(params, forward, config))
    close(pj.merge(loaded), pj.merge(noisy))
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
