"""The tokenizer in a GGUF file's metadata, as a transformers tokenizer.

Byte-level BPE (``tokenizer.ggml.model`` "gpt2"), which cuts text into words in one of several ways before it merges
byte pairs; ``tokenizer.ggml.pre`` names the way.  The ways: llama.cpp, src/llama-vocab.cpp (``llm_tokenizer_bpe``).
"""

from typing import Any

import gguf
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from peft_jax.interop.gguf import get, need, path_of

# How text is cut into words before byte pairs are merged: contractions, letters, digits, punctuation, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def _cut(digits: str) -> Any:
    words = Regex(WORDS.replace("DIGITS", digits))
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _pre_tokenizer(kind: str | None, path: str) -> Any:
    if kind == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind == "llama-bpe":
        return _cut(r"\p{N}{1,3}")
    if kind == "qwen2":
        return _cut(r"\p{N}")
    raise ValueError(
        f"the pre-tokenizer {kind!r} of {path} is not supported: gpt-2, smollm, llama-bpe and qwen2 are; "
        "pass tokenizer=, the directory of the model's tokenizer"
    )


def read_tokenizer(file: gguf.GGUFReader) -> Any:
    """The tokenizer in a file's metadata, as transformers knows tokenizers; None if it holds none.

    Raises:
        ValueError: if it is not byte-level BPE, or cuts words in a way that is not known here.
    """
    kind = get(file, "tokenizer.ggml.model")
    if kind is None:
        return None
    if kind != "gpt2":
        raise ValueError(
            f"{path_of(file)} holds a {kind!r} tokenizer, and only byte-level BPE (gpt2) is read: "
            "pass tokenizer=, the directory of the model's tokenizer"
        )
    pre, tokens = get(file, "tokenizer.ggml.pre"), need(file, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in get(file, "tokenizer.ggml.merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, path_of(file))
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    types = get(file, "tokenizer.ggml.token_type", [])
    for wanted in (CONTROL, USER_DEFINED):
        added = [token for token, number in zip(tokens, types, strict=False) if number == wanted]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=wanted == CONTROL) for token in added])
    named = {}
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        number = get(file, f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            named[f"{name}_token"] = tokens[number]
    begin, end = [], []
    if "bos_token" in named and get(file, "tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        begin.append(named["bos_token"])
    if "eos_token" in named and get(file, "tokenizer.ggml.add_eos_token", False):
        end.append(named["eos_token"])
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *(f"{t}:1" for t in begin), "$B:1", *(f"{t}:1" for t in end)],
            special_tokens=[(token, vocabulary[token]) for token in begin + end],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=get(file, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=get(file, f"{need(file, 'general.architecture')}.context_length"),
        **named,
    )
