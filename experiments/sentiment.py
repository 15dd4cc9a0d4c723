"""The sentiment task that the demo and the laptop tables share: a language model answers with one token.

    Review: {text}
    Sentiment: positive

Snippets of movie reviews with a mean human rating of more than 0.5 either way; the answer is the token `` positive`` or
`` negative``, and the loss is its cross entropy over the whole vocabulary.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.data import movie_reviews, smollm2
from peft_jax import Forward, Ports, models
from peft_jax.models import Model
from peft_jax.training.losses import inputs_of

PROMPT = "Review: {text}\nSentiment:"
ANSWERS = (" positive", " negative")


class Example(NamedTuple):
    text: str
    tokens: list[int]  # the prompt
    answer: int  # an index into ANSWERS


def load(tokenizer: Any, length: int, held_out: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples of at most `length` tokens, in a fixed order: subsets by prefix are nested."""
    kept = [(text, rating) for text, rating in movie_reviews() if abs(rating) > 0.5]
    encoded = tokenizer([PROMPT.format(text=text) for text, _ in kept])["input_ids"]
    found = [
        Example(text, tokens, int(rating < 0))
        for (text, rating), tokens in zip(kept, encoded, strict=True)
        if len(tokens) <= length
    ]
    order = np.random.default_rng(seed).permutation(len(found))
    shuffled = [found[i] for i in order]
    return shuffled[held_out:], shuffled[:held_out]


def answer_ids(tokenizer: Any) -> np.ndarray:
    """The token of each answer."""
    ids = [tokenizer(answer)["input_ids"] for answer in ANSWERS]
    if any(len(tokens) != 1 for tokens in ids):
        raise ValueError(f"this tokenizer splits one of {ANSWERS}: the task needs one token an answer")
    return np.array(ids, np.int32)[:, 0]


def collate(examples: list[Example], length: int, answers: np.ndarray) -> dict[str, np.ndarray]:
    """A batch: prompts padded on the right, the answer as the target of each prompt's last token."""
    batch = {
        "tokens": np.zeros((len(examples), length), np.int32),
        "targets": np.zeros((len(examples), length), np.int32),
        "weights": np.zeros((len(examples), length), np.float32),
        "mask": np.zeros((len(examples), length), bool),
    }
    for row, example in enumerate(examples):
        n = len(example.tokens)
        batch["tokens"][row, :n] = example.tokens
        batch["mask"][row, :n] = True
        batch["targets"][row, n - 1] = answers[example.answer]
        batch["weights"][row, n - 1] = 1
    return batch


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model, and the reviews that every run of a table trains and is evaluated on."""

    model: Model
    train: list[Example]
    held_out: list[Example]
    answers: np.ndarray


def prepare(s: Any, source: str | None, folder: str | None) -> Task:
    """What a laptop table's runs share; `s` says the steps, the batch, the length and how many reviews are held out."""
    if folder is not None:
        raise ValueError("the laptop profile reads the reviews that `make data` fetches: leave --data out")
    model = models.load(smollm2() if source is None else source, remat="dots")
    train, held_out = load(model.tokenizer, s.length, s.held_out)
    used = train[: s.steps * s.batch]
    print(
        f"reviews of at most {s.length} tokens in one fixed order: {len(held_out)} held out ({digest(held_out)}), then "
        f"the first {len(used)} of {len(train)} to train on ({digest(used)}), the same for every run"
    )
    return Task(model, used, held_out, answer_ids(model.tokenizer))


def digest(examples: list[Example]) -> str:
    text = "\n".join(f"{example.answer}{example.text}" for example in examples)
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Batches(NamedTuple):
    """Batches as a pure function of the step: each epoch is a permutation of its own."""

    examples: list[Example]
    size: int
    length: int
    answers: np.ndarray
    seed: int = 0

    def batch(self, step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, len(self.examples) // self.size)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
        rows = order[place * self.size : (place + 1) * self.size]
        return collate([self.examples[i] for i in rows], self.length, self.answers)


def answer_logits(forward: Forward, params: Any, batch: Any, ports: Ports = Ports()) -> Float[Array, "batch vocab"]:  # noqa: B008
    """The logits of each prompt's last position: the head runs on one position a row."""
    features = forward.features(params, inputs_of(batch), ports)
    last = jnp.argmax(jnp.asarray(batch["weights"]), axis=1)
    return forward.head(params, features[jnp.arange(features.shape[0]), last], ports)


def answer_loss(forward: Forward, params: Any, batch: Any, ports: Ports = Ports()) -> tuple[Array, Array]:  # noqa: B008
    """Cross entropy of the answer over the whole vocabulary: (Σ, count)."""
    targets = jnp.max(jnp.asarray(batch["targets"]), axis=1)
    logp = jax.nn.log_softmax(answer_logits(forward, params, batch, ports).astype(jnp.float32))
    loss = -jnp.sum(jnp.take_along_axis(logp, targets[:, None], axis=1))
    return loss, jnp.float32(targets.shape[0])


class Score(NamedTuple):
    accuracy: float  # share of examples whose right answer outscores the wrong one
    loss: float  # mean cross entropy over the whole vocabulary, nats
    predictions: np.ndarray  # an index into ANSWERS for each example


def score(
    forward: Forward, params: Any, examples: list[Example], length: int, answers: np.ndarray, size: int = 20
) -> Score:
    """Accuracy and loss on examples; `size` rows at a time."""
    losses: list[float] = []
    predictions: list[int] = []
    for rows in _chunks(examples, size):
        padded = rows + [rows[-1]] * (size - len(rows))
        logp, predicted = _measure(forward, params, collate(padded, length, answers), answers)
        labels = [example.answer for example in rows]
        losses += [-float(row[label]) for row, label in zip(np.asarray(logp), labels, strict=False)]
        predictions += np.asarray(predicted)[: len(rows)].tolist()
    right = [p == example.answer for p, example in zip(predictions, examples, strict=True)]
    return Score(float(np.mean(right)), float(np.mean(losses)), np.array(predictions))


@functools.partial(jax.jit, static_argnums=0)
def _measure(forward: Forward, params: Any, batch: Any, answers: Any) -> tuple[Array, Array]:
    logits = answer_logits(forward, params, batch).astype(jnp.float32)
    logp = jax.nn.log_softmax(logits)[:, answers]
    return logp, jnp.argmax(logp, axis=1)


def _chunks(items: list[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
