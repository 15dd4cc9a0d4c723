"""The Llama family against transformers in torch; what attention asks of a GPU; bad input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers as tf
from checks import close
from oracles.parity import check_gradients, check_logits, compiled, tokens_for
from oracles.torch_models import pair

from peft_jax import Inputs, Ports, attention
from peft_jax.attention import Visible
from peft_jax.layers import refuse_unknown_ports
from peft_jax.models import llama

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 2}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CONFIGS = {
    "llama 2": tf.LlamaConfig(**SHAPE),
    "llama 3": tf.LlamaConfig(**SHAPE, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "linear": tf.LlamaConfig(**SHAPE | {"num_key_value_heads": 4}, rope_parameters=LINEAR, hidden_act="gelu"),
    "yarn": tf.LlamaConfig(**SHAPE, head_dim=16, rope_parameters=YARN),
    "smollm": tf.LlamaConfig(**SHAPE | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "mistral": tf.MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": tf.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": tf.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_torch(name: str) -> None:
    check_logits(CONFIGS[name])


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_gradients_equal_torch(name: str) -> None:
    check_gradients(CONFIGS[name], variants=name == "qwen2")


def test_half_precision_inside_full_precision_logits() -> None:
    """fp32 weights and a bf16 compute dtype: features and cache in bf16, logits in fp32, near the exact ones."""
    config = CONFIGS["llama 3"]
    _, params, exact = pair(config)
    forward = llama.build(config, compute_dtype="bfloat16")
    tokens = tokens_for(config)
    features = jax.eval_shape(forward.features, params, Inputs(tokens), Ports())
    assert features.dtype == jnp.bfloat16
    cache = forward.spec.cache(3, 12, jnp.bfloat16)
    logits, cache = compiled(forward)(params, Inputs(tokens, cache=cache))
    assert logits.dtype == jnp.float32 and cache.keys.dtype == jnp.bfloat16
    error = np.abs(logits - compiled(exact)(params, tokens))
    assert 1e-4 < error.mean() < 0.05


class Recorder:
    """Stands in for `jax.nn.dot_product_attention` and for plain attention on a machine without a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax.nn, "dot_product_attention", self)
        monkeypatch.setattr(attention, "plain_attention", lambda *given: self(*given[:3], implementation="plain"))

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
        self.calls.append(options)
        return query

    def of(self, config: Any, inputs: Inputs, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
        """What the layers of a model, traced, ask for."""
        forward = llama.build(config, compute_dtype=dtype)
        params = jax.eval_shape(lambda key: llama.init(key, config), jax.random.key(0))
        self.calls.clear()
        jax.eval_shape(forward, params, inputs)
        assert all(call.keys() == self.calls[0].keys() for call in self.calls)
        return self.calls[0]


def test_attention_goes_through_cudnn_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    tokens, mask = np.zeros((2, 8), np.int32), np.arange(8)[None] >= np.array([[0], [3]])
    segments = np.repeat(np.array([[1, 1, 1, 2, 2, 2, 0, 0]], np.int32), 2, 0)
    plain = recorder.of(CONFIGS["llama 2"], Inputs(tokens))
    assert (plain["implementation"], plain["is_causal"], plain["local_window_size"]) == ("cudnn", True, None)
    assert "mask" not in plain
    window = recorder.of(CONFIGS["mistral"], Inputs(tokens))
    assert (window["implementation"], window["local_window_size"]) == ("cudnn", (3, 0))
    for inputs in (Inputs(tokens, mask=mask), Inputs(tokens, segments=segments)):
        dense = recorder.of(CONFIGS["llama 2"], inputs)
        assert dense["implementation"] == "cudnn" and dense["mask"].shape == (2, 1, 8, 8)

    # What cuDNN refuses: fp32, odd lengths under a mask, heads that are no multiple of 8.
    assert recorder.of(CONFIGS["llama 2"], Inputs(tokens), jnp.float32)["implementation"] == "plain"
    odd = Inputs(tokens[:, :7], mask=mask[:, :7])
    assert recorder.of(CONFIGS["llama 2"], odd)["implementation"] == "plain"
    assert recorder.of(CONFIGS["llama 2"], Inputs(tokens[:, :7]))["implementation"] == "cudnn"
    narrow = tf.LlamaConfig(**SHAPE, head_dim=12)
    assert recorder.of(narrow, Inputs(tokens))["implementation"] == "plain"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_attention_equals_jax(dtype: Any) -> None:
    """Grouped heads; causal, in a window, padded (with rows that see nothing), packed, and over a longer cache."""
    draw = lambda *shape: jnp.asarray(np.random.RandomState(len(shape)).standard_normal(shape), dtype)  # noqa: E731
    query, key, value = draw(2, 6, 4, 8), draw(2, 9, 2, 8) / 2, draw(2, 9, 2, 8)[::-1]
    order, segments = jnp.arange(9)[None], jnp.array([[0, 0, 1, 1, 1, 2, 2, 2, 0], [1] * 9])
    for visible in (
        Visible(order[:, 3:], order),
        Visible(order[:, 3:], order, window=3),
        Visible(order[:, :6], order, segments[:, :6], segments),
        Visible(order[:, :6], order, segments[:, :6], segments, causal=False),
    ):

        def theirs(q: Any, k: Any, v: Any, visible: Any = visible) -> Any:
            return jax.nn.dot_product_attention(q, k, v, mask=visible.mask(), scale=0.3, implementation="xla")

        def ours(q: Any, k: Any, v: Any, visible: Any = visible) -> Any:
            return attention.plain_attention(q, k, v, visible, 0.3)

        single = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
        mine, my_pull = jax.vjp(ours, query, key, value)
        wanted, their_pull = jax.vjp(theirs, *single((query, key, value)))
        assert mine.dtype == dtype
        seen = visible.mask().any(-1)[:, 0, :, None, None]  # what a query that sees nothing gives is nobody's
        weight = jnp.where(seen, mine, jnp.zeros((), dtype))
        bound = 1e-5 if dtype == jnp.float32 else 0.03
        close(single(weight), jnp.where(seen, wanted, 0), rtol=bound, atol=bound)
        close(single(my_pull(weight)), their_pull(single(weight)), rtol=bound, atol=bound)


def test_lowers_for_cuda() -> None:
    config = CONFIGS["qwen2"]
    params = jax.eval_shape(lambda key: llama.init(key, config), jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda params, tokens: llama.build(config)(params, tokens).sum()))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    assert "stablehlo.dot_general" in gradient.trace(params, tokens).lower(lowering_platforms=("cuda",)).as_text()


def test_bad_input_is_refused() -> None:
    config = CONFIGS["llama 2"]
    params, forward = jax.eval_shape(lambda key: llama.init(key, config), jax.random.key(0)), llama.build(config)
    with pytest.raises(ValueError, match="33 tokens and the model has 32 positions"):
        forward(params, np.zeros((1, 33), np.int32))
    with pytest.raises(ValueError, match="token id 48 is outside the vocabulary of 48"):
        forward(params, np.array([[0, 48]], np.int32))
    with pytest.raises(ValueError, match="llama has no port 'prompt': it takes attend"):
        refuse_unknown_ports(Ports(prompt=jnp.zeros((2, 32))), frozenset({"attend"}), "llama")
    with pytest.raises(ValueError, match="remat is 'some': choose 'full', 'dots' or 'none'"):
        llama.build(config, remat="some")
    with pytest.raises(ValueError, match="activation 'mish' is not supported: choose one of gelu"):
        llama.build(tf.LlamaConfig(**SHAPE, hidden_act="mish"))
