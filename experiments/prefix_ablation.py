"""Prefix tuning: how long a prefix is, where it stands, and how few examples it needs.

Paper: Li & Liang 2021, "Prefix-Tuning", https://arxiv.org/abs/2101.00190, Figure 4 (length), Table 4 (embedding-only
and infix) and section 6.3 (low data), on GPT-2 medium and E2E NLG; code XiangLi1999/PrefixTuning.

    make data-tables                                     what the laptop profile reads
    python -m experiments.run prefix_ablation            laptop: 48 runs, about 35 minutes on two CPU cores
    python -m experiments.run prefix_ablation --profile paper [--model PATH] --data PATH
                                                         paper: `experiments.prefix_paper`
    python -m experiments.tables                         the tables, from the results

laptop   SmolLM2-135M writes a sentence from a restaurant's attributes (`experiments.restaurants`, which says what is
         scored).  Prefixes and infixes are the output of an MLP of width 512, as the paper's; an infix stands before
         the line break that parts the attributes from the sentence, as the paper's before its separator.  "embedding"
         is soft tokens before the text, which start as words of the vocabulary (`methods.prompt_tuning`).  Beside
         them: full fine-tuning, LoRA at rank 8 on queries and values, and the untrained model, with four examples in
         its context and with none.
         Every trained row takes the same steps, of 240 examples once; "on-50" and "on-200" repeat the first of them.
         AdamW, linear decay to 0, no weight decay, gradient norm clipped at 1.  One learning rate a method: of rates
         about three times apart, the best by the loss of one run on attributes that are neither trained on nor held
         out: prefixes and infixes 1e-3 (of 3e-4 to 1e-2), soft tokens 3e-2 (of 1e-2 to 1e-1), full fine-tuning 3e-4 (of
         3e-5 to 1e-3), LoRA 1e-2 (of 1e-3 to 1e-2).
         Seeds vary the starts, the order of the data and the examples shown.
"""

import dataclasses
import functools
import time

import jax
import numpy as np
import optax

import peft_jax as pj
from experiments import restaurants
from experiments.harness import Outcome, Part, Profile, Speed, Table, Work, train
from experiments.prefix_paper import PAPER
from peft_jax import Forward, Method, methods, training
from peft_jax.training.step import Step


@dataclasses.dataclass(frozen=True)
class Row:
    """What is trained, and on how much.

    kind     "prefix", "infix", "embedding", "lora", "full", or "shots" (examples in the context, nothing trained)
    length   rows of a prefix or infix, soft tokens, the rank, or how many examples are shown
    on       how many examples are trained on; 0 for all
    """

    kind: str
    length: int = 0
    on: int = 0

    @property
    def name(self) -> str:
        return self.kind + (f"-{self.length}" if self.kind != "full" else "") + (f"-on-{self.on}" if self.on else "")


@dataclasses.dataclass(frozen=True)
class Laptop(restaurants.Laptop):
    """What all rows share."""

    hidden: int = 512
    prefix_rate: float = 1e-3
    embedding_rate: float = 3e-2
    lora_rate: float = 1e-2
    full_rate: float = 3e-4

    def rate(self, kind: str) -> float:
        rates = {"lora": self.lora_rate, "full": self.full_rate, "embedding": self.embedding_rate}
        return rates.get(kind, self.prefix_rate)


def places(s: Laptop, row: Row) -> tuple[int, int]:
    soft = row.length if row.kind == "embedding" else 0
    trained = 0 if row.kind == "shots" else s.steps * s.batch * (s.length + soft)
    return trained, s.sentences * (s.length + soft) + s.held_out * (s.prompt + soft + s.new_tokens)


def method_of(s: Laptop, kind: str, length: int) -> Method:
    """What a trained row does to the model."""
    if kind == "full":
        return methods.unfreeze("", keep_base=False)
    if kind == "lora":
        return methods.lora(length, length)
    if kind == "embedding":
        return methods.prompt_tuning(length)
    return methods.prefix_tuning(length, hidden=s.hidden)


def shots(task: restaurants.Task, count: int, seed: int) -> Method:
    """So many of the training examples in the context, each behind an empty line."""
    drawn = np.random.default_rng(seed).permutation(len(task.train))[:count]
    (end,) = task.model.tokenizer(restaurants.END)["input_ids"]
    shown = [token for i in drawn for token in [*task.train[i].tokens, end]]
    return methods.prefix_tuning(len(shown), hidden=None, text=shown)


@functools.lru_cache(maxsize=1)
def compiled(forward: Forward, s: Laptop, kind: str, length: int) -> tuple[Forward, optax.GradientTransformation, Step]:
    """The adapted model and its step, which the seeds of a row share: only other shapes compile it again."""
    adapted = method_of(s, kind, length).wrap(forward)
    tx = optax.adamw(optax.linear_schedule(s.rate(kind), 0.0, s.steps), weight_decay=0.0)
    return adapted, tx, training.make_step(adapted, tx, clip=s.clip)


def run(task: restaurants.Task, s: Laptop, row: Row, seed: int) -> Outcome:
    model, key, cost = task.model, jax.random.key(seed), Work(0, 0)
    params, forward, infix = model.params, model.forward, row.kind == "infix"
    count = pj.count(params)
    if row.kind == "shots":
        if row.length:
            params, forward = shots(task, row.length, seed)(key, params, forward)
    else:
        params = method_of(s, row.kind, row.length).init(key, params, forward)
        count = pj.count(params)
        forward, tx, step = compiled(forward, s, row.kind, row.length)
        examples = restaurants.rows(task.train[: row.on or None], s.length, infix)
        state, frozen = training.init_state(params, tx, key)
        params = None  # what is trained whole lies in the state alone
        state, cost = train(step, state, frozen, training.batches(examples, s.batch, seed).batch, s.steps)
        cost = cost._replace(places=places(s, row)[0])  # soft tokens are computed too
        params = pj.combine(state.trainables, frozen)
    begin = time.perf_counter()
    if row.kind in ("prefix", "infix"):
        params = methods.bake(params)
    if row.kind in ("lora", "full"):  # plain arrays: one program to evaluate them and the model as it is
        params, forward = pj.merge(params), model.forward
    score = restaurants.score(forward, params, s, model.tokenizer, task.held_out, infix)
    evaluated = Work(score.tokens, places(s, row)[1], time.perf_counter() - begin)
    return Outcome(score.metrics, count.trainable, count.trainable + count.frozen, cost, evaluated)


BLEU = "GPT-2 M on E2E: BLEU"


def part(title: str, rows: tuple[Row, ...], bleu: dict[str, float]) -> Part:
    """Rows, and what the paper prints for some of them."""
    figures = {row.name: {BLEU: bleu[row.name]} if row.name in bleu else {} for row in rows}
    return Part(title, rows, figures if bleu else {})


LAPTOP = Profile(
    parts=(
        part("Figure 4: how long it is", tuple(Row("prefix", length) for length in (1, 5, 10, 20)), {}),
        part(
            "Table 4: before the text, before its last token, and as soft tokens",
            tuple(Row(kind, length) for kind in ("prefix", "infix", "embedding") for length in (1, 10)),
            {"prefix-10": 69.7, "infix-1": 67.9, "infix-10": 67.2, "embedding-1": 48.1, "embedding-10": 62.2},
        ),
        part(
            "Section 6.3: few examples",
            tuple(Row(kind, length, on) for on in (50, 200) for kind, length in (("prefix", 10), ("full", 0))),
            {},
        ),
        part(
            "Beside it: full fine-tuning, LoRA, k examples in the context",
            (Row("full"), Row("lora", 8), Row("shots", 4), Row("shots", 0)),
            {"full": 68.2},
        ),
    ),
    settings=Laptop(),
    metrics=restaurants.METRICS,
    speed=Speed(350, 900, "recorded on two CPU cores"),
    places=places,
    load=restaurants.prepare,
    run=run,
)

TABLE = Table(
    "prefix_ablation",
    "Prefix tuning: length, place, and few examples",
    "Li & Liang 2021, [arXiv 2101.00190](https://arxiv.org/abs/2101.00190) v1, Tables 1, 2 and 4, WebNLG and DART as "
    "microsoft/LoRA's README quotes them; its Figures 3 and 4 print curves and no numbers",
    {"laptop": LAPTOP, "paper": PAPER},
)
