"""Frozen weights in few bits: formats, one file each, and the method that puts them in place.

``pj.chain(quant.quantise(quant.nf4()), methods.lora(8))`` is QLoRA.
"""

from peft_jax.quant.gptq import gptq
from peft_jax.quant.grouped import grouped
from peft_jax.quant.int8 import int8
from peft_jax.quant.kernels import use_kernels
from peft_jax.quant.loftq import loftq
from peft_jax.quant.method import dequantise, quantise
from peft_jax.quant.nf4 import fp4, nf4
from peft_jax.quant.requantise import requantise

__all__ = ["dequantise", "fp4", "gptq", "grouped", "int8", "loftq", "nf4", "quantise", "requantise", "use_kernels"]
