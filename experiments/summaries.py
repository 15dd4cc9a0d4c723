"""XSum: a BBC article in, its first sentence out (Narayan et al. 2018, arXiv:1808.08745), for encoder-decoder models.

Files are {train,val,test}.source and .target, an article or a summary a line, as transformers' examples/seq2seq kept
them and XiangLi1999/PrefixTuning's seq2seq/utils.py reads them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.e2e import Pair
from peft_jax.training.data import Rows

PARTS = {"train": "train", "valid": "val", "test": "test"}


def read(folder: Path, part: str) -> list[Pair]:
    """(article, summary) of a part, "train", "valid" or "test".

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if the two have different numbers of lines, or none; if a line is empty, with its number.
    """
    sides = []
    for side in ("source", "target"):
        path = folder / f"{PARTS[part]}.{side}"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there: give the folder above xsum/, with its six files, with --data"
            )
        # Split at line feeds alone: articles hold other characters that Python takes for the end of a line.
        sides.append(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    articles, texts = sides
    if len(articles) != len(texts):
        raise ValueError(
            f"{folder}, {part}: {len(articles)} articles and {len(texts)} summaries, which must be as many"
        )
    for number, pair in enumerate(zip(articles, texts, strict=True), 1):
        if not all(text.strip() for text in pair):
            raise ValueError(f"{folder}, {part}: line {number} is empty")
    return list(zip(articles, texts, strict=True))


def sources(articles: Sequence[str], tokenizer: Any, longest: int) -> list[list[int]]:
    """The tokens of articles, cut to the longest that is read."""
    return list(tokenizer(list(articles), truncation=True, max_length=longest)["input_ids"])


def rows(pairs: Sequence[Pair], tokenizer: Any, start: int, longest: tuple[int, int]) -> Rows:
    """One pair a row: tokens and mask of the article; decoder_tokens, targets and weights of the summary.

    Args:
        start: the token that the decoder begins with, before the summary's own.
        longest: places for an article and for a summary, each cut to that.
    """
    read = sources([article for article, _ in pairs], tokenizer, longest[0])
    wanted = sources([summary for _, summary in pairs], tokenizer, longest[1])
    count, (width, length) = len(pairs), longest
    found: Rows = {
        "tokens": np.zeros((count, width), np.int32),
        "mask": np.zeros((count, width), bool),
        "decoder_tokens": np.zeros((count, length), np.int32),
        "targets": np.zeros((count, length), np.int32),
        "weights": np.zeros((count, length), np.float32),
    }
    for row, (ids, new) in enumerate(zip(read, wanted, strict=True)):
        found["tokens"][row, : len(ids)], found["mask"][row, : len(ids)] = ids, True
        found["decoder_tokens"][row, : len(new)] = [start, *new[:-1]]
        found["targets"][row, : len(new)], found["weights"][row, : len(new)] = new, 1
    return found
