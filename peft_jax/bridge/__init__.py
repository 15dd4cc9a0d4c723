"""Any JAX function as a forward function: the weight methods on Linen, NNX and Equinox models, and plain functions."""

from peft_jax.bridge.bridged import Bridged, bridge

__all__ = ["Bridged", "bridge"]
