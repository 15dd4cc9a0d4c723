"""What the server reads and writes: each field of OpenAI's requests, tokens as text, the worker's thread."""

import asyncio
import json

import numpy as np
import pytest
import toy_tokenizer
import transformers
from fake_engine import FakeEngine
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from peft_jax.serving import answers, protocol
from peft_jax.serving.events import Event, TokenLogprob, Usage
from peft_jax.serving.requests import Refused, Sampling
from peft_jax.serving.worker import Stream, Worker

TEXT = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
USER = {"role": "user"}


@pytest.mark.parametrize(
    ("read", "field", "value", "why"),
    [
        ("both", "model", None, "model is missing"),
        ("both", "model", 3, "model must be a string, not 3"),
        ("both", "n", 0, "n must be from 1 to 128, not 0"),
        ("both", "n", 129, "n must be from 1 to 128"),
        ("both", "n", True, "n must be an integer, not true"),
        ("both", "n", 1.0, "n must be an integer, not 1.0"),
        ("both", "max_tokens", 0, "max_tokens must be from 1"),
        ("both", "max_tokens", 10**4000, "not an integer of many digits"),
        ("both", "temperature", -0.1, "temperature must be from 0 to 2"),
        ("both", "temperature", "hot", 'temperature must be a number, not "hot"'),
        ("both", "temperature", float("inf"), "temperature must be finite"),
        ("both", "temperature", False, "temperature must be a number, not false"),
        ("both", "top_p", 0, "top_p must be more than 0"),
        ("both", "top_p", 1.5, "top_p must be from 0 to 1"),
        ("both", "top_k", -2, "top_k must be from -1"),
        ("both", "seed", 1.5, "seed must be an integer"),
        ("both", "stop", ["a", 1], "stop must be a string or a list"),
        ("both", "stop", "", "none of them empty"),
        ("both", "stop", ["a"] * 17, "at most 16"),
        ("both", "stop", {"a": 1}, "stop must be a string or a list"),
        ("both", "stream", "yes", "stream must be true or false"),
        ("both", "stream", 1, "stream must be true or false"),
        ("both", "stream_options", {"include_usage": True}, "stream_options needs stream"),
        ("both", "ignore_eos", "no", "ignore_eos must be true or false"),
        ("both", "logit_bias", {"5": 100}, "logit_bias is not served"),
        ("both", "presence_penalty", 0.5, "presence_penalty is not served"),
        ("both", "frequency_penalty", -1, "frequency_penalty is not served"),
        ("both", "temprature", 0, '"temprature" is not a field that is known here'),
        ("both", "guided_json", {}, "is not a field that is known here"),
        ("text", "prompt", None, "prompt is missing"),
        ("text", "prompt", [], "prompt must be a string"),
        ("text", "prompt", 5, "prompt must be a string"),
        ("text", "prompt", [1, "a"], "prompt must be a string"),
        ("text", "prompt", [1, -1], "prompt must be a string"),
        ("text", "prompt", [1, 2**31], "prompt must be a string"),
        ("text", "prompt", [True], "prompt must be a string"),
        ("text", "prompt", [[1], []], "none of them empty"),
        ("text", "prompt", "\ud800", "half of a surrogate pair"),
        ("text", "prompt", ["a"] * 129, "129 prompts with n = 1 are more than 128"),
        ("text", "logprobs", 21, "logprobs must be from 0 to 20"),
        ("text", "logprobs", True, "logprobs must be an integer"),
        ("text", "echo", True, "echo is not served"),
        ("text", "echo", 0, "echo is not served"),
        ("text", "best_of", 2, "best_of is not served"),
        ("text", "best_of", True, "best_of is not served"),
        ("text", "suffix", "end", "suffix is not served"),
        ("chat", "messages", None, "messages is missing"),
        ("chat", "messages", [], "one message or more"),
        ("chat", "messages", "hello", "messages must be a list"),
        ("chat", "messages", ["hello"], r"messages\[0\] must be an object"),
        ("chat", "messages", [{"content": "x"}], r"messages\[0\].role must be a string"),
        ("chat", "messages", [USER], r"messages\[0\].content must be"),
        ("chat", "messages", [{**USER, "content": 5}], r"messages\[0\].content must be"),
        ("chat", "messages", [{**USER, "content": "x", "name": 5}], r"messages\[0\].name must be a string"),
        ("chat", "messages", [{**USER, "content": "x", "tool_calls": [{}]}], r"\[0\].tool_calls is not served"),
        ("chat", "messages", [{**USER, "content": [{"type": "image_url"}]}], r'no text \("image_url"\)'),
        ("chat", "messages", [{**USER, "content": ["x"]}], "no text"),
        ("chat", "messages", [{**USER, "content": "\udfff"}], "half of a surrogate pair"),
        ("chat", "logprobs", 3, "logprobs must be true or false"),
        ("chat", "top_logprobs", 2, "top_logprobs needs logprobs"),
        ("chat", "max_completion_tokens", -1, "max_completion_tokens must be from 1"),
        ("chat", "tools", [{"type": "function"}], "tools is not served"),
        ("chat", "tool_choice", "required", "tool_choice is not served"),
        ("chat", "response_format", {"type": "json_object"}, "response_format is not served"),
        ("chat", "modalities", ["audio"], "modalities is not served"),
        ("chat", "reasoning_effort", "high", "reasoning_effort is not served"),
        ("chat", "store", True, "store is not served"),
        ("chat", "prompt", "x", "is not a field"),
    ],
)
def test_what_is_wrong_is_named(read, field, value, why):
    for body, reader in ((TEXT, protocol.completion), (CHAT, protocol.chat)):
        if read in ("both", "text" if reader is protocol.completion else "chat"):
            with pytest.raises(Refused, match=why) as caught:
                reader({**body, field: value})
            assert caught.value.status == 400 and caught.value.param.startswith(field)
            assert json.dumps(answers.error(caught.value)) and len(str(caught.value)) < 200


def test_what_asks_for_nothing_is_taken():
    nothing = {"n": None, "stop": None, "logit_bias": {}, "presence_penalty": 0.0, "user": "u", "seed": None}
    plain = protocol.completion(TEXT)
    assert protocol.completion({**TEXT, **nothing, "best_of": 1, "echo": False, "suffix": None}) == plain
    more = {"tools": [], "response_format": {"type": "text"}, "metadata": {"a": "b"}, "modalities": ["text"]}
    assert protocol.chat({**CHAT, **nothing, **more, "top_logprobs": None, "store": False}) == protocol.chat(CHAT)
    assert plain.sampling == Sampling(temperature=1.0) and (plain.n, plain.max_tokens, plain.stream) == (1, 16, False)
    streams = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    assert protocol.chat({**CHAT, **streams}).include_usage
    with pytest.raises(Refused, match="continuous_usage_stats"):
        protocol.chat({**CHAT, **streams, "stream_options": {"continuous_usage_stats": True}})
    both = {"max_tokens": 5, "max_completion_tokens": 6}
    with pytest.raises(Refused, match="max_tokens and max_completion_tokens differ"):
        protocol.chat({**CHAT, **both})
    assert protocol.chat({**CHAT, "max_completion_tokens": 6}).max_tokens == 6
    assert protocol.chat({**CHAT, "max_tokens": 5}).max_tokens == 5
    named = protocol.chat(
        {"model": "m", "messages": [{"role": "user", "content": "x", "name": "Ann", "refusal": None}]}
    )
    assert named.messages == ({"role": "user", "content": "x", "name": "Ann"},)


def test_seeds_differ_between_choices_and_fit_32_bits():
    ask = protocol.completion({**TEXT, "n": 3, "seed": 2**31 - 2, "top_k": -1})
    assert [sampling.seed for sampling in ask.samplings(4)] == [2**31 - 2, 2**31 - 1, 0]
    assert ask.samplings(4)[0].max_tokens == 4 and ask.sampling.top_k == 0
    assert [sampling.seed for sampling in protocol.completion(TEXT).samplings(4)] == [None]
    assert protocol.completion({**TEXT, "seed": -(10**30)}).sampling.seed in range(2**31)


def sentencepiece():
    """▁-words with byte fallback, as Llama 2 has them."""
    words = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "b"]
    inner = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [("▁", "a")], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


@pytest.mark.parametrize("make", [toy_tokenizer.gpt2, sentencepiece])
def test_tokens_spell_the_text_byte_for_byte(make):
    tokenizer = make()
    pieces = answers.Pieces(tokenizer)
    text = " a ab€a é"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    raw = b"".join(pieces(token)[1] for token in tokens)
    assert raw.decode().lstrip() == text.lstrip()
    labels = {token: pieces.label(token) for token in range(len(tokenizer))}
    assert labels[tokens[-1]] == "bytes:\\xa9" and pieces(tokens[-1])[0] == "\ufffd"
    odd = [label for token, label in labels.items() if label.startswith("bytes:")]
    assert len(odd) == len(set(odd)) == 128  # all that are not ASCII

    offsets = answers.Offsets(pieces)
    found = [offsets(token) for token in tokens]
    lengths = np.cumsum([0] + [len(raw_text) for raw_text in spelt(pieces, tokens)])
    assert found == list(lengths[:-1])
    end = tokenizer.all_special_ids[0]
    assert offsets(end) == offsets(end) == lengths[-1]  # nobody sees it


def spelt(pieces, tokens):
    """Each token's whole characters: those that end in it."""
    raw, text = b"", ""
    for token in tokens:
        raw += pieces(token)[1]
        new = raw.decode(errors="ignore")
        yield new[len(text) :]
        text = new


def test_logprobs_keep_the_likeliest_of_tokens_that_look_alike_and_the_token_itself():
    pieces = answers.Pieces(toy_tokenizer.gpt2())
    ask = protocol.completion({**TEXT, "logprobs": 1})
    shape = answers.Shape(ask, [1], pieces)
    a, b = pieces.tokenizer("ab")["input_ids"]
    event = Event(0, (a,), "a", (TokenLogprob(a, -2.0, ((b, -0.5), (a, -2.0))),), "stop", "", Usage(1, 1))
    shape.take(0, event)
    found = shape.whole([[event]])["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{"b": -0.5, "a": -2.0}] and found["tokens"] == ["a"]


def test_usage_without_the_engines_word_is_counted():
    shape = answers.Shape(protocol.completion(TEXT), [3], answers.Pieces(toy_tokenizer.gpt2()))
    shape.take(0, Event(0, (1, 2), "ab"))
    assert shape.usage()["completion_tokens"] == 2 and shape.usage()["total_tokens"] == 5


def test_a_submit_that_nobody_waits_for_any_more_leaves_nothing_behind():
    engine = FakeEngine()
    engine.paused = True

    async def go():
        worker = Worker(engine)
        worker.start()
        loop = asyncio.get_running_loop()
        stream = Stream(worker, loop)
        entered, leave = asyncio.Event(), asyncio.Event()
        slow = asyncio.ensure_future(worker.call(lambda engine: held(loop, entered, leave)))
        await entered.wait()
        waiting = asyncio.ensure_future(worker.submit(stream, [[70, 71]], [Sampling()], None))
        await asyncio.sleep(0.01)
        waiting.cancel()  # while its command is in the queue
        stream.close()
        leave.set()
        await slow
        other = Stream(worker, loop)
        await worker.submit(other, [[70], [71]], [Sampling(), Sampling()], "law")
        other.close()
        other.close()
        left = await worker.call(lambda engine: len(engine.running))
        assert await asyncio.to_thread(worker.stop)
        with pytest.raises(Refused, match="has stopped") as caught:
            await worker.call(lambda engine: 1)
        assert caught.value.status == 503
        return left

    def held(loop, entered, leave):
        loop.call_soon_threadsafe(entered.set)
        return asyncio.run_coroutine_threadsafe(leave.wait(), loop).result(10)

    assert asyncio.run(go()) == 0
    assert engine.cancelled == [0, 1] and len(engine.submitted) == 2


def test_a_fault_of_cancel_ends_the_engine(caplog):
    """Its books are wrong then: better no answer than another's rows."""
    engine = FakeEngine()
    engine.paused = True
    engine.cancel = lambda request: 1 / 0

    async def go():
        worker = Worker(engine)
        worker.start()
        streams = [Stream(worker, asyncio.get_running_loop()) for _ in range(2)]
        for stream in streams:
            await worker.submit(stream, [[70]], [Sampling()], None)
        streams[0].close()
        _, index, event = await asyncio.wait_for(streams[1].next(), 10)
        assert (index, event.finish) == (0, "error") and "ZeroDivisionError" in event.reason
        assert isinstance(worker.failure, ZeroDivisionError) and not worker.alive

    asyncio.run(go())
    assert "division by zero" in caplog.text
