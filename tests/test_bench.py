"""The benchmark's sides compute one and the same thing, and its report says what was measured."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from experiments import bench, bench_longlora, bench_qlora, bench_sides
from peft_jax import models
from peft_jax.training.step import lenient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    where = tmp_path_factory.mktemp("bench") / "model"
    models.save(where, models.from_config(config, jax.random.key(0)))
    return where


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"ROWS": 2, "TIME": 8, "INITIAL": 3, "RANK": 2, "VERA": 16, "RATE": 0.03}.items():
        monkeypatch.setattr(bench_sides, name, value)
    monkeypatch.setattr(bench_sides, "tokens", lambda: np.random.default_rng(0).integers(0, 64, (2, 8)))
    yield
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's and transformers' own
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["adalora", "vera"])
def test_both_sides_start_at_one_loss_and_learn(name: str, folder: Path) -> None:
    firsts = []
    for make, side in ((bench_sides.jax_side, name), (bench_sides.torch_side, bench_sides.SIDES[name].reference)):
        run, facts = make(side, str(folder))
        losses = [run() for _ in range(6)]
        assert losses[-1] < losses[0] - 0.01
        assert facts["baseline"] > 0
        firsts.append(losses[0])
    # PEFT's loss shows AdaLoRA's penalty: the norm of −I, for vectors that start near zero.
    penalty = bench_sides.BUDGET["orthogonality"] * 3**0.5 if name == "adalora" else 0
    assert firsts[1] - firsts[0] == pytest.approx(penalty, abs=1e-2 if name == "adalora" else 1e-4)


def result(names: Any) -> dict[str, Any]:
    """Every side twice as fast as the one before it."""
    rows = {}
    for index, name in enumerate(names):
        rows[name] = {
            "seconds": 64 / 2**index,
            "tokens_per_second": 16.0 * 2**index,
            "peak_bytes": 1e9,
            "temporary_bytes": 1e8,
            "weight_bytes": 5e8,
            "trained": 1000 + index,
            "speed_ratio": 2.0,
            "memory_ratio": 0.5,
        }
    recorded = json.loads(bench.RESULT.read_text(encoding="utf-8"))
    return recorded | {"rows": rows, "compile_seconds": {"scanned": 1.0, "unrolled": 2.0}}


def test_the_report_speaks_of_what_was_measured() -> None:
    whole = bench.report(result(bench.SIDES))
    assert whole.count("\n| ") == len(bench.SIDES)
    assert "DyLoRA takes 0.50x of its time and 1.00x of its memory; AdaLoRA from rank 12 to 8 0.25x" in whole
    assert "VeRA with 1024 directions, 1,013 trained numbers, 0.06x" in whole
    first = bench.report(result(bench.TURNS[0]))
    assert "AdaLoRA" not in first and "Compiling the checkpointed step takes 1.0 s" in first


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of flax, in qwix
def test_qloras_sides_are_one_function_and_ours_keeps_no_dequantised_weight() -> None:
    """qwix on the same numbers: one loss at the start, both learn, and what each keeps for the backward pass."""
    sizes, facts = bench_qlora.Sizes(128, 256, 2), {}
    for name in ("qwix", "ours", "ours-checkpointed"):
        with lenient():
            run, facts[name] = bench_qlora.side(name, sizes, 16)
            losses = [run() for _ in range(3)]
        assert losses[2] < losses[1] < losses[0]
        facts[name]["first"] = losses[0]
    assert facts["ours"]["first"] == pytest.approx(facts["qwix"]["first"], rel=1e-5)
    weights = 4 * 2 * 2 * 128 * 256
    # qwix keeps the weights, but that of the first product, which no gradient passes; we keep none.
    assert facts["qwix"]["residual_bytes"] - facts["ours"]["residual_bytes"] > 0.7 * weights
    assert facts["ours"]["residual_bytes"] < 0.6 * weights
    assert abs(facts["ours"]["argument_bytes"] - facts["qwix"]["argument_bytes"]) < 64


def test_qloras_report_says_where_qwix_is_ahead() -> None:
    row = {
        "seconds": 1.0,
        "peak_bytes": 1e9,
        **dict.fromkeys(("residual_bytes", "temporary_bytes", "argument_bytes"), 1e6),
    }
    rows = dict.fromkeys(bench_qlora.SIDES, row) | {"ours": row | {"seconds": 2.0, "residual_bytes": 5e5}}
    recorded = json.loads(bench.RESULT.read_text(encoding="utf-8"))
    told = {"rows": rows, "sizes": {"layers": 8, "width": 1024, "hidden": 4096}}
    text = bench_qlora.report(recorded | told)
    assert "time 2.00x, peak memory 1.00x, residuals 0.50x" in text
    assert "qwix is ahead in time 2.00x." in text and text.count("\n| ") == len(bench_qlora.SIDES)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's and transformers' own
def test_longloras_sides_start_at_one_loss_but_for_their_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    monkeypatch.setattr(bench_longlora, "SIZES", sizes | {"num_key_value_heads": 2})
    monkeypatch.setattr(bench_longlora, "LENGTHS", (16,))
    monkeypatch.setattr(bench_longlora, "WORDS", 64)
    monkeypatch.setattr(bench_longlora, "RATE", 0.03)
    model = models.from_config(bench_longlora.config(), jax.random.key(0))
    model = dataclasses.replace(model, params=jax.tree.map(lambda x: 8 * x, model.params))  # attention that matters
    models.save(tmp_path / "model", model)
    found: dict[str, Any] = {}
    for name in ("lora", "longlora", "peft"):
        side = bench_longlora.side(name, str(tmp_path / "model"))
        losses = [side.step(16) for _ in range(3)]
        assert losses[2] < losses[0] - 0.01
        found[name] = side.facts | {"loss": losses[0], **side.measures(16)}
    torch.set_num_threads(1)
    assert found["peft"]["loss"] == pytest.approx(found["lora"]["loss"], abs=1e-4)
    assert abs(found["longlora"]["loss"] - found["lora"]["loss"]) > 1e-2
    assert found["peft"]["trained"] == found["lora"]["trained"] == found["longlora"]["trained"] - 64 * 24 - 3 * 24
    assert found["lora"]["temporary_bytes"] > 0 and "temporary_bytes" not in found["peft"]


def test_longloras_report_says_what_grows() -> None:
    rows = {}
    for n in (512, 1024):
        for place, name in enumerate(bench_longlora.SIDES, 1):
            memory = {"peak_bytes": 1e6 * n * place}
            rows[f"{name}-{n}"] = {"seconds": n / 2**place} | memory
            if name != "peft":
                rows[f"{name}-{n}"]["temporary_bytes"] = 1e3 * n**2 if name == "plain" else 1e6 * n
    recorded = json.loads(bench.RESULT.read_text(encoding="utf-8"))
    text = bench_longlora.report(recorded | {"rows": rows, "lengths": [512, 1024]})
    assert text.count("\n| peft_jax, LongLoRA | ") == 3 and text.count("plain attention | ") == 1
    assert "By length, LongLoRA is 8.00x, 8.00x as fast as full fine-tuning, in 4.00x, 4.00x of its memory" in text
    assert (
        "From 512 to 1,024 tokens (2x) temporaries grow 2.0x with LongLoRA, 2.0x with LoRA, and 4x with plain" in text
    )
