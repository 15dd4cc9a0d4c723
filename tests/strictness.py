"""The runtime type checker of the test suite: jaxtyping shapes and dtypes, checked by beartype on every call."""

import warnings
from collections.abc import Callable
from typing import Any

import beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)

TYPED = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arguments and the result of every function, but not the fields of a dataclass.

    JAX rebuilds a typed leaf out of None, booleans and `object()` whenever it maps over a tree, so a leaf's
    ``__init__`` must take anything; factories and rules are where its arrays are checked.  An int may stand for a
    float, as type checkers have it.
    """
    return fn if fn.__name__ == "__init__" else TYPED(fn)
