"""Language models as pure forward functions on parameter trees, and the files they come from."""

from peft_jax.models.families import FAMILIES
from peft_jax.models.generation import generate, generate_tokens
from peft_jax.models.loading import Model, from_config, load, save

__all__ = ["FAMILIES", "Model", "from_config", "generate", "generate_tokens", "load", "save"]
