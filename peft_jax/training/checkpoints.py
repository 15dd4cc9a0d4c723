"""Checkpoints of a run: trainables, optimiser state, run key and data position; never the frozen base.

    <folder>/<step>/state/      orbax: trainables, optimiser state, step, key
    <folder>/<step>/manifest/   JSON: what every leaf of the tree was, data position, versions
    <folder>/metrics.jsonl      written by `peft_jax.training.fit`

Of several processes all write, each its own pieces of the arrays, and process 0 the manifest: the directory is one that
all of them see.  Another number of processes, or another mesh, reads it as well.

A checkpoint is written under another name and renamed when it is complete, so an interrupted save leaves the one before
it whole.  Restoring needs neither the optimiser's nor the method's init: arrays are created directly from abstract
trees, in the shardings of the run that asks.  orbax keeps no static fields, and restores into a leaf of another type
without a word: the manifest is compared first.
"""

import base64
import dataclasses
import importlib.metadata
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

import peft_jax
from peft_jax.core import Params
from peft_jax.training.paging import KIND
from peft_jax.training.step import State
from peft_jax.trees import combine
from peft_jax.weights import is_weight

FORMAT = 1
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Restored(NamedTuple):
    state: State
    position: Any  # what the data iterator's get_state gave, or None


class Checkpoints:
    """The checkpoints in a folder, the newest `keep` of them.  A context manager: `close` waits for what is written.

    Raises:
        ValueError: if `keep` is not positive.
        NotADirectoryError: if `folder` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        # Imported here, because it takes half a second and only those who save need it.
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"keep is {keep}: give the number of checkpoints to keep, 1 or more")
        self.folder = File(folder).expanduser().absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file: choose a directory for the checkpoints")
        # Not asynchronous: what is saved is small, and is about to be donated to the next step.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._orbax, self._manager = ocp, ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        return self.steps[-1] if self.steps else None

    def path(self, step: int) -> File:
        return self.folder / str(step)

    def save(self, state: State, frozen: Params, position: Any = None) -> None:
        """Writes a checkpoint of `state`; returns once it is complete.

        Args:
            state: the run's state.
            frozen: the frozen half of the tree, of which only the types are written.
            position: where the data is, as the iterator's ``get_state`` gives it: bytes, or anything that JSON holds.
                It is written once, and must mean the same on each of several processes (as `hosts.loader`'s does).

        Raises:
            TypeError: if `position` is neither.
            ValueError: if several processes are at different positions.
        """
        impl = str(jax.random.key_impl(state.key)) if _is_typed(state.key) else None
        manifest = {"format": FORMAT, **describe(state, frozen), "key_impl": impl}
        manifest |= {"position": _encode(position), "versions": _versions()}
        _agree(manifest["position"])
        args = self._orbax.args
        saved = args.Composite(state=args.StandardSave(_plain(state)), manifest=args.JsonSave(manifest))
        self._manager.save(int(np.max(state.step)), args=saved, force=True)

    def restore(self, state: State, frozen: Params, step: int | None = None) -> Restored:
        """The checkpoint of `step`, or the latest, in the types and shardings of `state` (which may be abstract).

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if it was saved from another tree or optimiser, with the first path that differs.
        """
        step = self.latest if step is None else step
        if step is None or step not in self.steps:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint" + ("" if step is None else f" of step {step}"))
        path, args = self.path(step), self._orbax.args
        if not (path / "manifest").is_dir() or not (path / "state").is_dir():
            raise ValueError(f"{path} is not a checkpoint of peft_jax.training: choose another directory")
        manifest = self._manager.restore(step, args=args.Composite(manifest=args.JsonRestore())).manifest
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path} has format {manifest.get('format')!r}, and this version reads {FORMAT}")
        compare(manifest, describe(state, frozen), str(path))
        like = _plain(state)
        wanted = args.Composite(state=args.StandardRestore(jax.tree.map(_on_device, like)))
        found = jax.tree.map(_placed, self._manager.restore(step, args=wanted).state, like)
        if manifest["key_impl"] is not None:
            found["key"] = jax.random.wrap_key_data(found["key"], impl=manifest["key_impl"])
        return Restored(State(**found), _decode(manifest["position"]))


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _like(x: Any, like: Any) -> jax.ShapeDtypeStruct:
    """An abstract array in the sharding of another: without one, orbax takes that of the devices it was saved from."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding)


def _on_device(x: Any) -> jax.ShapeDtypeStruct:
    """As `abstract`, never in host memory: arrays that orbax makes there have the type of those on the device."""
    sharding = x.sharding if x.sharding is None else x.sharding.with_memory_kind("device")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _placed(x: Array, like: Any) -> Array:
    """Where `like` lies, if that is in host memory."""
    paged = like.sharding is not None and like.sharding.memory_kind == KIND
    return jax.device_put(x, like.sharding) if paged else x


def _is_typed(key: Any) -> bool:
    return jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)


def _plain(state: State) -> dict[str, Any]:
    """The state as orbax is given it: a typed key as its words."""
    fields = state._asdict()
    if _is_typed(state.key):
        data = jax.random.key_data
        concrete = isinstance(state.key, jax.Array)
        fields["key"] = data(state.key) if concrete else _like(jax.eval_shape(data, state.key), state.key)
    return fields


# -- the manifest -----------------------------------------------------------------------------------------------------


def describe(state: State, frozen: Params) -> dict[str, Any]:
    """What a checkpoint must agree with: the types, static fields, shapes and dtypes of the whole tree and of the
    optimiser's state, by path.  Arrays and abstract arrays give the same."""
    params = combine(state.trainables, frozen)
    trees = {"params": params, "optimiser": state.opt_state, "key": state.key}
    return {name: dict(nodes(tree, "")) for name, tree in trees.items()}


def nodes(tree: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """``(path, description)`` of every array and every `Weight`, a Weight before its fields."""
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)[0]:
        path = "/".join(part for part in (prefix, jax.tree_util.keystr(keys, simple=True, separator="/")) if part)
        if not is_weight(node):
            yield path, _array(node)
            continue
        fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
        static = [f.name for f in dataclasses.fields(node) if f.metadata.get("static")]
        for name in (f.name for f in dataclasses.fields(node) if f.metadata.get("placement")):
            fields.pop(name)  # another mesh may go on with it
            static.remove(name)
        yield path, f"{type(node).__name__}({', '.join(f'{name}={_static(fields.pop(name))}' for name in static)})"
        for name, value in fields.items():
            yield from nodes(value, f"{path}/{name}") if value is not None else ()


def _array(x: Any) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _static(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)


def compare(saved: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """Raises on the first path at which a saved manifest and this run's differ."""
    for part, now in wanted.items():
        before = saved[part]
        for path in [*now, *(p for p in before if p not in now)]:
            if before.get(path) != now.get(path):
                raise ValueError(
                    f"{where} does not fit this run: at {'/'.join(filter(None, (part, path)))} it has "
                    f"{before.get(path, 'nothing')}, and the run has {now.get(path, 'nothing')}: build the same model, "
                    "method and optimiser, or choose another directory"
                )


def _versions() -> dict[str, str]:
    """For the reader's information: never compared."""
    found = {"peft_jax": peft_jax.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _agree(position: Any) -> None:
    """Raises on every process if they are not all at one position, which no other number of them could take up."""
    if jax.process_count() == 1 or position == {"json": None}:
        return
    from jax.experimental import multihost_utils

    mine = np.uint32(zlib.crc32(json.dumps(position, sort_keys=True).encode()))
    if len(set(np.ravel(multihost_utils.process_allgather(mine)).tolist())) > 1:
        raise ValueError(
            "the processes' data iterators are at different positions, which no other number of processes could take "
            "up: read through hosts.loader, or by step (hosts.batches)"
        )


def _encode(position: Any) -> Any:
    if isinstance(position, bytes):
        return {"bytes": base64.b64encode(position).decode()}
    try:
        return {"json": _jsonable(position)}
    except TypeError:
        raise TypeError(
            f"the data iterator's get_state gave a {type(position).__name__} that JSON cannot hold: give bytes, or "
            "plain dicts, lists, strings and numbers"
        ) from None


def _jsonable(x: Any) -> Any:
    if isinstance(x, dict) and all(isinstance(k, str) for k in x):
        return {k: _jsonable(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_jsonable(v) for v in x]
    if isinstance(x, np.integer | np.floating):
        return x.item()
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise TypeError


def _decode(position: Any) -> Any:
    return base64.b64decode(position["bytes"]) if "bytes" in position else position["json"]
