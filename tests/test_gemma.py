"""The Gemma family against transformers in torch."""

import pytest
import transformers as tf
from oracles.parity import check_gradients, check_logits

SHAPE = {
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
CONFIGS = {
    "gemma2": tf.Gemma2Config(**SHAPE, num_hidden_layers=2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": tf.Gemma3TextConfig(
        **SHAPE,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_torch(name: str) -> None:
    check_logits(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_torch(name: str) -> None:
    check_gradients(CONFIGS[name], variants=name == "gemma3")
