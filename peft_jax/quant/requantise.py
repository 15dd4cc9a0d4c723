"""`requantise`: adapters taken into a quantised base, which is then stored in few bits again, and what that costs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax import trees
from peft_jax.core import Params, Path
from peft_jax.quant.frozen import Frozen
from peft_jax.quant.method import Format
from peft_jax.views import view_of
from peft_jax.weights import Leaf, innermost, is_weight, materialise


def requantise(params: Params, format: Format | None = None) -> tuple[Params, dict[str, Array]]:
    """Merges every adapter, and stores the result in few bits where its base was; gives the error that this makes.

        error = ‖stored − merged‖ / ‖merged‖        Frobenius norms, of each layer's matrix

    Rounding a merged weight loses part of what the adapter has learnt, which is why `pj.merge` gives a plain array.
    Leaves that nothing adapts keep their codes, bit for bit, and have no error; so do adapters that their base takes in
    without rounding (`Weight.merged`), whose error is 0 unless a format is given.

    Args:
        params: adapters on quantised bases; adapters on plain arrays are merged as by `pj.merge`.
        format: how to store what was merged, `nf4(…)`, `grouped(…)` and so on; by default as its base is stored.

    Returns:
        The tree, and by the leaf's path ``a/b/kernel`` its error, an fp32 number for each layer.

    Raises:
        ValueError: if no quantised base is adapted; where the format cannot hold a leaf; as `pj.merge` does.

    >>> import jax, peft_jax as pj
    >>> from peft_jax import methods, quant
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    >>> params = {"q_proj": {"kernel": jax.random.normal(jax.random.key(1), (64, 64))}}
    >>> qlora = pj.chain(quant.quantise(quant.nf4(), "q_proj"), methods.lora(4, select="q_proj"))
    >>> params, forward = qlora(jax.random.key(0), params, forward)
    >>> merged, errors = quant.requantise(params, quant.grouped(4, 32))
    >>> type(merged["q_proj"]["kernel"]).__name__, bool(0.05 < errors["q_proj/kernel"] < 0.1)
    ('GroupedInt', True)
    """
    filled = trees.share(params)
    stored = {
        path: leaf
        for path, leaf in trees.leaves(filled).items()
        if is_weight(leaf) and hasattr(leaf, "base") and isinstance(innermost(leaf), Frozen)
    }
    if not stored:
        raise ValueError("no quantised base is adapted here: pj.merge merges the rest, quant.quantise stores it")
    errors: dict[str, Array] = {}

    def store(path: Path, leaf: Leaf) -> Leaf:
        if path not in stored:
            return leaf
        where = "/".join(path)
        merged = jax.jit(lambda leaf: leaf.merged())(leaf)
        view = view_of(leaf)
        if isinstance(merged, Frozen) and format is None:
            errors[where] = jnp.zeros(merged.lead)
            return merged if view is None else view.over(merged)
        base, wide = innermost(leaf), jax.jit(materialise)(merged)
        try:
            small = base.like(wide) if format is None else format.quantise(wide, transposed=_transposed(base))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        errors[where] = error_of(small, wide)
        return small if view is None else view.over(small)

    return trees.merge(trees.map_leaves(store, filled)), errors


def _transposed(base: Any) -> bool:
    return bool(getattr(base, "transposed", True))


@jax.jit
def error_of(stored: Leaf, wanted: Array) -> Array:
    """``‖stored − wanted‖ / ‖wanted‖`` of each layer's matrix; 0 where `wanted` is."""
    if wanted.ndim > 2:
        return jax.lax.map(lambda pair: error_of(*pair), (stored, wanted))
    found, array = materialise(stored).astype(jnp.float32), wanted.astype(jnp.float32)
    size = jnp.linalg.norm(array)
    return jnp.where(size > 0, jnp.linalg.norm(found - array) / jnp.where(size > 0, size, 1), 0)
