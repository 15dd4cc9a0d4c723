"""P-tuning v2 on the paper's tasks: RoBERTa-large on SuperGLUE, named entities and SQuAD.

Paper: Liu et al. 2021, "P-Tuning v2", https://arxiv.org/abs/2110.07602; code and results THUDM/P-tuning-v2.

    python -m experiments.run p_tuning_v2_tasks --profile paper --data PATH [--model PATH] [--only rte-p_tuning_v2]

--data takes a folder that holds, for the tasks that are run: ``superglue`` with the official folders (BoolQ, COPA, RTE,
WiC, WSC), ``CoNLL03``, ``CoNLL04`` and ``ontoNotes`` as the authors pack them, and ``squad`` with the official files.
--model takes RoBERTa-large or another encoder of the families here, without a head.

Ten tasks, three rows each.

p_tuning_v2   learning rate, length, epochs and batch of the authors' run_script/*_roberta.sh, at every task; Adam,
              gradient norm clipped at 1; the rate falls to 0 linearly on SuperGLUE, and to 95% with every epoch on the
              others (training/trainer_exp.py); dropout 0.1 on the prompt, 0.2 on SQuAD's.
prompt        a prompt before the words alone (Lester et al. 2021), with the same numbers: the authors' code has none
              for it.  It starts from the vocabulary.
full          all of the model: rate 1e-5, 10 epochs (SQuAD 3), 6% of warm-up and linear decay, the task's batch.  Here
              too the authors' code has none; these are within what RoBERTa's paper tries (Liu et al. 2019, appendix).

A head is new in each run and trains with it.  After every epoch the development set is evaluated, and the best epoch
counts, as in the authors' training/trainer_base.py: on SuperGLUE and SQuAD what is reported is that very score, on
named entities F1 on the test set.  "Wholly right" is accuracy, the share of sentences with no wrong entity, or exact
match.

Expected of P-tuning v2: what the authors' README prints for RoBERTa-large (one seed), beside the measures.  The column
"paper, as cited" is known here from what others cite of the paper's tables.

Hours are computed, not measured: places x 4 x 302M operations (6 where all of the model trains) at 45% of an A100's
19.5 TFLOP/s in fp32: a run takes from minutes (WSC) to 45 hours (a prompt on OntoNotes), one seed of all about 260.

Departures: the model's own dropout is not applied, and neither is any before the head; heads are RoBERTa's own (two
linears, where the authors keep the pretrained pooler and train one) and for COPA the first of its two scores is a
choice's; positions and the embeddings' norm act on a prompt and on words once (in the authors' code, on words twice);
leftover examples of an epoch are left out of it; CB, MultiRC and ReCoRD are left out (the authors have no script for
them), and so is semantic role labelling.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import optax

import peft_jax as pj
from experiments import selection
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Work
from experiments.p_tuning_v2_data import DEV, READERS, SIZES, Sources
from peft_jax import Method, methods, models, training, trees
from peft_jax.weights import Unfrozen

METHODS = ("full", "prompt", "p_tuning_v2")


@dataclasses.dataclass(frozen=True)
class Row:
    """A task, what is trained, and how."""

    task: str
    method: str
    rate: float
    length: int  # of the prompt
    epochs: int
    batch: int
    dropout: float = 0.1

    @property
    def name(self) -> str:
        return f"{self.task}-{self.method}"


@dataclasses.dataclass(frozen=True)
class Paper:
    """What all rows share."""

    model: str = "roberta-large"
    data: str = "p_tuning_v2"
    pair: int = 128  # tokens of a text or a pair of them
    sentence: int = 256  # tokens of a sentence at most
    window: int = 384
    stride: int = 128
    clip: float = 1.0
    epsilon: float = 1e-8
    decay: float = 0.95  # an epoch, on named entities and SQuAD
    warmup: float = 0.06  # of all steps, where all of the model trains
    evaluated: int = 32  # rows at a time
    steps: int | None = None  # by default, what the epochs make


# By task: rate, length, epochs and batch of P-tuning v2, and the epochs of full fine-tuning.
NUMBERS: dict[str, tuple[float, int, int, int, int]] = {
    "boolq": (7e-3, 8, 100, 32, 10),
    "copa": (9e-3, 8, 120, 16, 10),
    "rte": (5e-3, 128, 100, 32, 10),
    "wic": (1e-2, 8, 50, 32, 10),
    "wsc": (1e-2, 8, 10, 16, 10),
    "conll03": (3e-2, 11, 30, 16, 10),
    "conll04": (6e-2, 144, 80, 32, 10),
    "ontonotes": (7e-3, 48, 60, 16, 10),
    "squad1.1": (5e-3, 16, 30, 8, 3),
    "squad2.0": (5e-3, 8, 10, 8, 3),
}


def rows(task: str) -> tuple[Row, ...]:
    """A task's three rows."""
    rate, length, epochs, batch, full = NUMBERS[task]
    dropout = 0.2 if task.startswith("squad") else 0.1
    return (
        Row(task, "full", 1e-5, 0, full, batch, 0.0),
        Row(task, "prompt", rate, length, epochs, batch, 0.0),
        Row(task, "p_tuning_v2", rate, length, epochs, batch, dropout),
    )


# -- figures ----------------------------------------------------------------------------------------------------------

README, EXACT, PAPER_FIGURE = "authors' README", "authors' README: exact match", "paper, as cited"

FIGURES: dict[str, dict[str, float]] = {
    "boolq-p_tuning_v2": {README: 84.0},
    "copa-p_tuning_v2": {README: 92.0},
    "rte-full": {PAPER_FIGURE: 86.6},
    "rte-prompt": {PAPER_FIGURE: 58.8},
    "rte-p_tuning_v2": {README: 86.6, PAPER_FIGURE: 89.5},
    "wic-p_tuning_v2": {README: 73.7},
    "wsc-p_tuning_v2": {README: 64.4},
    "conll03-full": {PAPER_FIGURE: 92.6},
    "conll03-prompt": {PAPER_FIGURE: 86.1},
    "conll03-p_tuning_v2": {README: 91.8, PAPER_FIGURE: 92.8},
    "conll04-p_tuning_v2": {README: 88.4},
    "ontonotes-p_tuning_v2": {README: 90.1},
    "squad1.1-p_tuning_v2": {README: 94.2, EXACT: 88.1},
    "squad2.0-p_tuning_v2": {README: 84.7, EXACT: 81.3},
}


def part(title: str, *tasks: str) -> Part:
    found = tuple(row for task in tasks for row in rows(task))
    return Part(title, found, {row.name: FIGURES.get(row.name, {}) for row in found})


# -- runs -------------------------------------------------------------------------------------------------------------


def load(s: Paper, source: str | None, folder: str | None) -> Sources:
    """Where model and data are: each run reads its own task's, and the model with that task's head."""
    path = Path(folder or "data/p_tuning_v2")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there: give the folder of superglue, CoNLL03 and so on with --data")
    return Sources(source or "FacebookAI/roberta-large", path)


def method_of(row: Row) -> Method:
    if row.method == "full":
        return methods.unfreeze(r"^(?!classifier|qa_outputs)", keep_base=False)  # a new head trains anyway
    if row.method == "prompt":
        return methods.prompt_tuning(row.length)
    return methods.p_tuning_v2(row.length, dropout=row.dropout)


def schedule(s: Paper, row: Row, steps: int, epoch: int) -> optax.Schedule:
    """The learning rate: `steps` in all, `epoch` of them an epoch."""
    if row.method == "full":
        rise = max(round(s.warmup * steps), 1)
        parts = optax.linear_schedule(0.0, row.rate, rise), optax.linear_schedule(row.rate, 0.0, max(steps - rise, 1))
        return optax.join_schedules(parts, (rise,))
    if READERS[row.task].epochs:
        return optax.exponential_decay(row.rate, epoch, s.decay, staircase=True)
    return optax.linear_schedule(row.rate, 0.0, steps)


def run(task: Sources, s: Paper, row: Row, seed: int) -> Outcome:
    reading = READERS[row.task].read(s, task.folder, row.task)
    key = jax.random.key(seed)
    model = models.load(task.model, head=reading.head, labels=reading.labels, key=key, remat="dots")
    if model.tokenizer is None:
        raise ValueError(f"{task.model} holds no tokenizer: give the directory of a whole model")
    if not any(isinstance(weight, Unfrozen) for weight in trees.weights(model.params)):
        raise ValueError(f"{task.model} has a head of its own: give a pretrained model, whose head is then new")
    data = reading.encode(model.tokenizer)
    params, forward = method_of(row)(key, model.params, model.forward)
    count = pj.count(params)
    batches = training.batches(data.train, row.batch, seed)
    epoch = len(batches)
    steps = s.steps or row.epochs * epoch
    tx = optax.adam(schedule(s, row, steps, epoch), eps=s.epsilon)
    step = training.make_step(forward, tx, data.loss, clip=s.clip)
    state, frozen = training.init_state(params, tx, key)
    del model, params  # where all of it trains, the state holds it

    def measured(params: Any, name: str) -> dict[str, float]:
        found, judge = data.sets[name]
        return judge(selection.over(data.measure, forward, params, found, s.evaluated))

    best = selection.keep_best(step, state, frozen, batches.batch, steps, epoch, lambda p: measured(p, DEV)["score"])
    begin = time.perf_counter()
    metrics = measured(best.params, data.reported) | {"epoch": best.step / epoch}
    seconds = best.seconds + time.perf_counter() - begin
    soft = row.length if row.method == "prompt" else 0
    read = [(data.sets[name][0], times) for name, times in ((DEV, best.evaluations), (data.reported, 1))]
    evaluated = Work(
        sum(times * int(found["mask"].sum()) for found, times in read),
        sum(times * _places(found, soft) for found, times in read),
        seconds,
    )
    per_row = _places(data.train, soft) // len(data.train["tokens"])
    cost = best.train._replace(places=steps * row.batch * per_row)
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


def _places(found: Any, soft: int) -> int:
    """Of all rows, what stands before them included."""
    tokens = found["tokens"]
    return tokens.size + soft * (tokens.size // tokens.shape[-1])


def places(s: Paper, row: Row) -> tuple[int, int]:
    """Of the real data: see `p_tuning_v2_data.SIZES`."""
    size = SIZES[row.task]
    length = (row.length if row.method == "prompt" else 0) + (size.length or getattr(s, READERS[row.task].length))
    steps = s.steps or row.epochs * (size.train // row.batch)
    evaluations = -(-steps // (size.train // row.batch))
    return steps * row.batch * length * size.choices, (evaluations * size.dev + size.reported) * length * size.choices


PAPER = Profile(
    parts=(
        part("SuperGLUE: accuracy on the development set", "boolq", "copa", "rte", "wic", "wsc"),
        part("Named entities: F1 on the test set", "conll03", "conll04", "ontonotes"),
        part("SQuAD: F1 on the development set", "squad1.1", "squad2.0"),
    ),
    settings=Paper(),
    metrics=(
        Metric("score", "accuracy or F1, %", 1),
        Metric("exact", "wholly right, %", 1),
        Metric("epoch", "best epoch", 0),
    ),
    speed=Speed(7_300, 14_500, "assumed of one A100 in fp32, not measured"),
    places=places,
    load=load,
    run=run,
)
