"""The quantised benchmarks at toy sizes: every side computes, and a machine without a GPU is told so."""

import json
from typing import Any

import jax
import numpy as np
import pytest
import torch

from experiments import bench_kernels, bench_kernels_model, bench_quant


def test_sides_beside_bitsandbytes_agree() -> None:
    for rows in (0, 3):
        calls = bench_quant.sides(128, rows, "float32")
        found: dict[str, Any] = {name: np.asarray(call()) for name, call in calls.items()}
        expected = found["stored"] if not rows else found["bitsandbytes"]
        for name, each in found.items():
            each = each.T if "[in, out]" in name else each
            if not name.startswith("dense"):
                np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-4)
    torch.set_num_threads(1)
    measured = bench_quant.measure(calls, 1)
    assert measured["ratio"]["bitsandbytes"] == 1 and set(measured["ratio"]) == set(calls)


def test_what_was_measured_is_shown() -> None:
    result = json.loads(bench_quant.RESULT.read_text(encoding="utf-8"))
    lines = bench_quant.report(result).splitlines()
    assert sum(line.startswith("| 8 rows, bfloat16 |") for line in lines) == 5
    assert result["commit"][:12] in lines[-1] and not result["dirty"]


def test_kernels_are_measured_at_a_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "FORMATS", {name: bench_kernels.FORMATS[name] for name in ("nf4", "int4")})
    plan = bench_kernels.Plan(64, 96, 1, (8,), 80, 16, 1024, 1, 1, interpret=True)
    result = bench_kernels.measure(plan)
    assert all(row.get("exact", True) and row.get("error", 0) < 1e-2 for row in result["rows"])
    lines = bench_kernels.report(result).splitlines()
    assert sum(line.startswith("| dequantise") for line in lines) == 4
    assert sum(line.startswith("| 8 rows") for line in lines) == 4


def test_without_a_gpu_it_says_so() -> None:
    assert jax.default_backend() == "cpu"
    with pytest.raises(SystemExit, match="for an NVIDIA GPU, and JAX runs on 'cpu' here: install jax"):
        bench_kernels.require_gpu()


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("name", ["qalora-xla", "write-merged-int4-xla"])
def test_a_model_is_measured_at_a_toy_size(name: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    shape = bench_kernels_model.SHAPE | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = bench_kernels_model.ours(name, shape, 2, 16, 4, 2)
    assert found["tokens_per_second"] > 0
    if not name.startswith("write"):
        assert found["losses"][-1] < found["losses"][0]
