"""What a method puts into a model's ports: where it lies in the tree, and how a call takes it from there.

params["ports"][name]    a `Weight`, which says what of it trains, or a dict of several
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.core import Forward, Params, Ports
from peft_jax.weights import Weight, static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stored(Weight):
    """Several prompts or prefixes, of which each row of a batch uses one (see `peft_jax.adapters`): `several` is a leaf
    whose arrays have their number first; `active` is the one in use where a call names none, −1 for none at all."""

    several: Any
    active: Any
    names: tuple[str, ...] = static(default=())
    name: str = static(default="adapters")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.several.shape)

    @property
    def dtype(self) -> Any:
        return self.several.dtype

    def trained_size(self) -> int:
        return self.several.trained_size()

    def numbers(self) -> tuple[int, int]:
        return self.trained_size(), 0

    def at(self, index: Any) -> Any:
        """One of them, or one a row of the batch; beyond the last is NaN, which the training guard reports."""
        chosen = jax.tree.map(lambda x: jnp.take(x, jnp.maximum(index, 0), axis=0, mode="fill"), self.several)
        if not jnp.ndim(index):
            return chosen
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, self.several.row_axis), chosen)


def need(port: str, forward: Forward, rows: int, decoder_rows: int = 0) -> None:
    """Raises if a forward function has no such port, or no position left for real tokens behind so many rows."""
    spec = forward.spec
    if port not in spec.ports:
        has = ", ".join(sorted(spec.ports)) or "none"
        raise ValueError(
            f"this forward function has no port {port!r} (it has {has}): let its features read ports.{port}, and name "
            "it in Spec(ports=...)"
        )
    for taken, positions in ((rows, spec.positions), (decoder_rows, spec.decoder_positions)):
        if positions and taken >= positions:
            raise ValueError(f"a {port} of {taken} rows leaves real tokens none of the {positions} positions there are")


def behind(forward: Forward, rows: int, decoder_rows: int = 0) -> Forward:
    """The same forward function with so many positions less for real tokens."""
    spec = forward.spec
    left = dataclasses.replace(
        spec,
        positions=spec.positions - rows if spec.positions else 0,
        decoder_positions=spec.decoder_positions - decoder_rows if spec.decoder_positions else 0,
    )
    return dataclasses.replace(forward, spec=left)


def key_of(key: Array, name: str) -> Array:
    """A key for a method's draws, from its name alone."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def pick(leaf: Any, ports: Ports) -> tuple[Any, Ports]:
    """The leaf that a call uses, a single one or one a row; and the ports, which then say what rows go without.

    Raises:
        ValueError: if what is stacked meets what is not: rows that go without would go without both.
    """
    stored = isinstance(leaf, Stored)
    if (ports.prompt is not None or ports.prefix is not None) and stored == (ports.alone is None):
        raise ValueError("a stack of prompts or prefixes meets one that is not stacked: stack trees that have both")
    if not stored:
        return leaf, ports
    index = leaf.active if ports.adapter is None else ports.adapter
    return leaf.at(index), dataclasses.replace(ports, alone=index < 0)


def put(params: Params, name: str, leaf: Any) -> Params:
    """The tree with a port's leaf."""
    return {**params, "ports": {**params.get("ports", {}), name: leaf}}


def take(params: Params, name: str) -> tuple[Params, Any]:
    """The tree without a port's leaf, and the leaf.

    Raises:
        ValueError: if it is not there.
    """
    there = dict(params.get("ports", {}))
    if name not in there:
        raise ValueError(f"the tree lacks ports/{name}, which this forward function reads: give it the method's params")
    leaf = there.pop(name)
    rest = {entry: value for entry, value in params.items() if entry != "ports"}
    return rest | ({"ports": there} if there else {}), leaf
