"""Prompt tuning's paper profile: Figure 3's rows, T5's likelihoods beside torch's, and a run on a tiny model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toy_tasks
import toy_tokenizer
import transformers

from experiments import prompt_ablation, superglue
from experiments import prompt_ablation_paper as profile
from peft_jax import models

PAPER = profile.PAPER
pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random T5 1.1, and SuperGLUE's files."""
    folder = tmp_path_factory.mktemp("paper")
    toy_tasks.write_all(folder)
    config = transformers.T5Config(
        vocab_size=260,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = models.from_config(config, jax.random.key(0))
    models.save(folder / "t5-tiny", dataclasses.replace(model, tokenizer=toy_tokenizer.t5()))
    return folder


def test_the_rows_are_figure_3s():
    assert prompt_ablation.TABLE.profiles["paper"] is PAPER
    lengths = {f"labels-{length}" for length in (1, 5, 20, 100, 150)}
    assert set(PAPER.rows) == {"uniform-100", "vocabulary-100"} | lengths
    assert all(2e9 > PAPER.places(PAPER.settings, row)[0] > 1e9 for row in PAPER.rows.values() if row.length <= 100)
    short = dataclasses.replace(PAPER.settings, steps=1, every=1)
    assert PAPER.places(short, PAPER.rows["labels-100"])[0] == 32 * (512 + 352 + 96 + 352 + 160 + 5 * 108)


def test_adafactor_takes_steps_of_the_learning_rate():
    # Unfactored, at the first step: the gradient over its own size, so 0.3 each, and 1e-5 of the parameter.
    params, tx = jnp.array([[1.0, -2.0]]), profile.optimiser(PAPER.settings)
    updates, _ = tx.update(jnp.array([[0.5, -8.0]]), tx.init(params), params)
    np.testing.assert_allclose(updates, [[-0.3 - 1e-5, 0.3 + 2e-5]], rtol=1e-5)


def test_answers_are_ranked_by_what_torch_says(folder):
    s = dataclasses.replace(PAPER.settings, tasks=("cb", "boolq"), source=48)
    task = PAPER.load(s, str(folder / "t5-tiny"), str(folder))
    train, dev, answers = task.data["cb"]
    tokenizer = task.model.tokenizer
    assert tokenizer.decode(dev["tokens"][0][dev["mask"][0]]) == "hypothesis: It was wet. yes premise: It rained.</s>"
    assert tokenizer.decode(train["targets"][1][train["weights"][1] > 0]) == "contradiction</s>"
    assert tokenizer.decode(answers[2]) == "neutral" and train["decoder_tokens"][1, 0] == profile.START
    found = profile.log_probabilities(task.model.forward, task.model.params, {n: x[:2] for n, x in dev.items()})
    reference = transformers.T5ForConditionalGeneration.from_pretrained(folder / "t5-tiny").eval()
    head = torch.tensor(np.asarray(task.model.params["lm_head"]["kernel"]).T.copy())
    reference.lm_head.weight = torch.nn.Parameter(head)  # transformers ties it, whatever the file holds
    for row in range(2):
        tokens, mask = (
            torch.tensor(dev["tokens"][row : row + 1]).long(),
            torch.tensor(dev["mask"][row : row + 1]).long(),
        )
        for choice, name in enumerate(superglue.LABELS["cb"]):
            ids = torch.tensor([tokenizer(name)["input_ids"]])
            with torch.no_grad():
                loss = reference(input_ids=tokens, attention_mask=mask, labels=ids).loss
            assert float(found[row, choice]) == pytest.approx(-float(loss) * ids.shape[1], rel=1e-4)


def test_prompts_of_t5_start_as_the_paper_says(folder):
    task = PAPER.load(dataclasses.replace(PAPER.settings, tasks=("cb",)), str(folder / "t5-tiny"), str(folder))
    answers, table = task.data["cb"].answers, np.asarray(task.model.params["shared"]["embedding"])

    def started(name):
        params, _ = profile.method_of(PAPER.rows[name], answers)(
            jax.random.key(0), task.model.params, task.model.forward
        )
        return np.asarray(params["ports"]["prompt_tuning"].value)

    means = np.stack([table[ids].mean(0) for ids in answers])
    np.testing.assert_allclose(started("labels-1"), means[:1], rtol=1e-5)
    labels = started("labels-100")
    np.testing.assert_allclose(labels[:3], means, rtol=1e-5)
    for row in (*labels[3:], *started("vocabulary-100")):
        assert (table == row).all(1).any()
    assert 0.4 < np.abs(started("uniform-100")).max() <= 0.5


def test_a_prompt_of_t5_is_trained_for_each_task(folder, tmp_path):
    small = {"tasks": ("rte", "cb"), "steps": 3, "every": 2, "batch": 2, "source": 64, "evaluated": 4}
    result = toy_tasks.go(
        PAPER, PAPER.rows["labels-5"], folder, tmp_path, folder / "t5-tiny", metrics=("score", "cb"), **small
    )
    assert result["trainable"] == 5 * 32 and result["config"]["tasks"] == ["rte", "cb"]
    assert result["metrics"]["score"] == pytest.approx((result["metrics"]["rte"] + result["metrics"]["cb"]) / 2)
    rte, cb = (64 + 5 + len(answer) + 1 for answer in ("not_entailment", "contradiction"))
    assert result["train"]["places"] == 3 * 2 * (rte + cb) >= result["train"]["tokens"]
    assert result["evaluate"]["places"] == 2 * (4 * 2 * rte + 6 * 3 * cb)  # evaluations, rows, answers
