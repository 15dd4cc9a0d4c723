"""Scaled rotary positions against transformers in torch; longer texts by `models.load(rope_scaling=...)`."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers as tf
from checks import close
from oracles.torch_models import pair, torch_logits
from test_llama import SHAPE
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import peft_jax as pj
from peft_jax import methods, models
from peft_jax.models import llama, rotary

pytestmark = pytest.mark.usefixtures("quick_compiles")
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn with options": YARN | {"beta_fast": 8, "beta_slow": 2, "truncate": False, "attention_factor": 1.3},
    "yarn as deepseek": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn that shrinks nothing": YARN | {"factor": 1.0},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("theta", "dim"), [(10000.0, 16), (500000.0, 64)])
def test_angles_are_those_of_transformers(name: str, theta: float, dim: int) -> None:
    config = tf.LlamaConfig(
        **SHAPE | {"max_position_embeddings": 64}, head_dim=dim, rope_parameters=SCALINGS[name] | {"rope_theta": theta}
    )
    for time in (40, 200):
        positions = np.arange(time, dtype=np.int32)[None]
        theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions).long())
        ours = rotary.turns(rotary.read(config), dim, config.max_position_embeddings, jax.numpy.asarray(positions))
        # Angles of up to 200 radians in fp32, of frequencies that differ in the last bit.
        close([x[:, :, 0] for x in ours], [x[..., : dim // 2].numpy() for x in theirs], atol=1e-4)


def test_dynamic_scaling_goes_by_the_length_of_each_row() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = tf.LlamaConfig(**SHAPE | {"max_position_embeddings": 8}, rope_parameters=rope)
    model, params, forward = pair(config)
    assert forward.spec.positions == 32
    tokens = np.random.default_rng(1).integers(0, 48, (2, 20)).astype(np.int32)
    mask, run = np.arange(20) < np.array([[20], [8]]), jax.jit(forward)
    logits = run(params, pj.Inputs(tokens, mask=mask))
    # The shorter first: transformers keeps what a longer text has set.
    close(logits[1, :8], torch_logits(model, tokens[1:, :8])[0], atol=1e-4)
    close(logits[0], torch_logits(model, tokens[:1])[0], atol=1e-4)
    plain = llama.build(tf.LlamaConfig(**SHAPE))
    assert np.abs(jax.jit(plain)(params, tokens[:1]) - logits[:1]).max() > 1e-2


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_loaded_model_is_extended_and_saved_so(kind: str, tmp_path: Any) -> None:
    config = tf.LlamaConfig(**SHAPE | {"max_position_embeddings": 8}, tie_word_embeddings=True)
    source, _, _ = pair(config)
    source.save_pretrained(tmp_path / "short")
    tokens = np.random.default_rng(1).integers(0, 48, (1, 20)).astype(np.int32)
    short = models.load(tmp_path / "short")
    with pytest.raises(ValueError, match="20 tokens and the model has 8 positions: cut the sequence, or load"):
        short.forward(short.params, tokens)
    model = models.load(tmp_path / "short", rope_scaling={"rope_type": kind, "factor": 3})
    assert model.forward.spec.positions == 24
    logits = jax.jit(model.forward)(model.params, tokens)
    models.save(tmp_path / "long", model)
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "long", attn_implementation="eager").eval()
    assert theirs.config.rope_parameters["rope_type"] == kind
    close(logits, torch_logits(theirs, tokens), atol=1e-4)
    again = models.load(tmp_path / "long")
    assert again.forward.spec.positions == 24 and again.config.rope_parameters == model.config.rope_parameters


def test_what_longlora_has_learnt_is_saved_with_its_positions(tmp_path: Any) -> None:
    """Trained under shifted attention, merged, and read by transformers: full attention, interpolated positions."""
    source, _, _ = pair(tf.LlamaConfig(**SHAPE | {"max_position_embeddings": 8}, tie_word_embeddings=True))
    source.save_pretrained(tmp_path / "short")
    model = models.load(tmp_path / "short", rope_scaling={"rope_type": "linear", "factor": 3.0})
    params, forward = methods.longlora(2)(jax.random.key(0), model.params, model.forward)
    random = np.random.default_rng(2)
    trained, frozen = pj.partition(params)
    moved = jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape).astype(x.dtype), trained)
    tokens = random.integers(0, 48, (1, 20)).astype(np.int32)
    logits = jax.jit(forward)(pj.combine(moved, frozen), tokens)
    models.save(tmp_path / "long", model, pj.merge(pj.combine(moved, frozen)))
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "long", attn_implementation="eager").eval()
    close(logits, torch_logits(theirs, tokens), atol=1e-4)


def test_a_scaled_model_is_scaled_anew() -> None:
    old = tf.LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    with pytest.raises(ValueError, match=r"scaled already \(linear\): say in rope_scaling how many it was trained on"):
        rotary.rescaled(old, {"rope_type": "yarn", "factor": 4.0})
    new = rotary.rescaled(old, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})
    assert new.max_position_embeddings == 64 and new.rope_parameters["rope_theta"] == 500.0
    assert old.rope_parameters["rope_type"] == "linear"
    again = rotary.rescaled(new, {"rope_type": "linear", "factor": 2.0})
    assert again.max_position_embeddings == 32
    assert again.rope_parameters == {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type 'longrope': choose one of default, linear"),
        ({"factor": 2.0}, "rope_type None: choose one of"),
        ({"rope_type": "linear"}, "'linear' lacks factor"),
        ({"rope_type": "linear", "factor": 0.5}, "the factor 0.5: give how many times"),
        ({"rope_type": "linear", "factor": "8"}, "the factor '8': give how many times"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "'linear' has no beta_fast"),
        ({"rope_type": "llama3", "factor": 2.0}, "'llama3' lacks low_freq_factor, high_freq_factor"),
    ],
)
def test_a_scaling_that_is_none(scaling: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rotary.rescaled(tf.LlamaConfig(**SHAPE), scaling)


def test_what_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="gpt2 has no rotary positions to scale"):
        rotary.rescaled(tf.GPT2Config(), {"rope_type": "linear", "factor": 2.0})
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}
    longrope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    with pytest.raises(ValueError, match="rotary scaling 'longrope' is not supported: default, linear, dynamic"):
        llama.build(tf.LlamaConfig(**SHAPE, rope_parameters=longrope))
    part = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="of a part of each head"):
        llama.build(tf.LlamaConfig(**SHAPE, rope_parameters=part))
