"""What one round of scheduling decides, its bounds, and the formula by which requests are admitted."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from peft_jax.serving.requests import Finish, Request


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of a scheduler.

    Args:
        max_batch: requests that run at once.
        prefill_rows: of them, whose prompts are computed in one step.
        chunk: tokens of a prompt in one step.
        lookahead: waiting requests whose adapters are fetched ahead.
        optimism: the share of the tokens left that is reckoned with on admission; 1 never needs to preempt.
        patience: seconds until a waiting request goes first.
        queue: requests that may wait.

    Raises:
        ValueError: if one is out of range.

    >>> Limits(chunk=128).max_batch
    64
    """

    max_batch: int = 64
    prefill_rows: int = 4
    chunk: int = 64
    lookahead: int = 16
    optimism: float = 1.0
    patience: float = 30.0
    queue: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_batch", "prefill_rows", "chunk", "lookahead", "queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")
        if not 0 <= self.optimism <= 1:
            raise ValueError(f"optimism={self.optimism}: give a share from 0 to 1")
        if not self.patience >= 0:
            raise ValueError(f"patience={self.patience}: give seconds, 0 or more")


class Dropped(NamedTuple):
    """A request that ended while it waited: given up ("aborted"), or its adapter failed ("error")."""

    request: Request
    finish: Finish
    reason: str


@dataclasses.dataclass
class Plan:
    """What one step computes.

    now         when it was made
    admitted    requests that have joined the batch, with their adapters in the pool
    prefill     requests and how many of their tokens are fed, from `cached` on
    decode      requests whose last token is fed
    preempted   requests that wait again
    aborted     requests that have ended
    prefetch    identities of adapters that waiting requests will need, the first needed in front
    """

    now: float
    admitted: list[Request] = dataclasses.field(default_factory=list)
    prefill: list[tuple[Request, int]] = dataclasses.field(default_factory=list)
    decode: list[Request] = dataclasses.field(default_factory=list)
    preempted: list[Request] = dataclasses.field(default_factory=list)
    aborted: list[Dropped] = dataclasses.field(default_factory=list)
    prefetch: list[int] = dataclasses.field(default_factory=list)

    @property
    def fed(self) -> list[tuple[Request, int]]:
        """Each request that computes, and how many of its tokens are fed: empty if there is nothing to compute."""
        return self.prefill + [(request, 1) for request in self.decode]


def peak(used: Sequence[int], left: Sequence[int], delay: Sequence[int] | None = None) -> int:
    """The most tokens that requests hold at once until the last of them is done.

        max_i Σ_{j: T_j ≥ T_i} ( used_j + min(left_j, T_i) )        T = delay + left

    Where nobody is delayed all grow in step, and sorted by tokens left, the most first, that is S-LoRA's
    max_i ( left_i · i + Σ_{j ≤ i} used_j ).  A prompt that is still being computed delays its request's end, so that it
    is still there when others have grown.

    Args:
        used: tokens that each holds now.
        left: tokens by which each grows.
        delay: steps more than others until it grows, at most; none by default.

    >>> peak([10, 4], [2, 8])  # two steps on, 12 + 6; later the second alone, up to 12
    18
    >>> peak([10, 4], [2, 8], delay=[7, 0])  # the first is still there when the second has its 12
    24

    Source: S-LoRA's router/req_queue.py.

    Departures: there a prompt is computed whole, before anything else, and nothing is delayed.
    """
    grow = np.asarray(left, np.int64)
    end = grow + np.asarray(delay if delay is not None else 0, np.int64)
    held = np.asarray(used, np.int64) + np.minimum(grow, end[:, None])  # [when the i-th ends, each]
    return int((held * (end >= end[:, None])).sum(1).max(initial=0))


def delays(uncached: Sequence[int], chunk: int, at_once: int) -> list[int]:
    """How many steps after the next each prompt is done, when `at_once` of them go on in a step, in this order.

    Args:
        uncached: tokens still to be fed; with 1 or up to `chunk`, and a place, there is no delay.
        chunk: tokens in a step.
        at_once: requests in a step.

    >>> delays([100, 1, 20, 40], chunk=20, at_once=2)
    [4, 0, 0, 2]
    """
    free = [0] * at_once  # the step after which each of the places is free again
    late = []
    for n in uncached:
        place = free.index(min(free))
        free[place] += -(-n // chunk) if n > 1 else 0
        late.append(free[place] - 1 if n > 1 else 0)
    return late
