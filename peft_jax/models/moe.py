"""Mixtures of experts: Mixtral, Qwen3-MoE.

The Llama family's decoder, in whose layers each token goes through k of many feed-forward networks
(`peft_jax.experts`):

    y = Σᵢ gᵢ · expertᵢ(x)      over the k largest gᵢ = softmax(x W)ᵢ, which norm_topk_prob divides by their sum

An expert's kernels lie with the others', ``[layers, experts, in, out]``; each keeps its own name
(``model.layers.3.mlp.experts.5.gate_proj``, Mixtral's ``model.layers.3.block_sparse_moe.experts.5.w1``), which
is that of its tensor on disk, so a method may adapt some experts of some layers.

Source: transformers, models/mixtral and models/qwen3_moe; conversion_mapping.py for how its fused tensors are saved.

Departures: the loss that balances experts (router_aux_loss_coef) is left out, as it is in transformers unless
output_router_logits asks for it, and so is Mixtral's jitter in training.  Layers are alike: a model that has dense ones
between (decoder_sparse_step, mlp_only_layers) is refused.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax.core import Forward, Params
from peft_jax.experts import Route, route, routed
from peft_jax.layers import Linear, activation, leaf, normal
from peft_jax.models import llama
from peft_jax.models.causal_lm import causal_lm, init_causal_lm
from peft_jax.models.llama import PORTS, ROOT, TABLE
from peft_jax.models.tensors import Tensor

MODEL_TYPES = ("mixtral", "qwen3_moe")
HEADS: tuple[str, ...] = ()
UNUSED = ""
# What each calls its feed-forward block and its experts' kernels, on disk.
NAMES = {
    "mixtral": ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "qwen3_moe": ("mlp", {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """Beside the Llama family's: how many experts there are, how many each token goes through, and whether the shares
    of those add up to one."""

    experts: int
    chosen: int
    normalised: bool


def read_config(config: Any, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Config:
    base = llama.read_config(config, scan, remat, compute_dtype)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    qwen = config.model_type == "qwen3_moe"
    if qwen and (config.mlp_only_layers or config.decoder_sparse_step != 1):
        raise ValueError(
            "this Qwen3-MoE has dense layers between the sparse ones (mlp_only_layers, decoder_sparse_step), and only "
            "models whose layers are all sparse are supported"
        )
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    if not 1 <= chosen <= experts:
        raise ValueError(f"the config's num_experts_per_tok is {chosen}: give 1 to {experts}, which it has")
    own = {"qk_norm": True, "hidden": config.moe_intermediate_size} if qwen else {}
    normalised = not qwen or config.norm_topk_prob
    return Config(**fields | own, experts=experts, chosen=chosen, normalised=normalised)


class Experts(nn.Module):
    """The kernels of one projection, ``[experts, in, out]``, on blocks of one expert each."""

    experts: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "blocks rows inputs"], found: Route) -> Float[Array, "blocks rows outputs"]:
        return routed(x, leaf(self, "kernel", normal, (self.experts, x.shape[-1], self.features)), found.experts)


class Mixture(nn.Module):
    """The gated feed-forward networks of all experts."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "tokens width"], found: Route, shares: Array) -> Float[Array, "tokens width"]:
        c, rows = self.config, found.spread(x)
        gate = Experts(c.experts, c.hidden, name="gate_proj")(rows, found)
        up = Experts(c.experts, c.hidden, name="up_proj")(rows, found)
        return found.gather(
            Experts(c.experts, c.width, name="down_proj")(activation(c.activation)(gate) * up, found), shares
        )


class SparseMLP(nn.Module):
    """The router and its experts, in the place of a dense feed-forward network."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        c, tokens = self.config, x.reshape(-1, x.shape[-1])
        shares = jax.nn.softmax(Linear(c.experts, name="gate")(tokens).astype(jnp.float32), axis=-1)
        shares, chosen = jax.lax.top_k(shares, c.chosen)
        if c.normalised:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        found = route(chosen, c.experts)
        return Mixture(c, name="experts")(tokens, found, shares).reshape(x.shape)


def build(config: Any, *, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Forward:
    """The forward function of a transformers config.  Logits are fp32, whatever the compute dtype."""
    decoder = llama.Decoder(read_config(config, scan, remat, compute_dtype), SparseMLP)
    return causal_lm(decoder, ROOT, TABLE, tensors(config), PORTS, config.model_type)


def init(key: Array, config: Any, *, scan: bool = True, dtype: Any = jnp.float32) -> Params:
    """Random weights: normal with sd 0.02, norms at one."""
    return init_causal_lm(key, llama.Decoder(read_config(config, scan, "none"), SparseMLP), ROOT, dtype)


def tensors(config: Any) -> tuple[Tensor, ...]:
    """Where each tensor of a Hugging Face checkpoint goes: an expert's each by itself."""
    c = read_config(config)
    return _table(config.model_type, c.tied, c.qkv_bias, c.o_bias, c.experts)


def _table(kind: str, tied: bool, qkv_bias: bool, o_bias: bool, experts: int) -> tuple[Tensor, ...]:
    block, kernels = NAMES[kind]
    theirs, ours = f"model.layers.{{layer}}.{block}", "model/layers/mlp"
    shared = llama.table(tied, qkv_bias, o_bias, False, kind == "qwen3_moe")
    found = [tensor for tensor in shared if ".mlp." not in tensor.source]
    found.append(Tensor(f"{theirs}.gate.weight", (f"{ours}/gate/kernel",), transpose=True))
    for name, stored in kernels.items():
        source = f"{theirs}.experts.{{expert}}.{stored}.weight"
        found.append(Tensor(source, (f"{ours}/experts/{name}/kernel",), transpose=True, experts=experts))
    return tuple(found)


EVERY = tuple((f"{ROOT}.{TABLE}", _table(kind, False, True, True, 1)) for kind in MODEL_TYPES)
