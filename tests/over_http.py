"""A server on loopback, in a thread, and what waits for it."""

import contextlib
import threading
import time

import httpx2
import openai
import uvicorn
from fake_engine import FakeEngine

from peft_jax.serving.__main__ import Runner
from peft_jax.serving.server import Server, Settings

HELLO = {"model": "toy/base", "prompt": "Hello", "max_tokens": 100}


class Serving:
    """A server on a free port, in a thread."""

    def __init__(self, engine, settings=Settings(), drain=30.0):  # noqa: B008
        self.engine, self.app = engine, Server(engine, settings)
        config = uvicorn.Config(self.app, port=0, log_level="error", http="h11", ws="none", timeout_graceful_shutdown=5)
        self.runner = Runner(config, self.app, drain)
        self.thread = threading.Thread(target=self.runner.run)
        self.thread.start()
        until(lambda: self.runner.started)
        self.port = self.runner.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx2.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key=settings.api_key or "none", max_retries=0)

    def rest(self):
        """As it was, for the next test."""
        self.engine.paused, self.engine.room, self.engine.hold = False, 1000, 10**9
        until(lambda: not self.engine.running and self.app.open == 0)
        self.engine.cancelled.clear()
        self.engine.submitted.clear()

    def stop(self):
        self.http.close()
        self.client.close()
        if self.thread.is_alive():
            self.engine.paused, self.engine.hold = False, 10**9
            self.runner.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(engine=None, **options):
    it = Serving(engine or FakeEngine(), **options)
    try:
        yield it
    finally:
        it.stop()


def until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def in_thread(fn):
    """Runs `fn` beside the test; gives what waits for its result."""
    found = []

    def run():
        try:
            found.append(fn())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(60)
        assert found, "no answer"
        return found[0]

    return result
