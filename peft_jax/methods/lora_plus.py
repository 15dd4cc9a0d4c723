"""LoRA+: a larger learning rate for B (Hayou et al. 2024, arXiv 2402.12354).

    lr(B) = λ · lr(A)        λ = `ratio`, 16 in the paper's recipe

It is an optimiser, not an adapter: use it with `methods.lora` and its kin.

Source: section 4; HF PEFT optimizers/loraplus.py.

Departures: HF PEFT gives embeddings' adapters a third rate and one-dimensional parameters (biases) B's; here everything
but B trains at `learning_rate`.
"""

import dataclasses
from collections.abc import Callable

import jax
import optax
from jaxtyping import PyTree

from peft_jax import trees
from peft_jax.core import Params
from peft_jax.methods.lora import LoRA
from peft_jax.weights import Weight


def labels(params: Params) -> PyTree[str]:
    """'b' for the B of every LoRA leaf, 'rest' for all else: an optax label tree."""
    rest = jax.tree.map(lambda _: "rest", params)

    def mark(w: Weight) -> Weight:
        return dataclasses.replace(w, b="b" if w.b is not None else None) if isinstance(w, LoRA) else w

    return trees.map_weights(mark, rest)


def lora_plus(
    optimiser: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    ratio: float = 16.0,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that moves LoRA's B at ``ratio · learning_rate`` and everything else at `learning_rate`.

    >>> import optax
    >>> from peft_jax import methods
    >>> tx = methods.lora_plus(optax.adamw, 1e-4, ratio=16)  # then: tx = pj.freeze(tx, params)
    """
    if ratio <= 0:
        raise ValueError(f"ratio must be positive, got {ratio}")
    faster = (lambda step: ratio * learning_rate(step)) if callable(learning_rate) else ratio * learning_rate
    return optax.partition({"b": optimiser(faster), "rest": optimiser(learning_rate)}, labels)
