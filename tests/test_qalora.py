"""QA-LoRA: the authors' forward pass and merge in torch, HF PEFT's own layer, and what stays exact."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import zoo
from checks import close, differs, same, three_steps
from peft.tuners.lora.gptq import GPTQLoraLinear

import peft_jax as pj
from peft_jax import methods, quant, trees
from peft_jax.methods.qalora import QALoRA
from peft_jax.quant.grouped import GroupedInt

pytestmark = pytest.mark.usefixtures("quick_compiles")
RANDOM = np.random.RandomState(0)
INPUTS, OUTPUTS, GROUP, RANK, ALPHA = 32, 12, 8, 3, 6
INT4 = quant.quantise(quant.grouped(4, 16), r"(q|o|down)_proj")


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def adapter(base: Any, a: np.ndarray, b: np.ndarray, pooling: str, group: int = GROUP) -> QALoRA:
    scale = jnp.full(a.shape[:-2], ALPHA / RANK)
    ranks = (RANK,) * max(scale.size, 1)
    return QALoRA(base, jnp.asarray(a), jnp.asarray(b), scale, group_size=group, pooling=pooling, ranks=ranks)


class Official(torch.nn.Module):
    """The authors' layer: average pooling (times the group's size for a sum), lora_A, lora_B, the scale."""

    def __init__(self, w: torch.Tensor, times: float) -> None:
        super().__init__()
        self.w, self.times, self.pool = w, times, torch.nn.AvgPool1d(GROUP)
        self.lora_A = torch.nn.Linear(INPUTS // GROUP, RANK, bias=False)
        self.lora_B = torch.nn.Linear(RANK, OUTPUTS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w + self.lora_B(self.lora_A(self.pool(x) * self.times)) * (ALPHA / RANK)


def hf_peft(w: torch.Tensor) -> Any:
    """HF PEFT's layer for GPTQ bases, on a plain one."""
    base = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    base.weight = torch.nn.Parameter(w.T.contiguous(), requires_grad=False)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_qalora=True, qalora_group_size=GROUP)
    return GPTQLoraLinear(base, "default", config=config, r=RANK, lora_alpha=ALPHA)


@pytest.mark.parametrize("pooling", ["sum", "mean", "peft"])
def test_outputs_and_gradients_are_the_authors_own(pooling: str) -> None:
    w, a, b, x = normal(INPUTS, OUTPUTS), normal(INPUTS // GROUP, RANK), normal(RANK, OUTPUTS), normal(2, 5, INPUTS)
    leaf = adapter(quant.grouped(4, GROUP).quantise(jnp.asarray(w)), a, b, pooling)
    stored = torch.tensor(np.array(pj.materialise(leaf.base)))
    theirs = hf_peft(stored) if pooling == "peft" else Official(stored, GROUP if pooling == "sum" else 1)
    pair = (theirs.lora_A, theirs.lora_B)
    first, second = (m["default"] for m in pair) if pooling == "peft" else pair
    with torch.no_grad():
        first.weight.copy_(torch.tensor(a.T))
        second.weight.copy_(torch.tensor(b.T))
    given = torch.tensor(x, requires_grad=True)
    wanted = theirs(given)
    (wanted**2).sum().backward()

    def loss(leaf: Any, x: Any) -> Any:
        y = pj.linear(x, leaf)
        return (y**2).sum(), y

    trained, frozen = pj.partition(leaf)
    run = jax.value_and_grad(lambda t, x: loss(pj.combine(t, frozen), x), (0, 1), has_aux=True)
    (_, ours), (slope, back) = jax.jit(run)(trained, x)
    close(ours, wanted.detach().numpy(), rtol=1e-4, atol=1e-4)
    for mine, their in ((slope.a, first.weight.grad.T), (slope.b, second.weight.grad.T), (back, given.grad)):
        close(mine, their.numpy(), rtol=1e-3, atol=1e-3 * float(abs(their).max()))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_merge_is_the_authors_own_and_exact(bits: int) -> None:
    w, a, b = normal(3, INPUTS, OUTPUTS), normal(3, INPUTS // GROUP, RANK), normal(3, RANK, OUTPUTS)
    base, x = quant.grouped(bits, GROUP).quantise(jnp.asarray(w)), jnp.asarray(normal(4, INPUTS))
    leaves = {pooling: adapter(base, a, b, pooling) for pooling in ("sum", "mean", "peft")}
    merged = pj.merge(leaves)
    times = {"sum": 1.0, "mean": 1 / GROUP, "peft": INPUTS // GROUP / GROUP}
    for pooling, leaf in merged.items():
        assert isinstance(leaf, GroupedInt) and leaf.bits == bits
        assert same((leaf.codes, leaf.step), (base.codes, base.step)) and leaf.zero.dtype == jnp.float32
        # merge.py: qzeros -= (B A)ᵀ · scale / group_size / scales, here times what the pooling is over the mean
        qzeros, scales = (torch.tensor(np.array(x)) for x in (base.zero, base.step))
        product = (torch.tensor(b).mT @ torch.tensor(a).mT).mT
        close(leaf.zero, qzeros - product * (ALPHA / RANK) * times[pooling] / scales, rtol=1e-5, atol=1e-4)
        close(pj.materialise(leaf), pj.materialise(leaves[pooling]), rtol=1e-5, atol=1e-5)

    @jax.jit
    def outputs(tree: Any) -> Any:
        return {pooling: jax.vmap(lambda w: pj.linear(x, w))(leaf) for pooling, leaf in tree.items()}

    close(outputs(merged), outputs(leaves), rtol=1e-5, atol=2e-5 * float(abs(outputs(leaves)["peft"]).max()))


def test_a_merged_model_is_integers_without_an_adapter() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    params, adapted = pj.chain(INT4, methods.qalora(2, 4, r"(q|down)_proj", group_size=16))(zoo.KEY, base, forward)
    noisy = zoo.disturbed(params)
    merged, stored = pj.merge(noisy), pj.strip(params)
    assert jax.tree.structure(merged) == jax.tree.structure(stored)
    found = trees.weights(merged)
    assert len(found) == 3 and all(isinstance(w, GroupedInt) for w in found)
    changed = [path for path, w in trees.leaves(merged).items() if not same(w, trees.leaves(stored)[path])]
    assert [path[-2] for path in changed] == ["down_proj", "q_proj"]  # the others are the base's own
    run = jax.jit(forward)
    wanted = jax.jit(adapted)(noisy, zoo.TOKENS)
    close(run(merged, zoo.TOKENS), wanted, atol=1e-4)
    assert differs(run(stored, zoo.TOKENS), wanted)
    assert pj.count(merged).bytes == pj.count(stored).bytes


def test_zero_points_stay_exact_under_short_steps_and_dead_groups() -> None:
    w, a, b = normal(INPUTS, OUTPUTS), normal(INPUTS // GROUP, RANK), normal(RANK, OUTPUTS)
    w[:GROUP] = 0
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        base = quant.grouped(4, GROUP, dtype).quantise(jnp.asarray(w))
        # Files can hold a step of 0, which a division must survive.
        for step in (base.step, base.step.at[0].set(0)):
            leaf = adapter(dataclasses.replace(base, step=step), a, b, "sum")
            merged = pj.merge(leaf)
            assert merged.zero.dtype == jnp.float32 and merged.step.dtype == dtype
            close(pj.materialise(merged), pj.materialise(leaf), rtol=1e-5, atol=1e-5)


def test_wider_groups_and_other_bases() -> None:
    w, b = normal(INPUTS, OUTPUTS), normal(RANK, OUTPUTS)
    x, a = normal(4, INPUTS), normal(INPUTS // 16, RANK)
    fine = quant.grouped(4, GROUP).quantise(jnp.asarray(w))
    leaf = adapter(fine, a, b, "mean", group=16)
    merged = pj.merge(leaf)
    assert isinstance(merged, GroupedInt)
    close(pj.materialise(merged), pj.materialise(leaf), rtol=1e-5, atol=1e-5)
    # Two adapters on one base; and on a base without zero points, a plain array.
    twice = adapter(leaf, normal(INPUTS // GROUP, RANK), b, "sum")
    assert isinstance(pj.merge(twice), GroupedInt)
    close(pj.materialise(pj.merge(twice)), pj.materialise(twice), rtol=1e-5, atol=1e-5)
    for base in (jnp.asarray(w), quant.nf4(16).quantise(jnp.asarray(w)), quant.int8().quantise(jnp.asarray(w))):
        other = adapter(base, a, b, "peft", group=16)
        close(pj.merge(other), pj.materialise(other))
        close(pj.linear(jnp.asarray(x), other), x @ pj.materialise(other), rtol=1e-4, atol=1e-4)


def test_it_starts_as_xavier_has_it() -> None:
    params, _ = methods.qalora(64, group_size=1, select="down_proj")(zoo.KEY, zoo.base("llama"), zoo.build("llama"))
    leaf = trees.leaves(params)["model", "layers", "mlp", "down_proj", "kernel"]
    weight = torch.nn.init.xavier_uniform_(torch.empty(64, zoo.HIDDEN), generator=torch.Generator().manual_seed(0))
    assert not leaf.b.any() and leaf.a.shape == (zoo.LAYERS, zoo.HIDDEN, 64)
    assert float(abs(leaf.a).max()) == pytest.approx(float(abs(weight).max()), rel=0.01)
    assert float(leaf.a.std()) == pytest.approx(float(weight.std()), rel=0.03)


def test_life_among_other_methods() -> None:
    """Either order is one tree; beside LoRA and a prefix it trains; merged, the prefix stays and the integers too."""
    base, forward = zoo.base("llama"), zoo.build("llama")
    qalora = methods.qalora(2, 4, "q_proj", group_size=16, dropout=0.1)
    there, back = (pj.chain(*pair)(zoo.KEY, base, forward)[0] for pair in ((INT4, qalora), (qalora, INT4)))
    assert same(there, back)
    method = pj.chain(INT4, qalora, methods.lora(2, 4, r"(v|o)_proj"), methods.prefix_tuning(3, hidden=8))
    params, adapted = method(zoo.KEY, base, forward)
    trained, losses = three_steps(params, adapted, optax.adam(1e-2), zoo.BATCH)
    assert losses[2] < losses[1] < losses[0]
    trained = methods.bake(trained)
    inner = {key: entry for key, entry in trained.items() if key != "ports"}
    merged = pj.merge(inner) | {"ports": trained["ports"]}
    attention = merged["model"]["layers"]["self_attn"]
    assert isinstance(attention["q_proj"]["kernel"], GroupedInt)
    assert isinstance(attention["o_proj"]["kernel"], jax.Array)
    run = jax.jit(adapted)
    close(run(merged, zoo.TOKENS), run(trained, zoo.TOKENS), atol=1e-4)


def test_errors_name_what_is_wrong() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    with pytest.raises(ValueError, match=r"down_proj/kernel: 48 inputs are not a whole number of groups of 32"):
        methods.qalora(2)(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match=r"q_proj/kernel: the base has groups of 16 .* adapter groups of 8.* of 16 as"):
        pj.chain(INT4, methods.qalora(2, select="q_proj", group_size=8))(zoo.KEY, base, forward)
    later, _ = pj.chain(methods.qalora(2, select="q_proj", group_size=8), INT4)(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match=r"q_proj/kernel: the base has groups of 16 inputs and the adapter groups of"):
        pj.merge(later)
    for wrong, message in (
        ({"pooling": "max"}, "pooling is 'max': choose 'sum', 'mean' or 'peft'"),
        ({"group_size": 0}, "group_size is 0: give the number of inputs a group"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"dropout": 1.0}, "dropout must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.qalora(2, **wrong)
    with pytest.raises(ValueError, match="'embed' matches none"):
        methods.qalora(2, select="embed")(zoo.KEY, base, forward)
