"""Many runs at once, each against itself alone."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
import zoo
from checks import close, copied, differs, same

import peft_jax as pj
from peft_jax import adapters, methods, training
from peft_jax.training import many

pytestmark = pytest.mark.usefixtures("quick_compiles")
LLAMA, TOY = zoo.build("llama", remat="none"), toy.forward(48)
STEPS = 4


def text(step: int) -> dict[str, np.ndarray]:
    return {name: np.roll(x, step, axis=0)[:4] for name, x in zoo.BATCH.items()}


quiet = functools.partial(training.fit_many, progress=False)


# -- models -----------------------------------------------------------------------------------------------------------

# What the runs are, by name; each with a rate and a key of its own.
Made = dict[str, tuple[Any, pj.Forward]]


def made(*some: pj.Method) -> Made:
    seeds = {f"run {i}": (jax.random.key(i), method) for i, method in enumerate(some)}
    trees = {name: method(key, zoo.base("llama"), LLAMA) for name, (key, method) in seeds.items()}
    return {name: (zoo.disturbed(tree, i), forward) for i, (name, (tree, forward)) in enumerate(trees.items())}


def everything(lora: pj.Method) -> pj.Method:
    """A prompt, a prefix that is still an MLP's output, LoRA, and a head that trains whole; with dropout."""
    before = methods.prompt_tuning(2), methods.prefix_tuning(3, hidden=8, dropout=0.2)
    return pj.chain(*before, lora, methods.unfreeze("lm_head|model.norm"))


def kin(rank: int) -> pj.Method:
    """What else has a rank; DyLoRA draws its own from a run's key, and VeRA's pair is one for all."""
    directions = methods.dora(rank, 4, "q_proj", layers=[0, 2]), methods.pissa(5 - rank, 6, "v_proj")
    return pj.chain(*directions, methods.dylora(4, 2 * rank, "o_proj"), methods.vera(6, "k_proj"))


KINDS: dict[str, tuple[pj.Method, ...]] = {
    "everything": (
        everything(methods.lora(2, 8, dropout=0.3)),
        everything(methods.lora(4, 4, rank_pattern={r"\.1\.": 1}, dropout=0.3)),
    ),
    "kin": (kin(2), kin(3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_run_ends_where_it_ends_alone(kind: str) -> None:
    runs = made(*KINDS[kind])
    rates = {name: 0.01 / (i + 1) for i, name in enumerate(runs)}
    keys = {name: jax.random.key(10 + i) for i, name in enumerate(runs)}
    adam = functools.partial(optax.adamw, eps=1e-3, weight_decay=0.1)
    trees = {name: tree for name, (tree, _) in runs.items()}
    before, (_, forward) = copied(trees), next(iter(runs.values()))
    found = quiet(forward, trees, adam(1.0), text, STEPS, rates=rates, keys=keys, clip=1.0)
    assert same(copied(trees), before)
    for name, (tree, wrapped) in runs.items():
        tx = adam(rates[name])
        alone = training.fit(wrapped, tree, tx, text, STEPS, key=keys[name], clip=1.0, progress=False)
        assert jax.tree.structure(found[name].params) == jax.tree.structure(alone.params)
        close(pj.partition(found[name].params)[0], pj.partition(alone.params)[0], rtol=1e-4, atol=2e-5)
        mine, theirs = jax.tree.leaves(found[name].opt_state), jax.tree.leaves(alone.opt_state)
        assert [x.shape for x in mine] == [x.shape for x in theirs]
        close(mine, theirs, rtol=1e-3, atol=1e-5)
        for a, b in zip(found[name].history, alone.history, strict=True):
            assert a.keys() == b.keys() and a["step"] == b["step"] and a["tokens"] == b["tokens"]
            np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-4)
        frozen = zip(jax.tree.leaves(pj.strip(found[name].params)), jax.tree.leaves(zoo.base("llama")), strict=True)
        assert all(x is y for x, y in frozen)
        assert differs(*(jax.tree.leaves(pj.partition(t)[0])[0] for t in (found[name].params, tree)), by=1e-4)
    first, second = (found[name].history[0]["loss"] for name in runs)
    assert abs(first - second) > 1e-3, "runs that begin alike would hide a mistake"


def test_the_base_is_held_once_and_the_step_compiled_once() -> None:
    trees = {name: tree for name, (tree, _) in made(*[methods.lora(r, 8) for r in (1, 2, 3, 4)]).items()}
    stacked = many.stack(trees, optax.adam(1.0))
    shared = dict(zip(jax.tree.leaves(stacked.stacked), jax.tree.leaves(stacked.frozen), strict=False))
    assert set(shared) == {True, False}
    base = {id(x) for x in jax.tree.leaves(zoo.base("llama"))}
    held = {id(x) for x in jax.tree.leaves(stacked.frozen)}
    assert base < held and len(held - base) == 2, "beside the base, the scales of two kernels"
    step: Any = many.make_many_step(LLAMA, optax.adam(1.0), training.next_token, stacked.stacked)
    compiled = training.compile_step(step, stacked.state, stacked.frozen, text(0))

    def size(tree: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(copied(tree)))

    analysis = compiled.memory_analysis()
    whole = size(zoo.base("llama")) + size(stacked.state) + size(text(0))
    assert abs(analysis.argument_size_in_bytes - whole) < 1000, "the base once, the state of four"
    assert analysis.output_size_in_bytes < size(stacked.state) + 1000, "no frozen array comes out"
    state, _ = compiled(stacked.state, stacked.frozen, text(0))
    compiled(state, stacked.frozen, text(1))  # raises if the state has changed its types


def test_the_runs_stack_as_adapters_and_equal_buffers_are_one_base() -> None:
    first = methods.lora(2)(zoo.KEY, zoo.base("llama"), LLAMA)[0]
    again = methods.lora(3)(zoo.KEY, jax.tree.map(jnp.copy, zoo.base("llama")), LLAMA)[0]
    stacked = many.stack({"a": first, "b": again}, optax.sgd(1.0))
    assert not any(jax.tree.leaves(stacked.stacked)), "the scales are equal too"
    veras = {str(i): methods.vera(4)(jax.random.key(i), zoo.base("llama"), LLAMA)[0] for i in range(2)}
    assert not any(jax.tree.leaves(many.stack(veras, optax.sgd(1.0)).stacked)), "nor is VeRA's pair held twice"
    runs = quiet(LLAMA, {"a": first, "b": again}, optax.sgd(0.1), text, 1)
    params, _ = adapters.stack({name: run.params for name, run in runs.items()}, LLAMA)
    close(pj.merge(adapters.use(params, "b")), pj.merge(runs["b"].params), atol=1e-6)


# -- the loop, on a toy ----------------------------------------------------------------------------------------------


def toys(n: int = 3) -> dict[str, Any]:
    """Runs of a toy that differ in their start."""
    trees = {f"run {i}": toy.params() for i in range(n)}
    base = next(iter(trees.values()))
    moved = lambda on, x, i: x * (1 + i / 10) if on else x  # noqa: E731
    mask = pj.trainable(base)
    return {name: jax.tree.map(functools.partial(moved, i=i), mask, base) for i, name in enumerate(trees)}


def alone(tree: Any, tx: Any, batches: Any, steps: int = STEPS, **options: Any) -> training.Run:
    return training.fit(TOY, tree, tx, batches, steps, progress=False, **options)


def test_data_of_its_own_accumulation_and_schedules() -> None:
    trees, schedule = toys(2), optax.cosine_decay_schedule(1.0, STEPS)
    batches = {name: functools.partial(lambda step, i: toy.batch(100 * i + step), i=i) for i, name in enumerate(trees)}
    batches["run 1"] = iter([toy.batch(100 + step) for step in range(STEPS)])
    rates = {"run 0": 0.5, "run 1": 0.1}
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule, momentum=0.9)
    found = quiet(TOY, trees, tx, batches, STEPS, rates=rates, accumulate=2)
    for i, (name, tree) in enumerate(trees.items()):
        own = optax.inject_hyperparams(optax.sgd)(lambda step, r=rates[name]: r * schedule(step), momentum=0.9)
        wanted = alone(tree, own, lambda step, i=i: toy.batch(100 * i + step), accumulate=2)
        close(found[name].params, wanted.params)
        for a, b in zip(found[name].history, wanted.history, strict=True):
            assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-5) and a["weight"] == b["weight"]


def poisoned(step: int, at: int) -> dict[str, np.ndarray]:
    batch = toy.batch(step)
    spoilt = np.where(batch["weights"] > 0, np.float32(np.inf), batch["weights"])
    return batch | {"weights": spoilt if step == at else batch["weights"]}


def test_a_run_that_diverges_stops_alone(tmp_path: Path) -> None:
    trees, rates = toys(), {"run 0": 0.1, "run 1": 0.1, "run 2": 0.2}
    batches = dict.fromkeys(trees, toy.batch) | {"run 1": lambda step: poisoned(step, at=2)}
    told: list[Any] = []
    with pytest.warns(RuntimeWarning, match=r"run 'run 1' stops: step 3 is not finite \(loss .*\); others go on"):
        found = quiet(TOY, trees, optax.sgd(1.0), batches, STEPS, rates=rates, callback=told.append)
    assert [run.step for run in found.values()] == [STEPS, 2, STEPS]
    assert [len(run.history) for run in found.values()] == [STEPS, 3, STEPS]
    assert found["run 1"].history[2].keys() == {"step", "stopped", "tokens", "seconds"}
    assert len(told) == 2 * STEPS + 3 and {record["run"] for record in told} == set(trees)
    close(found["run 1"].params, alone(trees["run 1"], optax.sgd(0.1), toy.batch, 2).params)
    for name in ("run 0", "run 2"):
        close(found[name].params, alone(trees[name], optax.sgd(rates[name]), toy.batch).params)
    with pytest.raises(FloatingPointError, match=r"no run is left: step 3 of run 'run 0', .* no checkpoint was saved"):
        quiet(TOY, trees, optax.sgd(1.0), functools.partial(poisoned, at=2), STEPS)


def test_resumes_to_the_same_bits_and_evaluates_each(tmp_path: Path) -> None:
    trees, rates = toys(), {"run 0": 0.1, "run 1": 0.3, "run 2": 0.2}
    batches = dict.fromkeys(trees, toy.batch) | {"run 1": lambda step: poisoned(step, at=1)}
    common: Any = {"loss": toy.pull, "rates": rates, "save_every": 2, "evaluate_on": [toy.batch(9)]}
    fit = functools.partial(quiet, TOY, trees, optax.adam(1.0), batches, **common)
    stops = functools.partial(pytest.warns, RuntimeWarning, match="run 'run 1' stops: step 2")
    with stops():
        whole = fit(STEPS + 2)
    with stops():
        first = fit(STEPS, checkpoints=tmp_path)
    again = fit(STEPS + 2, checkpoints=tmp_path)  # and is not told of it twice
    for name, run in again.items():
        assert same(copied(run.params), copied(whole[name].params))
        assert same(copied(run.opt_state), copied(whole[name].opt_state))
    assert first["run 0"].step == STEPS and [run.step for run in again.values()] == [STEPS + 2, 1, STEPS + 2]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line and line["step"] == STEPS + 2]
    assert [line["run"] for line in evaluated] == list(trees)
    for line, (name, run) in zip(evaluated, again.items(), strict=True):
        wanted = training.evaluate(TOY, run.params, [toy.batch(9)], toy.pull)
        assert line["eval_loss"] == pytest.approx(wanted["loss"]) == run.history[-1]["eval_loss"], name


def test_errors_name_the_runs_and_the_path() -> None:
    trees = toys(2)

    def refuses(message: str, params: Any = trees, batches: Any = toy.batch, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            quiet(TOY, params, optax.sgd(1.0), batches, STEPS, loss=toy.pull, **options)

    refuses("no runs: give at least one", {})
    refuses("rates and params differ in 'run 1': give each run one", rates={"run 0": 1.0})
    refuses("keys and params differ in 'other'", keys=dict.fromkeys((*trees, "other"), zoo.KEY))
    refuses("the rate of run 'run 1' is nan", rates={"run 0": 1.0, "run 1": float("nan")})
    refuses("batches and params differ in 'run 1'", batches={"run 0": toy.batch})
    shapes = {"run 0": toy.batch, "run 1": functools.partial(toy.batch, rows=2)}
    refuses("batch 0: run 'run 0' has .* and 'run 1' .*: pad them alike", batches=shapes)
    refuses("nothing in this tree trains", {"a": {"kernel": jnp.ones((2, 2))}})
    refuses("token id 48 is outside", batches=lambda step: toy.batch(0) | {"tokens": np.full((4, 11), 48, np.int32)})
    refuses("evaluate_every is given and evaluate_on is not", evaluate_every=1)
    wider = trees["run 0"] | {"embedding": jnp.zeros((48, 17))}
    refuses(
        r"runs 'a' and 'b' differ in structure: embedding is float32\[48,16\] in one, and float32\[48,17\]",
        {"a": trees["run 0"], "b": wider},
    )
    other = trees["run 0"] | {"embedding": trees["run 0"]["embedding"] + 1}
    refuses("runs 'a' and 'b' are on different bases: embedding holds", {"a": trees["run 0"], "b": other})
    kinds = {"a": methods.lora(2), "b": methods.lora(2, select="q_proj"), "c": methods.lora(2, name="other")}
    adapted = {name: method(zoo.KEY, zoo.base("llama"), LLAMA)[0] for name, method in kinds.items()}
    place = "model/layers/self_attn/"
    refuses(f"'a' and 'b' differ in structure: {place}v_proj/kernel is LoRA", {k: adapted[k] for k in "ab"})
    refuses(f"'a' and 'c' differ in structure: {place}.* is LoRA.*name='lora'", {k: adapted[k] for k in "ac"})
    adaptive = {k: methods.adalora(2)(zoo.KEY, zoo.base("llama"), LLAMA)[0] for k in "ab"}
    refuses("SVD leaves of 'adalora' train under methods.allocate_rank, whose updates the runs' rates", adaptive)
    prompts = {k: methods.prompt_tuning(n)(zoo.KEY, zoo.base("llama"), LLAMA)[0] for k, n in (("a", 2), ("b", 3))}
    refuses("'a' and 'b' differ in structure: ports/prompt_tuning", prompts)
