"""Off the lattice: the same logits from other weights, and a format that no longer wins by construction."""

import jax
import numpy as np
import pytest
import zoo
from checks import close, differs

from experiments import data, lattice
from peft_jax import models
from peft_jax.models.loading import Model


@pytest.mark.parametrize(("family", "scan"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_the_same_logits_from_other_weights(family: str, scan: bool) -> None:
    base = zoo.base(family) if scan else zoo.unrolled(zoo.base(family))
    model = Model(base, zoo.build(family, scan=scan), zoo.CONFIGS[family])
    turned = lattice.off_the_lattice(model, zoo.KEY)
    found = jax.jit(turned.forward)(turned.params, zoo.TOKENS)
    close(found, jax.jit(model.forward)(model.params, zoo.TOKENS), rtol=1e-4, atol=1e-4)
    assert not turned.config.tie_word_embeddings and (turned.params["model"]["norm"]["scale"] == 1).all()
    assert differs(turned.params["model"]["embed_tokens"]["embedding"], base["model"]["embed_tokens"]["embedding"], 0.1)


def test_rotations_are_orthogonal() -> None:
    r = lattice.rotation(jax.random.key(3), 24)
    close(r @ r.T, np.eye(24), atol=1e-5)
    assert differs(r, lattice.rotation(jax.random.key(4), 24), 0.1)


def test_smollm2_leaves_its_grid() -> None:
    model = models.load(data.smollm2())
    turned = lattice.off_the_lattice(model, jax.random.key(0))
    text = model.tokenizer(["The capital of France is Paris, and that of Italy is Rome."])["input_ids"]
    tokens = np.array(text, np.int32)
    before, after = (np.asarray(jax.jit(m.forward)(m.params, tokens)) for m in (model, turned))
    assert np.abs(before - after).max() / np.abs(before).max() < 1e-4
    # On the file's grid, 32 inputs of an output have 16 values or fewer; off it, each has its own.
    for params, most in ((model.params, 16), (turned.params, 32)):
        kernel = np.asarray(params["model"]["layers"]["mlp"]["up_proj"]["kernel"][3])
        groups = np.sort(kernel.reshape(-1, 32, kernel.shape[-1])[:, :, :50], axis=1)
        assert (1 + (np.diff(groups, axis=1) > 1e-7).sum(1)).max() == most


def test_another_family_is_refused() -> None:
    model = Model(zoo.base("gpt2"), zoo.build("gpt2"), zoo.CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="gpt2 is not of the Llama family"):
        lattice.off_the_lattice(model, zoo.KEY)
