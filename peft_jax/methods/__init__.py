"""The methods: one file a paper."""

from peft_jax.methods.adalora import adalora, prune, ranks
from peft_jax.methods.allocate_rank import allocate_rank, orthogonality
from peft_jax.methods.dora import dora
from peft_jax.methods.dylora import dylora, hold_rows, truncate, use_rank
from peft_jax.methods.longlora import longlora, shift_attention
from peft_jax.methods.lora import lora
from peft_jax.methods.lora_plus import lora_plus
from peft_jax.methods.olora import olora
from peft_jax.methods.p_tuning_v2 import p_tuning_v2
from peft_jax.methods.pissa import pissa
from peft_jax.methods.prefix_tuning import bake, prefix_tuning
from peft_jax.methods.prompt_tuning import prompt_tuning
from peft_jax.methods.qalora import qalora
from peft_jax.methods.qlora import qlora
from peft_jax.methods.slora import slora
from peft_jax.methods.unfreeze import unfreeze
from peft_jax.methods.vera import vera

__all__ = [
    "adalora",
    "allocate_rank",
    "bake",
    "dora",
    "dylora",
    "hold_rows",
    "longlora",
    "lora",
    "lora_plus",
    "olora",
    "orthogonality",
    "p_tuning_v2",
    "pissa",
    "prefix_tuning",
    "prompt_tuning",
    "prune",
    "qalora",
    "qlora",
    "ranks",
    "shift_attention",
    "slora",
    "truncate",
    "unfreeze",
    "use_rank",
    "vera",
]
