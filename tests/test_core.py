"""The core's laws, on a toy method: typed leaves, chaining, selecting, freezing, counting, leaving."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import peft_jax as pj
from peft_jax import trees
from peft_jax.weights import innermost, is_weight, static

LAYERS, WIDTH, WIDE, VOCAB = 3, 4, 6, 11


# -- a toy method, a toy quantised leaf, and a toy model --------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Delta(pj.Weight):
    """``base + scale · down up``, with a count of calls (an integer) and a key that ride along untrained."""

    trains = ("down", "up")

    base: Any
    down: Any
    up: Any
    scale: Any
    calls: Any
    key: Any = None
    name: str = static(default="delta")

    def materialise(self) -> Array:
        return pj.materialise(self.base) + self.scale[..., None, None] * (self.down @ self.up)

    def linear(self, x: Array) -> Array:
        return pj.linear(x, self.base) + self.scale * ((x @ self.down) @ self.up)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Codes(pj.Weight):
    """int8 codes times a step for each column; a plain leaf without a base."""

    codes: Any
    step: Any
    logical: tuple[int, ...] = static(default=())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.logical

    @property
    def dtype(self) -> Any:
        return self.step.dtype

    def materialise(self) -> Array:
        return self.codes.astype(self.step.dtype) * self.step[..., None, :]


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape)


def delta(rank: int = 2, select: Any = "q_proj", name: str = "delta", start: float = 1.0) -> pj.Method:
    def init(key: Array, params: Any, forward: pj.Forward) -> Any:
        trees.claim(name, params)
        chosen = pj.select(select, params, forward)

        def adapt(path: trees.Path, leaf: Any) -> Any:
            if path not in chosen:
                return leaf
            site = chosen[path]
            inputs, outputs = site.matrix_shape(leaf)
            down = site.draw(key, name + "/down", normal, (inputs, rank))
            up = site.draw(key, name + "/up", normal, (rank, outputs))
            lead = leaf.shape[:-2]
            wants = jnp.asarray(site.chosen, jnp.float32) if site.stacked else jnp.ones(())
            return Delta(leaf, down, up, start * wants, jnp.zeros(lead, jnp.int32), site.keys(key, name), name)

        return trees.map_leaves(adapt, params)

    return pj.Method(init)


def quantise(select: str = "q_proj") -> pj.Method:
    def pack(w: Array) -> Codes:
        step = jnp.abs(w).max(-2) / 127
        return Codes(jnp.round(w / step[..., None, :]).astype(jnp.int8), step, tuple(w.shape))

    def init(key: Array, params: Any, forward: pj.Forward) -> Any:
        chosen = pj.select(select, params, forward)
        return trees.map_leaves(lambda path, leaf: pj.rebase(leaf, pack) if path in chosen else leaf, params)

    return pj.Method(init)


def names(path: trees.Path) -> tuple[str, ...]:
    if path[0] == "layers":
        return tuple(f"model.layers.{i}.attn.{path[1]}" for i in range(LAYERS))
    return (f"model.{path[0]}",)


def features(params: Any, inputs: pj.Inputs, ports: pj.Ports) -> Array:
    def layer(x: Array, weights: Any) -> tuple[Array, None]:
        return x + pj.linear(jnp.tanh(pj.linear(x, weights["q_proj"]["kernel"])), weights["o_proj"]["kernel"]), None

    x = pj.embed(inputs.tokens, params["embed"]["embedding"])
    return jax.lax.scan(layer, x, params["layers"])[0] * params["norm"]["scale"][None, None]


def head(params: Any, x: Array, ports: pj.Ports) -> Array:
    return pj.unembed(x, params["embed"]["embedding"])


SPEC = pj.Spec(
    width=WIDTH, layers=LAYERS, vocab=VOCAB, positions=8, names=names, stacked=lambda path: path[0] == "layers"
)
FORWARD = pj.Forward(features, head, SPEC)
TOKENS = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)


@pytest.fixture
def params() -> Any:
    keys = jax.random.split(jax.random.key(1), 4)
    return {
        "embed": {"embedding": jax.random.normal(keys[0], (VOCAB, WIDTH))},
        "layers": {
            "q_proj": {"kernel": 0.3 * jax.random.normal(keys[1], (LAYERS, WIDTH, WIDE))},
            "o_proj": {"kernel": 0.3 * jax.random.normal(keys[2], (LAYERS, WIDE, WIDTH))},
        },
        "norm": {"scale": 1 + 0.1 * jax.random.normal(keys[3], (WIDTH,))},
    }


@pytest.fixture
def adapted(params: Any) -> Any:
    return delta()(jax.random.key(0), params, FORWARD)[0]


def same(a: Any, b: Any) -> bool:
    """Same structure, same dtypes, same bits; holes and keys included."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(raw(x), raw(y)) for x, y in pairs
    )


def loss(trained: Any, frozen: Any, tokens: Array) -> Array:
    logits = FORWARD(pj.combine(trained, frozen), tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


# -- weights ----------------------------------------------------------------------------------------------------------


def test_every_rule_agrees_with_the_array_a_leaf_stands_for(params: Any) -> None:
    table = params["embed"]["embedding"]
    key, x = jax.random.key(3), jax.random.normal(jax.random.key(2), (2, 3, WIDTH))
    codes = quantise("embed")(key, params, FORWARD)[0]["embed"]["embedding"]
    nested = Delta(codes, table[:, :2], table[:2], jnp.float32(0.5), jnp.int32(0))
    for w in (table, codes, nested):
        full = pj.materialise(w)
        assert full.shape == w.shape == (VOCAB, WIDTH)
        assert w.ndim == 2 and w.dtype == full.dtype
        ids = jnp.array([[0, 10], [4, 4]])
        np.testing.assert_array_equal(pj.embed(ids, w), np.asarray(full)[np.asarray(ids)])
        np.testing.assert_allclose(pj.unembed(x, w), np.asarray(x) @ np.asarray(full).T, rtol=1e-5, atol=1e-6)
        y = pj.unembed(x, w)
        np.testing.assert_allclose(pj.linear(y, w), np.asarray(y) @ np.asarray(full), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(codes.materialise(), table, atol=0.03)
    assert not np.array_equal(nested.materialise(), codes.materialise())


def test_rules_work_in_the_dtype_of_their_input(params: Any) -> None:
    half = params["embed"]["embedding"].astype(jnp.bfloat16)
    assert pj.linear(jnp.ones((2, VOCAB)), half).dtype == jnp.float32
    assert pj.linear(jnp.ones((2, VOCAB), jnp.bfloat16), params["embed"]["embedding"]).dtype == jnp.bfloat16
    assert pj.unembed(jnp.ones((2, WIDTH)), half).dtype == jnp.float32
    assert pj.embed(jnp.array([1]), half).dtype == jnp.bfloat16


def test_an_id_beyond_the_table_is_nan_not_a_wrong_row(params: Any) -> None:
    rows = pj.embed(jnp.array([VOCAB, VOCAB - 1]), params["embed"]["embedding"])
    assert np.isnan(rows[0]).all() and np.isfinite(rows[1]).all()


def test_rebase_reaches_the_innermost_base() -> None:
    array = jnp.arange(6.0).reshape(2, 3)
    inner = Delta(array, jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.float32(1), jnp.int32(0))
    outer = dataclasses.replace(inner, base=inner, name="outer")
    moved = pj.rebase(outer, lambda base: base + 1)
    np.testing.assert_array_equal(moved.base.base, array + 1)
    assert moved.name == "outer" and moved.base.down is inner.down
    assert innermost(outer) is array and innermost(array) is array
    np.testing.assert_array_equal(pj.rebase(array, lambda base: base * 2), 2 * array)


def test_a_leaf_without_rules_says_so() -> None:
    with pytest.raises(TypeError, match="Weight does not say which array"):
        pj.materialise(pj.Weight())


# -- methods and chain ------------------------------------------------------------------------------------------------


def test_the_empty_chain_is_the_identity(params: Any) -> None:
    same_params, forward = pj.chain()(jax.random.key(0), params, FORWARD)
    assert same_params is params and forward is FORWARD


def test_chain_is_associative_and_each_method_keeps_its_draws(params: Any) -> None:
    a, b, c = delta(name="a"), delta(select="o_proj", name="b"), delta(select="proj", name="c")
    key = jax.random.key(0)
    left = pj.chain(pj.chain(a, b), c)(key, params, FORWARD)[0]
    right = pj.chain(a, pj.chain(b, c))(key, params, FORWARD)[0]
    assert same(left, right)
    alone = a(key, params, FORWARD)[0]["layers"]["q_proj"]["kernel"]
    assert same(left["layers"]["q_proj"]["kernel"].base, alone)
    assert not np.array_equal(left["layers"]["q_proj"]["kernel"].down, alone.down)


def test_adapting_and_quantising_commute(params: Any) -> None:
    key = jax.random.key(0)
    first = pj.chain(delta(), quantise())(key, params, FORWARD)[0]
    assert same(first, pj.chain(quantise(), delta())(key, params, FORWARD)[0])
    assert isinstance(first["layers"]["q_proj"]["kernel"].base, Codes)


def test_wraps_compose_from_left_to_right(params: Any) -> None:
    def scaled(by: float, plus: float) -> pj.Method:
        def wrap(forward: pj.Forward) -> pj.Forward:
            change = lambda x: x * by + plus  # noqa: E731
            return forward.rewritten(lambda params, ports: (jax.tree.map(change, params), ports))

        return pj.Method(lambda key, params, forward: params, wrap)

    plain = pj.Forward(lambda params, inputs, ports: inputs.tokens * params["w"])
    _, forward = pj.chain(scaled(2, 0), scaled(1, 3))(jax.random.key(0), {"w": jnp.float32(5)}, plain)
    # The last method's rewrite comes first: (5 + 3) · 2, once in the features; the head sees its own copy.
    assert float(forward({"w": jnp.float32(5)}, jnp.float32(1))) == 16


def test_a_name_taken_twice_raises(params: Any) -> None:
    with pytest.raises(ValueError, match="'delta' is already applied: give this one another name="):
        pj.chain(delta(), delta(select="o_proj"))(jax.random.key(0), params, FORWARD)
    with pytest.raises(ValueError, match="'mine' is already applied"):
        trees.claim("mine", {"ports": {"mine": jnp.ones(2)}})
    trees.claim("other", delta()(jax.random.key(0), params, FORWARD)[0])


def test_draws_come_from_names_and_are_the_same_stacked_and_unrolled(params: Any) -> None:
    key = jax.random.key(5)
    stacked = trees.Site(("layers", "q_proj", "kernel"), names(("layers", "q_proj")), (True,) * LAYERS, True)
    drawn = stacked.draw(key, "m", normal, (2, 2))
    assert drawn.shape == (LAYERS, 2, 2) and len(np.unique(drawn)) == drawn.size
    for i, name in enumerate(stacked.names):
        one = trees.Site((f"layers_{i}", "q_proj", "kernel"), (name,), (True,), False)
        np.testing.assert_array_equal(one.draw(key, "m", normal, (2, 2)), drawn[i])
    other = stacked._replace(names=names(("layers", "o_proj")))
    for different in (other.draw(key, "m", normal, (2, 2)), stacked.draw(key, "n", normal, (2, 2))):
        assert not np.isin(different, drawn).any()
    old_style = jax.random.wrap_key_data(jax.random.key_data(key))
    np.testing.assert_array_equal(stacked.draw(jax.random.key_data(old_style), "m", normal, (2, 2)), drawn)


def test_forward_is_head_of_features_and_guards_its_tokens(params: Any) -> None:
    halves = FORWARD.head(params, FORWARD.features(params, pj.Inputs(TOKENS), pj.Ports()), pj.Ports())
    np.testing.assert_array_equal(FORWARD(params, TOKENS), halves)
    np.testing.assert_array_equal(FORWARD(params, pj.Inputs(TOKENS)), halves)
    with pytest.raises(ValueError, match="token id 11 is outside the vocabulary of 11"):
        FORWARD(params, TOKENS.at[0, 0].set(VOCAB))
    with pytest.raises(ValueError, match="token id -1 is outside"):
        FORWARD(params, TOKENS.at[1, 1].set(-1))
    with pytest.raises(ValueError, match="9 tokens and the model has 8 positions"):
        jax.eval_shape(FORWARD, params, jnp.zeros((1, 9), jnp.int32))


# -- select -----------------------------------------------------------------------------------------------------------


QUERY, OUT, TABLE = ("layers", "q_proj", "kernel"), ("layers", "o_proj", "kernel"), ("embed", "embedding")


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("q_proj", None, {QUERY: (1, 1, 1)}),
        (r"(q|o)_proj$", None, {QUERY: (1, 1, 1), OUT: (1, 1, 1)}),
        (r"layers\.1\.attn\.q", None, {QUERY: (0, 1, 0)}),
        ("proj", [0, 2], {QUERY: (1, 0, 1), OUT: (1, 0, 1)}),
        (".*", [], None),
        (".*", None, {QUERY: (1, 1, 1), OUT: (1, 1, 1), TABLE: (1,)}),
        (lambda name: name.endswith("o_proj") and "0" not in name, None, {OUT: (0, 1, 1)}),
        (lambda name: name, [1], {QUERY: (0, 1, 0), OUT: (0, 1, 0)}),
        ("norm", None, None),
    ],
)
def test_select(params: Any, pattern: Any, layers: Any, expected: Any) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="matches none"):
            pj.select(pattern, params, FORWARD, layers=layers)
    else:
        found = pj.select(pattern, params, FORWARD, layers=layers)
        assert {path: site.chosen for path, site in found.items()} == expected
        assert all(site.stacked == (path[0] == "layers") for path, site in found.items())
        assert all(site.embedding == (path == TABLE) for path, site in found.items())


def test_select_sees_through_adapters_but_not_what_methods_added(params: Any, adapted: Any) -> None:
    extra = adapted | {"ports": {"p": {"kernel": jnp.ones((2, 2))}}, "methods": {"v": {"kernel": jnp.ones((2, 2))}}}
    assert set(pj.select(".*", extra, FORWARD)) == {QUERY, OUT, TABLE}
    anything = pj.select(".*", params, FORWARD, adaptable=lambda site, leaf: True)
    assert ("norm", "scale") in anything


def test_layers_are_counted_by_the_first_index_of_a_name() -> None:
    expert = lambda path: (f"model.layers.{path[0][-1]}.experts.{path[1][-1]}.w",)  # noqa: E731
    moe = {f"l{i}": {f"e{j}": {"kernel": jnp.ones((2, 2))} for j in range(3)} for i in range(3)}
    found = pj.select("w", moe, pj.Forward(features, spec=pj.Spec(names=expert)), layers=[1])
    assert set(found) == {("l1", f"e{j}", "kernel") for j in range(3)}


def test_a_pattern_without_a_match_lists_near_misses(params: Any) -> None:
    with pytest.raises(
        ValueError, match=r"'q_porj' matches none of the model's 7 adaptable leaves; near misses: q_proj"
    ):
        pj.select("q_porj", params, FORWARD)
    with pytest.raises(ValueError, match=r"in layers \[7\]"):
        pj.select("q_proj", params, FORWARD, layers=[7])
    with pytest.raises(ValueError, match=re.escape("the pattern '(q' is not a regular expression")):
        pj.select("(q", params, FORWARD)


# -- training ---------------------------------------------------------------------------------------------------------


def test_trainable_is_read_off_the_leaf_types(params: Any, adapted: Any) -> None:
    assert not any(jax.tree.leaves(pj.trainable(params)))
    mask = pj.trainable(adapted)
    assert jax.tree.structure(mask) == jax.tree.structure(adapted)
    leaf = mask["layers"]["q_proj"]["kernel"]
    assert (leaf.base, leaf.down, leaf.up, leaf.scale, leaf.calls, leaf.key) == (False, True, True, False, False, False)
    assert sum(jax.tree.leaves(mask)) == 2
    both = pj.trainable(delta(select="q_proj", name="two")(jax.random.key(1), adapted, FORWARD)[0])
    assert sum(jax.tree.leaves(both)) == 4


def test_partition_and_combine_are_inverse(adapted: Any) -> None:
    tree = adapted | {"none": None, "step": jnp.int32(3), "key": jax.random.key(9), "empty": {}}
    trained, frozen = pj.partition(tree)
    assert len(jax.tree.leaves(trained)) == 2
    assert len(jax.tree.leaves(trained)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(tree))
    assert same(pj.combine(trained, frozen), tree) and same(pj.combine(frozen, trained), tree)
    again = pj.partition(trained)
    assert same(again[0], trained) and not jax.tree.leaves(again[1])
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(pj.combine(trained, frozen)), strict=True):
        assert before is after


def test_partition_works_under_jit_vmap_and_eval_shape(adapted: Any) -> None:
    assert same(jax.jit(lambda p: pj.combine(*pj.partition(p)))(adapted), adapted)
    abstract = jax.eval_shape(lambda p: pj.partition(p)[0], adapted)
    assert jax.tree.structure(abstract) == jax.tree.structure(pj.partition(adapted)[0])
    layer = {"q_proj": adapted["layers"]["q_proj"]["kernel"]}
    each = jax.vmap(lambda p: pj.partition(p)[0])(layer)
    assert same(each, pj.partition(layer)[0])


OPTIMISERS = {
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "lion": optax.lion(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5, momentum=0.9)),
    "multi_transform": optax.multi_transform(
        {"down": optax.adam(1e-2), "up": optax.sgd(1e-1)},
        lambda tree: jax.tree_util.tree_map_with_path(lambda keys, _: trees.path_of(keys)[-1], tree),
    ),
    "accumulating": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_freeze_moves_what_the_bare_optimiser_would_and_nothing_else(adapted: Any, name: str) -> None:
    """The oracle: the same optax transformation on a plain dict of the trained arrays."""
    tx, reference = pj.freeze(OPTIMISERS[name], adapted), OPTIMISERS[name]
    leaf = lambda tree: tree["layers"]["q_proj"]["kernel"]  # noqa: E731
    trained, frozen = pj.partition(adapted)
    plain = {"down": leaf(trained).down, "up": leaf(trained).up}
    state, whole_state, plain_state = tx.init(trained), tx.init(adapted), reference.init(plain)
    assert same(state, whole_state)
    assert sum(x.size for x in jax.tree.leaves(state)) == sum(x.size for x in jax.tree.leaves(plain_state))

    @jax.jit
    def step(trained: Any, whole: Any, plain: Any, states: Any) -> Any:
        grads = jax.grad(loss)(trained, frozen, TOKENS)
        some = {"down": leaf(grads).down, "up": leaf(grads).up}
        first, a = tx.update(grads, states[0], trained)
        second, b = tx.update(pj.combine(grads, jax.tree.map(lambda x: x, frozen)), states[1], whole)
        with jax.numpy_dtype_promotion("standard"):
            third, c = reference.update(some, states[2], plain)
        return (
            (pj.apply_updates(trained, first), pj.apply_updates(whole, second)),
            optax.apply_updates(plain, third),
            (a, b, c),
        )

    whole, states = adapted, (state, whole_state, plain_state)
    for _ in range(3):
        (trained, whole), plain, states = step(trained, whole, plain, states)
    assert same(pj.combine(trained, frozen), whole)
    for field in ("down", "up"):
        np.testing.assert_allclose(getattr(leaf(trained), field), plain[field], rtol=1e-6, atol=1e-7)
        assert not np.array_equal(plain[field], getattr(leaf(adapted), field))
    assert same(pj.partition(whole)[1], pj.partition(adapted)[1])


def test_freeze_passes_extra_arguments_and_refuses_a_tree_that_trains_nothing(params: Any, adapted: Any) -> None:
    seen = []

    def update(grads: Any, state: Any, params: Any = None, *, value: Any) -> Any:
        seen.append(value)
        return grads, state

    tx = pj.freeze(optax.GradientTransformationExtraArgs(lambda params: (), update), adapted)
    tx.update(pj.partition(adapted)[0], tx.init(adapted), None, value=3)
    assert seen == [3]
    with pytest.raises(ValueError, match="nothing in this tree trains"):
        pj.freeze(optax.sgd(1.0), params)


def test_apply_updates_keeps_dtypes_and_passes_holes() -> None:
    params = {"half": jnp.ones(3, jnp.bfloat16), "full": jnp.ones(3), "hole": None, "still": jnp.arange(3)}
    updates = {"half": jnp.full(3, 2.0**-10), "full": jnp.full(3, 2.0**-9, jnp.bfloat16), "hole": None, "still": None}
    moved = pj.apply_updates(params, updates)
    assert moved["half"].dtype == jnp.bfloat16 and moved["full"].dtype == jnp.float32
    np.testing.assert_array_equal(moved["full"], np.float32(1 + 2.0**-9))
    assert moved["hole"] is None and moved["still"] is params["still"]
    exact = {"half": jnp.full(3, 2.0**-6)} | dict.fromkeys(("full", "hole", "still"))
    np.testing.assert_array_equal(pj.apply_updates(params, exact)["half"].astype(jnp.float32), 1 + 2.0**-6)


def test_no_gradient_of_a_frozen_weight_is_computed(adapted: Any) -> None:
    """Wide layers, so that matrix products dominate: the frozen kernels' own gradients would be a third of the work."""
    size, rows = 64, 32
    base = jnp.ones((size, size))
    leaf = Delta(base, jnp.ones((size, 2)), jnp.ones((2, size)), jnp.float32(1), jnp.int32(0))
    model = {"a": leaf, "b": leaf, "c": leaf}

    def objective(tree: Any, rest: Any, x: Array) -> Array:
        weights = pj.combine(tree, rest)
        for name in "abc":
            x = jnp.tanh(pj.linear(x, weights[name]))
        return x.sum()

    x = jnp.ones((rows, size))
    trained, frozen = pj.partition(model)
    ours = jax.jit(jax.grad(objective)).lower(trained, frozen, x).compile()
    floats = {k: dataclasses.replace(v, calls=None) for k, v in model.items()}
    full = jax.jit(jax.grad(objective)).lower(floats, jax.tree.map(lambda _: None, floats), x).compile()
    product = 2 * rows * size * size
    frozen_gradient = re.compile(rf"f32\[{size},{size}\]\S* (dot|custom-call|fusion)")
    assert not frozen_gradient.search(ours.as_text()) and frozen_gradient.search(full.as_text())
    # Three products forward; backward one a layer, but none into the input of the first.
    assert 5 * product <= ours.cost_analysis()["flops"] < 6.5 * product
    assert full.cost_analysis()["flops"] > ours.cost_analysis()["flops"] + 2.5 * product


# -- leaving ----------------------------------------------------------------------------------------------------------


def test_merge_gives_plain_arrays_that_compute_the_same(adapted: Any, params: Any) -> None:
    merged = pj.merge(adapted | {"methods": {"v": jnp.ones(3)}})
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(FORWARD(merged, TOKENS), FORWARD(adapted, TOKENS), rtol=1e-4, atol=1e-5)
    assert not np.allclose(FORWARD(merged, TOKENS), FORWARD(params, TOKENS), atol=1e-2)
    assert same(pj.merge(params), params)
    leaf = adapted["layers"]["q_proj"]["kernel"]
    np.testing.assert_allclose(pj.merge(leaf), leaf.materialise(), rtol=1e-6)
    with pytest.raises(ValueError, match="ports/prompt acts beside the weights and cannot be merged"):
        pj.merge(adapted | {"ports": {"prompt": jnp.ones(3)}})


def test_strip_gives_back_the_base_without_a_copy(params: Any) -> None:
    method = pj.chain(delta(), delta(select="proj", name="more"))
    bare = pj.strip(method(jax.random.key(0), params, FORWARD)[0] | {"ports": {"p": jnp.ones(2)}})
    assert jax.tree.structure(bare) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(bare), jax.tree.leaves(params), strict=True))
    array = jnp.ones((2, 2))
    assert pj.strip(Delta(array, array, array, jnp.float32(1), jnp.int32(0))) is array


def test_set_scale_turns_adapters_without_recompiling(adapted: Any, params: Any) -> None:
    traces = []

    @jax.jit
    def run(p: Any) -> Array:
        traces.append(1)
        return FORWARD(p, TOKENS)

    on, off, half = run(adapted), run(pj.set_scale(adapted, 0.0)), run(pj.set_scale(adapted, 0.5))
    assert len(traces) == 1
    np.testing.assert_allclose(off, run(params), rtol=1e-6)
    assert np.abs(on - half).max() > 1e-3 and np.abs(off - half).max() > 1e-3
    two = delta(select="o_proj", name="two")(jax.random.key(0), adapted, FORWARD)[0]
    scaled = pj.set_scale(two, 3.0, name="two")
    np.testing.assert_array_equal(scaled["layers"]["o_proj"]["kernel"].scale, np.full(LAYERS, 3, np.float32))
    assert same(scaled["layers"]["q_proj"], two["layers"]["q_proj"])
    with pytest.raises(ValueError, match="no adapter called 'tow' here: delta, two"):
        pj.set_scale(two, 3.0, name="tow")
    with pytest.raises(ValueError, match="no adapter"):
        pj.set_scale(params, 3.0)


def test_place_takes_one_sharding_or_a_tree_of_them(adapted: Any) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    placed = pj.place(adapted, everywhere)
    assert same(placed, adapted) and all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(placed))
    by_entry = dict.fromkeys(adapted, everywhere)
    assert same(pj.place(adapted, by_entry), adapted)


# -- counting ---------------------------------------------------------------------------------------------------------


def test_counts_are_the_model_s_own(params: Any, adapted: Any) -> None:
    table, kernel = VOCAB * WIDTH, LAYERS * WIDTH * WIDE
    total = table + 2 * kernel + WIDTH
    assert pj.count(params) == (0, total, 4 * total)
    trained = LAYERS * 2 * (WIDTH + WIDE)
    counted = pj.count(adapted)
    assert (counted.trainable, counted.frozen) == (trained, total)
    assert counted.bytes == 4 * (total + trained + 2 * LAYERS) + LAYERS * jax.random.key(0).dtype.itemsize
    small = pj.count(pj.chain(delta(), quantise())(jax.random.key(0), params, FORWARD)[0])
    assert (small.trainable, small.frozen) == (trained, total)
    assert small.bytes == counted.bytes - 3 * kernel + 4 * LAYERS * WIDE
    assert pj.count(jax.eval_shape(lambda: adapted)) == counted
    assert pj.count(pj.partition(adapted)[0])[:2] == (trained, 0)
    assert pj.count(pj.partition(adapted)[1])[:2] == (0, total)


def test_summary_has_a_row_a_leaf_type_and_adds_up(params: Any) -> None:
    text = pj.summary(pj.chain(delta(), quantise("proj"))(jax.random.key(0), params, FORWARD)[0])
    rows = {line.split()[0]: [int(n.replace(",", "")) for n in line.split()[1:]] for line in text.splitlines()[1:-1]}
    assert set(rows) == {"array", "Codes", "Delta(Codes)", "total"}
    assert rows["array"][:3] == [2, 0, VOCAB * WIDTH + WIDTH] and rows["Delta(Codes)"][0] == 1
    assert [sum(rows[k][i] for k in rows if k != "total") for i in range(4)] == rows["total"]
    assert f"of {rows['total'][1] + rows['total'][2]:,}" in text.splitlines()[-1]
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1


def test_nested_weights_are_all_found(params: Any) -> None:
    tree = pj.chain(delta(), quantise(), delta(select="proj", name="two"))(jax.random.key(0), params, FORWARD)[0]
    assert sorted(type(w).__name__ for w in trees.weights(tree)) == ["Codes", "Delta", "Delta", "Delta"]
    assert all(is_weight(w) for w in trees.weights(tree))


# -- the skeleton that CONTRIBUTING offers ----------------------------------------------------------------------------


def test_the_skeleton_of_contributing_is_a_method(params: Any) -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    module: dict[str, Any] = {"__name__": __name__}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], module)
    leaf = module["scaled"]("q_proj", start=1.5)(jax.random.key(0), params, FORWARD)[0]["layers"]["q_proj"]["kernel"]
    layer = jax.tree.map(lambda x: x[1], leaf)
    x = jax.random.normal(jax.random.key(4), (2, 3, WIDTH))
    np.testing.assert_allclose(pj.linear(x, layer), x @ pj.materialise(leaf)[1], rtol=1e-5)
    np.testing.assert_allclose(pj.materialise(leaf), 1.5 * params["layers"]["q_proj"]["kernel"], rtol=1e-6)
    assert pj.count({"w": leaf}).trainable == LAYERS * WIDE
    with pytest.raises(ValueError, match="layers/q_proj/kernel: scaled"):
        module["scaled"](r"layers\.0\.attn\.q")(jax.random.key(0), params, FORWARD)
