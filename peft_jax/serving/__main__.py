"""Serves a model and its adapters over HTTP.

    python -m peft_jax.serving --model SmolLM2-135M-Instruct.Q4_1.gguf --adapters adapters/

Each directory in `--adapters` that holds an adapter is served under its own name; the base under the model's name.
Ends with 0 on SIGTERM or SIGINT, once what runs is finished; a second signal ends it at once.
"""

import argparse
import asyncio
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from peft_jax.serving.server import Server, Settings

logger = logging.getLogger("peft_jax.serving")
KEY = "PEFT_JAX_API_KEY"
ENGINE = ("adapters", "rows", "memory", "max_batch", "context", "policy", "dtype", "quantise", "tensor")


class Runner(uvicorn.Server):
    """Uvicorn, but a signal first drains: new requests are answered with 503, and what runs is finished.

    Args:
        config: Uvicorn's.
        app: what it serves.
        drain: seconds to finish in.
    """

    def __init__(self, config: uvicorn.Config, app: Server, drain: float) -> None:
        super().__init__(config)
        self.app, self.seconds = app, drain
        self.loop: asyncio.AbstractEventLoop | None = None
        self.drainage: asyncio.Task[None] | None = None
        self.signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until a signal; unlike Uvicorn's, it does not raise the signal again behind it."""
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once."""
        self.signals += 1
        if self.signals == 1 and self.started and self.loop is not None:
            self.loop.call_soon_threadsafe(self._begin)
        else:
            self.should_exit = True
            self.force_exit = self.signals > 1

    def _begin(self) -> None:
        logger.warning("Draining: %d choices have %g s to finish", self.app.open, self.seconds)
        self.drainage = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        try:
            await self.app.drain(self.seconds)
        finally:
            self.should_exit = True


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked before anything is loaded."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_jax.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a GGUF file, a Hugging Face directory, or a Hub name")
    add("--adapters", type=_directory, metavar="DIR", help="a directory of adapters' directories")
    add("--host", default="127.0.0.1", help="the address to listen at (%(default)s: this machine alone)")
    add("--port", type=_whole(0), default=8000, help="%(default)s; 0: any that is free")
    add("--api-key", default=os.environ.get(KEY) or None,
        help=f"what clients must send as a bearer token; better in {KEY}, since others see command lines")  # fmt: skip
    add("--allow-loading", type=_directory, nargs="+", default=[], metavar="DIR",
        help="let clients load adapters from below these directories, and unload any")  # fmt: skip
    add("--queue", type=_whole(1), default=256, help="choices waited for at a time; 429 beyond (%(default)s)")
    add("--body-limit", type=_whole(1), default=1 << 20, metavar="BYTES", help="of a request (%(default)s)")
    add("--drain", type=_seconds, default=30.0, metavar="SECONDS", help="to finish in on SIGTERM (%(default)s)")
    engine = parser.add_argument_group("the engine")
    engine.add_argument("--rows", type=_whole(1), help="rows of the pool; by default, what --memory leaves room for")
    engine.add_argument("--memory", type=_share, help="the share of the device's memory for model and pool")
    engine.add_argument("--max-batch", type=_whole(1), help="requests that run at a time")
    engine.add_argument("--context", type=_whole(1), help="tokens of prompt and answer together")
    engine.add_argument("--policy", choices=["fcfs", "cluster", "abort", "fair"], help="who runs next")
    engine.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and activations")
    engine.add_argument("--quantise", choices=["none", "nf4", "int4"], help="the base's weights")
    engine.add_argument("--tensor", type=_whole(1), metavar="N", help="devices that share the model (tensor parallel)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the engine, then serves; gives the exit status."""
    asked = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
    if asked.api_key is None and not _loopback(asked.host):
        logger.warning("%s is open to other machines, and no API key is asked for: set %s", asked.host, KEY)
    from peft_jax.serving.building import build_engine  # JAX, and minutes of loading

    # What is not given is left to the engine's defaults.
    given: dict[str, Any] = {name: getattr(asked, name) for name in ENGINE if getattr(asked, name) is not None}
    return serve(build_engine(asked.model, **given), asked)


def serve(engine: Any, asked: argparse.Namespace) -> int:
    """Serves an engine until a signal."""
    settings = Settings(
        api_key=asked.api_key,
        allow_loading=tuple(asked.allow_loading),
        queue=asked.queue,
        body_limit=asked.body_limit,
    )
    app = Server(engine, settings)
    config = uvicorn.Config(
        app,
        host=asked.host,
        port=asked.port,
        http="h11",
        ws="none",
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    runner = Runner(config, app, asked.drain)
    runner.run()
    if app.worker.running:  # a step that does not end must not keep the process
        logging.shutdown()
        os._exit(1 if runner.force_exit else 0)
    return 1 if runner.force_exit else 0


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def _whole(least: int) -> Any:
    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return whole_number


def _seconds(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return float(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return float(text)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
