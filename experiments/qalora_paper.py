"""QA-LoRA's own runs: LLaMA on instructions, on bases that GPTQ has rounded, measured on MMLU and on common sense.

Paper: Xu et al. 2023, "QA-LoRA", https://arxiv.org/abs/2309.14717, section 4.

    python -m experiments.run qalora_merge --profile paper --model FOLDER --data FOLDER [--only llama-7b-alpaca-4]

The folders are those of `experiments.qlora_paper` (llama-7b and so on; alpaca.json, flan_v2.json, mmlu), that of --data
with a folder commonsense beside them (`experiments.commonsense`).  Rank 64 on every linear, α 16, groups of 32; AdamW,
a constant rate, gradient norm clipped at 0.3, batch 16, 10,000 steps on Alpaca and 20,000 on FLAN v2.  The rate is the
paper's: 2e-5 up to 13B and 1e-5 above, pooling by the sum.  The row -code has the authors' code's: 2e-4, pooling by the
mean.  GPTQ is calibrated on the first 128 examples.  What is measured is the merged model.

Not run.  Hours are computed as in `experiments.qlora_paper`: 10,000 steps at 7B are 7.5 hours on an A100.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peft_jax as pj
from experiments import alpaca, commonsense, mmlu, qlora_paper
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Work, train
from experiments.qlora_paper import Task
from peft_jax import methods, models, quant, training

STEPS = {"alpaca": 10_000, "flan_v2": 20_000}


@dataclasses.dataclass(frozen=True)
class Row:
    """`code`: at the rate and with the pooling of the authors' code, not the paper's."""

    size: str
    examples: str
    bits: int
    code: bool = False

    @property
    def name(self) -> str:
        return f"{self.size}-{self.examples}-{self.bits}{'-code' if self.code else ''}"

    @property
    def rate(self) -> float:
        return 2e-4 if self.code else 1e-5 if qlora_paper.SIZES[self.size] > 13 else 2e-5


@dataclasses.dataclass(frozen=True)
class Paper(qlora_paper.Paper):
    """What all rows share."""

    group_size: int = 32
    calibration: int = 128


def method_of(s: Paper, row: Row) -> pj.Method:
    pooling = "mean" if row.code else "sum"
    return methods.qalora(s.rank, s.alpha, group_size=s.group_size, pooling=pooling)


def run(task: Task, s: Paper, row: Row, seed: int) -> Outcome:
    model = models.load(task.models / row.size, dtype=jnp.dtype(s.dtype), remat="full")
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{task.models / row.size} holds no tokenizer: give the directory of a whole model")
    rows = alpaca.rows(alpaca.read(task.data / f"{row.examples}.json"), tokenizer, s.length)
    batches = training.batches(rows, s.batch, seed=seed)
    given = [batches.batch(index) for index in range(-(-s.calibration // s.batch))]
    base = quant.gptq(given, row.bits, s.group_size).init(jax.random.key(0), model.params, model.forward)
    params, forward = method_of(s, row)(jax.random.key(seed), base, model.forward)
    plain = model.forward
    del model, base  # the whole weights
    count, steps = pj.count(params), s.steps or STEPS[row.examples]
    tx = optax.adamw(row.rate, b2=s.beta2, weight_decay=0.0)
    step = training.make_step(forward, tx, clip=s.clip, accumulate=s.batch // s.micro)
    state, frozen = training.init_state(params, tx, jax.random.key(seed))
    del params
    state, cost = train(step, state, frozen, batches.batch, steps)
    begin = time.perf_counter()
    merged = pj.merge(pj.combine(state.trainables, frozen))
    questions = mmlu.read(task.data / "mmlu", "test")[: s.questions]
    asked = mmlu.prompts(questions, mmlu.read(task.data / "mmlu", "dev"), tokenizer, s.longest)
    found = mmlu.score(plain, merged, questions, asked, mmlu.letters(tokenizer), s.evaluated)
    metrics, each = {"accuracy": 100 * found.accuracy}, []
    for name in commonsense.TASKS:
        those = commonsense.read(task.data / "commonsense", name)[: s.questions]
        each.append(commonsense.score(plain, merged, those, tokenizer, s.longest, s.evaluated).accuracy)
        metrics[name] = 100 * each[-1]
    metrics["commonsense"] = 100 * float(np.mean(each))
    tokens = sum(map(len, asked))
    evaluated = Work(tokens, tokens, time.perf_counter() - begin)
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


def places(s: Paper, row: Row) -> tuple[int, int]:
    """Of 14,042 questions of some 700 tokens; common sense apart."""
    return (s.steps or STEPS[row.examples]) * s.batch * s.length, (s.questions or 14_042) * 700


MMLU = "MMLU 5-shot, %"
PRINTED = {4: 39.4, 3: 37.4, 2: 27.5}
FIGURES = {f"llama-7b-alpaca-{bits}": {MMLU: x} for bits, x in PRINTED.items()}
ROWS = tuple(Row(size, examples, bits) for size in qlora_paper.SIZES for examples in STEPS for bits in PRINTED)

PAPER = Profile(
    parts=(Part("LLaMA on instructions, in few bits", (*ROWS, Row("llama-7b", "alpaca", 4, code=True)), FIGURES),),
    settings=Paper(),
    metrics=(Metric("accuracy", "MMLU, %", 1), Metric("commonsense", "common sense, %", 1)),
    speed=Speed(3_000, 9_000, "computed of one A100 at 7B, not measured"),
    places=places,
    load=qlora_paper.load,
    run=run,
    seeds=(0,),
)
