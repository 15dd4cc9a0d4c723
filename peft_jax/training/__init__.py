"""Training: a pure compiled step, a loop around it, checkpoints, losses and data."""

from peft_jax.training.checkpoints import Checkpoints
from peft_jax.training.data import Batches, batches, chat, pack, pad
from peft_jax.training.loop import Run, evaluate, fit
from peft_jax.training.losses import answers, classification, label_accuracy, next_token, token_accuracy
from peft_jax.training.many import fit_many
from peft_jax.training.paging import page
from peft_jax.training.perplexity import perplexity
from peft_jax.training.step import State, compile_step, init_state, make_step

__all__ = [
    "Batches",
    "Checkpoints",
    "Run",
    "State",
    "answers",
    "batches",
    "chat",
    "classification",
    "compile_step",
    "evaluate",
    "fit",
    "fit_many",
    "init_state",
    "label_accuracy",
    "make_step",
    "next_token",
    "pack",
    "pad",
    "page",
    "perplexity",
    "token_accuracy",
]
