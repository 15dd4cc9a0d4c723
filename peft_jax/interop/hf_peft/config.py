"""``adapter_config.json`` of LoRA: which modules, which ranks and scales, and what is not supported.

Source: HF PEFT 0.21.2, tuners/lora/config.py; matching in tuners/tuners_utils.py (``check_target_module_exists``),
utils/other.py (``get_pattern_key``, ``_set_trainable``).
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

NOTHING_ADAPTED = "dummy-target-modules"  # HF PEFT's own word for an adapter of modules_to_save or biases alone

# Fields that say nothing about the numbers (how the adapter was made, what was recorded of it), or are read elsewhere.
UNDERSTOOD = """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha
    lora_dropout lora_ga_config megatron_core modules_to_save peft_type peft_version qalora_group_size r rank_pattern
    revision runtime_config target_modules task_type use_dora use_rslora
"""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # the base keeps its weights
RESIDUAL_STARTS = ("pissa", "olora")  # the base loses what the adapter starts with, which can be computed again


def check(config: Mapping[str, Any], where: str) -> None:
    """Whether a config is of the kind that is read here.

    Raises:
        ValueError: on another kind of adapter, or an option that would be passed over.
    """
    kind = config["peft_type"]
    if kind != "LORA":
        raise ValueError(
            f"{where} is an adapter of the type {kind}: LORA, PROMPT_TUNING and PREFIX_TUNING are supported"
        )
    for option, value in config.items():
        if option not in UNDERSTOOD.split() and value not in (None, False, [], {}):
            raise ValueError(f"{where} uses {option} ({value!r}), which is not supported")
    start = config.get("init_lora_weights", True)
    if start not in (*PLAIN_STARTS, *RESIDUAL_STARTS):
        raise ValueError(
            f"{where} was started by init_lora_weights={start!r}, which changes the base's weights so that they cannot "
            "be computed again from the base alone: save it in HF PEFT as a plain LoRA "
            "(save_pretrained(…, path_initial_model_for_weight_conversion=…)), or merge it there"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"{where} has bias={config['bias']!r}: none, all and lora_only are supported")


# -- which modules ----------------------------------------------------------------------------------------------------


def targets(config: Mapping[str, Any], modules: Sequence[str], linear: Collection[str]) -> list[str]:
    """Those of the model's `modules` that the config says are adapted; `linear` is what "all-linear" stands for."""
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules")
    whole = config.get("modules_to_save") or ()
    found = []
    for module in modules:
        if excluded and _named(excluded, module):
            continue
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in whole):
            continue
        if wanted == "all-linear":
            hit = module in linear
        elif isinstance(wanted, list) and module not in wanted:
            hit = _named(wanted, module) and _in_layers(config, module)
        else:
            hit = wanted is not None and _named(wanted, module)
        if hit:
            found.append(module)
    return found


def _named(wanted: str | Sequence[str], module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for before in [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]:
        if match := re.match(rf"{before}\.(\d+)\.", module):
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether `module`, or one that holds it, is trained whole.  The match is on endings, dots or not."""
    parts = module.split(".")
    inside = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(name.endswith(wanted) for wanted in config.get("modules_to_save") or () for name in inside)


def shortest(adapted: Collection[str], modules: Collection[str]) -> list[str]:
    """``target_modules``: last names (``q_proj``) where all that bear them are adapted, full names elsewhere."""

    def short(module: str) -> str:
        last = module.rpartition(".")[2]
        return last if all(other in adapted for other in modules if _named([last], other)) else module

    return sorted({short(module) for module in adapted})


# -- ranks and scales -------------------------------------------------------------------------------------------------


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, np.float32]:
    """A module's rank, and α/r or α/√r.

    Raises:
        ValueError: if either is not a number that makes sense.
    """
    rank = by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise ValueError(f"the adapter's config gives {module} the rank {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"the adapter's config gives {module} the alpha {alpha!r}")
    return rank, np.float32(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def scaling(adapted: Mapping[str, tuple[int, np.float32]]) -> dict[str, Any]:
    """The fields of the config that give each module its rank and scale back, bit for bit.

    A tree holds scales, not α: the config says rsLoRA where only that makes every α a whole number.
    """
    plain, rooted = ({m: _alpha(*pair, root) for m, pair in adapted.items()} for root in (False, True))
    whole = [all(isinstance(alpha, int) for alpha in alphas.values()) for alphas in (plain, rooted)]
    alphas = rooted if whole == [False, True] else plain
    rank = _commonest([rank for rank, _ in adapted.values()], 8)
    alpha = _commonest(list(alphas.values()), 8)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, (r, _) in adapted.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "use_rslora": alphas is rooted,
    }


def _alpha(rank: int, scale: np.float32, root: bool) -> int | float:
    """The simplest α that gives this very scale."""
    divisor = math.sqrt(rank) if root else rank
    exact = float(scale) * divisor
    if not math.isfinite(exact):
        raise ValueError(f"an adapter's scale is {scale}, which no config can hold")
    for alpha in (round(exact), round(exact, 6)):
        if np.float32(alpha / divisor) == scale:
            return alpha
    return exact


def _commonest(values: Sequence[Any], default: Any) -> Any:
    return Counter(values).most_common(1)[0][0] if values else default
