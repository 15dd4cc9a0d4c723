"""What the engine tells whoever drives it, and what it offers them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from peft_jax.serving.requests import Finish, Sampling
from peft_jax.serving.store import AdapterInfo


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log-probability, and those of the likeliest in its place, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, tokens generated, and how many of the prompt's came from the prefix cache."""

    prompt: int
    completion: int
    cached: int = 0


@dataclasses.dataclass(frozen=True)
class Event:
    """What one step did for one request.

    `text` is what became certain: whole characters, nothing that may yet be the beginning of a stop string; the stop
    string itself is left out.  The event with `finish` is a request's last; `reason` says why where it went wrong.
    """

    request: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None
    reason: str = ""
    usage: Usage | None = None


@runtime_checkable
class Limits(Protocol):
    """What an engine can hold: `context` tokens, of prompt and answer together."""

    @property
    def context(self) -> int: ...


@runtime_checkable
class Engine(Protocol):
    """What the server needs of an engine.  One thread calls it."""

    @property
    def model_name(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""

    def submit(self, prompt: Sequence[int], sampling: Sampling, adapter: str | None = None) -> int:
        """Queues a request and gives its id; raises `Refused`."""

    def cancel(self, request_id: int) -> None:
        """Gives up a request and its rows; nothing where it is unknown or finished."""

    def step(self) -> list[Event]:
        """One round of scheduling and computing; an exception means that the engine is no more."""

    def load(self, name: str, directory: str) -> object:
        """Registers the adapter of a directory; raises `Refused`, or ValueError or OSError on what it cannot read."""

    def unload(self, name: str) -> object:
        """Forgets an adapter once its last request is done, and returns at once; raises `Refused`."""

    def adapters(self) -> list[AdapterInfo]:
        """All that are registered."""

    def stats(self) -> Mapping[str, float]:
        """Counters, whose names end in ``_total``, and gauges; a label stands in braces: ``finished_total{stop}``."""
