"""The zoo: a row for every method, and the tiny models on which `test_laws` holds it to the laws.

A new method adds a row to `ROWS`; a factory of `peft_jax.methods` without one fails the suite.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

import peft_jax as pj
from peft_jax import methods, quant, trees
from peft_jax.methods.lora import LoRA
from peft_jax.methods.vera import VeRA
from peft_jax.models import families
from peft_jax.training.losses import inputs_of

KEY = jax.random.key(0)
WIDTH, HIDDEN, KV, VOCAB, LAYERS = 32, 48, 16, 64, 3
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
ENCODER = {key: size for key, size in SIZES.items() if key != "num_key_value_heads"}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=4, tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCAB, n_positions=32, bos_token_id=0, eos_token_id=0
    ),
    "bert": transformers.BertConfig(**ENCODER, pad_token_id=0),
    "roberta": transformers.RobertaConfig(**ENCODER, pad_token_id=1),
    "deberta-v2": transformers.DebertaV2Config(
        **ENCODER,
        relative_attention=True,
        pos_att_type="p2c|c2p",
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    "t5": transformers.T5Config(
        d_model=WIDTH, d_kv=6, d_ff=HIDDEN, num_layers=LAYERS, num_decoder_layers=2, num_heads=4, vocab_size=VOCAB
    ),
    "bart": transformers.BartConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        vocab_size=VOCAB,
        max_position_embeddings=32,
    ),
}

# 8 rows of 12 tokens; a different pattern a row, which three steps already begin to learn.
TEXT = np.random.RandomState(0).randint(0, VOCAB, (8, 13)).astype(np.int32)
BATCH = {"tokens": TEXT[:, :-1], "targets": TEXT[:, 1:], "weights": np.ones((8, 12), np.float32)}
TOKENS = BATCH["tokens"]


def batch(family: str) -> dict[str, Any]:
    """The same text for every family: encoders tag it, encoder-decoder models write it from its reverse."""
    if family not in ("t5", "bart"):
        return BATCH
    return BATCH | {"tokens": TOKENS[:, ::-1].copy(), "decoder_tokens": TOKENS}


def inputs(family: str) -> pj.Inputs:
    return inputs_of(batch(family))


# -- models -----------------------------------------------------------------------------------------------------------


def module(family: str) -> Any:
    return families.family(CONFIGS[family].model_type)


def headed(family: str) -> dict[str, Any]:
    return {"head": "tokens", "labels": VOCAB} if module(family).HEADS else {}


@functools.cache
def build(family: str, **options: Any) -> pj.Forward:
    return module(family).build(CONFIGS[family], **options, **headed(family))


@functools.cache
def compiled(family: str, **options: Any) -> Any:
    """The base model's forward function, compiled once: what merged weights must run through as they are."""
    return jax.jit(build(family, **options))


@functools.cache
def base(family: str, dtype: Any = jnp.float32) -> Any:
    """Random weights of which none is a constant, so large that logits vary by O(1)."""
    abstract = jax.eval_shape(lambda key: module(family).init(key, CONFIGS[family], **headed(family)), KEY)
    random = np.random.RandomState(1)

    def draw(keys: Any, leaf: Any) -> jax.Array:
        kind, noise = keys[-1].key, random.standard_normal(leaf.shape)
        numbers = {
            "kernel": noise / np.sqrt(leaf.shape[-2:][0]),
            "embedding": 0.5 * noise,
            "scale": 1 + 0.2 * noise,
            "bias": 0.2 * noise,
        }
        return jnp.asarray(numbers[kind], dtype)

    with jax.ensure_compile_time_eval():  # what is cached must be arrays, even if it is first asked for in a trace
        return jax.tree_util.tree_map_with_path(draw, abstract)


def unrolled(params: Any) -> Any:
    """The same weights with an entry a layer, ``layers_0``, …"""
    model = dict(params["model"])
    stack = model.pop("layers")
    model |= {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], stack) for i in range(LAYERS)}
    return params | {"model": model}


def disturbed(params: Any, seed: int = 2, by: float = 0.3) -> Any:
    """Every trained number moved a little, so that no adapter is at its start; the padding of ranks stays zero."""
    random = np.random.RandomState(seed)

    def noisy(x: jax.Array) -> jax.Array:
        return x + jnp.asarray(by / np.sqrt(x.shape[-1]) * random.standard_normal(x.shape), x.dtype)

    def move(w: pj.Weight) -> pj.Weight:
        moved = {name: jax.tree.map(noisy, getattr(w, name)) for name in w.trains}
        if isinstance(w, LoRA):
            used = (w.a != 0).any(-2) | (w.b != 0).any(-1)
            moved = {"a": jnp.where(used[..., None, :], moved["a"], 0), "b": jnp.where(used[..., None], moved["b"], 0)}
        if isinstance(w, VeRA):
            used = (w.d != 0).any(-1, keepdims=True)
            moved = {name: jnp.where(used, x, 0) for name, x in moved.items()}
        return dataclasses.replace(w, **moved)

    return trees.map_weights(move, params)


# -- rows -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What the laws need to know of one use of a method.

    name        the row's
    factories   the factories of `peft_jax.methods` that it stands for
    method      ``(key, params, forward) -> (params, forward)``
    trains      how many numbers train, by the paper's formula
    optimiser   () -> the optimiser that belongs to the method
    stores      the part of the method that stores the base in few bits: what `strip` gives back
    keeps       how many numbers it keeps beside Adam's two for each that trains
    Where a law does not hold, the row says why; an empty reason means that it does:
    changes     the output is not the base's at the start
    stays       it cannot be merged
    slope       the gradient is not the derivative of the loss
    foreign     HF PEFT's format cannot hold it, in the words of the error that saving raises
    """

    name: str
    factories: tuple[str, ...]
    method: Callable[..., tuple[Any, pj.Forward]]
    trains: int
    optimiser: Callable[[], optax.GradientTransformation] = lambda: optax.adam(3e-3)
    stores: pj.Method = pj.chain()
    keeps: int = 0
    changes: str = ""
    stays: str = ""
    slope: str = ""
    foreign: str = ""

    def base(self, params: Any, **options: Any) -> Any:
        """A llama's weights as this row's adapters find them."""
        return self.stores(KEY, params, build("llama", **options))[0]


def vectors(rank: int, *shapes: tuple[int, int]) -> int:
    """VeRA, section 3.2: r + out for every adapted matrix."""
    return sum(rank + outputs for _, outputs in shapes)


def low_rank(rank: int, *shapes: tuple[int, int]) -> int:
    """LoRA, section 4.2: r · (in + out) for every adapted matrix."""
    return rank * sum(inputs + outputs for inputs, outputs in shapes)


def pooled(rank: int, group: int, *shapes: tuple[int, int]) -> int:
    """QA-LoRA, section 3.3: r · (groups of inputs + out) for every adapted matrix."""
    return rank * sum(inputs // group + outputs for inputs, outputs in shapes)


def triplets(rank: int, *shapes: tuple[int, int]) -> int:
    """AdaLoRA, section 3.1: r · (in + out + 1) for every adapted matrix."""
    return low_rank(rank, *shapes) + rank * len(shapes)


Q, K, V, OUT = (WIDTH, WIDTH), (WIDTH, KV), (WIDTH, KV), (WIDTH, WIDTH)
GATE, UP, DOWN = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
EMBED, HEAD = (VOCAB, WIDTH), (WIDTH, VOCAB)
NORMS = (2 * LAYERS + 1) * WIDTH
LAYER = sum(i * o for i, o in (Q, K, V, OUT, GATE, UP, DOWN)) + WIDTH + KV + KV + WIDTH + 2 * WIDTH
TABLE = VOCAB * WIDTH


def several(key: Any, params: Any, forward: pj.Forward) -> tuple[Any, pj.Forward]:
    """Two adapters in one leaf, of other ranks and targets; the first is in use."""
    made = {"wide": methods.lora(4, 8, "(q|o)_proj|embed"), "narrow": methods.lora(2, 8, "q_proj", layers=[1])}
    return methods.slora({name: method(key, params, forward)[0] for name, method in made.items()})(key, params, forward)


def baked(key: Any, params: Any, forward: pj.Forward) -> tuple[Any, pj.Forward]:
    """A prefix without the MLP that it began with."""
    params, forward = methods.prefix_tuning(3, hidden=8)(key, params, forward)
    return methods.bake(params), forward


def in_use(rank: int, method: pj.Method) -> Callable[..., tuple[Any, pj.Forward]]:
    """DyLoRA that computes at a smaller rank than it trains."""

    def made(key: Any, params: Any, forward: pj.Forward) -> tuple[Any, pj.Forward]:
        params, forward = method(key, params, forward)
        return methods.use_rank(params, rank), forward

    return made


def truncated(rank: int, method: pj.Method) -> Callable[..., tuple[Any, pj.Forward]]:
    """DyLoRA cut to a smaller rank, and trained on."""

    def made(key: Any, params: Any, forward: pj.Forward) -> tuple[Any, pj.Forward]:
        params, forward = method(key, params, forward)
        return methods.truncate(params, rank), forward

    return made


def allocated(steps: int = 3) -> optax.GradientTransformationExtraArgs:
    """AdaLoRA's optimiser, which prunes in the second step and holds the target in the third."""
    return methods.allocate_rank(optax.adam(0.05), steps, initial_steps=0, final_steps=1, orthogonality=0)


INT4 = quant.quantise(quant.grouped(4, 16), "(q|v)_proj")
NF4 = quant.quantise(quant.nf4(16))
PUT_BEFORE = {"changes": "random rows stand before the tokens", "stays": "it acts beside the weights"}

ROWS = (
    Row("lora", ("lora",), methods.lora(4, 8), LAYERS * low_rank(4, Q, V)),
    Row(
        "lora everywhere",
        ("lora",),
        methods.lora(2, 8, ".*"),
        LAYERS * low_rank(2, Q, K, V, OUT, GATE, UP, DOWN) + low_rank(2, EMBED, HEAD),
    ),
    Row(
        "ranks by layer",
        ("lora",),
        methods.lora(4, 8, "q_proj|down", layers=[0, 2], rank_pattern={r"\.0\.": 2}, alpha_pattern={"down": 3}),
        low_rank(2, Q, DOWN) + low_rank(4, Q, DOWN),
    ),
    Row(
        "dropout and biases",
        ("lora",),
        methods.lora(4, 8, dropout=0.2, bias="lora_only"),
        LAYERS * (low_rank(4, Q, V) + WIDTH + KV),
    ),
    Row(
        "dora",
        ("dora",),
        methods.dora(4, 8, "v_proj|embed_tokens|lm_head"),
        LAYERS * (low_rank(4, V) + KV) + low_rank(4, EMBED, HEAD) + WIDTH + VOCAB,
        slope="the norm is a constant in the backward pass (DoRA, section 4.3)",
    ),
    Row(
        "pissa",
        ("pissa",),
        methods.pissa(4, 8, rank_pattern={r"\.1\.": 2}),
        2 * low_rank(4, Q, V) + low_rank(2, Q, V),
    ),
    Row(
        "dylora",
        ("dylora", "use_rank"),
        in_use(3, methods.dylora(4, 8, "(q|v)_proj|embed")),
        LAYERS * low_rank(4, Q, V) + low_rank(4, EMBED),
    ),
    Row(
        "dylora frozen",
        ("dylora", "hold_rows"),
        methods.dylora(
            4,
            8,
            min_rank=2,
            distribution="geometric",
            frozen=True,
            rank_pattern={r"\.1\.": 3},
            name="dylora frozen",  # whose first ranks do not fall: a smaller one does not see what a larger has learnt
        ),
        2 * low_rank(4, Q, V) + low_rank(3, Q, V),
        optimiser=lambda: methods.hold_rows(optax.adam(3e-3)),
    ),
    Row("dylora truncated", ("truncate",), truncated(2, methods.dylora(4, 8)), LAYERS * low_rank(2, Q, V)),
    Row("olora", ("olora",), methods.olora(4, 8), LAYERS * low_rank(4, Q, V)),
    Row(
        "rslora with lora+",
        ("lora", "lora_plus"),
        methods.lora(4, 8, rslora=True),
        LAYERS * low_rank(4, Q, V),
        optimiser=lambda: methods.lora_plus(optax.adam, 1e-3, ratio=16),
        slope="the gradient is the first row's; this optimiser keeps it in two parts",
    ),
    Row("vera", ("vera",), methods.vera(8, layers=[0, 2], dropout=0.2), 2 * vectors(8, Q, V)),
    Row(
        "vera everywhere",
        ("vera",),
        methods.vera(4, ".*", seed=3),
        LAYERS * vectors(4, Q, K, V, OUT, GATE, UP, DOWN) + vectors(4, EMBED, HEAD),
        foreign="embed_tokens.* HF PEFT's VeRA acts on linears alone",
    ),
    Row(
        "adalora",
        # The last two look at numbers and change shapes: their laws are in test_adalora.
        ("adalora", "allocate_rank", "orthogonality", "prune", "ranks"),
        methods.adalora(2, 32, "(q|v|down)_proj", initial_rank=3, layers=[0, 2]),
        2 * triplets(3, Q, V, DOWN),
        optimiser=allocated,
        keeps=LAYERS * (2 * triplets(3, Q, V, DOWN) + 2 * 3 * 3) + 2,  # scores of padding too
    ),
    Row(
        "qalora",
        ("qalora",),
        pj.chain(INT4, methods.qalora(2, 4, "(q|v)_proj", group_size=16, layers=[0, 2], dropout=0.2)),
        2 * pooled(2, 16, Q, V),
        stores=INT4,
    ),
    Row("one layer", ("unfreeze",), methods.unfreeze(r"layers\.1\."), LAYER),
    Row("everything", ("unfreeze",), methods.unfreeze(""), LAYERS * LAYER + WIDTH + 2 * TABLE),
    Row(
        "two loras and norms",
        ("lora", "unfreeze"),
        pj.chain(
            methods.lora(4, 8, "(q|v)_proj|embed", name="one"),
            methods.lora(2, 4, "(q|o)_proj", name="two"),
            methods.unfreeze("norm|embed"),
        ),
        LAYERS * (low_rank(4, Q, V) + low_rank(2, Q, OUT)) + low_rank(4, EMBED) + NORMS + TABLE,
        foreign="embed_tokens: HF PEFT holds one of them",
    ),
    Row(
        "several adapters",
        ("slora",),
        several,
        low_rank(2, Q) + LAYERS * low_rank(4, Q, OUT) + low_rank(4, EMBED),
        foreign="say which to save",
    ),
    Row("prompt", ("prompt_tuning",), methods.prompt_tuning(4), 4 * WIDTH, **PUT_BEFORE),
    Row(
        "prefix",
        ("prefix_tuning",),
        methods.prefix_tuning(3, hidden=8, dropout=0.1),
        3 * WIDTH + WIDTH * 8 + 8 + (8 + 1) * 2 * LAYERS * KV,
        **PUT_BEFORE,
    ),
    Row("baked prefix", ("prefix_tuning", "bake"), baked, 2 * LAYERS * KV * 3, **PUT_BEFORE),
    Row(
        "deep prompts and lora",
        ("p_tuning_v2", "lora"),
        pj.chain(methods.p_tuning_v2(3), methods.lora(4, 8)),
        2 * LAYERS * KV * 3 + LAYERS * low_rank(4, Q, V),
        foreign="save them apart",
        **PUT_BEFORE,
    ),
    Row(
        "qlora",
        ("qlora",),
        methods.qlora(4, 8, format=quant.nf4(16)),
        LAYERS * low_rank(4, Q, K, V, OUT, GATE, UP, DOWN),
        stores=NF4,
    ),
    Row(
        "longlora",
        ("longlora", "shift_attention"),
        methods.longlora(4, 8),  # a call without a micro_key has full attention: outputs start as the base's
        LAYERS * low_rank(4, Q, K, V, OUT) + NORMS + TABLE,
    ),
)


def model(family: str, params: Any = None) -> Any:
    """What `interop.hf_peft.load` adapts."""
    return SimpleNamespace(params=base(family) if params is None else params, forward=build(family))
