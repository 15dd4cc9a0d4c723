"""The thread that drives the engine.

Coroutines give it commands; it obeys them between two steps, and hands what the steps give to the coroutines' event
loop, one call a step.  While the engine has nothing to do, the thread sleeps in `queue.get`.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from peft_jax.serving.events import Engine, Event
from peft_jax.serving.requests import Refused, Sampling

T = TypeVar("T")
PAUSE = 0.001  # seconds between steps that did nothing, where an engine waits for a load
logger = logging.getLogger(__name__)


class Stream:
    """The events of one call's requests, in order; `index` is a request's place in what was submitted.

    Its queue needs no bound: a request makes at most as many events as it may generate tokens.
    """

    def __init__(self, worker: "Worker", loop: asyncio.AbstractEventLoop) -> None:
        self.worker, self.loop = worker, loop
        self.queue: asyncio.Queue[tuple[float, int, Event]] = asyncio.Queue()
        self.closed = False

    async def next(self) -> tuple[float, int, Event]:
        """The clock's time, the request's index, and its event."""
        return await self.queue.get()

    def close(self) -> None:
        """Gives up what is not finished; may be called again."""
        if not self.closed:
            self.closed = True
            self.worker.forget(self)


class Worker:
    """Drives `engine` in a thread of its own, from `start` until `stop` or until the engine raises."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine, self.clock = engine, clock
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[tuple[Callable[[Engine], Any], Future[Any] | None] | None]
        self._commands = queue.SimpleQueue()
        self._routes: dict[int, tuple[Stream, int]] = {}  # of the engine's thread alone
        self._began: float | None = None
        self._lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def running(self) -> bool:
        """Whether the thread is there, be it at its last step."""
        return self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether requests can be served."""
        return self._thread.is_alive() and not self._ended

    @property
    def step_seconds(self) -> float:
        """How long the engine has been at its step by now: what grows without end hangs."""
        began = self._began
        return 0.0 if began is None else self.clock() - began

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> bool:
        """Ends the thread behind the step that it is at; False where that takes longer than `timeout` seconds."""
        self._commands.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    async def call(self, fn: Callable[[Engine], T]) -> T:
        """Runs `fn` on the engine between two steps.

        Raises:
            Refused: with status 503 where the engine is no more; and whatever `fn` raises.
        """
        future: Future[T] = Future()
        self._post(fn, future)
        return await asyncio.wrap_future(future)

    async def submit(
        self, stream: Stream, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], adapter: str | None
    ) -> None:
        """Queues all requests, or none of them where one is refused."""

        def go(engine: Engine) -> None:
            ids: list[int] = []
            try:
                for prompt, sampling in zip(prompts, samplings, strict=True):
                    ids.append(engine.submit(prompt, sampling, adapter))
            except Exception:
                for request in ids:
                    engine.cancel(request)
                raise
            self._routes.update((request, (stream, index)) for index, request in enumerate(ids))

        await self.call(go)

    def forget(self, stream: Stream) -> None:
        """Cancels what is left of a stream's requests."""

        def go(engine: Engine) -> None:
            for request in [request for request, (owner, _) in self._routes.items() if owner is stream]:
                del self._routes[request]
                engine.cancel(request)

        with contextlib.suppress(Refused):  # the engine is no more, and its requests with it
            self._post(go, None)

    def abandon(self, reason: str) -> None:
        """Cancels all requests, and tells their streams why."""

        def go(engine: Engine) -> None:
            for request in list(self._routes):
                engine.cancel(request)
            self._end_all("cancelled", reason)

        with contextlib.suppress(Refused):
            self._post(go, None)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _post(self, fn: Callable[[Engine], Any], future: "Future[Any] | None") -> None:
        """What has no future is the server's own: if that raises, the engine's books are wrong, and it ends."""
        with self._lock:  # so that no command comes behind the last look at the queue
            if self._ended:
                raise self._gone()
            self._commands.put((fn, future))

    def _gone(self) -> Refused:
        why = "has stopped" if self.failure is None else f"failed ({type(self.failure).__name__}; see the server's log)"
        return Refused(f"The engine {why}: restart the server.", status=503, code="engine_stopped")

    def _run(self) -> None:
        try:
            wait: float | None = 0.0
            while self._obey(wait):
                if self.engine.busy:
                    self._began = began = self.clock()
                    events = self.engine.step()
                    self._began = None
                    wait = 0.0 if events else max(0.0, PAUSE - (self.clock() - began))
                    self._deliver(events)
                else:
                    wait = None
        except BaseException as error:
            logger.exception("The engine failed, and %d requests with it", len(self._routes))
            self.failure, self._began = error, None
        finally:
            self._finish()

    def _obey(self, wait: float | None) -> bool:
        """Runs the commands that are there, waiting `wait` seconds for the first (None: as long as it takes)."""
        while True:
            try:
                command = self._commands.get(block=wait != 0.0, timeout=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            wait = 0.0
            fn, future = command
            if future is None:
                fn(self.engine)
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(self.engine))
                except Exception as error:
                    future.set_exception(error)

    def _deliver(self, events: Sequence[Event]) -> None:
        now = self.clock()
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Stream, int, Event]]] = {}
        for event in events:
            if event.request in self._routes:
                stream, index = self._routes[event.request]
                if event.finish is not None:
                    del self._routes[event.request]
                batches.setdefault(stream.loop, []).append((stream, index, event))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put, now, batch)
            except RuntimeError:  # the loop was closed: nobody listens
                continue

    def _end_all(self, finish: Any, reason: str) -> None:
        self._deliver([Event(request=request, finish=finish, reason=reason) for request in self._routes])

    def _finish(self) -> None:
        with self._lock:
            self._ended = True
        gone = self._gone()
        self._end_all("error", gone.reason)
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None and command[1] is not None and command[1].set_running_or_notify_cancel():
                command[1].set_exception(gone)
        try:
            self.engine.close()
        except Exception:
            logger.exception("The engine could not be closed")


def _put(now: float, batch: list[tuple[Stream, int, Event]]) -> None:
    for stream, index, event in batch:
        stream.queue.put_nowait((now, index, event))
