"""The paper's own runs of prefix tuning: GPT-2 medium writes texts from tables, BART-large summaries of articles.

Profile `paper` of `experiments.prefix_ablation`, which says how to run it.

    --data    a folder with e2e_data/, webnlg_challenge_2017/ and dart/, as data/ of XiangLi1999/PrefixTuning has them
              (`experiments.table_to_text`), and xsum/ (`experiments.summaries`)
    --model   a folder with gpt2-medium/ and bart-large/; by default both come from the Hub

Hyperparameters are the paper's for prefixes (appendix A): AdamW, a rate that falls linearly to 0, no weight decay, no
label smoothing; by data set the rate, epochs, batch and length of 8e-5, 5, 10, 5 (E2E), 5e-5, 5, 5, 5 (WebNLG), 5e-5,
10, 5, 10 (DART) and 5e-5, 30, 14, 100 (XSum); an MLP of width 512, for XSum 800.  Gradients are clipped at 1, as the
code's trainers do.  Beams: 5 for tables; 6 for XSum, with the length penalty 0.8, articles cut to 512 tokens and
summaries to 60.  Full fine-tuning and the top two layers (with the last norm and the embeddings, as the code has it)
train at the code's default of 5e-5 for the same epochs and batches.

Rows of Table 4 (E2E): an infix stands before the token that parts the table from its text.  BLEU is that of the E2E
challenge's script for all tables, in any case; ROUGE-L is rouge-score's (`experiments.scores`).

Hours a run are computed, not measured: about 1.2 (E2E), 1.4 (WebNLG), 15 (DART) and 160 (XSum) for a prefix, at
4 x 355M or 4 x 406M operations a place and 45% of an A100's 19.5 TFLOP/s in fp32; half as much again for full
fine-tuning.  Rows are padded to the longest example; XSum's places are its articles'.

Departures: the paper's embedding-only rows are the output of an MLP too, and share the rate; ours are soft tokens
themselves (`methods.prompt_tuning`), at a rate of 1e-2.  The paper names no length for its XSum prefix of 0.1% of the
parameters; 5 rows are that share.  XSum's fine-tuned figure is BART's own paper's, another recipe's.  The code's loss
for prefixes sums over a text's tokens, ours is the mean over all of a batch.  The code forbids two blank tokens to
GPT-2 and asks BART for 11 tokens at least; here both may write what they like.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import optax

import peft_jax as pj
from experiments import e2e, scores, summaries, table_to_text
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Work, train
from experiments.writing import write
from peft_jax import Forward, Method, methods, models, training
from peft_jax.models.loading import Model
from peft_jax.training.step import Step


@dataclasses.dataclass(frozen=True)
class Row:
    """A data set, what is trained on it, and how.

    kind     "prefix", "infix", "embedding", "full" or "top"
    length   rows of a prefix or infix, soft tokens, or top layers
    """

    data: str
    kind: str
    length: int
    rate: float
    epochs: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.kind}" + (f"-{self.length}" if self.length else "")


@dataclasses.dataclass(frozen=True)
class Paper:
    """What all rows share."""

    model: str = "gpt2-medium and bart-large"
    data: str = "e2e, webnlg, dart and xsum"
    hidden: int = 512
    hidden_xsum: int = 800
    clip: float = 1.0
    longest: int = 512  # places of a table and its text, or of an article
    summary: int = 60
    beams: int = 5
    beams_xsum: int = 6
    length_penalty_xsum: float = 0.8
    new_tokens: int = 100
    size: int = 16  # texts written at a time
    steps: int | None = None  # by default, what the row's epochs make


@dataclasses.dataclass(frozen=True, eq=False)
class Sources:
    """Where models and data are; nothing is read before a row needs it."""

    models: Path | None
    data: Path

    def model(self, data: str) -> str | Path:
        hub, name = ("facebook", "bart-large") if data == "xsum" else ("openai-community", "gpt2-medium")
        return f"{hub}/{name}" if self.models is None else self.models / name


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A model and one data set; `prompts` are what a text is written after, `references` what it is compared with."""

    model: Model
    train: training.Batches
    valid: training.Batches
    prompts: list[list[int]]
    references: list[list[str]]


def load(s: Paper, source: str | None, folder: str | None) -> Sources:
    return Sources(None if source is None else Path(source), Path(folder or "data"))


@functools.lru_cache(maxsize=1)
def task_of(sources: Sources, s: Paper, data: str, batch: int) -> Task:
    model = models.load(sources.model(data), remat="none")
    tokenizer, parts = model.tokenizer, ("train", "valid", "test")
    if tokenizer is None:
        raise ValueError(f"{sources.model(data)} holds no tokenizer: give the directory of a whole model")
    if data == "xsum":
        pairs = {part: summaries.read(sources.data / data, part) for part in parts}
        start, longest = model.forward.spec.start[0], (s.longest, s.summary)
        rows = {part: summaries.rows(pairs[part], tokenizer, start, longest) for part in parts[:2]}
        prompts = summaries.sources([article for article, _ in pairs["test"]], tokenizer, s.longest)
        references = [[summary] for _, summary in pairs["test"]]
    else:
        pairs = {part: table_to_text.read(sources.data, data, part) for part in parts}
        rows = {part: e2e.rows(pairs[part], tokenizer, s.longest, long="cut") for part in parts[:2]}
        test = e2e.references(pairs["test"])
        prompts = list(tokenizer([f"{given}{tokenizer.eos_token}" for given in test])["input_ids"])
        references = list(test.values())
    print(f"{data}: " + ", ".join(f"{len(pairs[part]):,} {part} examples" for part in parts) + ", all of them")
    batches = {part: training.batches(rows[part], batch) for part in parts[:2]}
    return Task(model, batches["train"], batches["valid"], prompts, references)


def method_of(s: Paper, row: Row, layers: int) -> Method:
    """What a row trains of a model with so many layers."""
    if row.kind == "full":
        return methods.unfreeze("", keep_base=False)
    if row.kind == "top":
        top = "|".join(str(layers - 1 - i) for i in range(row.length))
        return methods.unfreeze(rf"\.h\.({top})\.|\.ln_f|\.wte", keep_base=False)
    if row.kind == "embedding":
        return methods.prompt_tuning(row.length)
    return methods.prefix_tuning(row.length, hidden=s.hidden_xsum if row.data == "xsum" else s.hidden)


def step_of(forward: Forward, s: Paper, row: Row, steps: int) -> tuple[optax.GradientTransformation, Step]:
    tx = optax.adamw(optax.linear_schedule(row.rate, 0.0, steps), weight_decay=0.0)
    return tx, training.make_step(forward, tx, clip=s.clip)


def run(sources: Sources, s: Paper, row: Row, seed: int) -> Outcome:
    task, key, infix = task_of(sources, s, row.data, row.batch), jax.random.key(seed), row.kind == "infix"
    model, tokenizer = task.model, task.model.tokenizer
    params, forward = method_of(s, row, model.forward.spec.layers)(key, model.params, model.forward)
    count = pj.count(params)
    given, valid = (
        dataclasses.replace(part, rows=e2e.infixed(part.rows)) if infix else part for part in (task.train, task.valid)
    )
    steps = s.steps or row.epochs * len(given)
    tx, step = step_of(forward, s, row, steps)
    state, frozen = training.init_state(params, tx, key)
    params = None  # what is trained whole lies in the state alone
    state, cost = train(step, state, frozen, dataclasses.replace(given, seed=seed).batch, steps)
    begin = time.perf_counter()
    params = pj.combine(state.trainables, frozen)
    if row.kind in ("prefix", "infix"):
        params = methods.bake(params)
    loss = training.evaluate(forward, params, valid)["loss"]
    texts, written = write(forward, params, tokenizer, task.prompts, s.size, infix=infix, **search(s, row))
    metrics = {"rouge": scores.rouge_l(texts, task.references), "loss": loss}
    if row.data != "xsum":
        metrics["bleu"] = e2e.bleu(texts, task.references)
    tokens = int(valid.rows["mask"].sum()) + sum(map(len, task.prompts)) + written
    options = search(s, row)
    places = valid.rows["tokens"].size + len(task.prompts) * options["beams"] * options["max_new_tokens"]
    evaluated = Work(tokens, places, time.perf_counter() - begin)
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


def search(s: Paper, row: Row) -> dict[str, Any]:
    """How a row's texts are written."""
    if row.data == "xsum":
        return {"beams": s.beams_xsum, "length_penalty": s.length_penalty_xsum, "max_new_tokens": s.summary}
    return {"beams": s.beams, "max_new_tokens": s.new_tokens}


# Training and validation examples and inputs to write about, and the places of a row, as far as they are known before
# the files are read: tables have about 100 tokens with their texts at most (WebNLG and DART a few times that).
SIZES = {
    "e2e": (42_061, 4_672, 630, 128),
    "webnlg": (18_025, 2_258, 1_862, 352),
    "dart": (62_659, 6_980, 5_097, 512),
    "xsum": (204_045, 11_332, 11_334, 512),
}


def places(s: Paper, row: Row) -> tuple[int, int]:
    examples, valid, inputs, length = SIZES[row.data]
    steps, options = s.steps or row.epochs * (examples // row.batch), search(s, row)
    return steps * row.batch * length, valid * length + inputs * options["beams"] * options["max_new_tokens"]


def rows(data: str, *kinds: tuple[str, int]) -> tuple[Row, ...]:
    """Rows of a data set, each with its hyperparameters."""
    rate, epochs, batch = {"e2e": (8e-5, 5, 10), "webnlg": (5e-5, 5, 5), "dart": (5e-5, 10, 5), "xsum": (5e-5, 30, 14)}[
        data
    ]
    rates = {"prefix": rate, "infix": rate, "embedding": 1e-2, "full": 5e-5, "top": 5e-5}
    return tuple(Row(data, kind, length, rates[kind], epochs, batch) for kind, length in kinds)


def part(
    title: str, heading: str, found: tuple[Row, ...], printed: dict[str, float], metrics: tuple[Metric, ...] = ()
) -> Part:
    figures = {row.name: {heading: printed[row.name]} if row.name in printed else {} for row in found}
    return Part(title, found, figures, metrics=metrics)


MEASURED = (Metric("rouge", "ROUGE-L", 2), Metric("loss", "validation loss, nats", 3))


PAPER = Profile(
    parts=(
        part(
            "Table 1: tables to texts, GPT-2 medium",
            "BLEU, printed",
            (
                *rows("e2e", ("full", 0), ("top", 2), ("prefix", 5)),
                *rows("webnlg", ("full", 0), ("prefix", 5)),
                *rows("dart", ("full", 0), ("prefix", 10)),
            ),
            {
                "e2e-full": 68.2,
                "e2e-top-2": 68.1,
                "e2e-prefix-5": 69.7,
                "webnlg-full": 47.6,
                "webnlg-prefix-5": 54.4,
                "dart-full": 46.0,
                "dart-prefix-10": 45.7,
            },
        ),
        part(
            "Table 4: where it stands, E2E",
            "BLEU, printed",
            rows("e2e", *((kind, length) for kind in ("prefix", "infix", "embedding") for length in (1, 10, 20))),
            {
                "e2e-embedding-1": 48.1,
                "e2e-embedding-10": 62.2,
                "e2e-embedding-20": 61.9,
                "e2e-infix-1": 67.9,
                "e2e-infix-10": 67.2,
                "e2e-infix-20": 66.7,
            },
        ),
        part(
            "Table 2: summaries, BART-large on XSum",
            "ROUGE-L, printed",
            rows("xsum", ("full", 0), ("prefix", 100), ("prefix", 5)),
            {"xsum-full": 37.25, "xsum-prefix-100": 36.05, "xsum-prefix-5": 35.05},
            MEASURED,
        ),
    ),
    settings=Paper(),
    metrics=(Metric("bleu", "BLEU", 1), *MEASURED),
    speed=Speed(6_000, 3_000, "assumed of one A100 in fp32, not measured"),
    places=places,
    load=load,
    run=run,
)
