"""QA-LoRA: what is left of fine-tuning once the model is in few bits again?

Paper: Xu et al. 2023, "QA-LoRA", https://arxiv.org/abs/2309.14717, Table 1 (LLaMA-7B on Alpaca, MMLU 5-shot).

    python -m experiments.run qalora_merge                       laptop: 27 runs, 12 of which train
    python -m experiments.tables                                 the table, from the results

laptop   SmolLM2-135M answers movie reviews with one token (`experiments.sentiment`), its weights moved off the grid
         that its package stores them on (`experiments.lattice`), which would favour formats like it.

         qlora-rtn4, -rtn3, -rtn2     LoRA on a base in NF4, merged into plain arrays, rounded to the nearest of 4, 3
                                      and 2 bits in groups of 32
         qlora-gptq4, -gptq3, -gptq2  the same, rounded by GPTQ
         qalora-4, -3, -2             QA-LoRA on a base that GPTQ has rounded to so many bits; merged into its zero
                                      points, which changes nothing

         `before` is measured with the adapter, `after` once the model is in few bits without one.  Rank 8 on every
         linear, the settings of `lora_ablation` but for 12 steps and 200 reviews held out: one set for all rows, tuned
         for none.  GPTQ is calibrated on 64 reviews to train on, in one pass.  The rows of QLoRA that share a seed
         share one training.  QA-LoRA pools by the mean, as the authors' code does, whose rate is QLoRA's.

paper    LLaMA 7B to 65B on Alpaca and FLAN v2, MMLU and common sense: `experiments.qalora_paper`.

The paper prints the average accuracy on MMLU: 34.6 for LLaMA-7B as it is, 38.4 for QLoRA before it is quantised.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax

import peft_jax as pj
from experiments import lora_ablation, qalora_paper, qlora_formats, sentiment
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table, Work, train
from peft_jax import Method, methods, quant, training, trees
from peft_jax.core import Params
from peft_jax.weights import materialise


@dataclasses.dataclass(frozen=True)
class Row:
    """`rounding` is how QLoRA's merged model is brought to so many bits, '' for QA-LoRA, which is in them."""

    bits: int
    rounding: str = ""

    @property
    def name(self) -> str:
        return f"qlora-{self.rounding}{self.bits}" if self.rounding else f"qalora-{self.bits}"


@dataclasses.dataclass(frozen=True)
class Settings(qlora_formats.Settings):
    """What all rows share."""

    steps: int = 12
    held_out: int = 200
    group_size: int = 32
    pooling: str = "mean"
    calibration: int = 64  # reviews


def rounding(task: sentiment.Task, s: Settings, how: str, bits: int) -> Method:
    """Brings every linear to so many bits."""
    if how == "rtn":
        return quant.quantise(quant.grouped(bits, s.group_size), s.select)
    rows = [task.train[start : start + s.batch] for start in range(0, min(s.calibration, len(task.train)), s.batch)]
    batches = [sentiment.collate(chunk, s.length, task.answers) for chunk in rows]
    given = [pj.Inputs(batch["tokens"], mask=batch["mask"]) for batch in batches]
    return quant.gptq(given, bits, s.group_size, s.select, passes=1)


class Learnt(NamedTuple):
    """A trained tree, its measures with the adapter, and what they cost."""

    params: Params
    score: sentiment.Score
    cost: Work
    count: Any


def whole(params: Params) -> Params:
    """Plain arrays, each leaf as it stands: the base's and its adapter's sum, without merging."""
    return trees.map_leaves(lambda path, leaf: jax.jit(materialise)(leaf), params)


def judged(task: sentiment.Task, s: Settings, params: Params) -> sentiment.Score:
    return sentiment.score(task.model.forward, params, task.held_out, s.length, task.answers)


@functools.lru_cache(maxsize=1)
def rounded(task: sentiment.Task, s: Settings, bits: int) -> Params:
    """QA-LoRA's base, the same for every seed."""
    return rounding(task, s, "gptq", bits).init(jax.random.key(0), task.model.params, task.model.forward)


@functools.lru_cache(maxsize=3)  # QLoRA's, for its seeds
def learn(task: sentiment.Task, s: Settings, bits: int | None, seed: int) -> Learnt:
    """QA-LoRA on a base of so many bits; without them, QLoRA."""
    model, key = task.model, jax.random.key(seed)
    if bits is None:
        method, base = methods.qlora(s.rank, s.alpha, s.select, dropout=0.0), model.params
    else:
        method = methods.qalora(s.rank, s.alpha, s.select, group_size=s.group_size, pooling=s.pooling)
        base = rounded(task, s, bits)
    params = method.init(key, base, model.forward)
    count = pj.count(params)
    tx, step = lora_ablation.laptop_step(model.forward, s)  # neither method wraps the forward function: one for all
    state, frozen = training.init_state(params, tx, key)
    batches = sentiment.Batches(task.train, s.batch, s.length, task.answers, seed)
    state, cost = train(step, state, frozen, batches.batch, s.steps)
    trained = pj.combine(state.trainables, frozen)
    return Learnt(trained, judged(task, s, whole(trained)), cost, count)


def run(task: sentiment.Task, s: Settings, row: Row, seed: int) -> Outcome:
    forward = task.model.forward
    learnt = learn(task, s, None if row.rounding else row.bits, seed)
    begin = time.perf_counter()
    merged = pj.merge(learnt.params)
    if row.rounding:
        merged = rounding(task, s, row.rounding, row.bits).init(jax.random.key(0), whole(merged), forward)
    after = judged(task, s, quant.dequantise(merged))
    tokens = sum(len(example.tokens) for example in task.held_out)
    evaluated = Work(tokens, len(task.held_out) * s.length, time.perf_counter() - begin)
    metrics = {
        "before": 100 * learnt.score.accuracy,
        "after": 100 * after.accuracy,
        "loss_before": learnt.score.loss,
        "loss_after": after.loss,
        "bits": qlora_formats.bits(merged, s, forward),
    }
    return Outcome(metrics, learnt.count.trainable, sum(learnt.count[:2]), learnt.cost, evaluated)


# -- what the paper prints ---------------------------------------------------------------------------------------------

MMLU = "LLaMA-7B on Alpaca: MMLU 5-shot, %"
BITS = (4, 3, 2)
GPTQ, QALORA = (36.0, 34.0, 25.8), (39.4, 37.4, 27.5)
FIGURES = {f"qlora-gptq{n}": {MMLU: x} for n, x in zip(BITS, GPTQ, strict=True)}
FIGURES |= {f"qalora-{n}": {MMLU: x} for n, x in zip(BITS, QALORA, strict=True)}
ROWS = tuple(Row(n, how) for how in ("rtn", "gptq", "") for n in BITS)

LAPTOP = Profile(
    parts=(Part("Fine-tuned, and in few bits", ROWS, FIGURES),),
    settings=Settings(),
    metrics=(
        Metric("before", "accuracy before, %", 1),
        Metric("after", "after, %", 1),
        Metric("loss_before", "loss before, nats", 3),
        Metric("loss_after", "after, nats", 3),
        Metric("bits", "bits a weight", 2),
    ),
    speed=Speed(190, 950, "from processor time, on two CPU cores"),
    # QLoRA's first rows train for the others.
    places=lambda s, row: (s.steps * s.batch * s.length * (row.rounding != "gptq"), s.held_out * s.length),
    load=qlora_formats.load,
    run=run,
)

TABLE = Table(
    "qalora_merge",
    "QA-LoRA: merged without leaving few bits",
    "Xu et al. 2023, [arXiv 2309.14717](https://arxiv.org/abs/2309.14717), Table 1",
    {"laptop": LAPTOP, "paper": qalora_paper.PAPER},
)
