"""QLoRA's table: its rows, both profiles on tiny models; and MMLU's files, prompts and score."""

import csv
import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import toy_sentiment
import toy_tokenizer
import transformers

import peft_jax as pj
from experiments import harness, mmlu, parameter_counts, qlora_formats, qlora_paper
from peft_jax import models
from peft_jax.quant.nf4 import FourBit
from peft_jax.training.step import lenient

LAPTOP, PAPER = qlora_formats.LAPTOP, qlora_paper.PAPER
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_the_laptop_profile_keeps_to_its_budget():
    places = [LAPTOP.places(LAPTOP.settings, row) for row in LAPTOP.rows.values()]
    seconds = sum(train / LAPTOP.speed.train + evaluate / LAPTOP.speed.evaluate for train, evaluate in places)
    assert len(LAPTOP.seeds) == 3 and 3 * seconds < 14 * 60
    assert list(LAPTOP.rows) == ["lora-fp32", "lora-int8", "lora-fp4", "lora-nf4"]


def test_a_laptop_run_learns_on_every_base():
    model = models.from_config(transformers.LlamaConfig(vocab_size=64, **SIZES), jax.random.key(0))
    task = toy_sentiment.task(model, held_out=20, of=60)
    s = dataclasses.replace(LAPTOP.settings, steps=15, batch=8, length=8, held_out=20, learning_rate=0.05)
    found = {}
    for name in ("lora-fp32", "lora-nf4"):
        found[name] = qlora_formats.run(task, s, LAPTOP.rows[name], 0)
        assert found[name].metrics["loss"] < math.log(64) - 0.3, name
    each = 2 * 8 * (4 * 64 + 3 * 96)
    assert {outcome.trainable for outcome in found.values()} == {each}
    assert len({outcome.total for outcome in found.values()}) == 1, "codes count as what they stand for"
    # A second scale and an offset for few first ones.
    assert found["lora-fp32"].metrics["bits"] == 32 and 4.125 < found["lora-nf4"].metrics["bits"] < 4.5
    assert found["lora-nf4"].metrics["base"] < found["lora-fp32"].metrics["base"]


@pytest.mark.parametrize("name", ["llama-7b-alpaca-nf4", "llama-7b-alpaca-bf16"])
def test_paper_rows_train_what_is_printed(name):
    params, forward = parameter_counts.abstract("Llama-7B")
    init = qlora_paper.method_of(PAPER.settings, PAPER.rows[name]).init
    made = jax.eval_shape(lambda p: init(jax.random.key(0), p, forward), params)
    assert pj.count(made).trainable == 159_907_840
    assert isinstance(pj.strip(made)["model"]["layers"]["mlp"]["up_proj"]["kernel"], FourBit) is name.endswith("nf4")


def test_the_papers_settings():
    s, small, large = PAPER.settings, PAPER.rows["llama-13b-flan_v2-nf4"], PAPER.rows["llama-33b-oasst1-fp4"]
    assert len(PAPER.rows) == 4 * 3 * 3 and (small.large, large.large) == (False, True)
    assert qlora_paper.places(s, small)[0] == 10_000 * 16 * 512
    tx = qlora_paper.optimiser(s, large, 100)
    zeros, ones = (jax.numpy.full((2, 2), x) for x in (0.0, 1.0))
    with lenient():
        state, rates = tx.init(zeros), []
        for _ in range(5):
            updates, state = tx.update(ones, state, zeros)
            rates.append(-float(updates[0, 0]))
    np.testing.assert_allclose(rates, [0, 1e-4 / 3, 2e-4 / 3, 1e-4, 1e-4], rtol=1e-3, atol=1e-9)


# -- MMLU -------------------------------------------------------------------------------------------------------------


def question(subject, number):
    return mmlu.Question(subject, f"What is {number} + 1?", tuple(str(number + i) for i in range(4)), number % 4)


SUBJECTS = ("abstract_algebra", "virology")
DEV = [question(subject, i) for subject in SUBJECTS for i in range(6)]
TEST = [question(subject, i) for subject in SUBJECTS for i in range(6, 9)]


def written(folder, split, questions):
    """The authors' layout; a field with a comma, a quote and a line's end in it."""
    (folder / split).mkdir(parents=True)
    for subject in SUBJECTS:
        with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            for q in questions:
                if q.subject == subject:
                    rows.writerow([q.question, *q.choices, "ABCD"[q.answer]])


def test_both_layouts_hold_the_same_questions(tmp_path):
    odd = DEV[0]._replace(question='He said "1, 2"\nand then?')
    written(tmp_path / "csv", "dev", [odd, *DEV[1:]])
    assert mmlu.read(tmp_path / "csv", "dev") == [odd, *DEV[1:]]
    items = [q._asdict() for q in DEV]
    (tmp_path / "dev.json").write_text(json.dumps(items), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    assert mmlu.read(tmp_path, "dev") == mmlu.read(tmp_path, "test") == DEV
    with pytest.raises(FileNotFoundError, match=r"holds neither val/<subject>_val.csv nor val.json"):
        mmlu.read(tmp_path, "val")
    (tmp_path / "csv" / "dev" / "virology_dev.csv").write_text("Why?,a,b,c,d,A\nWhy?,a,b,c,d,E\n")
    with pytest.raises(ValueError, match=r"virology_dev.csv, record 2: a record is a question, four answers and A, B"):
        mmlu.read(tmp_path / "csv", "dev")
    (tmp_path / "dev.json").write_text(json.dumps([items[0], items[1] | {"answer": 4}]))
    with pytest.raises(ValueError, match=r"dev.json, item 2: there are four choices, and answers count from 0"):
        mmlu.read(tmp_path, "dev")


def test_a_prompt_is_the_harnesss():
    given = mmlu.prompt(TEST[0], DEV[:5])
    parts = given.split("\n\n")
    assert parts[0] == "The following are multiple choice questions (with answers) about abstract algebra."
    assert parts[1] == "What is 0 + 1?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: A"
    assert parts[5].endswith("Answer: A") and parts[6] == "What is 6 + 1?\nA. 6\nB. 7\nC. 8\nD. 9\nAnswer:"
    assert len(parts) == 7


def lettered():
    """Bytes, and a token for each letter behind a space."""
    inner = toy_tokenizer._bytes(["<|endoftext|>"], [("Ġ", letter) for letter in "ABCD"])
    return toy_tokenizer._fast(inner, eos_token="<|endoftext|>")


def test_long_prompts_lose_examples_and_letters_are_tokens():
    tokenizer = lettered()
    whole = mmlu.prompts(TEST, DEV, tokenizer, 10_000)
    assert [tokenizer.decode(ids) for ids in whole[:1]] == [mmlu.prompt(TEST[0], DEV[:5])]
    cut = mmlu.prompts(TEST[:1], DEV, tokenizer, len(whole[0]) - 1)
    assert tokenizer.decode(cut[0]) == mmlu.prompt(TEST[0], DEV[1:5])
    with pytest.raises(ValueError, match=r"question 1 \(abstract_algebra\) has \d+ tokens, more than 20"):
        mmlu.prompts(TEST, DEV, tokenizer, 20)
    with pytest.raises(ValueError, match="virology has 4 development questions, and 5 are shown"):
        mmlu.prompts(TEST, DEV[:10], tokenizer, 10_000)
    assert [tokenizer.decode([i]) for i in mmlu.letters(tokenizer)] == [" A", " B", " C", " D"]
    with pytest.raises(ValueError, match="no token for each of the letters"):
        mmlu.letters(toy_tokenizer.gpt2())


def test_the_score_is_that_of_the_letters_logits():
    """A stand-in whose logits behind the last token are known: it answers B but to the longest prompt, C."""
    lengths = [5, 70, 6, 7]
    given = [[1] * n for n in lengths]

    def features(params, inputs, ports):
        return jax.numpy.cumsum(inputs.mask, axis=1)[..., None].astype(jax.numpy.float32)

    def head(params, x, ports):
        letter = jax.numpy.where(x > 64, 2, 1)
        return jax.nn.one_hot(letter[..., 0] + 10, 16)

    questions = [question("virology", 1), question("virology", 2), question("anatomy", 1), question("anatomy", 0)]
    found = mmlu.score(pj.Forward(features, head), {}, questions, given, np.arange(10, 14), rows=3)
    assert found.predictions.tolist() == [1, 2, 1, 1]
    assert (found.accuracy, found.subjects) == (0.75, {"anatomy": 0.5, "virology": 1.0})


def test_a_paper_row_takes_real_steps_and_answers(tmp_path):
    config = transformers.LlamaConfig(vocab_size=261, eos_token_id=0, max_position_embeddings=512, **SIZES)
    model = models.from_config(config, jax.random.key(0))
    models.save(tmp_path / "llama" / "llama-7b", dataclasses.replace(model, tokenizer=lettered()))
    data = tmp_path / "qlora"
    written(data / "mmlu", "dev", DEV)
    written(data / "mmlu", "test", TEST)
    items = [{"instruction": "Say it.", "input": "", "output": "It."}] * 4
    (data / "alpaca.json").write_text(json.dumps(items), encoding="utf-8")
    s = dataclasses.replace(PAPER.settings, batch=2, length=256, dtype="float32", longest=400, steps=2, evaluated=2)
    table = harness.Table("toy", "", "", {"paper": dataclasses.replace(PAPER, settings=s)})
    sources = {"model": str(tmp_path / "llama"), "data": str(data)}
    only = ("llama-7b-alpaca-nf4",)
    with pytest.warns(UserWarning, match="rank 64 is above its own"):
        (path,) = harness.run(table, "paper", only=only, dirty=True, results=tmp_path, **sources)
    result = json.loads(path.read_text())
    assert result["trainable"] == 2 * 64 * (4 * 64 + 3 * 96) and result["train"]["places"] == 2 * 2 * 256
    assert result["metrics"]["accuracy"] in [pytest.approx(100 * i / 6) for i in range(7)]
    with pytest.raises(FileNotFoundError, match="give the folders of models and data"):
        qlora_paper.load(s, str(tmp_path / "none"), str(data))
