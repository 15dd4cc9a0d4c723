"""GPT-2 against transformers in torch; its fused projection seen as three leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers as tf
from oracles.parity import check_gradients, check_logits

from peft_jax import Inputs, Ports, select
from peft_jax.layers import ACTIVATIONS, activation
from peft_jax.models import gpt2

SHAPE = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 48,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {
    "standard": tf.GPT2Config(**SHAPE),
    "every option": tf.GPT2Config(
        **SHAPE,
        n_inner=40,
        activation_function="relu",
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_torch(name: str) -> None:
    check_logits(CONFIGS[name])


def test_gradients_equal_torch() -> None:
    check_gradients(CONFIGS["every option"])


def test_activations_equal_torch() -> None:
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-4, 4, 41, dtype=np.float32)
    for name in ACTIVATIONS:
        np.testing.assert_allclose(activation(name)(x), ACT2FN[name](torch.tensor(x)), atol=1e-6, err_msg=name)


def test_half_precision_features() -> None:
    config = CONFIGS["standard"]
    forward = gpt2.build(config, compute_dtype="bfloat16")
    params = jax.eval_shape(lambda key: gpt2.init(key, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    assert jax.eval_shape(forward.features, params, Inputs(tokens), Ports()).dtype == jnp.bfloat16
    assert jax.eval_shape(forward, params, Inputs(tokens)).dtype == jnp.float32


@pytest.mark.parametrize("scan", [True, False])
def test_select_sees_three_projections(scan: bool) -> None:
    config = CONFIGS["standard"]
    forward = gpt2.build(config, scan=scan)
    params = jax.eval_shape(lambda key: gpt2.init(key, config, scan=scan), jax.random.key(0))
    leaves = 1 if scan else 2
    assert len(select("c_attn", params, forward)) == 3 * leaves
    assert len(select(r"c_attn\.(q|v)$", params, forward)) == 2 * leaves
    assert len(select(r"mlp\.c_proj", params, forward)) == leaves
    path = ("transformer", "layers" if scan else "layers_1", "attn", "c_attn", "k", "kernel")
    name = "transformer.h.1.attn.c_attn.k"
    assert forward.spec.names(path)[1 if scan else 0] == name
    assert forward.spec.names((*path[:-1], "bias"))[1 if scan else 0] == f"{name}.bias"
    assert forward.spec.stacked(path) == scan


def test_bad_input_is_refused() -> None:
    config = CONFIGS["standard"]
    params, forward = jax.eval_shape(lambda key: gpt2.init(key, config), jax.random.key(0)), gpt2.build(config)
    with pytest.raises(ValueError, match="33 tokens and the model has 32 positions"):
        forward(params, np.zeros((1, 33), np.int32))
    with pytest.raises(ValueError, match="add_cross_attention is not supported"):
        gpt2.build(tf.GPT2Config(**SHAPE, add_cross_attention=True))
    with pytest.raises(ValueError, match="n_embd 32 is not a multiple of n_head 5"):
        gpt2.build(tf.GPT2Config(**SHAPE | {"n_head": 5}))
