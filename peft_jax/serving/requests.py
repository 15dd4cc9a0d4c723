"""What a request asks for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    `max_tokens` at most; greedy where `temperature` is 0; `top_k` 0 and `top_p` 1 leave all tokens in; `logprobs` is
    how many alternatives to report for each token (0: the token's own, None: nothing); `ignore_end` goes on behind the
    end-of-text token.

    >>> Sampling(max_tokens=3, stop=("###",)).temperature
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
