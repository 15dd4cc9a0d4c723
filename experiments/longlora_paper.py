"""LongLoRA's own runs: Llama 2 lengthened on RedPajama, measured on PG19 and Proof-pile, and by passkeys.

Paper: Chen et al. 2023, "LongLoRA", https://arxiv.org/abs/2309.12307, Tables 1 to 5 and section 4.

    python -m experiments.run longlora_attention --profile paper --model FOLDER --data FOLDER [--only 7b-8192-shifted]
    python -m experiments.run longlora_trainable --profile paper --model FOLDER --data FOLDER

FOLDER of --model holds llama-2-7b, llama-2-13b and llama-2-70b, Hugging Face directories; that of --data holds
redpajama.jsonl (``text`` a line; its tokens are kept beside it as redpajama.bin), pg19.bin and proof_pile.bin (tokens
as uint16 in a row, as the authors publish them; a .jsonl does too).  Section 4.1: AdamW, β 0.9 and 0.95, no decay, 2e-5
(1e-5 at 70B) after 20 steps of warm-up, 1,000 steps of 64 stretches in bf16; positions interpolated by the length over
the model's own, rounded up.  Perplexity is that of windows as long as the training's, 256 tokens apart.

Not run: the weights and corpora are in no package.  A run is one process; where a device does not hold a row
(`python -m peft_jax.plan`, docs/memory.md), its arrays have to be sharded.  Table 1 prints 5.2, 11.3 and 24.6 hours on
eight A100s for LongLoRA at 8,192, 16,384 and 32,768 tokens.

Departures: stretches are cut from the texts one behind the other, where the code pads the end of each batch of texts.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peft_jax as pj
from experiments import harness, passkey
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Work, train
from peft_jax import Method, methods, models, training

PARTS = {"lora": None, "lora-norm": "norm", "lora-embed": "embed", "lora-both": "embed|norm"}
LENGTHS = (8_192, 16_384, 32_768)
REACH = {"7b": (*LENGTHS, 65_536, 100_000), "13b": (*LENGTHS, 65_536), "70b": (32_768,)}


@dataclasses.dataclass(frozen=True)
class Row:
    """A size of model, the length that it learns, what trains, and under which attention."""

    size: str
    length: int
    trains: str = "lora-both"
    attention: str = "shifted"
    rank: int = 8

    @property
    def name(self) -> str:
        trains = {"lora": f"lora{self.rank}", "lora-both": ""}.get(self.trains, self.trains)
        attention = self.attention if self.attention != "shifted" or self.trains == "full" else ""
        return "-".join(part for part in (self.size, str(self.length), trains, attention) if part)


@dataclasses.dataclass(frozen=True)
class Paper:
    """What all rows share."""

    model: str = "llama-2"
    data: str = "longlora"
    alpha: float = 16.0
    group: float = 1 / 4
    steps: int = 1_000
    warmup: int = 20
    batch: int = 64
    micro: int = 1
    dtype: str = "bfloat16"
    stride: int = 256
    evaluated: int | None = None  # tokens of each corpus; by default, all
    questions: int = 10


class Task(NamedTuple):
    models: Path
    data: Path


def load(s: Paper, source: str | None, folder: str | None) -> Task:
    """Only looks: rows read the model that they need."""
    found = Task(Path(source or "data/llama-2"), Path(folder or "data/longlora"))
    for path in found:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not there: give the folders of models and data with --model and --data")
    return found


# -- tokens -----------------------------------------------------------------------------------------------------------


def tokens_of(folder: Path, name: str, tokenizer: Any) -> np.ndarray:
    """A corpus as uint16 tokens on disk, made of its texts where only those are there, with an end behind each.

    Raises:
        FileNotFoundError: if neither is.
        ValueError: on a line without a text; if the tokens do not fit into 16 bits.
    """
    path, texts = folder / f"{name}.bin", folder / f"{name}.jsonl"
    if not path.exists():
        if not texts.exists():
            raise FileNotFoundError(f"{folder} holds neither {name}.bin nor {name}.jsonl")
        if len(tokenizer) > 2**16:
            raise ValueError(f"{len(tokenizer)} tokens do not fit into {path.name}'s 16 bits")
        harness.whole(path, lambda part: _tokenised(part, read(texts), tokenizer))
    return np.memmap(path, np.uint16, "r")


def read(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path.name}, line {number}: a line is an object with a text") from None


def _tokenised(part: Path, texts: Iterator[str], tokenizer: Any) -> None:
    with part.open("wb") as file:
        for text in texts:
            np.asarray([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], np.uint16).tofile(file)


class Stretches:
    """Batches of stretches of a text, each once in an order that the seed draws, then in another."""

    def __init__(self, tokens: np.ndarray, length: int, batch: int, seed: int) -> None:
        self.tokens, self.length, self.batch_size, self.seed = tokens, length, batch, seed
        self.count = (len(tokens) - 1) // length
        if self.count < batch:
            raise ValueError(f"the corpus has {self.count} stretches of {length} tokens, and a batch takes {batch}")

    def batch(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(index, self.count // self.batch_size)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        rows = np.stack([self.tokens[i * self.length : (i + 1) * self.length + 1] for i in chosen]).astype(np.int32)
        ones = np.ones((self.batch_size, self.length), np.float32)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": ones, "mask": ones > 0}


# -- runs -------------------------------------------------------------------------------------------------------------


def method_of(s: Paper, row: Row) -> Method:
    if row.trains == "full":
        learnt = [methods.unfreeze("", keep_base=False)]
    else:
        learnt, whole = [methods.lora(row.rank, s.alpha, "(q|k|v|o)_proj")], PARTS[row.trains]
        # Llama's head is no embedding, and rests; "embed" is `model.embed_tokens` alone.
        learnt += [methods.unfreeze(whole, keep_base=False, name="whole")] if whole else []
    if row.attention != "full":
        learnt.append(methods.shift_attention(s.group, shift=row.attention == "shifted"))
    return pj.chain(*learnt)


def optimiser(s: Paper, row: Row) -> optax.GradientTransformation:
    rate = optax.linear_schedule(0.0, 1e-5 if row.size == "70b" else 2e-5, s.warmup)
    return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.0)


def run(task: Task, s: Paper, row: Row, seed: int) -> Outcome:
    folder = task.models / f"llama-2-{row.size}"
    model = models.load(folder, dtype=jnp.dtype(s.dtype), remat="full")
    factor, tokenizer = math.ceil(row.length / model.forward.spec.positions), model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{folder} holds no tokenizer: give the directory of a whole model")
    if factor > 1:
        del model
        scaling = {"rope_type": "linear", "factor": float(factor)}
        model = models.load(folder, dtype=jnp.dtype(s.dtype), remat="full", rope_scaling=scaling)
    params, forward = method_of(s, row)(jax.random.key(seed), model.params, model.forward)
    del model
    count, tx = pj.count(params), optimiser(s, row)
    step = training.make_step(forward, tx, accumulate=s.batch // s.micro)
    state, frozen = training.init_state(params, tx, jax.random.key(seed))
    del params
    stretches = Stretches(tokens_of(task.data, "redpajama", tokenizer), row.length, s.batch, seed)
    state, cost = train(step, state, frozen, stretches.batch, s.steps)
    begin, learnt, metrics = time.perf_counter(), pj.combine(state.trainables, frozen), dict[str, float]()
    for name in ("pg19", "proof_pile"):
        text = tokens_of(task.data, name, tokenizer)[: s.evaluated]
        metrics[name] = training.perplexity(forward, learnt, text, row.length, s.stride)  # full attention
    keys = passkey.accuracy(forward, learnt, tokenizer, row.length, range(s.questions))
    metrics["passkey"] = 100 * keys
    evaluated = Work(places(s, row)[1], places(s, row)[1], time.perf_counter() - begin)
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


def places(s: Paper, row: Row) -> tuple[int, int]:
    """Of some 9 million tokens of PG19's test set and 3 million of Proof-pile's, by default."""
    text = 12_000_000 if s.evaluated is None else 2 * s.evaluated
    return s.steps * s.batch * row.length, (text // s.stride + s.questions) * row.length


# -- what the paper prints --------------------------------------------------------------------------------------------


def printed(heading: str, numbers: dict[str, float]) -> dict[str, dict[str, float]]:
    return {name: {heading: number} for name, number in numbers.items()}


_PG19 = {"full": (8.02, 8.05, 8.04), "short": (8.29, 8.83, 9.47), "shifted": (8.04, 8.03, 8.08)}
ATTENTION = {
    f"7b-{name}": {f"7B, PG19 at {n:,}": x for n, x in zip(LENGTHS, row, strict=True)} for name, row in _PG19.items()
}
TRAINABLE = printed(
    "7B to 32,768, PG19",
    {"lora": 11.44, "lora-norm": 10.49, "lora-embed": 8.29, "lora-both": 8.12, "full": 8.08},
)
PRINTED = "printed"
MEASURED = (
    Metric("pg19", "PG19", 2),
    Metric("proof_pile", "Proof-pile", 2),
    Metric("passkey", "passkeys found, %", 0),
)
ABLATED = tuple(Row("7b", n, "full", attention) for attention in _PG19 for n in LENGTHS)
REACHED = tuple(Row(size, n) for size, lengths in REACH.items() for n in lengths)
SHARED: dict[str, Any] = {
    "settings": Paper(),
    "metrics": MEASURED,
    "speed": Speed(28_000, 90_000, "7B at 8,192 tokens on eight A100s, from the paper's 5.2 hours; evaluation assumed"),
    "places": places,
    "load": load,
    "run": run,
    "seeds": (0,),
}

ATTENTION_PROFILE = Profile(
    parts=(
        Part(
            "Table 1: attention in training, fully fine-tuned",
            ABLATED,
            printed(
                PRINTED,
                {f"7b-{n}-full-{name}": x for name, row in _PG19.items() for n, x in zip(LENGTHS, row, strict=True)},
            ),
        ),
        Part(
            "Tables 3 to 5: sizes and lengths",
            REACHED,
            printed("Proof-pile, printed", {"7b-32768": 2.50}),
        ),
    ),
    **SHARED,
)
RANKS = {8: 11.44, 16: 11.82, 256: 11.98}
TRAINABLE_PROFILE = Profile(
    parts=(
        Part(
            "Table 2: what trains, to 32,768 tokens",
            (
                *(Row("7b", 32_768, "lora", rank=rank) for rank in (8, 16, 32, 64, 128, 256)),
                *(Row("7b", 32_768, trains) for trains in ("lora-norm", "lora-embed", "lora-both", "full")),
            ),
            printed(
                PRINTED,
                {
                    **{f"7b-32768-lora{rank}": x for rank, x in RANKS.items()},
                    "7b-32768-lora-norm": 10.49,
                    "7b-32768-lora-embed": 8.29,
                    "7b-32768": 8.12,
                    "7b-32768-full-shifted": 8.08,
                },
            ),
        ),
    ),
    **SHARED,
)
