"""Several replicas of the server behind Ray Serve, which sends each request where its adapter is already.

    pip install "ray[serve]" "peft_jax[serving]"
    python -m experiments.ray_replicas [--model PATH] [--adapters DIR] [--replicas 2] [--address auto]

Each replica is a `peft_jax.serving.server.Server` with an engine of its own, on one host or many (``--address`` joins a
Ray cluster that runs).  The front reads a request's ``model`` and names it as Ray's multiplexed model id: Ray prefers
replicas that have had it, so that an adapter lies in one pool and not in all, and takes another when they are busy.
OpenAI's clients talk to the front; the answers, streams too, are passed on as they come.

    python -m experiments.ray_replicas --check        a small trial: what each replica has loaded, with affinity or not
"""

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from experiments import serving_adapters
from experiments.data import smollm2
from peft_jax import models

MOST = 64  # adapters that a replica tells Ray it has: what it truly has is the engine's business


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Replica:
    """One engine and its server, without a port: requests come by Ray."""

    def __init__(self, model: str, adapters: str, options: dict[str, Any]) -> None:
        from peft_jax.serving.building import build_engine
        from peft_jax.serving.server import Server

        self.server = Server(build_engine(model, adapters=adapters, **options))
        self.server.worker.start()

    @serve.multiplexed(max_num_models_per_replica=MOST)
    async def place(self, name: str) -> str:
        """Tells Ray that requests for this model are to come here; the engine loads it by itself."""
        return name

    async def stats(self) -> dict[str, float]:
        return {"pid": os.getpid(), **await self.server.worker.call(lambda engine: dict(engine.stats()))}

    async def ask(self, method: str, path: str, body: bytes) -> AsyncIterator[Any]:
        """Status and content type, then the answer's pieces."""
        if name := serve.get_multiplexed_model_id():
            await self.place(name)
        messages, given = asyncio.Queue[Any](), asyncio.Queue[Any]()
        given.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        call = asyncio.ensure_future(self.server(scope, given.get, messages.put))
        call.add_done_callback(lambda call: messages.put_nowait({"type": "end"}))
        try:
            while (message := await messages.get())["type"] != "end":
                if message["type"] == "http.response.start":
                    yield message["status"], dict(message["headers"]).get(b"content-type", b"").decode()
                elif message.get("body"):
                    yield message["body"]
        finally:  # a client that has gone
            given.put_nowait({"type": "http.disconnect"})
            await call


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Front:
    """Names each request's model to Ray, and passes the answer on."""

    def __init__(self, replicas: Any, affinity: bool = True) -> None:
        self.replicas, self.affinity = replicas, affinity

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        try:
            asked = json.loads(body) if body else {}
            name = str(asked.get("model", "")) if self.affinity else ""
        except (ValueError, AttributeError):
            return JSONResponse(
                {"error": {"message": "the body is no JSON object", "type": "invalid_request_error"}}, 400
            )
        handle = self.replicas.options(stream=True, multiplexed_model_id=name)
        answer = handle.ask.remote(request.method, request.url.path, body)
        status, kind = await anext(answer)
        return StreamingResponse(answer, status, media_type=kind)


def build(model: str, adapters: str, replicas: int, affinity: bool = True, **options: Any) -> Any:
    """The application, for `serve.run`."""
    front: Any = Front  # `serve.deployment` has made them deployments
    replica: Any = Replica
    return front.bind(replica.options(num_replicas=replicas).bind(model, adapters, options), affinity)


def check(model: str, adapters: str, names: list[str], replicas: int, rounds: int = 3) -> dict[str, Any]:
    """How many loads it takes until each adapter has answered `rounds` times, with affinity and without."""
    import httpx2

    found = dict[str, Any]()
    for affinity in (True, False):
        serve.run(build(model, adapters, replicas, affinity, context=128, max_batch=4, rows=8192, warm_up=False))
        with httpx2.Client(base_url="http://127.0.0.1:8000", timeout=600) as client:
            for _ in range(rounds):
                for name in names:
                    asked = {"model": name, "prompt": "The sea is", "max_tokens": 4, "temperature": 0}
                    client.post("/v1/completions", json=asked).raise_for_status()
        handle = serve.get_deployment_handle("Replica", "default")
        each = dict[float, dict[str, float]]()
        for _ in range(40):  # Ray answers from whichever replica it likes
            stats = handle.stats.remote().result()
            each[stats["pid"]] = stats
        loads = [int(stats["adapter_loads_total"]) for stats in each.values()]
        found["affinity" if affinity else "any replica"] = {"loads": loads, "adapters": len(names), "rounds": rounds}
        serve.delete("default")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--adapters", default=None)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--address", default=None)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    ray.init(address=asked.address, include_dashboard=False)
    model = asked.model or str(smollm2())
    if asked.check:
        with tempfile.TemporaryDirectory() as place:
            names = serving_adapters.write(Path(place), models.load(model), 6)
            print(json.dumps(check(model, place, names, asked.replicas), indent=2))
        return
    serve.run(build(model, asked.adapters or "", asked.replicas), blocking=True)


if __name__ == "__main__":
    main()
