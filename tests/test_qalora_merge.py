"""QA-LoRA's table on a tiny model: what merging changes, and what it does not."""

import dataclasses
import json
import math

import jax
import pytest
import toy_sentiment
import transformers
from test_commonsense import RECORDS
from test_qlora_formats import DEV, TEST, lettered, written

from experiments import harness, qalora_merge, qalora_paper
from peft_jax import models

LAPTOP = qalora_merge.LAPTOP
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_the_laptop_profile_keeps_to_its_budget():
    s, each = LAPTOP.settings, LAPTOP.speed
    # QLoRA trains once a seed, QA-LoRA once a seed and number of bits; both are measured with their adapters too.
    trained = 3 * (1 + 3)
    seconds = trained * (s.steps * s.batch / each.train + s.held_out / each.evaluate) * s.length
    seconds += 3 * len(LAPTOP.rows) * s.held_out * s.length / each.evaluate
    assert len(LAPTOP.rows) == 9 and seconds < 11 * 60, "and some minutes for GPTQ"
    assert harness.find("qalora_merge") is qalora_merge.TABLE


def test_a_run_of_each_kind():
    model = models.from_config(transformers.LlamaConfig(vocab_size=64, **SIZES), jax.random.key(0))
    task = toy_sentiment.task(model, held_out=20, of=60)
    s = dataclasses.replace(
        LAPTOP.settings,
        steps=15,
        batch=8,
        length=8,
        held_out=20,
        learning_rate=0.05,
        group_size=16,
        calibration=16,
        rank=2,
    )
    found = {
        name: qalora_merge.run(task, s, LAPTOP.rows[name], 0).metrics
        for name in ("qlora-rtn2", "qlora-gptq2", "qalora-2")
    }
    for name, metrics in found.items():
        assert metrics["loss_before"] < math.log(64) - 0.3, name
        assert metrics["bits"] == 2 + 64 / 16
    exact, rounded = found["qalora-2"], found["qlora-rtn2"]
    assert exact["loss_after"] == pytest.approx(exact["loss_before"], abs=1e-5)
    assert abs(rounded["loss_after"] - rounded["loss_before"]) > 1e-4
    assert found["qlora-gptq2"]["loss_before"] == rounded["loss_before"], "one training for both"
    assert qalora_merge.learn.cache_info().misses == 2


def test_a_paper_row_takes_real_steps_and_answers(tmp_path):
    paper, sizes = qalora_paper.PAPER, SIZES | {"intermediate_size": 64}
    config = transformers.LlamaConfig(vocab_size=261, eos_token_id=0, max_position_embeddings=512, **sizes)
    model = models.from_config(config, jax.random.key(0))
    models.save(tmp_path / "llama" / "llama-7b", dataclasses.replace(model, tokenizer=lettered()))
    data = tmp_path / "qlora"
    written(data / "mmlu", "dev", DEV)
    written(data / "mmlu", "test", TEST)
    (data / "commonsense").mkdir()
    for task, (record, *_) in RECORDS.items():
        (data / "commonsense" / f"{task}.jsonl").write_text(json.dumps(record), encoding="utf-8")
    items = [{"instruction": "Say it.", "input": "", "output": "It."}] * 4
    (data / "alpaca.json").write_text(json.dumps(items), encoding="utf-8")
    s = dataclasses.replace(
        paper.settings, batch=2, length=256, dtype="float32", longest=400, steps=2, evaluated=2, rank=2, calibration=2
    )
    table = harness.Table("toy", "", "", {"paper": dataclasses.replace(paper, settings=s)})
    sources = {"model": str(tmp_path / "llama"), "data": str(data)}
    (path,) = harness.run(table, "paper", only=("llama-7b-alpaca-4",), dirty=True, results=tmp_path, **sources)
    result = json.loads(path.read_text())
    assert result["trainable"] == 2 * 2 * (4 * (1 + 32) + 2 * (1 + 64) + (2 + 32))
    assert result["metrics"]["commonsense"] in [pytest.approx(100 * right / 7) for right in range(8)]
    rates = {name: row.rate for name, row in paper.rows.items()}
    assert (rates["llama-13b-flan_v2-3"], rates["llama-33b-alpaca-2"], rates["llama-7b-alpaca-4-code"]) == (
        2e-5,
        1e-5,
        2e-4,
    )
