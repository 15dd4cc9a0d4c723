"""A batch whose rows use adapters of every kind: against each row alone on merged weights, and against HF PEFT's."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from checks import close, differs, same, without_compiling
from oracles.peft_models import base as peft_base
from oracles.peft_models import from_peft, in_peft
from zoo import KEY, disturbed

import peft_jax as pj
from peft_jax import adapters, methods, quant, sharding, trees
from peft_jax.core import Path as Where
from peft_jax.interop import hf_peft
from peft_jax.methods.adalora import SVD
from peft_jax.methods.directions import NOTHING
from peft_jax.methods.slora import Adapters
from peft_jax.methods.vera import VeRA
from peft_jax.weights import is_weight

pytestmark = pytest.mark.usefixtures("quick_compiles")
VOCAB, WIDTH, HIDDEN, LAYERS = 24, 16, 32, 3
TOKENS = np.random.RandomState(0).randint(0, VOCAB, (9, 5)).astype(np.int32)
ROWS = jnp.array([6, 1, -1, 3, 5, 0, 2, 4, 1], jnp.int32)


# -- a model of linear layers, an embedding and its transpose ---------------------------------------------------------


def block(x: jax.Array, own: Any) -> jax.Array:
    return x + pj.linear(jnp.tanh(pj.linear(x, own["up"]["kernel"])), own["down"]["kernel"])


def features(params: Any, inputs: pj.Inputs, ports: pj.Ports) -> jax.Array:
    x = pj.embed(inputs.tokens, params["tokens"]["embedding"])
    if "layers" not in params:
        for i in range(LAYERS):
            x = block(x, params[f"layers_{i}"])
        return x
    sliced, shared = trees.unshare(params["layers"])
    fill = lambda w, mine: trees.fill(w, mine)  # noqa: E731
    each = lambda own: jax.tree.map(fill, own, shared, is_leaf=is_weight)  # noqa: E731
    return jax.lax.scan(lambda x, own: (block(x, each(own)), None), x, sliced)[0]


def names(path: Where) -> tuple[str, ...]:
    where = path[-2]
    if path[0] == "tokens":
        return (where,)
    return tuple(f"layers.{i}.{where}" for i in ([int(path[0][7:])] if "_" in path[0] else range(LAYERS)))


MODEL = pj.Forward(
    features,
    lambda params, x, ports: pj.unembed(x, params["tokens"]["embedding"]),
    pj.Spec(names=names, stacked=lambda path: path[0] == "layers"),
)


def base(scan: bool = True) -> Any:
    random = np.random.RandomState(1)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
    layers = {"up": {"kernel": draw(LAYERS, WIDTH, HIDDEN)}, "down": {"kernel": draw(LAYERS, HIDDEN, WIDTH)}}
    tree: dict[str, Any] = {"tokens": {"embedding": 2 * draw(VOCAB, WIDTH)}}
    if scan:
        return tree | {"layers": layers}
    return tree | {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(LAYERS)}


def pruned(params: Any) -> Any:
    """AdaLoRA's: other triplets of each layer are at zero."""
    gone = lambda w: (jnp.arange(w.values.size).reshape(w.values.shape) % 5) == 1  # noqa: E731
    zero = lambda w: dataclasses.replace(w, values=jnp.where(gone(w), 0, w.values))  # noqa: E731
    return trees.map_weights(lambda w: zero(w) if isinstance(w, SVD) else w, params)


KINDS: dict[str, tuple[pj.Method, Any]] = {
    "lora": (methods.lora(4, 6, "up|down", rank_pattern={r"\.2\.": 1}, layers=[0, 2]), lambda tree: tree),
    "rslora": (methods.lora(2, 1, "up|tokens", rslora=True), lambda tree: tree),
    "dylora": (methods.dylora(4, 2, "up|tokens"), lambda tree: methods.use_rank(tree, 3)),
    "truncated": (methods.dylora(4, 8, "down", name="other"), lambda tree: methods.truncate(tree, 2)),
    "adalora": (methods.adalora(2, 8, "up|down", initial_rank=3), lambda tree: pruned(tree)),
    "vera": (methods.vera(6, "up|tokens"), lambda tree: tree),
    "vera of some layers": (methods.vera(5, "down|up", layers=[0, 2], seed=3, name="v"), lambda tree: tree),
}


FEW = ("lora", "adalora", "vera of some layers")


def made(on: Any, names: Iterable[str] = KINDS) -> dict[str, Any]:
    some = {name: KINDS[name] for name in names}
    return {n: then(disturbed(method(KEY, on, MODEL)[0], i)) for i, (n, (method, then)) in enumerate(some.items())}


@pytest.fixture(scope="module")
def each() -> dict[str, Any]:
    return made(base())


RUN = jax.jit(MODEL)
STORED = {
    "unrolled": pj.chain(),
    "nf4": quant.quantise(quant.nf4(16)),
    "int4": quant.quantise(quant.grouped(4, 16), "up|down"),
}


# -- outputs ----------------------------------------------------------------------------------------------------------


@jax.jit
def alone(each: tuple[Any, ...], own: Any) -> list[jax.Array]:
    """Every adapter's merged weights in the model's own forward function, and last the base."""
    return [MODEL(pj.merge(tree), TOKENS) for tree in each] + [MODEL(own, TOKENS)]


def mix(params: Any, forward: pj.Forward, rows: Any) -> Any:
    return forward(params, TOKENS, pj.Ports(adapter=rows))


def test_each_row_is_alone_on_its_merged_weights(each: dict[str, Any]) -> None:
    params, forward = methods.slora(each)(KEY, base(), MODEL)
    wanted = alone(tuple(each.values()), base())
    assert all(differs(x, y, 0.1) for i, x in enumerate(wanted) for y in wanted[:i])
    run = jax.jit(mix, static_argnums=1)
    for i, rows in enumerate((ROWS, ROWS[::-1], jnp.full(9, 5, jnp.int32))):
        found = without_compiling(run, params, forward, rows) if i else run(params, forward, rows)
        close(found, [wanted[k][n] for n, k in enumerate(rows)], rtol=1e-5, atol=1e-5)
    for beyond in (7, 2**31 - 1):
        found = without_compiling(run, params, forward, ROWS.at[3].set(beyond))
        assert np.isnan(found[3]).all() and np.isfinite(np.delete(found, 3, 0)).all(), "it is nobody's"
    assert same(pj.strip(params), base())
    kept = sum(int((np.asarray(w.values) != 0).sum()) for w in trees.weights(each["adalora"]) if hasattr(w, "triplets"))
    total = sum(pj.count(each[name]).trainable for name in each if name not in ("dylora", "adalora"))
    dylora = 3 * (LAYERS * (WIDTH + HIDDEN) + VOCAB + WIDTH)  # at the rank in use
    assert pj.count(params).trainable == total + dylora + kept * (WIDTH + HIDDEN + 1)
    pair = params["methods"]["slora"]
    assert [x.shape for x in (pair["down"], pair["up"])] == [(11, HIDDEN), (11, HIDDEN)], "each pair once"


@pytest.mark.parametrize("kind", ["unrolled", "nf4", "int4"])
def test_unrolled_and_on_bases_in_few_bits(kind: str) -> None:
    own = STORED[kind](KEY, base(kind != "unrolled"), MODEL)[0]
    each = made(own, FEW)
    params, forward = methods.slora(each)(KEY, own, MODEL)
    wanted, rows = alone(tuple(each.values()), own), ROWS % 4 - 1
    found = jax.jit(mix, static_argnums=1)(params, forward, rows)
    close(found, [wanted[k][n] for n, k in enumerate(rows)], rtol=1e-5, atol=1e-5)
    assert same(pj.strip(params), own)


def test_one_in_use_merges_as_it_did_alone(each: dict[str, Any]) -> None:
    params, forward = methods.slora(each)(KEY, base(), MODEL)
    merged = jax.jit(lambda each: {name: pj.merge(tree) for name, tree in each.items()})(each)

    @jax.jit
    def run(params: Any) -> tuple[Any, Any]:
        return forward(params, TOKENS), pj.merge(params)

    for i, name in enumerate(each):
        used = adapters.use(params, name)
        found, weights = without_compiling(run, used) if i else run(used)
        close(weights, merged[name], rtol=1e-6, atol=1e-6)
        close(found, RUN(merged[name], TOKENS), rtol=1e-5, atol=1e-5)
        assert same(adapters.use(params, i), used)
    for silent in (adapters.use(params, -1), pj.set_scale(params, 0.0)):
        found, weights = without_compiling(run, silent)
        assert same(weights, base())
        close(found, RUN(base(), TOKENS), rtol=1e-6, atol=1e-6)


def test_all_kinds_in_pieces_on_eight_devices(each: dict[str, Any]) -> None:
    params, forward = methods.slora(each)(KEY, base(), MODEL)
    mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
    placed, tokens = sharding.shard(params, forward, mesh), sharding.spread(TOKENS[:8], mesh)
    up = placed["layers"]["up"]["kernel"]
    assert up.a.sharding.spec[-1] == up.base.sharding.spec[-2] and up.b.sharding.spec[-1] == up.base.sharding.spec[-1]
    run = jax.jit(lambda params, tokens: forward(params, tokens, pj.Ports(adapter=ROWS[:8])))
    found = run(placed, tokens)
    assert len(found.sharding.device_set) == 8
    close(found, run(params, TOKENS[:8]), rtol=1e-5, atol=1e-5)


# -- gradients --------------------------------------------------------------------------------------------------------


def gradient(forward: pj.Forward, params: Any, weights: Any, rows: Any = None) -> Any:
    trained, frozen = pj.partition(params)
    total = lambda t: (forward(pj.combine(t, frozen), TOKENS, pj.Ports(adapter=rows)) * weights).sum()  # noqa: E731
    return jax.grad(total)(trained)


def test_gradients_are_those_of_each_adapter_alone(each: dict[str, Any]) -> None:
    """And exact zeros where no row of the batch uses an adapter."""
    some = {name: each[name] for name in ("lora", "rslora", "adalora", "vera")}
    params, forward = methods.slora(some)(KEY, base(), MODEL)
    weights = np.random.RandomState(5).standard_normal((9, 5, VOCAB)).astype(np.float32)

    @jax.jit
    def alone(each: dict[str, Any], rows: Any) -> list[Any]:
        mine = [jnp.where((rows == k)[:, None, None], weights, 0) for k in range(len(some))]
        return [gradient(KINDS[n][0].wrap(MODEL), each[n], w) for n, w in zip(some, mine, strict=True)]

    mixed = jax.jit(lambda params, rows: gradient(forward, params, weights, rows))
    for used in ([2, 1, -1, 3, 2, 0, 0, 3, 1], [0, 0, 3, -1, 3, 3, 0, 0, 0]):
        found, rows = mixed(params, jnp.array(used, jnp.int32)), jnp.array(used, jnp.int32)
        for k, (tree, wanted) in enumerate(zip(some.values(), alone(some, rows), strict=True)):
            assert any(x.any() for x in jax.tree.leaves(wanted)) == (k in used)
            for path, w in trees.leaves(tree).items():
                if is_weight(w):
                    compare(trees.leaves(params)[path], trees.leaves(found)[path], w, trees.leaves(wanted)[path], k)


def compare(whole: Any, found: Any, w: Any, wanted: Any, k: int) -> None:
    """Adapter k's gradients in those of the whole leaf, against those of its own leaf."""
    if isinstance(w, VeRA):
        pairs = [(found.d, wanted.d, whole.d_index), (found.out, wanted.b[..., None, :], whole.out_index[..., None])]
    elif isinstance(w, SVD):
        columns = [(found.a, jnp.matrix_transpose(wanted.q)), (found.b, wanted.p), (found.d, wanted.values)]
        pairs = [(mine, theirs, whole.index if mine.ndim > 2 else whole.d_index) for mine, theirs in columns]
    else:
        pairs = [(found.a, jnp.matrix_transpose(wanted.a), whole.index), (found.b, wanted.b, whole.index)]
    for mine, theirs, pointers in pairs:
        lead = w.scale.ndim
        for layer in np.ndindex(*w.scale.shape):
            at = np.asarray(pointers).take(k, lead)[layer]
            like = theirs[layer][np.asarray(w.values[layer]) != 0] if isinstance(w, SVD) else theirs[layer]
            at = at[at != NOTHING]
            close(np.asarray(mine[layer])[at], like[: len(at)], rtol=1e-4, atol=1e-5)
            if not np.any(like):  # no row has used it
                assert not np.asarray(mine[layer])[at].any()


def test_nothing_of_another_adapter_reaches_a_row(each: dict[str, Any]) -> None:
    """Not even NaN, forth and back."""
    broken = {"first": each["lora"], "broken": jax.tree.map(lambda x: x, each["rslora"]), "vera": each["vera"]}
    params, forward = methods.slora(broken)(KEY, base(), MODEL)

    def spoil(w: Any) -> Any:
        if not isinstance(w, Adapters):
            return w
        index = np.asarray(w.index).take(1, w.active.ndim)
        bad = jnp.asarray(np.isin(np.arange(w.a.shape[-2]), index)) if w.a is not None else None
        change = lambda x: x if x is None else jnp.where(bad[:, None], jnp.nan, x)  # noqa: E731
        return dataclasses.replace(w, a=change(w.a), b=change(w.b))

    # Of stacked layers all have the same index here, but for those that "lora" leaves alone: spoil what is rslora's.
    spoilt = params | {"tokens": trees.map_weights(spoil, params["tokens"])}
    rows = jnp.array([0, 1, -1, 2, 0, 2, -1, 0, 2], jnp.int32)
    trained, frozen = pj.partition(spoilt)

    @jax.jit
    def both(trained: Any, frozen: Any) -> Any:
        def total(trained: Any) -> Any:
            found = forward(pj.combine(trained, frozen), TOKENS, pj.Ports(adapter=rows))
            return jnp.where((rows == 1)[:, None, None], 0, found).sum(), found

        return jax.grad(total, has_aux=True)(trained)

    gradients, found = both(trained, frozen)
    assert np.isnan(found[1]).all() and np.isfinite(found[np.array([0, *range(2, 9)])]).all()
    whole, _ = both(*pj.partition(params))
    up = lambda tree: tree["layers"]["up"]["kernel"]  # noqa: E731
    assert np.isfinite(up(whole).a).all() and np.isfinite(whole["tokens"]["embedding"].out).all()
    assert np.isfinite(gradients["tokens"]["embedding"].out).all(), "VeRA's rows meet no NaN on the way back"


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_compiles() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("real_compiles")
def test_a_call_costs_what_its_batch_costs_however_many_are_registered(each: dict[str, Any]) -> None:
    some = {"lora": each["lora"], "rslora": each["rslora"], "vera": each["vera"]}

    def cost(times: int, rows: int, time: int) -> tuple[float, int]:
        many = {f"{name} {i}": tree for i in range(times) for name, tree in some.items()}
        method = methods.slora(many)
        params, wrapped = jax.eval_shape(lambda: method.init(KEY, base(), MODEL)), method.wrap(MODEL)
        index, tokens = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, time), jnp.int32)
        run = jax.jit(lambda p, tokens, index: wrapped(p, tokens, pj.Ports(adapter=index)))
        compiled = run.lower(params, tokens, index).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    few, many = cost(4, 3, 8), cost(16, 3, 8)
    assert few == many, "registered adapters have a price"
    # What is gathered, is gathered a row: eight times the tokens do not need it eight times.
    longer, less = cost(4, 3, 64), cost(4, 3, 8)
    assert longer[1] < 6 * less[1]


# -- beside HF PEFT ---------------------------------------------------------------------------------------------------


def test_hf_peft_mixes_a_batch_alike(tmp_path: Path) -> None:
    """Its `adapter_names`, on torch: ranks 2, 4 and 5, other modules and scales."""
    import torch

    options: dict[str, dict[str, Any]] = {
        "a": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
        "b": {"r": 4, "lora_alpha": 4, "target_modules": ["v_proj", "q_proj"], "use_rslora": True},
        "c": {"r": 5, "lora_alpha": 8, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [0, 2]},
    }
    for seed, (name, given) in enumerate(options.items()):
        from_peft("llama", tmp_path / name, seed, **given)
    theirs = in_peft("llama", tmp_path / "a")
    theirs.load_adapter(str(tmp_path / "b"), "b")
    theirs.load_adapter(str(tmp_path / "c"), "c")
    who = ["b", "__base__", "c", "default", "b"]
    tokens = np.random.RandomState(2).randint(3, 48, (5, 7))
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(tokens), adapter_names=who).logits.numpy()
    assert isinstance(theirs, peft.PeftModel)

    model = peft_base("llama")
    each = {name: hf_peft.load(tmp_path / name, model.model)[0] for name in options}
    params, forward = methods.slora(each)(KEY, model.params, model.forward)
    rows = jnp.array([1, -1, 2, 0, 1], jnp.int32)
    found = jax.jit(forward)(params, jnp.asarray(tokens, jnp.int32), pj.Ports(adapter=rows))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert differs(found[0], jax.jit(model.forward)(model.params, jnp.asarray(tokens, jnp.int32))[0], 0.1)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_one_of_several_is_named(each: dict[str, Any], tmp_path: Path) -> None:
    def refuses(message: str, some: dict[str, Any], on: Any = None) -> None:
        with pytest.raises(ValueError, match=message):
            methods.slora(some)(KEY, base() if on is None else on, MODEL)

    refuses("no adapters to stack", {})
    dora = methods.dora(2, select="up")(KEY, base(), MODEL)[0]
    refuses(r"'d' has DoRA at layers/up/kernel: only LoRA, DyLoRA, AdaLoRA and VeRA", {"a": each["lora"], "d": dora})
    pissa = methods.pissa(2, select="up")(KEY, base(), MODEL)[0]
    refuses("'p' has LoRA on Residual at layers/up/kernel", {"p": pissa})
    refuses("'n' has Unfrozen at layers/up/kernel", {"n": methods.unfreeze("up")(KEY, base(), MODEL)[0]})
    other = jax.tree.map(lambda x: x * 2, base())
    refuses(
        "'o' is on another base: layers/down/kernel holds other",
        {"o": methods.lora(2, select="up")(KEY, other, MODEL)[0]},
    )
    refuses(
        "'lora' is on another base: layers/down/kernel is an array of",
        {"lora": each["lora"]},
        STORED["nf4"](KEY, base(), MODEL)[0],
    )
    refuses("'v' lacks methods/vera", {"v": {k: x for k, x in each["vera"].items() if k != "methods"}})
    refuses(r"'t' has ports/soft, which is no weight: use adapters\.stack", {"t": base() | {"ports": {"soft": 1}}})
    params, forward = methods.slora(each)(KEY, base(), MODEL)
    with pytest.raises(ValueError, match="already applied"):
        methods.slora(each)(KEY, params, MODEL)
    with pytest.raises(ValueError, match="names 2 rows and the batch has 9"):
        forward(params, TOKENS, pj.Ports(adapter=jnp.array([0, 1])))
    probe = methods.slora(each).wrap(pj.Forward(lambda params, inputs, ports: params, spec=MODEL.spec))
    with pytest.raises(ValueError, match="each row uses an adapter of its own"):
        pj.materialise(probe(params, TOKENS, pj.Ports(adapter=ROWS))["tokens"]["embedding"])
    with pytest.raises(ValueError, match="lacks what layers share"):
        pj.materialise(params["tokens"]["embedding"])
    with pytest.raises(ValueError, match="'vera' was AdaLoRA or VeRA: save the tree that was stacked"):
        hf_peft.save(tmp_path, params, forward, adapter="vera")
