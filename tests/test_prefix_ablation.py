"""The prefix-tuning table: its budget, the task of its laptop profile, and that profile's rows on a tiny Llama."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import toy_tokenizer
import transformers

import peft_jax as pj
from experiments import data, e2e, lora_family_e2e, restaurants, scores
from experiments import prefix_ablation as table
from experiments.harness import config_of, key_of
from experiments.writing import write
from peft_jax import models

LAPTOP = table.LAPTOP
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_the_laptop_profile_keeps_to_its_budget() -> None:
    pairs = {name: LAPTOP.places(LAPTOP.settings, row) for name, row in LAPTOP.rows.items()}
    assert max(train for train, _ in pairs.values()) <= 20_000 and max(read for _, read in pairs.values()) <= 20_000
    assert len({key_of(config_of(LAPTOP, row)) for row in LAPTOP.rows.values()}) == len(LAPTOP.rows) == 16
    assert len(LAPTOP.seeds) == 3
    full = [train for name, (train, _) in pairs.items() if name.startswith("full")]
    seconds = sum(train for train, _ in pairs.values()) / 400 + 1.3 * sum(full) / 400  # it costs 2.3 times as much
    seconds += sum(read for _, read in pairs.values()) / 900
    assert 3 * seconds < 35 * 60
    trained = {train for name, (train, _) in pairs.items() if not name.startswith(("embedding", "shots"))}
    assert trained == {LAPTOP.settings.steps * LAPTOP.settings.batch * LAPTOP.settings.length}


# -- the task ---------------------------------------------------------------------------------------------------------

NAMES, KINDS, PLACES = ("Ab", "Cd", "Ef", "Gh"), ("pub", "inn"), ("Hill", "Pier", "Dock")
ATTRIBUTES = [f"name: {n}, eatType: {k}, near: {p}" for n in NAMES for k in KINDS for p in PLACES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with a tokenizer of bytes, and a task.json of 24 sets of attributes, two sentences each."""
    folder = tmp_path_factory.mktemp("prefix")
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    toy_tokenizer.gpt2().save_pretrained(folder / "model")
    examples = []
    for given in ATTRIBUTES:
        name, kind, place = (part.split(": ")[1] for part in given.split(", "))
        for target in (f"{name} is a  {kind} near {place}.", f"Near {place}: {name}."):
            examples.append({"input": given, "target": target, "comment": ""})
    path = folder / "bigbench" / "gem" / "e2e_nlg" / "task.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"canary": "", "examples": examples}), encoding="utf-8")
    return folder


SETTINGS = dataclasses.replace(
    LAPTOP.settings, steps=2, batch=4, length=48, held_out=5, validation=3, sentences=8, size=4, new_tokens=6, hidden=8
)


@pytest.fixture(scope="module")
def task(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DATA", folder)
        return restaurants.prepare(SETTINGS, str(folder / "model"), None)


def test_attributes_are_shortened() -> None:
    given = "name: Blue Spice, eatType: pub, customer rating: 3 out of 5, familyFriendly: no, near: Café Rouge, Paris"
    assert (
        restaurants.shorten(given) == "Blue Spice, pub, rated 3 out of 5, not family friendly, near Café Rouge, Paris"
    )
    assert restaurants.shorten("name: Cocum, priceRange: cheap, familyFriendly: yes") == (
        "Cocum, price cheap, family friendly"
    )
    with pytest.raises(ValueError, match="'a pub' is not a list of attributes such as"):
        restaurants.shorten("a pub")


def test_no_attributes_are_in_two_parts(task, folder, monkeypatch):
    monkeypatch.setattr(data, "DATA", folder)
    found = restaurants.load(task.model.tokenizer)
    held_out, validation, rest = restaurants.split(found, (5, 3), 48)
    names = [name for part in (held_out, validation, rest) for name in part.references]
    assert sorted(names) == sorted(found) and [len(part.prompts) for part in (held_out, validation, rest)] == [5, 3, 16]
    assert {example.attributes for example in rest.examples} == set(rest.references)
    assert len({example.attributes for example in held_out.examples[:5]}) == 5  # one of each, then the second ones
    assert held_out.references[names[0]] == [example.sentence for example in found[names[0]]]
    assert all("  " not in example.sentence for example in rest.examples)
    assert task.train == rest.examples[: SETTINGS.steps * SETTINGS.batch]
    monkeypatch.setattr(data, "DATA", folder / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"the task gem/e2e_nlg is not at .*: run `make data-tables`"):
        restaurants.load(task.model.tokenizer)
    with pytest.raises(ValueError, match="leave --data out"):
        restaurants.prepare(SETTINGS, None, "somewhere")


def test_only_the_sentence_is_learnt_and_an_infix_stands_before_the_line_break(task):
    rows = restaurants.rows(task.train, 48, infix=True)
    tokenizer = task.model.tokenizer
    for i, example in enumerate(task.train):
        learnt = tokenizer.decode(rows["targets"][i][rows["weights"][i] > 0])
        assert learnt == f"{example.sentence}\n"
        read = tokenizer.decode(rows["tokens"][i][rows["mask"][i]])
        assert read == f"{example.attributes}\n{example.sentence}"
        assert tokenizer.decode(rows["tokens"][i][: rows["infix"][i]]) == example.attributes
    assert "infix" not in restaurants.rows(task.train, 48, infix=False)


@pytest.mark.parametrize("infix", [False, True])
def test_texts_are_those_that_generate_writes(task, infix):
    method = table.method_of(SETTINGS, "infix", 3)
    params, forward = method(jax.random.key(3), task.model.params, task.model.forward)
    part, tokenizer = task.held_out, task.model.tokenizer
    ends = tokenizer("\n")["input_ids"]
    texts, count = write(forward, params, tokenizer, part.prompts, 4, ends=ends, infix=infix, max_new_tokens=6)
    prompts = [f"{name}\n" for name in part.references]
    where = [len(prompt) - 1 for prompt in part.prompts] if infix else None
    alone = models.generate(forward, params, tokenizer, prompts, max_new_tokens=6, stop="\n", infix=where)
    assert texts == [text.strip() for text in alone] and 5 <= count <= 5 * 6


# -- its rows ---------------------------------------------------------------------------------------------------------


def test_rows_do_what_their_names_say(task):
    trained = 2 * 2 * 2 * 8  # numbers of a row of keys and values: both, layers, heads, width
    mlp = lambda length: length * 32 + 32 * 8 + 8 + (8 + 1) * trained  # noqa: E731
    base = pj.count(task.model.params).frozen
    expected = {
        "infix-10": mlp(10),
        "embedding-10": 10 * 32,
        "lora-8": 2 * 8 * (2 * 32 + 32 + 16),
        "full": base,
        "shots-4": 0,
        "shots-0": 0,
    }
    ran = {name: table.run(task, SETTINGS, LAPTOP.rows[name], 0) for name in expected}
    assert {name: outcome.trainable for name, outcome in ran.items()} == expected
    for name, outcome in ran.items():
        assert np.isfinite(list(outcome.metrics.values())).all() and outcome.metrics["loss"] > 0
        assert (outcome.train.places, outcome.evaluate.places) == table.places(SETTINGS, LAPTOP.rows[name])
        assert outcome.total == base + (0 if name == "full" else outcome.trainable)
    assert len({outcome.metrics["loss"] for outcome in ran.values()}) == len(ran)


def test_seeds_share_one_program_and_few_examples_are_repeated(task):
    s = dataclasses.replace(SETTINGS, steps=12, prefix_rate=0.05)
    few = table.Row("prefix", 10, 4)
    first, second = (table.run(task, s, few, seed) for seed in (0, 1))
    assert few.name == "prefix-10-on-4" and first.metrics != second.metrics
    assert table.run(task, s, few, 0).metrics == first.metrics
    assert table.compiled(task.model.forward, s, "prefix", 10)[2]._cache_size() == 1
    assert first.train.tokens == s.steps * sum(len(example.tokens) - 1 for example in task.train[:4])
    none = table.run(task, dataclasses.replace(s, prefix_rate=0.0), few, 0)
    assert first.metrics["loss"] < none.metrics["loss"] - 0.1


def test_the_lora_familys_rows_share_the_task(task):
    profile = lora_family_e2e.LAPTOP
    mine, theirs = profile.settings, LAPTOP.settings
    assert all(value == getattr(theirs, name) for name, value in dataclasses.asdict(mine).items())
    small = {name: getattr(SETTINGS, name) for name in dataclasses.asdict(mine)}
    s, trainable = restaurants.Laptop(**small), {"dylora-4": 2 * 4 * (2 * 32 + 32 + 16), "vera-256": 2 * (512 + 48)}
    for name, expected in trainable.items():
        row = profile.rows[name]
        outcome = lora_family_e2e.run(task, s, row, 0)
        assert outcome.trainable == expected and np.isfinite(list(outcome.metrics.values())).all()
        assert (outcome.train.places, outcome.evaluate.places) == lora_family_e2e.places(s, row)
    seconds = sum(a / 350 + b / 900 for a, b in (lora_family_e2e.places(mine, row) for row in profile.rows.values()))
    assert 3 * seconds < 10 * 60


def test_shots_are_whole_examples(task):
    method = table.shots(task, 4, seed=1)
    params = method.init(jax.random.key(0), task.model.params, task.model.forward)
    (leaf,) = params["ports"].values()
    drawn = np.random.default_rng(1).permutation(len(task.train))[:4]
    assert leaf.keys.shape[1] == sum(len(task.train[i].tokens) + 1 for i in drawn)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_bleu_agrees_with_the_challenges_on_plain_words() -> None:
    texts = ["the mill is a cheap pub near the river", "zizzi serves chinese food in the city centre"]
    references = [
        ["the mill is a cheap place near the river", "near the river there is a cheap pub"],
        ["zizzi serves chinese food in the centre of the city"],
    ]
    assert scores.bleu(texts, references) == pytest.approx(e2e.bleu(texts, references), rel=1e-9)
    assert scores.bleu(["The Mill."], [["the mill."]]) < 100  # case counts
    with pytest.raises(ValueError, match="1 texts and 2 lists of references"):
        scores.bleu(texts[:1], references)


def test_rouge_l_is_the_best_references_f() -> None:
    # 5 of 6 words in order, of 6 and of 7: F = 2 · 5/6 · 5/7 / (5/6 + 5/7) = 10/13.
    given = [["The mill is a very cheap pub", "nothing"]]
    assert scores.rouge_l(["The mill is a pub, cheap!"], given) == pytest.approx(1000 / 13)
    assert scores.rouge_l(["serving food", "x"], [["serves foods"], ["y"]]) == pytest.approx(50)
