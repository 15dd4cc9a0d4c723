"""QA-LoRA in HF PEFT's format, against the layer that peft has for GPTQ bases, here on plain ones."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from oracles.peft_models import TOKENS, adapted, assert_same_files, base, config, logits, stir_torch, tensors
from oracles.torch_models import torch_logits
from peft.tuners.lora.gptq import GPTQLoraLinear

import peft_jax as pj
from peft_jax import methods, quant
from peft_jax.interop import hf_peft

OPTIONS: dict[str, Any] = {
    "target_modules": ["q_proj", "down_proj"],
    "r": 2,
    "use_qalora": True,
    "qalora_group_size": 4,
}


def pooling(**options: Any) -> peft.LoraConfig:
    """A config under which peft gives every linear the layer that it has for GPTQ's."""
    given = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    given._register_custom_module({torch.nn.Linear: GPTQLoraLinear})
    return given


def in_peft(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.LoraConfig.from_pretrained(str(folder))
        read._register_custom_module({torch.nn.Linear: GPTQLoraLinear})
        model = peft.PeftModel.from_pretrained(base("llama").torch(), str(folder), config=read)
        result = model.load_adapter(str(folder), "default")
    assert not result.missing_keys and not result.unexpected_keys
    return model.eval()


@pytest.mark.parametrize("pooling", ["sum", "mean", "peft"])
def test_peft_gives_the_same_logits(pooling: str, tmp_path: Path) -> None:
    layers = None if pooling == "peft" else [0, 2]
    method = methods.qalora(2, 3, "(q|down)_proj", group_size=4, pooling=pooling, layers=layers)
    params, forward = adapted("llama", method)
    hf_peft.save(tmp_path / "a", params, forward)
    wanted = logits("llama", params)
    assert abs(wanted - logits("llama", base("llama").params)).max() > 0.1
    np.testing.assert_allclose(torch_logits(in_peft(tmp_path / "a"), TOKENS), wanted, atol=1e-4)
    assert config(tmp_path / "a")["qalora_group_size"] == 4
    again, _ = hf_peft.load(tmp_path / "a", base("llama").model)
    np.testing.assert_allclose(logits("llama", again), wanted, atol=1e-4)
    hf_peft.save(tmp_path / "b", again)
    assert_same_files(tmp_path / "a", tmp_path / "b")


def test_we_give_the_logits_of_peft(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(base("llama").torch(), pooling(**OPTIONS)).eval()
        stir_torch(model)
        model.save_pretrained(tmp_path / "theirs")
    params, forward = hf_peft.load(tmp_path / "theirs", base("llama").model)
    np.testing.assert_allclose(logits("llama", params), torch_logits(model, TOKENS), atol=1e-4)
    hf_peft.save(tmp_path / "ours", params, forward)
    mine, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[key], theirs[key]) for key in mine)
    # On integers, as peft has it in use, it merges here.
    method = quant.quantise(quant.grouped(4, 4), "(q|down)_proj")
    stored, _ = method(jax.random.key(0), base("llama").params, base("llama").forward)
    onto, _ = hf_peft.load(tmp_path / "theirs", dataclasses.replace(base("llama").model, params=stored))
    assert jax.tree.structure(pj.merge(onto)) == jax.tree.structure(stored)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    pooled = methods.qalora(2, 3, "q_proj", group_size=4)
    for other, message in (
        (methods.lora(2, 3, "v_proj"), r"v_proj.* pools groups of 0 inputs and .*q_proj.* of 4 \(0 is LoRA\)"),
        (methods.lora(2, 3, "q_proj"), r"q_proj/kernel.* pools 0 and 4 inputs \(0 is LoRA\): HF PEFT has one size"),
    ):
        params, forward = adapted("llama", pj.chain(pooled, other))
        with pytest.raises(ValueError, match=message):
            hf_peft.save(tmp_path / "both", params, forward)
    hf_peft.save(tmp_path / "a", *adapted("llama", pooled))
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    for old, new, message in (
        ('"qalora_group_size": 4', '"qalora_group_size": 5', "pools groups of 5 inputs, and .*q_proj has 16 inputs"),
        ('"qalora_group_size": 4', '"qalora_group_size": 0', "has qalora_group_size=0: a whole number"),
        ('"use_dora": false', '"use_dora": true', "uses use_qalora with DoRA"),
    ):
        assert old in text
        (tmp_path / "a" / "adapter_config.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            hf_peft.load(tmp_path / "a", base("llama").model)
