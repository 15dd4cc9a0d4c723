"""The E2E NLG task that the paper profiles share: a restaurant's attributes in, a sentence about it out.

    name : Blue Spice | Type : coffee shop | area : riverside||There is a coffee shop Blue Spice in the riverside area .

Files are those of microsoft/LoRA (examples/NLG/data/e2e/{train,valid,test}.txt): a line an example, attributes and
reference separated by ``||``.  As its src/gpt2_encode.py and src/data_utils.py have it, a model reads
``attributes <eos> sentence <eos>`` and learns the sentence and its end.  The loss is smoothed as in its src/model.py,
and BLEU is that of the challenge's own script (Novikova et al. 2017, arXiv:1706.09254; tuetschek/e2e-metrics,
metrics/pymteval.py): up to four-grams, any case, the reference nearest in length.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax import Forward, Ports
from peft_jax.training.data import Rows, pad
from peft_jax.training.losses import Batch, Loss, inputs_of

Pair = tuple[str, str]  # (attributes, sentence)


# -- data -------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Pair]:
    """The examples of a file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if a line has no ``||``, with its number; if the file is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: give the folder of train.txt, valid.txt and test.txt (examples/NLG/data/e2e of "
            "microsoft/LoRA) with --data"
        )
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        attributes, bars, sentence = line.strip().partition("||")
        if not bars or not attributes or not sentence:
            raise ValueError(f"{path}, line {number}: a line is attributes, two bars and a sentence, not {line[:60]!r}")
        found.append((attributes, sentence))
    if not found:
        raise ValueError(f"{path} is empty: it has no examples")
    return found


def encode(pairs: Sequence[Pair], tokenizer: Any) -> list[dict[str, list[float]]]:
    """Examples for `training.pad`: tokens, and weights that are 1 on the sentence and its end."""
    end = [tokenizer.eos_token_id]
    prompts = tokenizer([attributes for attributes, _ in pairs])["input_ids"]
    sentences = tokenizer([f" {sentence}" for _, sentence in pairs])["input_ids"]
    return [
        {"tokens": [*prompt, *end, *sentence, *end], "weights": [0.0] * (len(prompt) + 1) + [1.0] * (len(sentence) + 1)}
        for prompt, sentence in zip(prompts, sentences, strict=True)
    ]


def rows(pairs: Sequence[Pair], tokenizer: Any, longest: int, multiple: int = 32, long: str = "raise") -> Rows:
    """One example a row, as long as the longest of them, up to a `multiple`, but no longer than `longest`: `long` says
    what becomes of an example that has more tokens (`training.pad`)."""
    examples = encode(pairs, tokenizer)
    length = max(len(example["tokens"]) - 1 for example in examples)
    return pad(examples, min(longest, math.ceil(length / multiple) * multiple), long=long)


def infixed(rows: Rows) -> Rows:
    """Rows that say where an infix stands (Li & Liang 2021, arXiv:2101.00190, section 7.3): before the last token that
    nothing is learnt of, which parts what is given from what is written."""
    return rows | {"infix": np.argmax(rows["weights"] > 0, axis=1).astype(np.int32)}


def references(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """All sentences of each set of attributes, in order of appearance."""
    found: dict[str, list[str]] = {}
    for attributes, sentence in pairs:
        found.setdefault(attributes, []).append(sentence.strip())
    return found


# -- loss -------------------------------------------------------------------------------------------------------------


def label_smoothed(epsilon: float) -> Loss:
    """``(1 − ε) (−log p[target]) + ε mean over the vocabulary (−log p)``, weighted: ``(Σ, Σ weights)``."""
    return functools.partial(_smoothed, epsilon)


def _smoothed(
    epsilon: float,
    forward: Forward,
    params: Any,
    batch: Batch,
    ports: Ports = Ports(),  # noqa: B008 (frozen)
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    weights = jnp.asarray(batch["weights"], jnp.float32)
    logits = forward(params, inputs_of(batch), ports)
    total = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    losses = total - (1 - epsilon) * picked - epsilon * jnp.mean(logits, axis=-1)
    return jnp.sum(jnp.where(weights == 0, 0.0, weights * losses)), jnp.sum(weights)


# -- BLEU -------------------------------------------------------------------------------------------------------------


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in percent, of texts with one or more references each.

    >>> from experiments import e2e
    >>> round(e2e.bleu(["The Mill serves cheap food ."], [["Cheap food .", "The Mill serves cheap food ."]]))
    100
    """
    hits, counts = Counter[int](), Counter[int]()
    written = wanted = 0
    for text, others in zip(texts, references, strict=True):
        words, answers = split(text), [split(other) for other in others]
        written += len(words)
        wanted += min((abs(len(answer) - len(words)), len(answer)) for answer in answers)[1]
        for n in range(1, 5):
            found = Counter(ngrams(words, n))
            allowed: Counter[tuple[str, ...]] = Counter()
            for answer in answers:
                allowed |= Counter(ngrams(answer, n))
            hits[n] += (found & allowed).total()
            counts[n] += len(words) - n + 1
    if not all(hits[n] for n in range(1, 5)):
        return 0.0
    precision = sum(math.log(hits[n] / counts[n]) for n in range(1, 5)) / 4
    return 100 * math.exp(min(0.0, 1 - wanted / written) + precision)


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def split(text: str) -> list[str]:
    """Words and punctuation in lower case: a point or comma stays within a number, a dash behind a digit does not."""
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).lower().split()
