"""OpenAI's HTTP interface before an engine: asyncio here, the engine in a thread of its own.

    GET  /health /metrics /v1/models /v1/models/{id}
    POST /v1/completions /v1/chat/completions
    POST /v1/load_lora_adapter /v1/unload_lora_adapter     where directories are allowed; vLLM's names

See docs/serving_server.md.

Departures: a stream's status line waits for its first token, so that what is refused or given up before is answered
with its own status; logprobs of −∞ are told as -9999.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from peft_jax.serving import allowed, answers, metrics, protocol
from peft_jax.serving.calls import Call, Events, Gone, unless_gone
from peft_jax.serving.events import Engine
from peft_jax.serving.prompts import tokenise
from peft_jax.serving.refusals import on_error, on_http, on_refused, refusal, unknown
from peft_jax.serving.requests import Refused, Sampling
from peft_jax.serving.store import AdapterInfo
from peft_jax.serving.worker import Worker

logger = logging.getLogger(__name__)
OPEN_PATHS = ("/health",)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Args:
        api_key: what clients must send as a bearer token; None leaves all open.
        allow_loading: directories from which clients may load adapters; none: they may not.
        queue: choices that may be waited for at a time; what comes beyond is answered with 429.
        body_limit: bytes of a request.
        body_seconds: how long a request may take to come in.
        send_seconds: how long a client may leave what it is sent unread.
        most_choices: prompts times n of one request.
    """

    api_key: str | None = None
    allow_loading: tuple[Path, ...] = ()
    queue: int = 256
    body_limit: int = 1 << 20
    body_seconds: float = 30.0
    send_seconds: float = 60.0
    most_choices: int = 128


class Server:
    """An ASGI application; its lifespan starts and ends the engine's thread.

    Args:
        engine: what answers; nobody else may call it.
        settings: keys, directories and bounds.
    """

    def __init__(self, engine: Engine, settings: Settings = Settings()) -> None:
        self.settings = settings
        self.base, self.tokenizer, self.context = engine.model_name, engine.tokenizer, engine.limits.context
        self.worker = Worker(engine)
        self.metrics = metrics.Metrics()
        self.pieces = answers.Pieces(self.tokenizer)
        self.draining = False
        self.open = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._stats: dict[str, float] = {}
        self._started = 0
        # Its file may ask for truncation or padding: the first call turns them off, before there are other threads.
        self.tokenizer("")
        # One thread: long prompts must not hold up the event loop, nor take more than a core.
        self._tokenising = ThreadPoolExecutor(1, "tokenise")
        get, post = functools.partial(Route, methods=["GET"]), functools.partial(Route, methods=["POST"])
        self.app = Starlette(
            routes=[
                get("/health", self.health),
                get("/metrics", self.report),
                get("/v1/models", self.models),
                get("/v1/models/{name:path}", self.model),
                post("/v1/completions", functools.partial(self.generate, read=protocol.completion)),
                post("/v1/chat/completions", functools.partial(self.generate, read=protocol.chat)),
                post("/v1/load_lora_adapter", self.load),
                post("/v1/unload_lora_adapter", self.unload),
            ],
            exception_handlers={
                Refused: on_refused,
                Gone: self.on_gone,
                HTTPException: on_http,
                Exception: on_error,
            },
            lifespan=self.lifespan,
        )
        self.paths = {route.path for route in self.app.routes if isinstance(route, Route)}

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        self._started = int(time.time())
        yield
        if not await asyncio.to_thread(self.worker.stop):
            logger.warning("The engine is still at a step: its thread ends with the process")
        self._tokenising.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keys first, for every path but /health; then the routes; every answer is counted."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        if scope["path"].startswith("/v1/models/"):
            path = "/v1/models/{name:path}"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.answers.labels(path, str(message["status"])).inc()
            await send(message)

        if scope["path"] not in OPEN_PATHS and not self._may_enter(scope):
            refused = Refused("A valid API key is needed: send Authorization: Bearer KEY.", 401, code="invalid_api_key")
            await refusal(refused)(scope, receive, counted)
        else:
            await self.app(scope, receive, counted)

    def _may_enter(self, scope: Scope) -> bool:
        if self.settings.api_key is None:
            return True
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = sent.partition(b" ")
        # Of digests, so that the time tells nothing of the key's length either.
        equal = hmac.compare_digest(
            hashlib.sha256(key.strip()).digest(), hashlib.sha256(self.settings.api_key.encode()).digest()
        )
        return equal and scheme.lower() == b"bearer"

    async def drain(self, seconds: float) -> None:
        """Refuses what comes from now on, lets what runs finish for so long, then ends it with a reason."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._calm.wait(), seconds)
        if self.open:
            logger.warning("%d choices were not finished in %g s, and are cancelled", self.open, seconds)
            self.worker.abandon("The server is shutting down.")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._calm.wait(), 5.0)

    # -- what the server is and has -----------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """200 where requests are served; 503 while draining, and once the engine has stopped."""
        state = "ok" if self.worker.alive else "engine stopped"
        if self.draining:
            state = "draining"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def report(self, request: Request) -> Response:
        """Prometheus text; the engine's last known numbers where it is at a long step, or is no more."""
        with contextlib.suppress(Refused, TimeoutError):
            self._stats = await asyncio.wait_for(self.worker.call(lambda engine: dict(engine.stats())), 2.0)
        self.metrics.open.set(self.open)
        now = {"engine_up": int(self.worker.alive), "engine_step_seconds": self.worker.step_seconds}
        text = self.metrics.text({**now, **self._stats})
        return Response(text, media_type=metrics.CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        """The base, and the adapters on it."""
        return JSONResponse({"object": "list", "data": await self._cards()})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        for card in await self._cards():
            if card["id"] == name:
                return JSONResponse(card)
        raise unknown(name)

    async def _cards(self) -> list[dict[str, Any]]:
        return [self._card(None), *map(self._card, await self.worker.call(_served))]

    def _card(self, info: AdapterInfo | None) -> dict[str, Any]:
        card = {"object": "model", "created": self._started, "owned_by": "peft_jax", "max_model_len": self.context}
        if info is None:
            return {"id": self.base, **card, "root": self.base, "parent": None}
        more = {"rank": info.rank, "state": info.state, "users": info.users}
        return {"id": info.name, **card, "root": info.directory, "parent": self.base, **more}

    # -- adapters -----------------------------------------------------------------------------------------------------

    async def load(self, request: Request) -> Response:
        """Registers an adapter: lora_name, lora_path; load_inplace for one whose name is taken."""
        fields = await self._loading(request)
        name, path = fields.need("lora_name", "a string"), fields.need("lora_path", "a string")
        instead = fields.take("load_inplace", "true or false", False)
        fields.end()
        allowed.name(name, taken=[self.base])
        found = await asyncio.to_thread(allowed.directory, path, self.settings.allow_loading)

        def go(engine: Engine) -> AdapterInfo:
            allowed.name(name, taken=[] if instead else [info.name for info in _served(engine)])
            engine.load(name, str(found))
            return next(info for info in _served(engine) if info.name == name)

        return JSONResponse(self._card(await self._adapters(go, f"lora_path {path!r}")))

    async def unload(self, request: Request) -> Response:
        """Forgets an adapter: lora_name.  Requests that use it are finished first."""
        fields = await self._loading(request)
        name = fields.need("lora_name", "a string")
        fields.end()

        def go(engine: Engine) -> None:
            if name not in [info.name for info in _served(engine)]:
                raise unknown(name)
            engine.unload(name)

        await self._adapters(go, f"lora_name {name!r}")
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    async def _loading(self, request: Request) -> protocol.Fields:
        if not self.settings.allow_loading:
            raise Refused("Loading and unloading is off: start the server with --allow-loading DIR.", status=403)
        self._take_in()
        return protocol.Fields(protocol.read_json(await self._body(request)))

    async def _adapters(self, go: Callable[[Engine], Any], what: str) -> Any:
        """What an adapter's files are at fault for is the client's to know; it is not the engine's end."""
        try:
            return await self.worker.call(go)
        except (ValueError, OSError, KeyError) as error:
            logger.warning("%s: %s", what, error)
            raise Refused(f"{what} cannot be served: {error}") from error

    # -- answers ------------------------------------------------------------------------------------------------------

    async def generate(self, request: Request, read: Callable[[dict[str, Any], int], protocol.Ask]) -> Response:
        """Both endpoints: `read` tells them apart."""
        arrived = self.worker.clock()
        self._take_in()
        self._make_room(1)
        self.count(1)  # a place for a body that is read and made tokens of
        try:
            ask = read(protocol.read_json(await self._body(request)), self.settings.most_choices)
            loop = asyncio.get_running_loop()
            prompts = await loop.run_in_executor(self._tokenising, tokenise, self.tokenizer, ask, self.context)
        finally:
            self.count(-1)
        samplings = [sampling for _, most in prompts for sampling in ask.samplings(most)]
        self._make_room(len(samplings))
        self._take_in()  # it may have begun to drain meanwhile
        shape = answers.Shape(ask, [len(prompt) for prompt, _ in prompts], self.pieces)
        call = Call(self.worker, shape, self.metrics, self.count, arrived)
        try:
            await self._submit(call, ask.model, [prompt for prompt, _ in prompts for _ in range(ask.n)], samplings)
            first = await unless_gone(request.receive, call.next())
            if ask.stream:
                return Events(call, first, self.settings.send_seconds)  # which closes the call
            answer = await unless_gone(request.receive, call.whole(first))
        except BaseException:
            call.close()
            raise
        call.close()
        return JSONResponse(answer)

    async def _submit(
        self, call: Call, model: str, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
    ) -> None:
        adapter = None if model == self.base else model
        try:
            await self.worker.submit(call.stream, prompts, samplings, adapter)
        except Refused as refused:
            if refused.status == 404 and refused.code is None:
                raise unknown(model) from refused
            raise

    async def on_gone(self, request: Request, error: Exception) -> Response:
        """Nobody reads this answer, but the log has its status."""
        self.metrics.disconnects.inc()
        return Response(status_code=499)

    def _take_in(self) -> None:
        if self.draining:
            raise Refused("The server is shutting down.", status=503, retry_after=5.0)

    def _make_room(self, count: int) -> None:
        if count > self.settings.queue:
            raise Refused(f"{count} choices are more than the queue of {self.settings.queue} holds.", param="n")
        if self.open + count > self.settings.queue:
            raise Refused("The queue is full: try again later.", status=429, retry_after=1.0, code="queue_full")

    def count(self, more: int) -> None:
        """How many choices are waited for."""
        self.open += more
        (self._calm.clear if self.open else self._calm.set)()

    async def _body(self, request: Request) -> bytes:
        # What browsers send to other sites without asking is never application/json.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("Content-Type must be application/json.", status=415)
        limit = self.settings.body_limit
        large = Refused(f"The body must have at most {limit} bytes.", status=413)
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limit:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise large
        except ClientDisconnect:
            raise Gone from None
        except TimeoutError:
            raise Refused(f"The body took more than {self.settings.body_seconds:g} s.", status=408) from None
        return bytes(body)


def _served(engine: Engine) -> list[AdapterInfo]:
    """Without loads that only finish what they have: another may go by the same name."""
    return [info for info in engine.adapters() if info.state != "draining"]
