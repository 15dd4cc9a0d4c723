"""Adapters in HF PEFT's format, both ways, against the real peft on torch."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles.peft_models import (
    CONFIGS,
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
    packed,
    stir,
    tensors,
    unmerged,
)
from oracles.torch_models import numbers, ours, torch_logits, torch_model

import peft_jax as pj
from peft_jax import adapters, methods
from peft_jax.interop import hf_peft
from peft_jax.models import Model

PATTERNS = {"rank_pattern": {r"layers\.1\.": 2, "v_proj": 5}, "alpha_pattern": {r"layers\.2\.": 3}}
SAVED: dict[str, tuple[str, pj.Method]] = {
    "queries and values, alpha": ("llama", methods.lora(4, 10)),
    "every matrix": ("llama", methods.lora(3, 7, "_proj|embed|lm_head")),
    "rslora": ("llama", methods.lora(3, 8, rslora=True)),
    "patterns": ("llama", methods.lora(4, 8, **PATTERNS)),
    "patterns, rslora": ("llama", methods.lora(4, 8, rslora=True, **PATTERNS)),
    "some layers": ("llama", methods.lora(2, layers=[0, 2])),
    "tied": ("tied", methods.lora(2, 3, "q_proj|embed", rank_pattern={"embed": 4})),
    "lora_only": ("qwen2", methods.lora(2, 3, bias="lora_only", layers=[1])),
    "all biases": ("qwen2", methods.lora(2, 3, bias="all")),
    "all biases of gpt2": ("gpt2", methods.lora(2, 3, "c_fc", bias="all")),
    "fused": ("gpt2", methods.lora(2, 6, "c_attn|c_proj|wpe", rank_pattern={r"1.*\.k$": 3})),
    "fused, two of three": ("gpt2", methods.lora(2, 6, r"c_attn\.(q|v)", bias="lora_only")),
    "dora": ("llama", methods.dora(3, 5, "_proj|embed|lm_head")),
    "dora, some layers": ("llama", methods.dora(3, 5, layers=[1])),
    "dora, fused": ("gpt2", methods.dora(2, 6, r"c_attn\.(q|v)|c_proj|wpe")),
    "pissa": ("llama", methods.pissa(2, 3, layers=[0, 1])),
    "olora": ("gpt2", methods.olora(2, 3, r"c_attn\.q|c_fc")),
    "two on one": ("llama", pj.chain(methods.lora(2, 3), methods.lora(3, 7, "q_proj", name="second"))),
    "dora on two": ("llama", pj.chain(methods.lora(2, 3), methods.dora(3, 7))),
    "whole modules": ("llama", pj.chain(methods.lora(2), methods.unfreeze(r"lm_head|embed|norm$|layers.1.*norm"))),
    "whole modules, tied": ("tied", pj.chain(methods.lora(2), methods.unfreeze("embed"))),
    "whole modules, gpt2": ("gpt2", pj.chain(methods.lora(2, select="c_fc"), methods.unfreeze(r"ln_1$|0.attn.c_attn"))),
    "nothing adapted": ("llama", methods.unfreeze("lm_head")),
    "biases alone": ("qwen2", methods.unfreeze("bias$")),
}  # fmt: skip


@pytest.mark.parametrize("case", SAVED)
def test_peft_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    name, method = SAVED[case]
    params, forward = adapted(name, method)
    hf_peft.save(tmp_path / "a", params, forward)
    model, wanted = in_peft(name, tmp_path / "a"), logits(name, params)
    assert abs(wanted - logits(name, base(name).params)).max() > 0.1  # the adapter does something
    np.testing.assert_allclose(torch_logits(model, TOKENS), wanted, atol=1e-4)

    # What peft writes of it is what we wrote, bit for bit.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    mine, theirs = tensors(tmp_path / "a"), tensors(tmp_path / "theirs")
    assert_same_bits(mine, {k: v for k, v in theirs.items() if ".modules_to_save." not in k and ".original_" not in k})
    for field in (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "bias",
        "peft_type",
        "task_type",
    ):
        assert config(tmp_path / "a")[field] == config(tmp_path / "theirs")[field], field

    # And what we read is what we wrote, names read off the tree alone.
    again, _ = hf_peft.load(tmp_path / "a", base(name).model)
    np.testing.assert_allclose(logits(name, again), wanted, atol=1e-4)
    hf_peft.save(tmp_path / "b", again)
    assert_same_files(tmp_path / "a", tmp_path / "b")


READ: dict[str, tuple[str, dict[str, Any]]] = {
    "last names": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 10}),
    "a pattern": ("llama", {"target_modules": r".*\.[02]\..*\.(k|down)_proj", "exclude_modules": r".*2.*down_proj"}),
    "some layers": ("llama", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]}),
    "one layer": ("gpt2", {"target_modules": ["c_fc"], "layers_to_transform": 1, "layers_pattern": "h"}),
    "all linear, rslora": ("qwen2", {"target_modules": "all-linear", "r": 3, "use_rslora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"1.self_attn.q_proj": 2},
                           "alpha_pattern": {"^model.layers.2.*v_proj": 3}}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "r": 3}),
    "dora": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "r": 3, "use_dora": True}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "a whole block": ("qwen2", {"target_modules": "all-linear", "modules_to_save": ["layers.1.mlp"]}),
    "lora_only": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["mlp.c_proj"], "bias": "all", "modules_to_save": ["ln_1"]}),
    "fused": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wpe"], "bias": "lora_only", "lora_alpha": 5}),
    "fused dora": ("gpt2", {"target_modules": ["c_attn"], "r": 3, "use_dora": True}),
    "tied": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied, by its head": ("tied", {"target_modules": ["lm_head", "q_proj", "model.embed_tokens"],
                                   "ensure_weight_tying": True, "rank_pattern": {"embed_tokens": 2, "lm_head": 2}}),
    "tied, whole": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                             "ensure_weight_tying": True}),
    "pissa": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "r": 3, "init_lora_weights": "pissa"}),
    "pissa, fused": ("gpt2", {"target_modules": ["c_attn"], "r": 3, "init_lora_weights": "pissa", "lora_alpha": 6}),
    "olora": ("llama", {"target_modules": ["k_proj"], "r": 3, "init_lora_weights": "olora"}),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_we_give_the_logits_of_peft(case: str, tmp_path: Path) -> None:
    name, options = READ[case]
    model = from_peft(name, tmp_path / "theirs", **options)
    params, forward = hf_peft.load(tmp_path / "theirs", base(name).model)
    wanted = torch_logits(model, TOKENS)
    assert abs(wanted - logits(name, base(name).params)).max() > 0.1
    np.testing.assert_allclose(logits(name, params), wanted, atol=1e-4)

    hf_peft.save(tmp_path / "ours", params, forward)
    mine, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    if "init_lora_weights" not in options:  # PiSSA and OLoRA leave with twice the rank
        repeated = [k for k in theirs if "_module." in k or "_to_save." in k or k.endswith("base_layer.weight")]
        assert_same_bits(mine, {k: v for k, v in theirs.items() if k not in repeated})
    np.testing.assert_allclose(torch_logits(in_peft(name, tmp_path / "ours"), TOKENS), wanted, atol=1e-4)


# The adapted forward function itself (the tests above merge first, which compiles once for all).
@pytest.mark.parametrize("case", ["llama", "tied", "gpt2"])
def test_a_loaded_adapter_runs_and_trains_on(case: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "llama": {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "modules_to_save": ["norm"]},
        "tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, "lora_dropout": 0.5},
        "gpt2": {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "bias": "lora_only"},
    }[case]
    model = from_peft(case, tmp_path, **options)
    params, forward = hf_peft.load(tmp_path, base(case).model)
    bare, plain = pj.trees.leaves(pj.strip(params)), pj.trees.leaves(base(case).params)
    assert all(bare[path] is plain[path] for path in plain)  # the base is shared, not copied
    mine = sum(p.numel() for p in {p.data_ptr(): p for p in model.parameters() if p.requires_grad}.values())
    fused = 2 * sum(p.numel() for n, p in model.named_parameters() if "c_attn.lora_A" in n)  # A, three times here
    assert pj.count(params).trainable == mine + fused

    @jax.jit
    def step(trained: Any, key: Any) -> Any:
        def loss(trained: Any) -> tuple[Any, Any]:
            out = forward(pj.combine(trained, frozen), jnp.asarray(TOKENS, jnp.int32), pj.Ports(micro_key=key))
            return jnp.mean(jnp.square(out)), out

        return jax.grad(loss, has_aux=True)(trained)

    trained, frozen = pj.partition(params)
    grads, out = step(trained, jax.random.key(1))
    assert all(float(abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    if case != "tied":
        np.testing.assert_allclose(out, torch_logits(model, TOKENS), atol=1e-4)
    else:  # the recorded dropout acts when a call brings a key, and only then
        assert abs(np.asarray(out) - torch_logits(model, TOKENS)).max() > 1e-2
        np.testing.assert_allclose(unmerged(forward, params), torch_logits(model, TOKENS), atol=1e-4)


def test_half_precision(tmp_path: Path) -> None:
    """bf16 weights and a bf16 adapter keep their bits; in fp32 arithmetic both sides agree to 1e-4."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base("llama").params)
    method = pj.chain(methods.lora(3, 7, dtype=jnp.bfloat16), methods.unfreeze("norm$"))
    params, forward = method(jax.random.key(0), half, base("llama").forward)
    params = stir(params)
    hf_peft.save(tmp_path, params, forward)
    assert {str(x.dtype) for x in tensors(tmp_path).values()} == {"bfloat16"}

    model = in_peft("llama", tmp_path, torch.bfloat16).float()
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    np.testing.assert_allclose(torch_logits(model, TOKENS), logits("llama", wide), atol=1e-4)

    again, _ = hf_peft.load(tmp_path, Model(half, base("llama").forward, None))
    for (path, first), (_, second) in zip(*map(jax.tree.leaves_with_path, (params, again)), strict=True):
        assert first.dtype == second.dtype, path
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    wider, _ = hf_peft.load(tmp_path, base("llama").model, dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(wider)} == {jnp.dtype(jnp.float32)}

    # bf16 arithmetic on both sides: each is as far from fp32 as bf16 is.
    with torch.no_grad():
        theirs = in_peft("llama", tmp_path, torch.bfloat16)(torch.tensor(TOKENS)).logits.float().numpy()
    error = abs(theirs - logits("llama", wide)).max()
    assert abs(unmerged(forward, params) - logits("llama", wide)).max() < 3 * error


# -- trees of other shapes --------------------------------------------------------------------------------------------


def test_one_of_a_stack(tmp_path: Path) -> None:
    french, forward = adapted("llama", methods.lora(2, 3, layers=[0, 2]))
    german, _ = adapted("llama", methods.lora(4, 8, "v_proj|up_proj|lm_head", rslora=True), seed=2)
    both, stacked = adapters.stack({"fr": french, "de": german}, base("llama").forward)
    for key, params in {"fr": french, "de": german}.items():
        hf_peft.save(tmp_path / "alone", params, forward)
        hf_peft.save(tmp_path / "all" / key, both, stacked, adapter=key)
        assert_same_files(tmp_path / "alone", tmp_path / "all" / key)
        loaded, _ = hf_peft.load(tmp_path / "all", base("llama").model, adapter=key)
        np.testing.assert_array_equal(logits("llama", loaded), logits("llama", params))
    with pytest.raises(ValueError, match=r"the adapters fr, de: say which to save, adapter=… \(got None\)"):
        hf_peft.save(tmp_path / "x", both, stacked)
    with pytest.raises(ValueError, match="no adapter 'fr': the tree holds no stack"):
        hf_peft.save(tmp_path / "x", french, forward, adapter="fr")
    with pytest.raises(FileNotFoundError, match="its sub-folders hold the adapters de, fr: say which"):
        hf_peft.load(tmp_path / "all", base("llama").model)


def test_unrolled_layers_and_models_without_a_table(tmp_path: Path) -> None:
    params, forward = adapted("gpt2", methods.lora(2, 6, r"c_attn\.(q|v)|c_fc", rank_pattern={"1.*c_fc": 3}))
    hf_peft.save(tmp_path / "scanned", params, forward)
    unrolled, loop = ours(CONFIGS["gpt2"], numbers(torch_model(CONFIGS["gpt2"])), scan=False)
    again, loop = hf_peft.load(tmp_path / "scanned", Model(unrolled, loop, None))
    for given in ((again, loop), (again,)):
        hf_peft.save(tmp_path / "unrolled", *given)
        assert_same_files(tmp_path / "scanned", tmp_path / "unrolled")

    plain = {"up": {"kernel": jnp.ones((3, 5)), "bias": jnp.zeros(5)}, "table": {"embedding": jnp.ones((7, 3))}}
    bare = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["up"]["kernel"]))
    method = pj.chain(methods.lora(2, 3, "up|table", bias="all"))
    params, wrapped = method(jax.random.key(0), plain, bare)
    with pytest.raises(ValueError, match=r"no model family here .*table/embedding.*give its forward function too"):
        hf_peft.save(tmp_path / "bare", params)
    hf_peft.save(tmp_path / "bare", stir(params), wrapped)
    assert {key: x.shape for key, x in tensors(tmp_path / "bare").items()} == {
        PREFIX + "up.lora_A.weight": (2, 3),
        PREFIX + "up.lora_B.weight": (5, 2),
        PREFIX + "up.base_layer.bias": (5,),
        PREFIX + "table.lora_embedding_A": (2, 7),
        PREFIX + "table.lora_embedding_B": (3, 2),
    }
    again, _ = hf_peft.load(tmp_path / "bare", Model(plain, bare, None))
    assert_same_bits(again, stir(params))


@pytest.mark.parametrize("start", [True, "pissa"])
def test_on_a_packed_base(start: Any, tmp_path: Path) -> None:
    model = from_peft("llama", tmp_path / "a", target_modules=["q_proj"], init_lora_weights=start, use_dora=True)
    params, forward = hf_peft.load(tmp_path / "a", Model(packed(base("llama").params), base("llama").forward, None))
    np.testing.assert_allclose(logits("llama", params), torch_logits(model, TOKENS), atol=1e-4)
    hf_peft.save(tmp_path / "b", params, forward)
    np.testing.assert_allclose(
        torch_logits(in_peft("llama", tmp_path / "b"), TOKENS), logits("llama", params), atol=1e-4
    )
