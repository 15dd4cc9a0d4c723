"""GPTQ: codes of the paper's algorithm in float64 and of AutoGPTQ, and what a model's layers are calibrated on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from checks import close, same

import peft_jax as pj
from peft_jax import methods, quant, trees
from peft_jax.quant.gptq import hessian, solve
from peft_jax.quant.grouped import GroupedInt, unpack
from peft_jax.quant.observe import Place, as_calibration, measure

RANDOM = np.random.RandomState(0)


def mixed(rows: int, inputs: int, random: Any = RANDOM) -> np.ndarray:
    """Inputs that depend on each other, one of them dead."""
    x = random.standard_normal((rows, inputs)) @ random.standard_normal((inputs, inputs))
    x[:, 5] = 0
    return x.astype(np.float32)


def ranges(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
    step = (high - low) / (2**bits - 1)
    step[step == 0] = 1
    return step, np.round(-low / step)


def algorithm_1(w: Any, x: Any, bits: int, size: int, act_order: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(codes, numbers) by the paper, in float64, one input at a time and without blocks."""
    w, x = (np.asarray(array, np.float64) for array in (w, x))
    h = 2 / len(x) * x.T @ x
    dead = np.diag(h) == 0
    h[dead, dead], w[dead] = 1, 0
    h += 0.01 * np.diag(h).mean() * np.eye(len(h))
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    codes, numbers, left = np.zeros(w.shape, int), np.zeros(w.shape), w[order]
    fixed = [ranges(w[i : i + size], bits) for i in range(0, len(h), size)]
    for i, at in enumerate(order):
        if act_order:
            step, zero = fixed[at // size]
        elif i % size == 0:
            step, zero = ranges(left[i : i + size], bits)
        codes[at] = np.clip(np.round(left[i] / step) + zero, 0, 2**bits - 1)
        numbers[at] = step * (codes[at] - zero)
        left[i:] -= np.outer(upper[i, i:], (left[i] - numbers[at]) / upper[i, i])
    return codes, numbers


def codes_of(leaf: GroupedInt) -> np.ndarray:
    return np.asarray(unpack(leaf.codes, leaf.bits, leaf.matrix[0])).astype(int)


# A group that fills blocks, one that lies across them, the whole width, and inputs that are no whole number of blocks.
@pytest.mark.parametrize(
    ("inputs", "size", "block", "bits", "act_order"),
    [(64, 16, 32, 3, False), (72, 24, 16, 4, False), (72, None, 32, 2, False), (64, 16, 128, 4, True)],
)
def test_codes_are_the_papers(inputs: int, size: int | None, block: int, bits: int, act_order: bool) -> None:
    x, w = mixed(3 * inputs, inputs), RANDOM.standard_normal((inputs, 24)).astype(np.float32)
    options: dict[str, Any] = {"bits": bits, "group_size": size, "act_order": act_order}
    leaf = solve(jnp.asarray(w), hessian(jnp.asarray(x)), block_size=block, **options)
    codes, numbers = algorithm_1(w, x, bits, size or inputs, act_order)
    # A tie that falls the other way changes what follows it in its output.
    ties = (codes_of(leaf) != codes).any(0)
    assert ties.mean() <= 0.05
    close(pj.materialise(leaf)[:, ~ties], numbers[:, ~ties].astype(np.float32), atol=1e-4)
    assert leaf.shape == w.shape and leaf.group_size == (size or inputs)
    nearest = quant.grouped(bits, size or inputs).quantise(jnp.asarray(w))
    lost = {name: np.linalg.norm(x @ (np.asarray(pj.materialise(q)) - w)) for name, q in (("g", leaf), ("n", nearest))}
    assert lost["g"] < 0.85 * lost["n"]


# AutoGPTQ 0.7.1's codes, output by output, and zero points, group by group: quantization/gptq.py on a CPU, 3 bits,
# asymmetric, block and group 16, damping 0.01; with act_order its static groups.
THEIRS: dict[bool, Any] = {
    False: (
        [
            "331463422400207465430403517342332041447131442331",
            "002432620212342727614120437334742705624433644451",
            "151333076361210042110114425473344555175610453602",
            "121744352230222136161332306457211123247042304301",
            "204303151456146211055742427404243535334047132344",
            "303232217474030214744170054143202246730414404575",
        ],
        [[3, 2, 3, 4, 3, 2], [4, 4, 3, 4, 4, 2], [3, 4, 4, 2, 4, 3]],
    ),
    True: (
        [
            "331463321411207465430402507342321021436020431220",
            "102432520201343616503010336312732705524432742361",
            "151323076361210042110114425473344546164610553612",
            "122734242240133146371533417657321223237141303311",
            "205303151557146211155743427404242535324046133354",
            "303242317473031235734272075254322146741415403575",
        ],
        [[3, 2, 3, 4, 3, 2], [4, 3, 3, 5, 4, 3], [2, 4, 4, 2, 4, 3]],
    ),
}


@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_autogptqs(act_order: bool) -> None:
    random = np.random.RandomState(7)
    x = mixed(96, 48, random)
    w = jnp.asarray(random.standard_normal((48, 6)), jnp.float32)
    leaf = solve(w, hessian(jnp.asarray(x)), bits=3, group_size=16, block_size=16, act_order=act_order)
    codes, zeros = THEIRS[act_order]
    assert ["".join(map(str, column)) for column in codes_of(leaf).T] == codes
    assert leaf.zero.astype(int).tolist() == zeros


# -- a model ----------------------------------------------------------------------------------------------------------


def two_layers(params: Any, inputs: Any, ports: Any) -> Any:
    x = jnp.tanh(pj.linear(inputs.tokens, params["layers_0"]["up"]["kernel"]))
    return pj.linear(x, params["layers_1"]["up"]["kernel"])


def alike(a: GroupedInt, b: GroupedInt) -> float:
    """The share of codes that are the same: sums over batches in another order move a few that were nearly tied."""
    return float(np.mean(codes_of(a) == codes_of(b)))


def test_a_layer_meets_what_the_rounded_ones_before_it_give() -> None:
    x = jnp.asarray(mixed(96, 32))
    first, second = (jnp.asarray(RANDOM.standard_normal((32, 32)) / 16, jnp.float32) for _ in range(2))
    params = {"layers_0": {"up": {"kernel": first}}, "layers_1": {"up": {"kernel": second}}}
    names = {"layers_0": "layers.0.up", "layers_1": "layers.1.up"}
    forward = pj.Forward(two_layers, spec=pj.Spec(names=lambda path: (names[path[0]],)))
    options: dict[str, Any] = {"bits": 3, "group_size": 16}
    for passes in (None, 1):
        found: list[Any] = []
        method = quant.gptq([x[:40], x[40:]], select="up", passes=passes, report=found.append, **options)
        given, _ = method(zoo.KEY, params, forward)
        one, two = (given[name]["up"]["kernel"] for name in names)
        assert alike(one, solve(first, hessian(x), **options)) > 0.95
        meets = [jnp.tanh(x @ w) for w in (pj.materialise(one), first)]
        rounded, plain = (alike(two, solve(second, hessian(h), **options)) for h in meets)
        assert (plain if passes else rounded) > 0.96 > (rounded if passes else plain) + 0.02
        assert [error.name for error in found] == list(names.values())
        lost = jnp.linalg.norm(x @ (pj.materialise(one) - first)) / jnp.linalg.norm(x @ first)
        close(found[0].gptq, lost, rtol=1e-3)
        assert all(error.gptq < error.nearest for error in found)


def test_it_goes_through_a_model_scanned_or_not() -> None:
    text = zoo.TOKENS
    mask = np.ones(text.shape, bool)
    mask[:, 9:] = False
    batch = {"tokens": text, "mask": mask}
    base = zoo.base("llama")
    method = quant.gptq([batch], 4, 16, passes=2)
    params, _ = pj.chain(method, methods.lora(2, select="proj"))(zoo.KEY, base, zoo.build("llama"))
    other = pj.chain(methods.lora(2, select="proj"), method)(zoo.KEY, base, zoo.build("llama"))[0]
    assert same(params, other)
    apart = method(zoo.KEY, zoo.unrolled(base), zoo.build("llama", scan=False))[0]
    bare = pj.strip(params)
    for place in ("self_attn/q_proj", "mlp/down_proj"):
        one, two = place.split("/")
        whole = bare["model"]["layers"][one][two]["kernel"]
        for i in range(zoo.LAYERS):
            leaf = apart["model"][f"layers_{i}"][one][two]["kernel"]
            assert alike(jax.tree.map(lambda x, i=i: x[i], whole), leaf) > 0.97
    # Padding is not measured: the same rows, cut.
    sites = trees.select("down_proj", base, zoo.build("llama"))
    places = [Place(path, 1) for path in sites]
    padded, cut = (
        measure(zoo.build("llama"), base, as_calibration([given]), sites, places)[0] for given in (batch, text[:, :9])
    )
    close(padded, cut, rtol=1e-4, atol=1e-4)
    assert differs_from_nearest(bare, base)


def differs_from_nearest(bare: Any, base: Any) -> bool:
    nearest, _ = quant.quantise(quant.grouped(4, 16))(zoo.KEY, base, zoo.build("llama"))
    return not same(bare["model"]["layers"]["mlp"], nearest["model"]["layers"]["mlp"])


def test_errors_name_what_is_wrong() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    with pytest.raises(ValueError, match="there is nothing to calibrate on"):
        quant.gptq([])
    with pytest.raises(ValueError, match="damping is 0: give a share"):
        quant.gptq([zoo.TOKENS], damping=0)
    with pytest.raises(ValueError, match="passes is 0: give how often"):
        quant.gptq([zoo.TOKENS], passes=0)
    with pytest.raises(ValueError, match="block_size is 0: give how many"):
        quant.gptq([zoo.TOKENS], block_size=0)
    padding = pj.Inputs(zoo.TOKENS, mask=jnp.zeros(zoo.TOKENS.shape, bool))
    with pytest.raises(ValueError, match="hold padding alone: calibrate on rows"):
        quant.gptq([padding], group_size=16, select="q_proj")(zoo.KEY, base, forward)
    two = {name: {"kernel": jnp.eye(16)} for name in ("read", "unread")}
    reads = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["read"]["kernel"]))
    with pytest.raises(ValueError, match=r"^unread meets no number but 0 in these batches: leave it out of select"):
        quant.gptq([jnp.eye(16)], group_size=16, select="read")(zoo.KEY, two, reads)
    with pytest.raises(ValueError, match="embed_tokens/embedding is an embedding, which has no inputs"):
        quant.gptq([zoo.TOKENS], group_size=16, select="embed_tokens")(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match=r"down_proj/kernel: 48 inputs are not a whole number of groups of 32"):
        quant.gptq([zoo.TOKENS], group_size=32, select="down_proj", passes=1)(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match="token id 64 is outside the vocabulary of 64"):
        quant.gptq([zoo.TOKENS + 1], group_size=16, select="q_proj")(zoo.KEY, base, forward)
    padded = {"tokens": zoo.TOKENS, "decoder_tokens": zoo.TOKENS, "mask": np.tri(8, 12, dtype=bool)}
    with pytest.raises(ValueError, match="these batches pad a source"):
        quant.gptq([padded])
    twice = pj.chain(quant.quantise(quant.nf4(16)), quant.gptq([zoo.TOKENS], group_size=16, select="q_proj"))
    with pytest.raises(ValueError, match="q_proj/kernel is stored as FourBit already"):
        twice(zoo.KEY, base, forward)
    broken = base | {"lm_head": {"kernel": base["lm_head"]["kernel"].at[3, 3].set(jnp.nan)}}
    with pytest.raises(ValueError, match="lm_head/kernel: the array holds NaN or Inf"):
        quant.gptq([zoo.TOKENS], group_size=16, select="lm_head")(zoo.KEY, broken, forward)
