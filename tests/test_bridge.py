"""What a bridged function may do with an adapted leaf, and what it may not."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bridging import check, shaken
from checks import close, same, without_compiling
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import peft_jax as pj
from peft_jax import methods, quant
from peft_jax.views import View

pytestmark = pytest.mark.usefixtures("quick_compiles")

LORA = methods.lora(2, select=".")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / max(shape[-2], 1) ** 0.5


@jax.custom_vjp
def own_vjp(x: Any, w: Any) -> Any:
    return x @ w


own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@jax.custom_jvp
def own_jvp(x: Any, w: Any) -> Any:
    return x @ w


own_jvp.defjvp(lambda at, along: (own_jvp(*at), along[0] @ at[1] + at[0] @ along[1]))

MESH = functools.partial(jax.make_mesh, (2,), ("tensor",), axis_types=(AxisType.Auto,))
X = normal(3, 8, seed=9)
SQUARE, STACK = {"w": normal(8, 8)}, {"w": normal(3, 8, 8)}
IDS = jnp.array([[0, 3, 4], [3, 1, 0]])


def tied(p: Any, ids: Any) -> Any:
    table = p["embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.einsum("btd,vd->btv", jnp.tanh(table[ids]), p["embedding"])


def experts(p: Any, x: Any) -> Any:
    routed = jnp.einsum("td,te->etd", x, jax.nn.softmax(x[:, :3]))
    return jnp.einsum("etf,efd->td", jax.nn.relu(jnp.einsum("etd,edf->etf", routed, p["up"])), p["down"])


def by_index(p: Any, x: Any) -> Any:
    step = lambda i, x: jnp.tanh(x @ p["w"][i])  # noqa: E731
    return jax.lax.fori_loop(0, 2, step, x, unroll=True) @ p["w"][2].T


def inner_gradient(p: Any, x: Any) -> Any:
    energy = lambda x: jnp.sum(jnp.cosh(0.1 * x @ p["w"]))  # noqa: E731
    return jax.grad(energy)(x)


def branches(p: Any, x: Any) -> Any:
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: (2 * x) @ p["w"].T, x)


def heads(p: Any, x: Any) -> Any:
    q = x @ p["q"].reshape(8, 2, 4).reshape(8, 2, 2, 2)[:, :, :, None, :].squeeze(3).reshape(8, 8)
    return jnp.einsum("tnh,nhd->td", jnp.einsum("td,ndh->tnh", q, p["k"]), p["o"])


def split_reshape(p: Any, x: Any) -> Any:
    return jnp.einsum("tnh,dnh->td", jnp.einsum("td,dnh->tnh", x, p["w"].reshape(8, 2, 4)), p["w"].reshape(8, 2, 4))


def mapped(specs: Any, out: Any, sums: bool, **params: Any) -> Any:
    def local(p: Any, x: Any) -> Any:
        y = x @ p["w"].reshape(p["w"].shape[0], -1) if x.ndim == 2 else x
        return jax.lax.psum(y, "tensor") if sums else y

    return lambda p, x: jax.shard_map(local, mesh=MESH(), in_specs=specs, out_specs=out)(p, x)


CASES: dict[str, tuple[Any, Any, Any]] = {
    "transposed": (lambda p, x: x @ p["w"].T, {"w": normal(5, 8)}, X),
    "from the left": (lambda p, x: (p["w"] @ x.T).T, {"w": normal(5, 8)}, X),
    "vector": (lambda p, x: p["w"] @ x[0] + x[1] @ p["w"], SQUARE, X),
    "vmap inside": (lambda p, x: jax.vmap(lambda x: p["w"] @ x)(x), {"w": normal(5, 8)}, X),
    "heads": (heads, {"q": normal(8, 8), "k": normal(2, 8, 4, seed=1), "o": normal(2, 4, 8, seed=2)}, X),
    "reshaped": (split_reshape, {"w": normal(8, 8)}, X),
    "experts": (experts, {"up": normal(3, 8, 4), "down": normal(3, 4, 8, seed=1)}, X),
    "bf16": (lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), SQUARE, X),
    "tied": (tied, {"embedding": normal(6, 8)}, IDS),
    "look-up by one": (lambda p, ids: jax.vmap(jax.vmap(lambda i: p["table"][i]))(ids), {"table": normal(6, 8)}, IDS),
    "take": (lambda p, ids: jnp.take(p["table"], ids, axis=0), {"table": normal(6, 8)}, IDS),
    "scan": (lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x[0]), x, p["w"], reverse=True), STACK, X),
    "scan, closed over": (lambda p, x: jax.lax.scan(lambda c, x: (jnp.tanh(c @ p["w"] + x), c), X[0], x), SQUARE, X),
    "by index": (by_index, STACK, X),
    "while": (lambda p, x: jax.lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p["w"]), x), SQUARE, X),
    "cond": (branches, SQUARE, X),
    "jit": (lambda p, x: jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w.T))(p["w"], x), SQUARE, X),
    "remat": (lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w.T)(p["w"], x), SQUARE, X),
    "custom_vjp": (lambda p, x: own_vjp(x, p["w"]), SQUARE, X),
    "custom_jvp": (lambda p, x: own_jvp(x, p["w"]), SQUARE, X),
    "gradient inside": (inner_gradient, SQUARE, X),
    "shard_map": (mapped(({"w": P()}, P("tensor")), P("tensor"), False), SQUARE, normal(4, 8)),
    "by columns": (mapped(({"w": P(None, "tensor")}, P()), P(None, "tensor"), False), {"w": normal(8, 2, 4)}, X),
    "by rows": (mapped(({"w": P("tensor")}, P(None, "tensor")), P(), True), SQUARE, X),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_followed(name: str) -> None:
    function, params, x = CASES[name]
    tolerance = 2e-2 if name == "bf16" else 2e-5
    if name == "tied":
        tolerance = 5e-3  # the function rounds the table, and the leaf its base alone
    adapted, _ = check(function, params, (x,), LORA, tolerance=tolerance)
    assert same(pj.strip(adapted), params)
    assert jax.tree.map(jnp.shape, pj.merge(adapted)) == jax.tree.map(jnp.shape, params)


def test_axes_are_found_and_no_array_is_copied() -> None:
    function, params, x = CASES["heads"]
    seen, forward = pj.bridge(function).traced(params, jax.ShapeDtypeStruct(x.shape, x.dtype))
    views = {name: (w.inputs, w.outputs, w.shape) for name, w in seen.items()}
    assert views == {"q": ((0,), (1,), (8, 8)), "k": ((1,), (0, 2), (8, 8)), "o": ((0, 1), (2,), (8, 8))}
    assert all(pj.strip(seen)[name] is pj.merge(seen)[name] is params[name] for name in params)
    for w in seen.values():
        assert same(w.restore(w.materialise()), w.base)
    assert same(jax.jit(forward)(seen, x), jax.jit(function)(params, x))
    stack, forward = pj.bridge(CASES["experts"][0]).traced(CASES["experts"][1], X)
    assert forward.spec.names(("up",)) == ("up.0", "up.1", "up.2") and stack["up"].shape == (3, 8, 4)
    chosen = pj.select(r"up\.1", stack, forward)[("up",)]
    assert chosen.chosen == (False, True, False)


@pytest.mark.parametrize("method", ["nf4", "grouped", "qlora after", "dora"])
def test_views_are_quantised_as_the_matrices_they_are(method: str) -> None:
    function, params, x = CASES["heads"]
    store = quant.quantise(quant.grouped(4, 4) if method == "grouped" else quant.nf4(block_size=8), ".")
    made = {
        "qlora after": pj.chain(LORA, store),
        "dora": pj.chain(store, methods.dora(2, select=".")),
    }.get(method, pj.chain(store, LORA))
    seen, forward = pj.bridge(function).traced(params, x)
    adapted, forward = made(jax.random.key(0), seen, forward)
    adapted = shaken(adapted)
    run, plain = jax.jit(forward), jax.jit(function)
    wanted = plain(pj.merge(adapted), x)
    close(run(adapted, x), wanted, 1e-4, 1e-4)
    base = pj.strip(adapted)
    close(run(base, x), plain(pj.merge(quant.dequantise(base)), x), 1e-5, 1e-5)
    assert all(isinstance(w, View) and w.packed for w in base.values())
    back = quant.dequantise(adapted)
    assert jax.tree.map(jnp.shape, pj.strip(back)) == jax.tree.map(jnp.shape, params)
    close(run(back, x), wanted, 1e-4, 1e-4)


def test_kernels_of_any_shape_train_whole() -> None:
    function, params, x = CASES["heads"]
    method = pj.chain(methods.unfreeze("^k$"), methods.lora(2, select="^[qo]$"))
    adapted, _ = check(function, params, (x,), method)
    assert pj.count(adapted).trainable == params["k"].size + 2 * 2 * (8 + 8)
    assert all(pj.strip(adapted)[name] is params[name] for name in params)


def test_rows_beyond_a_table_are_what_they_were() -> None:
    function = lambda p, ids: jnp.take(p["t"], ids, axis=0) + p["t"].at[ids].get(mode="clip")  # noqa: E731
    ids = jnp.array([-1, 7, 2])
    adapted, forward = LORA(jax.random.key(0), *pj.bridge(function).traced({"t": normal(6, 8)}, ids))
    adapted = shaken(adapted)
    found = forward(adapted, ids)
    assert np.isnan(found[1]).all() and np.isfinite(found[jnp.array([0, 2])]).all()
    close(found, function(pj.merge(adapted), ids))


def test_randomness_and_ranks_reach_the_leaves() -> None:
    params, x = {"q_proj": {"kernel": normal(8, 8)}}, normal(4, 8, seed=5)
    native = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    bridged = pj.bridge(lambda params, x: x @ params["q_proj"]["kernel"])
    ports = pj.Ports(micro_key=jax.random.key(4), step_key=jax.random.key(5))
    for method in (methods.lora(4, dropout=0.5), methods.dylora(4, dropout=0.5), methods.vera(4, dropout=0.5)):
        adapted, ours = method(jax.random.key(0), params, bridged)
        theirs = method.wrap(native)
        adapted = shaken(adapted)
        run = jax.jit(ours)
        dropped = run(adapted, x, ports)
        assert same(dropped, jax.jit(theirs)(adapted, x, ports))
        assert not np.allclose(dropped, run(adapted, x, dataclasses.replace(ports, micro_key=jax.random.key(6))))
    assert same(ours(adapted, x, ports=ports), ours(adapted, x, ports))


def test_transformations_around_it_compile_once() -> None:
    function, params, x = CASES["scan"]
    seen, forward = pj.bridge(function).traced(params, x)
    adapted, forward = LORA(jax.random.key(0), seen, forward)
    adapted = shaken(adapted)
    plain = pj.merge(adapted)
    rows = jax.vmap(lambda x: forward(adapted, x))(jnp.stack([x, 2 * x]))
    close(rows, jax.vmap(lambda x: function(plain, x))(jnp.stack([x, 2 * x])))
    run = jax.jit(jax.checkpoint(lambda params, x: forward(params, x)[0]))
    close(run(adapted, x), function(plain, x)[0])
    without_compiling(run, pj.set_scale(adapted, 0.5), x + 1)
    several = jax.tree.map(lambda *w: jnp.stack(w), pj.set_scale(adapted, 0.0), adapted)  # over the leaves
    each = jax.vmap(lambda params: forward(params, x)[0])(several)
    close(each, jnp.stack([function(params, x)[0], function(plain, x)[0]]))


def test_a_products_precision_is_kept() -> None:
    function = lambda p, x: jnp.matmul(x, p["up"]["kernel"], precision="highest")  # noqa: E731
    adapted, forward = LORA(jax.random.key(0), {"up": {"kernel": SQUARE["w"]}}, pj.bridge(function))
    products = [e for e in jax.make_jaxpr(forward)(adapted, X).eqns if e.primitive.name == "dot_general"]
    assert len(products) == 3 and all(e.params["precision"][0] == jax.lax.Precision.HIGHEST for e in products)
    with pytest.raises(ValueError, match="a bridged function has no port 'prompt'"):
        forward(adapted, X, pj.Ports(prompt=X))


def test_inputs_of_its_own() -> None:
    def function(params: Any, x: Any, batch: Any, *, scale: float = 1.0, flip: bool = False) -> Any:
        y = x @ params["kernel"]["kernel"] + batch["shift"]
        return {"y": -y if flip else y * scale}

    forward = pj.bridge(function)
    params, forward = methods.lora(2, select=".")(jax.random.key(0), {"kernel": {"kernel": normal(8, 4)}}, forward)
    params, batch = shaken(params), {"shift": normal(3, 4)}
    for named in ({}, {"scale": 2.0}, {"flip": True}):
        close(forward(params, X, batch, **named), function(pj.merge(params), X, batch, **named))
    tokens = pj.bridge(lambda params, tokens, positions=None: tokens @ params["kernel"]["kernel"] + positions)
    close(tokens(params, pj.Inputs(X, positions=1.0)), X @ pj.merge(params)["kernel"]["kernel"] + 1)


# -- what is refused ---------------------------------------------------------------------------------------------------


def mutates(p: Any, x: Any) -> Any:
    kept = jax.new_ref(p["w"])
    kept[0, 0] = 1.0
    return x @ kept[...]


REFUSED = {
    "mutable": (mutates, "mutable reference"),
    "index": (lambda p, x: x[:, p["w"].astype(jnp.int32)], "made int32, as an index"),
    "elementwise": (lambda p, x: x @ (2 * p["w"]), r"'mul' at .*test_bridge.py:\d+.*no rule"),
    "inside jit": (lambda p, x: jax.jit(lambda w: jnp.concatenate([w, w]))(p["w"]), r"'concatenate' at .*test_bridge"),
    "inside jax": (lambda p, x: x @ jnp.linalg.inv(p["w"]), r" at .*test_bridge.py:\d+"),
    "a norm": (lambda p, x: jnp.sum(p["w"] ** 2), r"test_bridge.py"),
    "both": (lambda p, x: x @ (p["w"] @ p["w"]), "another adapted leaf, w"),
    "carried": (lambda p, x: jax.lax.fori_loop(0, 2, lambda i, c: (c[0].T, c[1] @ c[0]), (p["w"], x))[1], "carried"),
    "returned": (lambda p, x: (x @ p["w"], p["w"]), "one of its results"),
    "from a branch": (
        lambda p, x: x @ jax.lax.cond(x[0, 0] > 0, lambda w: w, lambda w: w.T, p["w"]),
        "out of a branch",
    ),
    "a part": (lambda p, x: x[:, :4] @ p["w"][:4], "a part of it is cut out"),
    "written": (lambda p, x: x @ p["w"].at[0, 0].set(0.0), "written to"),
    "side by side": (lambda p, x: jnp.einsum("td,de->tde", x, p["w"]), "side by side"),
    "diagonal": (lambda p, x: x @ jnp.diag(jnp.diag(p["w"])), "test_bridge.py"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_use_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    adapted, forward = LORA(jax.random.key(0), {"w": View(SQUARE["w"], own=(8, 8))}, pj.bridge(function))
    with pytest.raises(TypeError, match=f"^w is adapted.*{message}"):
        jax.eval_shape(forward, adapted, X)


def test_materialising_is_asked_for() -> None:
    function = lambda p, x: x @ (2 * p["w"]) + x @ p["w"]  # noqa: E731
    for allowed in (True, "^w$", lambda path: path == "w"):
        forward = pj.bridge(function, materialise=allowed)
        adapted, forward = LORA(jax.random.key(0), {"w": View(SQUARE["w"], own=(8, 8))}, forward)
        adapted = shaken(adapted)
        close(forward(adapted, X), function(pj.merge(adapted), X))
    forward = pj.bridge(function, materialise="another")
    with pytest.raises(TypeError, match="'mul' at"):
        forward(adapted, X)


def test_a_norm_over_devices_is_refused() -> None:
    function, params, x = CASES["by rows"]
    seen, forward = pj.bridge(function).traced(params, x)
    adapted, forward = methods.dora(2, select=".")(jax.random.key(0), seen, forward)
    with pytest.raises(TypeError, match="split over devices"):
        jax.eval_shape(forward, adapted, x)


def test_untold_shapes_are_told_of() -> None:
    params = {"query": {"kernel": normal(8, 2, 4)}}
    forward = pj.bridge(lambda p, x: jnp.einsum("td,dnh->tnh", x, p["query"]["kernel"]))
    with pytest.raises(ValueError, match=r"query of shape \(8, 2, 4\) is no matrix unless forward.traced"):
        methods.lora(2, select="query")(jax.random.key(0), params, forward)
    seen, forward = forward.traced(params, X)
    adapted, wrapped = methods.lora(2, select="query")(jax.random.key(0), seen, forward)
    with pytest.raises(ValueError, match="trace the model before any method"):
        wrapped.traced(adapted, X)
    with pytest.raises(ValueError, match="no matrix of its own"):
        quant.gptq([X], select="query")(jax.random.key(0), seen, forward)
