"""`quantise`: the frozen base of a model in few bits, as a method that chains with any other."""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Forward, Method, Params, Path
from peft_jax.on_disk import OnDisk, is_on_disk, stacked
from peft_jax.quant.frozen import Frozen
from peft_jax.trees import Pattern, Site
from peft_jax.views import view_of
from peft_jax.weights import Leaf, Unfrozen, Weight, innermost, is_weight, materialise, rebase


@runtime_checkable
class Format(Protocol):
    """What `nf4`, `fp4`, `int8` and `grouped` make."""

    def quantise(self, array: Any, *, transposed: bool = True) -> Weight: ...


def quantise(
    format: Format, select: Pattern = trees.LAYER_MATRICES, *, progress: bool = True, name: str = "quantise"
) -> Method:
    """Stores the base of every leaf that `select` matches in few bits; whatever adapts a leaf goes on adapting it.

    ``chain(quantise(nf4()), lora(8))`` is QLoRA, and so is ``chain(lora(8), quantise(nf4()))``.  Leaves that are still
    on disk (``models.load(..., lazy=True)``) are read, packed and freed a layer at a time; what `select` leaves out
    stays on disk, for `pj.place` to read.

    Args:
        format: `nf4(…)`, `fp4(…)`, `int8()` or `grouped(…)`.
        select: a pattern over the model's names (see `pj.select`); by default every matrix of the layers, not the
            embedding or the head.
        progress: shows a bar while layers are read from disk.
        name: what messages call it.

    Raises:
        ValueError: on a pattern that matches nothing, some layers of a stacked leaf only, or what is quantised already;
            on numbers that are not finite.
        TypeError: on a leaf that trains whole.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods, quant
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.random.normal(jax.random.key(1), (64, 64))}}
    >>> qlora = pj.chain(quant.quantise(quant.nf4(), "q_proj"), methods.lora(4, select="q_proj"))
    >>> params, forward = qlora(jax.random.key(0), params, forward)
    >>> print(pj.summary(params).splitlines()[1])
    LoRA(FourBit)                  1            512            4,096            4,172
    """

    def init(key: Array, params: Params, forward: Forward) -> Params:
        from tqdm import tqdm

        found = trees.select(select, params, forward)
        bases = [innermost(leaf) for path, leaf in trees.leaves(params).items() if path in found]
        layers = sum(math.prod(base.lead) for base in bases if is_on_disk(base))
        with tqdm(total=layers, unit="matrix", desc=name, disable=not (progress and layers), dynamic_ncols=True) as bar:
            return trees.map_leaves(lambda path, leaf: _store(format, found.get(path), leaf, name, bar), params)

    return Method(init)


def dequantise(params: Params) -> Params:
    """Plain arrays in place of everything stored in few bits; what adapts a leaf goes on adapting it.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import quant
    >>> params = {"kernel": quant.nf4().quantise(jax.random.normal(jax.random.key(1), (64, 64)))}
    >>> quant.dequantise(params)["kernel"].shape
    (64, 64)
    """

    def each(path: Path, leaf: Leaf) -> Leaf:
        if not isinstance(innermost(leaf), Frozen):
            return leaf
        view, plain = view_of(leaf), jax.jit(materialise)
        return rebase(leaf, plain if view is None else lambda w: view.over(plain(w)))

    return trees.map_leaves(each, params)


def _store(format: Format, site: Site | None, leaf: Leaf, name: str, bar: Any) -> Leaf:
    if site is None:
        return leaf
    check(site, leaf, name)
    base, where = innermost(leaf), "/".join(site.path)
    try:
        if is_on_disk(base):
            packed = _stream(format, base, not site.embedding, bar)
        else:
            view = view_of(leaf)  # its matrix is what is stored, and the view stays: it knows the shape
            matrix = base if view is None else jax.jit(materialise)(view)
            packed = format.quantise(matrix, transposed=not site.embedding)
    except ValueError as error:
        raise ValueError(f"{where}{_unfinite(site, base)}: {error}") from None
    return rebase(leaf, lambda _: packed)


def check(site: Site, leaf: Leaf, name: str) -> None:
    """Raises on a leaf that cannot be stored in few bits as a whole."""
    where = "/".join(site.path)
    if not all(site.chosen):
        missed = next(n for n, hit in zip(site.names, site.chosen, strict=True) if not hit)
        raise ValueError(
            f"{where} holds all layers in one array, and select leaves out {missed}: {name} stores all or none of them "
            "(load the model with scan=False to choose by layer)"
        )
    if any(isinstance(w, Unfrozen) for w in trees.weights(leaf)):
        raise TypeError(f"{where} trains whole and cannot be stored in few bits: leave it out of select")
    base = innermost(leaf)
    if is_weight(base) and not is_on_disk(base):
        raise ValueError(f"{where} is stored as {type(base).__name__} already")


def _stream(format: Format, base: OnDisk, transposed: bool, bar: Any) -> Leaf:
    """The leaf of an array that is on disk: one layer of it is in memory at a time."""

    def make(number: int) -> Leaf:
        try:
            layer = format.quantise(jnp.asarray(base.layer(number)[None]), transposed=transposed)
        except ValueError as error:
            raise ValueError(f"{base.names[number]}: {error}") from None
        bar.update()
        return jax.tree.map(lambda x: np.asarray(x)[0], layer)

    return stacked(base.lead, make)


def _unfinite(site: Site, base: Leaf) -> str:
    """Which layer of a stacked array is not finite, if one is."""
    if not site.lead or is_on_disk(base) or isinstance(base, jax.core.Tracer):
        return ""
    each = base.reshape(-1, *site.matrix_shape(base))
    broken = [name for name, layer in zip(site.names, each, strict=True) if not np.isfinite(np.asarray(layer)).all()]
    return f", {broken[0]}" if broken else ""
