"""The table of formats: its types, its budget, and a row of each kind on tiny models."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toy_tasks
import toy_tokenizer
import transformers

from experiments import quant_perplexity as table
from experiments import run
from experiments.quant_perplexity import LAPTOP, PAPER, Row
from peft_jax import models

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("name", table.CODEBOOKS)
def test_types_round_to_the_nearest(name):
    w = np.random.RandomState(0).standard_normal((2, 128, 3)).astype(np.float32)
    values = np.unique([*table.CODEBOOKS[name], *-table.CODEBOOKS[name]])
    assert len(values) == 15 and values.max() == 1
    found = np.asarray(table._coded(name, jnp.asarray(w)))
    for layer, first in ((0, 0), (1, 64)):
        block = w[layer, first : first + 64, 1]
        grid = values * np.abs(block).max()
        nearest = np.abs(block[:, None] - grid).min(1)
        np.testing.assert_allclose(np.abs(found[layer, first : first + 64, 1] - block), nearest, atol=1e-6)


def test_the_profiles(capsys):
    assert LAPTOP.seeds == (0, 1, 2) and len(LAPTOP.rows) == 29
    for part in (*LAPTOP.parts, *PAPER.parts):
        assert part.figures.keys() <= {row.name for row in part.rows}
    run.main(["quant_perplexity", "--list"])
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in LAPTOP.rows)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, vocab_size=257, max_position_embeddings=32, initializer_range=0.1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    toy_tokenizer.gpt2().save_pretrained(folder / "tiny")
    texts = ["the pub by the river is open, and the food is good " * k for k in (1, 2, 3, 1, 2)]
    (folder / "pile.jsonl").write_text("".join(json.dumps({"text": text[i:]}) + "\n" for i, text in enumerate(texts)))
    return folder


SMALL = {"length": 16, "texts": 3, "calibration": 2, "passes": 2, "batch": 2}


def test_the_paper_profile_runs(llama, tmp_path):
    found = {}
    for name in ("fp32", "int4", "gptq2", "g2"):
        row = Row(name, "given")
        sources = (llama / "pile.jsonl", tmp_path, llama / "tiny")
        found[name] = toy_tasks.go(PAPER, row, *sources, ("perplexity", "bits"), **SMALL)["metrics"]
    bits = {name: metrics["bits"] for name, metrics in found.items()}
    assert bits == {"fp32": 32, "int4": 4.5, "g2": 2.5, "gptq2": 2.5}
    assert found["fp32"]["error"] == 0 < found["int4"]["error"] < found["g2"]["error"] < 100
    # The plain number, by transformers.
    model = transformers.AutoModelForCausalLM.from_pretrained(llama / "tiny")
    texts = [json.loads(line)["text"] for line in (llama / "pile.jsonl").read_text().splitlines()]
    rows = torch.tensor(table.stretches(texts, models.load(llama / "tiny").tokenizer, 16)[:3]).long()
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss
    assert found["fp32"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_the_laptop_profile_runs(llama, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(table.corpora.data, "DATA", toy_tasks.minilm(tmp_path_factory.mktemp("data")))
    s = table.dataclasses.replace(LAPTOP.settings, sentences=2, **SMALL)
    task = table.load(s, str(llama / "tiny"), None)
    assert len(task.sentences) >= 2 and len(task.held_out) == 1
    metrics = {}
    for row in (Row("nf4-dq", "turned"), Row("nf4-dq", "given"), Row("nf4-dq", "minilm"), Row("bf16", "minilm")):
        metrics[row.name] = table.run(task, s, row, 0).metrics
    assert metrics["nf4-dq"]["bits"] == metrics["given-nf4-dq"]["bits"] < 4.2
    assert metrics["nf4-dq"]["perplexity"] != metrics["given-nf4-dq"]["perplexity"]
    assert 0 <= metrics["minilm-bf16"]["turn"] < metrics["minilm-nf4-dq"]["turn"]
    assert metrics["minilm-bf16"]["bits"] == 16 and 0 < metrics["minilm-bf16"]["error"] < 0.5
