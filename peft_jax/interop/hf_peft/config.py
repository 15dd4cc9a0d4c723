"""``adapter_config.json``: which modules it means, and what is not supported.

Source: HF PEFT 0.21.2, tuners/lora/config.py; matching in tuners/tuners_utils.py (``check_target_module_exists``),
utils/other.py (``get_pattern_key``, ``_set_trainable``).
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

NOTHING_ADAPTED = "dummy-target-modules"  # HF PEFT's own word for an adapter of modules_to_save or biases alone

# Fields of every kind that say nothing about the numbers, or are read in this file.
COMMON = """
    auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode layers_pattern
    layers_to_transform modules_to_save peft_type peft_version revision target_modules task_type
"""


def check(config: Mapping[str, Any], fields: str, bias: str, where: str) -> None:
    """Whether a config holds nothing but what is read: `fields` are the kind's own, `bias` its own bias mode.

    Raises:
        ValueError: on an option that would be passed over.
    """
    for option, value in config.items():
        if option not in (*COMMON.split(), *fields.split()) and value not in (None, False, [], {}):
            raise ValueError(f"{where} uses {option} ({value!r}), which is not supported")
    if config.get("bias", "none") not in ("none", "all", bias):
        raise ValueError(f"{where} has bias={config['bias']!r}: none, all and {bias} are supported")


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


# -- numbers by module -------------------------------------------------------------------------------------------------


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def commonest(values: Sequence[Any], default: Any) -> Any:
    return Counter(values).most_common(1)[0][0] if values else default
