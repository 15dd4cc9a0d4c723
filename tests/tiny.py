"""A tokenizer of bytes, for tests of what reads and writes text on tiny random models."""

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

END = "<|endoftext|>"


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """257 tokens: the end of a text, then a token for each byte."""
    alphabet = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(BPE({word: i for i, word in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
