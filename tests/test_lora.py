"""LoRA and its kin against HF PEFT's own layers, optax and numpy."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import zoo
from checks import close, differs, same
from optax import contrib
from zoo import KEY

import peft_jax as pj
from peft_jax import methods, trees
from peft_jax.methods.dora import DoRA
from peft_jax.methods.lora import LoRA

INPUTS, OUTPUTS, VOCAB = 12, 10, 14
FORWARD = pj.Forward(lambda params, inputs, ports: params)  # shows what a model would see
LLAMA = zoo.build("llama")
SEEN = pj.Forward(lambda params, inputs, ports: params, spec=LLAMA.spec)
random = np.random.RandomState(0)
W, TABLE = random.randn(INPUTS, OUTPUTS).astype(np.float32), random.randn(VOCAB, OUTPUTS).astype(np.float32)
X, IDS = random.randn(5, INPUTS).astype(np.float32), np.array([0, 3, 3, 13])


def single(method: pj.Method, w: Any = W, name: str = "q_proj") -> Any:
    """The one leaf of a model that has no other."""
    leaf = "embedding" if name == "embed" else "kernel"
    return method(KEY, {name: {leaf: jnp.asarray(w)}}, FORWARD)[0][name][leaf]


def stacked(method: pj.Method, module: str = "q_proj", base: Any = None) -> Any:
    params = method(KEY, zoo.base("llama") if base is None else base, LLAMA)[0]
    return params["model"]["layers"]["self_attn"][module]["kernel"]


def theirs(**options: Any) -> Any:
    """HF PEFT's layers around the same weights."""
    model = torch.nn.ModuleDict(
        {"q_proj": torch.nn.Linear(INPUTS, OUTPUTS, bias=False), "embed": torch.nn.Embedding(VOCAB, OUTPUTS)}
    )
    model["q_proj"].weight.data, model["embed"].weight.data = torch.tensor(W.T.copy()), torch.tensor(TABLE)
    config = peft.LoraConfig(target_modules=["q_proj", "embed"], **options)
    return peft.inject_adapter_in_model(config, model).eval()


# -- HF PEFT's layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "ours", "options"),
    [
        (methods.lora, {}, {}),
        (methods.lora, {"rslora": True}, {"use_rslora": True}),
        (methods.dora, {}, {"use_dora": True}),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_outputs_and_gradients_equal_hf_peft(factory: Any, ours: Any, options: Any) -> None:
    model = theirs(r=4, lora_alpha=6, **options)
    for name, w, given in (("q_proj", W, X), ("embed", TABLE, IDS)):
        leaf = zoo.disturbed(single(factory(4, 6, ".*", **ours), w, name))
        low = leaf.base if isinstance(leaf, DoRA) else leaf
        layer, kind = model[name], "" if name == "q_proj" else "_embedding"
        theirs_a, theirs_b = getattr(layer, f"lora{kind}_A").default, getattr(layer, f"lora{kind}_B").default
        theirs_a, theirs_b = (getattr(p, "weight", p) for p in (theirs_a, theirs_b))
        theirs_a.data, theirs_b.data = (
            torch.tensor(np.asarray(low.a).T.copy()),
            torch.tensor(np.asarray(low.b).T.copy()),
        )
        trained = [theirs_a, theirs_b]
        if isinstance(leaf, DoRA):
            trained.append(layer.lora_magnitude_vector.default.weight)
            trained[2].data = torch.tensor(np.asarray(leaf.magnitude))
        y = layer(torch.tensor(given))
        mix = random.randn(*y.shape).astype(np.float32)
        (y * torch.tensor(mix)).sum().backward()

        def out(w: Any, given: Any = given, name: str = name) -> jax.Array:
            return pj.linear(jnp.asarray(given), w) if name == "q_proj" else pj.embed(jnp.asarray(given), w)

        close(out(leaf), y.detach().numpy(), rtol=1e-4, atol=1e-4)
        t, frozen = pj.partition(leaf)
        g = jax.grad(lambda t: jnp.sum(out(pj.combine(t, frozen)) * mix))(t)  # noqa: B023
        found = [g.base.a.T, g.base.b.T, g.magnitude] if isinstance(leaf, DoRA) else [g.a.T, g.b.T]
        close(found, [p.grad.numpy() for p in trained], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("factory", "start"), [(methods.pissa, "pissa"), (methods.olora, "olora")])
@pytest.mark.parametrize("shape", [(INPUTS, OUTPUTS), (OUTPUTS, INPUTS)], ids=["tall", "wide"])
def test_starts_equal_hf_peft(factory: Any, start: str, shape: Any) -> None:
    w = random.randn(*shape).astype(np.float32)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(*shape, bias=False)})
    model["q_proj"].weight.data = torch.tensor(w.T.copy())
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=start)
    layer = peft.inject_adapter_in_model(config, model)["q_proj"]
    leaf = single(factory(3, 6), w)
    a, b = layer.lora_A.default.weight.detach().numpy().T, layer.lora_B.default.weight.detach().numpy().T
    close(leaf.a @ leaf.b, a @ b)
    signs = np.sign(np.sum(np.asarray(leaf.a) * a, axis=0))
    assert set(np.abs(signs)) == {1}
    close(leaf.a * signs[None], a, atol=1e-4)
    close(leaf.b * signs[:, None], b, atol=1e-4)
    close(pj.materialise(leaf.base), layer.base_layer.weight.detach().numpy().T)
    np.testing.assert_array_equal(pj.strip(leaf), w)


def test_lora_starts_as_torch_does() -> None:
    """A ~ U(±1/√in) and B = 0; an embedding's A = 0 and B ~ N(0, 1)."""
    with pytest.warns(UserWarning, match="rank 64 is above its own"):
        leaf = single(methods.lora(64), np.zeros((400, 8), np.float32))
    numbers = np.sort(np.ravel(leaf.a)) * 20
    assert -1 <= numbers[0] < -0.999 and 0.999 < numbers[-1] < 1
    np.testing.assert_allclose(numbers, np.linspace(-1, 1, numbers.size), atol=0.02)
    assert not leaf.b.any()
    with pytest.warns(UserWarning, match="embed is a 8 x 400 matrix: rank 64 is above its own"):
        table = single(methods.lora(64, select="embed"), np.zeros((8, 400), np.float32), "embed")
    assert not table.a.any()
    b = np.ravel(table.b)
    quantiles = [np.mean(b < q) for q in (-2, -1, 0, 1, 2)]
    np.testing.assert_allclose(quantiles, [0.0228, 0.1587, 0.5, 0.8413, 0.9772], atol=0.01)


def test_a_smaller_rank_is_the_beginning_of_a_larger() -> None:
    four, two = stacked(methods.lora(4)), stacked(methods.lora(2))
    np.testing.assert_array_equal(four.a[..., :2], two.a)
    assert len(np.unique(four.a)) == four.a.size  # layers and directions all differ


# -- dropout ----------------------------------------------------------------------------------------------------------


def masks(rate: float, key: Any, name: str = "lora", base: Any = None, seen: Any = SEEN) -> dict[str, np.ndarray]:
    """What reaches A, of an input of ones, by layer and module."""
    method = methods.lora(4, dropout=rate, name=name)
    params, forward = method(KEY, zoo.base("llama") if base is None else base, seen)
    shown = forward(params, zoo.TOKENS, pj.Ports(micro_key=key))
    found = {}
    for path, w in trees.leaves(shown).items():
        if isinstance(w, LoRA):
            layers = [jax.tree.map(lambda x, i=i: x[i], w) for i in range(3)] if "layers" in path else [w]
            for i, layer in enumerate(layers):
                width = w.shape[-2]
                direct = dataclasses.replace(
                    layer, base=jnp.zeros((width, width)), a=jnp.eye(width), b=jnp.eye(width), scale=jnp.ones(())
                )
                index = i if "layers" in path else int(path[1][-1])
                found[f"{index}.{path[-2]}"] = np.asarray(pj.linear(jnp.ones((2000, width)), direct))
    return found


def test_dropout_drops_what_it_says_and_nothing_without_a_key() -> None:
    params, forward = methods.lora(4, dropout=0.25)(KEY, zoo.base("llama"), SEEN)
    for ports in (pj.Ports(), pj.Ports(step_key=KEY)):
        assert same(forward(params, zoo.TOKENS, ports), params)
    found = masks(0.25, KEY)
    assert set(found) == {f"{i}.{n}_proj" for i in range(3) for n in "qv"}
    for mask in found.values():
        np.testing.assert_allclose(np.unique(mask), [0, 1 / 0.75])
        assert np.mean(mask == 0) == pytest.approx(0.25, abs=0.01)
        assert mask.mean(0) == pytest.approx(1, abs=0.06)  # the expectation is the input, in every coordinate


def test_masks_follow_the_key_the_layer_and_the_name_stacked_or_not() -> None:
    first, again, other, named = masks(0.5, KEY), masks(0.5, KEY), masks(0.5, jax.random.key(1)), masks(0.5, KEY, "two")
    distinct = [*first.values(), *other.values(), *named.values()]
    assert len({mask.tobytes() for mask in distinct}) == 18
    model = zoo.build("llama", scan=False)
    apart = masks(0.5, KEY, base=zoo.unrolled(zoo.base("llama")), seen=dataclasses.replace(SEEN, spec=model.spec))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        np.testing.assert_array_equal(first[name], apart[name])


def test_dropout_keeps_half_precision() -> None:
    leaf = dataclasses.replace(single(methods.lora(4)), key=KEY, rate=jnp.float32(0.5))
    assert pj.linear(jnp.asarray(X, jnp.bfloat16), leaf).dtype == jnp.bfloat16


# -- ranks, alphas, layers, biases ------------------------------------------------------------------------------------


def test_exceptions_by_name_and_layers() -> None:
    options = {"rank_pattern": {r"\.0\..*q_proj": 1, "q_proj": 3}, "alpha_pattern": {r"\.2\.": 9}}
    q, v = (stacked(methods.lora(2, 4, layers=[0, 2], **options), name) for name in ("q_proj", "v_proj"))
    assert (q.ranks, v.ranks) == ((1, 0, 3), (2, 0, 2))
    np.testing.assert_allclose(q.scale, [4 / 1, 0, 9 / 3])
    np.testing.assert_allclose(v.scale, [4 / 2, 0, 9 / 2])
    assert q.a.shape[-1] == 3 and not q.a[0, :, 1:].any() and not q.a[1].any() and q.a[2].all()
    scale = stacked(methods.lora(2, 4, rslora=True, **options)).scale
    np.testing.assert_allclose(scale, [4 / 1, 4 / 3**0.5, 9 / 3**0.5], rtol=1e-6)
    assert float(single(methods.lora(4)).scale) == 1  # alpha is the rank by default
    full, part = (stacked(methods.lora(3, layers=layers)) for layers in (None, [1]))
    np.testing.assert_array_equal(part.a[1], full.a[1])


@pytest.mark.parametrize(
    ("bias", "trained"),
    [("none", set()), ("lora_only", {"q_proj", "v_proj"}), ("all", {"q_proj", "k_proj", "v_proj", "o_proj"})],
)
def test_bias_modes(bias: str, trained: set[str]) -> None:
    params, forward = methods.lora(2, bias=bias)(KEY, zoo.base("llama"), SEEN)
    found = {p[-2] for p, w in trees.leaves(params).items() if p[-1] == "bias" and isinstance(w, pj.Weight)}
    assert found == trained
    shown = trees.leaves(forward(params, zoo.TOKENS))
    assert not any(isinstance(w, pj.Weight) for path, w in shown.items() if path[-1] == "bias")
    if bias == "lora_only":
        some = methods.lora(2, layers=[1], bias=bias)(KEY, zoo.base("llama"), LLAMA)[0]
        assert some["model"]["layers"]["self_attn"]["q_proj"]["bias"].layers == (1,)


# -- optimisers -------------------------------------------------------------------------------------------------------

ROUND = contrib.MuonDimensionNumbers(1, 2)
OPTIMISERS = {
    "adamw": optax.adamw(1e-1, weight_decay=0.1),
    "lion": optax.lion(1e-1, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-1, weight_decay_rate=0.01, min_dim_size_to_factor=2),
    "muon": contrib.muon(
        1e-1, weight_decay=0.1, muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: ROUND, tree)
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_padding_is_a_fixed_point_of_every_optimiser(name: str) -> None:
    params = methods.lora(4, 8, "q_proj", rank_pattern={r"\.0\.": 2, r"\.2\.": 1})(KEY, zoo.base("llama"), LLAMA)[0]
    leaf = zoo.disturbed(params)["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    used = np.arange(4)[None] < np.array([2, 4, 1])[:, None]
    trained, frozen = pj.partition(leaf)
    tx, x = pj.freeze(OPTIMISERS[name], leaf), jnp.asarray(random.randn(3, 6, zoo.WIDTH), jnp.float32)
    state, start = tx.init(trained), trained

    @jax.jit
    def step(trained: Any, state: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            return jnp.mean(jax.vmap(pj.linear)(x, pj.combine(trained, frozen)) ** 2)

        with jax.numpy_rank_promotion("allow"):  # optax's, not ours
            updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return pj.apply_updates(trained, updates), state

    for _ in range(4):
        trained, state = step(trained, state)
    for before, after in ((start.a, trained.a), (jnp.swapaxes(start.b, 1, 2), jnp.swapaxes(trained.b, 1, 2))):
        there = np.broadcast_to(used[:, None], after.shape)
        assert not np.asarray(after)[~there].any(), "the padding moved"
        assert (np.asarray(after) != np.asarray(before))[there].all()


def test_lora_plus_moves_b_ratio_times_faster() -> None:
    params = pj.chain(methods.lora(4), methods.unfreeze("norm"))(KEY, zoo.base("llama"), LLAMA)[0]
    trained = pj.partition(params)[0]
    gradient = pj.partition(zoo.disturbed(jax.tree.map(jnp.zeros_like, params)))[0]
    gradient = jax.tree.map(lambda x: x + 1, gradient)
    for rate in (1e-3, lambda step: 1e-3 / (1 + step)):
        tx = pj.freeze(methods.lora_plus(optax.adam, rate, ratio=16), params)
        plain = optax.adam(rate)
        state, reference = tx.init(trained), plain.init(trained)
        for _ in range(2):
            updates, state = tx.update(gradient, state, trained)
            with jax.numpy_dtype_promotion("standard"):
                expected, reference = plain.update(gradient, reference, trained)
            for name, factor in (("a", 1), ("b", 16)):
                mine = getattr(updates["model"]["layers"]["self_attn"]["q_proj"]["kernel"], name)
                other = getattr(expected["model"]["layers"]["self_attn"]["q_proj"]["kernel"], name)
                close(mine, factor * other, rtol=1e-5, atol=1e-9)
                assert np.abs(mine).min() > 4e-4
            close(updates["model"]["norm"]["scale"].value, expected["model"]["norm"]["scale"].value, atol=1e-9)
    with pytest.raises(ValueError, match="ratio must be positive, got 0"):
        methods.lora_plus(optax.adam, 1e-3, ratio=0)


# -- leaving, stacking, precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [methods.lora, methods.pissa, methods.olora])
def test_scale_zero_is_the_base(factory: Any) -> None:
    leaf = zoo.disturbed(single(factory(3, 6)))
    for off in (pj.set_scale(leaf, 0.0), pj.set_scale(leaf, 0.0, name=factory.__name__)):
        close(pj.linear(jnp.asarray(X), off), X @ W, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(pj.merge(off), W)
    half = pj.merge(pj.set_scale(leaf, 1.0))
    close(2 * (half - W), pj.merge(leaf) - W, atol=1e-5)


def test_dora_answers_to_its_name() -> None:
    leaf = single(methods.dora(3, 6))
    assert float(pj.set_scale(leaf, 0.5, name="dora").base.scale) == 0.5
    with pytest.raises(ValueError, match="no adapter called 'lora' here"):
        pj.set_scale(leaf, 0.5, name="lora")


def test_a_column_of_zeros_is_not_rescaled() -> None:
    w = W.copy()
    w[:, 2] = 0
    leaf = single(methods.dora(3), w)
    y, gradient = jax.value_and_grad(
        lambda t: jnp.sum(pj.linear(jnp.asarray(X), pj.combine(t, pj.partition(leaf)[1])))
    )(pj.partition(leaf)[0])
    assert np.isfinite(y) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    close(pj.linear(jnp.asarray(X), leaf), X @ w)


def test_merging_changes_nothing_but_the_copy() -> None:
    leaf = zoo.disturbed(single(methods.lora(3, 6)))
    first, second = pj.merge(leaf), pj.merge(leaf)
    expected = W + 2.0 * np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
    close(first, expected.astype(np.float32), rtol=1e-6, atol=1e-6)
    assert same(first, second) and differs(first, W)
    np.testing.assert_array_equal(pj.strip(leaf), W)


@pytest.mark.parametrize("inner", [methods.lora(3, 6, name="inner"), methods.pissa(3, 6), methods.dora(3, 6)])
@pytest.mark.parametrize("outer", [methods.lora, methods.dora, methods.pissa, methods.olora])
def test_methods_on_leaves_already_adapted(inner: pj.Method, outer: Any) -> None:
    """The outer one starts where the inner one stands."""
    first = zoo.disturbed({"q_proj": {"kernel": single(inner)}})
    both = outer(2, name="outer")(KEY, first, FORWARD)[0]
    close(pj.merge(both), pj.merge(first), atol=1e-5)
    moved = zoo.disturbed(both)["q_proj"]["kernel"]
    close(pj.linear(jnp.asarray(X), moved), X @ pj.merge(moved), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(pj.strip(moved), W)


def test_half_precision_bases_and_adapters() -> None:
    leaf = zoo.disturbed(single(methods.lora(3, 6), jnp.asarray(W, jnp.bfloat16)))
    assert (leaf.a.dtype, leaf.b.dtype, leaf.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    exact = np.asarray(leaf.base, np.float64) + 2.0 * np.asarray(leaf.a, np.float64) @ np.asarray(leaf.b, np.float64)
    merged = pj.merge(leaf)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, jnp.asarray(exact, jnp.bfloat16))  # rounded once
    narrow = single(methods.lora(3, 6, dtype=jnp.bfloat16))
    assert narrow.a.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pj.merge(narrow), W)  # B = 0: the base in all its bits
    start = single(methods.pissa(3, 6, dtype=jnp.bfloat16))
    assert start.b.dtype == start.base.b.dtype == jnp.bfloat16
    close(pj.merge(start), W, rtol=1e-6, atol=1e-6)  # the residual is that of the rounded factors


def test_init_under_jit_draws_the_same() -> None:
    method = methods.lora(4, 8)
    compiled = jax.jit(lambda key, base: method.init(key, base, LLAMA))(KEY, zoo.base("llama"))
    assert same(compiled, method.init(KEY, zoo.base("llama"), LLAMA))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": -4}, "rank must be a positive integer, got -4"),
        ({"rank_pattern": {"q_proj": 0}}, "rank must be a positive integer, got 0"),
        ({"alpha": 0}, "alpha must be positive, got 0"),
        ({"alpha": float("nan")}, "alpha must be positive, got nan"),
        ({"alpha_pattern": {"q_proj": -1.0}}, "alpha must be positive, got -1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\), got -0.1"),
        ({"bias": "some"}, "bias is 'some': choose 'none', 'all' or 'lora_only'"),
        ({"select": "q_porj"}, "'q_porj' matches none of the model's 23 adaptable leaves; near misses: q_proj"),
        ({"layers": [3]}, r"in layers \[3\]"),
        ({"rank_pattern": {"up_proj": 2}}, "the exception 'up_proj' matches no adapted leaf"),
        ({"alpha_pattern": {r"layers\.7": 2}}, r"the exception 'layers\\\\.7' matches no adapted leaf"),
    ],
)
def test_bad_input(options: Any, message: str) -> None:
    for factory in (methods.lora, methods.dora, methods.pissa, methods.olora):
        with pytest.raises(ValueError, match=message):
            factory(**options)(KEY, zoo.base("llama"), LLAMA)


def test_more_bad_input() -> None:
    with pytest.warns(UserWarning, match=re.escape("v_proj is a 32 x 16 matrix: rank 17 is above its own")):
        stacked(methods.lora(17), "v_proj")
    for factory in (methods.pissa, methods.olora):
        with pytest.warns(UserWarning, match="rank 17"), pytest.raises(ValueError, match="no 17 directions to start"):
            factory(17)(KEY, zoo.base("llama"), LLAMA)
    with pytest.raises(ValueError, match="'bias_of_an_adapted_module' matches none"):
        methods.lora(2, select="lm_head", bias="lora_only")(KEY, zoo.base("llama"), LLAMA)
    twice = pj.chain(methods.unfreeze("norm"), methods.unfreeze("norm", name="two"))
    with pytest.raises(
        ValueError, match="input_layernorm/scale is already trained whole, by the method named 'unfreeze'"
    ):
        twice(KEY, zoo.base("llama"), LLAMA)
    bare = methods.unfreeze("norm", keep_base=False)(KEY, zoo.base("llama"), LLAMA)[0]
    with pytest.raises(ValueError, match="input_layernorm/scale was changed without keeping its base"):
        pj.strip(bare)
