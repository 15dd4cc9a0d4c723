"""Several adapters in one leaf, against each of them alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from checks import close, copied, differs, same, without_compiling
from zoo import KEY, TOKENS

import peft_jax as pj
from peft_jax import adapters, methods, models
from peft_jax.interop import hf_peft

pytestmark = pytest.mark.usefixtures("quick_compiles")
FORWARD = zoo.build("llama")


def made() -> dict[str, Any]:
    """Three adapters of other ranks, scales and targets, one of them in some layers only."""
    some = {
        "wide": methods.lora(4, 8, "(q|o)_proj|embed"),
        "narrow": methods.lora(2, 6, "q_proj|lm_head"),
        "upper": methods.lora(3, 3, "v_proj|q_proj", rank_pattern={r"\.2\.": 1}, layers=[1, 2]),
    }
    trees = {name: method(KEY, zoo.base("llama"), FORWARD)[0] for name, method in some.items()}
    return {name: zoo.disturbed(tree, seed) for seed, (name, tree) in enumerate(trees.items())}


def alone(params: Any) -> Any:
    return np.asarray(zoo.compiled("llama")(pj.merge(params), TOKENS))


def test_each_row_uses_its_own_adapter() -> None:
    each = made()
    params, forward = adapters.stack(each, FORWARD)
    assert pj.count(params).trainable == sum(pj.count(tree).trainable for tree in each.values())
    assert all(
        a is b for a, b in zip(jax.tree.leaves(pj.strip(params)), jax.tree.leaves(zoo.base("llama")), strict=True)
    )
    expected = [alone(each["wide"]), alone(each["narrow"]), alone(each["upper"]), alone(zoo.base("llama"))]
    assert all(differs(a, b, 0.1) for i, a in enumerate(expected) for b in expected[:i])
    run = jax.jit(lambda params, rows: forward(params, TOKENS, pj.Ports(adapter=rows)))
    for i, rows in enumerate(([0, 1, 2, -1, -1, 2, 1, 0], [2] * 8, [1, 1, 0, 0, 2, 2, -1, 2])):
        given = jnp.array(rows, jnp.int32)
        found = without_compiling(run, params, given) if i else run(params, given)
        close(found, [expected[row][n] for n, row in enumerate(rows)], atol=1e-4)
    # Beyond the last adapter: NaN in that row, not another adapter's answer.
    lost = np.asarray(run(params, jnp.array([0, 3, *[1] * 6], jnp.int32)))
    assert np.isnan(lost[1]).all() and np.isfinite(lost[[0, 2]]).all()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_one_batch_mixes_stored_prompts_and_prefixes(kind: str, tmp_path: Any) -> None:
    """With LoRA beside them; −1 goes without any of it, at the positions of the base."""
    put = methods.prompt_tuning(3) if kind == "prompt" else methods.prefix_tuning(3, hidden=None)
    some = {"wide": methods.lora(4, 8, "(q|o)_proj"), "narrow": methods.lora(2, 6, "q_proj|lm_head")}
    each, wrapped = {}, FORWARD
    for seed, (name, lora) in enumerate(some.items()):
        tree, wrapped = pj.chain(put, lora)(KEY, zoo.base("llama"), FORWARD)
        each[name] = zoo.disturbed(tree, seed, by=1.0)
    params, forward = adapters.stack(each, wrapped)
    assert pj.count(params).trainable == sum(pj.count(tree).trainable for tree in each.values())
    mask = np.arange(12)[None] < np.array([12, 12, 9, 12, 7, 12, 12, 12])[:, None]
    given, packed = pj.Inputs(TOKENS, mask=mask), pj.Inputs(TOKENS, segments=np.repeat([[1, 2]], 6, 1).repeat(8, 0))
    for inputs, real in ((pj.Inputs(TOKENS), np.ones_like(mask)), (given, mask), (packed, np.ones_like(mask))):
        expected = [np.asarray(jax.jit(wrapped)(tree, inputs)) for tree in each.values()]
        expected.append(np.asarray(zoo.compiled("llama")(zoo.base("llama"), inputs)))
        assert all(differs(a, b, 0.1) for i, a in enumerate(expected) for b in expected[:i])
        rows = np.array([0, 1, 1, -1, -1, 0, 1, 0], np.int32)
        found = jax.jit(lambda p, rows, inputs: forward(p, inputs, pj.Ports(adapter=rows)))(params, rows, inputs)
        wanted = np.stack([expected[row][n] for n, row in enumerate(rows)])
        close(np.asarray(found)[real], wanted[real], atol=1e-4)
    run = jax.jit(forward)
    for name in ("narrow", "wide", -1):
        switched = adapters.use(params, name)
        alone = jax.jit(wrapped)(each[name], TOKENS) if name != -1 else zoo.compiled("llama")(zoo.base("llama"), TOKENS)
        close(run(params, TOKENS) if name == "wide" else run(switched, TOKENS), alone, atol=1e-4)

    rows = np.array([0, -1, 1, 1, 0, -1, 0, 1], np.int32)
    write = functools.partial(models.generate_tokens, max_new_tokens=4)
    tokens, left = np.where(mask[:, ::-1], TOKENS, 0), mask[:, ::-1]
    mixed = np.asarray(write(forward, params, tokens, left, ports=pj.Ports(adapter=rows)))
    beams = np.asarray(write(forward, params, tokens, left, ports=pj.Ports(adapter=rows), beams=2))
    for index, (one, tree) in enumerate([(wrapped, each["wide"]), (wrapped, each["narrow"])]):
        np.testing.assert_array_equal(mixed[rows == index], np.asarray(write(one, tree, tokens, left))[rows == index])
        alone = np.asarray(write(one, tree, tokens, left, beams=2))
        np.testing.assert_array_equal(beams[rows == index], alone[rows == index])
    plain = np.asarray(write(FORWARD, zoo.base("llama"), tokens, left))
    np.testing.assert_array_equal(mixed[rows == -1], plain[rows == -1])

    ports = {name: {**zoo.base("llama"), "ports": tree["ports"]} for name, tree in each.items()}
    stacked, _ = adapters.stack(ports, put.wrap(FORWARD))
    hf_peft.save(tmp_path / "one", stacked, adapter="narrow")
    hf_peft.save(tmp_path / "two", ports["narrow"])
    for file in (tmp_path / "two").iterdir():
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    with pytest.raises(ValueError, match="say which to save"):
        hf_peft.save(tmp_path / "one", stacked)
    longer, _ = (methods.prompt_tuning(4) if kind == "prompt" else methods.prefix_tuning(4, hidden=None))(
        KEY, zoo.base("llama"), FORWARD
    )
    with pytest.raises(ValueError, match="'a' and 'b' differ in their prompts or prefixes, in name, kind or length"):
        adapters.stack({"a": ports["wide"], "b": longer}, forward)
    tree, twice = pj.chain(methods.prompt_tuning(2, name="other"), put)(KEY, zoo.base("llama"), FORWARD)
    with pytest.raises(ValueError, match="stack trees that have both"):
        twice({**tree, "ports": tree["ports"] | stacked["ports"]}, TOKENS)


def test_a_prefix_is_baked_before_it_is_stored() -> None:
    tree, forward = methods.prefix_tuning(3, hidden=4)(KEY, zoo.base("llama"), FORWARD)
    with pytest.raises(ValueError, match=r"'a' has a prefix that is still an MLP's output: methods\.bake"):
        adapters.stack({"a": tree, "b": tree}, forward)


def test_switching_compiles_nothing_and_merging_takes_the_one_in_use() -> None:
    each = made()
    params, forward = adapters.stack(each, FORWARD)
    run = jax.jit(forward)
    close(run(params, TOKENS), alone(each["wide"]), atol=1e-4)  # the first is in use
    for name in ("upper", "narrow", 0, 2, -1):
        switched = adapters.use(params, name)
        tree = zoo.base("llama") if name == -1 else each[name] if isinstance(name, str) else list(each.values())[name]
        close(without_compiling(run, switched, TOKENS), alone(tree), atol=1e-4)
        close(pj.merge(switched), pj.merge(tree), rtol=1e-6, atol=1e-6)
        assert pj.count(switched) == pj.count(params)
    assert same(pj.merge(adapters.use(params, -1)), zoo.base("llama"))
    assert same(adapters.use(adapters.use(params, 2), "wide"), params)
    silent = pj.set_scale(params, 0.0)
    assert same(pj.merge(silent), zoo.base("llama"))


def test_unrolled_and_in_half_precision() -> None:
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), zoo.unrolled(zoo.base("llama")))
    model = zoo.build("llama", scan=False)
    kinds = {"full": methods.lora(2, select="q_proj"), "half": methods.lora(3, select="q_proj", dtype=jnp.bfloat16)}
    each = {name: zoo.disturbed(m(KEY, base, model)[0]) for name, m in kinds.items()}
    params, _ = adapters.stack(each, model)
    leaf = params["model"]["layers_1"]["self_attn"]["q_proj"]["kernel"]
    assert leaf.a.shape == (5, zoo.WIDTH) and leaf.a.dtype == jnp.float32
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 5, zoo.WIDTH)), jnp.bfloat16)
    for name, tree in each.items():
        mine = tree["model"]["layers_1"]["self_attn"]["q_proj"]["kernel"]
        used = adapters.use({"kernel": leaf}, name)["kernel"]
        assert pj.linear(x, used).dtype == jnp.bfloat16
        close(pj.materialise(used).astype(jnp.float32), pj.materialise(mine).astype(jnp.float32))


def test_errors_name_the_adapter_and_the_path() -> None:
    each = made()
    before = copied(each["wide"])
    params, forward = adapters.stack(each, FORWARD)
    with pytest.raises(ValueError, match="no adapters to stack"):
        adapters.stack({}, FORWARD)
    with pytest.raises(ValueError, match="'other' is on another base: lm_head/kernel is only in one of them"):
        adapters.stack({"wide": each["wide"], "other": {"model": each["wide"]["model"]}}, FORWARD)
    for shape in ((zoo.WIDTH, 9), (9, zoo.VOCAB)):
        other = each["wide"] | {"lm_head": {"kernel": jnp.zeros(shape)}}
        for pair in ({"narrow": each["narrow"], "other": other}, {"wide": each["wide"], "other": other}):
            with pytest.raises(
                ValueError,
                match=r"'other' is on another base: lm_head/kernel is an array of .*, not an array of \(32, 64\)",
            ):
                adapters.stack(pair, FORWARD)
    dora = methods.dora(2)(KEY, zoo.base("llama"), FORWARD)[0]
    with pytest.raises(
        ValueError, match=r"'d' has DoRA at model/layers/self_attn/q_proj/kernel: only LoRA, .* can be stacked"
    ):
        adapters.stack({"wide": each["wide"], "d": dora}, FORWARD)
    with pytest.raises(ValueError, match="no adapter 'wid': there are wide, narrow, upper"):
        adapters.use(params, "wid")
    for index in (3, -2):
        with pytest.raises(ValueError, match=f"no adapter {index}: there are 3, and -1 for the base alone"):
            adapters.use(params, index)
    with pytest.raises(ValueError, match="no stack of adapters called 'other'"):
        adapters.use(params, "wide", name="other")
    with pytest.raises(ValueError, match="no stack of adapters: see"):
        adapters.use(each["wide"], "wide")
    with pytest.raises(ValueError, match=r"ports\.adapter names 3 rows and the batch has 8"):
        forward(params, TOKENS, pj.Ports(adapter=jnp.array([0, 1, 2], jnp.int32)))
    assert same(copied(each["wide"]), before)
