"""Perplexity of a model whose layers are stored in few bits: formats beside each other, and GPTQ.

Paper: Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314, Table 2: mean perplexity on Pile-CC of OPT,
BLOOM, LLaMA and Pythia from 125M to 13B, in four bits and blocks of 64.

    make data-tables                                  what it reads
    python -m experiments.run quant_perplexity        laptop: 87 runs
    python -m experiments.run quant_perplexity --profile paper --model PATH --data FILE
    python -m experiments.tables                      the tables, from the results

laptop   SmolLM2-135M on the Brown corpus: the first 256 tokens of each of 16 texts that no run calibrates on.  Its file
         stores it on a grid of four bits, so it is first taken off that grid (`experiments.lattice`: the same logits);
         seeds vary the rotation, and the 12 stretches of 256 tokens, of other texts, on which GPTQ is calibrated.
         Three rows repeat the model as the file has it.  Every matrix of the layers is stored in few bits; the
         embedding, the head and the norms are not.  Perplexity is computed in fp32 from what the stored numbers mean.

         fp32, bf16     the weights as they are; rounded to bf16
         int8           a scale an output
         int4, e2m1, e3m0   the paper's other types: absmax of blocks of 64 in fp32, and 15 integers; two bits of
                        exponent and one of mantissa; three bits of exponent.  Their bits are arithmetic, the others'
                        are counted
         fp4            bitsandbytes', an e2m1 whose smallest step is finer
         nf4, nf4-dq    without and with double quantisation
         g4, g3, g2     asymmetric, groups of 64 inputs, step and zero point in fp16
         gptq4, gptq3, gptq2   the same storage, rounded by GPTQ in two passes, half of the layers each

         MiniLM's own fp32 weights were never in few bits: the same formats, by how far sentence features turn (one
         minus the cosine to the model's own, times 1,000) on 64 sentences of the corpus, which the seeds draw.
paper    A Llama model on a JSONL file of ``text`` (Pile-CC), 2,048 tokens a row, as it is.  Not run: the weights and
         the corpus are in no package; OPT, BLOOM and Pythia are no families of this library.

Departures: one model of 135M parameters; the paper's mean is over many, up to 13B, and over another corpus.
"""

import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import peft_jax as pj
from experiments import corpora, lattice
from experiments.data import smollm2
from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table, Work
from peft_jax import Forward, Inputs, models, quant, trees
from peft_jax.core import Params
from peft_jax.models.loading import Model
from peft_jax.quant.method import Format
from peft_jax.quant.requantise import error_of

BLOCK = 64
CODEBOOKS = {
    "int4": np.arange(-7, 8) / 7,
    "e2m1": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6,
    "e3m0": np.array([0, *(2.0**-i for i in range(7))]),
}
STORED: dict[str, Format] = {
    "int8": quant.int8(),
    "fp4": quant.fp4(BLOCK, double=False),
    "nf4": quant.nf4(BLOCK, double=False),
    "nf4-dq": quant.nf4(BLOCK),
    **{f"g{bits}": quant.grouped(bits, BLOCK, jnp.float16) for bits in (4, 3, 2)},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A format, and of which weights: SmolLM2's "turned" or as "given", or "minilm"'s."""

    format: str
    weights: str = "turned"

    @property
    def name(self) -> str:
        return self.format if self.weights == "turned" else f"{self.weights}-{self.format}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all rows share."""

    model: str = "SmolLM2-135M-Instruct.Q4_1.gguf"
    data: str = "the Brown corpus"
    length: int = 256
    texts: int = 16  # whose beginnings are evaluated
    calibration: int = 12  # stretches
    passes: int = 2
    batch: int = 4
    sentences: int = 64  # of MiniLM's rows


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The model and its untied forward function; rows to evaluate, and rows to draw calibration from; MiniLM."""

    model: Model
    forward: Forward
    held_out: np.ndarray
    others: np.ndarray
    encoder: Model | None = None
    sentences: tuple[str, ...] = ()


# -- texts ------------------------------------------------------------------------------------------------------------


def plain(words: list[str]) -> str:
    """Words as they were written: Brown's signs stand apart.

    >>> from experiments.quant_perplexity import plain
    >>> plain("`` But tell me , doctor '' ? ? Alex asked .".split())
    '"But tell me, doctor"? Alex asked.'
    """
    text = re.sub(r"([?!;:]) \1", r"\1", " ".join(words))
    text = re.sub(r"`` ?", '"', re.sub(r" ?''", '"', text))
    return re.sub(r"([(\[]) | (?=[.,;:?!)\]])", r"\1", text)


def stretches(texts: list[str], tokenizer: Any, length: int) -> np.ndarray:
    """The first ``length + 1`` tokens of each text that has so many."""
    encoded = tokenizer(texts)["input_ids"]
    return np.array([tokens[: length + 1] for tokens in encoded if len(tokens) > length], np.int32)


def load(s: Settings, source: str | None, folder: str | None) -> Task:
    if folder is not None:
        raise ValueError("the laptop profile reads the corpus that `make data-tables` fetches: leave --data out")
    model = models.load(smollm2() if source is None else source, remat="none")
    texts = [" ".join(plain(sentence.words) for sentence in text) for text in corpora.brown()]
    held_out = stretches(texts[::10], model.tokenizer, s.length)[: s.texts]
    others = stretches([t for i, t in enumerate(texts) if i % 10], model.tokenizer, s.length)
    short = [plain(sentence.words) for text in corpora.brown() for sentence in text if len(sentence.words) > 4]
    forward = lattice.off_the_lattice(model, jax.random.key(0), remat="none").forward
    return Task(model, forward, held_out, others, models.load(corpora.minilm(), remat="none"), tuple(short))


# -- storing ----------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    params: Params  # plain arrays
    bits: float  # a number of the matrices of the layers
    error: float  # ‖Ŵ − W‖ / ‖W‖ of all of them


def store(name: str, params: Params, forward: Forward, batches: Callable[[], list[Any]], passes: int) -> Stored:
    """The model's layers in a format, as the numbers that they then stand for."""
    found = trees.select(trees.LAYER_MATRICES, params, forward)
    plain = {path: leaf for path, leaf in trees.leaves(params).items() if path in found}
    key, bits = jax.random.key(0), 32.0
    new = params
    if name == "bf16" or name in CODEBOOKS:
        bits, each = (16.0, _bf16) if name == "bf16" else (4 + 32 / BLOCK, functools.partial(_coded, name))
        new = trees.map_leaves(lambda path, leaf: each(leaf) if path in found else leaf, params)
    elif name != "fp32":
        if name.startswith("gptq"):
            method = quant.gptq(batches(), int(name[4:]), BLOCK, block_size=BLOCK, dtype=jnp.float16, passes=passes)
        else:
            method = quant.quantise(STORED[name])
        small = method.init(key, params, forward)
        leaves = {path: leaf for path, leaf in trees.leaves(small).items() if path in found}
        bits = (
            8 * sum(pj.count(leaf).bytes for leaf in leaves.values()) / sum(math.prod(w.shape) for w in plain.values())
        )
        new = quant.dequantise(small)
    now = trees.leaves(new)
    sizes = [(np.asarray(error_of(now[path], w)), np.linalg.norm(w, axis=(-2, -1))) for path, w in plain.items()]
    lost, whole = sum(((e * n) ** 2).sum() for e, n in sizes), sum((n**2).sum() for _, n in sizes)
    return Stored(new, bits, float(np.sqrt(lost / whole)))


@jax.jit
def _bf16(w: Array) -> Array:
    return w.astype(jnp.bfloat16).astype(w.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _coded(name: str, w: Array) -> Array:
    """The nearest number of the type in each block of inputs, whose largest has size 1."""
    table = np.unique(np.concatenate([CODEBOOKS[name], -CODEBOOKS[name]])).astype(np.float32)
    blocks = w.reshape(*w.shape[:-2], -1, BLOCK, w.shape[-1])
    absmax = jnp.abs(blocks).max(-2, keepdims=True)
    codes = jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), blocks / jnp.where(absmax > 0, absmax, 1))
    return (jnp.asarray(table)[codes] * absmax).reshape(w.shape)


# -- runs -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=3)
def turned(task: Task, seed: int) -> Params:
    return lattice.off_the_lattice(task.model, jax.random.key(seed)).params


def given(model: Model) -> Params:
    """The weights as they are, and the head apart."""
    head = {"kernel": model.params["model"]["embed_tokens"]["embedding"].T}
    return {"lm_head": head} | model.params


@functools.partial(jax.jit, static_argnums=0)
def nats(forward: Forward, params: Params, rows: Array) -> Array:
    """Cross entropy of the rows' tokens but the first, in all."""
    logits = forward(params, rows[:, :-1])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], -1).sum()


def perplexity(forward: Forward, params: Params, rows: np.ndarray, batch: int) -> float:
    """exp of the mean over all tokens; what fills the last batch is not counted."""
    whole = len(rows) // batch * batch
    parts = [rows[i : i + batch] for i in range(0, whole, batch)] + [row[None] for row in rows[whole:]]
    return math.exp(sum(float(nats(forward, params, part)) for part in parts) / (rows.shape[0] * (rows.shape[1] - 1)))


def run(task: Task, s: Settings, row: Row, seed: int) -> Outcome:
    random = np.random.default_rng(seed)
    if row.weights == "minilm":
        return run_minilm(task, s, row, random)
    params = turned(task, seed) if row.weights == "turned" else given(task.model)
    chosen = task.others[random.permutation(len(task.others))[: s.calibration], :-1]
    batches = [chosen[i : i + s.batch] for i in range(0, len(chosen), s.batch)]
    begin = time.perf_counter()
    stored = jax.block_until_ready(store(row.format, params, task.forward, lambda: batches, s.passes))
    middle = time.perf_counter()
    metrics = {"perplexity": perplexity(task.forward, stored.params, task.held_out, s.batch), "bits": stored.bits}
    return outcome(metrics | {"error": 100 * stored.error}, params, places(s, row), begin, middle)


def outcome(metrics: dict[str, float], params: Params, cost: tuple[int, int], begin: float, middle: float) -> Outcome:
    end = time.perf_counter()
    measured, evaluated = cost
    works = Work(measured, measured, middle - begin), Work(evaluated, evaluated, end - middle)
    return Outcome(metrics, 0, pj.count(params).frozen, *works)


def run_minilm(task: Task, s: Settings, row: Row, random: np.random.Generator) -> Outcome:
    assert task.encoder is not None
    encoder = task.encoder
    order = random.permutation(len(task.sentences))
    inputs = [
        as_inputs(encoder.tokenizer([task.sentences[i] for i in part]))
        for part in np.split(order[: 2 * s.sentences], 2)
    ]
    begin = time.perf_counter()
    stored = jax.block_until_ready(store(row.format, encoder.params, encoder.forward, lambda: [inputs[0]], s.passes))
    middle = time.perf_counter()
    ours, theirs = (features(encoder.forward, p, inputs[1]) for p in (stored.params, encoder.params))
    metrics = {"turn": 1000 * float((1 - (ours * theirs).sum(-1)).mean()), "bits": stored.bits}
    return outcome(metrics | {"error": 100 * stored.error}, encoder.params, places(s, row), begin, middle)


def as_inputs(encoded: Any, length: int = 64) -> Inputs:
    tokens, mask = np.zeros((2, len(encoded["input_ids"]), length), np.int32)
    for row, ids in enumerate(encoded["input_ids"]):
        tokens[row, : len(ids[:length])], mask[row, : len(ids[:length])] = ids[:length], 1
    return Inputs(jnp.asarray(tokens), jnp.asarray(mask > 0))


@functools.partial(jax.jit, static_argnums=0)
def features(forward: Forward, params: Params, inputs: Inputs) -> Array:
    """Means over a sentence's tokens, of length 1, as the model is used."""
    found = jnp.where(inputs.mask[..., None], forward(params, inputs), 0).sum(1)
    return found / jnp.linalg.norm(found, axis=-1, keepdims=True)


def places(s: Any, row: Row) -> tuple[int, int]:
    if row.weights == "minilm":
        return s.sentences * 64 * (s.passes if row.format.startswith("gptq") else 0), s.sentences * 64
    return s.calibration * s.length * (s.passes if row.format.startswith("gptq") else 0), s.texts * s.length


# -- what the paper prints --------------------------------------------------------------------------------------------

PILE = "Pile-CC, mean perplexity"
FIGURES = {"int4": {PILE: 34.34}, "e2m1": {PILE: 31.07}, "e3m0": {PILE: 29.48}, "nf4-dq": {PILE: 27.41}}
FORMATS = ("fp32", "bf16", "int8", "int4", "e2m1", "e3m0", "fp4", "nf4", "nf4-dq", "g4", "g3", "g2")
GPTQ = ("gptq4", "gptq3", "gptq2")
PERPLEXITY = (Metric("perplexity", "perplexity", 2), Metric("bits", "bits a weight", 3))
ERROR = Metric("error", "weights' error, %", 2)

LAPTOP = Profile(
    parts=(
        Part("Table 2: types, off the grid", tuple(Row(name) for name in (*FORMATS, *GPTQ)), FIGURES),
        Part("The model as its file has it", tuple(Row(n, "given") for n in ("fp32", "nf4-dq", "g4")), {}),
        Part(
            "MiniLM's own weights",
            tuple(Row(name, "minilm") for name in ("int8", *FORMATS[3:11], "gptq4", "gptq3")),
            {},
            metrics=(Metric("turn", "1 − cosine, ‰", 2), Metric("bits", "bits a weight", 3), ERROR),
        ),
    ),
    settings=Settings(),
    metrics=(*PERPLEXITY, ERROR),
    speed=Speed(400, 900, "assumed of two CPU cores"),
    places=places,
    load=load,
    run=run,
)


def load_paper(s: Settings, source: str | None, folder: str | None) -> Task:
    model = models.load("huggyllama/llama-7b" if source is None else source)
    if model.config.tie_word_embeddings:
        raise ValueError("the paper profile takes Llama models with a head of their own")
    lines = Path(folder or "data/pile_cc.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    rows = stretches(texts, model.tokenizer, s.length)
    if len(rows) < s.texts + s.calibration:
        needed = f"{s.texts + s.calibration} of {s.length + 1} tokens"
        raise ValueError(f"the file has {len(rows)} texts that are long enough, and {needed} are needed")
    return Task(model, model.forward, rows[: s.texts], rows[s.texts :])


PAPER = Profile(
    parts=(
        Part(
            "Table 2: types",
            tuple(Row(name, "given") for name in (*FORMATS, *GPTQ)),
            {f"given-{name}": figures for name, figures in FIGURES.items()},
        ),
    ),
    settings=Settings("llama-7b", "pile_cc.jsonl", length=2_048, texts=1_000, calibration=128, passes=32, batch=1),
    metrics=(*PERPLEXITY, ERROR),
    speed=Speed(4_000, 4_000, "assumed of one A100, not measured"),
    places=places,
    load=load_paper,
    run=run,
    seeds=(0,),
)

TABLE = Table(
    "quant_perplexity",
    "Formats of few bits: perplexity",
    "Dettmers et al. 2023, [arXiv 2305.14314](https://arxiv.org/abs/2305.14314), Table 2",
    {"laptop": LAPTOP, "paper": PAPER},
)
