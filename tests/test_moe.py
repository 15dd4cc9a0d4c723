"""Mixtures of experts against transformers in torch."""

import pytest
import transformers as tf
from oracles.parity import check_gradients, check_logits

SHAPE = {
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
        **SHAPE, moe_intermediate_size=24, num_experts=6, head_dim=16, norm_topk_prob=False, tie_word_embeddings=True
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_torch(name: str) -> None:
    check_logits(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_torch(name: str) -> None:
    check_gradients(CONFIGS[name], variants=name == "qwen3")
