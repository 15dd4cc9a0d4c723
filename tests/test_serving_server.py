"""What the server answers: OpenAI's own client and plain HTTP over loopback, on an engine without a model."""

import json

import openai
import pytest
from fake_engine import FakeEngine
from over_http import HELLO, in_thread, serving, until
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from peft_jax.serving.server import Server, Settings


@pytest.fixture(scope="module")
def shared():
    with serving() as it:
        yield it


@pytest.fixture
def server(shared):
    """The module's server, at rest."""
    yield shared
    shared.rest()


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_completion_names_its_adapter_counts_its_tokens_and_stops(server):
    answer = server.client.completions.create(model="poems", prompt="Ode to joy", max_tokens=100, temperature=0)
    assert answer.choices[0].text == "poems: Ode to joy" and answer.choices[0].finish_reason == "stop"
    assert answer.model == "poems" and answer.object == "text_completion" and answer.choices[0].logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 17, 27)
    assert usage.prompt_tokens_details.cached_tokens == 2
    _, sampling, adapter = server.engine.submitted[0]
    assert adapter == "poems" and sampling.temperature == 0.0 and sampling.max_tokens == 100

    short = server.client.completions.create(model="toy/base", prompt="Ode to joy", max_tokens=7)
    assert short.choices[0].text == "base: O" and short.choices[0].finish_reason == "length"
    stopped = server.client.completions.create(
        model="toy/base", prompt="Ode to joy", max_tokens=99, stop=["joy", " to"]
    )
    assert stopped.choices[0].text == "base: Ode" and stopped.choices[0].finish_reason == "stop"
    assert server.engine.submitted[-1][1].stop == ("joy", " to")


def test_wishes_reach_the_engine(server):
    server.client.completions.create(
        model="toy/base", prompt="x", max_tokens=3, temperature=0.5, top_p=0.9, seed=2**31 + 4, stop="q", user="me",
        frequency_penalty=0, extra_body={"top_k": 5, "ignore_eos": True},
    )  # fmt: skip
    prompt, sampling, adapter = server.engine.submitted[0]
    assert prompt == server.engine.tokenizer("x")["input_ids"] and adapter is None
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.5, 0.9, 5)
    assert (sampling.seed, sampling.stop, sampling.ignore_end, sampling.logprobs) == (4, ("q",), True, None)


def test_prompts_as_tokens_several_prompts_and_n(server):
    ids = server.engine.tokenizer("ab")["input_ids"]
    one = server.client.completions.create(model="toy/base", prompt=ids, max_tokens=50)
    assert one.choices[0].text == "base: ab"
    many = server.client.completions.create(model="law", prompt=["p", "qq"], n=2, seed=7, max_tokens=50)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in many.choices] == ["law: p", "law: p", "law: qq", "law: qq"]
    assert [sampling.seed for _, sampling, _ in server.engine.submitted[1:]] == [7, 8, 7, 8]
    # Prompts are counted once, whatever n.
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (1 + 2, 2 * 6 + 2 * 7)
    assert many.usage.prompt_tokens_details.cached_tokens == 1 + 2
    lists = server.client.completions.create(model="toy/base", prompt=[ids, ids[:1]], max_tokens=50)
    assert [choice.text for choice in lists.choices] == ["base: ab", "base: a"]


def test_a_stream_of_a_completion(server):
    stream = server.client.completions.create(
        model="poems", prompt="é", max_tokens=100, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    for index in (0, 1):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in own) == "poems: é"
        assert len(own) == 8  # the first half of é says nothing
        assert [choice.finish_reason for choice in own] == [None] * 7 + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 2 + 2 * 9
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_what_a_stream_looks_like_on_the_wire(server):
    with server.http.stream("POST", "/v1/completions", json={**HELLO, "stream": True}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        raw = answer.read().decode()
    events = raw.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and raw.isascii()
    parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(event["choices"][0]["text"] for event in parsed) == "base: Hello"
    assert all("usage" not in event for event in parsed)


def test_chat_takes_the_template_and_streams(server):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    told = "law: system=Be brief.;user=Hello;assistant="
    answer = server.client.chat.completions.create(model="law", messages=messages)
    assert answer.choices[0].message.content == told and answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion" and answer.choices[0].finish_reason == "stop"
    # As many as the context leaves, where the client says nothing.
    assert server.engine.submitted[0][1].max_tokens == 512 - answer.usage.prompt_tokens

    chunks = list(server.client.chat.completions.create(
        model="law", messages=messages, n=2, stream=True, max_completion_tokens=100
    ))  # fmt: skip
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    for index in (0, 1):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert own[0].delta.role == "assistant" and own[0].delta.content == ""
        assert "".join(choice.delta.content or "" for choice in own) == told
        assert own[-1].finish_reason == "stop" and own[-2].finish_reason is None
    assert server.engine.submitted[-1][1].max_tokens == 100


def test_logprobs_of_completions(server):
    answer = server.client.completions.create(model="toy/base", prompt="é!", max_tokens=100, logprobs=2)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens[:6]) == "base: " and found.tokens[6:] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert found.token_logprobs == [-0.5] * 9
    assert found.text_offset == [0, 1, 2, 3, 4, 5, 6, 6, 7] and answer.choices[0].text[7] == "!"
    assert all(len(top) == 2 and list(top.values()) == [-0.5, -9999.0] for top in found.top_logprobs)
    assert [next(iter(top)) for top in found.top_logprobs] == found.tokens

    alone = server.client.completions.create(model="toy/base", prompt="é!", max_tokens=100, logprobs=0)
    assert [list(top) for top in alone.choices[0].logprobs.top_logprobs] == [[token] for token in found.tokens]
    streamed = list(server.client.completions.create(
        model="toy/base", prompt="é!", max_tokens=100, logprobs=2, stream=True
    ))  # fmt: skip
    assert [at for chunk in streamed for at in chunk.choices[0].logprobs.text_offset] == found.text_offset


def test_logprobs_of_chats(server):
    asked = {"model": "toy/base", "messages": [{"role": "user", "content": "é"}], "logprobs": True}
    answer = server.client.chat.completions.create(**asked, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == answer.choices[0].message.content
    assert [one.logprob for one in content] == [-0.5] * len(content)
    assert all([top.logprob for top in one.top_logprobs] == [-0.5, -9999.0, -3.0] for one in content)
    chunks = list(server.client.chat.completions.create(**asked, stream=True))
    streamed = [one for chunk in chunks for choice in chunk.choices for one in (choice.logprobs or NONE).content]
    assert [one.token for one in streamed] == [one.token for one in content]
    assert all(one.top_logprobs == [] for one in streamed)


class NONE:
    content = ()


def test_models(server):
    found = {model.id: model for model in server.client.models.list()}
    assert set(found) == {"toy/base", "poems", "law"}
    assert found["toy/base"].parent is None and found["poems"].parent == "toy/base"
    assert server.client.models.retrieve("toy/base").max_model_len == 512
    assert server.client.models.retrieve("law").root == "/adapters/law"
    with pytest.raises(openai.NotFoundError, match="'prose' is not served here"):
        server.client.models.retrieve("prose")


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_an_unknown_model_and_a_context_too_long(server):
    with pytest.raises(openai.NotFoundError, match="'prose' is not served here") as caught:
        server.client.completions.create(model="prose", prompt="x")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="holds 512 tokens, and 500 of prompt and 16") as caught:
        server.client.completions.create(model="toy/base", prompt="x" * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="616 of messages do not fit"):
        server.client.chat.completions.create(model="toy/base", messages=[{"role": "user", "content": "x" * 600}])
    with pytest.raises(openai.BadRequestError, match="prompt has no token"):
        server.client.completions.create(model="toy/base", prompt="")
    with pytest.raises(openai.BadRequestError, match="prompt has token 257, and there are 257"):
        server.client.completions.create(model="toy/base", prompt=[256, 257])
    assert not server.engine.submitted


def test_a_template_that_refuses_and_one_that_is_missing(server):
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(openai.BadRequestError, match="refuses the messages: system comes first"):
        server.client.chat.completions.create(model="toy/base", messages=messages)
    kept, server.engine.tokenizer.chat_template = server.engine.tokenizer.chat_template, None
    try:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            server.client.chat.completions.create(model="toy/base", messages=messages[:1])
    finally:
        server.engine.tokenizer.chat_template = kept


def test_bodies_that_are_no_requests(server):
    def post(content, kind="application/json", path="/v1/completions"):
        answer = server.http.post(path, content=content, headers={"Content-Type": kind})
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
        return answer.status_code, error["message"]

    assert post(b'{"model": ') == (
        400,
        "The body is not valid JSON: Expecting value: line 1 column 11 (char 10).",
    )
    assert post(b"[1]") == (400, "The body must be a JSON object.")
    assert post(b"\xff")[0] == 400 and post(b"[" * 100_000)[0] == 400 and post(b'{"n": NaN}')[0] == 400
    assert post(b'{"n": 1' + b"0" * 5000 + b"}")[0] == 400  # more digits than Python reads
    assert post(b"{}", kind="text/plain") == (415, "Content-Type must be application/json.")
    assert post(b" " * (1 << 20) + b"{}")[0] == 413
    sent = (b" " * 65536 for _ in range(20))  # in chunks, of no length given
    assert post(sent)[0] == 413
    assert post(b"{}", path="/v1/nothing") == (404, "/v1/nothing does not exist.")
    wrong = server.http.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["message"] == "/v1/completions does not take GET."
    assert not server.engine.submitted


def test_the_engine_refuses_all_choices_or_none(server):
    server.engine.room, server.engine.paused = 2, True
    answer = server.http.post("/v1/completions", json={**HELLO, "n": 3})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert server.engine.cancelled == [0, 1] and not server.engine.running


def test_a_bug_in_submit_is_one_requests_misfortune(server):
    with pytest.raises(openai.InternalServerError, match="TypeError"):
        server.client.completions.create(model="toy/base", prompt="bug")
    assert server.http.get("/health").status_code == 200


def test_early_abort_before_and_behind_the_first_token(server):
    answer = server.http.post("/v1/completions", json={**HELLO, "prompt": "abort0", "n": 2, "stream": True})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["message"] == "The deadline has passed."
    stream = server.client.completions.create(model="toy/base", prompt="abort3", max_tokens=50, stream=True)
    assert [next(stream).choices[0].text for _ in range(3)] == ["b", "a", "s"]
    with pytest.raises(openai.APIError, match="The deadline has passed"):
        next(stream)


def test_a_full_queue_says_when_to_come_again():
    with serving(settings=Settings(queue=3)) as it:
        it.engine.paused = True
        waiting = [in_thread(lambda: it.client.completions.create(**HELLO)) for _ in range(2)]
        until(lambda: it.app.open == 2)
        answer = it.http.post("/v1/completions", json={**HELLO, "n": 2})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "queue_full"
        assert it.http.post("/v1/completions", json={**HELLO, "n": 4}).status_code == 400  # never
        third = in_thread(lambda: it.client.completions.create(**HELLO))
        until(lambda: it.app.open == 3)
        with pytest.raises(openai.RateLimitError):
            it.client.completions.create(**HELLO)
        it.engine.paused = False
        assert [each().choices[0].text for each in (*waiting, third)] == ["base: Hello"] * 3
        assert it.client.completions.create(**HELLO).choices[0].text == "base: Hello"
        assert len(it.engine.submitted) == 4


# -- keys --------------------------------------------------------------------------------------------------------------


def test_keys_guard_all_but_health():
    with TestClient(Server(FakeEngine(), Settings(api_key="sesame"))) as client:
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            for key in (None, "Bearer", "Bearer wrong", "Bearer sesam", "Basic sesame", "Bearer s\xe9same"):
                headers = {} if key is None else {"Authorization": key.encode("latin-1")}
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (path, key)
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/v1/completions", json=HELLO).status_code == 401
        assert client.get("/health").json() == {"status": "ok"}
        headers = {"Authorization": "Bearer sesame"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.post("/v1/completions", json=HELLO, headers=headers).json()["choices"][0]["text"] == "base: Hello"


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_loading_is_off_unless_allowed(server):
    for path in ("load", "unload"):
        answer = server.http.post(f"/v1/{path}_lora_adapter", json={"lora_name": "a", "lora_path": "/adapters/poems"})
        assert answer.status_code == 403 and "--allow-loading" in answer.json()["error"]["message"]


def test_loading_stays_in_the_allowed_directories(tmp_path):
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for directory in (allowed / "good", allowed / "leaky", allowed / "bad", outside):
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text("{}")
    (allowed / "link").symlink_to(outside)
    (allowed / "inner").symlink_to(allowed / "good")
    (allowed / "loop").symlink_to(allowed / "loop")
    (allowed / "leaky" / "adapter_model.safetensors").symlink_to(outside / "adapter_config.json")
    settings = Settings(allow_loading=(allowed,))
    with TestClient(Server(FakeEngine(), settings)) as client:

        def load(name, path):
            answer = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
            return answer.status_code if answer.status_code == 200 else (answer.status_code, error(answer))

        def error(answer):
            return answer.json()["error"]["message"]

        assert load("one", allowed / "good") == 200
        assert load("two", "good") == 200 and load("three", "inner") == 200
        models = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert models["three"]["root"] == str(allowed / "good") and models["one"]["parent"] == "toy/base"
        text = client.post("/v1/completions", json={**HELLO, "model": "two"}).json()["choices"][0]["text"]
        assert text == "two: Hello"

        for path in (
            outside,
            "../outside",
            "good/../../outside",
            "good/..",
            "good/../good",
            "link",
            "leaky",
            "/etc",
            tmp_path,
            "/none",
        ):
            status, message = load("four", path)
            assert status == 403 and "--allow-loading" in message, path
        assert load("four", "none")[0] == 404 and load("four", allowed / "good" / "adapter_config.json")[0] == 404
        assert load("four", "loop")[0] in (400, 404) and load("four", "x" * 5000)[0] == 400
        assert load("four", "a\0b")[0] == 400
        for name in ("a/b", "../a", "", ".hidden", "a b", "a..b", "x" * 200, "é"):
            assert load(name, "good")[0] == 400, name
        assert load("two", "good")[1] == "lora_name 'two' is taken."
        assert load("toy/base", "good")[0] == 400
        again = {"lora_name": "two", "lora_path": "inner", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=again).json()["root"] == str(allowed / "good")
        again = {"lora_name": "toy/base", "lora_path": "inner", "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=again).status_code == 400
        status, message = load("corrupt", "bad")
        assert status == 400 and "is no safetensors file" in message
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "x"}).status_code == 400
        assert client.post("/v1/load_lora_adapter", json={"lora_name": 3, "lora_path": "good"}).status_code == 400
        odd = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "good", "rank": 3})
        assert odd.status_code == 400 and '"rank"' in error(odd)

        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "two"})
        assert gone.json() == {"id": "two", "object": "model", "deleted": True}
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 404
        assert client.post("/v1/completions", json={**HELLO, "model": "two"}).status_code == 404
        assert client.get("/health").status_code == 200


def test_a_name_is_free_while_its_last_requests_are_finished(tmp_path):
    with serving(settings=Settings(allow_loading=(tmp_path,))) as it:
        it.engine.paused = True
        running = in_thread(lambda: it.client.completions.create(**{**HELLO, "model": "law"}))
        until(lambda: it.engine.running)
        assert it.http.post("/v1/unload_lora_adapter", json={"lora_name": "law"}).status_code == 200
        assert [info.state for info in it.engine.adapters() if info.name == "law"] == ["draining"]
        assert {model.id for model in it.client.models.list()} == {"toy/base", "poems"}
        assert it.http.post("/v1/unload_lora_adapter", json={"lora_name": "law"}).status_code == 404
        new = it.http.post("/v1/load_lora_adapter", json={"lora_name": "law", "lora_path": str(tmp_path)})
        assert new.status_code == 200 and new.json()["state"] == "resident"
        it.engine.paused = False
        assert running().choices[0].text == "law: Hello"


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_are_prometheus_text():
    with TestClient(Server(FakeEngine())) as client:
        for _ in range(2):
            client.post("/v1/completions", json=HELLO)
        client.post("/v1/completions", json={})
        client.get("/favicon.ico")
        client.get("/v1/models/poems")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    values = {(s.name, *sorted(s.labels.values())): s.value for f in families.values() for s in f.samples}
    assert values["peft_jax_rows_free",] == 7 and values["peft_jax_engine_up",] == 1
    assert values["peft_jax_steps_total",] == 22 and values["peft_jax_engine_step_seconds",] == 0
    assert families["peft_jax_steps"].type == "counter" and families["peft_jax_rows_free"].type == "gauge"
    assert values["peft_jax_requests_finished_total", "stop"] == 3
    assert values["peft_jax_http_requests_total", "/v1/completions", "200"] == 2
    assert values["peft_jax_http_requests_total", "/v1/completions", "400"] == 1
    assert values["peft_jax_http_requests_total", "404", "other"] == 1
    assert values["peft_jax_http_requests_total", "/v1/models/{name:path}", "200"] == 1
    for name in ("time_to_first_token", "time_per_output_token", "request"):
        assert values[f"peft_jax_{name}_seconds_count",] == 2 and values[f"peft_jax_{name}_seconds_sum",] > 0
