"""Token sequences into batches: packing, padding, chats, and an endless shuffled order that is a function of the step.

An example is a sequence of token ids, or a dict of ``tokens`` and ``weights`` (how much each token counts as something
to be predicted; 0 for a prompt).  A row of a batch reads tokens and predicts targets, which are the tokens one place
further, so an example of n tokens takes n − 1 places, and no target is ever a token of another example.
"""

import bisect
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path as File
from typing import Any

import numpy as np

Rows = dict[str, np.ndarray]

LONG = ("split", "cut", "drop", "raise")


# -- rows -------------------------------------------------------------------------------------------------------------


def pack(examples: Iterable[Any], length: int, *, long: str = "split") -> Rows:
    """Several examples a row, longest first, each into the fullest row that still has room (best fit, decreasing).

    Gives int32 ``tokens, targets, segments, positions`` and fp32 ``weights``, all ``[rows, length]``.  Segments count a
    row's examples from 1, 0 is padding; positions start from 0 in each example.

    Args:
        examples: token ids, or dicts of tokens and weights, one or more.
        length: places a row.
        long: what becomes of an example of more than ``length + 1`` tokens.  "split": it is cut into pieces that
            overlap by one token, so that every token but the first is predicted once; "cut": its end is lost; "drop":
            it is left out; "raise": a ValueError.

    Raises:
        ValueError: if there are no examples, one has fewer than two tokens, or its weights are not a number a token.

    >>> from peft_jax import training
    >>> rows = training.pack([[1, 2, 3], [4, 5, 6, 7]], length=5)
    >>> rows["tokens"].tolist(), rows["targets"].tolist(), rows["segments"].tolist()
    ([[4, 5, 6, 1, 2]], [[5, 6, 7, 2, 3]], [[1, 1, 1, 2, 2]])
    """
    pieces = sorted(_pieces(examples, length, long), key=lambda piece: -len(piece[0]))
    places: list[list[tuple[int, int]]] = []  # of each row: (piece, start)
    room: list[tuple[int, int]] = []  # (free places, row), sorted
    for index, (tokens, _) in enumerate(pieces):
        need = len(tokens) - 1
        at = bisect.bisect_left(room, (need, 0))
        free, row = room.pop(at) if at < len(room) else (length, len(places))
        if row == len(places):
            places.append([])
        places[row].append((index, length - free))
        if free > need:
            bisect.insort(room, (free - need, row))
    rows = _empty(len(places), length) | {name: np.zeros((len(places), length), np.int32) for name in _EXTRA}
    for row, inside in enumerate(places):
        for segment, (index, start) in enumerate(inside, 1):
            span = _write(rows, row, start, pieces[index])
            rows["segments"][row, span] = segment
            rows["positions"][row, span] = np.arange(span.stop - span.start)
    return rows


def pad(examples: Iterable[Any], length: int, *, long: str = "raise") -> Rows:
    """One example a row, padded at the end: ``tokens, targets, weights, mask``, all ``[rows, length]``.

    Arguments and errors as in `pack`; by default an example that is too long raises.
    """
    pieces = _pieces(examples, length, long)
    rows = _empty(len(pieces), length) | {"mask": np.zeros((len(pieces), length), bool)}
    for row, piece in enumerate(pieces):
        rows["mask"][row, _write(rows, row, 0, piece)] = True
    return rows


_EXTRA = ("segments", "positions")


def _empty(rows: int, length: int) -> Rows:
    kinds = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
    return {name: np.zeros((rows, length), dtype) for name, dtype in kinds.items()}


def _write(rows: Rows, row: int, start: int, piece: tuple[np.ndarray, np.ndarray]) -> slice:
    tokens, weights = piece
    span = slice(start, start + len(tokens) - 1)
    rows["tokens"][row, span], rows["targets"][row, span] = tokens[:-1], tokens[1:]
    rows["weights"][row, span] = weights[1:]
    return span


def _pieces(examples: Iterable[Any], length: int, long: str) -> list[tuple[np.ndarray, np.ndarray]]:
    if length < 1:
        raise ValueError(f"length is {length}: give the number of places in a row, 1 or more")
    if long not in LONG:
        raise ValueError(f"long is {long!r}: choose one of {', '.join(LONG)}")
    found, given = [], False
    for index, example in enumerate(examples):
        given = True
        tokens, weights = _read(example, f"example {index}")
        if len(tokens) <= length + 1:
            found.append((tokens, weights))
        elif long == "raise":
            raise ValueError(
                f"example {index} has {len(tokens)} tokens and a row takes {length + 1}: "
                "choose long='split', 'cut' or 'drop'"
            )
        elif long == "cut":
            found.append((tokens[: length + 1], weights[: length + 1]))
        elif long == "split":
            cuts = range(0, len(tokens) - 1, length)
            found += [(tokens[i : i + length + 1], weights[i : i + length + 1]) for i in cuts]
    if not found:
        raise ValueError("every example is longer than a row" if given else "the data set is empty: no examples")
    return found


def _read(example: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    fields = example if isinstance(example, Mapping) else {"tokens": example}
    tokens = np.asarray(fields["tokens"])
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(f"{name} is not a sequence of token ids: it has shape {tokens.shape} and dtype {tokens.dtype}")
    if len(tokens) < 2:
        raise ValueError(f"{name} has {len(tokens)} tokens: two are needed, one to read and one to predict")
    weights = np.asarray(fields.get("weights", np.ones(len(tokens))))
    if weights.shape != tokens.shape:
        raise ValueError(f"{name} has {len(tokens)} tokens and weights of shape {weights.shape}: give a weight a token")
    return tokens.astype(np.int32), weights.astype(np.float32)


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Rows in an endless order: ``batch(step)`` is a pure function of the seed and the step, so a run resumes exactly.

    Each epoch is a new order of all rows; the ``rows % batch_size`` that are left over at its end are left out of that
    epoch.  Iterating goes once through all rows in their own order, for evaluation: there the last batch is filled up
    with rows of weight 0, so that all batches have one shape.
    """

    rows: Rows
    batch_size: int
    seed: int = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return _count(self.rows) // self.batch_size

    def batch(self, step: int) -> Rows:
        return self.part(step, np.arange(self.batch_size))

    def part(self, step: int, which: np.ndarray) -> Rows:
        """The rows `which` of the batch of a step, alone."""
        epoch, index = divmod(step, len(self))
        chosen = _order(self.seed, epoch, _count(self.rows))[index * self.batch_size + which]
        return {name: x[chosen] for name, x in self.rows.items()}

    def __iter__(self) -> Iterator[Rows]:
        count = _count(self.rows)
        if count % self.batch_size and "weights" not in self.rows:
            raise ValueError(
                f"{count} rows do not fill batches of {self.batch_size}, and without weights none can be void"
            )
        for start in range(0, count, self.batch_size):
            chosen = np.arange(start, start + self.batch_size)
            rows = {name: x[np.minimum(chosen, count - 1)] for name, x in self.rows.items()}
            rows["weights"][chosen >= count] = 0
            yield rows


def _count(rows: Rows) -> int:
    return len(next(iter(rows.values())))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    # Sorted raw bits, not permutation(): numpy promises to keep the streams of bit generators, and nothing above them.
    return np.argsort(np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count), kind="stable")


def batches(rows: Mapping[str, Any], batch_size: int, seed: int = 0) -> Batches:
    """Shuffled batches of rows that `pack` or `pad` made (or of any dict of arrays with one first axis).

    Raises:
        ValueError: if there are no rows, fewer than `batch_size`, or the arrays disagree on how many.

    >>> import numpy as np
    >>> from peft_jax import training
    >>> data = training.batches({"tokens": np.arange(6)[:, None]}, batch_size=2, seed=1)
    >>> sorted(int(i) for step in (3, 4, 5) for i in data.batch(step)["tokens"][:, 0])
    [0, 1, 2, 3, 4, 5]
    """
    arrays = {name: np.asarray(x) for name, x in rows.items()}
    counts = {name: len(x) if x.ndim else 0 for name, x in arrays.items()}
    if not counts or not max(counts.values()):
        raise ValueError("the data set is empty: no rows")
    if len(set(counts.values())) > 1:
        raise ValueError(f"the arrays disagree on the number of rows: {counts}")
    if batch_size < 1 or seed < 0:
        raise ValueError(f"batch_size is {batch_size} and seed {seed}: give 1 or more, and 0 or more")
    if _count(arrays) < batch_size:
        raise ValueError(f"a batch takes {batch_size} rows and the data set has {_count(arrays)}: choose a smaller one")
    return Batches(arrays, batch_size, seed)


# -- chats ------------------------------------------------------------------------------------------------------------


def chat(
    source: str | os.PathLike[str] | Iterable[Any], tokenizer: Any, length: int, *, long: str = "raise"
) -> list[dict[str, np.ndarray]]:
    """Conversations as examples for `pack` or `pad`, by the tokenizer's own template; only assistant tokens weigh 1.

    Args:
        source: a JSONL file, each line ``{"messages": [{"role": ..., "content": ...}, ...]}``, or the conversations
            themselves (such dicts, or lists of messages).  A ``tools`` entry is handed to the template.
        tokenizer: a transformers tokenizer with a chat template.
        length: places a row.
        long: what becomes of a conversation of more than ``length + 1`` tokens: "raise", "cut" (its end is lost) or
            "drop".

    A template with ``{% generation %}`` says itself what the assistant wrote.  For any other, a reply is what the
    template adds to the text of the messages before it and the prompt for a reply, without whitespace at the end; a
    token that is partly in a reply belongs to it, as in transformers.

    Raises:
        ValueError: with the file and line, if a line is not JSON, not a conversation, has no reply (within `length`),
            or is too long; if the template is missing, or is not prefix-stable: it writes earlier messages differently
            once later ones are there, so that the replies of a conversation cannot be told apart.
    """
    if long not in ("raise", "cut", "drop"):
        raise ValueError(f"long is {long!r}: choose 'raise', 'cut' or 'drop'")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: set tokenizer.chat_template, or load a chat model's own")
    found = []
    for where, conversation in _conversations(source):
        messages, tools = _messages(conversation, where)
        tokens, weights = _tokenise(tokenizer, messages, tools, where)
        if len(tokens) > length + 1 and long == "drop":
            continue
        if len(tokens) > length + 1 and long == "raise":
            raise ValueError(f"{where} has {len(tokens)} tokens, a row takes {length + 1}: choose long='cut' or 'drop'")
        tokens, weights = tokens[: length + 1], weights[: length + 1]
        if not weights[1:].any():
            raise ValueError(f"{where} has no reply within its first {length + 1} tokens: there is nothing to learn")
        found.append({"tokens": tokens, "weights": weights})
    if not found:
        raise ValueError("the data set is empty: no conversation, or none that fits")
    return found


def _conversations(source: Any) -> Iterator[tuple[str, Any]]:
    """``(where, conversation)``, for messages that name the place."""
    if not isinstance(source, str | os.PathLike):
        yield from ((f"conversation {index}", given) for index, given in enumerate(source))
        return
    with File(source).expanduser().open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"{source}, line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{source}, line {number} is not JSON: {error}") from None


def _messages(conversation: Any, where: str) -> tuple[list[dict[str, Any]], Any]:
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else conversation
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f'{where} is not a conversation: {{"messages": [{{"role": ..., "content": ...}}, ...]}} is')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where}: message {index} has no role or no content")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no message of the assistant's: there is nothing to learn")
    return [dict(m) for m in messages], conversation.get("tools") if isinstance(conversation, Mapping) else None


def _tokenise(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    def render(messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, **options)
        except Exception as error:  # a template is a program: it may raise whatever it likes
            raise ValueError(f"{where}: the tokenizer's chat template failed: {error}") from error

    if re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.get_chat_template(tools=tools))):
        coded = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return np.array(coded["input_ids"], np.int32), np.array(coded["assistant_masks"], np.float32)

    text = render(messages, tokenize=False)
    spans = []
    for index in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        before = render(messages[:index], tokenize=False, add_generation_prompt=True)
        until = render(messages[: index + 1], tokenize=False)
        if not until.startswith(before) or not text.startswith(until):
            raise ValueError(
                f"{where}: the tokenizer's chat template is not prefix-stable at message {index}, so it does not show "
                "which tokens are the assistant's: use a template that marks them with {% generation %}"
            )
        spans.append((len(before), len(until.rstrip())))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in coded["offset_mapping"]])
    ends = np.array([end for _, end in coded["offset_mapping"]])
    inside = [(ends > first) & (starts < last) & (ends > starts) for first, last in spans]
    return np.array(coded["input_ids"], np.int32), np.any(inside, axis=0).astype(np.float32)
