"""QLoRA's own runs: LLaMA on instructions, with the base in bf16, FP4 and NF4, measured on MMLU.

Paper: Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314, Table 4 and section 5.

    python -m experiments.run qlora_formats --profile paper --model FOLDER --data FOLDER [--only llama-7b-alpaca-nf4]

FOLDER of --model holds llama-7b, llama-13b, llama-33b and llama-65b, Hugging Face directories; that of --data holds
alpaca.json, flan_v2.json and oasst1.json (lists of ``instruction``, ``input`` and ``output``, as Alpaca's own file:
`experiments.alpaca`) and mmlu (`experiments.mmlu`).  Appendix B.2 and table 9: rank 64 on every linear, α 16, dropout
0.1 up to 13B and 0.05 above; AdamW, β₂ 0.999, 2e-4 up to 13B and 1e-4 above, constant after a warm-up of 3%, gradient
norm clipped at 0.3; batch 16, 10,000 steps for FLAN v2 and 1,875 else; rows of 512 tokens; states paged.  MMLU is
5-shot, on the test set.

Not run.  Guanaco's 99.3% of ChatGPT's performance is GPT-4's judgement, of an outside model: it is not reproduced.
Hours are computed, not measured: a step of 16 x 512 places costs LLaMA 7B 8,192 x 6 x 6.7G operations (forward,
recomputed, backward to the inputs), 2.7 s at 40% of an A100's 312 TFLOP/s; 1,875 steps are 1.4 hours, at 65B 14.

Departures: the paper trains OASST1 on whole dialogues, turn by turn; here an example is one answer with what it
answers.  Its examples are grouped by length, here they are not.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import peft_jax as pj
from experiments import alpaca, mmlu
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Work, train
from peft_jax import Method, methods, models, quant, training, trees

SIZES = {"llama-7b": 7, "llama-13b": 13, "llama-33b": 33, "llama-65b": 65}
DATA = ("alpaca", "flan_v2", "oasst1")
FORMATS: dict[str, Any] = {"fp4": quant.fp4(), "nf4": quant.nf4()}
STEPS = {"flan_v2": 10_000}


@dataclasses.dataclass(frozen=True)
class Row:
    size: str
    examples: str
    base: str

    @property
    def name(self) -> str:
        return f"{self.size}-{self.examples}-{self.base}"

    @property
    def large(self) -> bool:
        return SIZES[self.size] > 13


@dataclasses.dataclass(frozen=True)
class Paper:
    """What all rows share."""

    model: str = "llama"
    data: str = "qlora"
    rank: int = 64
    alpha: float = 16.0
    batch: int = 16
    micro: int = 1
    length: int = 512
    clip: float = 0.3
    beta2: float = 0.999
    warmup: float = 0.03
    dtype: str = "bfloat16"
    longest: int = 2048
    evaluated: int = 4  # prompts at a time
    questions: int | None = None  # by default, all
    steps: int | None = None  # by default, the paper's


class Task(NamedTuple):
    models: Path
    data: Path


def load(s: Paper, source: str | None, folder: str | None) -> Task:
    """Only looks: rows read the model that they need."""
    found = Task(Path(source or "data/llama"), Path(folder or "data/qlora"))
    for path in found:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not there: give the folders of models and data with --model and --data")
    return found


def method_of(s: Paper, row: Row) -> Method:
    options: dict[str, Any] = {"dropout": 0.05 if row.large else 0.1}
    if row.base == "bf16":
        return methods.lora(s.rank, s.alpha, trees.LAYER_MATRICES, **options)
    return methods.qlora(s.rank, s.alpha, format=FORMATS[row.base], **options)


def optimiser(s: Paper, row: Row, steps: int) -> optax.GradientTransformation:
    rate = 1e-4 if row.large else 2e-4
    risen = optax.linear_schedule(0.0, rate, max(round(s.warmup * steps), 1))
    return training.page(optax.adamw(risen, b2=s.beta2, weight_decay=0.0))


def run(task: Task, s: Paper, row: Row, seed: int) -> Outcome:
    model = models.load(task.models / row.size, dtype=jnp.dtype(s.dtype), remat="full")
    if model.tokenizer is None:
        raise ValueError(f"{task.models / row.size} holds no tokenizer: give the directory of a whole model")
    examples = alpaca.read(task.data / f"{row.examples}.json")
    rows = training.batches(alpaca.rows(examples, model.tokenizer, s.length), s.batch, seed=seed)
    params, forward = method_of(s, row)(jax.random.key(seed), model.params, model.forward)
    tokenizer = model.tokenizer
    del model  # the whole weights of what is stored in few bits
    count, steps = pj.count(params), s.steps or STEPS.get(row.examples, 1_875)
    tx = optimiser(s, row, steps)
    step = training.make_step(forward, tx, clip=s.clip, accumulate=s.batch // s.micro)
    state, frozen = training.init_state(params, tx, jax.random.key(seed))
    del params
    state, cost = train(step, state, frozen, rows.batch, steps)
    begin = time.perf_counter()
    questions = mmlu.read(task.data / "mmlu", "test")[: s.questions]
    given = mmlu.prompts(questions, mmlu.read(task.data / "mmlu", "dev"), tokenizer, s.longest)
    trained = pj.combine(state.trainables, frozen)
    found = mmlu.score(forward, trained, questions, given, mmlu.letters(tokenizer), s.evaluated)
    tokens = sum(map(len, given))
    evaluated = Work(tokens, tokens, time.perf_counter() - begin)
    resting = pj.count(frozen).bytes / 1e9
    metrics = {"accuracy": 100 * found.accuracy, "base": resting}
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


def places(s: Paper, row: Row) -> tuple[int, int]:
    """Of 14,042 questions of some 700 tokens."""
    return (s.steps or STEPS.get(row.examples, 1_875)) * s.batch * s.length, (s.questions or 14_042) * 700


ROWS = tuple(Row(size, examples, base) for size in SIZES for examples in DATA for base in ("bf16", "fp4", "nf4"))

PAPER = Profile(
    parts=(Part("LLaMA on instructions: MMLU, 5-shot (the paper's means: BF16 53.0, FP4 52.2, NF4 53.1)", ROWS, {}),),
    settings=Paper(),
    metrics=(Metric("accuracy", "MMLU, %", 1), Metric("base", "base, GB", 1)),
    speed=Speed(3_000, 9_000, "assumed of LLaMA 7B on one A100, not measured"),
    places=places,
    load=load,
    run=run,
    seeds=(0,),
)
