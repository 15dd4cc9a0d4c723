"""OpenAI's requests, read strictly: what would change the answer is obeyed, or refused by its name.

Departures: `top_k` and `ignore_eos` come on top, as in vLLM; seeds are taken modulo 2³¹, and choice j of n adds
j to it.
"""

import dataclasses
import json
from typing import Any

from peft_jax.serving.fields import Fields, encodable, show
from peft_jax.serving.requests import Refused, Sampling

MOST_LOGPROBS = 20
MOST_STOPS = 16
LONGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a client asks for: `prompts` as texts or token ids (completions), or `messages` (chat).

    `max_tokens` is None where the client names none; `sampling` has its other wishes.
    """

    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[dict[str, str], ...] | None
    n: int
    max_tokens: int | None
    sampling: Sampling
    stream: bool
    include_usage: bool

    def samplings(self, max_tokens: int) -> list[Sampling]:
        """One for each of the n choices; with a seed each has its own."""
        seeds = [None if self.sampling.seed is None else (self.sampling.seed + j) % 2**31 for j in range(self.n)]
        return [dataclasses.replace(self.sampling, max_tokens=max_tokens, seed=seed) for seed in seeds]


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refused: on anything but one JSON object in UTF-8.

    >>> read_json(b'{"n": 2}')
    {'n': 2}
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        found = json.loads(body.decode(), parse_constant=no_constant)
    except RecursionError:
        raise Refused("The body is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise Refused(f"The body is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise Refused("The body must be a JSON object.")
    return found


def completion(body: dict[str, Any], most_choices: int = 128) -> Ask:
    """Reads a body of `/v1/completions`.

    Args:
        body: what was sent.
        most_choices: prompts times n, at most.

    Raises:
        Refused: naming the field that is missing, wrong, unknown or not served.

    >>> ask = completion({"model": "base", "prompt": [5, 6], "stop": "."})
    >>> ask.prompts, ask.sampling.stop, ask.max_tokens
    (((5, 6),), ('.',), 16)
    """
    fields = Fields(body)
    model = fields.need("model", "a string")
    prompts = _prompts(fields.need("prompt", None))
    max_tokens = fields.take("max_tokens", "an integer", 16, low=1, high=LONGEST)
    logprobs = fields.take("logprobs", "an integer", None, low=0, high=MOST_LOGPROBS)
    return _rest(fields, model, prompts, None, max_tokens, logprobs, most_choices)


def chat(body: dict[str, Any], most_choices: int = 128) -> Ask:
    """Reads a body of `/v1/chat/completions`.

    Args:
        body: what was sent.
        most_choices: n, at most.

    Raises:
        Refused: naming the field that is missing, wrong, unknown or not served.

    >>> ask = chat({"model": "base", "messages": [{"role": "user", "content": "Hello"}], "logprobs": True})
    >>> ask.messages, ask.sampling.logprobs, ask.max_tokens
    (({'role': 'user', 'content': 'Hello'},), 0, None)
    """
    fields = Fields(body)
    model = fields.need("model", "a string")
    messages = fields.need("messages", "a list")
    if not messages:
        raise Refused("messages must hold one message or more.", param="messages")
    asked = [
        fields.take(name, "an integer", None, low=1, high=LONGEST)
        for name in ("max_completion_tokens", "max_tokens")  # the newer name, and the older
    ]
    if asked[0] is not None and asked[1] is not None and asked[0] != asked[1]:
        raise Refused("max_tokens and max_completion_tokens differ: give one of them.", param="max_tokens")
    wanted = fields.take("logprobs", "true or false", False)
    top = fields.take("top_logprobs", "an integer", None, low=0, high=MOST_LOGPROBS)
    if top is not None and not wanted:
        raise Refused("top_logprobs needs logprobs: true.", param="top_logprobs")
    return _rest(
        fields,
        model,
        (),
        tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages)),
        asked[1] if asked[0] is None else asked[0],
        (top or 0) if wanted else None,
        most_choices,
    )


def _rest(
    fields: Fields,
    model: str,
    prompts: tuple[str | tuple[int, ...], ...],
    messages: tuple[dict[str, str], ...] | None,
    max_tokens: int | None,
    logprobs: int | None,
    most_choices: int,
) -> Ask:
    """What the two endpoints have in common."""
    n = fields.take("n", "an integer", 1, low=1, high=most_choices)
    if n * max(1, len(prompts)) > most_choices:
        raise Refused(
            f"{len(prompts)} prompts with n = {n} are more than {most_choices} choices.",
            param="n" if n > 1 else "prompt",
        )
    seed = fields.take("seed", "an integer", None)
    top_k = fields.take("top_k", "an integer", 0, low=-1, high=LONGEST)
    top_p = fields.take("top_p", "a number", 1.0, low=0, high=1)
    if top_p == 0:
        raise Refused("top_p must be more than 0; for the likeliest tokens give temperature: 0.", param="top_p")
    sampling = Sampling(
        temperature=float(fields.take("temperature", "a number", 1.0, low=0, high=2)),
        top_k=max(0, top_k),  # vLLM's −1 is our 0: all
        top_p=float(top_p),
        seed=None if seed is None else seed % 2**31,
        stop=_stops(fields.take("stop", None, [])),
        logprobs=logprobs,
        ignore_end=fields.take("ignore_eos", "true or false", False),
    )
    stream = fields.take("stream", "true or false", False)
    options = fields.take("stream_options", "an object", None)
    if options is not None and not stream:
        raise Refused("stream_options needs stream: true.", param="stream_options")
    inner = Fields(options or {})
    include_usage = inner.take("include_usage", "true or false", False)
    inner.take("include_obfuscation", "true or false", False)  # padding against eavesdroppers, which we never send
    inner.end()
    fields.end()
    return Ask(model, prompts, messages, n, max_tokens, sampling, stream, include_usage)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of token ids, or a list of either."""
    several = value if isinstance(value, list) and not all(map(_is_token, value)) else [value]
    found: list[str | tuple[int, ...]] = []
    for prompt in several:
        if isinstance(prompt, str):
            found.append(encodable(prompt, "prompt"))
        elif isinstance(prompt, list) and prompt and all(map(_is_token, prompt)):
            found.append(tuple(prompt))
        else:
            raise Refused(
                "prompt must be a string, a list of token ids, or a list of those, and none of them empty.",
                param="prompt",
            )
    return tuple(found)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _stops(value: Any) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(stop, str) and stop for stop in several):
        raise Refused("stop must be a string or a list of strings, and none of them empty.", param="stop")
    if len(several) > MOST_STOPS:
        raise Refused(f"stop must hold at most {MOST_STOPS} strings.", param="stop")
    return tuple(encodable(stop, "stop") for stop in several)


def _message(message: Any, where: str) -> dict[str, str]:
    """Role, content and name; content may come in parts, all of them texts."""
    if not isinstance(message, dict):
        raise Refused(f"{where} must be an object.", param=where)
    for name in message:
        if name not in ("role", "content", "name") and message[name] not in (None, [], ""):
            raise Refused(f"{where}.{name} is not served: leave it out.", param=where, code="unsupported_field")
    for name in ("role", "name"):
        if not isinstance(message.get(name, "" if name == "name" else None), str):
            raise Refused(f"{where}.{name} must be a string.", param=where)
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Refused(f"{where}.content must be a string or a list of parts.", param=where)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise Refused(f"{where}.content holds a part that is no text ({show(kind)}).", param=where)
    read = {"role": message["role"], "content": "".join(part["text"] for part in parts)}
    if message.get("name"):
        read["name"] = message["name"]
    return {name: encodable(text, where) for name, text in read.items()}
