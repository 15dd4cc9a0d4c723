"""OpenAI's answers: choices, logprobs in both formats, usage, chunks of a stream, errors."""

import json
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from peft_jax.serving.events import Event, TokenLogprob, Usage
from peft_jax.serving.protocol import Ask
from peft_jax.serving.requests import Refused

HOLE = "\N{REPLACEMENT CHARACTER}"
LEAST = -9999.0  # what JSON is told instead of −∞
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error(refused: Refused) -> dict[str, Any]:
    """OpenAI's error object.

    >>> error(Refused("n must be at least 1.", param="n"))["error"]["type"]
    'invalid_request_error'
    """
    kind = KINDS.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return {"error": {"message": refused.reason, "type": kind, "param": refused.param, "code": refused.code}}


def failed(event: Event) -> Refused | None:
    """What to tell of a request that ended without an answer."""
    if event.finish == "error":
        return Refused(event.reason or "The engine failed.", status=500)
    if event.finish == "aborted":  # its first token would come too late: another try may fare better
        reason = event.reason or "The request was given up: its first token would have come too late."
        return Refused(reason, status=503, retry_after=1.0, code="aborted")
    if event.finish == "cancelled":
        return Refused(event.reason or "The request was cancelled.", status=503, retry_after=1.0, code="cancelled")
    return None


class Pieces:
    """Tokens as text and bytes, for logprobs; each is worked out once.

    A token of a byte-level or byte-fallback vocabulary may be part of a character: its text is then the
    replacement character, but its bytes are known.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def __call__(self, token: int) -> tuple[str, bytes | None]:
        if token not in self._known:
            self._known[token] = self._piece(token)
        return self._known[token]

    def text(self, tokens: Sequence[int]) -> str:
        """What a reader sees of the tokens."""
        return self.tokenizer.decode([token for token in tokens if token not in self.special])

    def label(self, token: int) -> str:
        """The text, or ``bytes:\\xe2\\x82`` for what is no whole character, so that no two tokens look alike."""
        text, raw = self(token)
        if HOLE not in text:
            return text
        return f"token_id:{token}" if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _piece(self, token: int) -> tuple[str, bytes | None]:
        text = self.tokenizer.decode([token])
        stored = self.tokenizer.convert_ids_to_tokens(token)
        if HOLE not in text:
            if isinstance(stored, str) and stored.startswith("▁") and not text.startswith(" "):
                text = " " + text  # SentencePiece drops the space in front of a text's first word
            return text, text.encode()
        if not isinstance(stored, str):
            return text, None
        if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", stored):
            return text, bytes([int(fallback[1], 16)])
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        table = {character: byte for byte, character in bytes_to_unicode().items()}
        return text, bytes(table[c] for c in stored) if all(c in table for c in stored) else None


class Offsets:
    """Where each token begins in the text so far; tokens that share a character begin with it."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces, self.at = pieces, 0
        self.pending: list[int] = []

    def __call__(self, token: int) -> int:
        began = self.at
        self.pending.append(token)
        text = self.pieces.text(self.pending)
        if not text.endswith(HOLE):
            whole = self.pieces(token)[0] if len(self.pending) == 1 and token not in self.pieces.special else text
            self.at += len(whole)
            self.pending.clear()
        return began


class Shape:
    """One answer: the same id, time and model on all of its chunks.

    Args:
        ask: what was asked for.
        prompts: the prompts' lengths in tokens.
        pieces: tokens as text.
    """

    def __init__(self, ask: Ask, prompts: Sequence[int], pieces: Pieces) -> None:
        self.ask, self.prompts, self.pieces = ask, prompts, pieces
        self.chat = ask.messages is not None
        kind = "chat.completion" if self.chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if self.chat and ask.stream else kind,
            "created": int(time.time()),
            "model": ask.model,
        }
        count = len(prompts) * ask.n
        self.offsets = [Offsets(pieces) for _ in range(count)]
        self.generated = [0] * count
        self.used: list[Usage | None] = [None] * count

    def take(self, index: int, event: Event) -> None:
        """Counts an event in: once each, before it is shown."""
        self.generated[index] += len(event.tokens)
        self.used[index] = event.usage or self.used[index]

    # -- whole answers ------------------------------------------------------------------------------------------------

    def whole(self, events: Sequence[Sequence[Event]]) -> dict[str, Any]:
        """The answer to a call that does not stream, from all events of all choices."""
        choices = []
        for index, several in enumerate(events):
            text = "".join(event.text for event in several)
            body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            found = [logprob for event in several for logprob in event.logprobs or ()]
            logprobs = None if self.ask.sampling.logprobs is None else self.logprobs(index, found)
            choices.append({"index": index, **body, "logprobs": logprobs, "finish_reason": several[-1].finish})
        return {**self.head, "choices": choices, "usage": self.usage()}

    # -- chunks of a stream -------------------------------------------------------------------------------------------

    def opening(self) -> list[bytes]:
        """A chat's first chunks, which name the role."""
        if not self.chat:
            return []
        start = {"role": "assistant", "content": ""}
        return [self._chunk([self._delta(i, start, None, None)]) for i in range(len(self.generated))]

    def chunk(self, index: int, event: Event) -> bytes:
        """An event as a server-sent event; nothing where it has nothing to show."""
        logprobs = self.logprobs(index, event.logprobs) if event.logprobs else None
        if not event.text and logprobs is None and event.finish is None:
            return b""
        if self.chat:
            return self._chunk([self._delta(index, {"content": event.text} if event.text else {}, logprobs, event)])
        choice = {"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": event.finish}
        return self._chunk([choice])

    def closing(self) -> list[bytes]:
        """What ends a stream that went well."""
        usage = [sse({**self.head, "choices": [], "usage": self.usage()})] if self.ask.include_usage else []
        return [*usage, b"data: [DONE]\n\n"]

    def _delta(self, index: int, delta: dict[str, str], logprobs: Any, event: Event | None) -> dict[str, Any]:
        finish = None if event is None else event.finish
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return sse({**self.head, "choices": choices, **({"usage": None} if self.ask.include_usage else {})})

    # -- their parts --------------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, Any]:
        """Each prompt counted once, whatever n; cached tokens as the prompt's first choice met them."""
        prompt = sum(self.prompts)
        cached = sum(used.cached for used in self.used[:: self.ask.n] if used is not None)
        completion = sum(
            seen if used is None else used.completion for seen, used in zip(self.generated, self.used, strict=True)
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def logprobs(self, index: int, found: Iterable[TokenLogprob]) -> dict[str, Any]:
        """Chat's format, or that of completions, whose offsets go on from call to call."""
        if self.chat:
            content = []
            for one in found:
                top = [self._spelt(token, logprob) for token, logprob in one.top[: self.ask.sampling.logprobs]]
                content.append({**self._spelt(one.token, one.logprob), "top_logprobs": top})
            return {"content": content, "refusal": None}
        tokens, tops = list(found), []
        for one in tokens:
            table: dict[str, float] = {}
            # OpenAI's: the likeliest, and the token itself where it is not among them.
            for token, logprob in (*one.top[: self.ask.sampling.logprobs], (one.token, one.logprob)):
                table.setdefault(self.pieces.label(token), max(logprob, LEAST))
            tops.append(table)
        return {
            "tokens": [self.pieces.label(one.token) for one in tokens],
            "token_logprobs": [max(one.logprob, LEAST) for one in tokens],
            "top_logprobs": tops,
            "text_offset": [self.offsets[index](one.token) for one in tokens],
        }

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self.pieces(token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": None if raw is None else list(raw)}


def sse(payload: dict[str, Any]) -> bytes:
    """One server-sent event; ASCII, so that no reader takes a character of the text for the end of a line."""
    return b"data: " + json.dumps(payload, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
