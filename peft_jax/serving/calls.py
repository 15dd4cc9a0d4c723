"""A generating request, from its queueing to its answer or its client's leaving."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from peft_jax.serving import answers, metrics
from peft_jax.serving.events import Event
from peft_jax.serving.requests import Refused
from peft_jax.serving.worker import Stream, Worker


class Gone(Exception):
    """The client has left."""


class Call:
    """One request with all its choices.

    Args:
        worker: what drives the engine.
        shape: what the answer looks like.
        numbers: what times are told to.
        count: is told of choices that are waited for from now on, and no longer.
        arrived: when the request came, by the worker's clock.
    """

    def __init__(
        self,
        worker: Worker,
        shape: answers.Shape,
        numbers: metrics.Metrics,
        count: Callable[[int], None],
        arrived: float,
    ) -> None:
        self.shape, self.metrics, self.count = shape, numbers, count
        self.left = self.counted = len(shape.generated)
        self.stream = Stream(worker, asyncio.get_running_loop())
        self.clocks = [metrics.Clock(numbers, arrived) for _ in shape.generated]
        count(self.counted)

    async def next(self) -> tuple[int, Event]:
        """The next event of any choice.

        Raises:
            Refused: where a choice ended without an answer; the others are then given up.
        """
        now, index, event = await self.stream.next()
        wrong = answers.failed(event)
        self.shape.take(index, event)
        self.clocks[index].see(now, len(event.tokens), done=event.finish is not None and wrong is None)
        self.left -= event.finish is not None
        if wrong is not None:
            raise wrong
        return index, event

    async def whole(self, first: tuple[int, Event]) -> dict[str, Any]:
        """The answer in one piece."""
        events: list[list[Event]] = [[] for _ in self.clocks]
        events[first[0]].append(first[1])
        while self.left:
            index, event = await self.next()
            events[index].append(event)
        return self.shape.whole(events)

    async def chunks(self, first: tuple[int, Event]) -> AsyncIterator[bytes]:
        """The answer as server-sent events; what goes wrong on the way is told in the last."""
        for chunk in self.shape.opening():
            yield chunk
        try:
            yield self.shape.chunk(*first)
            while self.left:
                yield self.shape.chunk(*await self.next())
        except Refused as refused:
            yield answers.sse(answers.error(refused))
            yield b"data: [DONE]\n\n"
            return
        for chunk in self.shape.closing():
            yield chunk

    def close(self) -> None:
        """Gives up what is not finished; may be called again."""
        self.stream.close()
        self.count(-self.counted)
        self.counted = 0


class Events(Response):
    """A stream of events, given up when its reader leaves or reads nothing for `patience` seconds."""

    def __init__(self, call: Call, first: tuple[int, Event], patience: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nor may nginx hold chunks back
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.call, self.first, self.patience = call, first, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(message: Message) -> None:
            async with asyncio.timeout(self.patience):
                await send(message)

        async def pump() -> None:
            await tell({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self.call.chunks(self.first):
                if chunk:
                    await tell({"type": "http.response.body", "body": chunk, "more_body": True})
            await tell({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_gone(receive, pump())
        except (Gone, OSError):  # a TimeoutError is an OSError
            self.call.metrics.disconnects.inc()
        finally:
            self.call.close()


async def unless_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """Awaits `work`; once the client disconnects it is cancelled, and `Gone` raised."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(listen())
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Gone
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)
