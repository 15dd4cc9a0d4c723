"""Movie reviews that a tiny model can learn: the last token tells the answer."""

import numpy as np

from experiments import sentiment


def task(model, *, held_out, of):
    """`of` reviews in all, of which `held_out` are held out; the answers are the tokens 5 and 6."""
    rng, examples = np.random.default_rng(0), []
    for label in rng.integers(0, 2, of).tolist():
        words = rng.integers(10, 60, rng.integers(3, 8)).tolist()
        examples.append(sentiment.Example("", [*words, 2 + label], label))
    return sentiment.Task(model, examples[held_out:], examples[:held_out], np.array([5, 6], np.int32))
