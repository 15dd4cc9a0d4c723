"""Packing, padding, batches and chats: against a brute-force reading, numpy, and transformers' own masks."""

import itertools
import json

import jax
import numpy as np
import pytest
import tokenizers
import toy
import transformers

from peft_jax import training


def sequences(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 1000, rng.integers(2, longest + 1)) for _ in range(count)]


def lessons(tokens, weights=None):
    """What a sequence teaches: each (token, next token, weight), in order."""
    weights = np.ones(len(tokens)) if weights is None else weights
    return [(int(a), int(b), float(w)) for a, b, w in zip(tokens, tokens[1:], weights[1:], strict=False)]


def read_back(rows):
    """The lessons of each segment of packed rows."""
    found = []
    for row in range(len(rows["tokens"])):
        line = {name: x[row] for name, x in rows.items()}
        for segment in range(1, line["segments"].max() + 1):
            at = np.flatnonzero(line["segments"] == segment)
            assert (np.diff(at) == 1).all()
            assert line["positions"][at].tolist() == list(range(len(at)))
            assert (line["tokens"][at[1:]] == line["targets"][at[:-1]]).all()
            found.append([(int(line["tokens"][i]), int(line["targets"][i]), float(line["weights"][i])) for i in at])
        padding = line["segments"] == 0
        assert not line["weights"][padding].any()
    return found


@pytest.mark.parametrize("length", [11, 30])
def test_packing_loses_nothing_and_mixes_nothing(length):
    examples = [
        {"tokens": s, "weights": (s % 3).astype(np.float32)} if i % 2 else s.tolist()
        for i, s in enumerate(sequences(60, 12))
    ]
    rows = training.pack(examples, length)
    given = [lessons(e["tokens"], e["weights"]) if isinstance(e, dict) else lessons(e) for e in examples]
    assert sorted(read_back(rows)) == sorted(given)
    assert {name: str(x.dtype) for name, x in rows.items()} == {
        "tokens": "int32", "targets": "int32", "weights": "float32", "segments": "int32", "positions": "int32"
    }  # fmt: skip
    assert all(x.shape == rows["tokens"].shape for x in rows.values())
    needed = sum(len(lesson) for lesson in given)
    assert len(rows["tokens"]) <= 1.1 * needed / length + 1  # best fit, decreasing: within 11/9 of the optimum


def test_long_examples():
    long, short = np.arange(1, 24), np.array([91, 92, 93])
    split = training.pack([long, short], 8)
    assert sorted(itertools.chain(*read_back(split))) == sorted(lessons(long) + lessons(short))  # each predicted once
    assert sorted(read_back(training.pack([long, short], 8, long="cut"))) == [lessons(long[:9]), lessons(short)]
    assert read_back(training.pack([long, short], 8, long="drop")) == [lessons(short)]
    with pytest.raises(ValueError, match="example 1 has 23 tokens and a row takes 9"):
        training.pad([short, long], 8)
    with pytest.raises(ValueError, match="every example is longer than a row"):
        training.pack([long], 8, long="drop")


def test_padding():
    examples = [*sequences(5, 9), {"tokens": [5, 6, 7], "weights": [1, 0, 2]}]
    rows = training.pad(examples, 8)
    for row, example in enumerate(examples):
        tokens, weights = (example["tokens"], example["weights"]) if isinstance(example, dict) else (example, None)
        n = len(tokens) - 1
        assert rows["mask"][row].tolist() == [True] * n + [False] * (8 - n)
        line = zip(*(rows[name][row, :n].tolist() for name in ("tokens", "targets", "weights")), strict=True)
        assert list(line) == lessons(tokens, weights)
        assert not rows["weights"][row, n:].any()


@pytest.mark.parametrize("make", [training.pack, training.pad])
def test_what_is_no_example(make):
    with pytest.raises(ValueError, match="the data set is empty"):
        make([], 8)
    with pytest.raises(ValueError, match="example 1 has 1 tokens: two are needed"):
        make([[1, 2], [3]], 8)
    with pytest.raises(ValueError, match="example 0 is not a sequence of token ids"):
        make([[1.5, 2.5]], 8)
    with pytest.raises(ValueError, match="example 0 is not a sequence of token ids"):
        make(["text"], 8)
    with pytest.raises(ValueError, match=r"3 tokens and weights of shape \(2,\)"):
        make([{"tokens": [1, 2, 3], "weights": [1, 0]}], 8)
    with pytest.raises(ValueError, match="length is 0"):
        make([[1, 2]], 0)
    with pytest.raises(ValueError, match="long is 'wrap'"):
        make([[1, 2]], 8, long="wrap")


def test_packed_rows_give_the_loss_of_their_sequences_apart():
    """With one token of context (the toy's running mean would see its neighbours), packing changes no lesson."""
    examples = [s % 48 for s in sequences(9, 10, seed=3)]
    forward, params = toy.forward(48), toy.params(layers=1)
    rows = training.pack(examples, 20)
    alone = lambda rows: {name: np.asarray(x).reshape(-1, 1) for name, x in rows.items()}  # noqa: E731
    packed = training.evaluate(forward, params, [alone(rows)])
    padded = training.evaluate(forward, params, [alone(training.pad(examples, 9))])
    assert packed == pytest.approx(padded, rel=1e-5)
    assert packed["tokens"] == sum(len(e) - 1 for e in examples)


# -- batches ----------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step():
    rows = {"tokens": np.arange(23)[:, None] * 10, "weights": np.ones((23, 1), np.float32)}
    make = lambda seed: training.batches(rows, 4, seed)  # noqa: E731
    epochs = [[make(0).batch(5 * e + i)["tokens"][:, 0].tolist() for i in range(5)] for e in range(3)]
    assert len(make(0)) == 5
    for epoch in epochs:  # no row twice; the 23 % 4 left over are left out
        assert len(set(itertools.chain(*epoch))) == 20
    assert epochs[0] != epochs[1] != epochs[2]
    assert set(itertools.chain(*epochs[0])) != set(itertools.chain(*epochs[1]))  # another three are left out
    assert make(1).batch(0)["tokens"].tolist() != make(0).batch(0)["tokens"].tolist()
    assert make(0).batch(10**6)["tokens"].shape == (4, 1)
    # A golden order: it must not change with numpy, or old runs would not resume.
    assert make(0).batch(0)["tokens"][:, 0].tolist() == [0, 210, 20, 110]


def test_iterating_batches_is_one_whole_pass_of_one_shape():
    rows = {"tokens": np.arange(10)[:, None], "weights": np.ones((10, 1), np.float32)}
    seen = list(training.batches(rows, 4))
    assert [batch["tokens"].shape for batch in seen] == [(4, 1)] * 3
    real = [int(t) for batch in seen for t, w in zip(batch["tokens"][:, 0], batch["weights"][:, 0], strict=True) if w]
    assert real == list(range(10))
    assert rows["weights"].all()
    with pytest.raises(ValueError, match="10 rows do not fill batches of 4"):
        list(training.batches({"tokens": rows["tokens"]}, 4))


def test_what_is_no_data_set():
    with pytest.raises(ValueError, match="the data set is empty"):
        training.batches({"tokens": np.zeros((0, 4), np.int32)}, 2)
    with pytest.raises(ValueError, match="the data set is empty"):
        training.batches({}, 2)
    with pytest.raises(ValueError, match=r"disagree on the number of rows: .*'weights': 2"):
        training.batches({"tokens": np.zeros((3, 4)), "weights": np.zeros((2, 4))}, 2)
    with pytest.raises(ValueError, match="a batch takes 4 rows and the data set has 3"):
        training.batches({"tokens": np.zeros((3, 4))}, 4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        training.batches({"tokens": np.zeros((3, 4))}, 0)


# -- chats ------------------------------------------------------------------------------------------------------------

PLAIN = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = PLAIN.replace(
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n",
    "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}",
)
FORGETFUL = PLAIN.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '...')")


def tokenizer(template):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # A few merges, so that tokens are not characters.
    merges = [("h", "e"), ("he", "l"), ("Ġ", "w"), ("o", "r"), ("Ċ", "Ċ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def say(*contents, system=None):
    start = [{"role": "system", "content": system}] if system else []
    turns = zip(itertools.cycle(["user", "assistant"]), contents, strict=False)
    return {"messages": start + [{"role": role, "content": content} for role, content in turns]}


TALKS = [
    say("hello world", "hello, héllo!"),
    say("a", "b", "c", "hello  world \n", "e", system="Be short."),
    say("a", "\n\nhello", "and?", "worldly ☃"),
]


def test_prefix_differences_equal_the_templates_own_marks():
    plain, marked = tokenizer(PLAIN), tokenizer(MARKED)
    ours, theirs = training.chat(TALKS, plain, 500), training.chat(TALKS, marked, 500)
    for talk, mine, other in zip(TALKS, ours, theirs, strict=True):
        oracle = marked.apply_chat_template(talk["messages"], return_dict=True, return_assistant_tokens_mask=True)
        assert mine["tokens"].tolist() == other["tokens"].tolist() == oracle["input_ids"]
        assert mine["weights"].tolist() == other["weights"].tolist() == oracle["assistant_masks"]
        kept = plain.decode(mine["tokens"][mine["weights"] == 1])
        replies = [f"{m['content']}<|im_end|>" for m in talk["messages"] if m["role"] == "assistant"]
        # The last talk's first reply begins within a token, whose other half is the end of the prompt.
        assert kept == ("\n" if talk is TALKS[2] else "") + "".join(replies)
    rows = training.pack(ours, 64)
    assert rows["weights"].sum() == sum(example["weights"].sum() for example in ours)


def test_a_chat_file(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps(talk) for talk in TALKS) + "\n\n")
    made = tokenizer(PLAIN)
    jax.tree.map(np.testing.assert_array_equal, training.chat(path, made, 500), training.chat(TALKS, made, 500))
    bare = [talk["messages"] for talk in TALKS]
    jax.tree.map(np.testing.assert_array_equal, training.chat(bare, made, 500), training.chat(TALKS, made, 500))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"messages": [', "line 2 is not JSON"),
        ("[]", "line 2 is not a conversation"),
        ('{"text": "hello"}', "line 2 is not a conversation"),
        ('{"messages": "hello"}', "line 2 is not a conversation"),
        ('{"messages": [{"role": "user"}]}', "line 2: message 0 has no role or no content"),
        ('{"messages": ["hello"]}', "line 2: message 0 has no role or no content"),
        (json.dumps(say("hello")), "line 2 has no message of the assistant's"),
        (json.dumps(say("hello" * 99, "a")), "line 2 has 337 tokens, a row takes 201"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(TALKS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"talks.jsonl, {complaint}"):
        training.chat(path, tokenizer(PLAIN), 200)


def test_what_a_chat_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"conversation 1: the tokenizer's chat template is not prefix-stable"):
        training.chat([TALKS[0], TALKS[2]], tokenizer(FORGETFUL), 500)
    with pytest.raises(ValueError, match="no chat template"):
        training.chat(TALKS, tokenizer(None), 500)
    with pytest.raises(ValueError, match="conversation 0: the tokenizer's chat template failed: no system"):
        training.chat([TALKS[1]], tokenizer("{{ raise_exception('no system') }}"), 500)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the data set is empty"):
        training.chat(tmp_path / "empty.jsonl", tokenizer(PLAIN), 500)
    long = say("hello" * 20, "world")
    assert len(training.chat([TALKS[0], long], tokenizer(PLAIN), 90, long="drop")) == 1
    cut = training.chat([TALKS[1]], tokenizer(PLAIN), 60, long="cut")[0]
    np.testing.assert_array_equal(cut["tokens"], training.chat([TALKS[1]], tokenizer(PLAIN), 500)[0]["tokens"][:61])
    with pytest.raises(ValueError, match="conversation 0 has no reply within its first 91 tokens"):
        training.chat([long], tokenizer(PLAIN), 90, long="cut")
    with pytest.raises(ValueError, match="long is 'split'"):
        training.chat(TALKS, tokenizer(PLAIN), 60, long="split")
