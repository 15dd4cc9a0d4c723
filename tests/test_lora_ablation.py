"""The first table: its rows and budgets, both of its profiles on tiny models, and the E2E task that it brings."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import optax
import pytest
import torch
import toy_sentiment
import toy_tokenizer
import transformers

import peft_jax as pj
from experiments import e2e, harness, lora_ablation, lora_family_e2e, run
from experiments.harness import Table
from peft_jax import models, training
from peft_jax.models.families import family

LAPTOP, PAPER = lora_ablation.LAPTOP, lora_ablation.PAPER


# -- the first table: rows and budgets --------------------------------------------------------------------------------


def test_the_command_lists_rows_and_costs(capsys):
    run.main(["lora_ablation", "--list"])
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +15,360 +12,800 ", listed, re.MULTILINE) for name in LAPTOP.rows)
    assert re.search(r"estimate: \d+ runs, [\d,]+ training \+ [\d,]+ evaluation places: about \d+ minutes", listed)
    with pytest.raises(SystemExit) as stopped:
        run.main(["lora_ablation", "--only", "q5"])
    assert stopped.value.code == 1 and "no row 'q5'" in capsys.readouterr().err


def test_the_laptop_profile_keeps_to_its_budget():
    assert len(LAPTOP.rows) <= 8 and len(LAPTOP.seeds) == 3
    seconds = 0.0
    for row in LAPTOP.rows.values():
        train, evaluate = LAPTOP.places(LAPTOP.settings, row)
        assert train <= 20_000 and evaluate <= 20_000
        seconds += train / LAPTOP.speed.train + evaluate / LAPTOP.speed.evaluate
    assert 3 * seconds < 25 * 60


def trained(profile, config):
    """Trainable numbers of each row on a model's true sizes; no weight is made."""
    params = jax.eval_shape(lambda key: models.from_config(config, key).params, jax.random.key(0))
    forward = family(config.model_type).build(config)

    def count(row):
        init = lora_ablation.adapter(row, profile.settings.alpha, config.model_type).init
        return pj.count(jax.eval_shape(lambda p: init(jax.random.key(0), p, forward), params)).trainable

    return {name: count(row) for name, row in profile.rows.items()}


def test_laptop_rows_train_what_the_docstring_says():
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    counts = trained(LAPTOP, config)
    assert {counts[row.name] for row in LAPTOP.parts[0].rows} == {276_480}
    pair = 30 * (2 * 576 + 576 + 192)
    assert [counts[row.name] for row in LAPTOP.parts[1].rows] == [pair, 8 * pair, 64 * pair]
    assert LAPTOP.parts[0].figures["v12"] == PAPER.parts[0].figures["v8"]


@pytest.fixture(scope="module")
def medium():
    """GPT-2 medium's true sizes."""
    return transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)


def test_paper_rows_are_traced_at_their_true_size(medium):
    counts = trained(PAPER, medium)
    sizes = {row.name: 24 * sum(2 * 1024 * rank for _, rank in row.ranks) for row in PAPER.rows.values()}
    assert counts == sizes and len(counts) == 19
    assert {counts[row.name] for row in PAPER.parts[0].rows} == {393_216}


@pytest.mark.parametrize("name", ["q4-v4", "q64-k64-v64-o64"])
def test_the_papers_step_is_traced_at_its_true_size(medium, name):
    s = PAPER.settings
    params = jax.eval_shape(lambda key: models.from_config(medium, key).params, jax.random.key(0))
    forward = family("gpt2").build(medium)
    method = lora_ablation.adapter(PAPER.rows[name], s.alpha, "gpt2", s.dropout)
    params, forward = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, forward), params), method.wrap(forward)
    tx, step = lora_ablation.paper_step(forward, s, 26_285)
    trainables, frozen = pj.partition(params)
    opt_state = jax.eval_shape(tx.init, trainables)
    state = training.State(trainables, opt_state, jax.ShapeDtypeStruct((), np.int32), jax.random.key(0))
    number = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "mask": bool}
    batch = {k: jax.ShapeDtypeStruct((s.batch, 128), dtype) for k, dtype in number.items()}
    after, measured = jax.eval_shape(step, state, frozen, batch)
    shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(after) == shapes(state)
    assert measured["loss"].shape == ()


def test_the_papers_learning_rate_is_transformers_linear_schedule():
    s = dataclasses.replace(PAPER.settings, warmup=5)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=s.learning_rate)
    schedule = transformers.get_linear_schedule_with_warmup(optimiser, 5, 20)
    expected = []
    for _ in range(20):
        expected.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    np.testing.assert_allclose([float(lora_ablation.paper_rate(s, 20)(i)) for i in range(20)], expected, rtol=1e-6)


# -- the laptop profile's run, on a tiny Llama ------------------------------------------------------------------------


def test_a_laptop_run_learns_and_compiles_once(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    s = dataclasses.replace(LAPTOP.settings, steps=30, batch=8, length=8, held_out=30, learning_rate=0.05, alpha=16.0)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    task = toy_sentiment.task(model, held_out=30, of=80)
    row = LAPTOP.rows["q4-v6"]
    first, second = (lora_ablation.run_reviews(task, s, row, seed) for seed in (0, 1))
    assert first.metrics["loss"] < math.log(64) - 0.2 and first.metrics != second.metrics
    assert first.trainable == 2 * (4 * 64 + 6 * 48) and first.total > first.trainable
    assert first.train.places == 30 * 64 and first.evaluate.places == 240 > first.evaluate.tokens
    again = lora_ablation.run_reviews(task, s, row, 0)
    assert again.metrics == first.metrics
    assert lora_ablation.laptop_step(model.forward, s)[1]._cache_size() == 1


# -- the paper profile's run, on a tiny GPT-2 and a file of the true format -------------------------------------------

LINES = [
    "name : Blue Spice | Type : coffee shop | area : city centre||A coffee shop in the city centre area called Blue .",
    "name : Blue Spice | Type : coffee shop | area : city centre||Blue Spice is a coffee shop in city centre . ",
    "name : Zizzi | Type : pub | food : English | price : more than £ 30||Zizzi is a pub that costs more than £ 30 . ",
    "name : The Mill | Type : pub | near : Café Sicilia||The Mill is a pub near Café Sicilia . ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random GPT-2 with a tokenizer of bytes, and the data set's three files."""
    folder = tmp_path_factory.mktemp("paper")
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=160, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2-tiny")
    toy_tokenizer.gpt2().save_pretrained(folder / "gpt2-tiny")
    (folder / "e2e").mkdir()
    for name, lines in (("train", LINES), ("valid", LINES[2:]), ("test", LINES)):
        (folder / "e2e" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_a_paper_row_takes_real_steps(folder, tmp_path):
    settings = dataclasses.replace(PAPER.settings, steps=2, batch=2, warmup=1, beams=2, new_tokens=4, prompts=3)
    table = Table("lora_ablation", "", "", {"laptop": dataclasses.replace(PAPER, settings=settings)})
    sources = {"model": str(folder / "gpt2-tiny"), "data": str(folder / "e2e")}
    (path,) = harness.run(table, "laptop", seeds=(0,), only=("q4-v4",), dirty=True, results=tmp_path, **sources)
    result = json.loads(path.read_text())
    assert result["config"]["model"] == "gpt2-tiny" and "/" not in json.dumps(result["config"])
    assert result["trainable"] == 2 * 2 * 4 * 64
    assert result["metrics"]["loss"] == pytest.approx(math.log(257), abs=0.3) and result["metrics"]["bleu"] >= 0
    assert result["train"]["places"] == 2 * 2 * 128 > result["train"]["tokens"] > 300


def test_the_familys_paper_rows_take_real_steps(folder):
    s, row = lora_family_e2e.PAPER.settings, lora_family_e2e.PAPER.rows["vera-1024"]
    s = dataclasses.replace(s, steps=2, batch=2, warmup=1, beams=2, new_tokens=4, prompts=3)
    task = lora_ablation.load_e2e(s, str(folder / "gpt2-tiny"), str(folder / "e2e"))
    outcome = lora_family_e2e.run_paper(task, s, row, 0)
    assert outcome.trainable == 2 * 2 * (1024 + 32)
    assert np.isfinite(outcome.metrics["loss"]) and outcome.metrics["bleu"] >= 0
    assert outcome.train.places == 2 * 2 * 128


def test_e2e_examples_are_those_of_the_papers_code(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "gpt2-tiny")
    pairs = e2e.read(folder / "e2e" / "train.txt")
    rows = e2e.rows(pairs, tokenizer, 512)
    assert rows["tokens"].shape == (4, 128) and pairs[1][1] == "Blue Spice is a coffee shop in city centre ."
    learnt = rows["weights"][1] > 0
    assert tokenizer.decode(rows["targets"][1][learnt]) == f" {pairs[1][1]}<|endoftext|>"
    assert tokenizer.decode(rows["tokens"][1][rows["mask"][1]]) == f"{pairs[1][0]}<|endoftext|> {pairs[1][1]}"
    assert [len(found) for found in e2e.references(pairs).values()] == [2, 1, 1]
    with pytest.raises(ValueError, match=r"has 11\d tokens and a row takes 65"):
        e2e.rows(pairs, tokenizer, 64)


def test_e2e_files_of_another_format_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.txt is not there: give the folder .* with --data"):
        e2e.read(tmp_path / "train.txt")
    (tmp_path / "train.txt").write_text(LINES[0] + "\nname : Zizzi, a pub\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train.txt, line 2: a line is attributes, two bars and a sentence"):
        e2e.read(tmp_path / "train.txt")


def test_the_smoothed_loss_is_torchs():
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(size=(2, 5, 11)).astype(np.float32), rng.integers(0, 11, (2, 5)).astype(np.int32)
    weights = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.float32)
    forward = pj.Forward(lambda params, inputs, ports: params)
    batch = {"tokens": targets, "targets": targets, "weights": weights}
    total, weight = e2e.label_smoothed(0.1)(forward, jax.numpy.asarray(logits), batch, pj.Ports())
    losses = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(10, 11),
        torch.tensor(targets).long().reshape(10),
        label_smoothing=0.1,
        reduction="none",
    )
    np.testing.assert_allclose(float(total), float((losses * torch.tensor(weights).reshape(10)).sum()), rtol=1e-5)
    labels = optax.smooth_labels(jax.nn.one_hot(targets, 11), 0.1)
    expected = np.sum(weights * np.asarray(optax.softmax_cross_entropy(jax.numpy.asarray(logits), labels)))
    np.testing.assert_allclose(float(total / weight), expected / 5, rtol=1e-5)


def test_bleu_is_that_of_the_challenges_script():
    texts = [
        "The Mill is a cheap, family-friendly pub near Café Sicilia.",
        "Blue Spice costs £20-25 (rated 3.5 out of 5)!",
        "Zizzi serves Chinese food",
        " an expensive coffee shop , by the riverside .",
    ]
    references = [
        [
            "The Mill is a family-friendly pub near Café Sicilia. It is cheap.",
            "Near Café Sicilia there is a cheap pub, The Mill.",
        ],
        ["Blue Spice costs £20-25 and is rated 3.5 out of 5."],
        ["Zizzi is a place that serves Chinese food by the river.", "Zizzi serves Chinese food in the city centre."],
        ["An expensive coffee shop by the riverside.", "A coffee shop , expensive , is by the riverside ."],
    ]
    # BLEUScore of tuetschek/e2e-metrics, metrics/pymteval.py: append(text, references) for each, then 100 * score().
    assert e2e.bleu(texts, references) == pytest.approx(61.97374161110021, abs=1e-9)
    assert e2e.bleu(["nothing alike"], [["words of another kind"]]) == 0
