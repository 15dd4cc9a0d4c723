"""Rotary positions, and their scaling to longer texts than a model was trained on.

    q, k at position m turn by m·f_i in each pair i of their d numbers        f_i = θ^(−2i/d)

    rope_type   rescaled, by a factor s, from L positions
    default     f_i
    linear      f_i / s                                     position interpolation (Chen et al. 2023, arXiv 2306.15595)
    dynamic     θ grown by (s·n/L − s + 1)^(d/(d−2)) for a text of n > L tokens     dynamic NTK (arXiv 2309.00071, 3.3)
    yarn        f_i / s where a pair turns less than β_slow = 1 time in L positions, f_i where it turns more than
                β_fast = 32 times, a blend between; q and k grow by 0.1·ln s + 1    (Peng et al. 2023, arXiv 2309.00071)
    llama3      a blend too, in the turns themselves                            (arXiv 2407.21783, section 3.4.2)

Source: transformers, modeling_rope_utils.py, for the fields of a config and for what is rounded where.

Departures: n is each row's own length, so that no row depends on the others of its batch; transformers takes the
longest of the batch, and of earlier calls.  As there, keys in a cache stay turned as they were when they were written.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' kinds of layers
KINDS: dict[str, tuple[str, ...]] = {  # what each reads, beside rope_theta
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL),
}
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


def read(config: Any, kind: str = "") -> dict[str, Any]:
    """A transformers config's rotary fields; of its layers of one `kind`, where kinds of layers differ in them.

    Raises:
        ValueError: on a scaling that is not supported or lacks a field, or heads that rotate in part.
    """
    given = config.rope_parameters or {}
    rope = {"rope_theta": 10000.0, "rope_type": "default"} | dict(given[kind] if kind else given)
    scaling = rope["rope_type"]
    if scaling not in KINDS:
        raise ValueError(f"rotary scaling {scaling!r} is not supported: {', '.join(KINDS)} are")
    if missing := [field for field in KINDS[scaling] if rope.get(field) is None]:
        raise ValueError(f"rotary scaling {scaling!r} lacks {', '.join(missing)}: complete its rope_parameters")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rotary positions of a part of each head (partial_rotary_factor) are not supported")
    return {field: value for field, value in rope.items() if not isinstance(value, dict | list)}


def positions_of(config: Any, kind: str = "") -> int:
    """How many positions a config's model has: dynamic scaling keeps the original number in max_position_embeddings."""
    rope, positions = read(config, kind), config.max_position_embeddings
    return math.ceil(positions * rope["factor"]) if rope["rope_type"] == "dynamic" else positions


def frequencies(rope: Mapping[str, Any], dim: int) -> np.ndarray:
    """f_i for i in 0 … dim/2 − 1, in fp32, for texts that dynamic scaling leaves as they are."""
    found = 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    if rope["rope_type"] == "linear":
        found = found / rope["factor"]
    elif rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope[ORIGINAL] * found / (2 * math.pi)
        blend = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: slow, fully rescaled; 1: fast, untouched
        found = (1 - blend) * found / rope["factor"] + blend * found
    elif rope["rope_type"] == "yarn":
        blend = 1 - _ramp(rope, dim)
        found = (1 - blend) * found / rope["factor"] + blend * found
    return found.astype(np.float32)


def _ramp(rope: Mapping[str, Any], dim: int) -> np.ndarray:
    """0 up to the last pair that turns β_fast times in L positions, 1 from the first that turns β_slow times."""

    def pair(turns: float) -> float:
        return dim * math.log(rope[ORIGINAL] / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first, last = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last += 0.001 if first == last else 0
    return np.clip((np.arange(dim // 2, dtype=np.float32) - first) / (last - first), 0, 1)


def growth(rope: Mapping[str, Any]) -> float:
    """What q and k are each multiplied by."""
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    grown = lambda by: 1.0 if rope["factor"] <= 1 else 0.1 * by * math.log(rope["factor"]) + 1.0  # noqa: E731
    return grown(above) / grown(below) if above and below else grown(1)


def turns(
    rope: Mapping[str, Any], dim: int, original: int, positions: Int[Array, "batch time"]
) -> tuple[Float[Array, "batch time 1 half"], Float[Array, "batch time 1 half"]]:
    """(cos, sin) of every pair's angle at these positions, fp32; `original` is L where scaling is dynamic."""
    if rope["rope_type"] == "dynamic":
        length = jnp.maximum(jnp.max(positions, axis=1) + 1, original).astype(jnp.float32)
        grown = rope["factor"] * length / original - (rope["factor"] - 1)
        base = rope["rope_theta"] * grown ** (dim / (dim - 2))
        shares = jnp.asarray(np.arange(0, dim, 2, dtype=np.float32) / dim)
        found = (base[:, None] ** -shares[None])[:, None, None]
    else:
        found = jnp.asarray(frequencies(rope, dim))[None, None, None]
    angles, by = positions[..., None, None].astype(jnp.float32) * found, growth(rope)
    return jnp.cos(angles) * by, jnp.sin(angles) * by


def rescaled(config: Any, scaling: Mapping[str, Any]) -> Any:
    """A copy of a transformers config whose rotary positions are scaled as `scaling` says, and that has so many more.

    Args:
        config: of a model with rotary positions; where its layers differ in theirs (Gemma 3), those of the layers
            with full attention are scaled.
        scaling: transformers' fields: ``{"rope_type": "linear", "factor": 8.0}``; "dynamic" and "yarn" likewise.
            The original number of positions is ``original_max_position_embeddings`` where it is given, and the config's
            own where that is not scaled already.

    Raises:
        ValueError: on a model without rotary positions; on fields that the scaling does not have, or lacks; on a factor
            below 1; where the original number of positions cannot be known.

    >>> import transformers
    >>> longer = rescaled(transformers.LlamaConfig(), {"rope_type": "yarn", "factor": 4.0})
    >>> longer.max_position_embeddings, longer.rope_parameters["original_max_position_embeddings"]
    (8192, 2048)
    """
    every, new = getattr(config, "rope_parameters", None), dict(scaling)
    layers = FULL if every and FULL in every else ""
    old = every[FULL] if every and layers else every
    if not old:
        raise ValueError(f"{config.model_type} has no rotary positions to scale: leave rope_scaling out")
    kind = new["rope_type"] = new.pop("type", None) or new.get("rope_type")
    if kind not in KINDS:
        raise ValueError(f"rope_scaling has the rope_type {kind!r}: choose one of {', '.join(KINDS)}")
    known = {"rope_type", "rope_theta", ORIGINAL, *KINDS[kind], *OPTIONAL.get(kind, ())}
    if strange := sorted(new.keys() - known):
        raise ValueError(f"rope_scaling of the rope_type {kind!r} has no {', '.join(strange)}: it has {sorted(known)}")
    factor = new.get("factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        raise ValueError(f"rope_scaling has the factor {factor!r}: give how many times longer texts get, 1 or more")
    original = new.pop(ORIGINAL, None) or old.get(ORIGINAL)
    if original is None and old.get("rope_type", "default") not in ("default", "dynamic"):
        raise ValueError(
            f"this model's positions are scaled already ({old['rope_type']}): say in rope_scaling how many it was "
            f"trained on, as {ORIGINAL}"
        )
    original = original or config.max_position_embeddings
    if ORIGINAL in KINDS[kind]:
        new[ORIGINAL] = original
    kept = {field: value for field, value in old.items() if field in ("rope_theta", "partial_rotary_factor")}
    config = copy.deepcopy(config)
    config.rope_parameters = {**(every or {}), FULL: kept | new} if layers else kept | new
    config.max_position_embeddings = original if kind == "dynamic" else math.ceil(original * factor)
    read(config, layers)
    return config
