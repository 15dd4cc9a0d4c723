"""Texts that a model writes after many prompts, a few at a time, all of one shape or two."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_jax import Forward, models
from peft_jax.models.generation import pad_left


def write(
    forward: Forward,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    size: int,
    *,
    ends: Sequence[int] = (),
    infix: bool = False,
    **options: Any,
) -> tuple[list[str], int]:
    """``(texts, how many tokens they have)``, `size` of them at a time.

    Args:
        forward, params: the model; of an encoder-decoder model the prompts are sources.
        prompts: token ids.
        ends: tokens that end a text, beside the tokenizer's own.
        infix: whether a prefix stands before each prompt's last token, not before its first.
        options: as in `models.generate_tokens`.
    """
    texts: list[str] = []
    count = 0
    for start in range(0, len(prompts), size):
        given = list(prompts[start : start + size])
        tokens, mask = pad_left(given + [given[-1]] * (size - len(given)))
        place = mask.sum(1) - 1 if infix else None
        eos = sorted({tokenizer.eos_token_id, *ends})
        new = models.generate_tokens(forward, params, tokens, mask, eos_id=eos, pad_id=-1, infix=place, **options)
        for row in np.asarray(new)[: len(given)].tolist():
            written = [token for token in row if token >= 0]
            count += len(written)
            texts.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    return texts, count
