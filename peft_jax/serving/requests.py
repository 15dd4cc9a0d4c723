"""A request: what was asked, what came of it so far, and which rows of the pool hold its keys and values.

A request waits, runs, perhaps waits again (preempted: its rows were needed by an older one, and all its tokens, drawn
ones too, are computed anew), and is finished.  `tokens` are the prompt and what was drawn since.  Of these the first
`cached` have their keys and values in the pool, and rows are `held` for a few more where a step is about to compute
them:

    tokens     p p p p p p g g g
    cached     ──────────┘            keys and values are in key_rows[:cached], value_rows[:cached]
    held       ────────────────┘      the next step writes key_rows[cached : cached + n]

A step feeds `tokens[cached : cached + n]`.  If that reaches the end of `tokens`, its last logits give the next token.
So a request with one token left to feed is decoding, and prompts, hits of the prefix cache and recomputing need no
cases.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Int32

State = Literal["waiting", "running", "finished"]
Finish = Literal["stop", "length", "cancelled", "aborted", "error"]


class Refused(Exception):
    """A request or a load that is not accepted, and why, in one sentence.

    Args:
        reason: what is told to the client.
        status: the HTTP status. Here 400: it can never be done as asked; 404: no such adapter; 413: too large for this
            pool; 429: the queue is full.
        retry_after: seconds after which another try may do.
        param: the field of the request that is at fault.
        code: a name of the error, for programs.
    """

    def __init__(
        self,
        reason: str,
        status: int = 400,
        retry_after: float | None = None,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.retry_after = retry_after
        self.param = param
        self.code = code


class Full(Refused):
    """The queue is full; `retry_after` estimates in how many seconds it will have moved on."""

    def __init__(self, waiting: int, retry_after: float):
        reason = f"{waiting} requests wait already, which is the most: try again in {retry_after:.0f} s"
        super().__init__(reason, 429, retry_after)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn, and when it ends.

    Args:
        max_tokens: drawn at most.
        temperature: 0 takes the likeliest token.
        top_k: only the k likeliest are drawn from; 0 for all.
        top_p: only the likeliest that together have this probability are drawn from.
        seed: two requests with the same seed draw the same; None draws anew.
        stop: strings that end it; they are not part of the answer.
        logprobs: how many of the likeliest tokens to tell beside each drawn one; None tells no probabilities.
        ignore_end: whether it goes on after the model's own end token.

    Raises:
        ValueError: if a number is out of range, naming it.

    >>> Sampling(max_tokens=4).temperature
    0.0
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: give 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: give a finite number, 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: give 0, for all tokens, or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a number over 0 and up to 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs}: give 0 or more, or None for none")
        if "" in self.stop:
            raise ValueError("stop has an empty string, which would end every answer: leave it out")


class Request:
    """One request and its state; the scheduler changes the state, and nobody else should.

    Args:
        id: a number of its own.
        prompt: its tokens, one or more.
        sampling: how it goes on.
        adapter: the name of a registered adapter; None for the base.
        arrived: the time it came, in seconds of the caller's clock.
        priority: a greater one goes before, where the policy leaves the order to arrival.

    Raises:
        ValueError: if the prompt is empty.

    >>> request = Request(1, [5, 6, 7], Sampling(max_tokens=2))
    >>> request.uncached, request.left, request.state
    (3, 2, 'waiting')
    """

    def __init__(
        self,
        id: int,
        prompt: Iterable[int],
        sampling: Sampling | None = None,
        adapter: str | None = None,
        arrived: float = 0.0,
        priority: int = 0,
    ):
        self.id = id
        self.tokens = list(prompt)
        self.prompt_length = len(self.tokens)
        if not self.tokens:
            raise ValueError(f"request {id} has an empty prompt: give one token or more")
        self.sampling = sampling or Sampling()
        self.adapter = adapter
        self.arrived = arrived
        self.priority = priority
        self.identity = 0
        """Of the adapter's load that serves it: a later load under the same name is another; 0 is the base."""
        self.state: State = "waiting"
        self.finish: Finish | None = None
        self.reason = ""
        self.cached = 0
        self.held = 0
        self.shared = 0
        """How many of its first tokens lie in rows of the prefix cache."""
        self.hit = 0
        """How many tokens of its prompt the prefix cache had when it was first admitted."""
        self.preemptions = 0
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self._rows = np.empty((2, 16), np.int32)

    def __repr__(self) -> str:
        return f"Request({self.id}, {self.state}, {self.cached} of {len(self.tokens)} tokens, {self.adapter})"

    @property
    def generated(self) -> list[int]:
        """The tokens drawn so far."""
        return self.tokens[self.prompt_length :]

    @property
    def uncached(self) -> int:
        """Tokens still to be fed; with 1, it is decoding."""
        return len(self.tokens) - self.cached

    @property
    def left(self) -> int:
        """Tokens still to be drawn at most."""
        return max(0, self.sampling.max_tokens - (len(self.tokens) - self.prompt_length))

    @property
    def key_rows(self) -> Int32[np.ndarray, "held"]:
        return self._rows[0, : self.held]

    @property
    def value_rows(self) -> Int32[np.ndarray, "held"]:
        return self._rows[1, : self.held]

    def hold(self, key_rows: Int32[np.ndarray, "n"], value_rows: Int32[np.ndarray, "n"]) -> None:
        """Adds rows behind those that it holds."""
        held = self.held + len(key_rows)
        if held > self._rows.shape[1]:
            grown = np.empty((2, max(held, 2 * self._rows.shape[1])), np.int32)
            grown[:, : self.held] = self._rows[:, : self.held]
            self._rows = grown
        self._rows[0, self.held : held] = key_rows
        self._rows[1, self.held : held] = value_rows
        self.held = held

    def let_go(self) -> Int32[np.ndarray, "n"]:
        """All rows that it holds, which it then no longer does: nothing of it is cached."""
        ids = self._rows[:, : self.held].reshape(-1)
        self.cached = self.held = self.shared = 0
        return ids
