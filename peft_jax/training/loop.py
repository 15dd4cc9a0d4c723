"""The training loop: progress, metrics, evaluation, checkpoints and exact resume around `peft_jax.training.step`."""

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax.core import Forward, Params, Ports, Spec, check_tokens
from peft_jax.training.checkpoints import Checkpoints, abstract
from peft_jax.training.losses import Batch, Loss, next_token
from peft_jax.training.metrics import Log, Record
from peft_jax.training.step import State, compile_step, init_state, make_step, shardings_of
from peft_jax.trees import Optimiser, combine


class Run(NamedTuple):
    """What `fit` gives back.

    params      the whole tree, the trained leaves in place
    opt_state   the optimiser's state
    step        how many steps have been taken, those before a resume included
    history     one dict a step: step, loss, grad_norm, weight, tokens, seconds, learning_rate where the optimiser shows
                it; and one dict an evaluation: step, eval_loss, eval_perplexity, eval_tokens
    """

    params: Params
    opt_state: Any
    step: int
    history: list[Record]


def fit(
    forward: Forward,
    params: Params,
    tx: Optimiser,
    batches: Any,
    steps: int,
    *,
    loss: Loss = next_token,
    key: Array | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    allocate: bool = True,
    checkpoints: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    keep: int = 3,
    metrics: str | os.PathLike[str] | None = None,
    evaluate_on: Iterable[Batch] | None = None,
    evaluate_every: int | None = None,
    callback: Callable[[Record], None] | None = None,
    progress: bool = True,
) -> Run:
    """Trains the trainable leaves of `params` for `steps` steps.  `params` itself stays as it is.

    Args:
        forward, params: the adapted model.
        tx: an optax optimiser (its learning rate may be a schedule), wrapped by `pj.freeze` or not.
        batches: an object with ``batch(step)`` (`training.batches` makes one) or a function of the step, which resume
            for nothing; an iterator with ``get_state`` and ``set_state``, whose state is saved; or any other iterable,
            of which a resumed run skips what has been used.  A batch is a dict of arrays whose first axis is rows.
        steps: how many steps in all, those before a resume included.
        loss: ``loss(forward, params, batch, ports) -> (loss_sum, weight_sum)``.
        key: the run's key, from which dropout and the like are drawn; by default ``jax.random.key(0)``.
        accumulate, clip: as in `training.make_step`.
        allocate: whether AdaLoRA's leaves must find `methods.allocate_rank` in `tx`; False trains them as they are.
        checkpoints: a directory.  A run that finds checkpoints there goes on from the latest, and ends bit for bit
            where an uninterrupted one ends.
        save_every, keep: how often a checkpoint is saved (and at the end), and how many are kept.
        metrics: a JSONL file, one line for each dict of the history; by default ``metrics.jsonl`` beside the
            checkpoints.  Lines of steps after the one that the run starts from are dropped.
        evaluate_on, evaluate_every: batches to evaluate on, every so many steps and at the end.
        callback: called with each dict of the history (for any tracker); by every process of several, in step, with
            the same numbers but for ``seconds``.
        progress: whether to show a progress bar.

    Of several processes (`peft_jax.hosts`) every one calls `fit` with the same arguments, arrays being global ones
    (`pj.place`, `hosts.batches`), and gets the same history.  All write the checkpoints, into a directory that all see;
    process 0 alone writes the metrics and shows the bar.  A run goes on with another number of processes, or another
    mesh: bit for bit on the same one, and up to the order of sums on another.

    Raises:
        FloatingPointError: if a loss, gradient or update is not finite, with the step and the last good checkpoint.
        ValueError: if a token id is outside the vocabulary or the data ends early (with the batch), if the data set is
            empty, if `tx` is not what AdaLoRA's leaves need, or if the checkpoint does not fit this run (with the first
            path that differs).

    >>> import jax.numpy as jnp, numpy as np, optax, peft_jax as pj
    >>> from peft_jax import methods, training
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.embed(inputs.tokens, params["embedding"]))
    >>> params, forward = methods.unfreeze("")(jax.random.key(0), {"embedding": jnp.zeros((4, 4))}, forward)
    >>> batch = {"tokens": np.array([[0, 1, 2]]), "targets": np.array([[1, 2, 3]]), "weights": np.ones((1, 3))}
    >>> run = training.fit(forward, params, optax.sgd(9.0), lambda step: batch, steps=9, progress=False)
    >>> [round(run.history[i]["loss"], 1) for i in (0, -1)]
    [1.4, 0.0]
    """
    state, frozen = init_state(params, tx, jax.random.key(0) if key is None else key, allocate=allocate)
    step = make_step(forward, tx, loss, accumulate=accumulate, clip=clip, shardings=shardings_of(state))
    state, history = train(
        forward,
        step,
        state,
        frozen,
        Data(batches),
        steps,
        loss=loss,
        key_given=key is not None,
        checkpoints=checkpoints,
        save_every=save_every,
        keep=keep,
        metrics=metrics,
        evaluate_on=evaluate_on,
        evaluate_every=evaluate_every,
        callback=callback,
        progress=progress,
    )
    return Run(combine(state.trainables, frozen), state.opt_state, steps, history)


Whole = Callable[[State, Params], Iterable[tuple[Record, Params]]]


def _one(state: State, frozen: Params) -> Iterable[tuple[Record, Params]]:
    return [({}, combine(state.trainables, frozen))]


def train(
    forward: Forward,
    step: Any,
    state: State,
    frozen: Params,
    data: "Data",
    steps: int,
    *,
    loss: Loss,
    key_given: bool,
    whole: Whole = _one,
    log_of: Callable[..., Log] = Log,
    checkpoints: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    keep: int = 3,
    metrics: str | os.PathLike[str] | None = None,
    evaluate_on: Iterable[Batch] | None = None,
    evaluate_every: int | None = None,
    callback: Callable[[Record], None] | None = None,
    progress: bool = True,
) -> tuple[State, list[Record]]:
    """The loop itself, whatever a step is: what `fit` and `fit_many` share.

    Args:
        step: compiled, as `make_step` gives it.
        whole: the trees to evaluate, each with what its record says beside the numbers.
        log_of: a `Log`, or another that judges each step.
    """
    if isinstance(evaluate_on, Iterator):
        raise ValueError("evaluate_on is an iterator, which one evaluation uses up: give a list of batches")
    if evaluate_every is not None and evaluate_on is None:
        raise ValueError("evaluate_every is given and evaluate_on is not: give the batches to evaluate on")
    _positive(steps=steps, save_every=save_every, evaluate_every=1 if evaluate_every is None else evaluate_every)
    store, start = None, 0
    if checkpoints is not None:
        store = Checkpoints(checkpoints, keep)
        metrics = File(checkpoints) / "metrics.jsonl" if metrics is None else metrics
    try:
        if store is not None and store.latest is not None:
            state, start = _resume(store, state, frozen, data, steps, key_given)
        log = log_of(metrics, start, steps, callback, progress)
        try:
            for index in range(start, steps):
                batch = data.take(index)
                tokens = data.check(batch, forward.spec, index)
                if index == start:
                    compile_step(step, state, frozen, batch)
                state, measured = step(state, frozen, batch)
                # Looked at only now that the next step is under way, so that the device never waits for the host.
                log.report(store)
                log.pending = (index + 1, tokens, measured)
                last = index + 1 == steps
                if evaluate_on is not None and (last or (evaluate_every and (index + 1) % evaluate_every == 0)):
                    log.report(store)
                    for said, params in whole(state, frozen):
                        found = evaluate(forward, params, evaluate_on, loss)
                        log.write({"step": index + 1, **said} | {f"eval_{name}": x for name, x in found.items()})
                    log.restart_clock()
                if store is not None and (last or (index + 1) % save_every == 0):
                    log.report(store)  # never saves a state that has not been found finite
                    store.save(state, frozen, data.position())
                    log.restart_clock()
            log.report(store)
        finally:
            log.close()
    finally:
        if store is not None:
            store.close()
    return state, log.history


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more")


def _resume(
    store: Checkpoints, state: State, frozen: Params, data: "Data", steps: int, key_given: bool
) -> tuple[State, int]:
    start = store.latest or 0
    if start > steps:
        raise ValueError(
            f"{store.path(start)} is already {start} steps long and this run asks for {steps}: ask for at least as "
            "many, or choose another directory"
        )
    words = lambda key: np.array(key if key.dtype == np.uint32 else jax.random.key_data(key))  # noqa: E731
    wanted = words(state.key)
    like = jax.tree.map(abstract, state)
    jax.tree.map(lambda x: x.delete(), state)  # room for what is restored in its place
    state, position = store.restore(like, frozen, start)
    if key_given and not np.array_equal(wanted, words(state.key)):
        raise ValueError(f"{store.path(start)} was saved by a run with another key: give the same key, or none")
    data.resume(start, position)
    return state, start


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(
    forward: Forward,
    params: Params,
    batches: Iterable[Batch],
    loss: Loss = next_token,
    *,
    also: Mapping[str, Loss] | None = None,
) -> dict[str, float]:
    """The loss over all of `batches`, once through, without dropout.

    Gives ``loss``, the weighted mean; ``perplexity``, its exponential; ``tokens``, the weight in all (for token losses,
    how many tokens were predicted); and the weighted mean of each function in `also`, by name:
    ``also={"accuracy": training.token_accuracy}``.

    Raises:
        ValueError: if there are no batches, nothing in them has weight, or a token id is outside the vocabulary.
    """
    names = {"loss": loss, **(also or {})}
    totals = {name: np.zeros(2) for name in names}
    scored = None
    for index, batch in enumerate(batches):
        check_batch(batch, forward.spec, index)
        ahead = _score(tuple(names.values()), forward, params, batch)
        _add(totals, scored)
        scored = ahead
    if scored is None:
        raise ValueError("the evaluation set is empty: give at least one batch")
    _add(totals, scored)
    if any(weight == 0 for _, weight in totals.values()):
        raise ValueError("nothing in the evaluation set has weight: every batch's weights are 0")
    means = {name: float(value / weight) for name, (value, weight) in totals.items()}
    perplexity = float(np.exp(min(means["loss"], 700.0)))
    return {"loss": means.pop("loss"), "perplexity": perplexity, "tokens": float(totals["loss"][1]), **means}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(losses: tuple[Loss, ...], forward: Forward, params: Params, batch: Batch) -> list[tuple[Array, Array]]:
    return [loss(forward, params, batch, Ports()) for loss in losses]


def _add(totals: dict[str, np.ndarray], scored: list[tuple[Array, Array]] | None) -> None:
    for total, (value, weight) in zip(totals.values(), scored or (), strict=False):
        total += np.array([float(value), float(weight)])


# -- data -------------------------------------------------------------------------------------------------------------


def check_batch(batch: Any, spec: Spec, index: int) -> int | Array:
    """How many real tokens a batch has; raises if a token or a target that has weight is outside the vocabulary.

    Of a batch that lies on several processes each checks its own part, and the count is one of all parts, on its way.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch {index} is a {type(batch).__name__}: give a dict of arrays (tokens, targets, weights)")
    host = {name: _held(x) for name, x in batch.items()}
    try:
        for name, positions in (("tokens", spec.positions), ("decoder_tokens", spec.decoder_positions)):
            if name in host:
                whole = jax.ShapeDtypeStruct(np.shape(batch[name]), np.int32)
                check_tokens(whole, dataclasses.replace(spec, positions=positions, vocab=0))
                check_tokens(host[name], dataclasses.replace(spec, positions=0))
        if "targets" in host and "weights" in host and host["targets"].shape == host["weights"].shape:
            check_targets(np.where(host["weights"] == 0, 0, host["targets"]), spec)
        if "labels" in host:
            check_targets(host["labels"], spec)
    except ValueError as error:
        raise ValueError(f"batch {index}: {error}") from None
    for name in ("mask", "segments"):
        if name in host:
            return int(np.count_nonzero(host[name])) if _is_whole(batch[name]) else jnp.count_nonzero(batch[name])
    return math.prod(batch["tokens"].shape) if "tokens" in batch else 0


def _is_whole(x: Any) -> bool:
    return bool(getattr(x, "is_fully_addressable", True))


def _held(x: Any) -> np.ndarray:
    """What this process has of an array: all of it, or its pieces one below the other."""
    if _is_whole(x) or x.is_fully_replicated:
        return np.asarray(x)
    return np.concatenate(list({str(shard.index): np.asarray(shard.data) for shard in x.addressable_shards}.values()))


def check_targets(targets: np.ndarray, spec: Spec) -> None:
    """Raises on targets that are none of the head's labels, or tokens outside the vocabulary of one without labels."""
    if not spec.labels:
        check_tokens(targets, dataclasses.replace(spec, positions=0))
    elif targets.size and not 0 <= targets.min() <= targets.max() < spec.labels:
        wrong = targets.min() if targets.min() < 0 else targets.max()
        raise ValueError(f"label {wrong} is none of the head's {spec.labels}, which count from 0")


class Data:
    """Any of the kinds of data that `fit` takes, as ``take(step)``."""

    def __init__(self, batches: Any) -> None:
        self.at = batches.batch if _indexable(batches) else batches if callable(batches) else None
        self.taken = 0
        if self.at is None:
            if not hasattr(batches, "__iter__"):
                raise TypeError(f"batches is a {type(batches).__name__}: give batch(step), a function or an iterable")
            self.rows: Iterator[Any] = iter(batches)

    def take(self, step: int) -> Any:
        if self.at is not None:
            return self.at(step)
        try:
            batch = next(self.rows)
        except StopIteration:
            raise ValueError(_ended(self.taken, step)) from None
        self.taken += 1
        return batch

    def check(self, batch: Any, spec: Spec, step: int) -> int | Array:
        return check_batch(batch, spec, step)

    def position(self) -> Any:
        return self.rows.get_state() if self.at is None and hasattr(self.rows, "get_state") else None

    def resume(self, step: int, position: Any) -> None:
        if self.at is not None:
            return
        if position is not None:
            if not hasattr(self.rows, "set_state"):
                raise ValueError("the checkpoint holds a data iterator's position, and these batches have no set_state")
            self.rows.set_state(position)
        else:
            for skipped in range(step):
                self.take(skipped)


def _indexable(batches: Any) -> bool:
    """Whether batches has ``batch(step)``; other libraries' ``batch(batch_size)`` is something else."""
    batch = getattr(batches, "batch", None)
    return callable(batch) and "batch_size" not in inspect.signature(batch).parameters


def _ended(taken: int, step: int) -> str:
    if taken == 0 and step == 0:
        return "the data set is empty: there is no batch to train on"
    return (
        f"the data ended before step {step + 1}, after {taken} batches: ask for fewer steps, or give data that goes on "
        "(training.batches, itertools.cycle)"
    )
