"""Which directories clients may load adapters from, and what they may call them."""

import re
from collections.abc import Sequence
from pathlib import Path

from peft_jax.serving.requests import Refused

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def name(text: str, taken: Sequence[str] = ()) -> str:
    """An adapter's name as it may stand in a request and in a path.

    Raises:
        Refused: on slashes, spaces, a leading dot and the like, on an empty or overlong name, and on one that is taken.

    >>> name("poems-v2.1")
    'poems-v2.1'
    """
    if not NAME.fullmatch(text) or ".." in text:
        raise Refused(
            "lora_name must begin with a letter or digit and go on with at most 127 letters, digits, '.', '_' or '-', "
            "and no two dots together.",
            param="lora_name",
        )
    if text in taken:
        raise Refused(f"lora_name {text!r} is taken.", param="lora_name")
    return text


def directory(text: str, roots: Sequence[Path]) -> Path:
    """The adapter's directory, links followed, which must lie under one of `roots`; a relative path starts at each.

    Nothing is said of what lies elsewhere, not even whether it is there.

    Raises:
        Refused: with 403 for a path outside, 404 where nothing is there, 400 on what is no path at all.
    """
    if not text or "\0" in text:
        raise Refused("lora_path must be a path.", param="lora_path")
    outside = Refused("lora_path must lie in a directory that --allow-loading names.", status=403, param="lora_path")
    if ".." in Path(text).parts:
        raise outside
    bounds = [root.resolve() for root in roots]
    try:
        candidates = [(bound / text).resolve() for bound in bounds]
        inside = [path for path in candidates if any(path.is_relative_to(bound) for bound in bounds)]
        if not inside:
            raise outside
        found = next((path for path in inside if path.is_dir()), None)
        if found is None:
            raise Refused(f"lora_path {text!r} is not a directory.", status=404, param="lora_path")
        for entry in found.iterdir():  # a link in it could lead anywhere
            if not any(entry.resolve().is_relative_to(bound) for bound in bounds):
                raise outside
    except (OSError, RuntimeError):  # a name too long, a loop of links, no permission
        raise Refused(f"lora_path {text[:80]!r} cannot be read.", param="lora_path") from None
    return found
