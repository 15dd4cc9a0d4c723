"""A body's fields, taken one by one, so that none is overlooked."""

import json
import math
from typing import Any

from peft_jax.serving.requests import Refused

# What leaves the answer as it is, whatever its value.
IGNORED = {
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
# What is not served, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "verbosity": (),
    "web_search_options": (),
}
KINDS: dict[str, tuple[type, ...]] = {
    "an integer": (int,),
    "a number": (int, float),
    "a string": (str,),
    "true or false": (bool,),
    "a list": (list,),
    "an object": (dict,),
}


class Fields:
    """The fields of a body, taken one by one; what is left in the end is refused."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.left = dict(body)

    def take(
        self, name: str, kind: str | None, default: Any, low: float | None = None, high: float | None = None
    ) -> Any:
        """The field's value, of `kind` and within bounds; `default` where it is null or missing."""
        value = self.left.pop(name, None)
        if value is None:
            return default
        if kind is not None and (
            not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "true or false")
        ):
            raise Refused(f"{name} must be {kind}, not {show(value)}.", param=name)
        # An integer of a thousand digits has no finite float, but compares well.
        if kind == "a number" and isinstance(value, float) and not math.isfinite(value):
            raise Refused(f"{name} must be finite.", param=name)
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise Refused(f"{name} must be {bounds}, not {show(value)}.", param=name)
        if isinstance(value, str):
            encodable(value, name)
        return value

    def need(self, name: str, kind: str | None) -> Any:
        """The value of a field that must be there."""
        value = self.take(name, kind, None)
        if value is None:
            raise Refused(f"{name} is missing.", param=name)
        return value

    def end(self) -> None:
        """Refuses what was not taken, but what asks for nothing."""
        for name, value in self.left.items():
            if value is None or name in IGNORED:
                continue
            if name not in NEUTRAL:
                raise Refused(f"{show(name)} is not a field that is known here.", param=name, code="unknown_field")
            if not any(value == neutral and isinstance(value, bool) is isinstance(neutral, bool)
                       for neutral in NEUTRAL[name]):  # fmt: skip
                raise Refused(f"{name} is not served: leave it out.", param=name, code="unsupported_field")


def encodable(text: str, name: str) -> str:
    """The text, if UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(f"{name} holds half of a surrogate pair, which is no character.", param=name) from None
    return text


def show(value: Any) -> str:
    """A value as JSON, cut short; for error messages."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "an integer of many digits"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
