"""What the engine tells whoever drives it, and what it offers them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from peft_jax.serving.requests import Sampling

Finish = Literal["stop", "length", "cancelled", "aborted", "error"]


class Refused(Exception):
    """A request that is not served, and why, in one sentence.

    Args:
        reason: what is told to the client.
        status: the HTTP status: 400, 401, 403, 404, 408, 413, 415, 429, 500 or 503.
        retry_after: seconds after which another try may do.
        param: the field of the request that is at fault.
        code: OpenAI's name of the error, for programs.

    >>> Refused("The queue is full.", status=429, retry_after=2.0).status
    429
    """

    def __init__(
        self,
        reason: str,
        status: int = 400,
        retry_after: float | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.retry_after = retry_after
        self.param = param
        self.code = code


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


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """An adapter that is registered: where it lies, how large it is, and how many requests use it now."""

    name: str
    directory: str
    rank: int
    rows: int
    state: Literal["disk", "host", "loading", "resident", "draining"]
    users: int = 0


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
