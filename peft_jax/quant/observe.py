"""What the kernels of a model meet: the Gram matrix ``Σ xᵀx`` of each one's inputs, in any model, unchanged.

`Observed` passes its input on as it is.  Its backward pass gives as the "gradient" of a matrix that takes no part in
the forward pass the Gram matrix of that input; so one gradient of any number that the model computes holds all of
them, whether layers are scanned, unrolled or computed again.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peft_jax import trees
from peft_jax.core import Forward, Inputs, Params, Path, as_inputs, check_inputs
from peft_jax.trees import LAYER, Site
from peft_jax.weights import Leaf, Weight, linear, materialise, static


class Place(NamedTuple):
    """One layer of a leaf."""

    path: Path
    layer: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Observed(Weight):
    """A kernel whose inputs are measured in the layers whose `slot` ``[*layers]`` is not −1.

    hessian   fp32 ``[slots, in, in]``, of all layers: what the Gram matrices are the gradient of
    mask      bool ``[batch, time]``, which inputs count, or None
    """

    shares = ("hessian", "mask")

    base: Any
    slot: Any
    hessian: Any = None
    mask: Any = None
    name: str = static(default="observed")

    def axes(self) -> dict[str, Any]:
        return {}  # what it measures is shared, and away

    def materialise(self) -> Array:
        return materialise(self.base)

    def linear(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        return linear(_tap(x, self.hessian, self.slot, self.mask), self.base)


@jax.custom_vjp
def _tap(x: Array, hessian: Array, slot: Array, mask: Any) -> Array:
    return x


def _forth(x: Array, hessian: Array, slot: Array, mask: Any) -> Any:
    return x, (x, hessian, slot, mask)


def _back(kept: Any, g: Array) -> Any:
    x, hessian, slot, mask = kept
    blank = jnp.zeros_like(hessian)
    if mask is not None and x.shape[:-1] == mask.shape:  # else a head's, which has read one place of each row
        x = jnp.where(mask[..., None], x, 0)
    found = jax.lax.cond(slot >= 0, lambda: blank.at[slot].set(gram(x)), lambda: blank)
    return g, found, None, None


_tap.defvjp(_forth, _back)


def gram(x: Float[Array, "*rows inputs"]) -> Float[Array, "inputs inputs"]:
    """``Σ xᵀx`` in fp32."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return jnp.matmul(rows.T, rows, precision="highest")


def as_calibration(batches: Iterable[Any]) -> list[Inputs]:
    """The batches as a model reads them: token arrays, `Inputs`, or dicts of their fields.

    Raises:
        ValueError: if there are none; if an encoder-decoder model's are padded.
    """
    fields = {field.name for field in dataclasses.fields(Inputs)}
    found = []
    for batch in batches:
        if isinstance(batch, Mapping):
            batch = Inputs(**{name: jnp.asarray(x) for name, x in batch.items() if name in fields})
        inputs = as_inputs(batch)
        masks = [mask for mask in (_real(inputs), inputs.decoder_mask) if mask is not None]
        if inputs.decoder_tokens is not None and not all(bool(mask.all()) for mask in masks):
            raise ValueError("these batches pad a source or what is written of it: calibrate on rows of one length")
        found.append(inputs)
    if not found:
        raise ValueError("there is nothing to calibrate on: give one batch of tokens, or more")
    return found


def _real(inputs: Inputs) -> Any:
    """Which places hold tokens, or None where all do."""
    return inputs.segments > 0 if inputs.mask is None and inputs.segments is not None else inputs.mask


def measure(
    forward: Forward, params: Params, batches: Sequence[Inputs], sites: Mapping[Path, Site], places: Sequence[Place]
) -> list[Array]:
    """``(2/n) Σ xᵀx`` of what each place's kernel meets in the batches, of n tokens; fp32 ``[in, in]``.

    Args:
        forward, params: the model.
        sites: of the leaves that are ever measured, so that another choice of places compiles nothing anew.
        places: which of them are, now.

    Raises:
        ValueError: if every token is padding.
    """
    leaves = trees.leaves(params)
    # Layers of one leaf, or leaves of one name in unrolled layers, lie in one array, a slot each.
    kind = {path: LAYER.sub("*", site.names[0], count=1) for path, site in sites.items()}
    slots: dict[str, list[Place]] = {}
    for place in places:
        slots.setdefault(kind[place.path], []).append(place)
    chosen = {path: site for path, site in sites.items() if kind[path] in slots}
    slot = {
        path: site.arranged([_index(slots[kind[path]], Place(path, i)) for i in range(len(site.names))], jnp.int32)
        for path, site in chosen.items()
    }
    blank = {kind[path]: jnp.zeros((len(slots[kind[path]]), *(leaves[path].shape[-2],) * 2)) for path in chosen}
    total, tokens = blank, 0
    for inputs in batches:
        check_inputs(inputs, forward.spec)
        real = _real(inputs)
        tokens += inputs.tokens.size if real is None else int(real.sum())
        total = jax.tree.map(jnp.add, total, _grams(forward, tuple(sorted(kind.items())), blank, params, slot, inputs))
    if not tokens:
        raise ValueError("these batches hold padding alone: calibrate on rows with tokens")
    return [total[kind[place.path]][slots[kind[place.path]].index(place)] * (2 / tokens) for place in places]


def _index(places: Sequence[Place], place: Place) -> int:
    return places.index(place) if place in places else -1


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grams(
    forward: Forward, kinds: tuple[tuple[Path, str], ...], blank: Any, params: Params, slot: Any, inputs: Inputs
) -> Any:
    mask, kind = _real(inputs), dict(kinds)

    def total(hessians: Any) -> Array:
        def watch(path: Path, leaf: Leaf) -> Leaf:
            if path not in slot:
                return leaf
            return Observed(leaf, slot[path], hessians[kind[path]], mask, name=".".join(path))

        out = forward(trees.map_leaves(watch, params), inputs)
        return sum((x.astype(jnp.float32).sum() for x in jax.tree.leaves(out)), jnp.float32(0))

    return jax.grad(total)(blank)
