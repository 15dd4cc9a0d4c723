"""The tables of the LoRA family on encoders: their budgets, what their rows train, and runs on a tiny BERT."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import torch
import toy_tasks
import transformers
from matplotlib import pyplot

from experiments import adalora_ablation, data, dylora_ranks, encoder_runs, lora_family, run, vera_ablation
from experiments.harness import config_of, key_of

pytestmark = pytest.mark.usefixtures("quick_compiles")
MODULES = (lora_family, dylora_ranks, adalora_ablation, vera_ablation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_tasks.minilm(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _small(folder, monkeypatch):
    monkeypatch.setattr(data, "DATA", folder)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[1])
def test_the_laptop_profiles_keep_to_their_budgets(module, capsys):
    profile = module.LAPTOP
    assert profile.seeds == (0, 1, 2)
    pairs = {name: profile.places(profile.settings, row) for name, row in profile.rows.items()}
    assert max(train for name, (train, _) in pairs.items() if name != "lora-each") <= 60_000
    seconds = 3 * sum(t / profile.speed.train + e / profile.speed.evaluate for t, e in pairs.values())
    assert seconds < 23 * 60
    assert len({key_of(config_of(profile, row)) for row in profile.rows.values()}) == len(profile.rows)
    assert all(part.figures.keys() <= profile.rows.keys() for part in profile.parts)
    run.main([module.TABLE.name, "--list"])
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed for name in profile.rows)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_rate_is_transformers(decay):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=4e-3)
    schedule = transformers.get_scheduler(decay, optimiser, num_warmup_steps=3, num_training_steps=50)
    expected = []
    for _ in range(50):
        expected.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    found = encoder_runs.rising(4e-3, 50, 0.06, decay)
    np.testing.assert_allclose([float(found(step)) for step in range(50)], expected, rtol=1e-5, atol=1e-9)


def small(task, steps):
    return dataclasses.replace(task, length=40, batch=4, steps=steps, held_out=4)


# Of two layers, width 16, inner width 24: a head of 2 labels, and what trains beside it.
SIX = 4 * (16 + 16) + 2 * (16 + 24)
TRAINED = {
    "bitfit": 2 * (5 * 16 + 24 + 2 * 16) + 2 * 16,
    "adalora": 2 * 3 * (SIX + 6),
}
SIZES = {"bitfit": 0, "adalora": 2}


@pytest.mark.parametrize("way", list(TRAINED))
def test_ways_train_what_they_say(folder, monkeypatch, way):
    task = small(lora_family.TASKS[0], 8)
    monkeypatch.setattr(lora_family, "TASKS", (task,))
    s = dataclasses.replace(lora_family.LAPTOP.settings, evaluated=4)
    tasks = lora_family.load(s, None, None)
    row = lora_family.Row(task, way, SIZES[way], lora_family.RATES[way])
    first, other = (lora_family.run(tasks, s, row, seed) for seed in (0, 1))
    assert first.trainable - (16 * 2 + 2) == TRAINED[way]
    assert first.metrics != other.metrics and np.isfinite(list(first.metrics.values())).all()
    assert lora_family.compiled(tasks.models[task], s, row).step._cache_size() == 1  # seeds share one program
    assert (first.train.places, first.evaluate.places) == lora_family.LAPTOP.places(s, row)
    with pytest.raises(ValueError, match="fetches: leave --data out"):
        lora_family.load(s, None, "somewhere")


def test_the_head_has_a_rate_of_its_own():
    s = dataclasses.replace(encoder_runs.Laptop(), head_rate=0.5, warmup=0.0)
    tx = encoder_runs.adam(s, 0.01, 10)
    params = {"bert": {"a": np.ones(2, np.float32)}, "classifier": {"b": np.ones(3, np.float32)}}
    with jax.numpy_dtype_promotion("standard"):  # as the training step does
        updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["bert"]["a"], -0.01, rtol=1e-4)
    np.testing.assert_allclose(updates["classifier"]["b"], -0.5, rtol=1e-4)


# -- every rank from one run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dylora-frozen", "lora-each"])
def test_every_run_is_measured_at_every_rank(folder, monkeypatch, name):
    monkeypatch.setattr(dylora_ranks, "RANKS", (1, 2))
    s = dataclasses.replace(dylora_ranks.LAPTOP.settings, evaluated=4)
    s = dataclasses.replace(s, task=small(s.task, 3))
    tasks, row = dylora_ranks.load(s, None, None), dylora_ranks.Row(name)
    outcome = dylora_ranks.run(tasks, s, row, 0)
    assert {n for n in outcome.metrics if n.startswith("loss")} == {"loss 1", "loss 2"}
    assert outcome.metrics["loss 1"] != outcome.metrics["loss 2"]
    assert outcome.trainable == 16 * 2 + 2 + 2 * 2 * 2 * (16 + 16)
    assert (outcome.train.places, outcome.evaluate.places) == dylora_ranks.places(s, row)
    assert outcome.metrics["seconds"] == outcome.train.seconds > 0
    figure, axes = pyplot.subplots()
    dylora_ranks.curves(axes, {name: [outcome.metrics], "lora-cut": []})
    (line,) = axes.get_lines()
    assert line.get_ydata().tolist() == [outcome.metrics[f"accuracy {rank}"] for rank in (1, 2)]
    pyplot.close(figure)


# -- where the ranks go -----------------------------------------------------------------------------------------------


def test_adaloras_budget_is_kept_and_drawn(folder):
    s = dataclasses.replace(adalora_ablation.LAPTOP.settings, evaluated=4, every=1)
    s = dataclasses.replace(s, task=small(s.task, 12))
    tasks = adalora_ablation.load(s, None, None)
    outcome = adalora_ablation.run(tasks, s, adalora_ablation.LAPTOP.rows["full"], 0)
    ranks = {n: value for n, value in outcome.metrics.items() if n.startswith("rank")}
    assert len(ranks) == 2 * 6 and sum(ranks.values()) == 2 * len(ranks) and max(ranks.values()) == 3
    figure, axes = pyplot.subplots()
    adalora_ablation.heat("full").draw(axes, {"full": []})  # not run yet
    assert not axes.get_images()
    adalora_ablation.heat("full").draw(axes, {"full": [outcome.metrics]})
    (image,) = axes.get_images()
    assert image.get_array().shape == (6, 2) and image.get_array()[5, 1] == ranks["rank 1 f2"]
    pyplot.close(figure)


# -- VeRA's vectors ---------------------------------------------------------------------------------------------------


def test_one_vector_alone_moves(folder):
    s = dataclasses.replace(vera_ablation.LAPTOP.settings, evaluated=4)
    s = dataclasses.replace(s, task=small(s.task, 3))
    row = dataclasses.replace(vera_ablation.LAPTOP.rows["only-d"], rank=8)
    tasks = vera_ablation.load(s, None, None)
    outcome = vera_ablation.run(tasks, s, row, 0)
    assert outcome.trainable == 16 * 2 + 2 + 2 * 2 * 8 and math.isfinite(outcome.metrics["loss"])
    made = vera_ablation.compiled(tasks.models[s.task], s, row)
    learnt = encoder_runs.learn(tasks, s.task, made, 0, functools.partial(vera_ablation.begun, only="d"))
    for leaf in vera_ablation.leaves(learnt.params):
        assert np.ptp(leaf.d) > 0
        np.testing.assert_array_equal(leaf.b, np.ones(leaf.b.shape, np.float32))
