"""Perplexity of a long text, in windows that slide over it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from peft_jax.attention import chunked_attention
from peft_jax.core import Forward, Params, Ports
from peft_jax.training.losses import next_token


def perplexity(
    forward: Forward,
    params: Params,
    tokens: Sequence[int] | np.ndarray,
    window: int,
    stride: int = 256,
    *,
    scored: str = "all",
    rows: int = 1,
) -> float:
    """exp of the mean cross entropy of a text's tokens, read in windows that begin `stride` tokens apart.

    scored="all"   each window predicts all of its tokens but the first: most tokens count in several windows, with
                   other contexts.  This is the evaluation of LongLoRA's code.
    scored="new"   each predicts what the window before it has not: the first all of its tokens, the others their last
                   `stride`, behind ``window − stride`` of context or more (Press et al. 2021, arXiv 2108.12409, B)

    Attention is full, and its memory linear in the window (`attention.chunked_attention`) where the model takes it.

    Args:
        forward, params: the model; plain arrays or typed leaves.
        tokens: the text's ids, as many as `window` or more.  What is left behind the last whole window is not read.
        window: tokens at a time, 2 or more.
        stride: tokens from one window's beginning to the next.
        scored: which predictions count, "all" or "new".
        rows: windows in one call of the model.

    Raises:
        ValueError: on a text shorter than a window, or numbers that leave nothing to predict.

    >>> import jax.numpy as jnp, peft_jax as pj
    >>> from peft_jax import training
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.embed(inputs.tokens, params))
    >>> round(training.perplexity(forward, jnp.zeros((4, 4)), [0, 1, 2, 3, 0, 1], window=4, stride=1), 4)
    4.0

    Source: section 4.1 and dvlab-research/LongLoRA, eval.py (``get_as_batch``, ``evaluate``).

    Departures: the code leaves out the last one or two windows that fit; here they count.
    """
    text = np.asarray(tokens, np.int32)
    if scored not in ("all", "new"):
        raise ValueError(f"scored is {scored!r}: choose 'all' or 'new'")
    if text.ndim != 1 or window < 2 or len(text) < window:
        raise ValueError(f"a text of shape {text.shape} holds no window of {window} tokens: a window is 2 or more")
    if stride < 1 or rows < 1 or (scored == "new" and stride >= window):
        raise ValueError(
            f"stride is {stride} and rows {rows}: give 1 or more of each, and with scored='new' a stride "
            f"below the window's {window}"
        )
    starts = np.arange(0, len(text) - window + 1, stride)
    places = starts[:, None] + np.arange(window)
    weights = np.ones((len(starts), window - 1), np.float32)
    if scored == "new":
        weights[1:, : window - 1 - stride] = 0
    count, total = float(weights.sum()), 0.0
    for start in range(0, len(starts), rows):
        chosen = np.minimum(np.arange(start, start + rows), len(starts) - 1)  # the last call is filled up
        real = (np.arange(start, start + rows) < len(starts)).astype(np.float32)
        total += float(_nats(forward, params, text[places[chosen]], weights[chosen] * real[:, None]))
    return math.exp(total / count)


@functools.partial(jax.jit, static_argnums=0)
def _nats(forward: Forward, params: Params, tokens: Any, weights: Any) -> Float[Array, ""]:
    ports = Ports(attend=chunked_attention) if "attend" in forward.spec.ports else Ports()
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    return next_token(forward, params, batch, ports)[0]
