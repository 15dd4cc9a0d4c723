"""Products with a quantised leaf, by one of several implementations that compute the same.

    y = x W      W = dequantised(codes)       accumulated in fp32

A leaf carries its choice in the static field `implementation`, and `use_kernels` sets it; nothing else of the leaf
changes.  `times` obeys it, inside the backward rule of `peft_jax.quant.frozen`, which keeps the codes alone.

    'xla'        dequantises the layer and multiplies, in plain JAX: the reference, and what leaves begin with
    'tiled'      the same a tile of rows at a time, for processors with caches
    'triton'     Pallas kernels for NVIDIA GPUs (Pallas's Triton backend): up to 64 rows of x, a product that
                 dequantises in registers; more rows, a kernel that dequantises and XLA's own product
    'interpret'  the same kernels, interpreted: slow, for tests on any machine

Source: Dettmers et al. 2023 (QLoRA), section 3; Xu et al. 2023 (QA-LoRA), section 3.2.

Departures: the kernels are one device's; a sharded leaf stays with 'xla', which the compiler can partition.
"""

from peft_jax.quant.kernels.choice import IMPLEMENTATIONS, grouped_matmul, times, use_kernels
from peft_jax.quant.kernels.grouped_int import group_sums

__all__ = ["IMPLEMENTATIONS", "group_sums", "grouped_matmul", "times", "use_kernels"]
