"""Methods on a quantised base: each trains, is taken off and merges; and HF PEFT's adapters on bitsandbytes' base."""

import warnings
from pathlib import Path

import jax
import optax
import peft
import pytest
import torch
import transformers
import zoo
from checks import close, differs, same, three_steps
from oracles.peft_models import SIZES, TOKENS, stir_torch, unmerged
from oracles.torch_models import numbers, ours, torch_logits, torch_model
from zoo import BATCH, KEY

import peft_jax as pj
from peft_jax import methods, models, quant
from peft_jax.interop import hf_peft
from peft_jax.models import Model
from peft_jax.weights import innermost, is_weight

pytestmark = pytest.mark.usefixtures("quick_compiles")

STORED = {"nf4": quant.quantise(quant.nf4(16)), "grouped": quant.quantise(quant.grouped(4, 16))}
ON_TOP: dict[str, pj.Method] = {
    "dora": methods.dora(2, 4, "(q|v)_proj"),
    "pissa": methods.pissa(2, 4, "(q|v)_proj"),
    "dylora": methods.dylora(4, 8, "(q|v)_proj", name="in the first step at a small rank"),
    "adalora": methods.adalora(2, 32, "(q|v)_proj", initial_rank=3),
    "vera": methods.vera(8, "(q|down)_proj"),
    "prefix": methods.prefix_tuning(3, hidden=8),
    "prompt": methods.prompt_tuning(4),
    "norms": methods.unfreeze("norm|embed|lm_head"),
}
OPTIMISERS = {"adalora": zoo.allocated}


@pytest.mark.parametrize(
    ("name", "stored"), [*((name, "nf4") for name in ON_TOP), ("dylora", "grouped"), ("adalora", "grouped")]
)
def test_every_method_works_on_a_quantised_base(name: str, stored: str) -> None:
    own = STORED[stored](KEY, zoo.base("llama"), zoo.build("llama"))[0]
    params, forward = ON_TOP[name](KEY, own, zoo.build("llama"))
    trained, losses = three_steps(params, forward, OPTIMISERS.get(name, lambda: optax.adam(1e-2))(), BATCH)
    assert losses[2] < losses[0]
    assert same(pj.strip(trained), own)
    if name in ("prefix", "prompt"):
        return
    merged = pj.merge(trained)
    moved = jax.jit(forward)(trained, zoo.TOKENS)
    close(jax.jit(zoo.build("llama"))(merged, zoo.TOKENS), moved, atol=1e-4)
    assert differs(moved, jax.jit(zoo.build("llama"))(own, zoo.TOKENS))
    # What had no adapter is in few bits still.
    up = merged["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert same(up, own["model"]["layers"]["mlp"]["up_proj"]["kernel"])
    assert is_weight(up)


# Rows as long as a block: bitsandbytes 0.50 decodes shorter ones wrongly on the CPU, where it looks absmax up by rows.
WIDE = transformers.LlamaConfig(
    **SIZES,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_adapters_that_peft_trained_on_bitsandbytes_base(kind: str, tmp_path: Path) -> None:
    """Made on a model that bitsandbytes keeps in four bits; that model and its adapter, loaded here."""
    theirs = torch_model(WIDE)
    plain, forward = ours(WIDE, numbers(theirs), remat="none")
    theirs.save_pretrained(tmp_path / "model")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    four_bit = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=config, attn_implementation="eager", dtype=torch.float32
    )
    four_bit.save_pretrained(tmp_path / "four_bit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by a name that is deprecated
        adapted = peft.get_peft_model(four_bit, peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"))
    stir_torch(adapted)
    adapted.save_pretrained(tmp_path / "adapter")

    on_ours, on_plain = models.load(tmp_path / "four_bit", remat="none"), Model(plain, forward, WIDE)
    params, adapted_forward = hf_peft.load(tmp_path / "adapter", on_ours)
    found = unmerged(adapted_forward, params)
    # In training mode, without dropout: on some CPUs bitsandbytes evaluates in bf16, and not every shape.
    close(found, torch_logits(adapted.train(), TOKENS), rtol=1e-4, atol=1e-4)
    assert differs(found, unmerged(adapted_forward, hf_peft.load(tmp_path / "adapter", on_plain)[0]))
    assert innermost(params["model"]["layers"]["mlp"]["up_proj"]["kernel"]).kind == kind
    hf_peft.save(tmp_path / "again", params, adapted_forward)
    assert same(hf_peft.load(tmp_path / "again", on_ours)[0], params)
