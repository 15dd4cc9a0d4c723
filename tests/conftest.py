"""Strict for everyone: what passes here passes with no silent promotion, broadcast, download or warning.

The environment is set before JAX and torch are imported, for this process and for the workers that it starts.
"""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest
import strictness

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
strictness.install()


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """Without LLVM's optimisations, which are half of a compile and change no law.

    Programs of the two kinds differ in last bits, so none is shared.
    """
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
