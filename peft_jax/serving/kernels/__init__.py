"""Products with matrices that lie in the serving pool, and attention over it, by one of several implementations.

    lowrank           y[b] = x[b] A_bᵀ B_b, each row of the batch with its own adapter of its own rank
    paged_attention   attention over past keys and values in the pool, and over the new ones

The pool is one array ``rows [layers, R, W]``: a row is a token's keys, or its values, of all heads, or W numbers of an
adapter's matrix.  Row 0 is zeros, and tables point at it where there is nothing.  The pool is read by row index and
never copied, so that a call's cost follows the rows that its tables name, and not R.

    'xla'        gathers the rows that the tables name, once, and multiplies, in plain JAX: the reference
    'triton'     Pallas kernels for NVIDIA GPUs (Pallas's Triton backend), which gather as they multiply
    'interpret'  the same kernels, interpreted: slow, for tests on any machine

Source: Sheng et al. 2023 (S-LoRA, arXiv 2311.03285), sections 5 and 6; Kwon et al. 2023 (PagedAttention, arXiv
2309.06180), section 4.

Departures: a direction need not fill a row, nor a row be filled by one, so that any matrix of a model is served; the
products are forward only.
"""

from peft_jax.serving.kernels.choice import IMPLEMENTATIONS, lowrank, paged_attention

__all__ = ["IMPLEMENTATIONS", "lowrank", "paged_attention"]
