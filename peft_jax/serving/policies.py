"""Who comes next: each policy says in which order waiting requests are admitted, and which are given up.

    Fcfs      first come, first served; greater priority before that
    Cluster   at most d adapters run at once, and requests for those that run go first: fewer adapters move
    Abort     what can no longer meet its deadline for the first token is given up; under overload the newest go first,
              for the oldest would only just miss theirs, one after the other
    Fair      the adapter that has been served least goes first, whatever it asks for

Policies hold no state and read no clock.  What a policy leaves behind for long is not its own matter: whatever
the policy, the scheduler puts a request that has waited for `patience` seconds in front of the others.

Source: Sheng et al. 2023 (S-LoRA), section 4 and its appendix on early abort; Sheng et al. 2024, Fairness in Serving
Large Language Models (arXiv 2401.00588), the virtual token counter.
"""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol, runtime_checkable

from peft_jax.serving.requests import Request


@dataclasses.dataclass(frozen=True)
class View:
    """What a policy may know.

    now         the time
    running     the requests that run
    step        seconds that a step takes, a moving average
    arriving    requests that come in a round of scheduling, a moving average
    admitting   requests that are admitted in a round, a moving average
    served      what each adapter has been given, by identity (0: the base), as the policy itself reckons
    chunk       tokens of a prompt that are computed in one step
    """

    now: float
    running: Sequence[Request] = ()
    step: float = 0.0
    arriving: float = 0.0
    admitting: float = 0.0
    served: Mapping[int, float] = dataclasses.field(default_factory=dict)
    chunk: int = 64


@runtime_checkable
class Policy(Protocol):
    """An order, what it lets into a batch, and what it gives up."""

    def order(self, waiting: Sequence[Request], view: View) -> list[Request]:
        """All that wait, the one to be admitted first in front."""

    def allows(self, identity: int, batch: AbstractSet[int]) -> bool:
        """Whether a request for this adapter (0: the base) may join a batch with these."""

    def gives_up(self, request: Request, view: View) -> str | None:
        """Why a request that has no token yet is given up, or None."""

    def cost(self, prompt: int, generated: int) -> float:
        """What an adapter is charged when a prompt of so many tokens is admitted, or so many are drawn."""


@dataclasses.dataclass(frozen=True)
class Fcfs:
    """First come, first served.

    >>> first, second = Request(1, [1], arrived=0.0), Request(2, [1], arrived=1.0)
    >>> [request.id for request in Fcfs().order([second, first], View(now=2.0))]
    [1, 2]
    """

    def order(self, waiting: Sequence[Request], view: View) -> list[Request]:
        return sorted(waiting, key=by_arrival)

    def allows(self, identity: int, batch: AbstractSet[int]) -> bool:
        return True

    def gives_up(self, request: Request, view: View) -> str | None:
        return None

    def cost(self, prompt: int, generated: int) -> float:
        return 0.0


@dataclasses.dataclass(frozen=True)
class Cluster(Fcfs):
    """At most `adapters` different ones in a batch; those for which requests run already go first.

    The base is none of them: it takes no rows.
    """

    adapters: int = 8

    def __post_init__(self) -> None:
        if self.adapters < 1:
            raise ValueError(f"adapters={self.adapters}: let 1 or more into a batch")

    def order(self, waiting: Sequence[Request], view: View) -> list[Request]:
        chosen = {0} | {r.identity for r in view.running}
        ordered = sorted(waiting, key=by_arrival)
        for request in ordered:  # the batch is filled up with the adapters of those who have waited longest
            if len(chosen) <= self.adapters:
                chosen.add(request.identity)
        return sorted(ordered, key=lambda r: r.identity not in chosen)

    def allows(self, identity: int, batch: AbstractSet[int]) -> bool:
        return not identity or identity in batch or len(batch - {0}) < self.adapters


@dataclasses.dataclass(frozen=True)
class Abort(Fcfs):
    """Gives up a request whose first token cannot come within `deadline` seconds of its arrival.

    It cannot if it has waited so long that the steps for its own prompt, at the pace of late, end after the deadline.
    While more requests come than are admitted, the newest go first, else the oldest.
    """

    deadline: float = 6.0

    def order(self, waiting: Sequence[Request], view: View) -> list[Request]:
        return sorted(waiting, key=by_arrival, reverse=view.arriving > view.admitting)

    def gives_up(self, request: Request, view: View) -> str | None:
        steps = -(-len(request.tokens) // view.chunk)
        if view.now + steps * view.step - request.arrived <= self.deadline:
            return None
        waited = view.now - request.arrived
        return (
            f"no first token within {self.deadline:g} s is possible after {waited:.1f} s in the queue: try again, or "
            "send fewer requests"
        )


@dataclasses.dataclass(frozen=True)
class Fair(Fcfs):
    """The adapter that was served least goes first, by a counter of the tokens it was given.

    The scheduler charges each adapter what `cost` says, and lifts the counter of one that nobody used for a while to
    the least of those in use.

    Args:
        prompt: what a token of a prompt counts, on admission.
        generated: what a drawn token counts.
    """

    prompt: float = 1.0
    generated: float = 2.0

    def order(self, waiting: Sequence[Request], view: View) -> list[Request]:
        queues: dict[int, list[Request]] = {}
        for request in sorted(waiting, key=by_arrival, reverse=True):
            queues.setdefault(request.identity, []).append(request)
        heap = [(view.served.get(i, 0.0), by_arrival(queue[-1]), i) for i, queue in queues.items()]
        heapq.heapify(heap)
        ordered = []
        while heap:
            served, _, identity = heapq.heappop(heap)
            request = queues[identity].pop()
            ordered.append(request)
            if queues[identity]:
                after = served + self.cost(request.prompt_length, 0)
                heapq.heappush(heap, (after, by_arrival(queues[identity][-1]), identity))
        return ordered

    def cost(self, prompt: int, generated: int) -> float:
        return self.prompt * prompt + self.generated * generated


def by_arrival(request: Request) -> tuple[int, float, int]:
    """A sorting key: greater priority first, then who came first."""
    return -request.priority, request.arrived, request.id
