"""The Gemma family: Gemma 2, and the text models of Gemma 3.

What sets them apart from the Llama family: embeddings times √width; norms that multiply by 1 + scale, before and after
both halves of a layer; scores by query_pre_attn_scalar^(−1/2); windows in all but every second (Gemma 3: sixth) layer;
and

    Gemma 2     soft caps on attention's scores and on logits, c · tanh(x / c)
    Gemma 3     norms on queries and keys; layers with a window rotate by a base of their own, and scaling to longer
                texts concerns the others alone

Module names are those of `transformers` (models/gemma2, models/gemma3), so that target modules carry over.

Departures: of Gemma 3, checkpoints with a vision tower (model_type gemma3) are not read, nor are models whose attention
looks both ways.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax.attention import chunked_attention, dot_product_attention
from peft_jax.core import Forward, Inputs, Params, Ports
from peft_jax.layers import Embed, RMSNorm, activation, run_layers
from peft_jax.models import llama, rotary
from peft_jax.models.causal_lm import causal_lm, init_causal_lm
from peft_jax.models.llama import MLP, PORTS, ROOT, TABLE, Attention, own_of_layers, windowed
from peft_jax.models.tensors import Tensor
from peft_jax.sequence import arrange

MODEL_TYPES = ("gemma2", "gemma3_text")
HEADS: tuple[str, ...] = ()
UNUSED = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """Beside the Llama family's: the soft caps, and how layers with a window rotate (None: as the others do)."""

    score_cap: float | None
    logit_cap: float | None
    local: tuple[tuple[str, Any], ...] | None


def read_config(config: Any, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Config:
    if config.use_bidirectional_attention:
        raise ValueError("this config's attention looks both ways (use_bidirectional_attention): only causal ones are")
    third, window = config.model_type == "gemma3_text", config.sliding_window
    layers, bias = config.layer_types, config.attention_bias
    if strange := set(layers) - {rotary.FULL, rotary.SLIDING}:
        raise ValueError(f"the config's layer_types hold {min(strange)!r}: {rotary.FULL} and {rotary.SLIDING} are read")
    rope = lambda kind: tuple(sorted(rotary.read(config, kind if third else "").items()))  # noqa: E731
    activation(config.hidden_activation)
    return Config(
        width=config.hidden_size,
        hidden=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        positions=rotary.positions_of(config, rotary.FULL if third else ""),
        original=config.max_position_embeddings,
        epsilon=config.rms_norm_eps,
        activation=config.hidden_activation,
        tied=config.tie_word_embeddings,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=False,
        qk_norm=third,
        windows=tuple(window if kind == rotary.SLIDING else None for kind in layers),
        rope=rope(rotary.FULL),
        scale=config.query_pre_attn_scalar**-0.5,
        centred=True,
        scan=scan,
        remat=remat,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype),
        score_cap=None if third else config.attn_logit_softcapping,  # as in transformers: Gemma 3 never caps scores
        logit_cap=config.final_logit_softcapping,
        local=rope(rotary.SLIDING) if third else None,
    )


class Layer(nn.Module):
    """One decoder layer, in the form that `nn.scan` wants; its own inputs say also which rotation it has."""

    config: Config
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, carry: Any, own: Any, shared: Any) -> tuple[Any, None]:
        (x, cache), (local, (layer, window, prefix)), (turns, visible) = carry, own, shared
        norm = lambda name, x: RMSNorm(self.config.epsilon, True, name=name)(x)  # noqa: E731
        turn = turns[0] if local is None else jax.tree.map(lambda far, near: jnp.where(local, near, far), *turns)
        visible = windowed(visible, window, self.config)
        attention = Attention(self.config, self.attend, name="self_attn")
        y, cache = attention(norm("input_layernorm", x), turn, visible, prefix, cache, layer)
        x = x + norm("post_attention_layernorm", y)
        y = MLP(self.config, name="mlp")(norm("pre_feedforward_layernorm", x))
        return (x + norm("post_feedforward_layernorm", y), cache), None


class Decoder(nn.Module):
    """Embedding, layers, final norm: tokens to features."""

    config: Config

    @nn.compact
    def __call__(self, inputs: Inputs, ports: Ports = Ports()) -> Any:  # noqa: B008 (frozen)
        c = self.config
        x = Embed(c.vocab, c.width, name="embed_tokens")(inputs.tokens)
        x = x * jnp.asarray(c.width**0.5, x.dtype)
        x = x if c.compute_dtype is None else x.astype(c.compute_dtype)
        sequence = arrange(inputs, x, ports)
        visible = dataclasses.replace(sequence.visible, cap=c.score_cap)
        kinds = (c.rope,) if c.local is None else (c.rope, c.local)
        turns = tuple(rotary.turns(dict(rope), c.head_dim, c.original, sequence.positions) for rope in kinds)
        local = None if c.local is None else np.array([window is not None for window in c.windows])
        own = (local, own_of_layers(c, sequence.prefix))
        # Capped scores are beyond cuDNN: in chunks they take memory that grows with the text, not with its square.
        attend = ports.attend or (dot_product_attention if c.score_cap is None else chunked_attention)
        x, cache = run_layers(Layer, (c, attend), c, (sequence.x, sequence.cache), own, (turns, visible))
        return sequence.finish(RMSNorm(c.epsilon, True, name="norm")(x), cache)


def build(config: Any, *, scan: bool = True, remat: str = "full", compute_dtype: Any = None) -> Forward:
    """The forward function of a transformers config.  Logits are fp32, whatever the compute dtype."""
    c = read_config(config, scan, remat, compute_dtype)
    options = {"cap": c.logit_cap, "embedding_scale": c.width**0.5}
    return causal_lm(Decoder(c), ROOT, TABLE, tensors(config), PORTS, config.model_type, **options)


def init(key: Array, config: Any, *, scan: bool = True, dtype: Any = jnp.float32) -> Params:
    """Random weights: normal with sd 0.02, norms at zero, which multiply by one."""
    return init_causal_lm(key, Decoder(read_config(config, scan, "none")), ROOT, dtype)


def tensors(config: Any) -> tuple[Tensor, ...]:
    """Where each tensor of a Hugging Face checkpoint goes."""
    c = read_config(config)
    return _table(c.tied, c.qkv_bias, c.qk_norm)


def _table(tied: bool, bias: bool, qk_norm: bool) -> tuple[Tensor, ...]:
    around = [
        Tensor(f"model.layers.{{layer}}.{name}.weight", (f"model/layers/{name}/scale",))
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    ]
    return (*llama.table(tied, bias, bias, False, qk_norm), *around)


EVERY = ((f"{ROOT}.{TABLE}", _table(False, True, True)),)  # what any member has, behind its embedding
