"""How requests and the server end: clients that leave, an engine that is lost, signals."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from fake_engine import FakeEngine
from over_http import HELLO, in_thread, serving, until

from peft_jax.serving.__main__ import arguments, main
from peft_jax.serving.server import Server, Settings

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def shared():
    with serving() as it:
        yield it


@pytest.fixture
def server(shared):
    """The module's server, at rest."""
    yield shared
    shared.rest()


def disconnects(it):
    return it.app.metrics.registry.get_sample_value("peft_jax_http_disconnects_total")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_cancelled(server, stream):
    server.engine.hold = 3
    body = json.dumps({**HELLO, "prompt": "x" * 300, "max_tokens": 200, "n": 2, "stream": stream}).encode()
    before = disconnects(server)
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            seen = b""
            while b"data:" not in seen:
                seen += client.recv(4096)
        else:
            until(lambda: len(server.engine.running) == 2)
    until(lambda: len(server.engine.cancelled) == 2)
    assert not server.engine.running and server.engine.steps > 0
    until(lambda: disconnects(server) == before + 1)
    server.engine.hold = 100
    assert server.client.completions.create(**HELLO).choices[0].text == "base: Hello"


def test_a_reader_that_closes_its_stream_is_cancelled(server):
    server.engine.hold = 3
    stream = server.client.completions.create(model="law", prompt="x" * 300, max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: len(server.engine.cancelled) == 1)


def test_a_lost_engine_ends_its_requests_and_health(caplog):
    with serving() as it:
        it.engine.hold = 3
        stream = it.client.chat.completions.create(
            model="law", messages=[{"role": "user", "content": "x" * 200}], stream=True
        )
        next(stream)
        waiting = in_thread(lambda: it.client.completions.create(**HELLO, n=2))
        until(lambda: len(it.engine.submitted) == 3)
        it.engine.broken = True
        assert isinstance(waiting(), openai.InternalServerError) and waiting().status_code == 500
        assert "RuntimeError" in waiting().message and "device is lost" not in waiting().message
        with pytest.raises(openai.APIError, match="The engine failed"):
            list(stream)
        assert it.http.get("/health").status_code == 503
        answer = it.http.post("/v1/completions", json=HELLO)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_stopped"
        assert it.http.get("/v1/models").status_code == 503
        assert "peft_jax_engine_up 0.0" in it.http.get("/metrics").text
        assert it.app.open == 0
    assert "the device is lost" in caplog.text


def test_an_idle_engine_is_left_alone(server):
    """No step, no look at `busy`: the thread sleeps until a command comes."""
    server.client.completions.create(**HELLO)
    until(lambda: not server.engine.running)
    looked = []
    kept = FakeEngine.busy

    def quiet():
        before = len(looked)
        time.sleep(0.1)  # a hundred steps, if it did not sleep
        return len(looked) == before

    try:
        FakeEngine.busy = property(lambda self: looked.append(1) or kept.fget(self))
        until(quiet)
        before = len(looked)
        server.client.models.list()
        until(lambda: len(looked) > before)
    finally:
        FakeEngine.busy = kept


def test_a_signal_lets_what_runs_finish():
    with serving() as it:
        it.engine.paused = True
        running = in_thread(lambda: it.client.completions.create(**HELLO))
        until(lambda: it.engine.running)
        it.runner.handle_exit(signal.SIGTERM, None)
        until(lambda: it.app.draining)
        answer = it.http.post("/v1/completions", json=HELLO)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert it.http.get("/health").json() == {"status": "draining"}
        it.engine.paused = False
        assert running().choices[0].text == "base: Hello"
        it.thread.join(60)
        assert not it.thread.is_alive() and not it.engine.cancelled
        assert it.engine.closed and not it.app.worker.running


def test_a_request_that_is_still_coming_when_the_signal_comes_is_told_so():
    body = json.dumps(HELLO).encode()
    with serving() as it, socket.create_connection(("127.0.0.1", it.port), 30) as client:
        client.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:9])
        until(lambda: it.app.open == 1)
        it.runner.handle_exit(signal.SIGTERM, None)
        until(lambda: it.app.draining)
        client.sendall(body[9:])
        answer = client.recv(4096)
        assert b" 503 " in answer and b"retry-after: 5" in answer.lower()
        it.thread.join(60)
        assert not it.thread.is_alive() and not it.engine.submitted


def test_what_does_not_finish_in_time_is_told_so():
    with serving(drain=0.1) as it:
        it.engine.paused = True
        running = in_thread(lambda: it.client.completions.create(**HELLO))
        until(lambda: it.engine.running)
        it.runner.handle_exit(signal.SIGTERM, None)
        error = running()
        assert isinstance(error, openai.InternalServerError) and error.status_code == 503
        assert "shutting down" in error.message
        it.thread.join(60)
        assert not it.thread.is_alive() and it.engine.cancelled == [0]


def test_sigterm_ends_the_process_with_zero():
    script = (
        "import sys; from fake_engine import FakeEngine; from peft_jax.serving.__main__ import arguments, serve\n"
        "sys.exit(serve(FakeEngine(delay=0.02), arguments(sys.argv[1:])))"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, "--model", "toy", "--port", "0", "--drain", "60"]
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "PEFT_JAX_API_KEY": "sesame"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next(line for line in process.stderr if "running on" in line)
            url = line.split("running on ")[1].split()[0]
            assert url.startswith("http://127.0.0.1:")
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0)
            stream = client.completions.create(model="poems", prompt="x" * 40, max_tokens=90, stream=True)
            text = next(stream).choices[0].text
            process.send_signal(signal.SIGTERM)
            text += "".join(chunk.choices[0].text for chunk in stream)
            assert text == "poems: " + "x" * 40
            client.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_the_command_line(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setenv("PEFT_JAX_API_KEY", "from the environment")
    asked = arguments(["--model", "m", "--allow-loading", str(tmp_path), str(tmp_path), "--rows", "64"])
    assert (asked.host, asked.api_key, asked.rows, asked.memory) == ("127.0.0.1", "from the environment", 64, None)
    assert asked.allow_loading == [tmp_path, tmp_path]
    given = []
    building = SimpleNamespace(build_engine=lambda *model, **options: given.append((model, options)))
    monkeypatch.setitem(sys.modules, "peft_jax.serving.building", building)
    monkeypatch.setattr("peft_jax.serving.__main__.serve", lambda engine, asked: 7)
    assert main(["--model", "m", "--adapters", str(tmp_path), "--max-batch", "4", "--quantise", "nf4"]) == 7
    # What is not given is left to the engine.
    assert given == [(("m",), {"adapters": tmp_path, "max_batch": 4, "quantise": "nf4"})]
    assert not caplog.records
    monkeypatch.delenv("PEFT_JAX_API_KEY")
    for host, warned in (("127.0.0.1", 0), ("localhost", 0), ("::1", 0), ("0.0.0.0", 1)):
        main(["--model", "m", "--host", host])
        assert len(caplog.records) == warned
    for wrong, why in (
        (["--adapters", str(tmp_path / "none")], "is not a directory"),
        (["--memory", "1.5"], "no share between 0 and 1"),
        (["--queue", "0"], "is less than 1"),
        (["--drain", "inf"], "no number of seconds"),
        (["--quantise", "int3"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            arguments(["--model", "m", *wrong])
        assert why in capsys.readouterr().err


def test_a_client_that_stops_reading_is_cut_off():
    engine = FakeEngine()
    engine.hold = 5
    app = Server(engine, Settings(send_seconds=0.05))
    body = json.dumps({**HELLO, "prompt": "x" * 200, "max_tokens": 150, "stream": True}).encode()
    sent = []

    async def talk():
        never = asyncio.Event()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return incoming.pop() if incoming else await never.wait()

        async def send(message):
            sent.append(message)
            if len(sent) == 3:
                await never.wait()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        async with app.lifespan(app.app):
            await asyncio.wait_for(app(scope, receive, send), 30)
            await app.worker.call(lambda engine: None)  # behind the cancel

    asyncio.run(talk())
    assert len(sent) == 3 and sent[0]["status"] == 200 and app.open == 0
    assert engine.cancelled == [0]


def test_bodies_that_are_slow():
    with (
        serving(settings=Settings(body_seconds=0.1)) as it,
        socket.create_connection(("127.0.0.1", it.port), 30) as client,
    ):
        client.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        assert b" 408 " in client.recv(4096)
        until(lambda: it.app.open == 0)


def test_a_client_that_leaves_while_it_sends(server):
    before = disconnects(server)
    with socket.create_connection(("127.0.0.1", server.port), 30) as client:
        client.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
    until(lambda: disconnects(server) == before + 1)
    assert server.app.open == 0 and not server.engine.submitted
