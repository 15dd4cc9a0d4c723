"""Frozen weights in few bits: formats, and the method that puts them in place."""

from peft_jax.quant.grouped import grouped
from peft_jax.quant.method import quantise
from peft_jax.quant.nf4 import fp4, nf4

__all__ = ["fp4", "grouped", "nf4", "quantise"]
