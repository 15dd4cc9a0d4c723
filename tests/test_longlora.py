"""Shifted sparse attention beside a literal reference, and what a training call makes of it."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
import zoo
from checks import close, differs

import peft_jax as pj
from peft_jax import methods
from peft_jax.attention import CHUNK, Visible, chunked_attention, plain_attention
from peft_jax.methods.longlora import ShiftedAttention
from peft_jax.models import llama
from peft_jax.training import init_state, make_step

pytestmark = pytest.mark.usefixtures("quick_compiles")
KEY = jax.random.key(0)


def pieces(time: int, group: int, shifted: bool, wrap: bool) -> list[list[int]]:
    """The tokens of each group, in the order in which it has them."""
    order, half = list(range(time)), group // 2
    if not shifted:
        borders = [*range(0, time, group), time]
    elif wrap:
        order = order[half:] + order[:half]
        borders = [*range(0, time, group), time]
    else:
        borders = [0, *range(half, time, group), time]
    return [order[a:b] for a, b in itertools.pairwise(borders)]


def reference(q: Any, k: Any, v: Any, group: int, wrap: bool, segments: Any = None, window: Any = None) -> Any:
    """Every pair that may meet, written out; softmax over those."""
    batch, time, heads, dim = q.shape
    sees = np.zeros((batch, heads, time, time), bool)
    for head in range(heads):
        for piece in pieces(time, group, head >= heads // 2, wrap):
            for a, i in enumerate(piece):
                for b, j in enumerate(piece[: a + 1]):
                    near = window is None or a - b < window
                    one = np.ones(batch, bool) if segments is None else segments[:, i] == segments[:, j]
                    sees[:, head, i, j] = near & one
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(sees, jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(dim), -1e30)
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores, -1), v)


def draw(seed: int, batch: int, time: int, heads: int, kv_heads: int, dim: int = 4) -> list[jax.Array]:
    random = np.random.RandomState(seed)
    return [
        jnp.asarray(random.standard_normal((batch, time, n, dim)), jnp.float32) for n in (heads, kv_heads, kv_heads)
    ]


def sight(time: int, segments: Any = None, window: Any = None) -> Visible:
    order = jnp.arange(time, dtype=jnp.int32)[None]
    return Visible(order, order, segments, segments, window, plain=segments is None)


CASES = [  # batch, time, heads, kv_heads, group, rows of unequal length, window
    (1, 16, 4, 4, 4, False, None),
    (2, 13, 4, 2, 4, False, None),
    (2, 11, 9, 3, 5, True, None),  # half of the heads ends between two that share a key head
    (3, 17, 6, 1, 6, True, 3),
    (2, 7, 2, 2, 1, False, None),
    (2, 9, 3, 3, 8, True, None),
]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_reference_s(case: tuple[Any, ...], wrap: bool) -> None:
    batch, time, heads, kv_heads, group, uneven, window = case
    q, k, v = draw(time, batch, time, heads, kv_heads)
    segments, real = None, np.ones((batch, time, 1, 1), np.float32)
    if uneven:  # two packed texts, then padding: another length a row
        ends = time - 2 - np.arange(batch)[:, None]
        segments = np.where(np.arange(time) < ends, 1 + (np.arange(time) >= ends // 2), 0).astype(np.int32)
        real = (segments != 0)[:, :, None, None].astype(np.float32)
    weights = real * np.random.RandomState(1).standard_normal(q.shape).astype(np.float32)
    attend, visible = ShiftedAttention(group, wrap), sight(time, segments, window)

    def ours(q: Any, k: Any, v: Any) -> Any:
        y = attend(q, k, v, visible, 0.5)
        return jnp.sum(y * weights), y

    def theirs(q: Any, k: Any, v: Any) -> Any:
        y = reference(q, k, v, group, wrap, segments, window)
        return jnp.sum(y * weights), y

    (_, y), gradient = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(q, k, v)
    (_, wanted), slope = jax.jit(jax.value_and_grad(theirs, (0, 1, 2), has_aux=True))(q, k, v)
    close(y * real, wanted * real)
    close(gradient, slope)


def test_wrapped_groups_are_algorithm_1() -> None:
    q, k, v = (np.asarray(x) for x in draw(3, 2, 16, 4, 4))
    batch, time, heads, dim, group = *q.shape, 4
    qkv = np.stack([q, k, v], 2)
    qkv[:, :, :, heads // 2 :] = np.roll(qkv[:, :, :, heads // 2 :], -group // 2, axis=1)
    gq, gk, gv = np.moveaxis(qkv.reshape(batch * time // group, group, 3, heads, dim), 2, 0)
    scores = np.einsum("bihd,bjhd->bhij", gq, gk) / np.sqrt(dim)
    shares = np.exp(np.where(np.tril(np.ones((group, group), bool)), scores, -np.inf))
    y = np.einsum("bhij,bjhd->bihd", shares / shares.sum(-1, keepdims=True), gv).reshape(q.shape)
    y[:, :, heads // 2 :] = np.roll(y[:, :, heads // 2 :], group // 2, axis=1)
    close(ShiftedAttention(1 / 4, wrap=True)(*map(jnp.asarray, (q, k, v)), sight(time), dim**-0.5), y)


@pytest.mark.parametrize("group", [1.0, 12, 40])
def test_a_group_that_spans_the_text_is_full_attention(group: Any) -> None:
    q, k, v = draw(4, 2, 12, 4, 2)
    for wrap in (False, True):
        y = ShiftedAttention(group, wrap)(q, k, v, sight(12), 0.5)
        assert (y == plain_attention(q, k, v, sight(12), 0.5)).all()


def test_shares_of_a_text_are_rounded_up() -> None:
    assert [ShiftedAttention(1 / 4).size(n) for n in (1, 4, 13, 16, 4096)] == [1, 1, 4, 4, 1024]
    assert [ShiftedAttention(1 / 3).size(n) for n in (9, 10)] == [3, 4]
    assert ShiftedAttention(0.1).size(30) == 3 and ShiftedAttention(5).size(100) == 5


def test_short_attention_is_that_of_the_heads_that_stay() -> None:
    q, k, v = draw(5, 1, 12, 4, 4)
    short = ShiftedAttention(3, shift=False)(q, k, v, sight(12), 0.5)
    close(short, reference(*(jnp.concatenate([x, x], 2) for x in (q, k, v)), 3, False)[:, :, :4])


def test_a_row_of_padding_has_a_gradient_of_nothing() -> None:
    q, k, v = draw(7, 2, 10, 4, 2)
    segments = (np.arange(10) < np.array([[0], [7]])).astype(np.int32)
    real = segments[:, :, None, None].astype(np.float32)
    loss = lambda q, k, v: jnp.sum(ShiftedAttention(4)(q, k, v, sight(10, segments), 0.5) * real)  # noqa: E731
    for slope in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert (slope[0] == 0).all() and jnp.isfinite(slope).all() and differs(slope[1], 0 * slope[1])


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["causal", "packed", "window", "prefix", "both ways", "cap"])
def test_chunked_attention_is_full_attention(case: str) -> None:
    """Outputs and gradients, of a text longer than two chunks and no multiple of them."""
    time, before = 2 * CHUNK + 44, 30 if case == "prefix" else 0
    q, k, v = draw(6, 2, time + before, 4, 2)
    q, visible = q[:, before:], sight(time)
    real = np.ones((2, time), bool)
    if case == "packed":  # the second row has padding on both sides of its two segments
        segments = np.repeat([[1, 2, 3, 3], [0, 4, 5, 0]], [CHUNK + 5, 7, CHUNK, 32], axis=1).astype(np.int32)
        visible, real = sight(time, segments), segments != 0
    if case == "prefix":  # keys before every query, of which the second row has none
        keys = np.concatenate([np.array([[1], [0]]).repeat(before, 1), real], 1).astype(np.int32)
        order = jnp.arange(time + before, dtype=jnp.int32)[None]
        visible = Visible(order[:, before:], order, jnp.asarray(real, jnp.int32), jnp.asarray(keys))
    if case == "both ways":
        visible = dataclasses.replace(visible, causal=False)
    if case == "cap":
        visible = dataclasses.replace(visible, cap=0.7)
    weights = real[:, :, None, None] * np.random.RandomState(1).standard_normal(q.shape).astype(np.float32)

    def run(attend: Any, q: Any, k: Any, v: Any, window: Any) -> Any:
        seen = dataclasses.replace(visible, window=window if case == "window" else None)
        y = attend(q, k, v, seen, 0.5) * weights.astype(q.dtype)
        return jnp.sum(y.astype(jnp.float32)), y

    both = [
        jax.jit(jax.value_and_grad(functools.partial(run, a), (0, 1, 2), has_aux=True))
        for a in (chunked_attention, plain_attention)
    ]
    found, wanted = (f(q, k, v, jnp.int32(100)) for f in both)
    close(found, wanted, atol=1e-4)
    if case == "causal":
        half = [f(*(x.astype(jnp.bfloat16) for x in (q, k, v)), jnp.int32(0))[1] for f in both]
        assert all(x.dtype == jnp.bfloat16 for x in half[0])
        close(*([x.astype(jnp.float32) for x in each] for each in half), atol=0.1)


def test_chunks_that_nobody_sees_are_not_computed() -> None:
    """A value that is no number stays where it is seen, and a query that sees nothing gives zeros."""
    time = 3 * CHUNK
    q, k, v = draw(9, 1, time, 2, 1)
    v = v.at[:, 2 * CHUNK - 1].set(jnp.nan)
    segments = (np.arange(time) >= 5).astype(np.int32)[None]
    y = chunked_attention(q, k, v, sight(time, segments), 0.5)
    assert (y[:, :5] == 0).all() and jnp.isfinite(y[:, :CHUNK]).all() and jnp.isnan(y[:, CHUNK:]).all()
    y = chunked_attention(q, k, v, sight(time, window=1), 0.5)
    assert jnp.isfinite(y[:, :CHUNK]).all() and jnp.isfinite(y[:, 2 * CHUNK :]).all()


def test_memory_grows_with_the_text_not_with_its_square() -> None:
    def temporary(attend: Any, time: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, time, n, 8), jnp.float32) for n in (4, 2, 2)]
        loss = lambda q, k, v: jnp.sum(attend(q, k, v, sight(time), 0.5) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    for attend in (ShiftedAttention(1 / 4), ShiftedAttention(256), ShiftedAttention(1 / 4, wrap=True)):
        assert temporary(attend, 4096) < 2.5 * temporary(attend, 2048)
    assert temporary(plain_attention, 4096) > 3.5 * temporary(plain_attention, 2048)
    assert temporary(ShiftedAttention(1 / 4), 4096) < temporary(plain_attention, 4096) / 8


def test_a_model_s_memory_grows_with_the_text_too() -> None:
    sizes = {**zoo.SIZES, "num_hidden_layers": 1, "max_position_embeddings": 4096}
    config = transformers.LlamaConfig(**sizes)
    base = jax.eval_shape(lambda: llama.init(KEY, config))

    def temporary(time: int) -> int:
        forward = methods.shift_attention().wrap(llama.build(config))
        tokens = jax.ShapeDtypeStruct((1, time), jnp.int32)
        loss = lambda p, tokens: jnp.sum(forward(p, tokens, pj.Ports(micro_key=KEY)) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(base, tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.2 * temporary(2048)


def test_a_gpu_is_asked_for_causal_groups_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(query: Any, key: Any, value: Any, **options: Any) -> Any:
        asked.append((query.shape[:3], key.shape[2], options))
        return query

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(0, 2, 1200, 8, 4, 8))
    ShiftedAttention(400)(q, k, v, sight(1200), 0.5)
    assert [(shape, kv_heads) for shape, kv_heads, _ in asked] == [
        ((6, 400, 4), 2),
        ((2, 200, 4), 2),
        ((4, 400, 4), 2),
        ((2, 200, 4), 2),
    ]
    assert all(o["is_causal"] and o["implementation"] == "cudnn" and "mask" not in o for _, _, o in asked)
    asked.clear()
    segments = (np.arange(1200) < np.array([[700], [1200]])).astype(np.int32)
    ShiftedAttention(400)(q, k, v, sight(1200, segments), 0.5)  # padded rows need a mask: each group its own
    assert [options["mask"].shape for _, _, options in asked] == [
        (rows, 1, length, length) for rows, length in ((6, 400), (2, 200), (4, 400), (2, 200))
    ]


# -- in a model -------------------------------------------------------------------------------------------------------


def trained(method: pj.Method, family: str = "llama") -> tuple[Any, Any]:
    """Disturbed params, and the jitted forward function of a training call."""
    params, forward = method(KEY, zoo.base(family), zoo.build(family))
    run = jax.jit(lambda params, inputs: forward(params, inputs, pj.Ports(micro_key=KEY)))
    return zoo.disturbed(params), run


def test_no_output_depends_on_a_later_token() -> None:
    params, run = trained(methods.longlora(4, group=4))
    wrapped_params, wrapped = trained(methods.longlora(4, group=4, wrap=True))
    before, leaky = run(params, zoo.TOKENS), wrapped(wrapped_params, zoo.TOKENS)
    for place in range(zoo.TOKENS.shape[1]):
        other = zoo.TOKENS.copy()
        other[:, place] = (other[:, place] + 1) % zoo.VOCAB
        after = run(params, other)
        assert (after[:, :place] == before[:, :place]).all()
        assert differs(after[:, place], before[:, place])
    # The published plain path: the last token is in the shifted heads' group of the first.
    assert differs(wrapped(wrapped_params, other)[:, :2], leaky[:, :2])


def test_padding_changes_nothing() -> None:
    params, run = trained(methods.shift_attention(group=4))
    tokens = zoo.TOKENS[:2]
    longer = np.pad(tokens, ((0, 0), (0, 5)), constant_values=7)
    longer[0, 9:] = 3
    mask = np.arange(17) < np.array([[9], [12]])
    padded = run(params, pj.Inputs(jnp.asarray(longer), jnp.asarray(mask)))
    close(padded[1, :12], run(params, tokens)[1])
    close(padded[0, :9], run(params, tokens[:, :9])[0])
    assert np.isfinite(np.asarray(padded)).all()
    assert np.isfinite(np.asarray(run(params, pj.Inputs(jnp.asarray(longer), jnp.zeros((2, 17), bool))))).all()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_training_calls_are_shifted_and_others_are_full(family: str) -> None:
    params, forward = methods.shift_attention()(KEY, zoo.base(family), zoo.build(family))
    model = zoo.build(family)
    both = jax.jit(lambda ports: (forward(params, zoo.TOKENS, ports), model(params, zoo.TOKENS, ports)))
    shifted, full = both(pj.Ports(micro_key=KEY))
    assert differs(shifted, full)
    given = jax.jit(lambda: model(params, zoo.TOKENS, pj.Ports(attend=ShiftedAttention(3))))()
    close(shifted, given)
    assert np.array_equal(*both(pj.Ports(step_key=KEY)))


def test_a_training_step_s_loss_is_that_of_shifted_attention() -> None:
    params, forward = methods.longlora(4)(KEY, zoo.base("llama"), zoo.build("llama"))
    tx = pj.freeze(zoo.optax.adam(1e-3), params)
    _, metrics = make_step(forward, tx)(*init_state(params, tx, KEY), zoo.BATCH)
    losses = []
    for ports in (pj.Ports(attend=ShiftedAttention(1 / 4)), pj.Ports()):
        logits = zoo.build("llama")(zoo.base("llama"), zoo.TOKENS, ports)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(zoo.BATCH["targets"])[..., None], -1)
        losses.append(-float(chosen.mean()))
    assert float(metrics["loss"]) == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_an_attention_function_of_the_call_s_own_acts_inside_the_groups() -> None:
    params, forward = methods.shift_attention(3)(KEY, zoo.base("llama"), zoo.build("llama"))
    lengths = []

    def noting(query: Any, *rest: Any) -> Any:
        lengths.append(query.shape[1])
        return plain_attention(query, *rest)

    jax.eval_shape(lambda: forward(params, zoo.TOKENS, pj.Ports(micro_key=KEY, attend=noting)))
    assert set(lengths) == {1, 2, 3}  # 12 = 4 · 3 = 1 + 3 · 3 + 2


@pytest.mark.parametrize("group", [0, -2, 1.5, 0.0, True])
def test_a_group_out_of_range(group: Any) -> None:
    with pytest.raises(ValueError, match=f"group is {group}: give a share"):
        methods.shift_attention(group)


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("bert", methods.shift_attention(), "for causal models without a bias"),
        ("t5", methods.shift_attention(), "this is an encoder-decoder model"),
        ("gpt2", pj.chain(methods.p_tuning_v2(3), methods.shift_attention()), "does not go with prefix tuning"),
        ("llama", pj.chain(methods.shift_attention(), methods.shift_attention()), "chain shift_attention or longlora"),
    ],
)
def test_what_it_does_not_go_with(family: str, method: pj.Method, words: str) -> None:
    def call() -> Any:
        params, forward = method(KEY, zoo.base(family), zoo.build(family))
        return forward(params, zoo.inputs(family), pj.Ports(micro_key=KEY))

    with pytest.raises(ValueError, match=words):
        jax.eval_shape(call)


def test_one_head_has_no_half() -> None:
    with pytest.raises(ValueError, match="one attention head"):
        ShiftedAttention(2)(*draw(0, 1, 6, 1, 1), sight(6), 0.5)


def test_without_the_port() -> None:
    forward = pj.Forward(lambda params, inputs, ports: params["x"])
    with pytest.raises(ValueError, match="no port 'attend'"):
        methods.shift_attention()(KEY, {"x": jnp.ones(2)}, forward)
