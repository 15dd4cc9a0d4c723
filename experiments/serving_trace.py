"""The S-LoRA paper's synthetic trace: when requests come, for which adapter, how long they are.

    gaps            Gamma(shape 1 / cv², scale cv² / R): mean 1 / R, coefficient of variation cv; Poisson where cv = 1
    adapter         ⌊ U^(1/α) · n ⌋, U uniform: numpy's power(α); uniform where α = 1, towards the last where α > 1,
                    towards the first where α < 1
    lengths         uniform in [low, high), of prompt and of answer

R · duration requests, whichever time the last one comes at.

Source: Sheng et al. 2023 (S-LoRA, arXiv 2311.03285), section 7.1; its benchmarks/trace.py.

Departures: prompts are drawn tokens, not one word again and again; lengths are U[8, 64) by default where the paper has
U[8, 512).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PAPER_DEADLINE = 6.0  # seconds to the first token


class Asked(NamedTuple):
    """One request: when it comes, which adapter it wants, its prompt's length, and how many tokens it is to get."""

    time: float
    adapter: int
    prompt: int
    new: int


@dataclasses.dataclass(frozen=True)
class Load:
    """What a trace is drawn from.

    Args:
        adapters: n.
        rate: R, requests a second.
        seconds: of the trace.
        alpha: α, the power law's exponent.
        cv: of the gaps.
        prompt, new: the range of lengths, the upper end excluded.

    Raises:
        ValueError: if a number is out of range.
    """

    adapters: int
    rate: float
    seconds: float
    alpha: float = 1.0
    cv: float = 1.0
    prompt: tuple[int, int] = (8, 64)
    new: tuple[int, int] = (8, 64)

    def __post_init__(self) -> None:
        for name in ("adapters", "rate", "seconds", "alpha", "cv"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")
        for name in ("prompt", "new"):
            low, high = getattr(self, name)
            if not 1 <= low < high:
                raise ValueError(f"{name}=({low}, {high}): give a range of 1 token or more")


def draw(load: Load, seed: int = 0, start: float = 0.0) -> list[Asked]:
    """The requests, in order of arrival.

    >>> trace = draw(Load(adapters=5, rate=2.0, seconds=10.0), seed=1)
    >>> len(trace), {asked.adapter for asked in trace} <= set(range(5))
    (20, True)
    """
    random = np.random.default_rng(seed)
    count = int(load.rate * load.seconds)
    adapters = np.floor(random.power(load.alpha, count) * load.adapters).astype(int)
    prompts, news = random.integers(*load.prompt, count), random.integers(*load.new, count)
    square = load.cv**2
    times = start + np.cumsum(random.gamma(1 / square, square / load.rate, count))
    return [
        Asked(*each) for each in zip(times.tolist(), adapters.tolist(), prompts.tolist(), news.tolist(), strict=True)
    ]


def phases(loads: Sequence[Load], seed: int = 0) -> list[Asked]:
    """One load after another: each begins where the seconds of the one before it end."""
    starts = np.cumsum([0.0, *(load.seconds for load in loads)])
    found = [asked for i, load in enumerate(loads) for asked in draw(load, seed + i, float(starts[i]))]
    return sorted(found)


def prompt_of(number: int, length: int, words: int, seed: int = 0) -> list[int]:
    """A prompt's tokens, which no other one has."""
    return np.random.default_rng((seed, number)).integers(0, words, length).tolist()
