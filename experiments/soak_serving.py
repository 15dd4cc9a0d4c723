"""A server under a load that does it no good, for a bounded time, on loopback; what must hold afterwards is checked.

    python -m experiments.soak_serving [--seconds 120] [--model PATH] [--clients 8] [--seed 0]

Clients ask for whole and streamed answers under adapters of many ranks, leave in the middle, send what is malformed,
load and unload adapters; one adapter is cut short, one holds NaN, one is larger than the pool, and the others do not
fit into it together.  At the end

    every request had an answer, or a refusal with a reason and no status of 500
    nothing runs or waits, no row is held by a request, and rows add up
    the server's memory has stopped growing: the last third against the middle one
    it ends with 0 on SIGTERM

or the command fails, naming what does not hold.  It prints counts as JSON.
"""

import argparse
import collections
import contextlib
import http.client
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from experiments import serving_adapters
from experiments.data import smollm2
from experiments.demo_serve import free_port, get, wait_for
from peft_jax import models

RANKS = (1, 4, 8, 24)
GOOD, ROWS, CONTEXT, QUEUE = 12, 2048, 96, 24
GROWTH = 1.05  # of memory, last third of the time against the middle one


class Answer(NamedTuple):
    """What came of a request: its status, whether it ended as it should, and what was said of it."""

    kind: str
    status: int
    whole: bool
    reason: str = ""


def prepare(folder: Path, model: Any, rows: int) -> list[str]:
    """Good adapters, and bad ones: the names of all."""
    names = serving_adapters.write(folder, model, GOOD, ranks=RANKS)
    spec = model.forward.spec
    width = spec.kv_heads * spec.head_dim
    large = rows * width // (2 * (spec.width + width)) + 8  # directions of q and v that overfill the pool
    serving_adapters.write(folder / "sized", model, 1, ranks=(large,))
    (folder / "sized" / "adapter-0000").rename(folder / "too-large")
    (folder / "sized").rmdir()
    for name in ("cut", "nan"):
        shutil.copytree(folder / names[0], folder / name)
        file = folder / name / "adapter_model.safetensors"
        if name == "cut":
            file.write_bytes(file.read_bytes()[:-50])
        else:
            save_file({key: np.full_like(x, np.nan) for key, x in load_file(file).items()}, file)
    return [*names, "too-large", "cut", "nan"]


class Soak:
    """Clients of one server."""

    def __init__(self, port: int, base: str, names: list[str], folder: Path, seed: int, until: float) -> None:
        self.port, self.base, self.names, self.folder, self.seed, self.until = port, base, names, folder, seed, until
        self.answers = list[Answer]()

    def client(self, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        actions = [self.whole, self.stream, self.leave, self.malformed, self.wrong, self.look, self.load]
        while time.monotonic() < self.until:
            (action,) = chance.choices(actions, (6, 6, 4, 1, 2, 1, 1))
            try:
                self.answers.append(action(chance))
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.answers.append(Answer(action.__name__, 0, False, f"{type(error).__name__}: {error}"))

    def ask(self, chance: random.Random, **more: Any) -> dict[str, Any]:
        model = chance.choice([self.base, *self.names])
        words = " ".join(chance.choice(("sea", "law", "one", "two", "of", "the")) for _ in range(chance.randint(1, 12)))
        asked = {
            "model": model,
            "prompt": words,
            "max_tokens": chance.randint(1, 24),
            "temperature": chance.choice((0, 1)),
        }
        return asked | more

    @contextlib.contextmanager
    def post(self, path: str, body: bytes) -> Iterator[http.client.HTTPResponse]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as line:
            line.request("POST", path, body, {"Content-Type": "application/json"})
            with line.getresponse() as answer:
                yield answer

    def refused(self, kind: str, answer: http.client.HTTPResponse) -> Answer:
        error = json.loads(answer.read()).get("error", {})
        return Answer(kind, answer.status, bool(error.get("message")), str(error.get("message", "")))

    def whole(self, chance: random.Random) -> Answer:
        with self.post("/v1/completions", json.dumps(self.ask(chance)).encode()) as answer:
            if answer.status != 200:
                return self.refused("whole", answer)
            (choice,) = json.loads(answer.read())["choices"]
        return Answer("whole", 200, choice["finish_reason"] in ("stop", "length"))

    def stream(self, chance: random.Random) -> Answer:
        ended, done, error = False, False, ""
        with self.post("/v1/completions", json.dumps(self.ask(chance, stream=True)).encode()) as answer:
            if answer.status != 200:
                return self.refused("stream", answer)
            for row in answer:
                data = row.decode().strip().removeprefix("data:").strip()
                done = done or data == "[DONE]"
                if data and data != "[DONE]":
                    event = json.loads(data)
                    error = error or event.get("error", {}).get("message", "")
                    ended = ended or any(c["finish_reason"] for c in event.get("choices", ()))
        return Answer("stream", 200, (ended and done) or bool(error), error)

    def leave(self, chance: random.Random) -> Answer:
        asked = self.ask(chance, stream=True, max_tokens=60)
        with self.post("/v1/completions", json.dumps(asked).encode()) as answer:
            if answer.status != 200:
                return self.refused("leave", answer)
            answer.read(chance.randint(1, 60))
        return Answer("leave", 200, True)

    def malformed(self, chance: random.Random) -> Answer:
        body = chance.choice((b"", b"{", b"[]", b'{"model": 1}', b'{"prompt": "x"}', b"\xff\xfe", b"null"))
        with self.post("/v1/completions", body) as answer:
            return self.refused("malformed", answer)

    def wrong(self, chance: random.Random) -> Answer:
        more: dict[str, Any] = chance.choice(
            ({"model": "nobody"}, {"max_tokens": 10**6}, {"temperature": -1}, {"prompt": []}, {"tools": [1]}, {"n": 0})
        )
        with self.post("/v1/completions", json.dumps(self.ask(chance) | more).encode()) as answer:
            return self.refused("wrong", answer)

    def look(self, chance: random.Random) -> Answer:
        get(self.port, chance.choice(("/metrics", "/v1/models", "/health")))
        return Answer("look", 200, True)

    def load(self, chance: random.Random) -> Answer:
        name = f"extra-{chance.randint(0, 3)}"
        fields = {"lora_name": name, "lora_path": str(self.folder / chance.choice(self.names[:GOOD]))}
        path = chance.choice(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"))
        with self.post(path, json.dumps(fields if "unload" not in path else {"lora_name": name}).encode()) as answer:
            return Answer("load", 200, True) if answer.status == 200 else self.refused("load", answer)


def soak(model: Path, seconds: float, clients: int, seed: int, rows: int = ROWS) -> dict[str, Any]:
    """Runs it, and gives the counts.

    Raises:
        RuntimeError: with all that does not hold.
    """
    with tempfile.TemporaryDirectory() as place, (Path(place) / "log").open("w+") as log:
        folder, port = Path(place), free_port()
        names = prepare(folder, models.load(model), rows)
        options = ["--model", str(model), "--adapters", place, "--allow-loading", place, "--port", str(port)]
        options += ["--rows", str(rows), "--context", str(CONTEXT), "--queue", str(QUEUE), "--max-batch", "4"]
        server = subprocess.Popen([sys.executable, "-m", "peft_jax.serving", *options], stdout=log, stderr=log)
        try:
            wait_for(server, port, log)
            base = json.loads(get(port, "/v1/models"))["data"][0]["id"]
            load = Soak(port, base, names, folder, seed, time.monotonic() + seconds)
            threads = [threading.Thread(target=load.client, args=[i]) for i in range(clients)]
            for thread in threads:
                thread.start()
            memory = list[int]()
            while any(thread.is_alive() for thread in threads):
                memory.append(resident(server.pid))
                time.sleep(seconds / 60)
            state = at_rest(port)
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(timeout=90)
    wrong = faults(load.answers, state, memory, status, clients)
    counts = collections.Counter(f"{a.kind} {a.status}" for a in load.answers)
    found = {"answers": dict(sorted(counts.items())), "state": state, "memory": memory[:: max(1, len(memory) // 6)]}
    if wrong:
        raise RuntimeError("; ".join(wrong) + f" ({json.dumps(found)})")
    return found


def faults(answers: list[Answer], state: dict[str, float], memory: list[int], status: int, clients: int) -> list[str]:
    """What does not hold."""
    # A damaged adapter is the server's own fault, and may be told as one.
    bad = [a for a in answers if not a.whole or (a.status == 500 and not a.reason.startswith("adapter "))]
    found = [f"{a.kind} was answered with {a.status}, {a.reason!r}" for a in bad]
    if state["requests_running"] or state["requests_waiting"] or state["rows_kv"]:
        found.append(f"requests are left over: {state}")
    if state["rows_free"] + state["rows_adapters"] + state["rows_prefixes"] != state["rows_total"]:
        found.append(f"rows do not add up: {state}")
    third = len(memory) // 3
    if third and np.median(memory[-third:]) > GROWTH * np.median(memory[third : 2 * third]):
        found.append(f"memory grows: {memory}")
    if status:
        found.append(f"the server ended with {status}")
    return found


def at_rest(port: int, seconds: float = 60) -> dict[str, float]:
    """The engine's gauges once nothing runs."""
    until, state = time.monotonic() + seconds, dict[str, float]()
    while time.monotonic() < until:
        rows = (line.rpartition(" ") for line in get(port, "/metrics").splitlines() if not line.startswith("#"))
        state = {name.removeprefix("peft_jax_"): float(value) for name, _, value in rows if "{" not in name}
        if not state["requests_running"] + state["requests_waiting"]:
            break
        time.sleep(0.2)
    return {
        k: v for k, v in state.items() if k.startswith(("requests_", "rows_", "adapter", "preempt", "tokens", "host"))
    }


def resident(pid: int) -> int:
    """Megabytes that a process has in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(json.dumps(soak(asked.model or smollm2(), asked.seconds, asked.clients, asked.seed), indent=2))


if __name__ == "__main__":
    main()
