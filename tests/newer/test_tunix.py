"""Models that nobody here wrote: google-tunix's Llama 3, Qwen 3 and Gemma in NNX, adapted as they are.

Run by `make test-newest` alone: google-tunix needs Python 3.12.  It is installed without what its trainers need (half a
gigabyte), which importing the package would import; its models need none of it.
"""

import importlib
import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from bridging import check, shaken
from checks import close, same
from flax import nnx

import peft_jax as pj
from peft_jax import methods, quant

# Theirs, of older spellings of JAX and flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def tunix(name: str) -> Any:
    if "tunix" not in sys.modules:
        spec = importlib.util.find_spec("tunix")
        assert spec is not None
        sys.modules["tunix"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"tunix.models.{name}.model")


SIZES = {"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 4, "num_kv_heads": 2}


def llama(tied: bool) -> Any:
    model = tunix("llama3")
    config = model.ModelConfig(
        **SIZES,
        vocab_size=32,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=tied,
        remat_config=model.RematConfig.BLOCK,
    )
    return model.Llama3(config, rngs=nnx.Rngs(0))


def qwen(experts: int | None) -> Any:
    model = tunix("qwen3")
    sizes = {**SIZES, "num_experts": experts, "num_experts_per_tok": 2 if experts else None}
    config = model.ModelConfig(**sizes, vocab_size=32, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=not experts)
    return model.Qwen3(config, rngs=nnx.Rngs(0))


def gemma(kv_heads: int) -> Any:
    model = tunix("gemma")
    kinds = (model.AttentionType.LOCAL_SLIDING, model.AttentionType.GLOBAL)
    config = model.ModelConfig(
        **SIZES | {"num_kv_heads": kv_heads},
        num_embed=32,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=kinds,
        sliding_window_size=3,
    )
    return model.Gemma(config, rngs=nnx.Rngs(0))


MODELS = {
    "llama": lambda: llama(False),
    "llama, tied": lambda: llama(True),
    "qwen": lambda: qwen(None),
    "qwen, experts": lambda: qwen(4),
    "gemma": lambda: gemma(2),
    "gemma, one kernel": lambda: gemma(4),
}
# Seven matrices a layer (a router is one more), the table, and a head that is its own; Gemma's keys and values, or all
# three, are one.
ADAPTED = {"llama": 16, "llama, tied": 15, "qwen": 15, "qwen, experts": 18, "gemma": 13, "gemma, one kernel": 11}
LORA = methods.lora(2, select=r"attn|mlp|embed|lm_head")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    graph, params, rest = nnx.split(MODELS[request.param](), nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(3), (2, 6), 0, 32)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))

    def forward(params: Any, tokens: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return nnx.merge(graph, params, rest)(tokens, positions, None, mask)[0]

    params = nnx.to_pure_dict(params)
    keys = iter(jax.random.split(jax.random.key(7), 100))
    return (
        request.param,
        forward,
        jax.tree.map(lambda x: 3 * x + 0.05 * jax.random.normal(next(keys), x.shape), params),
        tokens,
    )


@pytest.fixture(autouse=True)
def their_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_lora(model: Any) -> None:
    name, forward, params, tokens = model
    adapted, _ = check(forward, params, (tokens,), LORA, tolerance=2e-4)
    assert same(pj.strip(adapted), params)
    assert sum(map(pj.trees.is_weight, pj.trees.leaves(adapted).values())) == ADAPTED[name]


@pytest.mark.parametrize("model", ["qwen"], indirect=True)
def test_a_quantised_base_and_trained_norms(model: Any) -> None:
    _, forward, params, tokens = model
    matrices = r"attn\.\w_proj|mlp"
    method = pj.chain(
        quant.quantise(quant.nf4(block_size=8), matrices), methods.dora(2, select=matrices), methods.unfreeze("norm")
    )
    adapted, bridged = method(jax.random.key(0), *pj.bridge(forward).traced(params, tokens))
    adapted = shaken(adapted)
    wanted = jax.jit(forward)(pj.merge(adapted), tokens)
    close(jax.jit(bridged)(adapted, tokens), wanted, 2e-4, 2e-4)
    assert pj.count(adapted).trainable > 0
