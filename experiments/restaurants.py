"""The E2E task of the laptop tables: a restaurant's attributes in, a sentence about it out.

    Blue Spice, coffee shop, city centre
    A coffee shop in the city centre area called Blue Spice.

A thousand examples of the test set, of 213 sets of attributes (`experiments.data.bigbench`).  To save tokens an
attribute is written as its value where that says what it is.  A line break parts the attributes from the sentence, and
another ends it: a model that has been shown examples in its context reads the same as one that is trained.

Attributes are split three ways: those held out, a few to choose learning rates on, and the rest, to train on; no set of
attributes is in two of them.  BLEU and ROUGE-L compare a text with all the sentences of its attributes; the loss is
over some of the sentences, first one for each set of attributes, then a second.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import e2e, scores
from experiments.data import bigbench, smollm2
from experiments.harness import Metric
from experiments.writing import write
from peft_jax import Forward, models, training
from peft_jax.models import Model
from peft_jax.training.data import Rows

WRITTEN = {  # where an attribute's value does not say what it is
    "customer rating": "rated {}",
    "priceRange": "price {}",
    "near": "near {}",
    "familyFriendly: yes": "family friendly",
    "familyFriendly: no": "not family friendly",
}
END = "\n"


METRICS = (Metric("bleu", "BLEU", 1), Metric("rouge", "ROUGE-L", 1), Metric("loss", "loss, nats", 3))


@dataclasses.dataclass(frozen=True)
class Laptop:
    """What the rows of a table share: `size` rows are evaluated at a time, their prompts padded to `prompt`."""

    model: str = "SmolLM2-135M-Instruct.Q4_1.gguf"
    data: str = "e2e_nlg"
    steps: int = 30
    batch: int = 8
    length: int = 48
    held_out: int = 64
    validation: int = 24
    sentences: int = 96
    size: int = 32
    prompt: int = 32
    new_tokens: int = 40
    clip: float = 1.0


class Example(NamedTuple):
    attributes: str
    sentence: str
    prompt: list[int]  # the tokens of the attributes and the line break
    tokens: list[int]  # and of the sentence and its end


def shorten(given: str) -> str:
    """``name: Cocum, food: Thai, near: Ranch`` in fewer tokens: ``Cocum, Thai, near Ranch``."""
    written = []
    for attribute in re.split(r", (?=[A-Za-z ]+: )", given):
        name, colon, value = attribute.partition(": ")
        if not colon:
            raise ValueError(f"{given!r} is not a list of attributes such as 'name: Cocum, food: Thai'")
        written.append(WRITTEN.get(attribute, WRITTEN.get(name, "{}")).format(value))
    return ", ".join(written)


def load(tokenizer: Any) -> dict[str, list[Example]]:
    """All examples by attributes, both in the data set's order."""
    pairs = [(shorten(item["input"]), " ".join(item["target"].split())) for item in bigbench("gem/e2e_nlg")]
    prompts = tokenizer([f"{attributes}{END}" for attributes, _ in pairs])["input_ids"]
    sentences = tokenizer([f"{sentence}{END}" for _, sentence in pairs])["input_ids"]
    found: dict[str, list[Example]] = {}
    for pair, prompt, sentence in zip(pairs, prompts, sentences, strict=True):
        found.setdefault(pair[0], []).append(Example(*pair, prompt, [*prompt, *sentence]))
    return found


class Split(NamedTuple):
    """`examples` fit into rows of some length, in a fixed order: subsets by prefix are nested.  `references` are all
    sentences of each set of attributes."""

    examples: list[Example]
    references: dict[str, list[str]]
    prompts: list[list[int]]


def split(found: dict[str, list[Example]], counts: Sequence[int], length: int, seed: int = 0) -> list[Split]:
    """So many sets of attributes for each of `counts`, and all that are left: the last one's examples are shuffled, the
    others' come by turns, one of each set of attributes."""
    rng = np.random.default_rng(seed)
    names = [list(found)[i] for i in rng.permutation(len(found))]
    parts: list[Split] = []
    for chosen in np.split(np.array(names, object), np.cumsum(counts)):
        groups = [[e for e in found[name] if len(e.tokens) <= length + 1] for name in chosen]
        if len(parts) < len(counts):
            turns = range(max(map(len, groups)))
            examples = [group[turn] for turn in turns for group in groups if turn < len(group)]
        else:
            every = [example for group in groups for example in group]
            examples = [every[i] for i in rng.permutation(len(every))]
        references = {name: [example.sentence for example in found[name]] for name in chosen}
        parts.append(Split(examples, references, [found[name][0].prompt for name in chosen]))
    return parts


def rows(examples: Sequence[Example], length: int, infix: bool) -> Rows:
    """One example a row; only the sentence and its end are learnt."""
    weighed = [
        {"tokens": e.tokens, "weights": [0.0] * len(e.prompt) + [1.0] * (len(e.tokens) - len(e.prompt))}
        for e in examples
    ]
    found = training.pad(weighed, length)
    return e2e.infixed(found) if infix else found


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model, and what every run of a table trains and is evaluated on."""

    model: Model
    train: list[Example]
    validation: Split
    held_out: Split


def prepare(s: Any, source: str | None, folder: str | None) -> Task:
    """What a table's runs share; `s` says the steps, the batch, the length, and how many sets of attributes are held
    out (`held_out`) or kept to choose learning rates on (`validation`)."""
    if folder is not None:
        raise ValueError("the laptop profile reads the examples that `make data-tables` fetches: leave --data out")
    model = models.load(smollm2() if source is None else source, remat="dots")
    held_out, validation, rest = split(load(model.tokenizer), (s.held_out, s.validation), s.length)
    used = rest.examples[: s.steps * s.batch]
    print(
        f"E2E in rows of {s.length}: {len(held_out.references)} sets of attributes held out "
        f"({digest(held_out.examples)}), {len(validation.references)} to choose rates on; of {len(rest.examples)} "
        f"examples of {len(rest.references)} others, in one fixed order, the first {len(used)} to train on "
        f"({digest(used)}), or the first 200 of them ({digest(used[:200])}), or the first 50 ({digest(used[:50])})"
    )
    return Task(model, used, validation, held_out)


def digest(examples: Sequence[Example]) -> str:
    text = "\n".join(f"{example.attributes}\n{example.sentence}" for example in examples)
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Score(NamedTuple):
    metrics: dict[str, float]
    tokens: int  # read and written


def score(forward: Forward, params: Any, s: Any, tokenizer: Any, part: Split, infix: bool = False) -> Score:
    """The loss of `s.sentences` examples; BLEU and ROUGE-L of what is written greedily for each set of attributes, up
    to the end of a line."""
    batches = training.batches(rows(part.examples[: s.sentences], s.length, infix), s.size)
    loss = training.evaluate(forward, params, batches)["loss"]
    ends = tokenizer(END)["input_ids"]
    texts, written = write(
        forward, params, tokenizer, part.prompts, s.size, ends=ends, infix=infix, max_new_tokens=s.new_tokens
    )
    references = list(part.references.values())
    metrics = {"bleu": scores.bleu(texts, references), "rouge": scores.rouge_l(texts, references), "loss": loss}
    return Score(metrics, int(batches.rows["mask"].sum()) + sum(map(len, part.prompts)) + written)
