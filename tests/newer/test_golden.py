"""Golden values, where torch is not: what `tests/oracles/make_golden.py` had torch, peft and bitsandbytes compute."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from peft_jax import Inputs, materialise, merge, models, quant
from peft_jax.interop import hf_peft

HERE = Path(__file__).parent / "golden"
GOLDEN = load_file(HERE / "outputs.safetensors")
TOKENS, TARGETS = GOLDEN["tokens"], GOLDEN["targets"]
CLOSE = {"atol": 1e-4, "rtol": 0.0}


def inputs_of(model: Any) -> Any:
    return Inputs(TOKENS, decoder_tokens=TARGETS) if model.forward.spec.attentions else TOKENS


FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe", "gpt2", "bert", "deberta", "t5", "bart"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_gives_the_logits_of_transformers(family: str) -> None:
    model = models.load(HERE / family, head="classification" if family in ("bert", "deberta") else None)
    expected = GOLDEN[f"{family}.logits"]
    assert expected.std() > 0.1
    np.testing.assert_allclose(jax.jit(model.forward)(model.params, inputs_of(model)), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "vera"])
def test_an_adapter_gives_the_logits_of_peft(kind: str) -> None:
    model = models.load(HERE / "llama")
    params, forward = hf_peft.load(HERE / kind, model)
    expected = GOLDEN[f"{kind}.logits"]
    assert abs(expected - GOLDEN["llama.logits"]).max() > 0.1
    np.testing.assert_allclose(jax.jit(forward)(params, TOKENS), expected, **CLOSE)
    np.testing.assert_allclose(jax.jit(model.forward)(merge(params), TOKENS), expected, **CLOSE)


def test_nf4_restores_what_bitsandbytes_does() -> None:
    # bitsandbytes quantises rows of [out, in]; a kernel here is [in, out].
    leaf = quant.nf4(block_size=64, double=True).quantise(jnp.asarray(GOLDEN["nf4.matrix"].T))
    np.testing.assert_array_equal(np.asarray(materialise(leaf)).T, GOLDEN["nf4.restored"])
