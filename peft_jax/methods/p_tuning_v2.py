"""P-tuning v2: deep prompts, keys and values of their own in every layer (Liu et al. 2021, arXiv 2110.07602).

    attention(q, [P_K; k], [P_V; v])        P_K, P_V ``[layers, l, kv_heads, head_dim]``

The same port as prefix tuning, without its MLP by default (section 3.3: reparametrisation helps on some tasks and harms
on others), with the model's dropout on the prompt, and for understanding rather than generation: it is used with a
classification head.  2 · layers · l · kv_heads · head_dim numbers train.  It is not P-tuning v1, which trains prompts
of the input layer through an LSTM.

Source: section 3; THUDM/P-tuning-v2, model/prefix_encoder.py.
"""

from typing import Any

from peft_jax.core import Method
from peft_jax.methods.prefix_tuning import prefix_tuning


def p_tuning_v2(
    length: int = 20, *, hidden: int | None = None, dropout: float = 0.1, name: str = "p_tuning_v2", **options: Any
) -> Method:
    """Deep prompts.  Arguments and errors as in `methods.prefix_tuning`; `hidden` adds its MLP, and `start`, another
    task's tree, is the paper's multi-task learning: prompts trained on several tasks begin each task's own.

    >>> import jax, transformers, peft_jax as pj
    >>> from peft_jax import methods, models
    >>> config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    >>> model = models.from_config(config, jax.random.key(1))
    >>> params, forward = methods.p_tuning_v2(8)(jax.random.key(0), model.params, model.forward)
    >>> pj.count(params).trainable == 2 * 2 * 8 * 16
    True
    """
    return prefix_tuning(length, hidden=hidden, dropout=dropout, name=name, **options)
