"""The planner against XLA's own analysis of compiled steps, and against what the papers print."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

import peft_jax as pj
from peft_jax import methods, quant, trees
from peft_jax import plan as planner
from peft_jax.models.families import family
from peft_jax.plan import plan
from peft_jax.training import State, make_step

ROWS, TIME = 4, 96
TX = optax.adam(1e-3)


def llama(layers: int) -> Any:
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaConfig(**sizes, vocab_size=512, num_hidden_layers=layers, max_position_embeddings=128)


def gpt2(layers: int) -> Any:
    return transformers.GPT2Config(n_embd=192, n_layer=layers, n_head=4, n_positions=128, vocab_size=512)


def analysed(config: Any, method: pj.Method, remat: str) -> tuple[int, int]:
    """Bytes of a compiled step's arguments, the batch apart, and of its temporaries."""
    module, made = family(config.model_type), []
    forward = module.build(config, remat=remat)

    def init(key: Any) -> Any:
        params, wrapped = method(key, module.init(key, config), forward)
        made.append(wrapped)
        return params

    trained, frozen = pj.partition(jax.eval_shape(init, jax.random.key(0)))
    state = State(trained, jax.eval_shape(TX.init, trained), jax.ShapeDtypeStruct((), jnp.int32), jax.random.key(0))
    tokens = np.zeros((ROWS, TIME), np.int32)
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones((ROWS, TIME), np.float32)}
    analysis = make_step(made[0], TX).lower(state, frozen, batch).compile().memory_analysis()
    return analysis.argument_size_in_bytes - sum(x.nbytes for x in batch.values()), analysis.temp_size_in_bytes


CASES = {
    "llama, qlora, full": (llama, methods.qlora(8, dropout=0.0), "full", (6,)),
    "llama, qlora with dropout, none": (llama, methods.qlora(8), "none", (4,)),
    "llama, lora, dots": (llama, methods.lora(8, select="proj"), "dots", (4,)),
    "gpt2, lora, none": (gpt2, methods.lora(4), "none", (2, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_the_compiler_says(name: str) -> None:
    """Arguments to the byte, but for counters and keys; temporaries within 15%, an added layer's within 2%."""
    build, method, remat, depths = CASES[name]
    planned, measured = [], []
    for layers in depths:
        options: dict[str, Any] = {"dtype": jnp.float32, "attention": "plain", "backend": "cpu", "optimiser": TX}
        found = plan(build(layers), method, batch=ROWS, length=TIME, remat=remat, **options)
        arguments, temporaries = analysed(build(layers), method, remat)
        kept = found.weights + found.scales + found.adapter + found.optimiser
        assert kept == pytest.approx(arguments, abs=64 + arguments * 1e-3)
        planned.append(found.activations + found.gradients)
        measured.append(temporaries)
        assert planned[-1] == pytest.approx(temporaries, rel=0.15)
    if len(depths) > 1:
        grown = [sizes[1] - sizes[0] for sizes in (planned, measured)]
        assert grown[0] == pytest.approx(grown[1], rel=0.02)


def test_qloras_65b_in_48_gb() -> None:
    """Section 1: from more than 780 GB to less than 48; table 6 prints 41 GB for Guanaco 65B, 21 for 33B, 10, 5."""
    paged = {
        name: plan(name, methods.qlora(), paged=100_000) for name in ("llama-65b", "llama-33b", "llama-13b", "llama-7b")
    }
    found = paged["llama-65b"]
    assert 40e9 < found.total < 48e9
    bits = 8 * (found.weights + found.scales) / found.frozen
    assert bits == pytest.approx(4.127, abs=0.1)  # embedding and head are in 16
    assert found.host == 2 * found.adapter and found.optimiser < 1000
    planned = {name: round(p.total / 1e9, 1) for name, p in paged.items()}
    assert planned == {"llama-65b": 42.4, "llama-33b": 22.4, "llama-13b": 9.9, "llama-7b": 5.6}
    without = plan("llama-65b", methods.qlora())
    assert without.total == found.total + found.host > 48e9, "this is what paging gains"
    # 16-bit fine-tuning at 12 bytes a number, weights, gradient and fp32 moments, is the paper's 780 GB.
    assert 12 * found.frozen == pytest.approx(780e9, rel=0.01)


def test_loras_gpt3_in_350_gb_and_its_checkpoint_in_35_mb() -> None:
    """Section 4.2: training memory from 1.2 TB to 350 GB, a checkpoint from 350 GB to 35 MB, at r = 4 on q and v."""
    method = methods.lora(4, select=r"c_attn\.[qv]$", dtype=jnp.bfloat16)
    found = plan("gpt3-175b", method, length=2048)
    resting = found.weights + found.adapter + found.optimiser
    assert resting == pytest.approx(350e9, rel=0.01) and found.total == pytest.approx(350e9, rel=0.03)
    assert found.adapter / 2**20 == pytest.approx(35, rel=0.03) and found.weights / found.adapter > 9_000
    full = plan("gpt3-175b", methods.unfreeze("", keep_base=False), length=2048)
    # The paper does not say what its 1.2 TB are.  Weights and moments in 16 bits are 1.05 TB, with a gradient 1.4 TB.
    bare = full.adapter + full.optimiser
    assert bare == pytest.approx(1.05e12, rel=0.01) and bare < 1.2e12 < bare + full.adapter < full.total


def test_longlora_on_eight_gpus_of_80_gb() -> None:
    """Table 5: 7B to 100,000 tokens and 13B to 65,536, which fit; 70B to 32,768, which by this plan does not; and the
    GB that it prints at 32,768 and 65,536, with the weights whole on each device."""
    parts = [methods.lora(8, 16, r"self_attn\.[qkvo]_proj$"), methods.unfreeze("embed|norm", keep_base=False)]
    method = pj.chain(*parts, methods.shift_attention())
    found = plan("llama-2-7b", method, length=100_000, devices=8)
    assert 60e9 < found.total < 66e9
    assert found.kept > 32 * 100_000 * 4096 * 2  # one row of the width a layer, in bf16
    assert plan("llama-2-7b", method, length=100_000, devices=8, attention="plain").total > 80e9
    assert 55e9 < plan("llama-2-13b", method, length=65_536, devices=8).total < 80e9
    assert 80e9 < plan("llama-2-70b", method, length=32_768, devices=8).total < 90e9
    short, long = (plan("llama-2-7b", method, length=n) for n in (32_768, 65_536))
    assert 46.4e9 / short.total < 1.4 and 69.8e9 / long.total < 1.4
    assert (long.total - short.total) / (69.8e9 - 46.4e9) == pytest.approx(0.85, abs=0.05)


def test_state_is_shared_and_paged() -> None:
    one, eight = (plan(llama(4), methods.qlora(8), devices=n) for n in (1, 8))
    for name in ("weights", "scales", "adapter", "gradients", "optimiser"):
        assert getattr(eight, name) == pytest.approx(getattr(one, name) / 8, abs=1)
    assert eight.kept == one.kept and eight.workspace > one.workspace
    paged = plan(llama(4), methods.qlora(8), paged=1)
    assert paged.host > 0 and paged.host + paged.optimiser == one.optimiser


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    llama(4).save_pretrained(tmp_path)
    planner.main([str(tmp_path), "--rank", "8", "--paged", "1000", "--format", "int4", "--length", "32"])
    said = capsys.readouterr().out
    expected = plan(
        llama(4),
        pj.chain(quant.quantise(quant.grouped(4)), methods.lora(8, 16, trees.LAYER_MATRICES, dropout=0.1)),
        length=32,
        paged=1000,
    )
    assert said == f"{expected}\n" and "host memory" in said
    planner.main(["llama-2-7b", "--method", "longlora", "--rank", "8", "--select", "(q|k|v|o)_proj"])
    assert "139,726,848 numbers train" in capsys.readouterr().out  # 8.4M of LoRA, 131M of the embedding, 0.3M of norms
    for words, error in {
        "llama-8b": "llama-8b is neither a path nor one of llama-7b",
        "llama-7b --method lora2": "method is 'lora2': choose one of lora, dora",
        "llama-7b --format nf5": "format is 'nf5': choose one of nf4",
        "llama-7b --method full --format nf4": "full fine-tuning moves every weight",
        "llama-7b --batch 0": "batch is 0: give 1 or more",
        "llama-7b --optimiser adam": "optimiser is 'adam': choose one of adamw",
    }.items():
        with pytest.raises(SystemExit):
            planner.main(words.split())
        assert error in capsys.readouterr().err
    for config in (transformers.BertConfig(num_hidden_layers=2), transformers.T5Config(num_layers=2)):
        with pytest.raises(ValueError, match=f"{config.model_type} is no decoder"):
            plan(config, methods.lora(8))
