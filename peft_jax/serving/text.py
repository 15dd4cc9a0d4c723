"""A request's text, as its tokens come: whole characters only, and nothing that may yet be part of a stop string."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer decodes the beginning of a character to
BEHIND = 6  # tokens of the prompt that are decoded along: some tokenizers drop a space in front of a first word


class Text:
    """The text of one answer.

    Args:
        tokenizer: a transformers tokenizer; without one there is no text.
        prompt: the prompt's tokens.
        stop: strings that end the answer.

    >>> text = Text(None, [1, 2], ())
    >>> text.add(3), text.finish()
    (('', False), '')
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(prompt[-BEHIND:])
        self._told = len(self._tokens)  # tokens whose text is out, or held
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """What is certain since the last token, and whether a stop string has come: the text then ends before it."""
        if self._tokenizer is None:
            return "", False
        self._tokens.append(token)
        before, whole = self._decode(self._tokens[: self._told]), self._decode(self._tokens)
        if whole.endswith(UNFINISHED):
            return "", False
        self._told = len(self._tokens)
        self._forget()
        return self._let_go(self._held + whole[len(before) :])

    def finish(self) -> str:
        """What was held back: no stop string came of it, and no character."""
        text, self._held = self._held, ""
        if self._tokenizer is not None and self._told < len(self._tokens):
            before, whole = self._decode(self._tokens[: self._told]), self._decode(self._tokens)
            text += whole[len(before) :]
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _forget(self) -> None:
        """The first tokens, once they change nothing: a long answer is not decoded from its beginning each time."""
        if self._told > 4 * BEHIND:
            self._tokens = self._tokens[self._told - BEHIND :]
            self._told = BEHIND

    def _let_go(self, text: str) -> tuple[str, bool]:
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        # The longest end that is the beginning of a stop string.
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False
