"""Models that know nothing of this library, bridged: Linen, NNX, Equinox, and our own Llama as a plain function."""

import re
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers as tf
from bridging import check, shaken
from checks import close, same
from flax import nnx

import peft_jax as pj
from peft_jax import methods, models, quant, training

IDS = jax.random.randint(jax.random.key(3), (2, 6), 0, 24)
WIDTH, HEADS = 16, 2


# -- Linen: the shapes of flax's own language model --------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention and MLP; `nn.scan` wants a carry and something that it may stack."""

    @nn.compact
    def __call__(self, x: Any, mask: Any) -> Any:
        h = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(h, h, mask=mask)
        h = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.DenseGeneral(WIDTH, name="down")(h), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, ids: Any) -> Any:
        embed = nn.Embed(24, WIDTH, name="embed")
        x = embed(ids) + nn.Embed(8, WIDTH, name="place")(jnp.arange(ids.shape[1]))[None]
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=2
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(ids))
        return embed.attend(nn.LayerNorm(name="norm")(x))


MODULE = LinenModel()


def linen(params: Any, ids: Any) -> Any:
    return MODULE.apply({"params": params}, ids)


@pytest.fixture(scope="module")
def linen_params() -> Any:
    params, random = jax.jit(MODULE.init)(jax.random.key(0), IDS)["params"], np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(x + np.float32(0.05) * random.normal(size=x.shape).astype("f")), params)


MATRICES = "embed$|attention|up|down"
METHODS = {
    "lora, one layer": methods.lora(2, select=r"layers\.1\..*(query|up)$"),
    "dylora": methods.dylora(2, select=MATRICES),
    "adalora": methods.adalora(2, select=MATRICES),
    "vera": methods.vera(4, MATRICES),
    "nf4": pj.chain(
        quant.quantise(quant.nf4(block_size=16), "attention|up|down"),
        methods.lora(2, select=MATRICES),
        methods.unfreeze(r"norm|\.bias$"),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_linen(name: str, linen_params: Any, quick_compiles: None) -> None:
    compare = check if name == "nf4" else check_outputs  # a gradient is the leaf's own affair
    adapted, _ = compare(linen, linen_params, (IDS,), METHODS[name])
    assert jax.tree.map(jnp.shape, pj.merge(adapted)) == jax.tree.map(jnp.shape, linen_params)
    if name != "nf4":
        assert same(pj.strip(adapted), linen_params)


def check_outputs(function: Any, params: Any, inputs: Any, method: pj.Method) -> tuple[Any, Any]:
    adapted, forward = method(jax.random.key(1), *pj.bridge(function).traced(params, *inputs))
    adapted = shaken(adapted)
    close(jax.jit(forward)(adapted, *inputs), jax.jit(function)(pj.merge(adapted), *inputs))
    return adapted, forward


def test_it_trains_saves_and_resumes(quick_compiles: None, tmp_path: Path) -> None:
    params = {
        "table": {"embedding": jax.random.normal(jax.random.key(0), (24, WIDTH))},
        "mix": {"kernel": jnp.eye(WIDTH)},
    }

    def function(params: Any, tokens: Any, mask: Any) -> Any:
        x = params["table"]["embedding"][tokens] * mask[..., None]
        return jnp.tanh(x @ params["mix"]["kernel"]) @ params["table"]["embedding"].T

    method = pj.chain(methods.lora(2, select="table", dropout=0.1), methods.unfreeze("mix"))
    adapted, forward = method(jax.random.key(0), params, pj.bridge(function, spec=pj.Spec(vocab=24)))
    tx = pj.freeze(optax.adamw(3e-2), adapted)
    ones = jnp.ones(IDS.shape, jnp.float32)
    batch = {"tokens": IDS, "targets": jnp.roll(IDS, -1, 1), "weights": ones, "mask": ones}
    options: Any = {"batches": lambda step: batch, "checkpoints": tmp_path, "progress": False}
    first = training.fit(forward, adapted, tx, steps=4, **options)
    run = training.fit(forward, adapted, tx, steps=6, **options)
    assert run.step == 6 and run.history[:4] == first.history  # it went on from the fourth
    assert run.history[-1]["loss"] < first.history[0]["loss"] - 0.1
    assert same(pj.strip(run.params), params)
    close(forward(run.params, IDS, ones), function(pj.merge(run.params), IDS, ones), 1e-4, 1e-4)
    with pytest.raises(ValueError, match="token id 24 is outside the vocabulary"):
        forward(adapted, pj.Inputs(IDS + 24 - IDS.max(), mask=ones))


# -- NNX and Equinox ---------------------------------------------------------------------------------------------------


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(24, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.0, rngs=rngs)
        self.up = nnx.LinearGeneral(WIDTH, (2, 12), rngs=rngs)
        self.down = nnx.LinearGeneral((2, 12), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        x = self.embed(ids)
        x = x + self.drop(self.attention(self.norm(x), mask=nnx.make_causal_mask(ids)))
        return self.embed.attend(x + self.down(nnx.silu(self.up(x))))


def test_nnx(quick_compiles: None) -> None:
    graph, params, rest = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param, ...)
    forward = lambda params, ids: nnx.merge(graph, params, rest)(ids)  # noqa: E731
    method = methods.lora(2, select="embed|attention|up|down")
    adapted, _ = check_outputs(forward, nnx.to_pure_dict(params), (IDS,), method)
    weights = {w for w, leaf in pj.trees.leaves(adapted).items() if pj.trees.is_weight(leaf)}
    assert {path[-2] for path in weights} == {"embed", "query", "key", "value", "out", "up", "down"}
    # nnx.State is a tree too: its leaves are called ….value.
    seen, bridged = pj.bridge(forward).traced(params, IDS)
    assert "attention.query" in {name for path in pj.trees.leaves(seen) for name in bridged.spec.names(path)}


class EquinoxBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 24, 1, key=keys[1])

    def __call__(self, x: Any) -> Any:
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((x.shape[0],) * 2, bool)))
        return x + jax.vmap(self.mlp)(x)


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: EquinoxBlock  # two, stacked

    def __init__(self, key: Any) -> None:
        self.embed = eqx.nn.Embedding(24, WIDTH, key=key)
        self.blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(key, 2))

    def __call__(self, ids: Any) -> Any:
        dynamic, static = eqx.partition(self.blocks, eqx.is_array)
        step = lambda x, block: (eqx.combine(block, static)(x), None)  # noqa: E731
        x, _ = jax.lax.scan(step, jax.vmap(self.embed)(ids), dynamic)
        return x @ self.embed.weight.T


def test_equinox(quick_compiles: None) -> None:
    params, static = eqx.partition(EquinoxModel(jax.random.key(0)), eqx.is_array)
    forward = lambda params, ids: jax.vmap(eqx.combine(params, static))(ids)  # noqa: E731
    select = r"attention|mlp|embed"
    adapted, bridged = check(forward, params, (IDS,), methods.lora(2, select=select))
    names = {name for path in pj.trees.leaves(adapted) for name in bridged.spec.names(path)}
    assert {"embed", "blocks.1.attention.query_proj", "blocks.0.mlp.layers.0", "blocks.0.norm.weight"} <= names
    assert adapted.blocks.mlp.layers[0].weight.a.shape == (2, WIDTH, 2)  # Equinox's own array is [layers, out, in]
    assert isinstance(pj.merge(adapted), EquinoxModel)
    # What shares something keeps it in the tree, which is then a dict.
    method = methods.vera(4, select)
    bridged = pj.bridge(lambda params, ids: forward(params["model"], ids))
    adapted, bridged = method(jax.random.key(0), *bridged.traced({"model": params}, IDS))
    assert jax.eval_shape(bridged, adapted, IDS).shape == (2, 6, 24)


def test_the_guide_runs(quick_compiles: None) -> None:
    pages = Path(__file__).parents[1] / "docs" / "bridge.md"
    blocks, names = re.findall(r"```python\n(.*?)```", pages.read_text(), re.DOTALL), dict[str, Any]()
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == (3, 4) and isinstance(names["merged"], eqx.nn.MLP)


# -- against the native model ------------------------------------------------------------------------------------------


def test_flops_and_bits_are_the_native_models() -> None:
    config = tf.LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
        max_position_embeddings=32,
    )
    model = models.from_config(config, jax.random.key(0))
    tokens = jnp.tile(IDS, (1, 2))
    method = methods.lora(2, select="_proj|embed")
    params, native = method(jax.random.key(0), model.params, model.forward)
    params = shaken(params)
    plain = pj.bridge(lambda params, tokens: model.forward(params, tokens))
    ours, bridged = method(jax.random.key(0), *plain.traced(model.params, tokens))
    ours = shaken(ours)
    assert same(jax.tree.leaves(pj.partition(ours)[0]), jax.tree.leaves(pj.partition(params)[0]))  # by names alike

    def programs(forward: Any, params: Any) -> tuple[Any, ...]:
        trained, frozen = pj.partition(params)
        loss = lambda t: jnp.sum(jnp.sin(forward(pj.combine(t, frozen), tokens)))  # noqa: E731
        compiled = jax.jit(jax.value_and_grad(loss)).lower(trained).compile()
        forth = jax.jit(lambda t: forward(pj.combine(t, frozen), tokens)).lower(trained).compile()
        return [c.cost_analysis()["flops"] for c in (forth, compiled)], compiled(trained)

    (flops, (value, gradient)), (wanted, (native_value, native_gradient)) = (
        programs(*pair) for pair in ((bridged, ours), (native, params))
    )
    np.testing.assert_allclose(flops, wanted, rtol=1e-3)
    close(value, native_value, 1e-5, 1e-5)
    close(jax.tree.leaves(gradient), jax.tree.leaves(native_gradient), 1e-4, 1e-4)
