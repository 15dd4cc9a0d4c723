"""The methods: one file a paper."""

from peft_jax.methods.dora import dora
from peft_jax.methods.lora import lora
from peft_jax.methods.lora_plus import lora_plus
from peft_jax.methods.olora import olora
from peft_jax.methods.pissa import pissa
from peft_jax.methods.unfreeze import unfreeze

__all__ = ["dora", "lora", "lora_plus", "olora", "pissa", "unfreeze"]
