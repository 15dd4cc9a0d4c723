"""Sums of adapters, against HF PEFT's add_weighted_adapter and plain numpy."""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from checks import close, differs, same
from oracles.peft_models import adapted, base, in_peft, logits, packed, unmerged

import peft_jax as pj
from peft_jax import adapters, arithmetic, methods, trees
from peft_jax.interop import hf_peft
from peft_jax.methods.lora import LoRA

Q = ("model", "layers", "self_attn", "q_proj", "kernel")
EMBED = ("model", "embed_tokens", "embedding")


@functools.cache
def alike() -> dict[str, Any]:
    """Adapters of one rank, which is all that most of HF PEFT's methods take; the third leaves the embedding alone."""
    made = {
        "one": methods.lora(3, 6, "(q|v)_proj|embed"),
        "two": methods.lora(3, 2, "(q|v)_proj|embed"),
        "three": methods.lora(3, 3, "q_proj"),
    }
    return {name: adapted("llama", method, seed)[0] for seed, (name, method) in enumerate(made.items())}


@functools.cache
def unlike() -> dict[str, Any]:
    """Other ranks, targets and layers, and ranks by layer."""
    made = {
        "wide": methods.lora(4, 8, "(q|o)_proj|embed"),
        "narrow": methods.lora(2, 3, "q_proj|lm_head"),
        "upper": methods.lora(3, 3, "v_proj|q_proj", rank_pattern={r"\.2\.": 1}, layers=[1, 2]),
    }
    return {name: adapted("llama", method, seed)[0] for seed, (name, method) in enumerate(made.items())}


def deltas(params: Any) -> dict[str, np.ndarray]:
    """What a tree adds to each matrix of the base, in fp64."""
    found = {}
    for path, w in trees.leaves(params).items():
        if isinstance(w, LoRA):
            a, b, s = (np.asarray(x, np.float64) for x in (w.a, w.b, w.scale))
            found["/".join(path)] = s[..., None, None] * (a @ b)
    return found


def exact(trees: dict[str, Any], weights: Any) -> dict[str, np.ndarray]:
    total: dict[str, Any] = {}
    for tree, weight in zip(trees.values(), weights, strict=True):
        for path, delta in deltas(tree).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def off(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The relative distance over all matrices."""
    assert found.keys() == wanted.keys()
    square = lambda each: sum(np.sum(x**2) for x in each)  # noqa: E731
    return float(np.sqrt(square(found[p] - wanted[p] for p in wanted) / square(wanted.values())))


# -- HF PEFT ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Any of HF PEFT's sums of our adapters, as a tree: there and back through its files."""
    folder, models = tmp_path_factory.mktemp("sums"), dict[str, Any]()

    def load(group: str, trees: dict[str, Any]) -> peft.PeftModel:
        for name, tree in trees.items():
            hf_peft.save(folder / group / name, tree)
        (first, *others), at = trees, folder / group
        model = peft.PeftModel.from_pretrained(base("llama").torch(), str(at / first), adapter_name=first)
        for name in others:
            model.load_adapter(str(at / name), name)
        return model

    def sum_up(trees: dict[str, Any], weights: list[float], kind: str, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own deprecations, and its advice on density 1
            group = "-".join(trees)
            if group not in models:
                models[group] = load(group, trees)
            model, name = models[group], f"sum{len(models[group].peft_config)}"
            model.add_weighted_adapter(list(trees), weights, name, combination_type=kind, **options)
            model.save_pretrained(folder / group, selected_adapters=[name])
        return hf_peft.load(folder / group, base("llama").model, adapter=name)[0]

    return sum_up


def mask(shape: Any, density: float) -> np.ndarray:
    """In place of a random one; the same for a matrix and its transpose."""
    rows, columns = np.indices(shape)
    return (rows + 1) * (columns + 1) * 7 % 10 < round(10 * density)


DENSE = {"density": 0.6}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cat": ("concatenation", {}, {}),
    "svd": ("svd", {"rank": 2}, {"svd_rank": 2}),
    "linear": ("linear", {}, {}),
    "ties": ("ties", DENSE, DENSE),
    "ties by frequency": ("ties", DENSE | {"elect": "frequency"}, DENSE | {"majority_sign_method": "frequency"}),
    "dare_linear": ("dare_linear", DENSE, DENSE),
    "dare_ties": ("dare_ties", DENSE, DENSE),
    "magnitude_prune": ("magnitude_prune", DENSE, DENSE),
    "ties_svd": ("ties", DENSE | {"on": "delta", "rank": 4}, DENSE | {"svd_rank": 4}),
    "dare_linear_svd": ("dare_linear", DENSE | {"on": "delta", "rank": 4}, DENSE | {"svd_rank": 4}),
    "dare_ties_svd": ("dare_ties", DENSE | {"on": "delta", "rank": 4}, DENSE | {"svd_rank": 4}),
    "magnitude_prune_svd": ("magnitude_prune", DENSE | {"on": "delta", "rank": 4}, DENSE | {"svd_rank": 4}),
    "dare_ties at density 1": ("dare_ties", {"density": 1.0}, {"density": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_sums_equal_hf_peft(case: str, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    method, mine, yours = CASES[case]
    monkeypatch.setattr(torch, "bernoulli", lambda p: torch.tensor(mask(p.shape, float(p.max())), dtype=p.dtype))
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: mask(shape, p))
    key = {"key": jax.random.key(0)} if method.startswith("dare") else {}
    weights = [0.7, 1.5, 0.4]
    wanted = deltas(theirs(alike(), weights, case.split()[0], **yours))
    found = arithmetic.weighted_sum(alike(), weights, method, **mine, **key)
    assert off(deltas(found.params), wanted) < 1e-5
    if method in ("linear", "svd", "concatenation"):
        assert off(wanted, exact(alike(), weights)) == pytest.approx(found.error, abs=1e-6)


def test_negative_weights_equal_hf_peft_where_no_sign_is_elected(theirs: Any) -> None:
    weights = [1.0, -0.5, 0.25]
    for case in ("cat", "svd", "linear", "magnitude_prune"):
        method, mine, yours = CASES[case]
        found = arithmetic.weighted_sum(alike(), weights, method, **mine).params
        assert off(deltas(found), deltas(theirs(alike(), weights, case, **yours))) < 1e-5
    wanted = deltas(theirs(unlike(), weights, "cat"))
    assert off(deltas(arithmetic.weighted_sum(unlike(), weights).params), wanted) < 1e-5


def test_where_hf_peft_differs(theirs: Any) -> None:
    # A negative weight is the negated adapter, which votes as such; peft elects as if it were positive.
    ties = functools.partial(arithmetic.weighted_sum, method="ties", density=0.6, on="delta", rank=8)
    names = {"one": "one", "two": "minus two", "three": "three"}
    signed = alike() | {"two": arithmetic.negate(alike()["two"])}
    negated = {names[name]: tree for name, tree in signed.items()}
    minus, plus = [1.0, -1.0, 1.0], [1.0, 1.0, 1.0]
    for elect in ("total", "frequency"):
        ours, same_again = (deltas(ties(t, w, elect=elect).params) for t, w in ((alike(), minus), (negated, plus)))
        assert off(ours, same_again) < 1e-6
    options = {"density": 0.6, "svd_rank": 8}
    assert off(deltas(theirs(negated, plus, "ties_svd", **options)), deltas(ties(negated, plus).params)) < 1e-5
    assert off(deltas(theirs(alike(), minus, "ties_svd", **options)), deltas(ties(alike(), minus).params)) > 0.1
    # An adapter of weight 0 is as good as absent; peft lets it vote, and counts it in the mean.
    less = {name: alike()[name] for name in ("one", "two")}
    absent = deltas(ties(less, [1.0, 2.0]).params)
    assert off(deltas(ties(alike(), [1.0, 2.0, 0.0]).params), absent) < 1e-6
    assert off(deltas(theirs(alike(), [1.0, 2.0, 0.0], "ties_svd", **options)), absent) > 0.1
    # A single adapter is pruned like any; peft takes it as it is.
    single = {"one": alike()["one"]}
    pruned = arithmetic.weighted_sum(single, [1.0], "magnitude_prune", density=0.3)
    assert off(deltas(theirs(single, [1.0], "magnitude_prune", density=0.3)), deltas(single["one"])) < 1e-6
    assert off(deltas(pruned.params), deltas(single["one"])) > 0.1


def test_hf_peft_keeps_the_flag_of_rslora(tmp_path: Path) -> None:
    """Its sum is √(rank of the result) too large; what is loaded from its files is right, and so is our sum of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(base("llama").torch(), config, adapter_name="one")
        model.save_pretrained(tmp_path)
        model.add_weighted_adapter(["one"], [1.0], "sum", combination_type="linear")
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    one, total = (layer.get_delta_weight(name).detach().numpy() for name in ("one", "sum"))
    np.testing.assert_allclose(total, 2 * one, rtol=1e-5, atol=1e-7)
    tree = hf_peft.load(tmp_path, base("llama").model, adapter="one")[0]
    for method in ("concatenation", "linear"):
        found = deltas(arithmetic.weighted_sum([tree], [1.0], method).params)
        np.testing.assert_allclose(found["/".join(Q)][1], one.T, rtol=1e-5, atol=1e-7)


# -- numpy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [alike, unlike])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 0.3), (1.0, 0.0, -1.0)])
def test_concatenation_is_exact(group: Any, weights: Any) -> None:
    found = arithmetic.weighted_sum(group(), weights)
    assert off(deltas(found.params), exact(group(), weights)) < 1e-6
    assert found.error == 0 and set(found.errors.values()) == {0.0}
    leaf = trees.leaves(found.params)[Q]
    ranks = zip(*(trees.leaves(tree)[Q].ranks for tree in group().values()), strict=True)
    assert leaf.ranks == tuple(map(sum, ranks))
    close(logits("llama", found.params), unmerged(base("llama").forward, found.params), atol=1e-4)


def test_the_result_is_an_adapter_like_any(tmp_path: Path) -> None:
    before = jax.tree.map(np.asarray, unlike()["wide"])
    found = arithmetic.weighted_sum(unlike(), {"narrow": -0.5, "wide": 1.0, "upper": 2.0}).params
    bare = pj.strip(found)
    assert all(x is y for x, y in zip(jax.tree.leaves(bare), jax.tree.leaves(base("llama").params), strict=True)), (
        "the base is shared"
    )
    leaf = trees.leaves(found)[Q]
    assert leaf.ranks == (6, 9, 7) and not leaf.a[0, :, 6:].any() and not leaf.b[2, 7:].any()
    # Saved, loaded by peft and here; stacked beside another; trained.
    hf_peft.save(tmp_path, found)
    tokens = torch.tensor(np.random.default_rng(0).integers(3, 48, (2, 9)))
    with torch.no_grad():
        close(in_peft("llama", tmp_path)(tokens).logits.numpy(), logits("llama", found), atol=1e-4)
    again = hf_peft.load(tmp_path, base("llama").model)[0]
    close(deltas(again), deltas(found), atol=1e-6)
    several, _ = adapters.stack({"sum": found, "wide": unlike()["wide"]}, base("llama").forward)
    close(pj.merge(adapters.use(several, "sum")), pj.merge(found), atol=1e-6)
    assert pj.count(found).trainable == sum(pj.count(tree).trainable for tree in unlike().values())
    assert same(jax.tree.map(np.asarray, unlike()["wide"]), before)


def test_svd_is_the_nearest_of_its_rank() -> None:
    weights = (1.0, -0.5, 2.0)
    wanted = exact(unlike(), weights)
    for rank in (1, 3, 5):
        found = arithmetic.weighted_sum(unlike(), weights, "svd", rank=rank)
        squares = np.zeros(2)
        for path, delta in wanted.items():
            u, s, vt = np.linalg.svd(delta, full_matrices=False)
            nearest = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
            np.testing.assert_allclose(deltas(found.params)[path], nearest, atol=1e-5)
            here = np.array([np.sum(s[..., rank:] ** 2), np.sum(s**2)])
            np.testing.assert_allclose(found.errors[path], np.sqrt(here[0] / here[1]), atol=1e-6)
            squares += here
        np.testing.assert_allclose(found.error, np.sqrt(squares[0] / squares[1]), rtol=1e-6)
    whole = arithmetic.weighted_sum(unlike(), weights, "svd", rank=99)
    assert whole.error < 1e-12 and off(deltas(whole.params), wanted) < 1e-6
    assert max(trees.leaves(whole.params)[Q].ranks) == 9, "no more than the sum has"


def test_linear_has_cross_terms_and_says_so() -> None:
    found = arithmetic.weighted_sum(alike(), [1.0, 1.0, 1.0], "linear")
    wanted = exact(alike(), [1.0, 1.0, 1.0])
    assert found.error == pytest.approx(off(deltas(found.params), wanted), rel=1e-5) and found.error > 0.5
    for path, error in found.errors.items():
        assert error == pytest.approx(off({"": deltas(found.params)[path]}, {"": wanted[path]}), rel=1e-5)
    itself = arithmetic.weighted_sum([alike()["one"]], [-2.0], "linear")
    assert itself.error < 1e-7 and off(deltas(itself.params), exact({"": alike()["one"]}, [-2.0])) < 1e-6


def vector(*numbers: float) -> Any:
    """A tree whose adapter adds these numbers to a row of zeros."""
    b = jnp.array([numbers], jnp.float32)
    return {"kernel": LoRA(ROW, jnp.ones((1, 1)), b, jnp.float32(1), ranks=(1,))}


ROW = jnp.zeros((1, 5))
FIRST, SECOND, THIRD = (3.0, -1.0, 2.0, 0.1, 4.0), (-5.0, 2.0, 0.2, -3.0, 1.0), (1.0, -2.0, 0.1, -1.5, -6.0)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # Kept of each are the three largest: (3, ·, 2, ·, 4), (−5, 2, ·, −3, ·) and (·, −2, ·, −1.5, −6).
        ({"method": "magnitude_prune", "density": 0.6}, (-2.0, 0.0, 2.0, -4.5, -2.0)),
        ({"method": "ties", "density": 0.6}, (-5.0, 2.0, 2.0, -2.25, -6.0)),
        ({"method": "ties", "density": 1.0}, (-5.0, -1.5, 2.3 / 3, -2.25, -6.0)),
        ({"method": "ties", "density": 1.0, "elect": "frequency"}, (2.0, -1.5, 2.3 / 3, -2.25, 2.5)),
    ],
)
def test_by_hand(options: Any, wanted: Any) -> None:
    given = [vector(*numbers) for numbers in (FIRST, SECOND, THIRD)]
    found = arithmetic.weighted_sum(given, [1.0, 1.0, 1.0], on="delta", rank=1, **options)
    np.testing.assert_allclose(pj.merge(found.params)["kernel"], [wanted], atol=1e-5)
    assert found.error < 1e-6


def test_dare_is_unbiased_and_drawn_by_name() -> None:
    one, two = vector(*FIRST), vector(*SECOND)
    dare = functools.partial(arithmetic.weighted_sum, method="dare_linear", density=0.5, on="delta", rank=1)
    draw = lambda seed, each, weights: pj.merge(dare(each, weights, key=jax.random.key(seed)).params)["kernel"]  # noqa: E731
    drawn = np.stack([draw(seed, [one], [1.0])[0] for seed in range(200)])
    assert all(np.isclose(column, 0, atol=1e-5).any() for column in drawn.T)
    np.testing.assert_allclose(np.unique(drawn.round(3)[:, 0]), [0, 6])
    np.testing.assert_allclose(drawn.mean(0) / np.array(FIRST), 1, atol=0.25)
    forth, back = draw(3, {"a": one, "b": two}, [1.0, 2.0]), draw(3, {"b": two, "a": one}, [2.0, 1.0])
    np.testing.assert_allclose(forth, back, atol=1e-5)
    twice = [draw(seed, {"a": one, "b": arithmetic.negate(one)}, [1.0, 1.0]) for seed in range(3)]
    assert any(differs(x, 0 * x, 0.1) for x in twice), "each adapter draws its own mask"


def test_negate_and_scale() -> None:
    tree = unlike()["upper"]
    assert off(deltas(arithmetic.negate(tree)), exact({"": tree}, [-1.0])) < 1e-7
    assert off(deltas(arithmetic.scale(tree, 0.25)), exact({"": tree}, [0.25])) < 1e-7
    undone = arithmetic.weighted_sum([tree, arithmetic.negate(tree)], [1.0, 1.0]).params
    close(pj.merge(undone), base("llama").params, atol=1e-6)
    assert pj.count(arithmetic.negate(tree)) == pj.count(tree)


def test_a_negated_adapter_leaves_for_hf_peft(tmp_path: Path) -> None:
    found = arithmetic.negate(alike()["one"])
    hf_peft.save(tmp_path, found)
    tokens = torch.tensor(np.random.default_rng(0).integers(3, 48, (2, 9)))
    with torch.no_grad():
        close(in_peft("llama", tmp_path)(tokens).logits.numpy(), logits("llama", found), atol=1e-4)


def test_other_bases_and_dtypes() -> None:
    """Layers unrolled, half precision, and a base that stores its numbers otherwise."""
    unrolled = {"layer": {"kernel": jnp.ones((6, 5), jnp.bfloat16)}, "norm": {"scale": jnp.ones(6)}}
    seen = pj.Forward(lambda params, inputs, ports: params)
    halves = [methods.lora(r, select="", dtype=jnp.bfloat16)(jax.random.key(r), unrolled, seen)[0] for r in (2, 3)]
    halves = [jax.tree.map(lambda on, x: x + x.dtype.type(0.3) if on else x, pj.trainable(t), t) for t in halves]
    found = arithmetic.weighted_sum(halves, [0.3, -0.7]).params
    leaf = found["layer"]["kernel"]
    assert leaf.a.dtype == jnp.float32 and leaf.a.shape == (6, 5) and leaf.scale.shape == ()
    assert off(deltas(found), exact(dict(enumerate(halves)), [0.3, -0.7])) < 1e-6
    assert found["norm"]["scale"] is unrolled["norm"]["scale"]

    stored = packed(base("llama").params)
    trees_ = [methods.lora(r)(jax.random.key(r), stored, base("llama").forward)[0] for r in (2, 3)]
    total = arithmetic.weighted_sum(trees_, [1.0, 1.0]).params
    assert trees.leaves(total)[Q].base is trees.leaves(stored)[Q]


def test_errors_name_the_adapter_and_the_path() -> None:
    one, two = alike()["one"], alike()["two"]
    add = arithmetic.weighted_sum

    def refuses(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            add(*args, **options)

    refuses("no adapters to sum", {}, {})
    refuses("2 adapters and 1 weights", [one, two], [1.0])
    refuses("differ in 'c': give each adapter one weight", {"a": one, "b": two}, {"a": 1.0, "b": 1.0, "c": 1.0})
    refuses("weight of adapter 'b' is nan", {"a": one, "b": two}, [1.0, float("nan")])
    refuses("no method 'cat': choose from concatenation, svd", [one, two], [1, 1], "cat")
    refuses("on is 'delta': choose|svd has no form on='delta'", [one, two], [1, 1], "svd", on="delta")
    refuses("on is 'matrix': choose", [one, two], [1, 1], "ties", density=0.5, on="matrix")
    refuses("elect is 'vote': choose", [one, two], [1, 1], "ties", density=0.5, elect="vote")
    refuses("svd needs rank", [one, two], [1, 1], "svd")
    refuses("concatenation has no use for rank", [one, two], [1, 1], rank=4)
    refuses("ties on='delta' needs rank", [one, two], [1, 1], "ties", density=0.5, on="delta")
    refuses("ties on='factors' needs density", [one, two], [1, 1], "ties")
    refuses("dare_linear on='factors' needs key", [one, two], [1, 1], "dare_linear", density=0.5)
    refuses("linear has no use for density", [one, two], [1, 1], "linear", density=0.5)
    refuses("rank must be a positive integer, got 0", [one, two], [1, 1], "svd", rank=0)
    for density in (0.0, 1.5, -0.1, float("nan")):
        refuses(r"density must lie in \(0, 1\]", [one, two], [1, 1], "ties", density=density)
    refuses(
        f"linear averages A and B themselves, and at {'/'.join(Q)} 'wide' has rank 4, 'narrow' has rank 2: choose",
        {name: unlike()[name] for name in ("wide", "narrow")},
        [1, 1],
        "linear",
    )
    shape = one | {"lm_head": {"kernel": jnp.zeros((16, 9))}}
    refuses(r"'1' is on another base: lm_head/kernel is \(16, 9\), and \(16, 48\) in '0'", [one, shape], [1, 1])
    less = {"model": one["model"]}
    refuses("'b' is on another base: lm_head/kernel is only in one of them", {"a": one, "b": less}, [1, 1])
    numbers = trees.map_leaves(lambda p, w: dataclasses.replace(w, base=w.base + 1) if p == EMBED else w, one)
    refuses(f"'b' is on another base: {'/'.join(EMBED)} holds other numbers", {"a": one, "b": numbers}, [1, 1])
    forward = base("llama").forward
    made = {
        "DoRA .*: only plain LoRA adds up; its magnitude": methods.dora(2),
        "DyLoRA at .*: only plain LoRA adds up; methods.truncate": methods.dylora(2),
        "LoRA on Residual .*: only plain LoRA adds up; interop.hf_peft.save": methods.pissa(2),
        "LoRA on LoRA .*: only plain LoRA": pj.chain(methods.lora(2), methods.lora(2, name="other")),
        "Unfrozen at model/norm/scale: .* set it back": methods.unfreeze("model.norm"),
        "has ports/prompt_tuning, which is not summed": methods.prompt_tuning(2),
    }
    for message, method in made.items():
        tree = method(jax.random.key(0), base("llama").params, forward)[0]
        refuses(f"'b' has {message}" if "ports" not in message else message, {"a": one, "b": tree}, [1, 1])
        with pytest.raises(ValueError, match="only plain LoRA adds up"):
            arithmetic.negate(tree)
    several, _ = adapters.stack({"one": one, "two": two}, forward)
    refuses("Adapters at .*: .* give the trees that were stacked", [several], [1])
