"""A server for one model and a hundred adapters: started, asked by eight clients at once, and stopped.

    make demo-serve     (or: python -m experiments.demo_serve)

SmolLM2-135M-Instruct is served with LoRA adapters of rank 8 on queries and values, read from disk when they are asked
for.  Each client streams an answer under an adapter of its own, over OpenAI's HTTP interface; their tokens come
interleaved, since all of them run in one batch.  Everything it writes is under runs/demo_serve.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from experiments import serving_adapters
from experiments.data import smollm2
from peft_jax import models

ADAPTERS, CLIENTS, TOKENS = 100, 8, 24
OUT = Path("runs/demo_serve")
PROMPT = "Write one sentence about the sea."
SHOWN = (
    "adapter_loads_total",
    "adapters_registered",
    "adapters_resident",
    "rows_",
    "tokens_generated",
    "finished_total",
)


def main() -> int:
    start = time.perf_counter()
    adapters = OUT / "adapters"
    names = serving_adapters.write(adapters, models.load(smollm2()), ADAPTERS)
    print(f"{len(names)} adapters in {adapters} ({time.perf_counter() - start:.0f} s)\n")
    port = free_port()
    options = ["--model", str(smollm2()), "--adapters", str(adapters), "--port", str(port), "--context", "256"]
    log = (OUT / "server.log").open("w+")
    server = subprocess.Popen([sys.executable, "-m", "peft_jax.serving", *options], stdout=log, stderr=log)
    try:
        wait_for(server, port, log)
        print(f"serving at http://127.0.0.1:{port} after {time.perf_counter() - start:.0f} s; one answer each:\n")
        base = json.loads(get(port, "/v1/models"))["data"][0]["id"]
        ask_all(port, [base, *names[:: ADAPTERS // CLIENTS][: CLIENTS - 1]])
        metrics = [line for line in get(port, "/metrics").splitlines() if any(name in line for name in SHOWN)]
        print("\n" + "\n".join(line for line in metrics if not line.startswith("#")))
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=60)
    print(f"\nthe server has drained and ended with {status}; {time.perf_counter() - start:.0f} s in all")
    return status


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for(server: subprocess.Popen[bytes], port: int, log: IO[str], seconds: float = 300) -> None:
    """Until the server answers.

    Raises:
        RuntimeError: if it ends first, or takes longer, with the end of its log.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            if "ok" in get(port, "/health"):
                return
        except OSError:
            time.sleep(0.3)
    log.seek(0)
    raise RuntimeError(f"the server did not come up: {log.read()[-2000:]}")


def get(port: int, path: str) -> str:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as line:
        line.request("GET", path)
        return line.getresponse().read().decode()


def stream(port: int, model: str, prompt: str) -> Iterator[str]:
    """An answer's pieces, as they come."""
    asked = {"model": model, "max_tokens": TOKENS, "stream": True, "messages": [{"role": "user", "content": prompt}]}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as line:
        line.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
        answer = line.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{model}: {answer.status} {answer.read().decode()}")
        for row in answer:
            data = row.decode().strip().removeprefix("data:").strip()
            if data and data != "[DONE]":
                for choice in json.loads(data)["choices"]:
                    yield choice["delta"].get("content") or ""


def ask_all(port: int, asked: list[str]) -> None:
    """Asks all at once, prints how their pieces came, and then each answer."""
    answers, order, failed = dict.fromkeys(asked, ""), list[int](), list[Exception]()

    def ask(number: int, name: str) -> None:
        try:
            for piece in stream(port, name, PROMPT):
                answers[name] += piece
                order.append(number)
        except Exception as error:  # shown where all are back
            failed.append(error)

    threads = [threading.Thread(target=ask, args=each) for each in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    print("pieces by client, as they came:", "".join(map(str, order)), "\n")
    for number, name in enumerate(asked):
        print(f"{number}  {name:28}{json.dumps(answers[name])}")


if __name__ == "__main__":
    os.makedirs(OUT, exist_ok=True)
    sys.exit(main())
