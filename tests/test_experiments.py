"""The experiment harness and the rendering of tables, on a toy table; the checked-in tables."""

import dataclasses
import json
import re
import statistics
import subprocess
import sys

import jax
import numpy as np
import pytest
from toy_table import Row, Settings, toy

import peft_jax as pj
from experiments import harness, tables


@pytest.fixture
def repository(tmp_path):
    """A git repository with one commit and nothing else in it."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "code.py").write_text("answer = 42\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True)
    return root


@pytest.fixture
def go(repository):
    """``go(table)`` runs a table in the repository; its results go where they belong."""

    def go(table, **options):
        said = []
        options = {"results": repository / "experiments" / "results", "say": said.append} | options
        return harness.run(table, "laptop", root=repository, **options), "\n".join(said)

    return go


def test_a_result_says_what_made_it(go, repository):
    written, said = go(toy(), seeds=(2,), only=("wide",))
    (path,) = written
    result = json.loads(path.read_text())
    here = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout.strip()
    assert path.relative_to(repository).as_posix() == f"experiments/results/toy/laptop/wide.2.{path.name[7:15]}.json"
    assert path.stat().st_size < 2000
    assert (result["commit"], result["dirty"], result["seed"], result["row"]) == (here, False, 2, "wide")
    assert result["config"] == {**dataclasses.asdict(Settings()), "row": {"name": "wide", "width": 3}}
    assert result["versions"]["jax"] == jax.__version__ and result["versions"]["peft_jax"] == pj.__version__
    assert result["metrics"] == {"score": pytest.approx(30 + 2 / 3), "loss": pytest.approx(1 / 3)}
    assert result["train"] == {"tokens": 300, "places": 400, "seconds": 2.0} and result["trainable"] == 24
    assert result["peak_bytes"] > 1e8 and result["seconds"] > 0 and result["total"] == 100
    assert "estimate: 1 runs, 400 training + 100 evaluation places: about 0 minutes at 200 and 50 a second" in said


def test_finished_runs_are_skipped_until_the_configuration_changes(go):
    calls = []
    assert len(go(toy(calls=calls), seeds=(0, 1))[0]) == 4
    written, said = go(toy(calls=calls))
    assert calls == [("narrow", 0), ("narrow", 1), ("wide", 0), ("wide", 1), ("narrow", 2), ("wide", 2)]
    assert "at 200 and 400 a second (measured in 4 runs)" in said and len(written) == 2
    assert go(toy(calls=calls)) == ([], "toy, laptop: 6 of 6 runs are finished") and len(calls) == 6
    assert len(go(toy(calls=calls, steps=5))[0]) == 6
    assert len(go(toy(calls=calls), model="/some/where/else.gguf", seeds=(0,))[0]) == 2
    assert len(go(toy(calls=calls), model="/some/where/toy-model", seeds=(0,))[0]) == 0


def test_what_an_uncommitted_tree_gives_is_refused_or_marked(go, repository):
    (repository / "code.py").write_text("answer = 43\n")
    with pytest.raises(
        ValueError, match=r"the tree differs from commit \w{12} \(code.py\): commit first, or .*--dirty"
    ):
        go(toy())
    assert json.loads(go(toy(), seeds=(0,), only=("wide",), dirty=True)[0][0].read_text())["dirty"]
    results = repository / "experiments" / "results"
    with pytest.raises(ValueError, match=r"wide.0.\w+.json comes from an uncommitted tree"):
        tables.update([toy()], results, repository / "README.md")
    (repository / "code.py").write_text("answer = 42\n")  # clean again, results apart: the marked one is not finished
    assert len(go(toy())[0]) == 6
    assert harness.commit(repository.parent)[0] == "unknown"


def test_a_killed_run_is_run_again(repository, go):
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(harness.ROOT / "tests")!r})
import toy_table as here
from experiments import harness
from pathlib import Path
def dies(task, settings, row, seed):
    if (row.name, seed) == ("wide", 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return here.outcome(task, settings, row, seed)
root = Path({str(repository)!r})
harness.run(here.toy(dies), "laptop", root=root, results=root / "experiments" / "results")
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=harness.ROOT, capture_output=True).returncode == -9
    calls = []
    go(toy(calls=calls))
    assert calls == [("wide", 1), ("wide", 2)]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "results" / "a.json"
    harness.write(path, {"a": 1})

    def half(part):
        part.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        harness.whole(path, half)
    assert json.loads(path.read_text()) == {"a": 1}


def test_bad_requests_say_what_there_is(go, tmp_path):
    with pytest.raises(ValueError, match=r"toy has no row 'tall' in laptop: narrow, wide"):
        go(toy(), only=("tall",))
    with pytest.raises(ValueError, match="no table 'nothing': choose from lora_ablation"):
        harness.find("nothing")
    (path,) = go(toy(), seeds=(0,), only=("wide",))[0]
    good = path.read_text()
    path.write_text(good.replace('"wide"', '"other"', 1))
    with pytest.raises(ValueError, match="holds another run's result"):
        go(toy())
    path.write_text(good[:40])
    with pytest.raises(ValueError, match="is not a result: delete it"):
        go(toy())


def test_steps_that_are_not_finite_stop_a_run():
    step = lambda state, frozen, batch: (state, {"finite": np.array(batch["tokens"][0, 0] < 2)})  # noqa: E731
    batch = lambda i: {"tokens": np.full((2, 3), i), "mask": np.array([[1, 1, 0], [1, 0, 0]], bool)}  # noqa: E731
    assert harness.train(step, np.zeros(1), None, batch, 2)[1][:2] == (6, 12)
    with pytest.raises(FloatingPointError, match="diverges"):
        harness.train(step, np.zeros(1), None, batch, 3)


# -- tables -----------------------------------------------------------------------------------------------------------


def test_tables_say_what_the_results_say(go, repository):
    results, readme = repository / "experiments" / "results", repository / "README.md"
    readme.write_text("# Title\n<!-- table:toy -->\nold\n<!-- /table -->\nend\n")
    assert len(tables.update([toy()], results, readme)) == 1 and "No results yet.\n<!-- /table" in readme.read_text()
    go(toy(), seeds=(0, 1))
    go(toy(), seeds=(2,), only=("narrow",))
    assert len(tables.update([toy()], results, readme, check=True)) == 3 and not (results / "toy/laptop.md").exists()
    tables.update([toy()], results, readme)
    text = (results / "toy" / "laptop.md").read_text()
    assert "**Incomplete**: 1 of 6 runs are missing (wide, seed 2)." in text
    mean, deviation = statistics.mean([10, 10 + 1 / 3, 10 + 2 / 3]), np.std([0, 1 / 3, 2 / 3], ddof=1)
    assert re.search(rf"\| narrow \| 8 \| {mean:.1f} ± {deviation:.1f} \| 1.000 ± 0.000 \|.*\| 88.0 \|\n", text)
    assert re.search(r"\| wide \(paper: wider\) \(2 of 3 seeds\) \| 24 \| 30.2 ± 0.2 \|.*\| 89.5 \|\n", text)
    image = "experiments/results/toy/laptop.png"
    assert readme.read_text().count("<!--") == 2 and f"![A toy]({image})" in readme.read_text()
    assert (repository / image).read_bytes().startswith(b"\x89PNG")
    assert tables.update([toy()], results, readme, check=True) == []

    path = next((results / "toy" / "laptop").glob("wide.1.*.json"))
    path.write_text(path.read_text().replace("30.333333", "30.433333"))
    stale = tables.update([toy()], results, readme, check=True)
    assert [message.split(":")[0].rsplit("/")[-1] for message in stale] == ["laptop.md", "laptop.png", "README.md"]
    for left in (results / "toy" / "laptop").glob("*.json"):
        left.unlink()
    assert "there are no results for it" in tables.update([toy()], results, readme, check=True)[0]
    readme.write_text("<!-- table:other -->\n<!-- /table -->")
    with pytest.raises(ValueError, match="has a place for the table 'other/laptop': choose from toy/laptop"):
        tables.update([toy()], results, readme)


def test_a_part_may_have_measures_of_its_own(go, repository):
    table = toy()
    profile = table.profiles["laptop"]
    first, second = profile.parts
    own = dataclasses.replace(second, rows=(Row("tall", 5),), metrics=(harness.Metric("loss", "regret", 2),))
    table = dataclasses.replace(table, profiles={"laptop": dataclasses.replace(profile, parts=(first, own))})
    _, said = go(table, seeds=(0,))
    assert "wide, seed 0: score, % 30.0, loss, nats 0.333 (" in said and "tall, seed 0: regret 0.20 (" in said
    results = repository / "experiments" / "results"
    tables.update([table], results, repository / "README.md")
    text = (results / "toy" / "laptop.md").read_text()
    assert text.count("| score, % | loss, nats |") == 1 and "| row | trainable | regret | s a run |" in text
    assert "| tall (1 of 3 seeds) | 40 | 0.20 |" in text


def test_a_part_may_have_pictures_of_its_own(go, repository):
    drawn = []
    panel = harness.Panel("curve", lambda axes, found: drawn.append((axes, found)))
    table = toy()
    profile = table.profiles["laptop"]
    parts = (dataclasses.replace(profile.parts[0], panels=(panel,)), profile.parts[1])
    table = dataclasses.replace(table, profiles={"laptop": dataclasses.replace(profile, parts=parts)})
    go(table, seeds=(0, 1))
    tables.update([table], repository / "experiments" / "results", repository / "README.md")
    ((axes, found),) = drawn
    assert axes.get_title() == "curve" and list(found) == ["narrow", "wide"]
    assert [seed["score"] for seed in found["wide"]] == [30.0, pytest.approx(30 + 1 / 3)]


def test_checked_in_tables_are_those_of_their_results(capsys):
    tables.main(["--check"])
    assert "lora_ablation, laptop: " in capsys.readouterr().out
