"""peft_jax: parameter-efficient fine-tuning for JAX, as pure functions on typed parameter trees."""

from peft_jax import adapters as adapters
from peft_jax import arithmetic as arithmetic
from peft_jax import methods as methods
from peft_jax import trees as trees
from peft_jax.bridge import bridge
from peft_jax.core import Forward, Inputs, Method, Ports, Spec, chain
from peft_jax.trees import (
    apply_updates,
    combine,
    count,
    freeze,
    labels,
    merge,
    partition,
    place,
    select,
    set_scale,
    strip,
    summary,
    trainable,
)
from peft_jax.weights import Weight, embed, linear, materialise, rebase, unembed

__version__ = "0.1.0"

__all__ = [
    "Forward",
    "Inputs",
    "Method",
    "Ports",
    "Spec",
    "Weight",
    "apply_updates",
    "bridge",
    "chain",
    "combine",
    "count",
    "embed",
    "freeze",
    "labels",
    "linear",
    "materialise",
    "merge",
    "partition",
    "place",
    "rebase",
    "select",
    "set_scale",
    "strip",
    "summary",
    "trainable",
    "unembed",
]
