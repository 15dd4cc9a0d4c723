"""Many adapters trained at once on one frozen base: `fit` with one more axis.

    state     one of every run, stacked: trainables [n, …], optimiser states [n, …], keys [n]
    frozen    the base once; stacked only where runs differ, such as their scales
    step      vmap of `training.make_step`'s over both, compiled once

Runs may differ in how they start (seed, rank, alpha, prompt), in their learning rate, in their key and in their data.
Each ends where it would end alone, but for the rounding of products of other shapes.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Params, Spec
from peft_jax.methods.lora import LoRA
from peft_jax.methods.pissa import Residual
from peft_jax.training.checkpoints import nodes
from peft_jax.training.loop import Data, Run, train
from peft_jax.training.losses import Batch, Loss, next_token
from peft_jax.training.metrics import Log, Record
from peft_jax.training.paging import is_paged
from peft_jax.training.step import State, Step, init_state, lenient, make_step
from peft_jax.trees import combine, partition
from peft_jax.weights import Weight, innermost


class Rate(NamedTuple):
    """What a run's updates are multiplied by: the state of the last transformation of its optimiser."""

    rate: Array


class Stack(NamedTuple):
    """Several runs as one.

    state       of every run, along a new first axis
    frozen      the frozen half of all trees: an array that they share once, others along a new first axis
    stacked     a tree of booleans of the same structure: which those are
    """

    state: State
    frozen: Params
    stacked: Any


def fit_many(
    forward: Forward,
    params: Mapping[str, Params],
    tx: optax.GradientTransformation,
    batches: Any,
    steps: int,
    *,
    rates: Mapping[str, float] | None = None,
    keys: Mapping[str, Array] | None = None,
    loss: Loss = next_token,
    accumulate: int = 1,
    clip: float | None = None,
    **options: Any,
) -> dict[str, Run]:
    """Trains several adapters of one base in one compiled program; the base is held once.

    A run whose step is not finite stops there, with a warning and with what it had learnt, and the others go on: its
    `Run.step` tells, and the last dict of its history: ``stopped``.

    Args:
        forward: the forward function that the method gave, for any of the runs: what it closes over (a dropout rate)
            is the same for all.
        params: adapted trees by name, equal in structure, on the same base.  LoRA's ranks may differ: smaller ones are
            padded with zeros, which no optimiser moves.
        tx: one optimiser for all.
        batches: as in `training.fit`, for all runs; or a dict of them by name, one a run, with batches of one shape.
        steps: how many steps.
        rates: what each run's updates are multiplied by: its learning rate, where tx has the learning rate 1.
        keys: each run's key, from which dropout and the like are drawn; by default ``jax.random.key(0)`` for all.
        loss, accumulate, clip: as in `training.fit`; the norm that is clipped is a run's own.
        options: of `training.fit`: checkpoints, save_every, keep, metrics, evaluate_on, evaluate_every, callback and
            progress.  Each dict that they are given or write says which ``run`` it is of.

    Raises:
        FloatingPointError: if no run is left.
        ValueError: if the trees differ in structure or base, with the path; and as `training.fit`.

    >>> import jax, numpy as np, optax, peft_jax as pj
    >>> from peft_jax import methods, training
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.embed(inputs.tokens, params["embedding"]))
    >>> base = {"embedding": jax.numpy.zeros((4, 4))}
    >>> trees = {f"rank {r}": methods.lora(r, select="")(jax.random.key(0), base, forward)[0] for r in (1, 2, 4)}
    >>> batch = {"tokens": np.array([[0, 1, 2]]), "targets": np.array([[1, 2, 3]]), "weights": np.ones((1, 3))}
    >>> rates = {"rank 1": 0.1, "rank 2": 0.1, "rank 4": 0.3}
    >>> runs = training.fit_many(forward, trees, optax.adam(1.0), lambda step: batch, 20, rates=rates, progress=False)
    >>> runs["rank 4"].params["embedding"].ranks, runs["rank 4"].history[-1]["loss"] < 0.1
    ((4,), True)
    """
    names, each = tuple(params), isinstance(batches, Mapping)
    for what, given in {"rates": rates, "keys": keys, "batches": batches if each else None}.items():
        if given is not None and (wrong := set(given) ^ set(names)):
            raise ValueError(f"{what} and params differ in {sorted(wrong)[0]!r}: give each run one, by name")
    for name, rate in (rates or {}).items():
        if not math.isfinite(rate):
            raise ValueError(f"the rate of run {name!r} is {rate}: give a finite number")
    made = stack(params, tx, rates, keys)
    data = _DataOfEach({name: batches[name] for name in names}) if each else Data(batches)
    step = make_many_step(forward, tx, loss, made.stacked, each=each, accumulate=accumulate, clip=clip)

    def whole(state: State, frozen: Params) -> Iterable[tuple[Record, Params]]:
        for i, name in enumerate(names):
            pick = lambda on, x, i=i: x[i] if on else x  # noqa: E731
            one = jax.tree.map(lambda x, i=i: x[i], state.trainables)
            yield {"run": name}, combine(one, jax.tree.map(pick, made.stacked, frozen))

    log_of = functools.partial(_Logs, names)
    state, history = train(
        forward,
        step,
        made.state,
        made.frozen,
        data,
        steps,
        loss=loss,
        key_given=keys is not None,
        whole=whole,
        log_of=log_of,
        **options,
    )
    return {name: _run(i, name, tree, tx, state, history) for i, (name, tree) in enumerate(params.items())}


# -- the stack --------------------------------------------------------------------------------------------------------


def rated(tx: optax.GradientTransformation, rate: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """`tx`, its updates multiplied by a rate that its state holds: one function serves runs with rates of their own."""

    def init(params: Params) -> Rate:
        return Rate(jnp.float32(rate))

    def update(updates: Params, state: Rate, params: Params | None = None) -> tuple[Params, Rate]:
        return jax.tree.map(lambda u: (u.astype(jnp.float32) * state.rate).astype(u.dtype), updates), state

    return optax.with_extra_args_support(optax.chain(tx, optax.GradientTransformation(init, update)))


def stack(
    params: Mapping[str, Params],
    tx: optax.GradientTransformation,
    rates: Mapping[str, float] | None = None,
    keys: Mapping[str, Array] | None = None,
) -> Stack:
    """Several runs at step 0 as one.  Arguments and errors as in `fit_many`.

    The base's buffers are shared; those of one base that was loaded twice are compared, and one of them is kept.
    """
    if not params:
        raise ValueError("no runs: give at least one adapted tree by name")
    padded = _padded(params)
    first = next(iter(padded))
    wanted = dict(nodes(padded[first], ""))
    for name, tree in padded.items():
        found = dict(nodes(tree, ""))
        for path in [*wanted, *(p for p in found if p not in wanted)]:
            if found.get(path) != wanted.get(path):
                raise ValueError(
                    f"runs {first!r} and {name!r} differ in structure: {path} is {wanted.get(path, 'missing')} in one, "
                    f"and {found.get(path, 'missing')} in the other; only LoRA's ranks may differ"
                )
    for w in trees.weights(padded[first]):
        if w.needs is not None:
            raise ValueError(
                f"{type(w).__name__} leaves of {w.name!r} train under {w.needs[1]}, whose updates the runs' rates "
                "would multiply: train them one by one (training.fit)"
            )
    made = [
        init_state(tree, rated(tx, (rates or {}).get(name, 1.0)), (keys or {}).get(name, jax.random.key(0)))
        for name, tree in padded.items()
    ]
    if any(map(is_paged, jax.tree.leaves(made[0][0]))):
        raise ValueError("many runs keep their states on the device: give fit_many the optimiser without training.page")
    state = jax.tree.map(lambda *x: jnp.stack(x), *(state for state, _ in made))
    halves = [frozen for _, frozen in made]
    for name, half in zip(padded, halves, strict=True):
        _check_base(first, halves[0], name, half)
    stacked = jax.tree.map(lambda *x: not all(_same(x[0], other) for other in x), *halves)
    frozen = jax.tree.map(lambda on, *x: jnp.stack(x) if on else x[0], stacked, *halves)
    return Stack(state, frozen, stacked)


def _same(x: Array, y: Array) -> bool:
    return x is y or np.array_equal(x, y)


def _check_base(first: str, like: Params, name: str, half: Params) -> None:
    bases = trees.leaves(like)
    for path, leaf in trees.leaves(half).items():
        pairs = zip(jax.tree.leaves(innermost(bases[path])), jax.tree.leaves(innermost(leaf)), strict=True)
        if not all(_same(x, y) for x, y in pairs):
            raise ValueError(
                f"runs {first!r} and {name!r} are on different bases: {'/'.join(path)} holds other numbers"
            )


def _padded(params: Mapping[str, Params]) -> dict[str, Params]:
    """The trees with LoRA's factors padded to the largest rank of their place."""
    found = {name: [w for w in trees.weights(tree) if isinstance(w, LoRA | Residual)] for name, tree in params.items()}
    if len({len(mine) for mine in found.values()}) > 1:
        return dict(params)  # the comparison of structures says where
    places = [_widest(place) for place in zip(*found.values(), strict=True)]

    def pad(tree: Params) -> Params:
        place = iter(places)
        each = lambda w: _pad(w, *next(place)) if isinstance(w, LoRA | Residual) else w  # noqa: E731
        return trees.map_weights(each, tree)

    return {name: pad(tree) for name, tree in params.items()}


def _widest(place: tuple[Any, ...]) -> tuple[int, tuple[int, ...]]:
    ranks = (getattr(w, "ranks", ()) for w in place)
    return max(w.a.shape[-1] for w in place), tuple(map(max, zip(*ranks, strict=False)))


def _pad(w: Any, rank: int, ranks: tuple[int, ...]) -> Weight:
    more, lead = (0, rank - w.a.shape[-1]), ((0, 0),) * (w.a.ndim - 2)
    if more[1]:
        w = dataclasses.replace(w, a=jnp.pad(w.a, (*lead, (0, 0), more)), b=jnp.pad(w.b, (*lead, more, (0, 0))))
    return dataclasses.replace(w, ranks=ranks) if isinstance(w, LoRA) else w


def _run(
    index: int, name: str, tree: Params, tx: optax.GradientTransformation, state: State, history: list[Record]
) -> Run:
    """One run out of the stack, its ranks as they were."""
    trainables, frozen = partition(tree)
    with lenient():
        opt_like = jax.eval_shape(tx.init, trainables)

    def cut(stacked: Any, like: Any) -> Any:
        shapes, structure = jax.tree.flatten(like)
        mine = zip(jax.tree.leaves(stacked), shapes, strict=True)
        return jax.tree.unflatten(structure, [x[index][tuple(map(slice, one.shape))] for x, one in mine])

    own = [{k: v for k, v in record.items() if k != "run"} for record in history if record["run"] == name]
    opt_state = cut(state.opt_state[0], opt_like)
    return Run(combine(cut(state.trainables, trainables), frozen), opt_state, int(state.step[index]), own)


# -- the step ---------------------------------------------------------------------------------------------------------


def make_many_step(
    forward: Forward,
    tx: optax.GradientTransformation,
    loss: Loss,
    stacked: Any,
    *,
    each: bool = False,
    accumulate: int = 1,
    clip: float | None = None,
) -> Step:
    """`training.make_step` of every run at once: ``step(state, frozen, batch) -> (state, metrics [n])``.

    Args:
        stacked: which frozen arrays have an axis of runs, as `stack` gives it.
        each: whether the batch has one too.
        forward, tx, loss, accumulate, clip: as in `training.make_step`; `tx` is the one that `stack` was given.

    A run that has fallen behind, because a step of its was not finite, stays where it is.
    """
    single = make_step(forward, rated(tx), loss, accumulate=accumulate, clip=clip)
    axes = jax.tree.map(lambda on: 0 if on else None, stacked)

    def one(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Array]]:
        moved, measured = single(state, frozen, batch)
        rate = state.opt_state[-1].rate
        return moved, {k: x * rate if k.startswith("learning_rate") else x for k, x in measured.items()}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Array]]:
        moved, measured = jax.vmap(one, in_axes=(0, axes, 0 if each else None))(state, frozen, batch)
        going = state.step == jnp.max(state.step)
        keep = lambda new, old: jnp.where(going.reshape(-1, *(1,) * (new.ndim - 1)), new, old)  # noqa: E731
        return jax.tree.map(keep, moved, state), measured | {"finite": measured["finite"] & going}

    return step


# -- what goes in and comes out ---------------------------------------------------------------------------------------


class _DataOfEach(Data):
    """Data of each run's own, one batch of all at a time."""

    def __init__(self, batches: Mapping[str, Any]) -> None:
        self.of = {name: Data(mine) for name, mine in batches.items()}

    def take(self, step: int) -> Any:
        taken = {name: data.take(step) for name, data in self.of.items()}
        (first, like), *others = taken.items()
        for name, batch in others:
            shapes = [{k: np.shape(x) for k, x in one.items()} for one in (like, batch)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"batch {step}: run {first!r} has {shapes[0]}, and {name!r} {shapes[1]}: pad them alike"
                )
        return {k: np.stack([batch[k] for batch in taken.values()]) for k in like}

    def check(self, batch: Any, spec: Spec, step: int) -> int:
        check = super().check
        return sum(int(check({k: x[i] for k, x in batch.items()}, spec, step)) for i in range(len(self.of)))

    def position(self) -> Any:
        each = [data.position() for data in self.of.values()]
        return None if all(position is None for position in each) else each

    def resume(self, step: int, position: Any) -> None:
        for data, mine in zip(self.of.values(), position or [None] * len(self.of), strict=True):
            data.resume(step, mine)


class _Logs(Log):
    """A record for each run, until it stops."""

    def __init__(self, names: tuple[str, ...], *args: Any) -> None:
        super().__init__(*args)
        self.names, self.stopped = names, {record["run"] for record in self.history if "stopped" in record}

    def judge(self, step: int, numbers: dict[str, Any], good: str) -> list[Record]:
        records, failed = list[Record](), dict[str, str]()
        for i, name in enumerate(self.names):
            if name in self.stopped:
                continue
            record = {"step": step, "run": name, **{k: x[i].item() for k, x in numbers.items()}}
            if not record.pop("finite"):
                failed[name] = f"not finite (loss {record['loss']}, gradient norm {record['grad_norm']})"
                record = {"step": step, "run": name, "stopped": failed[name]}
            records.append(record)
        self.stopped |= failed.keys()
        for name, why in failed.items():
            if len(self.stopped) == len(self.names):
                raise FloatingPointError(
                    f"no run is left: step {step} of run {name!r}, as of the others, is {why}; {good}"
                )
            warnings.warn(f"run {name!r} stops: step {step} is {why}; others go on", RuntimeWarning, stacklevel=2)
        return records
