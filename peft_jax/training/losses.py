"""Losses over long vocabularies, computed from features so that the logits of a whole batch never exist.

A loss has the signature ``loss(forward, params, batch, ports) -> (loss_sum, weight_sum)``; training minimises their
ratio over all micro-batches of a step, which makes gradient accumulation exact however a batch is split.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peft_jax.core import Forward, Inputs, Params, Ports
from peft_jax.sharding import mesh_of

Batch = Mapping[str, Any]
Loss = Callable[[Forward, Params, Batch, Ports], tuple[Array, Array]]


def inputs_of(batch: Batch) -> Inputs:
    """What the model reads of a batch: tokens, and the other fields of `Inputs` that the batch has."""
    names = [field.name for field in dataclasses.fields(Inputs) if field.name in batch]
    return Inputs(**{name: jnp.asarray(batch[name]) for name in names})


def next_token(
    forward: Forward,
    params: Params,
    batch: Batch,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of each token's target, in nats: ``(Σ wᵢ (logsumexp(zᵢ) − zᵢ[targetᵢ]), Σ wᵢ)``.

    The batch holds tokens and targets int32 ``[b, t]``, weights fp32 ``[b, t]`` (0 where nothing is to be learnt; the
    target there may be anything), and optionally mask, positions and segments.  Logits z are made for `chunk` positions
    of each row at a time, in fp32, and their gradient is taken on the spot: neither pass ever holds ``[b, t, vocab]``,
    and the head is not run twice.  `chunk_size` chooses it by default.

    Departures: the loss has a reverse mode only (`jax.grad`, `jax.vjp`), and no gradient with respect to the weights.

    >>> import jax.numpy as jnp, peft_jax as pj
    >>> from peft_jax import training
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.embed(inputs.tokens, params))
    >>> batch = {"tokens": jnp.array([[0, 1]]), "targets": jnp.array([[1, 0]]), "weights": jnp.ones((1, 2))}
    >>> total, weight = training.next_token(forward, jnp.zeros((2, 4)), batch)
    >>> round(float(total / weight), 4)  # log 4
    1.3863
    """
    weights = jnp.asarray(batch["weights"], jnp.float32)
    total = _over_tokens(_cross_entropy, forward, params, batch, weights, ports, chunk)
    return total, jnp.sum(weights)


def token_accuracy(
    forward: Forward,
    params: Params,
    batch: Batch,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many targets have the largest logit of their position, weighted: ``(Σ wᵢ [argmax zᵢ = targetᵢ], Σ wᵢ)``."""
    weights = jnp.asarray(batch["weights"], jnp.float32)
    total = _over_tokens(_correct, forward, params, batch, weights, ports, chunk)
    return total, jnp.sum(weights)


def classification(
    forward: Forward,
    params: Params,
    batch: Batch,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of each row's label, in nats, of a model with a head for classes.

    The batch holds tokens, labels int32 ``[b]``, and optionally mask, types and weights ``[b]`` (0 for a void row).

    >>> import jax.numpy as jnp, peft_jax as pj
    >>> from peft_jax import training
    >>> forward = pj.Forward(lambda params, inputs, ports: jnp.zeros((inputs.tokens.shape[0], 4)))
    >>> batch = {"tokens": jnp.zeros((3, 5), int), "labels": jnp.array([0, 3, 1])}
    >>> total, weight = training.classification(forward, {}, batch)
    >>> round(float(total / weight), 4)  # log 4
    1.3863
    """
    scores = forward(params, inputs_of(batch), ports).astype(jnp.float32)
    return _weighed(_cross_entropy(scores[:, None], jnp.asarray(batch["labels"])[:, None])[:, 0], batch)


def label_accuracy(
    forward: Forward,
    params: Params,
    batch: Batch,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many rows' labels have the largest score, weighted, of a model with a head for classes."""
    scores = forward(params, inputs_of(batch), ports)
    return _weighed((jnp.argmax(scores, axis=-1) == jnp.asarray(batch["labels"])).astype(jnp.float32), batch)


def answers(
    forward: Forward,
    params: Params,
    batch: Batch,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of where each row's answer starts and ends, the mean of both, in nats.

    The batch holds tokens, starts and ends int32 ``[b]``, and optionally mask (padding is no place of an answer), types
    and weights ``[b]``.
    """
    scores = forward(params, inputs_of(batch), ports).astype(jnp.float32)
    if "mask" in batch:
        scores = jnp.where(jnp.asarray(batch["mask"])[..., None], scores, -1e9)
    places = jnp.stack([jnp.asarray(batch["starts"]), jnp.asarray(batch["ends"])], axis=1)
    return _weighed(jnp.mean(_cross_entropy(jnp.swapaxes(scores, 1, 2), places), axis=1), batch)


def _weighed(values: Float[Array, "b"], batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    weights = jnp.asarray(batch["weights"], jnp.float32) if "weights" in batch else jnp.ones_like(values)
    return jnp.sum(jnp.where(weights == 0, 0.0, weights * values)), jnp.sum(weights)


def _cross_entropy(logits: Float[Array, "b c v"], targets: Int[Array, "b c"]) -> Float[Array, "b c"]:
    # The target's logit is picked by comparison: it fuses with its neighbours, where a gather's gradient would scatter.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _correct(logits: Float[Array, "b c v"], targets: Int[Array, "b c"]) -> Float[Array, "b c"]:
    return (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


def _over_tokens(
    measure: Callable[[Array, Array], Array],
    forward: Forward,
    params: Params,
    batch: Batch,
    weights: Float[Array, "b t"],
    ports: Ports,
    chunk: int | None,
) -> Float[Array, ""]:
    """``Σ wᵢ measure(zᵢ, targetᵢ)``.  Rows stay whole batches, so that a batch sharded over devices stays sharded."""
    features = forward.features(params, inputs_of(batch), ports)
    targets = jnp.asarray(batch["targets"], jnp.int32)
    if targets.shape != weights.shape or targets.shape != features.shape[:2]:
        raise ValueError(
            f"targets {targets.shape}, weights {weights.shape} and the model's features {features.shape} must share "
            "[batch, time]"
        )
    rows, time = targets.shape
    if chunk is None:
        vocab = jax.eval_shape(forward.head, params, features, ports).shape[-1]
        chunk = chunk_size(rows, vocab)
    chunks = math.ceil(time / chunk)
    chunk = math.ceil(time / chunks)

    mesh = mesh_of(features)
    spread = mesh is not None and mesh.shape.get("sequence", 1) > 1

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        if spread:  # a chunk takes some positions from every device, which then moves none
            return jnp.moveaxis(x.reshape(rows, chunk, chunks, *x.shape[2:]), 2, 0)
        return jnp.swapaxes(x.reshape(rows, chunks, chunk, *x.shape[2:]), 0, 1)

    def score(shared: Any, features: Array, targets: Array, weights: Array) -> Array:
        logits = forward.head(shared[0], features, shared[1]).astype(jnp.float32)
        # Not a product: 0 x infinity would turn a position that nobody asked about into NaN.
        return jnp.sum(jnp.where(weights == 0, 0.0, weights * measure(logits, targets)))

    return _sum_of_chunks(score, (params, ports), split(features), split(targets), split(weights))


def chunk_size(rows: int, vocab: int, backend: str | None = None) -> int:
    """How many positions of each of `rows` rows make one chunk: 128 tokens at least, and about 2²³ logits (32 MiB) on a
    CPU; 2²⁶ on an accelerator, which needs more tokens at a time to be busy with the head's kernel."""
    logits = 2**23 if (backend or jax.default_backend()) == "cpu" else 2**26
    return max(1, math.ceil(max(logits // vocab, 128) / rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_chunks(score: Callable[..., Array], shared: Any, features: Array, targets: Array, weights: Array) -> Array:
    """``Σ score(shared, features[i], targets[i], weights[i])`` over the leading axis, a chunk at a time."""

    def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        return total + score(shared, *chunk), None

    return jax.lax.scan(add, jnp.float32(0), (features, targets, weights))[0]


def _forward(score: Callable[..., Array], shared: Any, features: Any, targets: Any, weights: Any) -> Any:
    """The sum and, in the same pass, its gradient: the sum is a scalar, so the backward pass has only to scale it.

    Gradients are formed for those leaves alone that are being differentiated, so none of a frozen head's kernel.
    """
    if weights.perturbed:
        raise ValueError("the loss has no gradient with respect to the batch's weights: stop_gradient them")
    primals, structure = jax.tree.flatten(shared, is_leaf=lambda x: hasattr(x, "perturbed"))
    moves = [p.perturbed for p in primals]
    moving = [p.value for p in primals if p.perturbed]

    def one(moving: list[Array], features: Array, targets: Array, weights: Array) -> Array:
        given = iter(moving)
        leaves = [next(given) if p.perturbed else p.value for p in primals]
        return score(jax.tree.unflatten(structure, leaves), features, targets, weights)

    def add(carry: Any, chunk: tuple[Array, ...]) -> Any:
        total, sums = carry
        value, (grads, df) = jax.value_and_grad(one, argnums=(0, 1))(moving, *chunk)
        return (total + value, [s + g.astype(s.dtype) for s, g in zip(sums, grads, strict=True)]), df

    zeros = [jnp.zeros(x.shape, jnp.float32 if x.dtype.itemsize < 4 else x.dtype) for x in moving]
    chunks = (features.value, targets.value, weights.value)
    (total, sums), df = jax.lax.scan(add, (jnp.float32(0), zeros), chunks)
    grads = iter([s.astype(x.dtype) for s, x in zip(sums, moving, strict=True)])
    filled = [next(grads) if moved else None for moved in moves]
    return total, (jax.tree.unflatten(structure, filled), df)


def _backward(score: Callable[..., Array], kept: Any, cotangent: Array) -> Any:
    shared, features = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), kept)
    return shared, features, None, None


_sum_of_chunks.defvjp(_forward, _backward, symbolic_zeros=True)
