"""DyLoRA against the official code's formula in numpy, HF PEFT on torch, and what its paper says of ranks."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from checks import close, copied, differs, same, without_compiling
from oracles.peft_models import TOKENS, adapted, base, config, in_peft, logits
from oracles.torch_models import torch_logits
from zoo import KEY

import peft_jax as pj
from peft_jax import methods, training, trees
from peft_jax.interop import hf_peft
from peft_jax.methods.dylora import DyLoRA
from peft_jax.methods.lora import LoRA

pytestmark = pytest.mark.usefixtures("quick_compiles")
LLAMA = zoo.build("llama")
SEEN = pj.Forward(lambda params, inputs, ports: params, spec=LLAMA.spec)  # shows what a model would see
BARE = pj.Forward(lambda params, inputs, ports: params)
random = np.random.RandomState(0)


def leaves(tree: Any) -> list[Any]:
    return [w for w in trees.weights(tree) if isinstance(w, DyLoRA)]


def ranks_of(seen: Any) -> list[np.ndarray]:
    return [np.asarray(w.active) for w in leaves(seen)]


def rank_of(forward: pj.Forward, params: Any, step_key: Any) -> Any:
    """The rank that a step draws."""
    seen = forward(params, np.zeros((1, 1), np.int32), pj.Ports(step_key=step_key))
    return leaves(seen)[-1].active.max()


# -- the drawn rank ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["uniform", "geometric"])
def test_ranks_are_drawn_as_the_distribution_says(distribution: str) -> None:
    method = methods.dylora(6, min_rank=2, distribution=distribution)
    params, forward = method(KEY, zoo.base("llama"), SEEN)
    keys = jax.random.split(KEY, 20_000)
    drawn = jax.jit(jax.vmap(functools.partial(rank_of, forward, params)))(keys)
    found = np.bincount(np.asarray(drawn), minlength=8) / len(keys)
    wanted = np.ones(5) if distribution == "uniform" else 0.85 ** np.arange(5)
    assert found[:2].sum() == found[7:].sum() == 0
    np.testing.assert_allclose(found[2:7], wanted / wanted.sum(), atol=4 * math.sqrt(0.2 / len(keys)))


def test_a_step_has_one_rank_for_all_layers_and_micro_batches() -> None:
    method = methods.dylora(8, select=".*", rank_pattern={r"\.1\.self_attn": 2, "lm_head": 3})
    params, forward = method(KEY, zoo.base("llama"), SEEN)
    drawn = set()
    for step in range(6):
        keys = {"step_key": jax.random.fold_in(KEY, step)}
        seen = forward(params, TOKENS, pj.Ports(**keys, micro_key=jax.random.key(1)))
        again = forward(params, TOKENS, pj.Ports(**keys, micro_key=jax.random.key(2)))
        assert all(map(np.array_equal, ranks_of(seen), ranks_of(again)))
        rank = int(rank_of(forward, params, **keys))
        tops = [np.asarray(w.top) for w in leaves(params)]
        assert len(tops) == 9 and {t for top in tops for t in top.flat} == {2, 3, 8}
        for active, top in zip(ranks_of(seen), tops, strict=True):  # layers of a smaller rank use all of theirs
            np.testing.assert_array_equal(active, np.minimum(rank, top))
        drawn.add(rank)
    assert len(drawn) > 2
    assert all(map(np.array_equal, ranks_of(forward(params, TOKENS)), tops)), "without a step key: the rank in use"


def test_the_name_seeds_the_rank() -> None:
    drawn = []
    for name in ("one", "two"):
        params, forward = methods.dylora(64, name=name)(KEY, {"q_proj": {"kernel": jnp.eye(64)}}, BARE)
        drawn.append(int(ranks_of(forward(params, TOKENS, pj.Ports(step_key=KEY)))[0]))
    assert drawn[0] != drawn[1]


# -- one step ---------------------------------------------------------------------------------------------------------

R, ALPHA, WIDTHS = 7, 10.0, (5, 6, 4)
W1, W2 = (random.randn(i, o).astype(np.float32) for i, o in itertools.pairwise(WIDTHS))
X, TARGET = random.randn(9, WIDTHS[0]).astype(np.float32), random.randn(9, WIDTHS[2]).astype(np.float32)
TWO = pj.Forward(
    lambda params, inputs, ports: functools.reduce(
        pj.linear, (params["one"]["kernel"], params["two"]["kernel"]), inputs.tokens
    )
)


def two_layers(**options: Any) -> tuple[Any, pj.Forward]:
    with pytest.warns(UserWarning, match="rank 7 is above its own"):
        params, forward = methods.dylora(R, ALPHA, "one|two", **options)(
            KEY, {"one": {"kernel": jnp.asarray(W1)}, "two": {"kernel": jnp.asarray(W2)}}, TWO
        )
    return zoo.disturbed(params), forward


def by_hand(leaves: list[Any], b: int, frozen: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """The gradients of ½ Σ (y − t)² with respect to each A and B, of the first b directions, each factor scaled by
    √(R/b) as in the official code's `dynamic`; in its frozen mode all but the b-th are detached."""
    root, scale = math.sqrt(R / b), ALPHA / R
    low = [(np.asarray(w.a, np.float64)[:, :b], np.asarray(w.b, np.float64)[:b]) for w in leaves]
    whole = [w + scale * (root * a) @ (root * o) for w, (a, o) in zip((W1, W2), low, strict=True)]
    hidden = X @ whole[0]
    error = hidden @ whole[1] - TARGET
    slopes = [X.T @ (error @ whole[1].T), hidden.T @ error]  # with respect to each whole matrix
    found = []
    for slope, (a, o) in zip(slopes, low, strict=True):
        ga, gb = np.zeros((len(a), R)), np.zeros((R, o.shape[1]))
        start = b - 1 if frozen else 0
        ga[:, start:b] = (scale * root * root * slope @ o.T)[:, start:]
        gb[start:b] = (scale * root * root * a.T @ slope)[start:]
        found.append((ga, gb))
    return found


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_is_the_official_one(frozen: bool) -> None:
    params, forward = two_layers(frozen=frozen)
    trained, rest = pj.partition(params)

    @jax.jit
    def gradient(trained: Any, step_key: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            y = forward(pj.combine(trained, rest), jnp.asarray(X), pj.Ports(step_key=step_key))
            return jnp.sum((y - TARGET) ** 2) / 2

        return jax.grad(loss)(trained)

    probe = methods.dylora(R, ALPHA).wrap(BARE)
    drawn = set()
    for index in range(24):
        step_key = jax.random.fold_in(KEY, index)
        b = int(ranks_of(probe(params, X, pj.Ports(step_key=step_key)))[0])
        if b in drawn:
            continue
        drawn.add(b)
        found = gradient(trained, step_key)
        wanted = by_hand([params["one"]["kernel"], params["two"]["kernel"]], b, frozen)
        for mine, (a, o) in zip((found["one"]["kernel"], found["two"]["kernel"]), wanted, strict=True):
            close(mine.a, a, rtol=2e-4, atol=2e-3)
            close(mine.b, o, rtol=2e-4, atol=2e-3)
            for got, want in ((mine.a, a), (mine.b, o)):
                np.testing.assert_array_equal(np.asarray(got) != 0, want != 0)  # zeros are exact
    assert drawn == set(range(1, R + 1))


def test_the_scale_is_alpha_over_the_rank_to_the_bit() -> None:
    params, _ = two_layers()
    for b in range(1, R + 1):
        leaf = methods.use_rank(params, b)["one"]["kernel"]
        assert (
            float(leaf.cut().scale)
            == float(methods.truncate(params, b)["one"]["kernel"].scale)
            == np.float32(ALPHA / b)
        )
    louder = pj.set_scale(params, 0.3)  # α = 0.3 · R, no whole number
    assert float(louder["one"]["kernel"].cut().scale) == np.float32(0.3)
    assert not np.asarray(methods.use_rank(pj.set_scale(params, 0.0), 2)["one"]["kernel"].cut().scale)


# -- training ---------------------------------------------------------------------------------------------------------


def test_steps_of_every_rank_are_one_program() -> None:
    method = methods.dylora(4, 8)
    params, forward = method(KEY, zoo.base("llama"), LLAMA)
    tx = pj.freeze(optax.sgd(1.0), params)
    step = training.make_step(forward, tx, accumulate=2)
    state, frozen = training.init_state(zoo.disturbed(params), tx, KEY)
    moved = set()
    for index in range(8):
        before, ranks = copied(state.trainables), set[int]()
        # Two micro-batches: had they different ranks, their sum would not stop at one.
        run = step if index == 0 else functools.partial(without_compiling, step)
        state, _ = run(state, frozen, zoo.BATCH)
        for old, new in zip(leaves(before), leaves(copied(state.trainables)), strict=True):
            a, b = (old.a != new.a).any(1), (old.b != new.b).any(2)  # [layers, r]
            rank = int(a[0].sum())
            assert (a == (np.arange(4) < rank)[None]).all() and (a == b).all()
            ranks.add(rank)
        assert len(ranks) == 1, "the modules' ranks differ"
        moved |= ranks
    assert len(moved) > 2


@pytest.mark.parametrize("frozen", [False, True])
def test_held_rows_are_bit_identical(frozen: bool) -> None:
    """After steps with momentum and decay; without the wrapper they move."""
    params, forward = two_layers(frozen=frozen)
    trained, rest = pj.partition(params)
    optimiser = optax.adamw(1e-2, weight_decay=0.1)
    for tx, held in ((methods.hold_rows(optimiser), True), (optimiser, False)):
        tx, now = pj.freeze(tx, params), trained
        state, strays = tx.init(now), 0

        @jax.jit
        def step(now: Any, state: Any, step_key: Any, tx: Any = tx) -> Any:
            def loss(t: Any) -> jax.Array:
                return jnp.sum(
                    (forward(pj.combine(t, rest), jnp.asarray(X), pj.Ports(step_key=step_key)) - TARGET) ** 2
                )

            updates, state = tx.update(jax.grad(loss)(now), state, now)
            return pj.apply_updates(now, updates), state

        probe = methods.dylora(R, ALPHA).wrap(BARE)
        for index in range(8):
            step_key = jax.random.fold_in(KEY, index)
            b = int(ranks_of(probe(params, X, pj.Ports(step_key=step_key)))[0])
            before, (now, state) = copied(now), step(now, state, step_key)
            part = np.arange(R) < b if not frozen else np.arange(R) == b - 1
            for old, new in zip(leaves(before), leaves(copied(now)), strict=True):
                assert (old.a != new.a).any(0)[part].all() and (old.b != new.b).any(1)[part].all()
                strays += int((old.a != new.a)[:, ~part].sum() + (old.b != new.b)[~part].sum())
        assert (strays == 0) is held


def test_hold_rows_reaches_nested_leaves_and_leaves_others_alone() -> None:
    method = pj.chain(
        methods.dylora(4, select="q_proj", name="inner"),
        methods.dylora(4, select="q_proj", name="outer"),
        methods.lora(2, select="v_proj|q_proj"),
    )
    params = pj.partition(method(KEY, zoo.base("llama"), LLAMA)[0])[0]
    ones = jax.tree.map(jnp.ones_like, params)

    def first_two(w: Any) -> Any:
        none = lambda x, axis: x.at[(slice(None),) * axis + (slice(2, None),)].set(0)  # noqa: E731
        return dataclasses.replace(w, a=none(w.a, 2), b=none(w.b, 1)) if isinstance(w, DyLoRA) else w

    grads = trees.map_weights(first_two, ones)
    tx = methods.hold_rows(optax.add_decayed_weights(1.0))
    updates, _ = tx.update(grads, tx.init(params), ones)
    assert same(updates, jax.tree.map(lambda g: 2 * g, grads))


# -- any rank, once trained -------------------------------------------------------------------------------------------

METHOD = methods.dylora(4, 6, "(q|v)_proj|embed", rank_pattern={r"\.1\.": 2})


def test_every_rank_merges_to_what_it_computes() -> None:
    params, forward = METHOD(KEY, zoo.base("llama"), LLAMA)
    noisy, run = zoo.disturbed(params), jax.jit(forward)
    outputs = [run(noisy, zoo.TOKENS)]
    for rank in range(1, 5):
        used, cut = methods.use_rank(noisy, rank), methods.truncate(noisy, rank)
        y = without_compiling(run, used, zoo.TOKENS)
        close(zoo.compiled("llama")(pj.merge(used), zoo.TOKENS), y, atol=1e-4)
        close(pj.merge(cut), pj.merge(used), rtol=1e-6, atol=1e-6)
        assert all(type(w) is LoRA for w in trees.weights(cut))
        assert pj.count(cut).trainable == sum(
            min(rank, top) * (i + o)
            for i, o, tops in ((32, 32, (4, 2, 4)), (32, 16, (4, 2, 4)), (64, 32, (4,)))
            for top in tops
        )
        assert pj.count(used) == pj.count(params)
        outputs.append(y)
    assert all(differs(a, b) for a, b in itertools.pairwise(outputs[1:]))
    close(outputs[0], outputs[4], rtol=0, atol=0)  # by default, the largest
    tried = jax.vmap(lambda rank: forward(methods.use_rank(noisy, rank), zoo.TOKENS))(jnp.arange(1, 5))
    close(tried, jnp.stack(outputs[1:]), atol=1e-4)


def test_truncated_leaves_train_on_through_the_same_forward() -> None:
    params, forward = METHOD(KEY, zoo.base("llama"), LLAMA)
    cut = methods.truncate(zoo.disturbed(params), 2)
    seen = METHOD.wrap(SEEN)(cut, zoo.TOKENS, pj.Ports(step_key=KEY))
    assert same(seen, cut)
    assert jax.eval_shape(forward, cut, zoo.TOKENS).shape == (8, 12, zoo.VOCAB)


def test_lora_is_truncated_by_the_same_function() -> None:
    method = pj.chain(methods.lora(4, 6, name="one"), methods.lora(3, select="o_proj", name="two"))
    params = zoo.disturbed(method(KEY, zoo.base("llama"), LLAMA)[0])
    attention = methods.truncate(params, 2, name="one")["model"]["layers"]["self_attn"]
    q, o = attention["q_proj"]["kernel"], attention["o_proj"]["kernel"]
    whole = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert q.ranks == (2, 2, 2) and o.ranks == (3, 3, 3)
    np.testing.assert_array_equal(q.a, whole.a[..., :2])
    np.testing.assert_array_equal(q.b, whole.b[:, :2])
    np.testing.assert_array_equal(q.scale, np.full(3, 3, np.float32))
    assert same(methods.truncate(params, 4, name="one"), params)


@pytest.mark.parametrize("form", ["whole", "in use", "truncated"])
def test_peft_gives_the_same_logits(form: str, tmp_path: Path) -> None:
    params, forward = adapted("llama", METHOD)
    made = {
        "whole": lambda: params,
        "in use": lambda: methods.use_rank(params, 3),
        "truncated": lambda: methods.truncate(params, 3),
    }[form]()
    hf_peft.save(tmp_path / "a", made, forward)
    wanted = logits("llama", made)
    assert differs(wanted, logits("llama", base("llama").params), 0.1)
    np.testing.assert_allclose(torch_logits(in_peft("llama", tmp_path / "a"), TOKENS), wanted, atol=1e-4)
    found = config(tmp_path / "a")
    assert (found["r"], found["lora_alpha"]) == ((4, 6) if form == "whole" else (3, 6))
    assert set(found["rank_pattern"].values()) == {2}


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank": 0}, "rank must be a positive integer, got 0"),
        ({"max_rank": 4, "min_rank": 5}, "min_rank is 5: give an integer from 1 to max_rank, 4"),
        ({"min_rank": 0}, "min_rank is 0"),
        ({"distribution": "normal"}, "distribution is 'normal': choose 'uniform' or 'geometric'"),
        ({"max_rank": 4, "rank_pattern": {"q": 5}}, "rank_pattern gives 'q' the rank 5, above max_rank, 4"),
        ({"rslora": True}, r"rslora is not for dylora\(\)"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.dylora(**options)


def test_bad_ranks() -> None:
    params, _ = METHOD(KEY, zoo.base("llama"), LLAMA)
    for change in (methods.use_rank, methods.truncate):
        for rank in (0, 5):
            with pytest.raises(ValueError, match=f"the rank {rank} is not one of 1 to 4, which model/.*/embedding has"):
                change(params, rank)
        with pytest.raises(ValueError, match=r"this tree holds no .*LoRA leaf called 'other'"):
            change(params, 2, name="other")
        with pytest.raises(ValueError, match=r"this tree holds no .*LoRA leaf: apply methods"):
            change(zoo.base("llama"), 2)
    pissa, _ = methods.pissa(2)(KEY, zoo.base("llama"), LLAMA)
    with pytest.raises(ValueError, match="self_attn/q_proj/kernel is no LoRA on its whole base"):
        methods.truncate(pissa, 1)
