"""Prompt tuning: soft tokens before the real ones (Lester et al. 2021, arXiv 2104.08691).

    y = f([P; embed(x)])        P ``[p, d]`` trains, everything else is frozen

P ("prompt") acts through the model's port of that name; the outputs cover the real tokens only, which stand at the
positions from p on; in an encoder-decoder model it stands before the source.  p · d numbers train.

How P starts decides much (section 3.2, figure 3b): "uniform" draws from U[−0.5, 0.5]; "vocabulary" takes the embeddings
of tokens drawn without replacement from the most common ones; `labels` begins with the mean embedding of each class
label and fills up from the vocabulary; `text` tiles or cuts the embeddings of a text.

Source: sections 2 and 3; google-research/prompt-tuning, train/initializers.py; HF PEFT tuners/prompt_tuning/model.py
for the text.

Departures: the official configuration's ``uniform(scale=0.5)`` is one-sided, U[0, 0.5): we follow the paper.  The
5,000 most common tokens are the first 5,000 ids, which is their order in SentencePiece and roughly so where byte pairs
were merged by frequency; `common` takes a count of your own, or the ids.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Ports
from peft_jax.ports import behind, key_of, need, pick, put, take
from peft_jax.weights import Weight, embed, static

STARTS = ("uniform", "vocabulary")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prompt(Weight):
    """Soft tokens: `value` ``[p, d]``.  It lies in ``params["ports"]`` and stands for no weight of the model."""

    trains = ("value",)
    row_axis: ClassVar[int] = 0  # where the batch goes when each row has its own

    value: Any
    name: str = static(default="prompt_tuning")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def numbers(self) -> tuple[int, int]:
        return self.trained_size(), 0


def prompt_tuning(
    length: int = 20,
    *,
    start: str = "vocabulary",
    common: int | Sequence[int] = 5000,
    labels: Sequence[Sequence[int]] | None = None,
    text: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
    name: str = "prompt_tuning",
) -> Method:
    """Soft tokens before the real ones.

    Args:
        length: p, the number of soft tokens.
        start: "uniform" or "vocabulary".
        common: the tokens that "vocabulary" draws from: how many of the first ids, or the ids.
        labels: the token ids of each class label; the prompt begins with their mean embeddings.
        text: the token ids of a text that the prompt starts as, tiled or cut to `length`.
        dtype: of the prompt.
        name: what tells this method from another of its kind in one chain, whose prompt then comes behind this one's;
            also seeds its draws.

    Raises:
        ValueError: on a length that is not positive or leaves the model no position for real tokens; on labels or a
            text without tokens, or tokens outside the vocabulary; if the model has no port for a prompt.

    >>> import jax, transformers, peft_jax as pj
    >>> from peft_jax import methods, models
    >>> config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    >>> model = models.from_config(config, jax.random.key(1))
    >>> method = methods.prompt_tuning(4, text=[7, 8])
    >>> params, forward = method(jax.random.key(0), model.params, model.forward)
    >>> pj.count(params).trainable, forward(params, jax.numpy.ones((2, 5), int)).shape
    (64, (2, 5, 50))
    """
    if length < 1:
        raise ValueError(f"length is {length}: give the number of soft tokens, 1 or more")
    if start not in STARTS:
        raise ValueError(f"start is {start!r}: choose one of {', '.join(STARTS)}, or give labels= or text=")
    if labels is not None and text is not None:
        raise ValueError("labels and text are two ways to start a prompt: give one of them")
    if labels is not None and (len(labels) == 0 or not all(len(label) for label in labels)):
        raise ValueError("a start from class labels needs the token ids of each label, one or more; some have none")
    if labels is not None and len(labels) > length:
        raise ValueError(f"{len(labels)} class labels do not fit into a prompt of {length}")
    if text is not None and len(text) == 0:
        raise ValueError("the text that the prompt is to start as has no tokens")

    def init(key: Array, params: Params, forward: Forward) -> Params:
        trees.claim(name, params)
        need("prompt", forward, length)
        keys = key_of(key, name)
        if start == "uniform" and labels is None and text is None:
            width = forward.spec.width
            return put(params, name, Prompt(_uniform(keys, (length, width)).astype(dtype), name))
        table, scale = trees.leaves(params)[forward.spec.embedding], forward.spec.embedding_scale
        vocab = table.shape[0]
        if text is not None:
            value = embed(_ids(np.resize(np.asarray(text), length), vocab), table)
        else:
            pool = np.arange(min(common, vocab)) if isinstance(common, int) else np.asarray(common)
            if len(pool) < length:
                raise ValueError(f"{length} soft tokens cannot be drawn without replacement from {len(pool)} tokens")
            drawn = jax.random.choice(keys, _ids(pool, vocab), (length,), replace=False)
            value = embed(drawn, table)
            for row, label in enumerate(labels or ()):
                value = value.at[row].set(jnp.mean(embed(_ids(label, vocab), table), axis=0))
        return put(params, name, Prompt((value * jnp.asarray(scale, value.dtype)).astype(dtype), name))

    def wrap(forward: Forward) -> Forward:
        need("prompt", forward, length)

        def fill(params: Params, ports: Ports) -> tuple[Params, Ports]:
            params, mine = take(params, name)
            mine, ports = pick(mine, ports)
            both = [mine.value] if ports.prompt is None else [mine.value, ports.prompt.astype(mine.value.dtype)]
            rows = max((x.shape[:-2] for x in both), key=len)
            both = [jnp.broadcast_to(x, (*rows, *x.shape[-2:])) for x in both]
            return params, dataclasses.replace(ports, prompt=jnp.concatenate(both, -2))

        return behind(forward.rewritten(fill), length)

    return Method(init, wrap)


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)


def _ids(ids: Any, vocab: int) -> Array:
    ids = np.asarray(ids, np.int32)
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(f"token id {ids.min() if ids.min() < 0 else ids.max()} is outside the vocabulary of {vocab}")
    return jnp.asarray(ids)


def majority(answers: Int[Array, "prompts batch"]) -> Int[Array, "batch"]:
    """The answer that most of an ensemble's prompts give (section 6); of several such, the first prompt's.

    The prompts share one frozen model and one batch: ``Ports(prompt=[prompts · batch, p, d])`` gives each row its own.

    >>> import jax.numpy as jnp
    >>> from peft_jax.methods.prompt_tuning import majority
    >>> majority(jnp.array([[7, 1], [8, 1], [8, 2]])).tolist()
    [8, 1]
    """
    votes = jnp.sum(answers[:, None] == answers[None], axis=0)
    return jnp.take_along_axis(answers, jnp.argmax(votes, axis=0)[None], axis=0)[0]
