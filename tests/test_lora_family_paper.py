"""The LoRA family's paper profiles: the papers' numbers, true sizes, and rows of them on tiny models."""

import dataclasses
import json

import jax
import pytest
import torch
import toy_glue
import toy_tasks
import toy_tokenizer
import transformers

import peft_jax as pj
from experiments import alpaca, glue, harness, parameter_counts, vera_alpaca
from experiments import lora_family_paper as profile

PAPER = profile.PAPER
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_rows_are_the_papers():
    assert len(PAPER.rows) == 8 * 3 + 6 + 2 + 8 * 2
    vera, ada = PAPER.rows["base-mrpc-vera"], PAPER.rows["deberta-cola-adalora"]
    assert (vera.rate, vera.head_rate, vera.epochs, vera.batch, vera.size) == (1e-2, 4e-3, 30, 64, 1024)
    assert (ada.rate, ada.epochs, ada.batch, ada.allocation) == (5e-4, 25, 32, (0.5, 800, 10, 3500))
    assert PAPER.parts[0].figures["base-rte-lora"] == {"the paper's, %": 86.6}
    assert profile.FIGURES.keys() < PAPER.rows.keys()
    for name, row in PAPER.rows.items():
        train, evaluate = PAPER.places(PAPER.settings, row)
        assert 1e6 < train < 2e9 and 1e4 < evaluate < 2e8, name
        if row.allocation:
            _, initial, _, final = row.allocation
            assert initial + final < row.epochs * (profile.SIZES[row.task].train // row.batch), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [("base-rte-lora", 294_912), ("base-rte-dylora", 294_912), ("base-rte-vera", 43_008), ("large-sst2-lora", 786_432)],
)
def test_rows_train_what_the_papers_say_at_their_true_size(name, expected):
    row = PAPER.rows[name]
    params, forward = parameter_counts.abstract("RoBERTa-large" if name.startswith("large") else "RoBERTa-base")
    init = profile.method_of(row).init
    assert pj.count(jax.eval_shape(lambda p: init(jax.random.key(0), p, forward), params)).trainable == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny random models of both kinds under the names of the real ones, and each kind of task's files."""
    folder = tmp_path_factory.mktemp("paper")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.RobertaConfig(vocab_size=261, max_position_embeddings=66, type_vocab_size=1, **sizes)
    torch.manual_seed(0)
    transformers.RobertaModel(config).save_pretrained(folder / "roberta-base")
    toy_tokenizer.roberta().save_pretrained(folder / "roberta-base")
    (folder / "deberta-v3-base").symlink_to(folder / "roberta-base")  # of the same matrices
    llama = transformers.LlamaConfig(vocab_size=257, eos_token_id=0, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    toy_tokenizer.gpt2().save_pretrained(folder / "llama")
    (folder / "glue").mkdir()
    for task, kind in (("rte", "tsv"), ("stsb", "jsonl"), ("mnli", "tsv")):
        toy_glue.write(folder / "glue", task, kind, times=4)
    return folder


HEAD = lambda labels: 32 * 32 + 32 + 32 * labels + labels  # noqa: E731
SIX = 4 * (32 + 32) + 2 * (32 + 48)
ROWS = {
    "base-rte-dylora": (2 * 2 * 8 * 64 + HEAD(2), 3e-2, 60),
    "base-stsb-vera": (2 * 2 * (1024 + 32) + HEAD(2), 3e-2, 30),
    "deberta-mnli-adalora": (2 * 12 * (SIX + 6) + HEAD(3), 3e-2, 60),
}


@pytest.mark.parametrize("name", list(ROWS))
def test_each_method_and_kind_of_task_runs(folder, tmp_path, name):
    trainable, rate, epochs = ROWS[name]
    row = dataclasses.replace(PAPER.rows[name], rate=rate, head_rate=1e-2, epochs=epochs, batch=4, warmup_steps=0)
    if row.allocation:
        row = dataclasses.replace(row, allocation=(0.1, 20_000, 1, 200_000))  # of the real data's steps
    where = {"folder": folder / "glue", "tmp_path": tmp_path, "model": folder}
    result = toy_tasks.go(PAPER, row, length=40, long=40, evaluated=4, steps=2 * epochs, **where)
    assert result["trainable"] == trainable
    assert result["metrics"]["score"] == pytest.approx(100, abs=1) and 1 <= result["metrics"]["epoch"] <= epochs
    assert result["train"]["places"] == 2 * epochs * 4 * 40
    dev = 8 * len(glue.splits(row.task))
    assert result["evaluate"]["places"] == (epochs + 1) * dev * 40


def test_absent_data_and_models_say_so(folder):
    with pytest.raises(FileNotFoundError, match="give the folder of CoLA, SST-2 and so on with --data"):
        profile.load(PAPER.settings, None, str(folder / "nowhere"))
    assert profile.load(PAPER.settings, None, str(folder)).model("deberta-v3-base") == "microsoft/deberta-v3-base"


# -- Alpaca -----------------------------------------------------------------------------------------------------------

ITEMS = [{"instruction": f"Add {i}.", "input": "1" * (i % 2), "output": f"It is {i}."} for i in range(10)]


def test_alpacas_prompts_are_those_of_its_code(tmp_path):
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(ITEMS))
    examples, tokenizer = alpaca.read(path), toy_tokenizer.gpt2()
    assert examples[1] == alpaca.Example("Add 1.", "1", "It is 1.")
    # PROMPT_DICT of tatsu-lab/stanford_alpaca, train.py, filled in.
    assert alpaca.prompt(examples[1]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 1.\n\n### Input:\n1\n\n### Response:"
    )
    assert alpaca.prompt(examples[0]) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 0.\n\n### Response:"
    )
    rows = alpaca.rows(examples, tokenizer, 256)
    assert tokenizer.decode(rows["targets"][1][rows["weights"][1] > 0]) == f"It is 1.{tokenizer.eos_token}"
    assert rows["mask"][1].sum() == len(tokenizer(alpaca.prompt(examples[1]))["input_ids"]) + 8
    assert alpaca.rows(examples, tokenizer, 20)["tokens"].shape == (10, 20)
    for text, words in (
        ("{", "is not JSON"),
        ("[]", "is not a list of examples"),
        ("[3]", "example 0 is not an object"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            alpaca.read(path)
    with pytest.raises(FileNotFoundError, match=r"give the file alpaca_data.json with --data"):
        alpaca.read(tmp_path / "no.json")


def test_an_alpaca_row_takes_real_steps(folder, tmp_path):
    path = tmp_path / "alpaca_data.json"
    path.write_text(json.dumps(ITEMS))
    s = dataclasses.replace(
        vera_alpaca.PAPER.settings, batch=2, length=256, held_out=2, dtype="float32", evaluated=2, steps=2
    )
    table = harness.Table("toy", "", "", {"paper": dataclasses.replace(vera_alpaca.PAPER, settings=s)})
    sources = {"model": str(folder / "llama"), "data": str(path)}
    (written,) = harness.run(table, "paper", seeds=(0,), only=("vera-256",), dirty=True, results=tmp_path, **sources)
    result = json.loads(written.read_text())
    kv = 16  # of two heads of four
    assert result["trainable"] == 2 * (7 * 256 + 32 + kv + kv + 32 + 48 + 48 + 32)
    assert result["metrics"]["loss"] > 0 and result["train"]["places"] == 2 * 2 * 256
    with pytest.raises(ValueError, match="has 10 examples, and 1000 are held out"):
        vera_alpaca.load(vera_alpaca.PAPER.settings, sources["model"], sources["data"])


@pytest.mark.parametrize(("name", "expected"), [("lora-64", 159_907_840), ("vera-256", 1_417_216)])
def test_alpacas_rows_train_what_the_paper_says(name, expected):
    params, forward = parameter_counts.abstract("Llama-7B")
    init = vera_alpaca.method_of(vera_alpaca.PAPER.rows[name]).init
    assert pj.count(jax.eval_shape(lambda p: init(jax.random.key(0), p, forward), params)).trainable == expected
