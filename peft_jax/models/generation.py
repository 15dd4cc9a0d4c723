"""Text from a language model: greedy, sampled, or by beam search, with a key-value cache.

`generate_tokens` is one compiled program: the prompt in one pass, of which only the last logits are computed, then a
`while_loop` that carries the cache and ends when every row has ended.  Weights, temperature, top_k, top_p, the length
penalty and the key are traced, so that changing them (an adapter, say) never recompiles; what does is another forward
function, other shapes, another max_new_tokens, or another way of choosing.  `generate` therefore pads prompts on the
left up to a power of two, 16 at least.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from peft_jax.core import Forward, Inputs, Params, Ports, check_tokens
from peft_jax.models.decoding import Sampling, search, write

SHORTEST = 16  # the smallest length that prompts are padded to


# -- text -------------------------------------------------------------------------------------------------------------


def generate(
    forward: Forward,
    params: Params,
    tokenizer: Any,
    prompts: Any,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    key: Array | None = None,
    stop: str | int | Sequence[str | int] = (),
    infix: Any = None,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
) -> str | list[str]:
    """What the model writes after each prompt, without the prompt; of an encoder-decoder model, of each source.

    Args:
        forward, params: the model; a model that methods have wrapped is given as it is.
        tokenizer: its transformers tokenizer, whose eos token ends a text.
        prompts: a text, or a chat (a list of ``{"role": …, "content": …}``, laid out by the tokenizer's own template),
            or a list of either.
        stop: further token ids that end a text, and strings: the text is cut before the first of them.
        max_new_tokens, temperature, top_k, top_p, beams, length_penalty, key, infix, ports: as in `generate_tokens`.

    Returns:
        A text for a single prompt, a list for a list.

    Raises:
        ValueError: if a prompt has no tokens, is too long for the model, or holds ids beyond its vocabulary.
    """
    if tokenizer is None:
        raise ValueError("generating text needs the model's tokenizer: without one, call generate_tokens")
    if single := isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict)):
        prompts = [prompts]
    if not prompts:
        return []
    stops = (stop,) if isinstance(stop, str | int) else tuple(stop)
    ends = {tokenizer.eos_token_id, *(s for s in stops if not isinstance(s, str))} - {None}
    rows = [_encode(tokenizer, prompt) for prompt in prompts]
    tokens, mask = pad_left(rows)
    written = generate_tokens(
        forward,
        params,
        tokens,
        mask,
        max_new_tokens=max_new_tokens,
        eos_id=sorted(ends),
        pad_id=-1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        beams=beams,
        length_penalty=length_penalty,
        key=key,
        infix=infix,
        ports=ports,
    )
    texts = []
    for row, new in zip(rows, np.asarray(written).tolist(), strict=True):
        new = [token for token in new if token >= 0 and token not in ends]
        text = _continuation(tokenizer, [] if forward.spec.attentions else row, new)
        cuts = [text.find(s) for s in stops if isinstance(s, str) and s in text]
        texts.append(text[: min(cuts)] if cuts else text)
    return texts[0] if single else texts


def _encode(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written them


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    # Decoded together with the prompt: some tokenizers drop the space before the first word of what they decode.
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, whole = decode(prompt), decode(prompt + new)
    return whole[len(before) :] if whole.startswith(before) else decode(new)


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """``(tokens, mask)`` of the rows, padded on the left to one length: the next power of two, `SHORTEST` at least."""
    for i, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"prompt {i} is empty: this tokenizer adds no token of its own to start from")
    length = max(SHORTEST, 1 << (max(map(len, rows)) - 1).bit_length())
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return tokens, mask


# -- tokens -----------------------------------------------------------------------------------------------------------


def generate_tokens(
    forward: Forward,
    params: Params,
    tokens: Any,
    mask: Any = None,
    *,
    max_new_tokens: int = 64,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    key: Array | None = None,
    infix: Any = None,
    decoder_tokens: Any = None,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
) -> Int[Array, "batch new"]:
    """The new tokens of each row, the eos token included, `pad_id` behind it.

    Args:
        forward, params: the model; a model that methods have wrapped is given as it is.
        tokens: the prompts, int32 [batch, time]; of an encoder-decoder model, the sources.
        mask: bool [batch, time], False at padding, which must be on the left of a prompt, on any side of a source.
        max_new_tokens: how many tokens to write at most.
        eos_id: the token, or tokens, that end a row.
        temperature: 0 takes the most probable token; otherwise tokens are drawn from softmax(logits / temperature).
        top_k, top_p: draws only from the k most probable tokens, from the fewest that have probability p together.
        beams: how many hypotheses beam search follows; 1 is no search.
        length_penalty: a finished hypothesis scores log p / length^penalty, of the tokens it has written.
        key: the randomness of the draws.  A row's draws depend on its number, not on the rows beside it.
        infix: as in `Inputs`, int [batch]: before which token of each prompt a prefix stands; by default the first.
        decoder_tokens: what an encoder-decoder model's texts begin with, int [batch, n]; by default its spec's `start`.
        ports: what the model is given beside its weights.

    Raises:
        ValueError: if an option makes no sense, a row is empty or not padded on the left, prompt and new tokens exceed
            the model's positions, or an id is beyond its vocabulary.

    Departures: of equally probable tokens at the border of top_p all are kept, where transformers keeps some; beam
    search is that of transformers with early_stopping=False.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, beams, key)
    tokens = np.asarray(tokens, np.int32)
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    tokens = np.where(mask, tokens, 0)
    begin = None
    if forward.spec.attentions:
        begin = np.array([forward.spec.start] * len(tokens) if decoder_tokens is None else decoder_tokens, np.int32)
        _check_sources(forward, tokens, mask, begin, max_new_tokens)
    else:
        _check_prompts(forward, tokens, mask, max_new_tokens)
    place = None if infix is None else np.asarray(infix, np.int32)
    inputs = Inputs(tokens, mask=mask, infix=place, decoder_tokens=begin)
    ends = () if eos_id is None else np.ravel(eos_id)
    common = (forward, params, inputs, jnp.asarray(ends, jnp.int32), jnp.int32(pad_id), ports, max_new_tokens)
    if beams > 1:
        return search(*common, jnp.float32(length_penalty), beams)
    if temperature == 0:
        return write(*common, None)
    k, p = None if top_k is None else jnp.int32(top_k), None if top_p is None else jnp.float32(top_p)
    sampling = Sampling(key, jnp.float32(temperature), k, p)
    return write(*common, sampling)


def _check_options(new: int, temperature: float, top_k: Any, top_p: Any, beams: int, key: Any) -> None:
    if new < 1:
        raise ValueError(f"max_new_tokens is {new}: ask for one at least")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: it is 0 (the most probable token) or more")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p restrict a draw: give temperature= too")
    if temperature > 0 and key is None:
        raise ValueError("drawing tokens needs randomness: give key=jax.random.key(seed)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: it is one at least")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it is above 0 and at most 1")
    if beams < 1:
        raise ValueError(f"beams is {beams}: it is one at least")
    if beams > 1 and temperature > 0:
        raise ValueError("beam search does not draw: give beams= or temperature=, not both")


def _check_rows(forward: Forward, mask: np.ndarray, kind: str) -> None:
    if forward.spec.cache is None:
        raise ValueError("this forward function keeps no key-value cache (spec.cache), so it cannot generate")
    if not mask.any(axis=1).all():
        raise ValueError(f"{kind} {int(np.argmin(mask.any(axis=1)))} is empty: give it a token to start from")


def _check_sources(forward: Forward, tokens: np.ndarray, mask: np.ndarray, begin: np.ndarray, new: int) -> None:
    _check_rows(forward, mask, "source")
    spec, longest = forward.spec, int(mask.sum(axis=1).max())
    if spec.positions and longest > spec.positions:
        raise ValueError(f"a source of {longest} tokens exceeds the encoder's {spec.positions} positions: shorten it")
    if begin.ndim != 2 or len(begin) != len(tokens) or not begin.size:
        raise ValueError(f"decoder_tokens {begin.shape} are to be one or more for each of the {len(tokens)} sources")
    if spec.decoder_positions and begin.shape[1] + new > spec.decoder_positions:
        raise ValueError(
            f"{begin.shape[1]} first tokens and {new} new ones exceed the decoder's {spec.decoder_positions} "
            "positions: lower max_new_tokens"
        )
    for ids in (tokens, begin):
        check_tokens(ids, dataclasses.replace(spec, positions=0))  # padding does not count as positions


def _check_prompts(forward: Forward, tokens: np.ndarray, mask: np.ndarray, new: int) -> None:
    spec = forward.spec
    _check_rows(forward, mask, "prompt")
    if not (mask[:, -1].all() and (np.diff(mask.astype(np.int8), axis=1) >= 0).all()):
        raise ValueError("prompts are padded on the left, so that all end together; this mask has padding elsewhere")
    longest = int(mask.sum(axis=1).max())
    if spec.positions and longest + new > spec.positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones exceed the model's {spec.positions} positions: "
            "shorten the prompt or lower max_new_tokens"
        )
    check_tokens(tokens, dataclasses.replace(spec, positions=0))  # padding does not count as positions
