"""Files of other projects: GGUF models, quantised checkpoints, HF PEFT adapters."""

from peft_jax.interop import bitsandbytes as bitsandbytes
from peft_jax.interop import gguf as gguf
from peft_jax.interop import gptq as gptq
from peft_jax.interop import hf_peft as hf_peft
