"""A causal language model made of a decoder: the two halves, the head, the spec, and random weights.

Families differ in their decoders; what surrounds them is written once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.attention import soft_cap
from peft_jax.core import Forward, Inputs, Params, Ports, Spec
from peft_jax.layers import checkpointed, normal, refuse_unknown_ports, variables
from peft_jax.models.tensors import Tensor, expert_counts, naming
from peft_jax.sequence import Cache
from peft_jax.weights import linear, unembed


def causal_lm(
    decoder: nn.Module,
    root: str,
    table: str,
    tensors: Sequence[Tensor],
    ports: frozenset[str],
    family: str,
    *,
    cap: float | None = None,
    embedding_scale: float = 1.0,
) -> Forward:
    """``features``: the decoder on ``params[root]``; ``head``: its embedding `table` transposed, or ``lm_head``, with
    its logits held below a soft `cap`, if there is one.

    Features keep the compute dtype; logits are always fp32 (rounded once by the product in the compute dtype), so that
    a softmax, a loss or a sampler never works in half precision by accident.
    """
    c: Any = decoder.config
    checkpointed(type(decoder), c.remat)  # a misspelt mode is an error here, not at the first call

    def features(params: Params, inputs: Inputs, given: Ports) -> Any:
        refuse_unknown_ports(given, ports, family)
        inputs = jax.tree.map(jnp.asarray, inputs)
        return decoder.apply(variables(params[root]), inputs, given)

    def head(params: Params, x: Float[Array, "... width"], given: Ports) -> Float[Array, "... vocab"]:
        logits = unembed(x, params[root][table]["embedding"]) if c.tied else linear(x, params["lm_head"]["kernel"])
        return soft_cap(logits.astype(jnp.float32), cap)

    def cache(batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
        return Cache.empty(c.layers, c.kv_heads, c.head_dim, batch, length, dtype)

    names, stacked = naming(tensors, c.layers, c.scan)
    sizes = {n: getattr(c, n) for n in ("width", "layers", "heads", "kv_heads", "head_dim", "vocab", "positions")}
    tied = (("lm_head", f"{root}.{table}"),) if c.tied else ()
    source = Spec(
        ports=ports,
        names=names,
        stacked=stacked,
        experts=expert_counts(tensors, c.layers, c.scan),
        cache=cache,
        tensors=tuple(tensors),
        tied=tied,
        embedding=(root, table, "embedding"),
        embedding_scale=embedding_scale,
    )
    return Forward(features, head, dataclasses.replace(source, **sizes))


def init_causal_lm(key: Array, decoder: nn.Module, root: str, dtype: Any) -> Params:
    c: Any = decoder.config
    key, head_key = jax.random.split(key)
    params: Params = {root: decoder.init(key, Inputs(jnp.zeros((1, 1), jnp.int32)))["params"]}
    if not c.tied:
        params["lm_head"] = {"kernel": normal(head_key, (c.width, c.vocab), jnp.float32)}
    return jax.tree.map(lambda x: x.astype(dtype), params)
