"""The Llama family: Llama 2 and 3, SmolLM, Mistral, Qwen2, Qwen3.

One decoder, whose members differ by fields of `Config`: grouped-query attention, biases on q, k, v (Qwen2), norms on
queries and keys (Qwen3), sliding windows (Mistral, Qwen2), tied embeddings, rotary positions that may be
scaled (`peft_jax.models.rotary`).
Module names are those of `transformers` (models/llama/modeling_llama.py), so that target modules carry over.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.attention import Visible, dot_product_attention
from peft_jax.core import Forward, Inputs, Params, Ports
from peft_jax.layers import Embed, Linear, RMSNorm, activation, run_layers
from peft_jax.models import rotary
from peft_jax.models.causal_lm import causal_lm, init_causal_lm
from peft_jax.models.tensors import Tensor
from peft_jax.sequence import arrange, layer_attention

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
HEADS: tuple[str, ...] = ()
UNUSED = ""
PORTS = frozenset({"attend", "prompt", "prefix"})
ROOT, TABLE = "model", "embed_tokens"  # of the tree: the decoder, its embedding


@dataclasses.dataclass(frozen=True)
class Config:
    """What the modules need of a transformers config, and how they are to be run."""

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    original: int  # before dynamic scaling
    epsilon: float
    activation: str
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # a layer each
    rope: tuple[tuple[str, Any], ...]  # transformers' rope_parameters, sorted items
    scale: float  # of attention's scores
    centred: bool = False  # norms multiply by 1 + scale
    scan: bool = True
    remat: str = "full"
    compute_dtype: Any = None

    @property
    def window(self) -> int | None:
        """The window that all layers share, if they do."""
        return self.windows[0] if len(set(self.windows)) == 1 else None


def read_config(config: Any, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Config:
    kind, heads = config.model_type, config.num_attention_heads
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    activation(config.hidden_act)
    return Config(
        width=config.hidden_size,
        hidden=config.intermediate_size,
        layers=layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        positions=rotary.positions_of(config),
        original=config.max_position_embeddings,
        epsilon=config.rms_norm_eps,
        activation=config.hidden_act,
        tied=config.tie_word_embeddings,
        qkv_bias=kind == "qwen2" or getattr(config, "attention_bias", False),
        o_bias=kind != "qwen2" and getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        qk_norm=kind == "qwen3",
        windows=tuple(window if k == "sliding_attention" else None for k in kinds),
        rope=tuple(sorted(rotary.read(config).items())),
        scale=(getattr(config, "head_dim", None) or config.hidden_size // heads) ** -0.5,
        scan=scan,
        remat=remat,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype),
    )


def rotate(x: Float[Array, "b t h d"], turn: tuple[Array, Array]) -> Float[Array, "b t h d"]:
    """Rotary position embedding on (first half, second half) pairs; `turn` is (cos, sin) ``[b, t, 1, d/2]`` in fp32."""
    cos, sin = turn
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(nn.Module):
    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(
        self, x: Array, turn: tuple[Array, Array], visible: Visible, prefix: Any, cache: Any, layer: Array
    ) -> tuple[Array, Any]:
        c = self.config
        batch, time = x.shape[:2]

        def heads(name: str, n: int) -> Array:
            return Linear(n * c.head_dim, c.qkv_bias, name=name)(x).reshape(batch, time, n, c.head_dim)

        query, key, value = heads("q_proj", c.heads), heads("k_proj", c.kv_heads), heads("v_proj", c.kv_heads)
        if c.qk_norm:
            query, key = (
                RMSNorm(c.epsilon, c.centred, name=name)(x) for name, x in (("q_norm", query), ("k_norm", key))
            )
        query, key = rotate(query, turn), rotate(key, turn)
        y, cache = layer_attention(self.attend, query, key, value, visible, c.scale, prefix, cache, layer)
        return Linear(c.width, c.o_bias, name="o_proj")(y.reshape(batch, time, -1)), cache


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate = Linear(c.hidden, c.mlp_bias, name="gate_proj")(x)
        up = Linear(c.hidden, c.mlp_bias, name="up_proj")(x)
        return Linear(c.width, c.mlp_bias, name="down_proj")(activation(c.activation)(gate) * up)


def windowed(visible: Visible, window: Array | None, config: Config) -> Visible:
    """What a layer sees: through its own window, where layers differ in theirs, or the one that they share."""
    if window is not None:
        return dataclasses.replace(visible, window=window, plain=False)
    # Set here, not outside the stack, where the scan would trace it: kernels want a static window.
    return visible if config.window is None else dataclasses.replace(visible, window=config.window)


def own_of_layers(config: Config, prefix: Any) -> tuple[Any, Any, Any]:
    """What each layer has of its own: its number, its window where layers differ in theirs, its prefix."""
    mixed = len(set(config.windows)) > 1
    windows = np.array([w or np.iinfo(np.int32).max for w in config.windows], np.int32) if mixed else None
    return np.arange(config.layers, dtype=np.int32), windows, prefix


class Layer(nn.Module):
    """One decoder layer, in the form that `nn.scan` wants: (carry, this layer's inputs, what all layers share)."""

    config: Config
    attend: Callable[..., Array]
    feed_forward: type[nn.Module] = MLP

    @nn.compact
    def __call__(self, carry: Any, own: Any, shared: Any) -> tuple[Any, None]:
        (x, cache), (layer, window, prefix), (turn, visible) = carry, own, shared
        visible = windowed(visible, window, self.config)
        y = RMSNorm(self.config.epsilon, name="input_layernorm")(x)
        y, cache = Attention(self.config, self.attend, name="self_attn")(y, turn, visible, prefix, cache, layer)
        x = x + y
        y = RMSNorm(self.config.epsilon, name="post_attention_layernorm")(x)
        return (x + self.feed_forward(self.config, name="mlp")(y), cache), None


class Decoder(nn.Module):
    """Embedding, layers, final norm: tokens to features."""

    config: Config
    feed_forward: type[nn.Module] = MLP

    @nn.compact
    def __call__(self, inputs: Inputs, ports: Ports = Ports()) -> Any:  # noqa: B008 (frozen)
        c = self.config
        x = Embed(c.vocab, c.width, name="embed_tokens")(inputs.tokens)
        x = x if c.compute_dtype is None else x.astype(c.compute_dtype)
        sequence = arrange(inputs, x, ports)
        shared = (rotary.turns(dict(c.rope), c.head_dim, c.original, sequence.positions), sequence.visible)
        own = own_of_layers(c, sequence.prefix)
        attend = ports.attend or dot_product_attention
        x, cache = run_layers(Layer, (c, attend, self.feed_forward), c, (sequence.x, sequence.cache), own, shared)
        return sequence.finish(RMSNorm(c.epsilon, name="norm")(x), cache)


def build(config: Any, *, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Forward:
    """The forward function of a transformers config.  Logits are fp32, whatever the compute dtype."""
    decoder = Decoder(read_config(config, scan, remat, compute_dtype))
    return causal_lm(decoder, ROOT, TABLE, tensors(config), PORTS, config.model_type)


def init(key: Array, config: Any, *, scan: bool = True, dtype: Any = jnp.float32) -> Params:
    """Random weights: normal with sd 0.02, norms at one."""
    return init_causal_lm(key, Decoder(read_config(config, scan, "none")), ROOT, dtype)


def tensors(config: Any) -> tuple[Tensor, ...]:
    """Where each tensor of a Hugging Face checkpoint goes."""
    c = read_config(config)
    return table(c.tied, c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm)


def table(tied: bool, qkv_bias: bool, o_bias: bool, mlp_bias: bool, qk_norm: bool) -> tuple[Tensor, ...]:
    ours, theirs = "model/layers/", "model.layers.{layer}."
    found = [
        Tensor("model.embed_tokens.weight", ("model/embed_tokens/embedding",)),
        Tensor("model.norm.weight", ("model/norm/scale",)),
    ]
    if not tied:
        found.append(Tensor("lm_head.weight", ("lm_head/kernel",), transpose=True))
    norms = ["input_layernorm", "post_attention_layernorm"] + ["self_attn.q_norm", "self_attn.k_norm"] * qk_norm
    found += [Tensor(f"{theirs}{n}.weight", (f"{ours}{n.replace('.', '/')}/scale",)) for n in norms]
    biased = {f"self_attn.{n}_proj": qkv_bias for n in "qkv"} | {"self_attn.o_proj": o_bias}
    biased |= {f"mlp.{n}_proj": mlp_bias for n in ("gate", "up", "down")}
    for name, bias in biased.items():
        path = ours + name.replace(".", "/")
        found.append(Tensor(f"{theirs}{name}.weight", (f"{path}/kernel",), transpose=True))
        if bias:
            found.append(Tensor(f"{theirs}{name}.bias", (f"{path}/bias",)))
    return tuple(found)


EVERY = ((f"{ROOT}.{TABLE}", table(False, True, True, True, True)),)  # what any member has, behind its embedding
