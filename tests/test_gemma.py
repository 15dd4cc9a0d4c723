"""The Gemma family against transformers in torch; soft caps; bad input."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tf
from checks import close, differs
from oracles.parity import check_gradients, check_logits, compiled, tokens_for
from oracles.torch_models import numbers, ours, torch_logits, torch_model

from peft_jax import attention, methods, models
from peft_jax.attention import Visible
from peft_jax.methods.longlora import ShiftedAttention
from peft_jax.models import families, gemma, generate_tokens

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 48,
    "max_position_embeddings": 32,
    "sliding_window": 4,
    "query_pre_attn_scalar": 24,
}
GLOBAL = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
CONFIGS = {
    "gemma2": tf.Gemma2Config(**SHAPE, num_hidden_layers=2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": tf.Gemma3TextConfig(
        **SHAPE,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": GLOBAL,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    ),
}


@pytest.mark.parametrize(("name", "scan"), [("gemma2", True), ("gemma3", False)])
def test_logits_equal_torch(name: str, scan: bool) -> None:
    check_logits(CONFIGS[name], scan)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_torch(name: str) -> None:
    check_gradients(CONFIGS[name])


def test_files_and_generation(tmp_path: Path) -> None:
    """To and from transformers; then tokens beyond both windows, with positions scaled by `load`, as transformers'."""
    theirs = torch_model(CONFIGS["gemma3"])
    theirs.save_pretrained(tmp_path / "theirs")
    model = models.load(tmp_path / "theirs")
    models.save(tmp_path / "ours", model)
    back = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(back) is tf.Gemma3ForCausalLM
    state = theirs.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    spec = families.spec_of(model.params)
    path = ("model", "layers", "pre_feedforward_layernorm", "scale")
    assert spec.names(path) == model.forward.spec.names(path) and spec.layers == 3

    scaling = {"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": 8}
    longer = models.load(tmp_path / "ours", rope_scaling=scaling)
    rope = longer.config.rope_parameters
    assert rope["full_attention"]["factor"] == 8.0 and rope["sliding_attention"]["rope_theta"] == 10.0
    models.save(tmp_path / "longer", longer)
    scaled = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "longer", attn_implementation="eager").eval()
    tokens = tokens_for(CONFIGS["gemma3"], rows=2)
    assert differs(torch_logits(scaled, tokens), torch_logits(back, tokens), 1e-2)
    found = generate_tokens(longer.forward, longer.params, tokens[:, :6], max_new_tokens=8)
    wanted = scaled.generate(torch.tensor(tokens[:, :6]).long(), max_new_tokens=8, do_sample=False, pad_token_id=0)
    np.testing.assert_array_equal(found, wanted[:, 6:])


def test_capped_attention_in_every_form() -> None:
    """The cap written out in numpy, of a packed text longer than a chunk; in chunks, and in LongLoRA's groups."""
    time, cap = attention.CHUNK + 44, 1.5
    draw = np.random.RandomState(0).standard_normal
    q, k, v = (np.asarray(draw((1, time, 2, 8)), np.float32) for _ in range(3))
    order, segments = np.arange(time)[None], np.repeat([[1, 2]], [140, time - 140], 1)
    scores = cap * np.tanh(np.einsum("bihd,bjhd->bhij", q, k) / cap)
    seen = (order[:, :, None] >= order[:, None]) & (segments[:, :, None] == segments[:, None])
    shares = np.where(seen[:, None], np.exp(scores), 0)
    wanted = np.einsum("bhij,bjhd->bihd", shares / shares.sum(-1, keepdims=True), v)
    visible = Visible(*(jnp.asarray(x, jnp.int32) for x in (order, order, segments, segments)), cap=cap)
    groups = ShiftedAttention(140)

    def run(q: Any, k: Any, v: Any) -> Any:
        return (
            attention.chunked_attention(q, k, v, visible, 1.0),
            groups(q, k, v, visible, 1.0),
            jax.grad(lambda q: attention.chunked_attention(q, k, v, visible, 1.0).sum())(q),
            jax.grad(lambda q: attention.plain_attention(q, k, v, visible, 1.0).sum())(q),
            attention.plain_attention(q, k, v, dataclasses.replace(visible, cap=None), 1.0),
        )

    chunked, grouped, slope, plain, uncapped = compiled(run)(q, k, v)
    close(chunked, wanted)
    close(grouped[:, :140, :1], wanted[:, :140, :1])  # the first group, of the head that stays
    close(slope, plain)
    assert differs(uncapped, wanted, 0.1)


def test_caps_keep_attention_off_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *given, **options: asked.append(options) or q)
    for name, calls in (("gemma2", False), ("gemma3", True)):
        asked.clear()
        forward = gemma.build(CONFIGS[name], compute_dtype="bfloat16")
        params = jax.eval_shape(lambda key, name=name: gemma.init(key, CONFIGS[name]), jax.random.key(0))
        jax.eval_shape(forward, params, np.zeros((2, 8), np.int32))
        assert bool(asked) == calls


def test_prompts_start_at_scaled_embeddings() -> None:
    model = torch_model(CONFIGS["gemma2"])
    params, forward = ours(CONFIGS["gemma2"], numbers(model))
    params, _ = methods.prompt_tuning(3, text=[3, 7, 11])(jax.random.key(0), params, forward)
    with torch.no_grad():
        wanted = model.model.embed_tokens(torch.tensor([3, 7, 11])).numpy()
    close(jax.tree.leaves(params["ports"])[0], wanted)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="looks both ways"):
        gemma.build(tf.Gemma3TextConfig(**SHAPE, num_hidden_layers=2, use_bidirectional_attention=True))
    with pytest.raises(ValueError, match="'gemma3' is not supported: llama"):
        families.family("gemma3")
    odd = tf.Gemma2Config(**SHAPE, num_hidden_layers=1)
    odd.layer_types = ["chunked_attention"]
    with pytest.raises(ValueError, match="layer_types hold 'chunked_attention'"):
        gemma.build(odd)
