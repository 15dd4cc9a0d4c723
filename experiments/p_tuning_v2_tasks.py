"""P-tuning v2 beside full fine-tuning and prompt tuning, on classification, tagging and extractive question answering.

Paper: Liu et al. 2021, "P-Tuning v2", https://arxiv.org/abs/2110.07602, Tables 2 and 3, on models of 335M parameters
and more.  There deep prompts equal full fine-tuning on all tasks and scales, and shallow ones fall behind where models
are small and, at any size, on tagging and answers.  One small model is measured here, so the claims about scale are not
tested, and its tasks are not the paper's but for SQuAD.

    make data-tables                                     what the laptop profile reads
    python -m experiments.run p_tuning_v2_tasks          laptop: 75 runs, about 25 minutes on two CPU cores
    python -m experiments.tables                         the tables, from the results

laptop   all-MiniLM-L6-v2 (BERT, 6 layers, width 384) on the tasks of `experiments.encoder_tasks`, the same rows in
         every run, each seen once.  Five ways of tuning; beside each trains a new head, on [CLS] behind the model's own
         pooler, on tokens, or on starts and ends.

         full          every weight
         frozen        the head alone
         prompt        16 soft tokens before [CLS], begun as words of the vocabulary
         p_tuning_v2   16 rows of keys and values in every layer, begun as N(0, 1), with dropout 0.1
         lora          rank 8 on queries and values: as many numbers as p_tuning_v2

         Adam, linear decay to 0, gradient norm clipped at 1, as in the paper's code; 16 is its length for SQuAD.  One
         rate for each way on all tasks, where the paper searches one for each task: of three, the one with the best
         mean of accuracy or F1 on reviews, brown and squad, one seed, on rows that are not held out (full: 1e-4, 3e-4,
         1e-3; lora: 1e-3, 3e-3, 1e-2; the others: 1e-2, 3e-2, 1e-1).  Nothing else was tuned, and nothing to a printed
         number.  A run is 40 to 64 steps, where most of the paper's are thousands.  Seeds vary the head, the start of
         what is tuned, the order of the data and the dropout.
paper    `experiments.p_tuning_v2_paper`.

Departures: the model's own dropout is not applied, nor any before the head.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import optax

import peft_jax as pj
from experiments import corpora, encoder_tasks, selection
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table, Work, train
from experiments.p_tuning_v2_data import scores
from experiments.p_tuning_v2_paper import PAPER
from peft_jax import Forward, Method, methods, models, training
from peft_jax.models.loading import Model
from peft_jax.training.step import Step

LOSSES = {"classification": training.classification, "tokens": training.next_token, "answers": training.answers}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of `encoder_tasks`: `steps` batches of rows of `length` tokens, and so many rows held out."""

    name: str
    head: str
    length: int
    batch: int
    steps: int
    held_out: int


@dataclasses.dataclass(frozen=True)
class Way:
    """What is tuned beside the head: `size` soft tokens, rows of a prefix, or the rank."""

    name: str
    rate: float
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    task: Task
    way: Way

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.way.name}"


@dataclasses.dataclass(frozen=True)
class Laptop:
    """What all rows share."""

    model: str = "all-MiniLM-L6-v2"
    data: str = "movie_reviews, Reuters R8, 20 Newsgroups, the Brown corpus and SQuAD 1.1"
    clip: float = 1.0
    dropout: float = 0.1  # of the deep prompts
    evaluated: int = 40  # rows at a time
    words: tuple[int, int] = (1996, 6996)  # the vocabulary's most common: before them are signs and unused entries


@dataclasses.dataclass(frozen=True, eq=False)
class Tasks:
    """A model's directory, and the tasks with their models, without parameters (each run reads its own), and rows."""

    source: Any
    models: dict[Task, Model]
    data: dict[Task, encoder_tasks.Data]


def read(source: Any, task: Task, labels: int, seed: int) -> Model:
    choices = None if task.head == "answers" else labels
    return models.load(source, remat="none", head=task.head, labels=choices, key=jax.random.key(seed))


def load(s: Any, source: str | None, folder: str | None, tasks: tuple[Task, ...] | None = None) -> Tasks:
    if folder is not None:
        raise ValueError("the laptop profile reads the data that `make data-tables` fetches: leave --data out")
    place = corpora.minilm() if source is None else source
    tokenizer = models.load(place).tokenizer
    found = Tasks(place, {}, {})
    for task in TASKS if tasks is None else tasks:
        rows = encoder_tasks.prepare(task.name, tokenizer, task.length, task.steps * task.batch, task.held_out)
        print(f"{task.name}: {rows}, {task.length} tokens each, the same for every run")
        found.data[task] = rows
        found.models[task] = dataclasses.replace(read(place, task, rows.labels, 0), params=None)
    return found


def places(s: Laptop, row: Row) -> tuple[int, int]:
    """Soft tokens are computed as others are; a prefix is keys and values alone."""
    task = row.task
    length = task.length + (row.way.size if row.way.name == "prompt" else 0)
    return task.steps * task.batch * length, task.held_out * length


def method_of(way: Way, s: Laptop, model_type: str) -> Method:
    """What is done to the model beside its head."""
    if way.name == "full":
        return methods.unfreeze(rf"^{model_type}\.", keep_base=False)
    if way.name == "prompt":
        return methods.prompt_tuning(way.size, common=range(*s.words))
    if way.name == "p_tuning_v2":
        return methods.p_tuning_v2(way.size, dropout=s.dropout)
    if way.name == "lora":
        return methods.lora(way.size, way.size, r"\.(query|value)$")
    return pj.chain()


@functools.lru_cache(maxsize=1)
def stepping(model: Model, row: Row, s: Laptop) -> tuple[Method, Forward, optax.GradientTransformation, Step]:
    """What a row's seeds share: they compile once."""
    method, task = method_of(row.way, s, model.config.model_type), row.task
    forward = method.wrap(model.forward)
    tx = optax.adam(optax.linear_schedule(row.way.rate, 0.0, task.steps))
    return method, forward, tx, training.make_step(forward, tx, LOSSES[task.head], clip=s.clip)


def run(tasks: Tasks, s: Laptop, row: Row, seed: int) -> Outcome:
    task, data, model, key = row.task, tasks.data[row.task], tasks.models[row.task], jax.random.key(seed)
    method, forward, tx, step = stepping(model, row, s)
    params = method.init(key, read(tasks.source, task, data.labels, seed).params, model.forward)
    count = pj.count(params)
    state, frozen = training.init_state(params, tx, key)
    del params  # the state holds what trains
    state, cost = train(step, state, frozen, training.batches(data.train, task.batch, seed).batch, task.steps)
    cost = cost._replace(places=places(s, row)[0])  # the prompt's are computed too
    params = pj.combine(state.trainables, frozen)
    if row.way.name not in ("prompt", "p_tuning_v2"):  # plain arrays: one evaluation program for all such rows
        params, forward = pj.merge(params), model.forward
    begin = time.perf_counter()
    metrics = data.measure(selection.over(scores, forward, params, data.held_out, s.evaluated))
    evaluated = Work(int(data.held_out["mask"].sum()), places(s, row)[1], time.perf_counter() - begin)
    return Outcome(metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


TASKS = (
    Task("reviews", "classification", length=32, batch=16, steps=64, held_out=480),
    Task("r8", "classification", length=64, batch=16, steps=40, held_out=320),
    Task("news", "classification", length=64, batch=16, steps=48, held_out=320),
    Task("brown", "tokens", length=32, batch=16, steps=64, held_out=400),
    Task("squad", "answers", length=128, batch=8, steps=64, held_out=256),
)
WAYS = (
    Way("full", 3e-4),
    Way("frozen", 3e-2),
    Way("prompt", 1e-2, 16),
    Way("p_tuning_v2", 3e-2, 16),
    Way("lora", 3e-3, 8),
)

# -- the paper's figures: of RTE and CoNLL03 as others cite them, of SQuAD as the authors' README prints them ----------

RTE = {
    "full": {"RTE, BERT-large, %": 70.4, "RTE, RoBERTa-large, %": 86.6},
    "prompt": {"RTE, BERT-large, %": 53.5, "RTE, RoBERTa-large, %": 58.8},
    "p_tuning_v2": {"RTE, BERT-large, %": 78.3, "RTE, RoBERTa-large, %": 89.5},
}
CONLL03 = {
    "full": {"CoNLL03, RoBERTa-large, F1": 92.6},
    "prompt": {"CoNLL03, RoBERTa-large, F1": 86.1},
    "p_tuning_v2": {"CoNLL03, RoBERTa-large, F1": 92.8},
}
SQUAD = {"p_tuning_v2": {"SQuAD 1.1, RoBERTa-large, EM": 88.1, "SQuAD 1.1, RoBERTa-large, F1": 94.2}}

ACCURACY = (Metric("accuracy", "accuracy, %", 1), Metric("loss", "loss, nats", 3))
ANSWERS = (Metric("exact_match", "exact match, %", 1), Metric("f1", "F1, %", 1), Metric("loss", "loss, nats", 3))
TITLES = {
    "reviews": ("Sentiment of movie reviews", RTE, ACCURACY),
    "r8": ("Topics: Reuters R8", {}, ACCURACY),
    "news": ("Topics: 20 Newsgroups", {}, ACCURACY),
    "brown": ("Parts of speech: the Brown corpus, 12 classes", CONLL03, ACCURACY),
    "squad": ("Answers: SQuAD 1.1", SQUAD, ANSWERS),
}


def part(task: Task) -> Part:
    title, figures, metrics = TITLES[task.name]
    rows = tuple(Row(task, way) for way in WAYS)
    return Part(title, rows, {f"{task.name}-{way}": found for way, found in figures.items()}, metrics=metrics)


LAPTOP = Profile(
    parts=tuple(part(task) for task in TASKS),
    settings=Laptop(),
    metrics=ACCURACY,
    speed=Speed(3_000, 8_000, "recorded on two CPU cores"),
    places=places,
    load=load,
    run=run,
)

TABLE = Table(
    "p_tuning_v2_tasks",
    "P-tuning v2: ways of tuning, by task",
    "Liu et al. 2021, [arXiv 2110.07602](https://arxiv.org/abs/2110.07602), Tables 2 and 3, as others cite them, "
    "and SQuAD as the authors' README prints it",
    {"laptop": LAPTOP, "paper": PAPER},
)
