"""How many numbers train: what the papers print, and what the library counts on the same models.

    python -m experiments.tables        writes the table into docs/parameter_counts.md

No weight is made: models are abstract (`jax.eval_shape`) and of their true size, GPT-3 with its 175 billion included.
`count` is the library's own count of a row's method, and the tests hold it to be `exact`.  Where what a paper prints
is not the exact number, neither rounded nor cut off to as many digits, the row says why.
"""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import transformers

import peft_jax as pj
from peft_jax import Forward, Method, Spec, methods, models
from peft_jax.core import Params, Path
from peft_jax.methods.adalora import found as triplets
from peft_jax.models.families import family

# -- models -----------------------------------------------------------------------------------------------------------


def roberta(width: int, layers: int) -> Any:
    return transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        type_vocab_size=1,
    )


def deberta(width: int, layers: int, **options: Any) -> Any:
    """DeBERTa v2 and v3."""
    return transformers.DebertaV2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        **options,
    )


def gpt(width: int, layers: int, heads: int) -> Any:
    """GPT-2 and GPT-3: queries, keys and values are one matrix in the checkpoint, and three here."""
    return transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)


def llama(width: int, inner: int, layers: int, heads: int) -> Any:
    return transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
    )


def t5(width: int, inner: int, layers: int, heads: int, head: int = 64) -> Any:
    """T5 1.1."""
    return transformers.T5Config(
        vocab_size=32128,
        d_model=width,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        d_kv=head,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


CONFIGS = {
    "BERT-base": transformers.BertConfig(),
    "RoBERTa-base": roberta(768, 12),
    "RoBERTa-large": roberta(1024, 24),
    "DeBERTa-XXL": deberta(1536, 48),
    "DeBERTaV3-base": deberta(768, 12),
    "GPT-2 M": gpt(1024, 24, 16),
    "GPT-2 L": gpt(1280, 36, 20),
    "GPT-3": gpt(12288, 96, 96),
    "BART-large": transformers.BartConfig(),
    "Llama-7B": llama(4096, 11008, 32, 32),
    "Llama-13B": llama(5120, 13824, 40, 40),
    "T5-S": t5(512, 1024, 8, 6),
    "T5-B": t5(768, 2048, 12, 12),
    "T5-L": t5(1024, 2816, 24, 16),
    "T5-XL": t5(2048, 5120, 24, 32),
    "T5-XXL": t5(4096, 10240, 24, 64),
}
HEADS: dict[str, dict[str, Any]] = {"BERT-base": {"head": "tokens", "labels": 9}}
VIT = {"ViT-B": (768, 12), "ViT-L": (1024, 24)}


@functools.cache
def abstract(model: str) -> tuple[Params, Forward]:
    """A model's shapes, and its forward function."""
    if model in VIT:
        return vit(*VIT[model])
    config, headed = CONFIGS[model], HEADS.get(model, {})
    params = jax.eval_shape(lambda key: models.from_config(config, key, **headed).params, jax.random.key(0))
    return params, family(config.model_type).build(config, **headed)


def vit(width: int, layers: int) -> tuple[Params, Forward]:
    """The matrices of a vision transformer's layers, which no family here computes: shapes and names are enough."""
    square, wide = (layers, width, width), (layers, width, 4 * width)
    shapes = dict.fromkeys(("query", "key", "value", "output"), square)
    shapes |= {"fc1": wide, "fc2": (layers, 4 * width, width)}
    params = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}

    def names(path: Path) -> tuple[str, ...]:
        return tuple(f"encoder.layer.{i}.{path[0]}" for i in range(layers))

    return params, Forward(lambda params, inputs, ports: inputs, spec=Spec(names=names, stacked=lambda path: True))


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, a method and what it trains.

    exact     the number itself
    printed   the paper's figure: "0.3M", "24.5K", "409,600", or a share of all numbers, "2%"
    where     the figure stands
    why       it is another number, where it is
    total     whether the figure counts the model too
    """

    model: str
    words: str
    method: Method
    exact: int
    printed: str
    where: str
    why: str = ""
    total: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}, {self.words}"


def count(row: Row) -> int:
    """What the library counts."""
    params, forward = abstract(row.model)
    found = pj.count(jax.eval_shape(lambda p: row.method.init(jax.random.key(0), p, forward), params))
    return found.trainable + (found.frozen if row.total else 0)


SCALES = {"": 1, "K": 10**3, "M": 10**6}


def shown(printed: str) -> tuple[float, float]:
    """The value of a printed figure, and that of its last digit.

    >>> from experiments import parameter_counts
    >>> parameter_counts.shown("24.5K")
    (24500.0, 100.0)
    """
    match = re.fullmatch(r"([\d,]+)(?:\.(\d+))?([KM%]?)", printed)
    if match is None:
        raise ValueError(f"{printed!r} is not a printed figure, as 0.3M, 24.5K, 409,600 or 2% are")
    unit = SCALES.get(match[3], 1)
    digits = match[2] or ""
    return float(f"{match[1].replace(',', '')}.{digits or 0}") * unit, 10.0 ** -len(digits) * unit


def agrees(row: Row) -> bool:
    """Whether the exact number, rounded or cut off, is what is printed."""
    value, last = shown(row.printed)
    exact = 100 * row.exact / sizes(row) if row.printed.endswith("%") else row.exact
    return value - last / 2 <= exact <= value + last


def sizes(row: Row) -> int:
    """All numbers of a row's model and what its method adds."""
    return pj.count(abstract(row.model)[0]).frozen + row.exact


LORA, DYLORA, ADALORA, VERA = "Hu et al. 2021", "Valipour et al. 2022", "Zhang et al. 2023", "Kopiczko et al. 2023"
QALORA = "Xu et al. 2023"
PREFIX, PROMPT = "Li & Liang 2021", "Lester et al. 2021"
ALL, LINEARS = r"attn\.(c_attn\.[qkv]|c_proj)$", r"_proj$"
ALL_SIX = r"encoder\.layer\..*(query_proj|key_proj|value_proj|dense)$"
VALUES = r"attn\.c_attn\.v$"


def lora(model: str, rank: int, exact: int, printed: str, where: str, why: str = "", *, which: str = "q, v") -> Row:
    """LoRA on the matrices that are named: of GPT-2, "v" and "q, k, v, o"; of DeBERTa, "all six"; of Llama, "all seven
    linears"."""
    select = {"v": VALUES, "q, k, v, o": ALL, "all six": ALL_SIX, "all seven linears": LINEARS}.get(which)
    method = methods.lora(rank) if select is None else methods.lora(rank, select=select)
    return Row(model, f"LoRA, {which}, r = {rank}", method, exact, printed, where, why)


def qlora(model: str, exact: int, printed: str, where: str) -> Row:
    """Every linear but the head, on a base in NF4, which counts as the numbers that it stands for."""
    return Row(model, "QLoRA, r = 64", methods.qlora(64, 16), exact, printed, where)


def qalora(model: str, exact: int, printed: str, where: str) -> Row:
    """Every linear but the head, groups of 32 inputs."""
    return Row(model, "QA-LoRA, r = 64, groups of 32", methods.qalora(64, 16), exact, printed, where)


def vera(model: str, rank: int, exact: int, printed: str, where: str, why: str = "", *, which: str = "q, v") -> Row:
    method = methods.vera(rank) if which == "q, v" else methods.vera(rank, LINEARS)
    return Row(model, f"VeRA, {which}, r = {rank}", method, exact, printed, where, why)


def gpt3(rank: int, exact: int, printed: str) -> list[Row]:
    """Two ways of spending one budget: r directions in q and v, or half as many in all four."""
    where = f"{LORA}, Table 15"
    four = [lora("GPT-3", rank // 2, exact, printed, where, which="q, k, v, o")] if rank > 1 else []
    return [lora("GPT-3", rank, exact, printed, where), *four]


def prompt(model: str, length: int, exact: int, printed: str, why: str = "", *, total: bool = False) -> Row:
    words = f"prompt tuning, p = {length}{', with the model' if total else ''}"
    where = f"{PROMPT}, Table 4"
    return Row(model, words, methods.prompt_tuning(length, start="uniform"), exact, printed, where, why, total)


def kept(model: str, length: int, exact: int, printed: str, why: str = "") -> Row:
    """A prefix without the MLP that makes it in training."""
    method = methods.prefix_tuning(length, hidden=None)
    return Row(model, f"prefix, l = {length}, as it is kept", method, exact, printed, PREFIX, why)


V2 = pj.chain(methods.unfreeze(r"^classifier", name="head"), methods.p_tuning_v2(5, hidden=512))

ROWS: tuple[Row, ...] = (
    # LoRA
    lora("RoBERTa-base", 8, 294_912, "0.3M", f"{LORA}, Table 2"),
    lora("RoBERTa-large", 8, 786_432, "0.8M", f"{LORA}, Table 2"),
    lora("DeBERTa-XXL", 16, 4_718_592, "4.7M", f"{LORA}, Table 2"),
    lora("GPT-2 M", 4, 393_216, "0.35M", f"{LORA}, Table 3", "24 layers x 2 matrices x 4 x 2048 are 0.39M"),
    lora("GPT-2 L", 4, 737_280, "0.77M", f"{LORA}, Table 3", "36 layers x 2 matrices x 4 x 2560 are 0.74M"),
    lora("GPT-3", 2, 4_718_592, "4.7M", f"{LORA}, Table 15", which="v"),
    *gpt3(1, 4_718_592, "4.7M"),
    *gpt3(2, 9_437_184, "9.4M"),
    *gpt3(4, 18_874_368, "18.8M"),
    *gpt3(8, 37_748_736, "37.7M"),
    lora("GPT-3", 64, 301_989_888, "301.9M", f"{LORA}, Table 15"),
    lora(
        "GPT-3",
        64,
        603_979_776,
        "603.8M",
        f"{LORA}, Table 15",
        "twice the 301.9M above, which were cut off",
        which="q, k, v, o",
    ),
    Row("GPT-2 M", "DyLoRA, q, v, up to r = 4", methods.dylora(4), 393_216, "0.39M", f"{DYLORA}, E2E"),
    # what AdaLoRA's paper prints of LoRA; its own numbers depend on what it learns (`BUDGETS`)
    lora("DeBERTaV3-base", 2, 331_776, "0.33M", f"{ADALORA}, Table 1", which="all six"),
    lora("DeBERTaV3-base", 8, 1_327_104, "1.33M", f"{ADALORA}, Table 1", which="all six"),
    # prompts and prefixes
    kept("GPT-2 M", 5, 245_760, "250K", "a round number"),
    kept("GPT-2 M", 10, 491_520, "500K", "a round number"),
    kept("BART-large", 100, 7_372_800, "2%"),
    prompt("T5-S", 20, 10_240, "10,420", "two digits are swapped: 20 x 512 are 10,240"),
    prompt("T5-L", 100, 102_400, "0.01907%", "102,400 of 783,252,480 are 0.01307%"),
    prompt("T5-XXL", 5, 20_480, "20,480"),
    prompt("T5-XXL", 50, 11_135_537_152, "11,137,380,352", "11,135,332,352 and 50 x 4096", total=True),
    prompt("T5-XXL", 100, 409_600, "0.00368%"),
    prompt("T5-XXL", 100, 11_135_741_952, "11,135,741,952", total=True),
    Row("BERT-base", "P-tuning v2, MLP of 512, l = 5, 9 labels", V2, 9_860_105, "9860105", "the authors' log"),
    # what VeRA's paper prints of LoRA
    *(
        lora(model, rank, exact, printed, f"{VERA}, Table 1")
        for model, rank, exact, printed in (
            ("RoBERTa-base", 1, 36_864, "36.8K"),
            ("RoBERTa-base", 16, 589_824, "589.8K"),
            ("RoBERTa-base", 256, 9_437_184, "9437.1K"),
            ("RoBERTa-large", 1, 98_304, "98.3K"),
            ("RoBERTa-large", 16, 1_572_864, "1572.8K"),
            ("RoBERTa-large", 256, 25_165_824, "25165.8K"),
            ("GPT-3", 16, 75_497_472, "75.5M"),
            ("GPT-3", 256, 1_207_959_552, "1207.9M"),
        )
    ),
    lora("ViT-B", 8, 294_912, "294.9K", f"{VERA}, images"),
    lora("ViT-L", 8, 786_432, "786.4K", f"{VERA}, images"),
    lora("Llama-7B", 64, 159_907_840, "159.9M", f"{VERA}, instructions", which="all seven linears"),
    qlora("Llama-7B", 159_907_840, "160M", f"{QALORA}, the cost of 10,000 steps"),
    qalora("Llama-7B", 89_309_184, "89M", f"{QALORA}, the cost of 10,000 steps"),
    lora("Llama-13B", 64, 250_347_520, "250.3M", f"{VERA}, instructions", which="all seven linears"),
    # VeRA
    *(
        vera(model, rank, exact, printed, f"{VERA}, Table 1", why)
        for model, rank, exact, printed, why in (
            ("RoBERTa-base", 1, 18_456, "18.4K", ""),
            ("RoBERTa-base", 16, 18_816, "18.8K", ""),
            ("RoBERTa-base", 256, 24_576, "24.5K", ""),
            ("RoBERTa-large", 1, 49_200, "49.2K", ""),
            ("RoBERTa-large", 16, 49_920, "49.5K", "24 layers x 2 matrices x (16 + 1024) are 49.9K"),
            ("RoBERTa-large", 256, 61_440, "61.4K", ""),
            ("GPT-3", 16, 2_362_368, "2.8M", "96 layers x 2 matrices x (16 + 12,288) are 2.4M"),
            ("GPT-3", 256, 2_408_448, "8.7M", "96 layers x 2 matrices x (256 + 12,288) are 2.4M"),
        )
    ),
    vera("RoBERTa-base", 1024, 43_008, "0.043M", f"{VERA}, Table 2"),
    vera("RoBERTa-large", 256, 61_440, "0.061M", f"{VERA}, Table 2"),
    vera("GPT-2 M", 1024, 98_304, "0.098M", f"{VERA}, Table 3"),
    vera("GPT-2 L", 1024, 165_888, "0.17M", f"{VERA}, Table 3"),
    vera("ViT-B", 256, 24_576, "24.6K", f"{VERA}, images"),
    vera("ViT-L", 256, 61_440, "61.4K", f"{VERA}, images"),
    vera("Llama-7B", 1024, 1_589_248, "1.6M", f"{VERA}, instructions", which="all seven linears"),
    vera("Llama-13B", 1024, 2_416_640, "2.4M", f"{VERA}, instructions", which="all seven linears"),
    vera("Llama-7B", 256, 1_417_216, "1.4M", f"{VERA}, instructions", which="all seven linears"),
)

# T5 1.1 without a prompt: Table 4's totals less p x E.
TOTALS = {
    "T5-S": 76_961_152,
    "T5-B": 247_577_856,
    "T5-L": 783_150_080,
    "T5-XL": 2_849_757_184,
    "T5-XXL": 11_135_332_352,
}


class Budget(NamedTuple):
    """AdaLoRA on DeBERTaV3-base: `rank` triplets on average in all six matrices, of `initial` at first (appendix C)."""

    rank: int
    initial: int
    printed: str


BUDGETS = (Budget(2, 4, "0.32M"), Budget(8, 12, "1.27M"))


def bounds(budget: Budget) -> tuple[int, int]:
    """The fewest and the most numbers that are left at the end: with triplets first of all in the small matrices, or
    in the large ones."""
    params, forward = abstract("DeBERTaV3-base")
    init = methods.adalora(budget.rank, select=ALL_SIX, initial_rank=budget.initial).init
    leaves = triplets(jax.eval_shape(lambda p: init(jax.random.key(0), p, forward), params)).values()
    each = sorted(w.q.shape[-2] + w.p.shape[-1] + 1 for w in leaves for _ in range(sum(w.ranks)))
    left = budget.rank * sum(len(w.ranks) for w in leaves)
    return sum(each[:left]), sum(each[-left:])


# -- the table --------------------------------------------------------------------------------------------------------


def report() -> str:
    """The rows as Markdown: what is exact, what is printed, and why they differ."""
    lines = ["| model | method | exact | printed | where | differs |", "|---|---|---|---|---|---|"]
    cells = ((r.model, r.words, f"{r.exact:,}", r.printed, r.where, r.why) for r in ROWS)
    lines += [f"| {' | '.join(row)} |" for row in cells]
    for budget in BUDGETS:
        words, (low, high) = f"AdaLoRA, all six, {budget.rank} triplets on average", bounds(budget)
        why = "it depends on where the triplets are left"
        lines.append(
            f"| DeBERTaV3-base | {words} | {low:,} to {high:,} | {budget.printed} | {ADALORA}, Table 1 | {why} |"
        )
    return "\n".join(lines) + "\n"
