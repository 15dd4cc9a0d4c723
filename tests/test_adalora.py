"""AdaLoRA: budgets, importances and masks against HF PEFT's, step by step; where its optimiser may stand; pruning."""

import dataclasses
import functools
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from checks import close, copied, differs, same, without_compiling
from oracles.peft_models import PREFIX, TOKENS, base
from peft.tuners.adalora.layer import RankAllocator

import peft_jax as pj
from experiments import rank_map
from peft_jax import methods, training
from peft_jax.methods.adalora import SVD, Allocation, Triplets, found, table
from peft_jax.training import init_state, make_step
from peft_jax.training.step import shardings_of

pytestmark = pytest.mark.usefixtures("quick_compiles")
KEY = jax.random.key(0)

WIDTH, HIDDEN, LAYERS = 8, 12, 3


def residual(params: Any, inputs: pj.Inputs, ports: pj.Ports) -> jax.Array:
    """An embedding, three residual layers in a scan, and a head."""

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        return x + pj.linear(jnp.tanh(pj.linear(x, w["up"]["kernel"])), w["down"]["kernel"]), None

    x = jax.lax.scan(layer, pj.embed(inputs.tokens, params["table"]["embedding"]), params["layers"])[0]
    return pj.linear(x, params["head"]["kernel"])


def names(path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"layers.{i}.{path[1]}" for i in range(LAYERS)) if path[0] == "layers" else (path[0],)


PLAIN = pj.Forward(residual, spec=pj.Spec(names=names, stacked=lambda path: path[0] == "layers"))
ADAPT = methods.adalora(3, 30, "up|down", initial_rank=6)  # 6 matrices: from 36 triplets to 18


def toy(method: Any = ADAPT) -> tuple[Any, pj.Forward]:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape) / 3, jnp.float32)  # noqa: E731
    stacks = {"up": {"kernel": draw(LAYERS, WIDTH, HIDDEN)}, "down": {"kernel": draw(LAYERS, HIDDEN, WIDTH)}}
    params = {"table": {"embedding": draw(16, WIDTH)}, "layers": stacks, "head": {"kernel": draw(WIDTH, 5)}}
    return method(KEY, params, PLAIN)


def batch(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng([1, step])
    return {"tokens": random.integers(0, 16, (4, 3)).astype(np.int32), "wanted": np.ones((4, 3, 5), np.float32)}


def distance(forward: pj.Forward, params: Any, batch: Any, ports: pj.Ports) -> tuple[jax.Array, jax.Array]:
    off = forward(params, batch["tokens"], ports) - batch["wanted"]
    return jnp.sum(jnp.square(off)), jnp.float32(off.size)


def fit(params: Any, forward: pj.Forward, tx: Any, steps: int = 12, **options: Any) -> training.Run:
    return training.fit(forward, params, tx, batch, steps, loss=distance, progress=False, **options)


def allocate(tx: Any = None, steps: int = 12, **options: Any) -> Any:
    """Six steps of pruning after two without."""
    return methods.allocate_rank(tx or optax.adam(0.03), steps, **{"initial_steps": 2, "final_steps": 4} | options)


def stirred(params: Any, seed: int = 0) -> Any:
    """Every trained number moved."""
    random = np.random.default_rng(seed)
    move = lambda on, x: x + jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype) if on else x  # noqa: E731
    return jax.tree.map(move, pj.trainable(params), params)


# -- against HF PEFT --------------------------------------------------------------------------------------------------

MODULES = {"self_attn": ["q_proj", "v_proj"], "mlp": ["down_proj"]}


def layers(tree: Any) -> Iterator[tuple[str, Any]]:
    """``(name in HF PEFT, array)`` for all that trains, a layer at a time; of a tree, or of a state's `Triplets`."""
    for block, modules in MODULES.items():
        for module in modules:
            w = tree.get(f"model/layers/{block}/{module}/kernel/adalora")
            for i in range(3):
                at = f"{PREFIX}model.layers.{i}.{block}.{module}"
                yield f"{at}.lora_A.default", w.q[i].T
                yield f"{at}.lora_E.default", w.values[i][:, None]
                yield f"{at}.lora_B.default", w.p[i].T


def gradients(like: Any, named: dict[str, np.ndarray]) -> Any:
    """A tree like `like` of HF PEFT's numbers."""

    def each(path: Any, w: SVD) -> SVD:
        at = [f"{PREFIX}model.layers.{i}.{path[2]}.{path[3]}" for i in range(3)]
        stack = lambda end: jnp.asarray(np.stack([named[f"{a}.{end}.default"].T for a in at]))  # noqa: E731
        return dataclasses.replace(w, q=stack("lora_A"), values=stack("lora_E")[:, 0], p=stack("lora_B"))

    return pj.trees.rewrite(like, "adalora", each)


def test_every_step_is_that_of_hf_peft() -> None:
    """AdamW on both sides: they share the loss's gradient, and each adds its own penalty's.

    β₂ is 0.9, because optax computes 1 − 0.999 in fp32, which loses five digits.
    """
    method = methods.adalora(2, 32, "(q|v|down)_proj", initial_rank=4)
    params, _ = method(KEY, base("llama").params, base("llama").forward)
    modules = [module for modules in MODULES.values() for module in modules]
    options = {"init_r": 4, "target_r": 2, "lora_alpha": 32, "tinit": 4, "tfinal": 8, "deltaT": 3, "total_step": 30}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=modules, orth_reg_weight=0.3, **options)
        model = peft.get_peft_model(base("llama").torch(), config)
    theirs = {name: p for name, p in model.named_parameters() if p.requires_grad}
    starts = dict(layers(found(params)))
    assert theirs.keys() == starts.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.copy_(torch.tensor(np.asarray(starts[name])))
    torch_tx = torch.optim.AdamW(theirs.values(), lr=2e-2, betas=(0.9, 0.9), weight_decay=0.1)
    tuner, allocator = model.base_model, model.base_model.rankallocator

    def backward(weight: float) -> dict[str, np.ndarray]:
        config.orth_reg_weight = weight
        torch_tx.zero_grad()
        ids = torch.tensor(TOKENS)
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.numpy().copy() for name, p in theirs.items()}

    def of_theirs(kept: dict[str, torch.Tensor], name: str) -> np.ndarray:
        return kept[name.removeprefix(PREFIX)].numpy()

    # The last phase begins at step 22, which ΔT does not divide: HF PEFT prunes there all the same.
    tx = methods.allocate_rank(
        optax.adamw(2e-2, b2=0.9, weight_decay=0.1), 30, initial_steps=4, final_steps=8, every=3, orthogonality=0.3
    )
    trained, tx = pj.partition(params)[0], pj.freeze(tx, params)
    state, update, left = tx.init(trained), jax.jit(tx.update), []
    for t in range(30):
        gradient = gradients(trained, backward(0.0))
        backward(0.3)
        torch_tx.step()
        tuner.update_and_allocate(t)
        step = without_compiling if t > 1 else lambda fn, *args: fn(*args)
        updates, state = step(update, gradient, state, trained)
        trained = pj.apply_updates(trained, updates)
        assert state.budget == allocator.budget_schedule(t)[0]
        for name, x in layers(found(trained)):
            np.testing.assert_allclose(x, theirs[name].detach(), rtol=1e-4, atol=1e-6, err_msg=f"step {t}: {name}")
            if "lora_E" in name:
                np.testing.assert_array_equal(x == 0, theirs[name].detach() == 0, err_msg=f"step {t}: {name}")
        left.append(sum(methods.ranks(pj.combine(trained, pj.partition(params)[1])).values()))
        if t >= 22:  # HF PEFT has thrown its importances away
            continue
        for mine, kept in ((state.sensitivity, allocator.exp_avg_ipt), (state.uncertainty, allocator.exp_avg_unc)):
            for name, x in layers(mine):
                wanted = of_theirs(kept, name)
                np.testing.assert_allclose(x, wanted, rtol=1e-3, atol=1e-5 * wanted.max(), err_msg=f"step {t}: {name}")
        for name, s in layers({path: Triplets(s[:, None], s, s[:, None]) for path, s in state.scores.items()}):
            if "lora_E" in name:
                each = [
                    of_theirs(allocator.exp_avg_ipt, n) * of_theirs(allocator.exp_avg_unc, n)
                    for n in (name, name.replace("lora_E", "lora_A"), name.replace("lora_E", "lora_B"))
                ]
                wanted = each[0][:, 0] + each[1].mean(1) + each[2].mean(0)
                np.testing.assert_allclose(s[:, 0], wanted, rtol=1e-5, err_msg=f"step {t}: {name}")
    assert left[4] == 36 and set(left[22:]) == {18} and len(set(left)) > 4


class Allocator(RankAllocator):
    def __init__(self, initial: int, target: int, **options: int) -> None:
        self.init_bgt, self.target_bgt, self.peft_config = initial, target, types.SimpleNamespace(**options)


@pytest.mark.parametrize(("steps", "initial", "final"), [(100, 10, 37), (64, 0, 1), (7, 3, 3), (50, 0, 0)])
def test_the_budget_is_that_of_hf_peft(steps: int, initial: int, final: int) -> None:
    tx = methods.allocate_rank(optax.sgd(0.1), steps, initial_steps=initial, final_steps=final)
    trained = pj.partition(toy()[0])[0]

    @jax.jit
    def run(trained: Any) -> Any:
        step = lambda state, _: (lambda new: (new, new.budget))(tx.update(trained, state, trained)[1])  # noqa: E731
        return jax.lax.scan(step, tx.init(trained), length=steps + 3)[1]

    theirs = Allocator(36, 18, tinit=initial, tfinal=final, deltaT=1, total_step=steps)
    assert run(trained).tolist() == [theirs.budget_schedule(t)[0] for t in range(steps + 3)]


# -- against the paper's equations, in numpy --------------------------------------------------------------------------


def by_hand(start: Any, slopes: list[Any], form: str, order: str, score: str) -> Iterator[Any]:
    """Algorithm 1 on dicts of `Triplets` of 2-d arrays, a matrix each, under plain gradient descent at 0.1."""
    weights = {name: Triplets(*map(np.copy, w)) for name, w in start.items()}
    mean = {name: Triplets(*map(np.zeros_like, w)) for name, w in start.items()}
    spread, importance = {name: Triplets(*map(np.zeros_like, w)) for name, w in start.items()}, {}
    total = sum(w.values.size for w in weights.values())
    for t, slope in enumerate(slopes):
        gradient = {}
        for name, w in weights.items():
            off = w.q.T @ w.q - np.eye(len(w.values)), w.p @ w.p.T - np.eye(len(w.values))
            if form == "paper":
                pull = 4 * w.q @ off[0], 4 * off[1] @ w.p
            else:
                count = 2 * len(weights)
                pull = (
                    2 * w.q @ off[0] / np.linalg.norm(off[0]) / count,
                    2 * off[1] @ w.p / np.linalg.norm(off[1]) / count,
                )
            gradient[name] = Triplets(slope[name].q + 0.2 * pull[0], slope[name].values, slope[name].p + 0.2 * pull[1])
        after = {
            name: Triplets(*(x - 0.1 * g for x, g in zip(w, gradient[name], strict=True)))
            for name, w in weights.items()
        }
        if t < 8:
            for name in weights:
                at, parts = (weights if order == "paper" else after)[name], []
                for i in range(3):
                    now = abs(at[i] * gradient[name][i])
                    mean[name][i][...] = 0.8 * mean[name][i] + 0.2 * now
                    spread[name][i][...] = 0.7 * spread[name][i] + 0.3 * abs(now - mean[name][i])
                    parts.append(now if score == "sensitivity" else mean[name][i] * spread[name][i])
                importance[name] = parts[1] + parts[0].mean(0) + parts[2].mean(1)
                if score == "magnitude":
                    importance[name] = abs(at.values)
        if t > 2:
            share = max(0, 1 - (t - 2) / 6)
            budget = int((total - total // 2) * share**3 + total // 2)
            if t % 2 == 0 or t >= 8:
                threshold = np.sort(np.concatenate(list(importance.values())))[total - budget - 1]
                for name, w in after.items():
                    w.values[importance[name] <= threshold] = 0
        weights = after
        yield weights, importance


def single(w: Any) -> dict[int, Triplets]:
    return {i: Triplets(*(np.asarray(x[i], np.float64) for x in (w.q, w.values, w.p))) for i in range(LAYERS)}


@pytest.mark.parametrize(
    ("form", "order", "score"),
    [
        ("code", "paper", "full"),
        ("paper", "code", "full"),
        ("code", "code", "sensitivity"),
        ("paper", "code", "magnitude"),
    ],
)
def test_forms_orders_and_scores(form: str, order: str, score: str) -> None:
    tx = methods.allocate_rank(
        optax.sgd(0.1), 12, initial_steps=2, final_steps=4, every=2, beta1=0.8, beta2=0.7, orthogonality=0.2,
        form=form, order=order, score=score,
    )  # fmt: skip
    params, keys = stirred(toy()[0]), [f"layers/{name}/kernel/adalora" for name in ("down", "up")]
    trained, random = pj.partition(params)[0], np.random.default_rng(2)
    slopes = [jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), trained) for _ in range(12)]
    flat = lambda tree: {f"{k}{i}": w for k in keys for i, w in single(found(tree)[k]).items()}  # noqa: E731
    wanted = by_hand(flat(trained), [flat(slope) for slope in slopes], form, order, score)
    state, update = tx.init(trained), jax.jit(tx.update)
    for slope, (weights, importance) in zip(slopes, wanted, strict=True):
        updates, state = update(slope, state, trained)
        trained = pj.apply_updates(trained, updates)
        assert {k: (w.values == 0).tolist() for k, w in flat(trained).items()} == {
            k: (w.values == 0).tolist() for k, w in weights.items()
        }
        close(flat(trained), weights, rtol=1e-4, atol=1e-5)
        scores = {f"{k}{i}": state.scores[k][i] for k in keys for i in range(LAYERS)}
        close(scores, importance, rtol=1e-4, atol=1e-6)
    assert sum((w.values != 0).sum() for w in flat(trained).values()) == 18


def test_the_penalty() -> None:
    params = stirred(toy()[0])
    grams = [
        g for w in found(params).values() for g in (jnp.matrix_transpose(w.q) @ w.q, w.p @ jnp.matrix_transpose(w.p))
    ]
    norms = np.array([np.linalg.norm(np.asarray(g) - np.eye(6), axis=(-2, -1)) for g in grams])
    assert float(methods.orthogonality(params)) == pytest.approx(norms.mean(), rel=1e-5)
    assert float(methods.orthogonality(params, "paper")) == pytest.approx(np.square(norms).sum(), rel=1e-5)
    half = pj.partition(params)[0]
    assert float(methods.orthogonality(half)) == float(methods.orthogonality(params))

    def square(path: Any, w: SVD) -> SVD:  # orthogonal already: R = 0, where a root has no slope
        q = jnp.broadcast_to(jnp.eye(*w.q.shape[1:]), w.q.shape)
        return dataclasses.replace(w, q=q, p=jnp.broadcast_to(jnp.eye(*w.p.shape[1:]), w.p.shape))

    half = pj.trees.rewrite(half, "adalora", square)
    for form in ("code", "paper"):
        value, slope = jax.jit(jax.value_and_grad(functools.partial(methods.orthogonality, form=form)))(half)
        assert value == 0 and all((x == 0).all() for x in jax.tree.leaves(slope))
    with pytest.raises(ValueError, match=r"form is 'squared': choose 'code', 'paper'$"):
        methods.orthogonality(params, "squared")
    with pytest.raises(ValueError, match=r"holds no SVD leaf: apply methods\.adalora before"):
        methods.orthogonality({"kernel": jnp.ones((2, 2))})


# -- in training ------------------------------------------------------------------------------------------------------


def test_a_run_ends_at_its_target_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A head trains too.  The second run begins where the first one saved, between two prunings."""
    params, forward = toy(pj.chain(ADAPT, methods.unfreeze("head")))
    tx = pj.freeze(allocate(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.03))), params)
    whole = fit(params, forward, tx)
    state = whole.opt_state
    assert sum(methods.ranks(whole.params).values()) == state.budget == 18 and state.count == 12
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]
    for name, w in found(whole.params).items():
        np.testing.assert_array_equal(w.values != 0, state.kept[name])

    taken: list[int] = []

    def read(step: int) -> Any:
        taken.append(step)
        if taken.count(7) == 1 and step == 7:
            raise InterruptedError
        return batch(step)

    runs = functools.partial(training.fit, forward, params, tx, read, 12, loss=distance, progress=False)
    with pytest.raises(InterruptedError):
        runs(checkpoints=tmp_path, save_every=3)
    again = runs(checkpoints=tmp_path)
    assert taken == [*range(8), *range(6, 12)]
    assert same(again.params, whole.params) and same(again.opt_state, state)


def test_what_is_not_adaloras_passes_through() -> None:
    """Heads move as under the optimiser alone; triplets too, until they are pruned."""
    params, _ = toy(pj.chain(ADAPT, methods.unfreeze("head")))
    trained, adam = pj.partition(stirred(params))[0], optax.adam(0.03)
    tx, bare = pj.freeze(allocate(adam, orthogonality=0.0, initial_steps=0), params), pj.freeze(adam, params)
    ours, theirs = tx.init(trained), bare.init(trained)
    updates = jax.jit(tx.update), jax.jit(bare.update)
    for t in range(2):
        (mine, ours), (plain, theirs) = (f(trained, s, trained) for f, s in zip(updates, (ours, theirs), strict=True))
        assert same(mine, plain) == (t == 0)
        assert same(mine["head"], plain["head"]) and same(ours.inner, theirs)
    for name, w in found(mine).items():
        out = np.asarray(~ours.kept[name])
        assert same(w.q, found(plain)[name].q) and out.any()
        np.testing.assert_array_equal(w.values[out], -found(trained)[name].values[out])
        np.testing.assert_array_equal(w.values[~out], found(plain)[name].values[~out])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_pruned_is_exactly_zero(dtype: Any) -> None:
    params, _ = toy(methods.adalora(3, 30, "up|down", initial_rank=6, dtype=dtype))
    trained, tx = pj.partition(stirred(params))[0], allocate(optax.adamw(0.3, weight_decay=0.1), final_steps=9)
    tx = pj.freeze(tx, params)
    state, update = tx.init(trained), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(trained, state, trained)
        with jax.numpy_dtype_promotion("standard"):
            trained = optax.apply_updates(trained, updates)
    assert {w.values.dtype for w in found(trained).values()} == {jnp.dtype(dtype)}
    assert sum(int((w.values != 0).sum()) for w in found(trained).values()) == 18


def test_accumulation() -> None:
    """MultiSteps round it, and fit's own micro-batches: one step of pruning for each of the optimiser's."""
    params, forward = toy()
    plain = fit(params, forward, pj.freeze(allocate(), params))
    split = fit(params, forward, pj.freeze(allocate(), params), accumulate=2)
    close(split.params, plain.params, rtol=1e-3, atol=1e-4)

    twice = optax.MultiSteps(allocate(), 2)
    run = training.fit(
        forward, params, pj.freeze(twice, params), lambda step: batch(step // 2), 24, loss=distance, progress=False
    )
    assert run.opt_state.inner_opt_state.count == 12
    close(run.params, plain.params, rtol=1e-3, atol=1e-4)
    assert {k: v.tolist() for k, v in run.opt_state.inner_opt_state.kept.items()} == {
        k: v.tolist() for k, v in plain.opt_state.kept.items()
    }


def test_guards_go_outside() -> None:
    trained = pj.partition(stirred(toy()[0]))[0]
    tx = optax.apply_if_finite(allocate(optax.sgd(0.1)), 3)
    update, state = jax.jit(tx.update), tx.init(trained)
    _, state = update(trained, state, trained)
    _, after = update(jax.tree.map(lambda x: x * jnp.nan, trained), state, trained)
    assert after.total_notfinite == 1 and same(after.inner_state, state.inner_state)


def test_a_tree_trains_under_its_optimiser_or_is_refused() -> None:
    params, forward = toy()
    tell = "SVD leaves of 'adalora' train under methods.allocate_rank, which this optimiser is without: give "
    for tx in (optax.adam(0.1), optax.chain(optax.clip(1.0), optax.sgd(0.1))):
        with pytest.raises(ValueError, match=tell):
            fit(params, forward, pj.freeze(tx, params))
        with pytest.raises(ValueError, match=tell):
            init_state(params, tx, KEY)
    assert fit(params, forward, optax.sgd(0.1), 1, allocate=False).step == 1

    for tx in (
        optax.chain(allocate(), optax.clip(1.0)),
        optax.chain(optax.clip(1.0), optax.chain(allocate(), optax.scale(0.5))),
        optax.MultiSteps(optax.chain(allocate(), optax.scale(0.5)), 2),
        optax.chain(optax.apply_if_finite(allocate(), 3), optax.clip(1.0)),
    ):
        with pytest.raises(ValueError, match=r"methods\.allocate_rank is followed by another transformation"):
            init_state(params, pj.freeze(tx, params), KEY)

    hyper = optax.inject_hyperparams(lambda learning_rate: allocate(optax.adam(learning_rate)))(learning_rate=0.1)
    for tx in (
        optax.chain(optax.clip(1.0), allocate()),
        allocate(optax.chain(optax.clip(1.0), optax.adam(0.1))),
        optax.apply_if_finite(allocate(), 3),
        hyper,
        optax.partition({"all": allocate()}, lambda tree: jax.tree.map(lambda _: "all", tree)),
    ):
        init_state(params, pj.freeze(tx, params), KEY)

    with pytest.raises(ValueError, match=r"would count micro-steps: give optax\.MultiSteps"):
        init_state(params, allocate(optax.MultiSteps(optax.adam(0.1), 2)), KEY)
    trained = pj.partition(params)[0]
    for tx in (allocate(optax.identity()), optax.chain(allocate(optax.identity()), optax.adam(0.1))):
        with pytest.raises(ValueError, match="round an optimiser that changes nothing: put the whole"):
            tx.update(trained, tx.init(trained), trained)
    with pytest.raises(ValueError, match=r"needs the parameters: tx.update\(grads, state, params\)"):
        allocate().update(trained, allocate().init(trained))
    with pytest.raises(ValueError, match=r"holds no SVD leaf: apply methods\.adalora before"):
        allocate().init({"kernel": jnp.ones((2, 2))})


def test_on_eight_devices() -> None:
    """Trainables in pieces, each matrix's own way: budgets, masks and numbers are those of one device."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params, forward = toy()
    over = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))  # noqa: E731
    spread = pj.place(params, jax.tree.map(lambda x: over(), params))

    def cut(path: Any, w: SVD) -> SVD:
        q, p = jax.device_put(w.q, over(None, "model", None)), jax.device_put(w.p, over(None, None, "model"))
        return dataclasses.replace(w, q=q, values=jax.device_put(w.values, over(None, "data")), p=p)

    ends, tx = [], pj.freeze(allocate(), params)
    for given in (params, pj.trees.rewrite(spread, "adalora", cut)):
        state, frozen = init_state(given, tx, KEY)
        step = make_step(forward, tx, distance, shardings=shardings_of(state))
        for t in range(12):
            go = without_compiling if t else lambda fn, *args: fn(*args)
            state, _ = go(step, state, frozen, jax.device_put(batch(t), over("data")) if ends else batch(t))
        ends.append(copied((state.trainables, state.opt_state)))
    close(*ends, rtol=1e-3, atol=1e-4)
    assert int(ends[0][1].budget) == 18


# -- the leaf, and leaving --------------------------------------------------------------------------------------------


def pruned_by_hand(params: Any) -> Any:
    """λ = 0 in an uneven half of the triplets, one layer's all."""
    dead = {"up": np.array([[1, 0, 1, 1, 0, 1], [1] * 6, [0, 0, 1, 0, 1, 0]]), "down": np.array([[0, 1] * 3] * 3)}
    kill = lambda path, w: dataclasses.replace(w, values=jnp.where(dead[path[1]] == 1, 0, w.values))  # noqa: E731
    return pj.trees.rewrite(params, "adalora", kill)


def test_pruning_for_good() -> None:
    params, forward = toy()
    params = pruned_by_hand(stirred(params))
    small = methods.prune(params)
    ids = batch(0)["tokens"]
    call = jax.jit(forward)
    close(call(small, ids), call(params, ids), rtol=1e-6, atol=1e-6)
    assert pj.count(small).bytes < pj.count(params).bytes and pj.count(small).frozen == pj.count(params).frozen
    counts = {"layers.0.up": 2, "layers.1.up": 0, "layers.2.up": 4} | {f"layers.{i}.down": 3 for i in range(3)}
    assert methods.ranks(small, forward) == methods.ranks(params, forward) == counts
    assert methods.ranks(small) == {".".join([*(k.split(".")[::2]), k.split(".")[1]]): n for k, n in counts.items()}
    assert pj.count(small).trainable == (2 + 0 + 4 + 3 + 3 + 3) * (WIDTH + HIDDEN + 1)
    up = found(small)["layers/up/kernel/adalora"]
    assert up.q.shape == (3, WIDTH, 4) and up.triplets == ("010010", "000000", "110101")
    assert methods.prune(small) is not small and same(methods.prune(small), small)
    assert table(counts).splitlines() == [
        "                 0    1    2",
        "layers.*.up      2    0    4",
        "layers.*.down    3    3    3",
    ]
    # It trains on, under any optimiser with or without more pruning, and what pads it stays where it is.
    noisy = stirred(small, seed=5)
    close(call(methods.prune(noisy), ids), call(noisy, ids), rtol=1e-6, atol=1e-6)
    for tx, options in ((optax.adamw(0.01, weight_decay=0.1), {"allocate": False}), (allocate(), {})):
        run = fit(small, forward, pj.freeze(tx, small), **options)
        for w in found(run.params).values():
            for x in (jnp.matrix_transpose(w.q), w.values, w.p):
                assert not np.asarray(x)[~w.used].any()
        assert sum(methods.ranks(run.params).values()) == 15
    with pytest.raises(ValueError, match="no SVD leaf, whose ranks could be counted"):
        methods.prune(pj.strip(small))
    with pytest.raises(ValueError, match="kernel has holes: combine the two halves"):
        methods.prune(pj.partition(small)[1])


def test_the_map_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written whole or not at all; the same ranks are the same bytes."""
    counts = {f"layers.{i}.{name}": i for i in range(3) for name in ("up", "down")} | {"layers.1.gate": 7, "head": 4}
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        file = tmp_path / f"ranks.{ending}"
        rank_map.draw(counts, file)
        first = file.read_bytes()
        rank_map.draw(counts, file)
        assert first.startswith(start) and file.read_bytes() == first
        rank_map.draw(counts | {"head": 5}, file)
        assert file.read_bytes() != first
    assert "layers.*.gate" in first.decode() and {path.name for path in tmp_path.iterdir()} == {
        "ranks.png",
        "ranks.svg",
    }
    before = file.read_bytes()

    def full(self: Any, part: Path, **options: Any) -> None:
        part.write_bytes(b"half")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", full)
        with pytest.raises(OSError, match="disk is full"):
            rank_map.draw(counts, file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match=r"ranks\.gif ends in '\.gif': choose \.png or \.svg"):
        rank_map.draw(counts, tmp_path / "ranks.gif")
    with pytest.raises(ValueError, match="no ranks to draw"):
        rank_map.draw({}, file)


def test_some_layers() -> None:
    """A stacked leaf of which one layer is left alone: it counts in no budget and never moves."""
    params, forward = toy(methods.adalora(2, 30, "up|down", layers=[0, 2]))
    assert pj.count(params).trainable == 4 * 3 * (WIDTH + HIDDEN + 1)
    run = fit(params, forward, pj.freeze(allocate(), params))
    assert run.opt_state.budget == 8 and sum(methods.ranks(run.params, forward).values()) == 8
    assert set(methods.ranks(run.params, forward)) == {f"layers.{i}.{name}" for i in (0, 2) for name in ("up", "down")}
    plain, merged = pj.strip(run.params), pj.merge(stirred(run.params))
    for name in ("up", "down"):
        moved = [differs(plain["layers"][name]["kernel"][i], merged["layers"][name]["kernel"][i]) for i in range(3)]
        assert moved == [True, False, True]


def test_equal_ranks_prune_nothing() -> None:
    params, forward = toy(methods.adalora(4, 8, "up|down", initial_rank=4))
    run = fit(params, forward, pj.freeze(allocate(), params))
    assert run.opt_state.budget == 24 and set(methods.ranks(run.params).values()) == {4}


def test_dropout_and_half_precision() -> None:
    params, forward = toy(methods.adalora(3, 30, "up|down", dropout=0.5))
    params, ids = stirred(params), batch(0)["tokens"]
    port = lambda i: pj.Ports(micro_key=jax.random.key(i))  # noqa: E731
    run = jax.jit(forward)
    first, again, other = (run(params, ids, port(i)) for i in (0, 0, 1))
    assert same(first, again) and differs(first, other) and differs(first, run(params, ids))
    w = jax.tree.map(lambda x: x[0], found(params)["layers/up/kernel/adalora"])
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    assert pj.linear(x, w).dtype == jnp.bfloat16


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="the target rank is 8 and initial_rank 6: pruning cannot end above its start"):
        methods.adalora(8, initial_rank=6)
    for options, message in (
        ({"initial_rank": 0}, "rank must be a positive integer, got 0"),
        ({"alpha": 0}, r"alpha must be positive, got 0\.0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.adalora(2, **options)
    with pytest.warns(UserWarning, match=r"layers\.0\.\w+ is a \d+ x \d+ matrix: initial rank 9 is above its own"):
        toy(methods.adalora(6, 8, "up|down"))
    for options, message in (
        (
            {"initial_steps": 5, "final_steps": 7},
            "initial_steps 5 and final_steps 7 leave none of the 12 steps",
        ),
        ({"initial_steps": 20}, "initial_steps 20 and final_steps 4 leave none of the 12"),
        ({"final_steps": -1}, "final_steps -1 leave none"),
        ({"every": 0}, "every is 0: give the steps between two prunings, 1 or more"),
        ({"beta1": 1.0}, r"beta1 must lie in \[0, 1\), got 1\.0"),
        ({"beta2": -0.1}, r"beta2 must lie in \[0, 1\), got -0\.1"),
        ({"orthogonality": -1.0}, r"orthogonality must not be negative, got -1\.0"),
        ({"form": "squared"}, r"form is 'squared': choose 'code', 'paper'$"),
        ({"order": "after"}, r"order is 'after': choose 'code', 'paper'$"),
        ({"score": "loss"}, r"score is 'loss': choose 'full', 'sensitivity', 'magnitude'$"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(**options)
    start = allocate(steps=1, initial_steps=None, final_steps=None).init(pj.partition(toy()[0])[0])
    assert isinstance(start, Allocation) and start.budget == 36
