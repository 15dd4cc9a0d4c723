"""The prompt-tuning table: its budget, what its rows train, and runs of two steps on the real model."""

import dataclasses

import numpy as np
import pytest

import peft_jax as pj
from experiments import prompt_ablation as table
from experiments import sentiment
from experiments.harness import config_of, key_of


def test_the_laptop_profile_keeps_to_its_budget() -> None:
    profile, s = table.LAPTOP, table.LAPTOP.settings
    pairs = [profile.places(s, row) for row in profile.rows.values()]
    assert max(train for train, _ in pairs) <= 20_000
    assert max(read for _, read in pairs) <= 24_000  # the probe reads its training reviews too
    assert len(profile.seeds) >= 3
    keys = {key_of(config_of(profile, row)) for row in profile.rows.values()}
    assert len(keys) == len(profile.rows) == 11


def test_rows_do_what_their_names_say() -> None:
    s = dataclasses.replace(table.LAPTOP.settings, steps=1, held_out=8)
    task = sentiment.prepare(s, None, None)
    rows = table.LAPTOP.rows
    shown = table.examples(task, 4, seed=1)
    text = task.model.tokenizer.decode(shown)
    assert text.count("Review:") == 4 and text.count("positive\n") + text.count("negative\n") == 4
    assert table.examples(task, 4, seed=2) != shown

    ran = {name: table.run(task, s, rows[name], 0) for name in ("uniform-8", "shots-4", "shots-0", "probe")}
    assert {name: outcome.trainable for name, outcome in ran.items()} == {
        "uniform-8": 8 * 576,
        "shots-4": 0,
        "shots-0": 0,
        "probe": 2 * 576 + 2,
    }
    for name, outcome in ran.items():
        assert outcome.total - outcome.trainable == pj.count(task.model.params).frozen, name
        assert np.isfinite(list(outcome.metrics.values())).all()
        assert (outcome.train.places, outcome.evaluate.places) == table.places(s, rows[name])
    assert ran["shots-4"].metrics["loss"] < ran["shots-0"].metrics["loss"]  # the examples show which words answer
    with pytest.raises(ValueError, match="leave --data out"):
        sentiment.prepare(s, None, "somewhere")
