"""Generated tokens against transformers' own generate; sampling against its logits processors; text and chats."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from oracles.parity import compiled
from oracles.torch_models import pair, torch_logits

from peft_jax import Forward, Inputs, sampling
from peft_jax.methods import lora
from peft_jax.models import decoding, generate, generate_tokens, gpt2

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCAB = len(SPECIAL) + len(LETTERS) + 1  # letters and the space
NEW, PAD = 10, 1
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def tokenizer() -> Any:
    """One token a character."""
    vocabulary = {text: i for i, text in enumerate([*SPECIAL, *LETTERS, " "])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", chat_template=CHAT)


@pytest.fixture(scope="module")
def model() -> tuple[torch.nn.Module, Any, Forward]:
    """A model whose next token is neither certain nor the last one again."""
    config = tf.LlamaConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=48,
        bos_token_id=1,
        eos_token_id=2,
    )
    return pair(config, seed=3)


@pytest.fixture(scope="module")
def prompts() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(3, VOCAB, (5, 7)).astype(np.int32)
    mask = np.arange(7)[None] >= np.array([0, 3, 6, 0, 1])[:, None]
    return tokens, mask


def theirs(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray, ends: list[int], **options: Any) -> np.ndarray:
    """transformers' new tokens, with PAD behind the end."""
    with torch.no_grad():
        found = model.generate(
            torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=PAD,
            **options,
        ).numpy()[:, tokens.shape[1] :]
    return np.pad(found, [(0, 0), (0, NEW - found.shape[1])], constant_values=PAD)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 4, "length_penalty": -1.0},
        {"num_beams": 4, "length_penalty": 0.0},
    ],
    ids=str,
)
def test_tokens_equal_transformers(model: Any, prompts: Any, options: dict[str, Any]) -> None:
    torch_model, params, forward = model
    tokens, mask = prompts
    greedy = theirs(torch_model, tokens, mask, [])
    ends = [int(greedy[0, 2]), int(greedy[1, 5])]  # so that some rows end early
    expected = theirs(torch_model, tokens, mask, ends, **options)
    ours = dict(options)
    found = generate_tokens(
        forward, params, tokens, mask, max_new_tokens=NEW, eos_id=ends, pad_id=PAD, beams=ours.pop("num_beams"), **ours
    )
    np.testing.assert_array_equal(found, expected)
    lengths = (expected != PAD).sum(1)
    assert lengths.min() < NEW and len(set(lengths)) > 1


def test_tokens_without_an_end(model: Any, prompts: Any) -> None:
    torch_model, params, forward = model
    found = generate_tokens(forward, params, *prompts, max_new_tokens=NEW)
    np.testing.assert_array_equal(found, theirs(torch_model, *prompts, []))
    one = generate_tokens(forward, params, *prompts, max_new_tokens=1)
    np.testing.assert_array_equal(one, found[:, :1])


def test_restrict_equals_transformers_processors() -> None:
    restrict = compiled(sampling.restrict)
    logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32) * 3
    for temperature, k, p in [
        (0.7, 5, None),
        (1.3, None, 0.8),
        (0.5, 7, 0.6),
        (1.0, 500, 1.0),
        (1.0, 1, 0.9),
        (2.0, None, 0.05),
    ]:
        processors = [tf.TemperatureLogitsWarper(temperature)]
        processors += [] if k is None else [tf.TopKLogitsWarper(k)]
        processors += [] if p is None else [tf.TopPLogitsWarper(p)]
        expected = tf.LogitsProcessorList(processors)(None, torch.tensor(logits)).numpy()
        found = np.asarray(restrict(jnp.asarray(logits), temperature, k, p))
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    tied = jnp.array([[1.0, 0.0, 1.0, 0.0, 0.0]])
    assert np.isfinite(sampling.restrict(tied, 1.0, None, 0.9)).all(), "equals at the border stay together"


def test_sampling_draws_from_the_restricted_distribution(model: Any, prompts: Any) -> None:
    torch_model, params, forward = model
    rows = 4000
    tokens = np.repeat(prompts[0][:1], rows, 0)
    draw = {"max_new_tokens": 1, "temperature": 0.8, "top_k": 12, "top_p": 0.9}
    drawn = np.asarray(generate_tokens(forward, params, tokens, key=jax.random.key(5), **draw))[:, 0]
    logits = jnp.asarray(torch_logits(torch_model, tokens[:1])[:, -1])
    expected = np.asarray(jax.nn.softmax(sampling.restrict(logits, 0.8, 12, 0.9)))[0]
    assert 3 <= (expected > 0).sum() <= 12
    spread = np.sqrt(expected * (1 - expected) / rows)
    assert (abs(np.bincount(drawn, minlength=VOCAB) / rows - expected) <= 4 * spread).all()


def test_seeds_are_reproducible_and_rows_independent(model: Any, prompts: Any) -> None:
    _, params, forward = model
    tokens, mask = prompts
    draw = {"max_new_tokens": NEW, "temperature": 1.0}

    def run(seed: int, rows: int = 5) -> np.ndarray:
        key = jax.random.key(seed)
        return np.asarray(generate_tokens(forward, params, tokens[:rows], mask[:rows], key=key, **draw))

    first = run(0)
    np.testing.assert_array_equal(first, run(0))
    np.testing.assert_array_equal(first[:2], run(0, 2))
    assert (first != run(1)).mean() > 0.5
    assert len({tuple(row) for row in np.diff(first, axis=1).tolist()}) == 5


def test_nothing_recompiles(model: Any) -> None:
    """New prompts of the bucket, other options of the draw, other adapter weights: the same compiled program."""
    _, params, forward = model
    params, forward = lora(rank=2, alpha=4, select="q_proj|v_proj")(jax.random.key(0), params, forward)
    moved = jax.tree.map(lambda x: x + 0.5 if x.ndim == 3 and 2 in x.shape[-2:] else x, params)
    tok, base = tokenizer(), decoding.write._cache_size()
    texts = []
    for prompt, seed, temperature, k, p, tree in [
        ("hello", 0, 0.5, 5, 0.9, params),
        ("is anyone", 0, 0.5, 5, 0.9, params),
        ("hello", 1, 1.5, 9, 0.5, params),
        ("hello", 0, 0.5, 5, 0.9, moved),
    ]:
        options = {"temperature": temperature, "top_k": k, "top_p": p, "key": jax.random.key(seed)}
        texts.append(generate(forward, tree, tok, prompt, max_new_tokens=8, **options))
    assert decoding.write._cache_size() == base + 1
    assert len(set(texts)) == 4
    base = decoding.search._cache_size()
    for penalty in (1.0, 2.0):
        generate_tokens(forward, params, np.full((1, 4), 5), max_new_tokens=4, beams=2, length_penalty=penalty)
    assert decoding.search._cache_size() == base + 1


def test_prefill_computes_one_position_of_logits(model: Any) -> None:
    _, params, forward = model
    tokens, mask = np.full((2, 16), 5, np.int32), np.ones((2, 16), bool)
    ends, pad = jnp.zeros((0,), jnp.int32), jnp.int32(0)
    trace = jax.make_jaxpr(
        lambda params: decoding.write(forward, params, Inputs(tokens, mask=mask), ends, pad, gpt2.Ports(), 4, None)
    )
    program = str(trace(params))
    assert f"f32[2,1,{VOCAB}]" in program and f"f32[2,16,{VOCAB}]" not in program


def test_text(model: Any) -> None:
    torch_model, params, forward = model
    tok = tokenizer()
    say = lambda prompts, **options: generate(forward, params, tok, prompts, max_new_tokens=NEW, **options)  # noqa: E731
    prompts = ["to be or", "not to be that is the"]
    rows = [tok(prompt)["input_ids"] for prompt in prompts]
    expected = [tok.decode(theirs(torch_model, np.array([row]), np.ones((1, len(row))), [2])[0]) for row in rows]
    expected = [text.split("</s>")[0].replace("<unk>", "") for text in expected]
    found = say(prompts)
    assert found == expected and all(found)
    assert say(prompts[0]) == expected[0]
    assert say([]) == []

    cut = expected[0][2:4]
    assert say(prompts[0], stop=cut) == expected[0][: expected[0].index(cut)]
    end = tok(expected[0][3])["input_ids"][0]
    assert say(prompts[0], stop=[end]) == expected[0][: expected[0].index(expected[0][3])]

    chat = [{"role": "user", "content": "hi there"}]
    assert say(chat) == say("uhi there</s>a")
    assert say([chat, chat]) == [say(chat)] * 2


def test_half_precision_and_gpt2() -> None:
    """The cache takes the compute dtype, and tokens those of the most probable continuation."""
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    _, params, _ = pair(config)
    forward = gpt2.build(config, compute_dtype="bfloat16")
    prompt = np.array([[5, 9, 11, 4]], np.int32)
    new = np.asarray(generate_tokens(forward, params, prompt, max_new_tokens=6))
    whole = np.concatenate([prompt, new], 1)
    logits = np.asarray(compiled(forward)(params, Inputs(whole)))[0, 3:-1]
    assert (logits.max(-1) - np.take_along_axis(logits, new[0][:, None], 1)[:, 0]).max() < 0.1


def test_bad_input_is_refused(model: Any) -> None:
    _, params, forward = model
    tok, row = tokenizer(), np.full((1, 4), 5)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(forward, params, tok, ["a", ""])
    with pytest.raises(ValueError, match="a prompt of 30 tokens and 20 new ones exceed the model's 48 positions"):
        generate(forward, params, tok, "a" * 30, max_new_tokens=20)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        generate(forward, params, None, "a")
    with pytest.raises(ValueError, match=f"token id {VOCAB} is outside the vocabulary of {VOCAB}"):
        generate_tokens(forward, params, [[5, VOCAB]], max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate_tokens(forward, params, row, np.zeros((1, 4), bool))
    with pytest.raises(ValueError, match="padded on the left"):
        generate_tokens(forward, params, row, [[True, True, True, False]])
    with pytest.raises(ValueError, match="keeps no key-value cache"):
        generate_tokens(Forward(forward.features), params, row)
    for options, message in [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 1.0}, "give key="),
        ({"top_k": 3}, "give temperature="),
        ({"temperature": 1.0, "key": jax.random.key(0), "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "key": jax.random.key(0), "top_p": 1.5}, "top_p is 1.5"),
        ({"beams": 0}, "beams is 0"),
        ({"beams": 2, "temperature": 1.0, "key": jax.random.key(0)}, "not both"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate_tokens(forward, params, row, **{"max_new_tokens": 4} | options)
