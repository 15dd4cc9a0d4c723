"""A tokenizer of bytes with the special tokens of RoBERTa and BART, T5 or GPT-2: what tiny models read in tests."""

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing


def roberta():
    """<s> 0, <pad> 1, </s> 2; ``<s> text </s>``, ``<s> text </s> </s> text </s>``; 261 tokens."""
    inner = _bytes(["<s>", "<pad>", "</s>"], [("Ġ", "e"), ("Ġ", "g")])
    inner.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return _fast(inner, cls_token="<s>", pad_token="<pad>", sep_token="</s>", bos_token="<s>", eos_token="</s>")


def t5():
    """<pad> 0, </s> 1; ``text </s>``; 258 tokens."""
    inner = _bytes(["<pad>", "</s>"], [])
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _fast(inner, pad_token="<pad>", eos_token="</s>")


def gpt2():
    """<|endoftext|> 0; ``text``; 257 tokens."""
    return _fast(_bytes(["<|endoftext|>"], []), eos_token="<|endoftext|>")


def _bytes(special, merges):
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    inner = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return inner


def _fast(inner, **special):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_input_names=["input_ids", "attention_mask"], **special
    )
