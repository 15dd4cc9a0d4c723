"""The laws of the house: what holds for every method of the zoo (`zoo.ROWS`), in few compiled programs."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from checks import close, copied, differs, kinds, one_layer, same, size, three_steps, without_compiling
from zoo import BATCH, KEY, ROWS, TOKENS, Row

import peft_jax as pj
from peft_jax import methods, sharding, trees
from peft_jax.interop import hf_peft
from peft_jax.training import Checkpoints, State, init_state, make_step
from peft_jax.training.checkpoints import nodes
from peft_jax.training.step import shardings_of
from peft_jax.weights import is_weight

pytestmark = pytest.mark.usefixtures("quick_compiles")
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))


def test_every_factory_has_a_row() -> None:
    assert {factory for row in ROWS for factory in row.factories} == set(methods.__all__)


# -- outputs and leaving ----------------------------------------------------------------------------------------------


def check_outputs(row: Row, family: str) -> None:
    """The start, merging, strip and changes of scale, in one compiled program: the forward function under vmap, the
    base and the batch in pieces on eight devices."""
    run, mesh = zoo.compiled(family), sharding.mesh(data=2, fsdp=2, tensor=2)
    base = sharding.shard(zoo.base(family), zoo.build(family), mesh)
    given = zoo.inputs(family)
    tokens = sharding.spread(given, mesh)
    params, forward = row.method(KEY, base, zoo.build(family))
    own, noisy = row.base(base), zoo.disturbed(params)
    plain = run(row.base(zoo.base(family)), given)
    trained, frozen = pj.partition(params)

    @jax.jit
    def each(several: Any, frozen: Any, tokens: pj.Inputs) -> jax.Array:
        return jax.vmap(lambda one: forward(pj.combine(one, frozen), tokens))(several)

    both = jax.tree.map(lambda *x: jnp.stack(x), trained, pj.partition(noisy)[0])
    result = each(both, frozen, tokens)
    assert len(result.sharding.device_set) == 8
    start, moved = np.asarray(result)
    assert differs(moved, plain)
    if row.changes:
        assert differs(start, plain), f"this row need not say: {row.changes}"
    else:
        close(start, plain)
    if row.stays:
        with pytest.raises(ValueError, match="cannot be merged"):
            pj.merge(params)
    else:
        # The base's own program: the merged tree has its structure, shapes and dtypes, so its FLOPs too.
        run(zoo.base(family), given)
        merged = jax.tree.map(lambda x: jnp.array(np.asarray(x)), pj.merge(noisy))
        close(without_compiling(run, merged, given), moved, atol=1e-4)
    stripped = pj.strip(noisy)
    assert same(stripped, own)
    ids = lambda tree: {id(x) for x in jax.tree.leaves(tree)}  # noqa: E731
    assert ids(own) & ids(base) <= ids(stripped), "the base was copied"
    if any(hasattr(w, "base") and getattr(w, "scale", None) is not None for w in trees.weights(params)):
        louder = pj.partition(pj.set_scale(noisy, 5.0))[1]
        assert differs(without_compiling(each, both, louder, tokens)[1], moved)


@rows
def test_outputs_on_eight_devices(row: Row) -> None:
    check_outputs(row, "llama")


# -- training ---------------------------------------------------------------------------------------------------------


def begin(params: Any, tx: Any) -> Any:
    """On one device by name, where a restored state will be too: one program serves both."""
    return jax.device_put(init_state(params, tx, KEY), jax.devices()[0])


@rows
def test_training(row: Row, tmp_path: Any) -> None:
    """Three optimiser steps, a resumed run, and the gradient against differences: one compiled program, the step."""
    params, forward = row.method(KEY, zoo.base("llama"), zoo.build("llama"))
    assert pj.count(params).trainable == row.trains
    tx = pj.freeze(row.optimiser(), params)
    step = make_step(forward, tx)
    state, frozen = begin(params, tx)
    before = copied(frozen)
    moments = size(state.opt_state) - 2 * size(state.trainables) - row.keeps
    assert 0 <= moments <= 2, "Adam keeps two numbers for each that trains, and counters"

    losses, states = [], []
    with Checkpoints(tmp_path) as store:
        for i in range(3):
            state, metrics = without_compiling(step, state, frozen, BATCH) if i else step(state, frozen, BATCH)
            losses.append(float(metrics["loss"]))
            states.append(copied(state))
            if i == 0:
                store.save(state, frozen)
        resumed = store.restore(jax.tree.map(jnp.zeros_like, state), frozen).state
    assert losses[2] < losses[1] < losses[0]
    assert all(differs(x, y, 0) for x, y in zip(*map(jax.tree.leaves, (states[2][0], states[0][0])), strict=True))
    assert same(copied(frozen), before), "a frozen leaf moved"
    for _ in range(2):
        resumed, _ = without_compiling(step, resumed, frozen, BATCH)
    assert same(copied(resumed), states[2]), "a resumed run ended elsewhere"

    if row.name not in ALIKE:
        check_in_pieces(row, params, forward, states[2], losses)
    if not row.slope:
        check_slope(step, zoo.disturbed(params), tx)


# Rows whose leaves another row has too, or a test of its own (`test_sharding`): a program for eight devices is dear.
ALIKE = {"lora", "ranks by layer", "dropout and biases", "dylora", "dylora truncated", "olora", "rslora with lora+"}
ALIKE |= {"vera", "one layer", "two loras and norms", "several adapters", "baked prefix", "longlora"}


def check_in_pieces(row: Row, params: Any, forward: Any, end: Any, losses: list[float]) -> None:
    """Three steps on a mesh of data x fsdp x tensor: the losses and the state of one device, decisions bit for bit."""
    mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.shard(params, forward, mesh)
    tx = pj.freeze(row.optimiser(), placed)
    state, frozen = init_state(placed, tx, KEY)
    assert dict(nodes(placed, "")) == dict(nodes(params, "")), "a checkpoint would not go from one to the other"
    step, batch = make_step(forward, tx, shardings=shardings_of(state)), sharding.spread(BATCH, mesh)
    for i in range(3):
        state, metrics = without_compiling(step, state, frozen, batch) if i else step(state, frozen, batch)
        assert float(metrics["loss"]) == pytest.approx(losses[i], rel=1e-5)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(frozen))
    for x in jax.tree.leaves(state):
        copies: dict[str, set[bytes]] = {}
        for piece in x.addressable_shards if x.dtype == np.float32 else ():
            copies.setdefault(str(piece.index), set()).add(np.asarray(piece.data).tobytes())
        assert all(len(bits) == 1 for bits in copies.values()), "devices that hold the same piece disagree"
    pairs = [zip(*map(jax.tree.leaves, halves), strict=True) for halves in zip(copied(state)[:2], end[:2], strict=True)]
    for x, y in pairs[0]:  # leaves alone: those in few bits know of the mesh
        close(x, y, rtol=1e-3, atol=2e-4)  # Adam's first steps are the gradient's sign
    for x, y in pairs[1]:
        if x.dtype != np.float32:  # budgets, and which triplets are kept
            np.testing.assert_array_equal(x, y)


def check_slope(step: Any, noisy: Any, tx: Any) -> None:
    """The gradient, along a direction in which every number counts, against the difference of two losses."""
    trained, frozen = pj.partition(noisy)

    def at(trained: Any) -> Any:
        return without_compiling(step, *begin(pj.combine(trained, frozen), tx), BATCH)

    after, _ = at(trained)
    # Adam's first moment after one step is a tenth of the gradient.
    gradient = jax.tree.map(lambda m: 10 * m, optax.tree.get(after.opt_state, "mu"))
    random = np.random.RandomState(3)
    direction = jax.tree.map(lambda g: g * jnp.asarray(random.rand(*g.shape), g.dtype), gradient)
    slope = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    reach = 0.03 / float(optax.tree.norm(direction))
    ends = [at(jax.tree.map(lambda x, d, s=s: x + s * d, trained, direction))[1]["loss"] for s in (reach, -reach)]
    assert float(ends[0] - ends[1]) / (2 * reach) == pytest.approx(slope, rel=0.02)


# What each family calls its projections, its embedding and its norms.
OTHERS = {
    "qwen2": "(q|v)_proj|embed_tokens",
    "mistral": "(q|v)_proj|embed_tokens",
    "gpt2": "c_attn|c_fc|wte",
    "bert": "query|value|word_embeddings",
    "roberta": "query|value|word_embeddings",
    "deberta-v2": "(query|value)_proj|word_embeddings",
    "t5": r"Attention\.(q|v)|shared",
    "bart": "(q|v)_proj|shared",
}
KINDS = {
    "lora": lambda family: pj.chain(methods.lora(4, 8, OTHERS[family]), methods.unfreeze("norm|ln_|LayerNorm")),
    "prompt": lambda family: methods.prompt_tuning(4),
    "prefix": lambda family: methods.prefix_tuning(3, hidden=8),
    "deep prompts": lambda family: methods.p_tuning_v2(3, dropout=0.0),  # whose noise would hide three steps
    "vera": lambda family: methods.vera(8, OTHERS[family]),
}
ONLY = {"vera": ("gpt2", "bert", "t5")}  # what layers share reaches them in one way: a decoder, an encoder, and both


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f in OTHERS for k in KINDS if f in ONLY.get(k, OTHERS)])
def test_other_families(family: str, kind: str) -> None:
    """Five laws: the start, merging, strip, falling loss, frozen leaves."""
    assert OTHERS.keys() | {"llama"} == zoo.CONFIGS.keys()
    method = KINDS[kind](family)
    before_tokens = {} if kind in ("lora", "vera") else zoo.PUT_BEFORE
    check_outputs(ROWS[0]._replace(method=method, **before_tokens), family)
    params, forward = method(KEY, zoo.base(family), zoo.build(family))
    _, losses = three_steps(params, forward, optax.adam(3e-3), zoo.batch(family))
    assert losses[2] < losses[1] < losses[0]


# -- other forms of one model -----------------------------------------------------------------------------------------


def seen_by_the_model(row: Row) -> Any:
    """Disturbed params, as the method's wrap shows them to a model."""
    probe = pj.Forward(lambda params, inputs, ports: params, spec=zoo.build("llama").spec)
    params, forward = row.method(KEY, zoo.base("llama"), probe)
    return forward(zoo.disturbed(params), TOKENS)


@rows
def test_leaves_act_as_the_arrays_they_stand_for(row: Row) -> None:
    seen = seen_by_the_model(row)
    stacked, random = zoo.build("llama").spec.stacked, np.random.RandomState(4)
    leaves = {path: w for path, w in trees.leaves(seen).items() if is_weight(w)}
    layer = {path: one_layer(w, 1) if stacked(path) else w for path, w in leaves.items()}
    draw = lambda n: jnp.asarray(random.standard_normal((2, 3, n)), jnp.float32)  # noqa: E731
    given = {path: (draw(w.shape[0]), draw(w.shape[1])) for path, w in layer.items()}
    ids = jnp.array([[0, 5, 31], [7, 7, 15]])

    def rules(leaves: Any, given: Any) -> Any:
        return {
            path: (pj.linear(given[path][0], w), pj.unembed(given[path][1], w), pj.embed(ids, w), pj.materialise(w))
            for path, w in leaves.items()
        }

    compiled = jax.jit(rules)(layer, given)
    close(rules(layer, given), compiled)
    for path, (forth, back, found, full) in compiled.items():
        x, y = given[path]
        close(forth, x @ full)
        close(back, y @ full.T)
        close(found, full[ids])
        whole = pj.materialise(leaves[path])
        close(whole[1] if stacked(path) else whole, full, rtol=1e-6, atol=1e-6)
        assert whole.shape == leaves[path].shape and full.dtype == leaves[path].dtype


@rows
def test_an_unrolled_model_has_the_same_draws_and_laws(row: Row) -> None:
    base = zoo.unrolled(zoo.base("llama"))
    params, forward = row.method(KEY, base, zoo.build("llama", scan=False))
    stacked, _ = row.method(KEY, zoo.base("llama"), zoo.build("llama"))
    assert pj.count(params)[:2] == pj.count(stacked)[:2]
    numbers = lambda p: np.concatenate([np.ravel(x) for x in jax.tree.leaves(pj.partition(p)[0])])  # noqa: E731
    assert np.isin(numbers(params), numbers(stacked)).all(), "same names, other draws"
    if row.stays:
        return
    noisy, run = zoo.disturbed(params), zoo.compiled("llama", scan=False)
    close(run(pj.merge(noisy), TOKENS), jax.jit(forward)(noisy, TOKENS), atol=1e-4)


@rows
def test_abstract_trees_have_the_types_of_real_ones(row: Row) -> None:
    """Without a weight: the tree, its counts, and the types of activations and of a step, in fp32 and bf16."""
    forward, real = zoo.build("llama"), row.method(KEY, zoo.base("llama"), zoo.build("llama"))[0]
    for dtype in (jnp.float32, jnp.bfloat16):
        base = jax.tree.map(lambda x, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype), zoo.base("llama"))
        wrapped = []

        def init(key: Any, base: Any, wrapped: Any = wrapped) -> Any:
            params, made = row.method(key, base, forward)
            wrapped.append(made)
            return params

        params = jax.eval_shape(init, KEY, base)
        assert pj.count(params).trainable == row.trains
        halves = [pj.count(half) for half in pj.partition(params)]
        assert tuple(map(sum, zip(*halves, strict=True))) == pj.count(params)
        assert halves[0].frozen == halves[1].trainable == 0
        if not row.stays:
            # Plain arrays, but where a quantised base has taken its adapter in.
            own = jax.eval_shape(row.base, base)
            assert kinds(jax.eval_shape(pj.merge, params)) in (kinds(base), kinds(own))
        if dtype == jnp.float32:
            assert kinds(params) == kinds(real)
            continue  # what a step makes of these, training shows
        features = jax.eval_shape(wrapped[0].features, params, pj.Inputs(jnp.asarray(TOKENS)), pj.Ports())
        assert features.dtype == dtype
        trained, frozen = pj.partition(params)
        tx = pj.freeze(row.optimiser(), params)
        state = State(trained, jax.eval_shape(tx.init, trained), jax.ShapeDtypeStruct((), jnp.int32), KEY)
        assert kinds(jax.eval_shape(make_step(wrapped[0], tx), state, frozen, BATCH)[0]) == kinds(state)


# -- files ------------------------------------------------------------------------------------------------------------


@rows
def test_hf_peft_files_come_back_bit_for_bit(row: Row, tmp_path: Any) -> None:
    params, forward = row.method(KEY, zoo.base("llama"), zoo.build("llama"))
    noisy = zoo.disturbed(params)
    if row.foreign:
        with pytest.raises(ValueError, match=row.foreign):
            hf_peft.save(tmp_path / "first", noisy, forward)
        return
    hf_peft.save(tmp_path / "first", noisy, forward)
    loaded, again = hf_peft.load(tmp_path / "first", zoo.model("llama", row.base(zoo.base("llama"))))
    if row.stays:
        close(jax.jit(again)(loaded, TOKENS), jax.jit(forward)(noisy, TOKENS), atol=1e-4)
    else:
        close(pj.merge(loaded), pj.merge(noisy), rtol=1e-5, atol=1e-5)
    hf_peft.save(tmp_path / "second", loaded, again)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) >= 2
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


# -- composition ------------------------------------------------------------------------------------------------------


def test_chain_is_associative() -> None:
    a, b, c = methods.lora(2, name="a"), methods.dora(2, select="o_proj|v_proj"), methods.unfreeze("norm|v_proj")
    made = [
        m(KEY, zoo.base("llama"), zoo.build("llama"))[0]
        for m in (pj.chain(pj.chain(a, b), c), pj.chain(a, pj.chain(b, c)))
    ]
    assert same(*made)
    alone = a(KEY, zoo.base("llama"), zoo.build("llama"))[0]
    leaf = lambda tree: tree["model"]["layers"]["self_attn"]["q_proj"]["kernel"]  # noqa: E731
    assert same(leaf(made[0]), leaf(alone)), "a method's draws depend on its company"


def test_order_does_not_matter_where_methods_do_not_read_each_other() -> None:
    a, b = methods.lora(2, select="embed|q_proj"), methods.unfreeze("embed|norm|q_proj")
    there, back = (pj.chain(*pair)(KEY, zoo.base("llama"), zoo.build("llama")) for pair in ((a, b), (b, a)))
    assert same(there[0], back[0])
    one, two = methods.lora(2, name="one"), methods.lora(3, name="two")
    made = [pj.chain(*pair)(KEY, zoo.base("llama"), zoo.build("llama"))[0] for pair in ((one, two), (two, one))]

    def louder(params: Any) -> Any:  # by name, so that both trees get the same numbers
        for name, value in (("one", 0.1), ("two", -0.2)):
            fill = lambda path, w, value=value: dataclasses.replace(w, b=jnp.full_like(w.b, value))  # noqa: E731
            params = trees.rewrite(params, name, fill)
        return params

    first, second = (pj.merge(louder(params)) for params in made)
    close(first, second)
    assert not same(first, zoo.base("llama"))


def selecting() -> list[str]:
    return [name for name in methods.__all__ if "select" in inspect.signature(getattr(methods, name)).parameters]


@pytest.mark.parametrize("name", selecting())
def test_every_factory_names_what_is_wrong(name: str) -> None:
    factory = getattr(methods, name)
    takes = inspect.signature(factory).parameters
    with pytest.raises(ValueError, match=r"'q_porj' matches none .* near misses: q_proj"):
        factory(select="q_porj")(KEY, zoo.base("llama"), zoo.build("llama"))
    small = {"rank": 4} if "rank" in takes else {}
    several = pj.chain(factory(select="q_proj", **small), factory(select="o_proj", **small))
    with pytest.raises(ValueError, match="already applied: give this one another name="):
        several(KEY, zoo.base("llama"), zoo.build("llama"))
    if "rank" in takes:
        for rank in (0, -1):
            with pytest.raises(ValueError, match=f"rank must be a positive integer, got {rank}"):
                factory(rank=rank)
