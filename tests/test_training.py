"""The loss, the step and the loop, against optax and plain numpy."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import peft_jax as pj
from peft_jax import training
from peft_jax.training import step as steps
from peft_jax.training.losses import chunk_size

FORWARD = toy.forward(48)


@pytest.fixture(autouse=True)
def cheap_compilation(request):
    """Most of this file's time is XLA optimising programs of a few microseconds; those it is about are marked."""
    jax.config.update("jax_disable_most_optimizations", "optimised" not in request.fixturenames)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimised():
    """As users compile."""


@pytest.fixture
def compilations():
    """The names of the programs that XLA compiles."""
    names = []

    def listen(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def quiet(forward, params, tx, batches, steps, **options):
    return training.fit(forward, params, tx, batches, steps, progress=False, **options)


def no_dropout(forward, params, batch, ports):
    return training.next_token(forward, params, batch)


def plain_loss(forward, params, batch):
    """The same loss from whole logits, by optax."""
    z = forward(params, batch["tokens"]).astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(batch["targets"], 0))
    return jnp.sum(each * batch["weights"]), jnp.sum(batch["weights"])


def words(tree):
    """Copies in numpy, keys as their words."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), tree)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(words(a)), jax.tree.leaves(words(b)), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def close(a, b, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, None])
def test_next_token_equals_optax_on_whole_logits(chunk):
    params, batch = toy.params(), toy.batch(3)
    # The head's kernel, an adapter on it, and everything below it: all differentiated at once.
    params["embedding"] = toy.Nudge(params["embedding"], jnp.ones((48, 1)) * 0.1, jnp.linspace(-1, 1, 16)[None])
    ours = lambda p: training.next_token(FORWARD, p, batch, chunk=chunk)  # noqa: E731
    theirs = lambda p: plain_loss(FORWARD, p, batch)  # noqa: E731
    (a, wa), ga = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (b, wb), gb = jax.jit(jax.value_and_grad(theirs, has_aux=True))(params)
    close((a, wa), (b, wb))
    close(ga, gb)
    close(jax.jit(ours)(params)[0], b)  # not differentiated: the other branch of the rule
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(ga)) > 1e-3


def test_a_position_without_weight_counts_for_nothing():
    params, batch = toy.params(), toy.batch(0)
    inf = pj.Forward(FORWARD.features, lambda p, x, ports: jnp.where(x[..., :1] > 1e9, 0.0, FORWARD.head(p, x, ports)))
    batch["weights"][:, 4:] = 0

    def head(p, x, ports):  # logits that are infinite where nobody asks
        z = FORWARD.head(p, x, ports)
        return jnp.where(jnp.arange(z.shape[1])[None, :, None] < 4, z, jnp.inf)

    wild = pj.Forward(FORWARD.features, head)
    close(training.next_token(wild, params, batch, chunk=11), training.next_token(inf, params, batch, chunk=11))


def test_full_logits_never_exist(optimised):
    vocab, rows, time, width = 4096, 4, 64, 8
    forward, params = toy.forward(vocab), toy.params(vocab, width)
    batch = toy.batch(0, rows, time, vocab)
    full = rows * time * vocab * 4
    assert rows * chunk_size(rows, vocab) * vocab * 4 > full // 2, "the default would be one chunk or two here"

    def temporaries(loss):
        gradient = jax.jit(jax.grad(lambda t, f: loss(forward, pj.combine(t, f), batch)[0]))
        return gradient.lower(*pj.partition(params)).compile().memory_analysis().temp_size_in_bytes

    chunked = lambda *args: training.next_token(*args, chunk=4)  # noqa: E731
    assert temporaries(chunked) < full / 4
    assert temporaries(plain_loss) > full  # so the measure can fail


def test_a_frozen_head_forms_no_gradient_and_runs_twice_not_thrice(optimised):
    # The head dominates here: forward and the gradient of the features are 2 products, a kernel's gradient a third.
    forward, params, batch = toy.forward(4096), toy.params(4096, 8, 1), toy.batch(0, 4, 16, 4096)
    flops = jax.jit(jax.grad(lambda t, f: training.next_token(forward, pj.combine(t, f), batch)[0]))
    flops = flops.lower(*pj.partition(params)).compile().cost_analysis()["flops"]
    product = 2 * 4 * 16 * 8 * 4096
    assert 2 * product < flops < 2.9 * product


def test_the_loss_names_what_it_cannot_do():
    params, batch = toy.params(), toy.batch(0)
    with pytest.raises(ValueError, match="must share"):
        training.next_token(FORWARD, params, batch | {"targets": batch["targets"][:, 1:]})
    with pytest.raises(ValueError, match="no gradient with respect to the batch's weights"):
        jax.grad(lambda w: training.next_token(FORWARD, params, batch | {"weights": w})[0])(jnp.array(batch["weights"]))


def test_evaluate_is_a_weighted_mean_over_uneven_batches():
    params, batches = toy.params(), [toy.batch(0), toy.batch(1, rows=2)]
    sums = {"loss": 0.0, "right": 0.0, "weight": 0.0}
    for batch in batches:
        z = np.asarray(FORWARD(params, batch["tokens"]), np.float64)
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        w, t = batch["weights"].astype(np.float64), np.maximum(batch["targets"], 0)
        sums["loss"] -= (w * np.take_along_axis(logp, t[..., None], -1)[..., 0]).sum()
        sums["right"] += (w * (z.argmax(-1) == batch["targets"])).sum()
        sums["weight"] += w.sum()
    found = training.evaluate(FORWARD, params, batches, also={"accuracy": training.token_accuracy})
    want = {"loss": sums["loss"] / sums["weight"], "tokens": sums["weight"], "accuracy": sums["right"] / sums["weight"]}
    want["perplexity"] = np.exp(want["loss"])
    assert found == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="evaluation set is empty"):
        training.evaluate(FORWARD, params, [])
    with pytest.raises(ValueError, match="nothing in the evaluation set has weight"):
        training.evaluate(FORWARD, params, [toy.batch(0) | {"weights": np.zeros((4, 11), np.float32)}])


# -- the step ---------------------------------------------------------------------------------------------------------


def test_three_steps_equal_optax_on_the_plain_loss():
    params = toy.params()
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))
    trainables, frozen = pj.partition(params)
    opt_state, norms = tx.init(trainables), []

    def mean(t, batch):
        total, weight = plain_loss(FORWARD, pj.combine(t, frozen), batch)
        return total / weight

    for index in range(3):
        grads = jax.jit(jax.grad(mean))(trainables, toy.batch(index))
        norms.append(float(optax.tree.norm(grads)))
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, trainables)
        trainables = optax.apply_updates(trainables, updates)
    assert max(norms) > 0.5, "clipping must act for this test to see it"
    for wrapped in (False, True):
        mine = optax.adamw(1e-2, weight_decay=0.1)
        mine = pj.freeze(mine, params) if wrapped else mine
        run = quiet(FORWARD, params, mine, toy.batch, 3, loss=no_dropout, clip=0.5)
        close(pj.partition(run.params)[0], trainables, rtol=1e-4)
        assert [record["grad_norm"] for record in run.history] == pytest.approx(norms, rel=1e-4)


def test_accumulation_is_exact_for_uneven_weights():
    params = toy.params()
    runs = [quiet(FORWARD, params, optax.sgd(0.1), toy.batch, 3, loss=no_dropout, accumulate=n) for n in (1, 4)]
    close(runs[0].params, runs[1].params, rtol=1e-5, atol=1e-6)
    close(*([r["loss"] for r in run.history] for run in runs))
    # The mean of the micro-batches' means, which is what averaging gradients would minimise, is another number.
    batch = toy.batch(0)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(4)]
    means = [float(total / weight) for total, weight in (plain_loss(FORWARD, params, row) for row in rows)]
    assert abs(np.mean(means) - runs[0].history[0]["loss"]) > 1e-2


def test_keys_are_one_a_step_fresh_a_micro_batch_and_a_function_of_the_step():
    seen = []

    def spy(forward, params, batch, ports):
        data = [jax.random.key_data(key) for key in (ports.step_key, ports.micro_key)]
        jax.debug.callback(lambda *words: seen.append([tuple(map(int, w)) for w in words]), *data, ordered=True)
        return training.next_token(forward, params, batch, ports)

    quiet(FORWARD, toy.params(), optax.sgd(0.1), toy.batch, 2, loss=spy, accumulate=2, key=jax.random.key(3))
    jax.effects_barrier()
    assert len(seen) == 4
    assert seen[0][0] == seen[1][0] != seen[2][0] == seen[3][0]  # step keys
    assert len({micro for _, micro in seen} | {step for step, _ in seen}) == 6  # micro keys: four of their own


def test_dropout_acts_in_training_only_and_follows_the_key():
    tx, params = optax.sgd(0.0), toy.params()
    step = training.make_step(FORWARD, tx)

    def losses(seed):
        state, frozen = training.init_state(params, tx, jax.random.key(seed))
        state, first = step(state, frozen, toy.batch(0))
        return [float(metrics["loss"]) for metrics in (first, step(state, frozen, toy.batch(0))[1])]

    clean = training.evaluate(FORWARD, params, [toy.batch(0)])["loss"]
    assert len({clean, *losses(0), *losses(1)}) == 5
    assert losses(0) == losses(0)


def test_frozen_leaves_cost_nothing(optimised):
    params = toy.params(width=64, layers=3)
    tx = pj.freeze(optax.adam(1e-2), params)
    state, frozen = training.init_state(params, tx, jax.random.key(0))
    stored = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert stored(state.opt_state) == 2 * stored(state.trainables) + 4  # Adam's moments and counter
    step = training.make_step(FORWARD, tx, loss=no_dropout)
    compiled = training.compile_step(step, state, frozen, toy.batch(0))

    def train_everything(state, params, batch):
        return jax.grad(lambda p: no_dropout(FORWARD, p, batch, None)[0])(params)

    full = jax.jit(train_everything).lower(state, params, toy.batch(0)).compile()
    kernel = re.compile(r"= f32\[64,64\][^ ]* dot\(")  # a kernel's gradient: the only product of that shape
    assert kernel.search(full.as_text())
    assert not kernel.search(compiled.as_text())
    products = 3 * 2 * 4 * 11 * 64 * 64  # one product with every layer's kernel
    assert compiled.cost_analysis()["flops"] < full.cost_analysis()["flops"]
    assert full.cost_analysis()["flops"] - compiled.cost_analysis()["flops"] > 0.2 * products
    # What is donated comes back in place, and nothing frozen comes back.
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= stored(state.trainables) + stored(state.opt_state)
    assert memory.output_size_in_bytes < stored(state.trainables) + stored(state.opt_state) + 1024 < stored(frozen)


def test_three_steps_leave_the_base_and_the_callers_tree_alone():
    params = toy.params()
    before = words(params)
    tx = optax.contrib.schedule_free_sgd(
        0.1
    )  # it keeps the parameters themselves in its state: they must not be shared
    run = quiet(FORWARD, params, tx, toy.batch, 3, loss=no_dropout)
    same_bits(params, before)
    assert run.params["embedding"] is params["embedding"]
    assert run.params["layers"]["kernel"].base is params["layers"]["kernel"].base
    assert not np.array_equal(run.params["layers"]["kernel"].a, before["layers"]["kernel"].a)
    assert run.history[-1]["loss"] < run.history[0]["loss"]


@pytest.mark.parametrize("sharded", [False, True])
def test_the_step_compiles_once(compilations, tmp_path, sharded):
    params = toy.params()
    if sharded:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = lambda x: jax.NamedSharding(mesh, jax.P(*[None] * (x.ndim - 1), "data" if x.shape[-1] == 16 else None))  # noqa: E731
        params = pj.place(params, jax.tree.map(spec, params))
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1e-2, 0, 4))
    options = {"clip": 1.0, "loss": no_dropout if sharded else toy.pull}
    first = quiet(FORWARD, params, tx, toy.batch, 4, checkpoints=tmp_path, save_every=2, **options)
    assert compilations.count("jit(step)") == 1
    rates = [record["learning_rate"] for record in first.history]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    resumed = quiet(FORWARD, params, tx, toy.batch, 6, checkpoints=tmp_path, **options)
    straight = quiet(FORWARD, params, tx, toy.batch, 6, **options)
    assert compilations.count("jit(step)") == 3
    same_bits(resumed.params, straight.params)
    layouts = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]  # noqa: E731
    assert layouts(resumed.params) == layouts(straight.params)
    if sharded:
        assert layouts(straight.params) == layouts(params)
        plain = quiet(FORWARD, toy.params(), tx, toy.batch, 6, **options)
        close(jax.tree.map(np.asarray, straight.params), jax.tree.map(np.asarray, plain.params), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("trained", "compute"), [("float32", "bfloat16"), ("bfloat16", None)])
def test_dtypes_are_kept(trained, compute):
    forward = toy.forward(48, compute=compute and jnp.dtype(compute))
    params = toy.params(dtype=jnp.dtype(trained))
    if compute is None:
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    run = quiet(forward, params, optax.adamw(1e-2), toy.batch, 2, loss=no_dropout, accumulate=2, clip=0.5)
    kinds = lambda tree: [str(x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert kinds(run.params) == kinds(params)
    assert set(kinds(run.opt_state)) == {"int32", trained}
    assert all(
        isinstance(r["loss"], float) and r["loss"] != float(jnp.bfloat16(r["loss"])) for r in run.history
    )  # fp32
    assert not np.array_equal(run.params["layers"]["kernel"].a, params["layers"]["kernel"].a)


def poisoned(step):
    """Batches of which the fourth asks for more than a float can hold."""
    batch = toy.batch(step)
    batch["weights"][0, 0], batch["targets"][0, 0] = 3e38 if step == 3 else 1, 0
    return batch


@pytest.mark.parametrize("how", ["loss", "gradient", "update"])
def test_nothing_that_is_not_finite_is_taken(how):
    def loss(forward, params, batch, ports):
        total, weight = training.next_token(forward, params, batch, ports)
        a = params["layers"]["kernel"].a
        steep = jnp.sqrt(jnp.sum(a - jax.lax.stop_gradient(a)))  # 0, with an infinite slope
        return {"loss": total * jnp.nan, "gradient": total + steep, "update": total}[how], weight

    tx = optax.sgd(jnp.nan if how == "update" else 0.1)
    state, frozen = training.init_state(toy.params(), tx, jax.random.key(0))
    before = words(state)
    after, metrics = training.make_step(FORWARD, tx, loss)(state, frozen, toy.batch(0))
    assert not bool(metrics["finite"])
    same_bits(after, before)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    match = rf"step 4 is not finite.*the last good checkpoint is {tmp_path}/2$"
    with pytest.raises(FloatingPointError, match=match):
        quiet(FORWARD, toy.params(), optax.sgd(0.1), poisoned, 9, loss=toy.pull, checkpoints=tmp_path, save_every=2)
    assert training.Checkpoints(tmp_path).steps == [2]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    with pytest.raises(FloatingPointError, match=r"step 4 .*no checkpoint was saved"):
        quiet(
            FORWARD, toy.params(), optax.sgd(0.1), poisoned, 4, loss=toy.pull
        )  # the last step's numbers are read as well


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_what_a_run_tells(tmp_path, capsys):
    told, order = [], []

    def batches(step):
        order.append(f"take {step}")
        return toy.batch(step)

    def tell(record):
        told.append(record)
        order.append(f"tell {record['step']}")

    evaluation = [toy.batch(50), toy.batch(51)]
    tx = optax.inject_hyperparams(optax.adam)(1e-2)
    options = {"evaluate_on": evaluation, "evaluate_every": 4, "callback": tell, "loss": toy.pull}
    run = training.fit(FORWARD, toy.params(), tx, batches, 5, metrics=tmp_path / "deep" / "m.jsonl", **options)
    assert run.step == 5
    assert (
        run.history == told == [json.loads(line) for line in (tmp_path / "deep" / "m.jsonl").read_text().splitlines()]
    )
    assert [r["step"] for r in told] == [1, 2, 3, 4, 4, 5, 5]
    assert set(told[0]) == {"step", "loss", "grad_norm", "weight", "tokens", "seconds", "learning_rate"}
    assert told[0]["tokens"] == 44
    assert told[0]["weight"] == 2 * 16 * 2
    final = training.evaluate(FORWARD, run.params, evaluation, toy.pull)
    assert {f"eval_{name}": value for name, value in final.items()} | {"step": 5} == told[-1]
    # The host reads a step's numbers when the next step is under way.
    assert order[:5] == ["take 0", "take 1", "tell 1", "take 2", "tell 2"]
    shown = capsys.readouterr()
    assert "5/5" in shown.err
    assert "tokens/s" in shown.err
    assert shown.out == ""


def test_bad_data_is_refused_by_name():
    def run(batches, steps=3, forward=FORWARD, **options):
        return quiet(forward, toy.params(), optax.sgd(0.1), batches, steps, **{"loss": toy.pull} | options)

    def replaced(name, at, value):
        def batches(step):
            batch = toy.batch(step)
            if step == 2:
                batch["weights"][at] = 1
                batch[name][at] = value
            return batch

        return batches

    with pytest.raises(ValueError, match="batch 2: token id 48 is outside the vocabulary of 48"):
        run(replaced("tokens", (1, 3), 48))
    with pytest.raises(ValueError, match="batch 2: token id -1 is outside"):
        run(replaced("targets", (0, 0), -1))
    with pytest.raises(ValueError, match="batch 0: the sequence has 11 tokens and the model has 8 positions"):
        run(toy.batch, forward=toy.forward(48, positions=8))
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match="the data set is empty"):
            run(empty)
    with pytest.raises(ValueError, match=r"ended before step 3, after 2 batches: .*itertools.cycle"):
        run([toy.batch(0), toy.batch(1)])
    with pytest.raises(TypeError, match="batch 0 is a tuple"):
        run([(1, 2)])
    with pytest.raises(TypeError, match="batches is a int"):
        run(3)
    with pytest.raises(ValueError, match=r"(targets|tokens|weights) has 4 rows, which accumulate=3"):
        run(toy.batch, accumulate=3)
    with pytest.raises(ValueError, match="evaluate_every is given and evaluate_on is not"):
        run(toy.batch, evaluate_every=2)
    with pytest.raises(ValueError, match="evaluate_on is an iterator"):
        run(toy.batch, evaluate_on=iter([toy.batch(0)]))
    for name, value in {"steps": 0, "save_every": 0, "accumulate": 0, "clip": 0.0}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            run(toy.batch, **{name: value})
    with pytest.raises(ValueError, match="nothing in this tree trains"):
        quiet(FORWARD, pj.strip(toy.params()), optax.sgd(0.1), toy.batch, 1)


def test_a_batch_that_asks_for_nothing_teaches_nothing():
    silent = lambda step: toy.batch(step) | {"weights": np.zeros((4, 11), np.float32)}  # noqa: E731
    run = quiet(FORWARD, toy.params(), optax.sgd(0.1), silent, 2)
    same_bits(run.params, toy.params())
    assert run.history[0]["loss"] == 0


def test_micro_batches_are_strided_and_whole():
    batch = {"x": np.arange(6)[:, None]}
    assert steps.split(batch, 3)["x"][..., 0].tolist() == [[0, 3], [1, 4], [2, 5]]
