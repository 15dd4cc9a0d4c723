"""P-tuning v2's paper profile: the authors' numbers, and runs of each method and kind of task on tiny models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import toy_tasks
import toy_tokenizer
import transformers

import peft_jax as pj
from experiments import p_tuning_v2_data as tasks
from experiments import p_tuning_v2_paper as profile
from peft_jax import models
from peft_jax.models.families import family
from peft_jax.weights import Unfrozen

PAPER = profile.PAPER
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_rows_are_the_authors():
    assert len(PAPER.rows) == 30 and {row.method for row in PAPER.rows.values()} == set(profile.METHODS)
    row = PAPER.rows["rte-p_tuning_v2"]
    assert dataclasses.astuple(row) == ("rte", "p_tuning_v2", 5e-3, 128, 100, 32, 0.1)
    assert PAPER.rows["squad1.1-p_tuning_v2"].dropout == 0.2
    assert set(profile.FIGURES) <= set(PAPER.rows)
    assert PAPER.parts[0].figures["rte-p_tuning_v2"]["authors' README"] == 86.6
    for name, row in PAPER.rows.items():
        train, evaluate = PAPER.places(PAPER.settings, row)
        assert 5e5 < train < 2e9 and 1e5 < evaluate < 2e8, name


def test_the_learning_rates_are_the_authors():
    s, optimiser = PAPER.settings, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=7e-3)

    def compare(row, schedule, every):
        expected = []
        for step in range(20):
            expected.append(schedule.get_last_lr()[0])
            optimiser.step()
            if (step + 1) % every == 0:
                schedule.step()
        found = profile.schedule(s, row, 20, 5)
        np.testing.assert_allclose([float(found(step)) for step in range(20)], expected, rtol=1e-5, atol=1e-12)

    compare(PAPER.rows["ontonotes-p_tuning_v2"], torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.95), 5)
    optimiser.param_groups[0]["lr"] = optimiser.param_groups[0]["initial_lr"] = 7e-3
    linear = transformers.get_linear_schedule_with_warmup(optimiser, 0, 20)
    compare(PAPER.rows["boolq-p_tuning_v2"], linear, 1)
    whole = profile.schedule(s, PAPER.rows["boolq-full"], 100, 10)
    assert float(whole(6)) == pytest.approx(1e-5) and float(whole(3)) == pytest.approx(5e-6) and float(whole(100)) == 0


@pytest.mark.parametrize(("task", "head", "labels"), [("rte", "classification", 2), ("squad2.0", "answers", None)])
def test_rows_train_what_the_paper_says_at_its_true_size(task, head, labels):
    config = transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    params = jax.eval_shape(lambda key: models.from_config(config, key, head=head).params, jax.random.key(0))
    forward = family("roberta").build(config, head=head)
    length = PAPER.rows[f"{task}-p_tuning_v2"].length

    def trained(method):
        init = profile.method_of(PAPER.rows[f"{task}-{method}"]).init
        return pj.count(jax.eval_shape(lambda p: init(jax.random.key(0), p, forward), params)).trainable

    assert trained("p_tuning_v2") == 2 * 24 * length * 1024 and trained("prompt") == length * 1024
    assert trained("full") == 354_310_144  # RoBERTa-large without its pooler and its heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random RoBERTa, and each kind of task's files."""
    folder = tmp_path_factory.mktemp("paper")
    config = transformers.RobertaConfig(
        vocab_size=261,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=102,
        type_vocab_size=1,
    )
    torch.manual_seed(0)
    transformers.RobertaModel(config).save_pretrained(folder / "roberta-tiny")
    toy_tokenizer.roberta().save_pretrained(folder / "roberta-tiny")
    for name in ("superglue", "squad", "CoNLL03"):
        (folder / "data" / name).mkdir(parents=True)
    toy_tasks.write_all(folder / "data" / "superglue")
    for name in ("train", "valid", "test"):
        (folder / "data" / "CoNLL03" / f"{name}.txt").write_text(toy_tasks.CONLL03)
    for name in ("train", "dev"):
        toy_tasks.squad_file(folder / "data" / "squad" / f"{name}-v2.0.json")
    return folder


SMALL = {"pair": 64, "decay": 1.0, "sentence": 64, "window": 40, "stride": 4, "evaluated": 3}
HEAD = 32 * 32 + 32 + 32 * 2 + 2


@pytest.mark.parametrize(
    ("name", "trainable", "rate", "epochs", "places"),
    [
        ("rte-full", 0, 3e-3, 20, 20 * 3 * 2 * 64),
        ("copa-prompt", 3 * 32 + HEAD, 1e-2, 20, 20 * 3 * 2 * 2 * (64 + 3)),
        ("conll03-p_tuning_v2", 2 * 2 * 3 * 32 + 32 * 5 + 5, 5e-2, 40, 40 * 2 * 32),
        ("squad2.0-p_tuning_v2", 2 * 2 * 3 * 32 + 32 * 2 + 2, 5e-2, 40, 40 * 2 * 40),
    ],
)
def test_each_method_and_kind_of_task_runs(folder, tmp_path, name, trainable, rate, epochs, places):
    model = folder / "roberta-tiny"
    row = dataclasses.replace(PAPER.rows[name], length=3, batch=2, epochs=epochs, rate=rate, dropout=0.0)
    result = toy_tasks.go(PAPER, row, folder / "data", tmp_path, model, **SMALL)
    metrics = result["metrics"]
    whole = sum(x.size for x in jax.tree.leaves(models.load(model).params))
    assert result["trainable"] == (trainable or whole + HEAD) and result["row"] == name
    assert result["train"]["places"] == places >= result["train"]["tokens"] > 0
    assert result["evaluate"]["places"] >= result["evaluate"]["tokens"] > 0
    # The sets are one: it is learnt.
    assert 1 <= metrics["epoch"] <= epochs and metrics["score"] == metrics["exact"] == 100


def test_choices_are_scored_together():
    logits = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    forward = pj.Forward(lambda params, inputs, ports: params[inputs.tokens[:, 0]])
    batch = {"tokens": np.arange(6, dtype=np.int32).reshape(3, 2, 1), "labels": np.array([0, 1, 1], np.int32)}
    total, count = tasks.choice_loss(forward, jnp.asarray(logits), batch)
    scores = torch.tensor(logits[:, 0]).reshape(3, 2)
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1, 1]))
    assert float(total / count) == pytest.approx(float(expected), rel=1e-5)
    assert tasks.choice(forward, jnp.asarray(logits), batch).tolist() == scores.argmax(1).tolist()


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not there: give the folder of superglue, CoNLL03 and so on"):
        PAPER.load(PAPER.settings, None, str(tmp_path / "none"))
    task = PAPER.load(PAPER.settings, str(tmp_path / "headed"), str(folder / "data"))
    model = models.load(folder / "roberta-tiny", head="classification", labels=2)
    plain = jax.tree.map(
        lambda w: w.value if isinstance(w, Unfrozen) else w, model.params, is_leaf=pj.weights.is_weight
    )
    models.save(tmp_path / "headed", model, plain)
    with pytest.raises(ValueError, match="has a head of its own: give a pretrained model"):
        PAPER.run(task, PAPER.settings, PAPER.rows["rte-full"], 0)
