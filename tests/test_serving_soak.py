"""The soak, for seconds and on a tiny model: the server of the command line, over loopback."""

import os
from pathlib import Path

import pytest
import toy_tokenizer
import transformers
import zoo

from experiments import soak_serving
from experiments.soak_serving import Answer
from peft_jax import models


@pytest.mark.filterwarnings("ignore:.* is above its own:UserWarning")
def test_a_server_under_bad_load_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy_tokenizer.gpt2()
    sizes = {**zoo.SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    model = models.from_config(transformers.LlamaConfig(**sizes), zoo.KEY)
    models.save(tmp_path / "model", models.Model(model.params, model.forward, model.config, tokenizer))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setattr(soak_serving, "CONTEXT", 96)
    found = soak_serving.soak(tmp_path / "model", seconds=10, clients=6, seed=0, rows=300)
    for kind in ("whole 200", "stream 200", "leave 200", "malformed 400", "wrong 400", "load 200"):
        assert found["answers"].get(kind, 0) > 0, f"no {kind} in {found['answers']}: the soak did not reach it"
    assert found["state"]["adapter_evictions_total"] > 0 and found["state"]["tokens_generated_total"] > 100


def test_what_does_not_hold_is_named() -> None:
    rest = {"requests_running": 0, "requests_waiting": 0, "rows_kv": 0, "rows_free": 7, "rows_adapters": 2}
    rest |= {"rows_prefixes": 1, "rows_total": 10}
    good = [Answer("whole", 200, True)]
    assert soak_serving.faults(good, rest, [100] * 30, 0, 1) == []
    for answers, state, memory, status, words in (
        ([Answer("whole", 500, True, "gone")], rest, [100], 0, "answered with 500, 'gone'"),
        ([Answer("stream", 200, False)], rest, [100], 0, "stream was answered with 200"),
        (good, rest | {"rows_kv": 2}, [100], 0, "requests are left over"),
        (good, rest | {"rows_free": 6}, [100], 0, "rows do not add up"),
        (good, rest, [100] * 20 + [120] * 10, 0, "memory grows"),
        (good, rest, [100], 1, "the server ended with 1"),
    ):
        (fault,) = soak_serving.faults(answers, state, memory, status, 1)
        assert words in fault
