"""OLoRA: orthonormal low-rank adaptation (Büyükakyüz 2024, arXiv 2406.01775).

    Wᵀ = Q R;   A₀ = R_rᵀ,  B₀ = Q_rᵀ;   y = x (W − s A₀B₀) + s x A B,   A, B from A₀, B₀

LoRA that starts with orthonormal rows in B, taken from the QR factors of W.  The output is unchanged at the start.

Source: section 3, algorithm 1; HF PEFT tuners/lora/layer.py, olora_init.

Departures: W is kept and its residual is a leaf, as in `peft_jax.methods.pissa`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.core import Method
from peft_jax.methods.lora import QUERY_VALUE, low_rank
from peft_jax.methods.pissa import factors, residual
from peft_jax.trees import Pattern, Site
from peft_jax.weights import Leaf


def olora(
    rank: int = 8, alpha: float | None = None, select: Pattern = QUERY_VALUE, *, name: str = "olora", **options: Any
) -> Method:
    """LoRA started at an orthonormal basis of each weight's outputs.  Arguments and errors as in `methods.lora`."""
    return low_rank(_orthonormal, residual, rank=rank, alpha=alpha, select=select, name=name, **options)


def _orthonormal(key: Array, site: Site, leaf: Leaf, rank: int, scale: Array, name: str) -> tuple[Array, Array]:
    return factors(_qr, site, leaf, rank, scale)


def _qr(w: Array, rank: int, scale: Array) -> tuple[Array, Array]:
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T
