"""AdaLoRA in HF PEFT's format, both ways, against the real peft on torch."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from oracles.peft_models import (
    PREFIX,
    TOKENS,
    adapted,
    assert_same_bits,
    assert_same_files,
    base,
    config,
    logits,
    stir_torch,
    tensors,
    unmerged,
)
from oracles.torch_models import torch_logits
from safetensors.numpy import save_file

import peft_jax as pj
from peft_jax import methods
from peft_jax.interop import hf_peft
from peft_jax.interop.hf_peft import files
from peft_jax.methods.adalora import SVD, found
from peft_jax.models import Model

SAVED: dict[str, tuple[str, pj.Method]] = {
    "every matrix": ("llama", methods.adalora(2, 10, initial_rank=3)),
    "some layers": ("llama", methods.adalora(2, select="(q|down)_proj|lm_head", layers=[0, 2])),
    "biases": ("qwen2", pj.chain(methods.adalora(2, 7, "(q|v)_proj"), methods.unfreeze(r"(q|v)_proj\.bias$"))),
    "whole modules": ("llama", pj.chain(methods.adalora(2, 10, "q_proj"), methods.unfreeze("norm$|lm_head"))),
    "fused": ("gpt2", methods.adalora(2, 10, r"c_attn\.(q|v)|c_fc|c_proj", initial_rank=2)),
}


def in_peft(name: str, folder: Path) -> peft.PeftModel:
    """What peft makes of a directory, which must hold neither more nor less than peft wants.

    Loaded once: a second time, peft would cut what it has cut.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(name).torch(), peft.PeftConfig.from_pretrained(folder))
        result = model.load_adapter(folder, "default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model.eval()


def halved(params: Any) -> Any:
    """Of every leaf, the even triplets of the first layer, none of the second and the odd of the third are pruned."""

    def some(path: Any, w: SVD) -> SVD:
        index = np.arange(w.values.shape[-1])
        left = np.stack([index % 2 == 1, index < 0, index % 2 == 0])
        return dataclasses.replace(w, values=jnp.where(left, w.values, 0))

    return methods.prune(pj.trees.rewrite(params, "adalora", some))


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("case", SAVED)
def test_peft_gives_the_same_logits(case: str, pruned: bool, tmp_path: Path) -> None:
    name, method = SAVED[case]
    params, forward = adapted(name, method)
    params = halved(params) if pruned else params
    hf_peft.save(tmp_path / "a", params, forward)
    model, wanted = in_peft(name, tmp_path / "a"), logits(name, params)
    assert abs(wanted - logits(name, base(name).params)).max() > 0.01
    np.testing.assert_allclose(torch_logits(model, TOKENS), wanted, atol=1e-4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    mine, theirs = tensors(tmp_path / "a"), tensors(tmp_path / "theirs")
    assert_same_bits(mine, {k: v for k, v in theirs.items() if ".modules_to_save." not in k and ".original_" not in k})
    for field in ("init_r", "target_r", "lora_alpha", "rank_pattern", "bias", "peft_type", "task_type"):
        assert config(tmp_path / "a")[field] == config(tmp_path / "theirs")[field], field

    again, _ = hf_peft.load(tmp_path / "a", base(name).model)
    np.testing.assert_allclose(logits(name, again), wanted, atol=1e-5)
    hf_peft.save(tmp_path / "b", again)
    assert_same_files(tmp_path / "a", tmp_path / "b")
    if case == "every matrix":
        assert_same_bits(again, params)


def by_peft(name: str, folder: Path, steps: int = 8, **options: Any) -> peft.PeftModel:
    """An adapter that peft has pruned by gradients at random, and saved; one module has lost all triplets."""
    options = {"init_r": 4, "target_r": 2, "tfinal": 3, "total_step": 8} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(name).torch(), peft.AdaLoraConfig(task_type="CAUSAL_LM", **options)).eval()
        stir_torch(model)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(3)
        for t in range(steps):
            for n, p in trained:
                p.grad = torch.randn(p.shape, generator=generator) * (0 if n.startswith(trained[0][0][:-16]) else 1)
            model.base_model.update_and_allocate(t)
        model.save_pretrained(folder, save_embedding_layers=False)
    return model


READ: dict[str, tuple[str, dict[str, Any]]] = {
    "pruned": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 10}),
    "not pruned": ("llama", {"target_modules": "all-linear", "steps": 0}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only", "modules_to_save": ["norm"]}),
    "fused": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "bias": "all"}),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_we_give_the_logits_of_peft(case: str, tmp_path: Path) -> None:
    name, options = READ[case]
    model = by_peft(name, tmp_path / "theirs", **options)
    params, forward = hf_peft.load(tmp_path / "theirs", base(name).model)
    wanted = torch_logits(model, TOKENS)
    assert abs(wanted - logits(name, base(name).params)).max() > 0.01
    np.testing.assert_allclose(logits(name, params), wanted, atol=1e-4)
    pattern = config(tmp_path / "theirs")["rank_pattern"]
    assert pattern is None or any(not any(held) for held in pattern.values())
    if name == "llama" and pattern:
        sizes = {"q_proj": 16 + 16 + 1, "down_proj": 24 + 16 + 1}
        trained = sum(sum(held) * sizes[key.split(".")[-2]] for key, held in pattern.items())
        assert pj.count(params).trainable == trained

    hf_peft.save(tmp_path / "ours", params, forward)
    mine, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert_same_bits(mine, {k: v for k, v in theirs.items() if "_module." not in k and "_to_save." not in k})
    for field in ("init_r", "target_r", "lora_alpha", "rank_pattern", "bias"):
        assert config(tmp_path / "ours")[field] == config(tmp_path / "theirs")[field], field
    np.testing.assert_allclose(torch_logits(in_peft(name, tmp_path / "ours"), TOKENS), wanted, atol=1e-4)


def test_a_loaded_adapter_trains_on(tmp_path: Path) -> None:
    """Its gradients are torch's, and its dropout acts when a call brings a key."""
    model = by_peft("llama", tmp_path, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    params, forward = hf_peft.load(tmp_path, base("llama").model)
    trained, frozen = pj.partition(params)
    ids = jnp.asarray(TOKENS, jnp.int32)
    np.testing.assert_allclose(unmerged(forward, params), torch_logits(model, TOKENS), atol=1e-4)
    dropped = forward(params, ids, pj.Ports(micro_key=jax.random.key(1)))
    assert abs(np.asarray(dropped) - torch_logits(model, TOKENS)).max() > 1e-2

    grads = jax.jit(jax.grad(lambda t: jnp.mean(jnp.square(forward(pj.combine(t, frozen), ids)))))(trained)
    model = in_peft("llama", tmp_path)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    model(torch.tensor(TOKENS)).logits.square().mean().backward()
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    for path, w in found(grads).items():
        block, module = path.split("/")[2:4]
        for i, rank in enumerate(w.ranks):
            at = f"{PREFIX}model.layers.{i}.{block}.{module}"
            if rank:
                np.testing.assert_allclose(w.q[i, :, :rank].T, theirs[f"{at}.lora_A.default"], rtol=1e-3, atol=1e-5)
                np.testing.assert_allclose(
                    w.values[i, :rank], theirs[f"{at}.lora_E.default"][:, 0], rtol=1e-3, atol=1e-5
                )
                np.testing.assert_allclose(w.p[i, :rank].T, theirs[f"{at}.lora_B.default"], rtol=1e-3, atol=1e-5)


# -- what is refused --------------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    params, forward = adapted("llama", methods.adalora(2, 10, "q_proj", initial_rank=3))
    hf_peft.save(folder, halved(params), forward)
    return folder


def without(name: str) -> Any:
    return lambda content: content.pop(PREFIX + name)


def with_one(name: str, *shape: int) -> Any:
    return lambda content: content.update({PREFIX + name: np.zeros(shape, np.float32)})


ALL, ONE = [True] * 3, {f"{Q}.lora_E": [True] * 3}
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (without(f"{Q}.lora_E"), {}, rf"lacks the tensor {PREFIX}{Q}.lora_E \[0, 1\], which its config promises"),
    (with_one("model.layers.2.self_attn.q_proj.lora_E", 3, 1), {}, r"lora_E with shape \[3, 1\], and .* \[2, 1\]"),
    (with_one(f"{Q}.lora_A.weight", 2, 16), {}, "lora_A.weight .*, which its config does not account for"),
    (with_one("model.layers.7.self_attn.q_proj.lora_A", 2, 16), {}, "which this model does not have: another base"),
    (None, {"rank_pattern": None}, rf"{PREFIX}model.layers.0.*lora_A with shape \[1, 16\], and .* \[3, 16\]"),
    (None, {"init_r": 4}, "no list of 4 booleans .*its init_r.* for model.layers.0.self_attn.q_proj.lora_E"),
    (None, {"rank_pattern": {f"{Q}.lora_E": [1, 0, 0]}}, f"no list of 3 booleans .* for {Q}.lora_E"),
    (None, {"rank_pattern": {"model.layers.1.k_proj.lora_E": ALL}}, "speaks of model.layers.1.k_proj.lora_E, and its"),
    (None, {"init_r": 0}, "init_r=0: a whole number from 1"),
    (None, {"target_r": 2.5}, r"target_r=2\.5: a whole number from 1"),
    (None, {"lora_alpha": "8"}, "lora_alpha='8': a number is supported"),
    (None, {"alpha_pattern": {"q_proj": 3}}, "uses alpha_pattern .*, which is not supported"),
    (None, {"use_rslora": True}, "uses use_rslora"),
    (None, {"something_new": 3}, r"something_new \(3\), which is not supported"),
    (None, {"target_modules": ["q_proj", "embed_tokens"]}, "acts on model.embed_tokens, an embedding"),
]


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_files_are_read_strictly(index: int, sound: Path, tmp_path: Path) -> None:
    change, fields, message = REFUSED[index]
    content = tensors(sound)
    if change is not None:
        change(content)
    save_file({key: np.ascontiguousarray(x) for key, x in content.items()}, tmp_path / files.WEIGHTS)
    (tmp_path / files.CONFIG).write_text(json.dumps(config(sound) | fields))
    with pytest.raises(ValueError, match=message):
        hf_peft.load(tmp_path, base("llama").model)


def test_trees_that_the_format_cannot_hold(tmp_path: Path) -> None:
    def refused(message: str, *made_by: pj.Method, name: str = "llama", scale: float | None = None) -> None:
        params, forward = pj.chain(*made_by)(jax.random.key(0), base(name).params, base(name).forward)
        with pytest.raises(ValueError, match=message):
            hf_peft.save(tmp_path / "a", params if scale is None else pj.set_scale(params, scale), forward)
        assert not list(tmp_path.iterdir())

    mine = methods.adalora(2, select="q_proj")
    refused("embed_tokens, an embedding or a head tied to one", methods.adalora(2, select="embed"))
    refused("embed_tokens, an embedding or a head tied to one", methods.adalora(2, select="embed"), name="tied")
    refused("v_proj/kernel holds a LoRA leaf, which HF PEFT's AdaLoRA", mine, methods.lora(2, select="v_proj"))
    refused("q_proj/kernel holds a LoRA leaf, which HF PEFT's AdaLoRA", methods.lora(2, select="q_proj"), mine)
    refused("target ranks in this tree", mine, methods.adalora(3, select="v_proj", initial_rank=3, alpha=3, name="b"))
    refused("scales in this tree", mine, methods.adalora(2, 50, select="v_proj", name="b"))
    for scale in (0.0, float("inf")):
        refused(f"scale is {scale}", mine, scale=scale)
    half = pj.partition(mine.init(jax.random.key(0), base("llama").params, base("llama").forward))[0]
    with pytest.raises(ValueError, match="has holes: combine the two halves"):
        hf_peft.save(tmp_path / "a", half, base("llama").forward)
    hf_peft.save(tmp_path / "a", *adapted("llama", mine))
    with pytest.raises(ValueError, match="'adalora' is already applied"):
        hf_peft.load(tmp_path / "a", Model(*adapted("llama", mine), None))
