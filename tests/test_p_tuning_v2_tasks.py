"""P-tuning v2's laptop table: its budget, what its ways of tuning train, and runs on a tiny BERT."""

import dataclasses

import jax
import numpy as np
import pytest
import toy_tasks

import peft_jax as pj
from experiments import data, run
from experiments import p_tuning_v2_tasks as table
from experiments.harness import config_of, key_of

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_tasks.minilm(tmp_path_factory.mktemp("data"))


def test_the_laptop_profile_keeps_to_its_budget(capsys):
    profile, s = table.LAPTOP, table.LAPTOP.settings
    pairs = [profile.places(s, row) for row in profile.rows.values()]
    assert max(train for train, _ in pairs) <= 100_000 and max(read for _, read in pairs) <= 50_000
    seconds = 3 * sum(train / profile.speed.train + read / profile.speed.evaluate for train, read in pairs)
    assert seconds < 25 * 60 and profile.seeds == (0, 1, 2)
    keys = {key_of(config_of(profile, row)) for row in profile.rows.values()}
    assert len(keys) == len(profile.rows) == 25
    figures = {name for part in profile.parts for name in part.figures}
    assert figures < profile.rows.keys() and "squad-p_tuning_v2" in figures
    run.main(["p_tuning_v2_tasks", "--list"])
    assert "\nnews-p_tuning_v2 " in capsys.readouterr().out


# Of two layers, width 16: the heads (BERT's pooler is the model's own), and what is tuned beside them.
HEADS = {"reviews": 16 * 2 + 2, "brown": 16 * 12 + 12, "squad": 16 * 2 + 2}
TUNED = {"frozen": 0, "prompt": 4 * 16, "p_tuning_v2": 2 * 2 * 4 * 16, "lora": 2 * 2 * 2 * (2 * 16)}
ROWS = [("reviews", "frozen"), ("reviews", "lora"), ("brown", "p_tuning_v2"), ("squad", "prompt"), ("squad", "full")]


@pytest.mark.parametrize(("name", "way"), ROWS)
def test_ways_train_what_they_say(folder, monkeypatch, name, way):
    monkeypatch.setattr(data, "DATA", folder)
    s = dataclasses.replace(table.Laptop(), words=(3, 200), evaluated=3)
    (task,) = (task for task in table.TASKS if task.name == name)
    task = dataclasses.replace(task, length=56, batch=4, steps=2, held_out=4)
    (chosen,) = (w for w in table.WAYS if w.name == way)
    row = table.Row(task, dataclasses.replace(chosen, size=2 if way == "lora" else 4))
    tasks = table.load(s, None, None, (task,))
    model, plain = tasks.models[task], table.read(tasks.source, task, tasks.data[task].labels, 0).params
    everything = pj.count(pj.strip(plain)).frozen

    params, _ = table.method_of(row.way, s, "bert")(jax.random.key(0), plain, model.forward)
    entries = {key for key, part in pj.partition(params)[0].items() if jax.tree.leaves(part)}
    assert (
        entries
        == {"qa_outputs" if name == "squad" else "classifier"}
        | {
            "full": {"bert"},
            "frozen": set(),
            "prompt": {"ports"},
            "p_tuning_v2": {"ports"},
            "lora": {"bert"},
        }[way]
    )

    first, other = (table.run(tasks, s, row, seed) for seed in (0, 1))
    assert first.metrics["loss"] != other.metrics["loss"]
    assert table.stepping(model, row, s)[3]._cache_size() == 1  # seeds share one program
    assert first.trainable == (everything if way == "full" else HEADS[name] + TUNED[way])
    assert first.total == everything + TUNED.get(way, 0)
    assert (first.train.places, first.evaluate.places) == table.places(s, row)
    assert first.train.places == 2 * 4 * (60 if way == "prompt" else 56) > first.train.tokens > 0
    measures = {m.name for m in table.TITLES[name][2]}
    assert first.metrics.keys() == measures and np.isfinite(list(first.metrics.values())).all()


def test_other_data_is_refused():
    with pytest.raises(ValueError, match="fetches: leave --data out"):
        table.load(table.Laptop(), None, "somewhere")
