"""Where arrays lie on a mesh, what devices say to each other, and that they compute what one device does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
import zoo
from checks import close
from zoo import KEY

import peft_jax as pj
from peft_jax import methods, models, quant, sharding, trees
from peft_jax.models.families import family
from peft_jax.training import State, make_step

pytestmark = pytest.mark.usefixtures("quick_compiles")


# -- the rules --------------------------------------------------------------------------------------------------------


def abstract(config: Any, **options: Any) -> tuple[Any, pj.Forward]:
    module = family(config.model_type)
    return jax.eval_shape(lambda key: module.init(key, config, **options), KEY), module.build(config)


LLAMA3 = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_a_llama_s_weights_lie_as_the_page_says() -> None:
    params, forward = abstract(transformers.LlamaConfig(**LLAMA3, tie_word_embeddings=False))
    found = trees.leaves(sharding.shardings(params, forward, sharding.mesh(fsdp=4, tensor=2)))
    specs = {"/".join(path[-2:]): tuple(x.spec) for path, x in found.items()}
    columns, rows = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
    assert specs == {
        "embed_tokens/embedding": ("tensor", "fsdp"),
        "lm_head/kernel": ("fsdp", "tensor"),
        "norm/scale": (None,),
        "input_layernorm/scale": (None, None),
        "post_attention_layernorm/scale": (None, None),
        **{f"{name}_proj/kernel": columns for name in ("q", "k", "v", "gate", "up")},
        **{f"{name}_proj/kernel": rows for name in ("o", "down")},
    }
    eighth = sum(np.prod(s.shard_shape(params_leaf.shape)) for s, params_leaf in zip(*map(jax.tree.leaves, (found, params)), strict=True))
    assert eighth == pytest.approx(sum(x.size for x in jax.tree.leaves(params)) / 8, rel=1e-3)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_every_family_s_matrices_are_split_both_ways(name: str) -> None:
    """What ends a block takes its inputs from what the block's other kernels put out: these are split alike."""
    placed = sharding.shardings(zoo.base(name), zoo.build(name), sharding.mesh(fsdp=4, tensor=2))
    ends = 0
    for path, x in trees.leaves(placed).items():
        if path[-1] not in ("kernel", "embedding"):
            assert x.is_fully_replicated
            continue
        if zoo.base(name) is not None and min(trees.leaves(zoo.base(name))[path].shape[-2:]) >= 16:
            assert {"fsdp", "tensor"} <= set(x.spec), path
            outside = path[-1] == "kernel" and x.spec[-1] == "fsdp"
            ends += outside
    blocks = {"t5": 5, "bart": 5}
    assert ends == blocks.get(name, 2), "an attention's and an MLP's last kernel, for each kind of layer"


@pytest.mark.parametrize("row", zoo.ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_every_leaf_says_how_its_arrays_lie(row: Any) -> None:
    """Of each typed leaf on a matrix, every own array with as many numbers as an axis of it has twice is split."""
    params, forward = row.method(KEY, zoo.base("llama"), zoo.build("llama"))
    mesh = sharding.mesh(fsdp=2, tensor=2, data=2)
    placed = sharding.shardings(params, forward, mesh)
    for path, leaf in trees.leaves(params).items():
        if path[-1] not in ("kernel", "embedding"):
            continue
        layers = leaf.shape[0] if len(leaf.shape) == 3 else 1
        arrays = zip(*map(jax.tree.leaves, (leaf, trees.leaves(placed)[path])), strict=True)
        for x, s in arrays:
            if x.size // layers >= 2 * min(leaf.shape[-2:]):
                assert not s.is_fully_replicated, (path, x.shape)
