"""Moves a Llama model off the grid that its weights were stored on, without changing what it computes.

A model read from a file of few bits (SmolLM2's Q4_1: asymmetric, groups of 32 inputs) lies on that file's grid, so a
format like it loses nothing, and beats the others by construction.  Two changes take it off:

    W ← diag(g) W                     the gain g of each RMSNorm goes into the kernels that read it
    E ← E R,  W ← Rᵀ W,  W ← W R      R orthogonal turns the residual stream: what it is read from, what reads it, and
                                      what writes to it; a vector's RMS does not change, nor do its inner products

The head must be untied, because it takes the last norm's gain and the embedding does not.

Source: Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456), section 4, stage 1a; SliceGPT (arXiv 2401.15024), section 3.1.
"""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.models import llama
from peft_jax.models.loading import Model

READERS = {
    "input_layernorm": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "post_attention_layernorm": ("mlp", ("gate_proj", "up_proj")),
}
WRITERS = (("self_attn", "o_proj"), ("mlp", "down_proj"))


def rotation(key: Array, width: int) -> Array:
    """An orthogonal matrix, uniform (Mezzadri 2007): Q of a Gaussian matrix, with R's diagonal positive."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (width, width)))
    return q * jnp.sign(jnp.diagonal(r))[None, :]


def off_the_lattice(model: Model, key: Array, *, remat: str = "full") -> Model:
    """The same function of a Llama model with other weights: norms at one, the residual stream turned, the head untied.

    Raises:
        ValueError: on another family.
    """
    if model.config.model_type not in llama.MODEL_TYPES:
        raise ValueError(f"{model.config.model_type} is not of the Llama family, whose norms and heads this knows")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    scan = "layers" in model.params["model"]
    params = _turned(model.params, rotation(key, config.hidden_size))
    return dataclasses.replace(model, params=params, config=config, forward=llama.build(config, scan=scan, remat=remat))


@jax.jit
def _turned(params: Any, turn: Array) -> Any:
    decoder, table = params["model"], params["model"]["embed_tokens"]["embedding"]
    head = params["lm_head"]["kernel"] if "lm_head" in params else table.T
    layers = {name: _layer(part, turn) for name, part in decoder.items() if name.startswith("layers")}
    gain = decoder["norm"]["scale"]
    new = layers | {"embed_tokens": {"embedding": _product(table, turn)}, "norm": {"scale": jnp.ones_like(gain)}}
    return {"model": new, "lm_head": {"kernel": _read(head, gain, turn)}}


def _layer(layer: Any, turn: Array) -> Any:
    """A layer, or a stack of them."""
    new = {name: dict(part) for name, part in layer.items()}
    for norm, (block, readers) in READERS.items():
        gain = layer[norm]["scale"]
        new[norm] = {"scale": jnp.ones_like(gain)}
        for name in readers:
            new[block][name] = layer[block][name] | {"kernel": _read(layer[block][name]["kernel"], gain, turn)}
    for block, name in WRITERS:
        new[block][name] = {part: _product(array, turn) for part, array in layer[block][name].items()}
    return new


def _read(kernel: Array, gain: Array, turn: Array) -> Array:
    return _product(turn.T, gain[..., :, None] * kernel)


def _product(a: Array, b: Array) -> Array:
    if b.ndim > 2:
        return jnp.einsum("ij,ljk->lik", a, b, precision="highest")
    return jnp.matmul(a, b, precision="highest")
