"""QLoRA: does LoRA on a base in few bits learn what it learns on a whole one?

Paper: Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314, Tables 3 and 4 (section 4).

    python -m experiments.run qlora_formats                      laptop: 12 runs, about 13 minutes on two CPU cores
    python -m experiments.run qlora_formats --profile paper --model FOLDER --data FOLDER
    python -m experiments.tables                                 the table, from the results

laptop   SmolLM2-135M answers movie reviews with one token (`experiments.sentiment`), its weights moved off the grid
         that its package stores them on (`experiments.lattice`), which would favour formats like it.

         lora-fp32          LoRA on the plain base
         lora-int8, lora-fp4, lora-nf4   the same on a base in few bits; scales of FP4 and NF4 in eight bits too

         LoRA is of rank 8 on every linear, at the settings of `lora_ablation` but for 24 steps: one set for all rows,
         tuned for none.  Full fine-tuning, the paper's first row, is in `lora_family`: here it would take half of the
         time of all.
         `bits` are those that a number of the layers' matrices takes, scales included; `base` the bytes of all that
         rests.  What is evaluated is the merged model, in fp32.
paper    LLaMA 7B to 65B on Alpaca, FLAN v2 and OASST1, each with a base in bf16, FP4 and NF4 with double quantisation:
         `experiments.qlora_paper`.

Departures: the plain base is fp32, not bf16, in which a CPU does not compute; no dropout.
"""

import dataclasses
import time
from typing import Any

import jax

import peft_jax as pj
from experiments import lora_ablation, qlora_paper, sentiment
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table, Work, train
from experiments.lattice import off_the_lattice
from peft_jax import Forward, Method, methods, quant, training, trees

FORMATS: dict[str, Any] = {"int8": quant.int8(), "fp4": quant.fp4(), "nf4": quant.nf4()}


@dataclasses.dataclass(frozen=True)
class Row:
    """How the base is stored."""

    base: str

    @property
    def name(self) -> str:
        return f"lora-{self.base}"


@dataclasses.dataclass(frozen=True)
class Settings(lora_ablation.Laptop):
    """What all rows share."""

    steps: int = 24
    rank: int = 8
    select: str = r"(^|\.)\d+\.(?!.*relative_attention_bias$)"  # every matrix of the layers, as it was run


def method_of(s: Settings, row: Row) -> Method:
    if row.base == "fp32":
        return methods.lora(s.rank, s.alpha, s.select)
    return methods.qlora(s.rank, s.alpha, s.select, format=FORMATS[row.base], dropout=0.0)


def load(s: Settings, source: str | None, folder: str | None) -> sentiment.Task:
    task = sentiment.prepare(s, source, folder)
    return dataclasses.replace(task, model=off_the_lattice(task.model, jax.random.key(0), remat="dots"))


def bits(params: Any, s: Settings, forward: Forward) -> float:
    """How many a number of the chosen matrices takes at rest."""
    chosen = trees.select(s.select, pj.strip(params), forward)
    found = [leaf for path, leaf in trees.leaves(pj.strip(params)).items() if path in chosen]
    stored, numbers = sum(pj.count(w).bytes for w in found), sum(sum(pj.count(w)[:2]) for w in found)
    return 8 * stored / numbers


def run(task: sentiment.Task, s: Settings, row: Row, seed: int) -> Outcome:
    model, key = task.model, jax.random.key(seed)
    params = method_of(s, row).init(key, model.params, model.forward)
    count, resting = pj.count(params), pj.count(pj.partition(params)[1]).bytes
    tx, step = lora_ablation.laptop_step(model.forward, s)  # no row's method wraps the forward function: one for all
    each = bits(params, s, model.forward)
    state, frozen = training.init_state(params, tx, key)
    batches = sentiment.Batches(task.train, s.batch, s.length, task.answers, seed)
    state, cost = train(step, state, frozen, batches.batch, s.steps)
    begin = time.perf_counter()
    merged = quant.dequantise(pj.merge(pj.combine(state.trainables, frozen)))  # one evaluation program for all rows
    score = sentiment.score(model.forward, merged, task.held_out, s.length, task.answers)
    tokens = sum(len(example.tokens) for example in task.held_out)
    evaluated = Work(tokens, len(task.held_out) * s.length, time.perf_counter() - begin)
    metrics = {"accuracy": 100 * score.accuracy, "loss": score.loss, "bits": each, "base": resting / 1e6}
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


# -- what the paper prints ---------------------------------------------------------------------------------------------

GLUE, MMLU = "RoBERTa-large: GLUE (Table 3)", "LLaMA 7B-65B: MMLU, mean (Table 4)"
FIGURES = {
    "lora-fp32": {GLUE: 88.8, MMLU: 53.0},
    "lora-fp4": {GLUE: 88.6, MMLU: 52.2},
    "lora-nf4": {MMLU: 53.1},
}
ROWS = (Row("fp32"), Row("int8"), Row("fp4"), Row("nf4"))

LAPTOP = Profile(
    parts=(Part("Fine-tuning on bases in few bits", ROWS, FIGURES, {"lora-fp32": "BF16"}),),
    settings=Settings(),
    metrics=(
        Metric("accuracy", "accuracy, %", 1),
        Metric("loss", "loss, nats", 3),
        Metric("bits", "bits a weight", 3),
        Metric("base", "base, MB", 0),
    ),
    speed=Speed(190, 950, "from processor time, on two CPU cores"),
    places=lambda s, row: (s.steps * s.batch * s.length, s.held_out * s.length),
    load=load,
    run=run,
)

TABLE = Table(
    "qlora_formats",
    "QLoRA: fine-tuning on bases in few bits",
    "Dettmers et al. 2023, [arXiv 2305.14314](https://arxiv.org/abs/2305.14314), Tables 3 and 4",
    {"laptop": LAPTOP, "paper": qlora_paper.PAPER},
)
