"""LoRA: which matrices to adapt under one budget, and at which rank.

Paper: Hu et al. 2021, "LoRA", https://arxiv.org/abs/2106.09685 (version 2), Tables 5 and 6 (sections 7.1 and 7.2), on
GPT-3 175B, which is not released; Table 18 (section H.2) repeats the ranks on GPT-2 medium and E2E.

    python -m experiments.run lora_ablation                      laptop: 24 runs, about 25 minutes on two CPU cores
    python -m experiments.run lora_ablation --profile paper --model PATH --data PATH
                                                                 paper: 57 runs, about 1.3 hours each on one A100
    python -m experiments.tables                                 the tables, from the results

laptop   SmolLM2-135M answers movie reviews with one token (`experiments.sentiment`).  Eight rows, three seeds.  Queries
         and outputs are 576 x 576, keys and values 576 x 192, so equal budgets are 8 directions in a wide matrix or 12
         in a narrow one: 276,480 numbers.  480 training reviews, the same for every run, each seen once; 400 held out.
         One set of hyperparameters for all rows, tuned for none: AdamW, learning rate 1e-3 with cosine decay to 0,
         gradient norm clipped at 1.  α is 8, the first rank tried (section 4.1), and the scale α/r.  Seeds vary the
         start of the adapters and the order of the data.  The merged model is what is evaluated.
         Expected: about 89% on queries and values (a trial in torch: 78% before, 89% after 40 steps of batch 8).  400
         reviews resolve 1.6 points of accuracy; the loss resolves more.
paper    GPT-2 medium on the E2E NLG challenge, which the paper's code does run: the rows of both tables, with the
         hyperparameters of Table 11 at every row (tuned by the authors at r = 4 on queries and values).  --model takes
         a Hub name or a directory, --data the folder of train.txt, valid.txt and test.txt (`experiments.e2e`).
         Expected on queries and values (Table 18, one seed): r = 4: validation loss 1.18, BLEU 70.38; r = 1: 1.23,
         68.72; r = 64: 1.16, 69.24.  Hours are computed, not measured: 27M training places a run (examples padded to
         128 tokens), 4 x 355M operations each, at 45% of an A100's 19.5 TFLOP/s in fp32.

Departures: the paper decodes without repeating four-grams, here they may repeat; its length penalty for E2E is 0.9 (its
README says 0.8); AdamW's ε is 1e-6, as in its code.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import optax

import peft_jax as pj
from experiments import e2e, sentiment
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table, Work, train
from experiments.writing import write
from peft_jax import Forward, Method, methods, models, training
from peft_jax.models.loading import Model
from peft_jax.training.step import Step

# What q, k, v, o are called, by model type.
MATRICES = {
    "llama": {n: rf"self_attn\.{n}_proj$" for n in "qkvo"},
    "gpt2": {**{n: rf"attn\.c_attn\.{n}$" for n in "qkv"}, "o": r"attn\.c_proj$"},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Which of the attention's matrices are adapted, and each one's rank."""

    ranks: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return "-".join(f"{matrix}{rank}" for matrix, rank in self.ranks)


def row(name: str) -> Row:
    """The row of a name: ``q4-v6`` is rank 4 on queries, rank 6 on values."""
    return Row(tuple((part[0], int(part[1:])) for part in name.split("-")))


def adapter(row: Row, alpha: float, model_type: str, dropout: float = 0.0) -> Method:
    """The row's LoRA; every matrix has the scale α/r of its own rank."""
    matrices = MATRICES[model_type]
    ranks = {matrices[matrix]: rank for matrix, rank in row.ranks}
    rank = max(ranks.values())
    return methods.lora(rank, alpha, "|".join(ranks), rank_pattern=ranks, dropout=dropout)


# -- the paper's figures, read in version 2 ----------------------------------------------------------------------------

Figures = dict[str, dict[str, float]]  # by row, by heading


def printed(headings: tuple[str, str], numbers: dict[str, tuple[float, float]]) -> Figures:
    return {name: dict(zip(headings, pair, strict=True)) for name, pair in numbers.items()}


GPT3 = ("GPT-3: WikiSQL, % (± 0.5)", "GPT-3: MultiNLI, % (± 0.1)")
GPT2 = ("GPT-2 M: validation loss", "GPT-2 M: BLEU")

WHICH = printed(
    GPT3,
    {
        "q8": (70.4, 91.0),
        "k8": (70.0, 90.8),
        "v8": (73.0, 91.0),
        "o8": (73.2, 91.3),
        "q4-k4": (71.4, 91.3),
        "q4-v4": (73.7, 91.3),
        "q2-k2-v2-o2": (73.7, 91.7),
    },
)
RANKS = printed(
    GPT3,
    {
        "q1": (68.8, 90.7),
        "q2": (69.6, 90.9),
        "q4": (70.5, 91.1),
        "q8": (70.4, 90.7),
        "q64": (70.0, 90.7),
        "q1-v1": (73.4, 91.3),
        "q2-v2": (73.3, 91.4),
        "q4-v4": (73.7, 91.3),
        "q8-v8": (73.8, 91.6),
        "q64-v64": (73.5, 91.4),
        "q1-k1-v1-o1": (74.1, 91.2),
        "q2-k2-v2-o2": (73.7, 91.7),
        "q4-k4-v4-o4": (74.0, 91.7),
        "q8-k8-v8-o8": (74.0, 91.5),
        "q64-k64-v64-o64": (73.9, 91.4),
    },
)
TABLE_18 = printed(
    GPT2,
    {
        "q1-v1": (1.23, 68.72),
        "q2-v2": (1.21, 69.17),
        "q4-v4": (1.18, 70.38),
        "q8-v8": (1.17, 69.57),
        "q64-v64": (1.16, 69.24),
    },
)


def part(title: str, figures: Figures, names: dict[str, str]) -> Part:
    """Rows by name, each with the paper's row that it stands for."""
    differ = {ours: theirs for ours, theirs in names.items() if ours != theirs}
    return Part(title, tuple(row(name) for name in names), {n: figures[theirs] for n, theirs in names.items()}, differ)


WHICH_TITLE, RANKS_TITLE = "Table 5: which matrices, one budget", "Table 6: which rank"


# -- laptop -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Laptop:
    """What all rows share.  A run computes `steps` x `batch` x `length` + `held_out` x `length` places."""

    model: str = "SmolLM2-135M-Instruct.Q4_1.gguf"
    data: str = "movie_reviews"
    steps: int = 40
    batch: int = 12
    length: int = 32
    held_out: int = 400
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    clip: float = 1.0
    alpha: float = 8.0


@functools.lru_cache(maxsize=1)
def laptop_step(forward: Forward, s: Laptop) -> tuple[optax.GradientTransformation, Step]:
    """One step for all runs: only another row's shapes compile it again."""
    tx = optax.adamw(optax.cosine_decay_schedule(s.learning_rate, s.steps), weight_decay=s.weight_decay)
    return tx, training.make_step(forward, tx, sentiment.answer_loss, clip=s.clip)


def run_reviews(task: sentiment.Task, s: Laptop, row: Row, seed: int) -> Outcome:
    model, key = task.model, jax.random.key(seed)
    method = adapter(row, s.alpha, model.config.model_type)
    params, forward = method(key, model.params, model.forward)
    count = pj.count(params)
    tx, step = laptop_step(forward, s)
    state, frozen = training.init_state(params, tx, key)
    batches = sentiment.Batches(task.train, s.batch, s.length, task.answers, seed)
    state, cost = train(step, state, frozen, batches.batch, s.steps)
    begin = time.perf_counter()
    merged = pj.merge(pj.combine(state.trainables, frozen))  # plain arrays: one evaluation program for all rows
    score = sentiment.score(model.forward, merged, task.held_out, s.length, task.answers)
    tokens = sum(len(example.tokens) for example in task.held_out)
    evaluated = Work(tokens, len(task.held_out) * s.length, time.perf_counter() - begin)
    metrics = {"accuracy": 100 * score.accuracy, "loss": score.loss}
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


LAPTOP = Profile(
    parts=(
        part(WHICH_TITLE, WHICH, {"q8": "q8", "v12": "v8", "o8": "o8", "q4-v6": "q4-v4", "q2-k3-v3-o2": "q2-k2-v2-o2"}),
        part(RANKS_TITLE, RANKS, {name: name for name in ("q1-v1", "q8-v8", "q64-v64")}),
    ),
    settings=Laptop(),
    metrics=(Metric("accuracy", "accuracy, %", 1), Metric("loss", "loss, nats", 3)),
    speed=Speed(350, 900, "recorded on two CPU cores"),
    places=lambda s, row: (s.steps * s.batch * s.length, s.held_out * s.length),
    load=sentiment.prepare,
    run=run_reviews,
)


# -- paper ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Paper:
    """Table 11, column E2E; a run of the real data takes 5 x 5,257 steps."""

    model: str = "gpt2-medium"
    data: str = "e2e"
    epochs: int = 5
    batch: int = 8
    longest: int = 512
    learning_rate: float = 2e-4
    warmup: int = 500
    weight_decay: float = 0.01
    epsilon: float = 1e-6
    label_smoothing: float = 0.1
    dropout: float = 0.1
    alpha: float = 32.0
    beams: int = 10
    length_penalty: float = 0.9
    new_tokens: int = 64
    prompts: int = 16  # written at a time
    steps: int | None = None  # by default, what `epochs` make


@dataclasses.dataclass(frozen=True, eq=False)
class E2E:
    model: Model
    train: training.Batches
    valid: training.Batches
    test: dict[str, list[str]]  # sentences by attributes


def load_e2e(s: Paper, source: str | None, folder: str | None) -> E2E:
    pairs = {name: e2e.read(Path(folder or "data/e2e") / f"{name}.txt") for name in ("train", "valid", "test")}
    print("E2E: " + ", ".join(f"{len(found):,} {name} examples" for name, found in pairs.items()) + ", all of them")
    model = models.load("openai-community/gpt2-medium" if source is None else source, remat="none")
    if model.tokenizer is None:
        raise ValueError(f"{source} holds no tokenizer: give the directory of a whole model")
    rows = {name: e2e.rows(pairs[name], model.tokenizer, s.longest) for name in ("train", "valid")}
    batches = {name: training.batches(found, s.batch) for name, found in rows.items()}
    return E2E(model, batches["train"], batches["valid"], e2e.references(pairs["test"]))


def paper_rate(s: Paper, steps: int) -> optax.Schedule:
    """Linear, up over the warm-up and down to 0 at the last step."""
    rise = optax.linear_schedule(0.0, s.learning_rate, s.warmup)
    fall = optax.linear_schedule(s.learning_rate, 0.0, max(steps - s.warmup, 1))
    return optax.join_schedules((rise, fall), (s.warmup,))


def paper_step(forward: Forward, s: Paper, steps: int) -> tuple[optax.GradientTransformation, Step]:
    tx = optax.adamw(paper_rate(s, steps), eps=s.epsilon, weight_decay=s.weight_decay)
    return tx, training.make_step(forward, tx, e2e.label_smoothed(s.label_smoothing))


def run_e2e(task: E2E, s: Paper, row: Row, seed: int) -> Outcome:
    return run_method(task, s, adapter(row, s.alpha, task.model.config.model_type, s.dropout), seed)


def run_method(task: E2E, s: Paper, method: Method, seed: int) -> Outcome:
    model, key = task.model, jax.random.key(seed)
    params, forward = method(key, model.params, model.forward)
    count = pj.count(params)
    steps = s.steps or s.epochs * len(task.train)
    tx, step = paper_step(forward, s, steps)
    state, frozen = training.init_state(params, tx, key)
    state, cost = train(step, state, frozen, dataclasses.replace(task.train, seed=seed).batch, steps)
    begin = time.perf_counter()
    merged = pj.merge(pj.combine(state.trainables, frozen))
    valid = training.evaluate(model.forward, merged, task.valid)
    score, written = write_and_score(task, s, merged)
    tokens = int(task.valid.rows["mask"].sum()) + written
    places = task.valid.rows["tokens"].size + len(task.test) * s.beams * s.new_tokens
    evaluated = Work(tokens, places, time.perf_counter() - begin)
    metrics = {"loss": valid["loss"], "bleu": score}
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


def write_and_score(task: E2E, s: Paper, params: Any) -> tuple[float, int]:
    """BLEU of the sentences that beam search writes for the test set, and how many tokens they have."""
    tokenizer = task.model.tokenizer
    prompts = tokenizer([f"{given}{tokenizer.eos_token}" for given in task.test])["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": s.new_tokens, "beams": s.beams, "length_penalty": s.length_penalty}
    texts, written = write(task.model.forward, params, tokenizer, prompts, s.prompts, **options)
    return e2e.bleu(texts, list(task.test.values())), written


def paper_places(s: Paper, row: Any) -> tuple[int, int]:
    """Of the real data, padded to 128: 42,061 examples to train on, 4,672 to validate, 630 inputs to write about."""
    length = 128
    steps = s.steps or s.epochs * (42_061 // s.batch)
    return steps * s.batch * length, 4_672 * length + 630 * s.beams * s.new_tokens


PAPER = Profile(
    parts=(
        part(WHICH_TITLE, WHICH, {name: name for name in WHICH}),
        part(RANKS_TITLE, {n: f | TABLE_18.get(n, {}) for n, f in RANKS.items()}, {name: name for name in RANKS}),
    ),
    settings=Paper(),
    metrics=(Metric("loss", "validation loss, nats", 3), Metric("bleu", "BLEU", 2)),
    speed=Speed(6_000, 3_000, "assumed of one A100 in fp32, not measured"),
    places=paper_places,
    load=load_e2e,
    run=run_e2e,
)

TABLE = Table(
    "lora_ablation",
    "LoRA: which matrices, and which rank",
    "Hu et al. 2021, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685) v2, Tables 5, 6 and 18",
    {"laptop": LAPTOP, "paper": PAPER},
)
