"""Passkey retrieval: a number hidden in a long text of no meaning, for which the text ends by asking.

Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 4.2; LongLoRA (arXiv 2309.12307), section 4.2 and
dvlab-research/LongLoRA, passkey_retrivial.py, whose words, random numbers and measure these are.

Departures: a prompt is as long as fits into so many tokens, where the code takes 3.75 letters a token; and the answer's
tokens are those that follow the prompt, a space first, where the code takes those of the number by itself.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import Forward, Inputs, Ports
from peft_jax.attention import chunked_attention
from peft_jax.core import Params

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"
LONGEST = 8  # tokens of an answer


class Asked(NamedTuple):
    prompt: list[int]
    answer: list[int]


def text(letters: int, seed: int) -> tuple[str, str]:
    """The prompt with so many letters of filler, and the number."""
    random = np.random.RandomState(seed)
    before = random.randint(0, letters)
    filler = " ".join([FILLER] * (letters // len(FILLER) + 1))
    number = random.randint(1, 50000)
    told = f"The pass key is {number}. Remember it. {number} is the pass key."
    return "\n".join([TASK, filler[:before], told, filler[: letters - before], QUESTION]), str(number)


def ask(tokenizer: Any, length: int, seed: int) -> Asked:
    """The longest prompt that leaves room for its answer among `length` tokens.

    Raises:
        ValueError: if not even the shortest does.
    """

    def fitting(letters: int) -> Asked | None:
        prompt, number = text(letters, seed)
        ids, whole = tokenizer([prompt, f"{prompt} {number}"])["input_ids"]
        return Asked(ids, whole[len(ids) :]) if len(whole) <= length else None

    low, high = 1, 8 * length  # letters: the first fit, the last do not
    best = fitting(low)
    if best is None:
        raise ValueError(f"a question takes more than {length} tokens by itself: ask for a longer text")
    while high - low > 1:
        middle = (low + high) // 2
        if found := fitting(middle):
            low, best = middle, found
        else:
            high = middle
    return best


def accuracy(forward: Forward, params: Params, tokenizer: Any, length: int, seeds: range | list[int]) -> float:
    """The share of questions whose answer greedy writing gives, every token of it.

    Nothing is written: writing is right where the likeliest token behind each part of the right answer is the next.
    """
    right = 0
    for seed in seeds:
        asked = ask(tokenizer, length, seed)
        whole, first = np.zeros((1, length), np.int32), len(asked.prompt) - 1
        whole[0, : len(asked.prompt) + len(asked.answer)] = asked.prompt + asked.answer
        places = np.minimum(first + np.arange(LONGEST), length - 1)
        written = np.asarray(_likeliest(forward, params, whole, places))[0, : len(asked.answer)]
        right += written.tolist() == asked.answer
    return right / len(seeds)


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(forward: Forward, params: Params, tokens: Array, places: Array) -> Array:
    """The likeliest next token at some places; what stands behind them is not seen."""
    ports = Ports(attend=chunked_attention)
    features = forward.features(params, Inputs(jnp.asarray(tokens)), ports)
    return jnp.argmax(forward.head(params, features[:, places], ports), axis=-1)
