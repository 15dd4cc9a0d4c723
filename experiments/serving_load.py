"""Load on a serving system, and what it made of it: an open loop from a trace, a closed loop, and their measures.

A system is anything with `submit`, `step`, `busy` and `cancel`: the engine behind `Served`, or one of its rivals in
`experiments.serving_sides`.  In the open loop requests come at the trace's times, whatever the system does; what a slow
step delays counts against it, since a request's clock starts at its time in the trace.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.serving_trace import Asked, prompt_of
from peft_jax.serving.engine import Engine
from peft_jax.serving.requests import Refused, Sampling

DONE = ("stop", "length")


class Said(NamedTuple):
    """What a step did for a request: the tokens that it wrote, and how it ended, if it has."""

    request: int
    tokens: tuple[int, ...]
    finish: str | None


class System(Protocol):
    """What answers requests, a step at a time."""

    @property
    def busy(self) -> bool: ...

    def submit(self, prompt: Sequence[int], new: int, adapter: int) -> int:
        """Takes a request for an adapter, by its place in the list, and gives its number."""

    def step(self) -> list[Said]: ...

    def cancel(self, request: int) -> None: ...


class Served:
    """The engine as a system; every answer has as many tokens as were asked for."""

    def __init__(self, engine: Engine, names: Sequence[str]):
        self.engine, self.names = engine, names

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def submit(self, prompt: Sequence[int], new: int, adapter: int) -> int:
        return self.engine.submit(prompt, Sampling(max_tokens=new, ignore_end=True), self.names[adapter])

    def step(self) -> list[Said]:
        return [Said(event.request, event.tokens, event.finish) for event in self.engine.step()]

    def cancel(self, request: int) -> None:
        self.engine.cancel(request)


@dataclasses.dataclass
class Outcome:
    """What became of a request; times are seconds of the trace."""

    asked: Asked
    first: float = math.nan
    last: float = math.nan
    tokens: int = 0
    finish: str | None = None

    @property
    def wait(self) -> float:
        """Seconds to the first token; NaN where none came."""
        return self.first - self.asked.time

    @property
    def pace(self) -> float:
        """Seconds a token behind the first; NaN where there is none."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else math.nan

    def take(self, said: Said, now: float) -> None:
        if said.tokens:
            self.first = now if math.isnan(self.first) else self.first
            self.last = now
            self.tokens += len(said.tokens)
        self.finish = said.finish or self.finish


def drive(
    system: System,
    trace: Sequence[Asked],
    words: int,
    limit: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[Outcome], float]:
    """The trace in an open loop: each request's outcome, and the seconds until all were done or the limit.

    Args:
        system: what answers.
        trace: in order of arrival.
        words: prompts are drawn below it.
        limit: seconds after which what is left is cancelled.
        clock, sleep: of the machine, or of a test.
    """
    begin, next_one = clock(), 0
    outcomes, mine = [Outcome(asked) for asked in trace], dict[int, Outcome]()
    while (now := clock() - begin) < limit and (system.busy or next_one < len(trace)):
        while next_one < len(trace) and trace[next_one].time <= now:
            asked, outcome = trace[next_one], outcomes[next_one]
            try:
                mine[system.submit(prompt_of(next_one, asked.prompt, words), asked.new, asked.adapter)] = outcome
            except Refused:
                outcome.finish = "refused"
            next_one += 1
        if not system.busy:
            if next_one < len(trace):
                sleep(min(trace[next_one].time, limit) - now)
            continue
        said = system.step()
        now = clock() - begin
        for each in said:
            mine[each.request].take(each, now)
    elapsed = clock() - begin
    for number, outcome in mine.items():
        if not outcome.finish:
            system.cancel(number)
    return outcomes, elapsed


def saturate(
    system: System,
    trace: Sequence[Asked],
    words: int,
    at_once: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Requests a second in a closed loop of so many at once, over the last three quarters of the time."""
    begin, count, done = clock(), 0, list[float]()
    mine = set[int]()
    while (now := clock() - begin) < seconds:
        while len(mine) < at_once:
            asked = trace[count % len(trace)]
            mine.add(system.submit(prompt_of(count, asked.prompt, words), asked.new, asked.adapter))
            count += 1
        for said in system.step():
            if said.finish:
                mine.discard(said.request)
                done += [clock() - begin] * (said.finish in DONE)
    for number in mine:
        system.cancel(number)
    warm = seconds / 4
    return sum(t > warm for t in done) / (now - warm if now > warm else seconds)


def measures(outcomes: Sequence[Outcome], elapsed: float, deadline: float) -> dict[str, Any]:
    """Throughput, attainment, and the percentiles of the time to the first token and between tokens.

    attainment is the share of all requests whose first token came within the deadline; what was given up or never
    answered has missed it.
    """
    done = [o for o in outcomes if o.finish in DONE]
    waits = [o.wait for o in outcomes if not math.isnan(o.first)]
    return {
        "asked": len(outcomes),
        "finished": len(done),
        "aborted": sum(o.finish == "aborted" for o in outcomes),
        "seconds": elapsed,
        "requests_per_second": len(done) / elapsed,
        "tokens_per_second": sum(o.tokens for o in outcomes) / elapsed,
        "attainment": sum(wait <= deadline for wait in waits) / max(1, len(outcomes)),
        "first_token": percentiles(waits),
        "each_token": percentiles([o.pace for o in done if not math.isnan(o.pace)]),
        "fairness": fairness(outcomes),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Seconds at 50, 90 and 99 %; nothing where there are no values."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)} if values else {}


def fairness(outcomes: Sequence[Outcome]) -> float:
    """Jain's index of the tokens that adapters were given, of those that were asked for: 1 where all have one share."""
    tokens: dict[int, int] = {}
    for outcome in outcomes:
        tokens[outcome.asked.adapter] = tokens.get(outcome.asked.adapter, 0) + outcome.tokens
    given = np.array([*tokens.values(), 0.0])
    return float(given.sum() ** 2 / max(1e-9, len(tokens) * (given**2).sum()))
