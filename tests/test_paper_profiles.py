"""The paper profiles of P-tuning v2 and of prompt tuning: their numbers, and runs on tiny models and files."""

import dataclasses
import json

import jax
import pytest
import test_conll
import test_squad
import test_superglue
import torch
import toy_tokenizer
import transformers

from experiments import harness, p_tuning_v2_paper, superglue
from experiments.harness import Table
from peft_jax import models

PAPER = p_tuning_v2_paper.PAPER
pytestmark = pytest.mark.usefixtures("quick_compiles")


# -- P-tuning v2 ------------------------------------------------------------------------------------------------------


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
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.RobertaModel(config).save_pretrained(folder / "roberta-tiny")
    toy_tokenizer.roberta().save_pretrained(folder / "roberta-tiny")
    data = folder / "data"
    (data / "superglue").mkdir(parents=True)
    (data / "squad").mkdir()
    (data / "CoNLL03").mkdir()
    for task in ("rte", "copa"):
        line = test_superglue.LINES[task]
        both = [line | {"label": label} for label in (superglue.LABELS[task] if task == "rte" else (0, 1))]
        for split in ("train", "val"):
            test_superglue.write(data / "superglue", task, split, both * 2)
    for name in ("train", "valid", "test"):
        (data / "CoNLL03" / f"{name}.txt").write_text(test_conll.CONLL03)
    for name in ("train", "dev"):
        test_squad.file(data / "squad" / f"{name}-v2.0.json")
    return folder


def table(**rows):
    """The profile with small settings and the rows that are named, each changed."""
    settings = dataclasses.replace(PAPER.settings, pair=64, sentence=64, window=40, stride=4, evaluated=3)
    changed = [dataclasses.replace(PAPER.rows[name.replace("_", "-", 1)], **to) for name, to in rows.items()]
    part = harness.Part("", tuple(changed), {row.name: {} for row in changed})
    profile = dataclasses.replace(PAPER, settings=settings, parts=(part,), seeds=(0,))
    return Table("p_tuning_v2_tasks", "", "", {"paper": profile})


def go(folder, tmp_path, **rows):
    small = table(**{name: {"length": 3, "batch": 2, "epochs": 2} | to for name, to in rows.items()})
    sources = {"model": str(folder / "roberta-tiny"), "data": str(folder / "data")}
    paths = harness.run(small, "paper", dirty=True, results=tmp_path, say=lambda words: None, **sources)
    return [json.loads(path.read_text()) for path in paths]


def test_each_method_runs_on_a_pair(folder, tmp_path):
    found = go(folder, tmp_path, rte_full={"rate": 1e-3}, rte_prompt={"rate": 0.1}, rte_p_tuning_v2={})
    head = 32 * 32 + 32 + 32 * 2 + 2
    whole = sum(x.size for x in jax.tree.leaves(models.load(folder / "roberta-tiny").params))
    assert [result["trainable"] for result in found] == [whole + head, 3 * 32 + head, 2 * 2 * 3 * 32 + head]
    for result in found:
        soft = 3 if result["row"] == "rte-prompt" else 0
        assert result["train"]["places"] == 2 * 2 * 2 * (64 + soft)
        assert result["evaluate"]["places"] == 3 * 4 * (64 + soft)  # two epochs, and the best again
        assert result["metrics"]["epoch"] in (1, 2) and result["config"]["model"] == "roberta-tiny"
        assert result["metrics"]["score"] == result["metrics"]["exact"] in (0, 50, 100)


def test_the_other_kinds_of_tasks_run(folder, tmp_path):
    names = ("copa_p_tuning_v2", "conll03_p_tuning_v2", "squad2.0_p_tuning_v2")
    copa, conll03, squad = go(folder, tmp_path, **{name: {"batch": 2, "epochs": 1} for name in names})
    assert copa["train"]["places"] == 2 * 2 * 2 * 64 and copa["metrics"]["score"] in (0, 50, 100)
    assert conll03["trainable"] == 2 * 2 * 3 * 32 + 32 * 6 + 6 and 0 <= conll03["metrics"]["score"] <= 100
    assert squad["trainable"] == 2 * 2 * 3 * 32 + 32 * 2 + 2
    assert 0 <= squad["metrics"]["exact"] <= squad["metrics"]["score"] <= 100
