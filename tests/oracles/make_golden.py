"""Makes the golden values of `tests/newer`: what torch, transformers, peft and bitsandbytes compute, on tiny models.

    python tests/oracles/make_golden.py        # where torch is: the Python 3.11 environment of the tests

Writes, into tests/newer/golden, a checkpoint a family and an adapter a kind as those libraries save them, and what they
give.
"""

import json
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import peft
import torch
import transformers as tf
from safetensors.numpy import save_file

HERE = Path(__file__).parents[1] / "newer" / "golden"
WORDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = WORDS | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
LONG = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
MODELS = {
    "llama": (tf.AutoModelForCausalLM, tf.LlamaConfig(**DECODER, rope_parameters=LONG)),
    "qwen3": (tf.AutoModelForCausalLM, tf.Qwen3Config(**DECODER, head_dim=8, tie_word_embeddings=True)),
    "gemma2": (tf.AutoModelForCausalLM, tf.Gemma2Config(**DECODER, head_dim=4, sliding_window=4)),
    "gemma3": (tf.AutoModelForCausalLM, tf.Gemma3TextConfig(**DECODER, head_dim=4, sliding_window=4)),
    "mixtral": (
        tf.AutoModelForCausalLM,
        tf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
    "qwen3_moe": (
        tf.AutoModelForCausalLM,
        tf.Qwen3MoeConfig(**DECODER, head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    ),
    "gpt2": (tf.AutoModelForCausalLM, tf.GPT2Config(**WORDS, n_embd=16, n_layer=2, n_head=4, n_positions=32)),
    "bert": (tf.AutoModelForSequenceClassification, tf.BertConfig(**ENCODER, num_labels=3)),
    "deberta": (
        tf.AutoModelForSequenceClassification,
        tf.DebertaV2Config(
            **ENCODER, num_labels=3, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"]
        ),
    ),
    "t5": (
        tf.AutoModelForSeq2SeqLM,
        tf.T5Config(**WORDS, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "bart": (
        tf.AutoModelForSeq2SeqLM,
        tf.BartConfig(
            **WORDS,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            decoder_start_token_id=2,
        ),
    ),
}
LORA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=6, **LORA),
    "dora": peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, **LORA),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=3, total_step=10, **LORA),
    "vera": peft.VeraConfig(r=4, save_projection=True, **LORA | {"target_modules": ["q_proj", "o_proj"]}),
}


def stir(model: torch.nn.Module, seed: int, by: float, only_trained: bool = False) -> None:
    """Moves every number, so that none is at a value that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if parameter.requires_grad or not only_trained:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def outputs(model: torch.nn.Module, tokens: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    given = {"input_ids": torch.tensor(tokens).long()}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.tensor(targets).long()
    with torch.no_grad():
        return {"logits": model(**given).logits.numpy().copy()}


def main() -> None:
    warnings.simplefilter("ignore")
    shutil.rmtree(HERE, ignore_errors=True)
    random = np.random.default_rng(0)
    tokens, targets = (random.integers(3, 40, (2, 9)).astype(np.int32) for _ in range(2))
    found: dict[str, np.ndarray] = {"tokens": tokens, "targets": targets}

    for name, (kind, config) in MODELS.items():
        torch.manual_seed(0)
        model: Any = kind.from_config(config, attn_implementation="eager").eval()
        stir(model, 1, 0.25)
        model.save_pretrained(HERE / name)
        found |= {f"{name}.{key}": value for key, value in outputs(model, tokens, targets).items()}

    for name, options in ADAPTERS.items():
        model = tf.AutoModelForCausalLM.from_pretrained(HERE / "llama", attn_implementation="eager")
        model = peft.get_peft_model(model, options).eval()
        stir(model, 2, 0.3, only_trained=True)
        model.save_pretrained(HERE / name)
        found |= {f"{name}.{key}": value for key, value in outputs(model, tokens, targets).items()}

    matrix = random.normal(size=(64, 128)).astype(np.float32)
    packed, state = bnb.quantize_4bit(torch.tensor(matrix), blocksize=64, quant_type="nf4", compress_statistics=True)
    found |= {"nf4.matrix": matrix, "nf4.restored": bnb.dequantize_4bit(packed, state).numpy()}

    for extra in [*HERE.glob("*/README.md"), *HERE.glob("*/generation_config.json")]:
        extra.unlink()
    save_file(found, HERE / "outputs.safetensors")
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    (HERE / "versions.json").write_text(json.dumps({name: version(name) for name in libraries}, indent=2) + "\n")


if __name__ == "__main__":
    main()
