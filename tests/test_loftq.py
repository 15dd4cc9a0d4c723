"""LoftQ: HF PEFT's own numbers, and a start nearer to the weight than the quantised base alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import zoo
from checks import close, same
from peft.utils import loftq_utils

import peft_jax as pj
from peft_jax import methods, quant
from peft_jax.quant.loftq import alternate

RANDOM = np.random.RandomState(0)


@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_pefts_own(steps: int, monkeypatch: Any) -> None:
    """PEFT's loop moves everything to a GPU by name: here those moves stay on the CPU."""
    to = torch.Tensor.to
    here = lambda x: "cpu" if isinstance(x, str | torch.device) and str(x).startswith("cuda") else x  # noqa: E731
    stay = lambda self, *args, **options: to(  # noqa: E731
        self, *map(here, args), **{name: here(x) for name, x in options.items()}
    )
    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)
    w = RANDOM.standard_normal((64, 48)).astype(np.float32)
    theirs, lora_a, lora_b = loftq_utils.loftq_init(torch.tensor(w.T.copy()), 4, 4, steps)
    base, a, b = alternate(quant.nf4(double=False), jnp.asarray(w), 4, steps)
    close(pj.materialise(base), theirs.numpy().T, atol=1e-6)
    close(a @ b, (lora_b @ lora_a).numpy().T, atol=1e-4)


def off(leaf: Any, w: jax.Array) -> float:
    return float(jnp.linalg.norm(pj.materialise(leaf) - w))


def test_it_begins_nearer_the_weight() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    w = base["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    form = quant.grouped(2, 16)
    found = [off(form.quantise(w), w)]
    for steps in (1, 2, 5):
        params, adapted = quant.loftq(form, 8, 16, "up_proj", steps=steps)(zoo.KEY, base, forward)
        leaf = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
        found.append(off(leaf, w))
    assert found[1] < 0.8 * found[0] and max(found[2:]) < found[1]
    assert pj.count(params).trainable == zoo.LAYERS * zoo.low_rank(8, zoo.UP)
    assert same(pj.strip(params)["model"]["layers"]["mlp"]["up_proj"]["kernel"], leaf.base)
    # The last step quantised what an adapter of its own had left, which is not the weight.
    assert off(leaf.base, w) > found[0]
    plain, _ = pj.chain(quant.quantise(form, "up_proj"), methods.lora(8, 16, "up_proj"))(zoo.KEY, base, forward)
    wanted = zoo.compiled("llama")(base, zoo.TOKENS)
    losses = [float(jnp.abs(jax.jit(adapted)(p, zoo.TOKENS) - wanted).mean()) for p in (params, plain)]
    assert losses[0] < losses[1]
    scaled = pj.set_scale(params, 0.0)["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    close(pj.materialise(scaled), pj.materialise(leaf.base))


def test_errors_name_what_is_wrong() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    with pytest.raises(ValueError, match="steps is 0: give how often"):
        quant.loftq(quant.nf4(), steps=0)
    with pytest.raises(ValueError, match=r"k_proj/kernel is \(32, 16\): it has no 17 directions"):
        quant.loftq(quant.nf4(16), 17, select="k_proj")(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match="q_proj/kernel is adapted already"):
        pj.chain(methods.lora(2), quant.loftq(quant.nf4(16), 2, select="q_proj"))(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match="down_proj/kernel: 48 inputs are not a whole number of groups"):
        quant.loftq(quant.grouped(4, 32), 2, select="down_proj")(zoo.KEY, base, forward)
