"""Tokenizers of bytes, for tests of what reads and writes text on tiny random models."""

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """257 tokens, as GPT-2's: the end of a text, then a token for each byte."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_of_bytes(["<|endoftext|>"]), eos_token="<|endoftext|>"
    )


def bracketing_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """259 tokens, as BART's: ``<s>``, ``<pad>``, ``</s>``, then a token for each byte; a text is put in brackets."""
    inner = _of_bytes(["<s>", "<pad>", "</s>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def _of_bytes(special: list[str]) -> Tokenizer:
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(BPE({word: i for i, word in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return inner
