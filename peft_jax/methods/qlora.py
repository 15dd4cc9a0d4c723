"""QLoRA: LoRA on a frozen base in four bits (Dettmers et al. 2023, arXiv 2305.14314).

    y = x · dequantise(dequantise(c₁, c₂), W⁴) + s · drop(x) A B        s = α/r

W⁴ ``[in, out]`` is frozen: a code of four bits for each number, NF4 by default, a scale c₂ in eight bits for each
block of 64, a scale c₁ for each 256 of those (`peft_jax.quant.nf4`).  A ``[in, r]`` and B ``[r, out]`` train, in every
linear of every layer, which is what the paper finds full fine-tuning's quality to take (section 4, figure 2).  Nothing
here is new: it is ``chain(quant.quantise(format, select), lora(...))``, and either order of the two gives one tree.

The memory is saved in the backward pass as well, which keeps codes and scales and never a dequantised weight
(`peft_jax.quant.frozen`).  The rest of the recipe is the trainer's: layers checkpointed (``remat="full"``, the
default), the optimiser's state paged (`training.page`).  Optimiser: AdamW, β₂ 0.999, 2e-4 up to 13B and 1e-4 above,
constant after a warm-up of 3%, gradient norm clipped at 0.3, batch 16 (appendix B.2, table 9).

Source: sections 2 and 3, equation 5; artidoro/qlora, qlora.py (``get_accelerate_model``, ``find_all_linear_names``).

Departures: the paper computes in bf16 what is stored in four bits, here it is the dtype that the weight had
(``models.load(dtype=jnp.bfloat16)`` for the paper's).  Dropout is 0.1, the paper's up to 13B; above it has 0.05.
"""

from typing import Any

import jax.numpy as jnp

from peft_jax import trees
from peft_jax.core import Method, chain
from peft_jax.methods.lora import lora
from peft_jax.quant.method import Format, quantise
from peft_jax.quant.nf4 import nf4
from peft_jax.trees import Pattern

NF4 = nf4()


def qlora(
    rank: int = 64,
    alpha: float | None = 16,
    select: Pattern = trees.LAYER_MATRICES,
    *,
    format: Format = NF4,
    dropout: float = 0.1,
    dtype: Any = jnp.float32,
    name: str = "qlora",
) -> Method:
    """Stores what `select` matches in few bits, and adapts it by LoRA.

    A base that is stored in few bits already (a bitsandbytes or GPTQ checkpoint) takes `lora` alone; other matrices to
    store than to adapt, ``pj.chain(quant.quantise(...), methods.lora(...))``.

    Args:
        rank: r.
        alpha: α; None for `rank`.
        select: a pattern over the model's names (see `pj.select`); by default every matrix of the layers, not the
            embedding or the head.
        format: how the base is stored: `quant.nf4(…)`, `fp4(…)`, `int8()` or `grouped(…)`.
        dropout: the rate on the adapter's input, active when a call's ports carry a `micro_key` (training).
        dtype: of a and b.
        name: what tells this method from another of its kind in one chain; also seeds its draws.

    Raises:
        ValueError: on a rank, alpha or dropout out of range; on a pattern that matches nothing, some layers of a
            stacked leaf only, or what is stored in few bits already.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.random.normal(jax.random.key(1), (256, 256))}}
    >>> params, forward = methods.qlora(rank=4, select="q_proj")(jax.random.key(0), params, forward)
    >>> pj.count(params)
    Count(trainable=2048, frozen=65536, bytes=42008)
    """
    adapter = lora(rank, alpha, select, dropout=dropout, dtype=dtype, name=name)
    return chain(quantise(format, select, name=name), adapter)
