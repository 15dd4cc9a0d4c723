"""Files of other projects: GGUF models, HF PEFT adapters."""

from peft_jax.interop import gguf as gguf
from peft_jax.interop import hf_peft as hf_peft
