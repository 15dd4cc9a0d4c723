"""A tiny language model and a tiny adapter, for tests of what knows neither: training, checkpoints, data."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import peft_jax as pj
from peft_jax.weights import Weight, linear, materialise, static, unembed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Nudge(Weight):
    """``base + a b``, with dropout of `x` before a when a call brings a key."""

    trains = ("a", "b")
    base: Any
    a: Any
    b: Any
    key: Any = None
    rank: int = static(default=2)

    def materialise(self) -> jax.Array:
        return materialise(self.base) + (self.a @ self.b).astype(self.base.dtype)

    def linear(self, x: jax.Array) -> jax.Array:
        kept = x
        if self.key is not None:
            kept = jnp.where(jax.random.bernoulli(self.key, 0.8, x.shape), x, jnp.zeros_like(x))
        return linear(x, self.base) + kept @ self.a.astype(x.dtype) @ self.b.astype(x.dtype)

    def unembed(self, x: jax.Array) -> jax.Array:
        return unembed(x, self.base) + x @ self.b.T.astype(x.dtype) @ self.a.T.astype(x.dtype)


def forward(vocab: int, positions: int = 0, compute: Any = None) -> pj.Forward:
    """Embedding, a running mean over the past, residual layers in a scan, and a tied head; features in `compute`."""

    def features(params: Any, inputs: pj.Inputs, ports: pj.Ports) -> jax.Array:
        x = pj.embed(inputs.tokens, params["embedding"])
        x = x if compute is None else x.astype(compute)
        counts = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
        x = x + jnp.cumsum(x, axis=1) / counts

        def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            return x + jnp.tanh(linear(x, w)), None

        kernel = params["layers"]["kernel"]
        if ports.micro_key is not None and isinstance(kernel, Nudge):
            kernel = dataclasses.replace(kernel, key=jax.random.split(ports.micro_key, kernel.shape[0]))
        return jax.lax.scan(layer, x, kernel)[0]

    def head(params: Any, x: jax.Array, ports: pj.Ports) -> jax.Array:
        return unembed(x, params["embedding"])

    return pj.Forward(features, head, pj.Spec(vocab=vocab, positions=positions))


def params(vocab: int = 48, width: int = 16, layers: int = 2, rank: int = 2, dtype: Any = jnp.float32) -> Any:
    """Random weights; every layer's kernel is nudged, the embedding is frozen."""
    rng = np.random.default_rng(7)
    draw = lambda scale, *shape: (scale * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    kernel, embedding = draw(0.3, layers, width, width), draw(0.5, vocab, width)
    a, b = draw(0.3, layers, width, rank).astype(dtype), draw(0.1, layers, rank, width).astype(dtype)
    return jax.device_put({"embedding": embedding, "layers": {"kernel": Nudge(kernel, a, b, rank=rank)}})


def batch(step: int, rows: int = 4, time: int = 11, vocab: int = 48) -> dict[str, np.ndarray]:
    """A batch that depends on the step alone, with uneven weights, some of them 0 with a target that is no token."""
    rng = np.random.default_rng([5, step])
    tokens = rng.integers(0, vocab, (rows, time)).astype(np.int32)
    targets = ((tokens * 5 + 1) % vocab).astype(np.int32)
    weights = (rng.random((rows, time)) * (rng.random((rows, time)) > 0.3)).astype(np.float32)
    weights *= np.arange(1, rows + 1, dtype=np.float32)[:, None]
    return {"tokens": tokens, "targets": np.where(weights == 0, -100, targets).astype(np.int32), "weights": weights}


def pull(forward, params, batch, ports):
    """A loss that compiles in no time: the distance of one matrix from the batch's largest weight."""
    a = params["layers"]["kernel"].a
    return jnp.sum(jnp.square(a - jnp.max(batch["weights"]))), jnp.float32(a.size)
