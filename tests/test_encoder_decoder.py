"""T5 and BART against transformers in torch: logits, gradients, files, generation; prompts and prefixes in them."""

import copy
import functools
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers as tf
from checks import close, copied, differs, same
from oracles.parity import CLOSE, compiled
from oracles.torch_models import fill, numbers
from safetensors.numpy import load_file, save_file
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import disturbed

import peft_jax as pj
from peft_jax import Inputs, adapters, methods, models, training
from peft_jax.interop import hf_peft
from peft_jax.models import bart, families, t5

pytestmark = pytest.mark.usefixtures("quick_compiles")
KEY, VOCAB = jax.random.key(0), 48
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 44,
    "vocab_size": VOCAB,
    "max_position_embeddings": 30,
}
CONFIGS = {
    "t5": tf.T5Config(**T5),
    "t5 1.1": tf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": tf.BartConfig(**BART, scale_embedding=True, forced_eos_token_id=None),
}
RANDOM = np.random.default_rng(1)
SOURCE = RANDOM.integers(3, VOCAB, (3, 11)).astype(np.int32)
TEXT = RANDOM.integers(3, VOCAB, (3, 7)).astype(np.int32)
MASK = np.arange(11)[None] < np.array([[11], [6], [8]])
REAL = np.arange(7)[None] < np.array([[7], [7], [4]])
GIVEN = Inputs(SOURCE, mask=MASK, decoder_tokens=TEXT, decoder_mask=REAL)


@functools.cache
def torch_weights(name: str) -> torch.nn.Module:
    """Every number random, so large that logits vary by O(1) and generated tokens do not repeat."""
    config = CONFIGS[name]
    model = tf.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    if name == "t5 1.1":  # transformers ties what this version does not
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "final_layer_norm.weight" in key:  # of both signs, or a tied head repeats the token that it reads
                parameter.copy_(noise)
            elif "norm" in key and key.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1 or "relative" in key:
                parameter.copy_(0.5 * noise)
            else:
                large = 3.0 if name == "bart" and "shared" not in key else 1.5
                parameter.copy_(noise * large / max(parameter.shape) ** 0.5)
    return model


def torch_model(name: str) -> torch.nn.Module:
    return copy.deepcopy(torch_weights(name))


def named(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: x for key, x in numbers(model).items() if "embed_tokens" not in key and key != "final_logits_bias"}


@functools.cache
def ours(name: str, scan: bool = True, **options: Any) -> tuple[Any, pj.Forward]:
    config, family = CONFIGS[name], families.family(CONFIGS[name].model_type)
    abstract = jax.eval_shape(lambda key: family.init(key, config, scan=scan), KEY)
    tree = {key: x for key, x in named(torch_weights(name)).items() if name == "t5 1.1" or key != "lm_head.weight"}
    return fill(family.tensors(config), tree, abstract, 3, scan), family.build(config, scan=scan, **options)


def theirs(model: torch.nn.Module, mask: Any = None, real: Any = None, **extra: Any) -> np.ndarray:
    given = {"input_ids": SOURCE, "decoder_input_ids": TEXT, "attention_mask": mask, "decoder_attention_mask": real}
    tensors = {key: torch.tensor(x).long() for key, x in given.items() if x is not None}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**tensors, **extra).logits.numpy()


def run(params: Any, forward: pj.Forward, inputs: Inputs = GIVEN) -> np.ndarray:
    return np.asarray(compiled(forward)(params, inputs))


# -- the models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_torch(name: str) -> None:
    model, (params, forward) = torch_model(name), ours(name)
    plain, padded = theirs(model), theirs(model, MASK, REAL)
    assert plain.std() > 0.2 and differs(plain[1:], padded[1:], 1e-2)
    np.testing.assert_allclose(run(params, forward, Inputs(SOURCE, decoder_tokens=TEXT)), plain, **CLOSE)
    np.testing.assert_allclose(run(params, forward)[REAL], padded[REAL], **CLOSE)
    # Padded on the left: a source begins later, and says the same.
    shift = lambda x: np.stack([np.roll(row, 11 - n) for row, n in zip(x, MASK.sum(1), strict=True)])  # noqa: E731
    left = Inputs(shift(SOURCE), mask=shift(MASK), decoder_tokens=TEXT)
    np.testing.assert_allclose(run(params, forward, left)[REAL], padded[REAL], **CLOSE)

    # The cache: the source and two tokens, then single ones, the source not read again.
    cache, found = forward.spec.cache(3, 8), []
    logits, cache = compiled(forward)(params, Inputs(SOURCE, mask=MASK, decoder_tokens=TEXT[:, :2], cache=cache))
    found.append(logits)
    for i in range(2, 7):
        logits, cache = compiled(forward)(params, Inputs(None, decoder_tokens=TEXT[:, i : i + 1], cache=cache))
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, 1)[REAL], padded[REAL], **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_torch(name: str) -> None:
    model, (params, forward) = torch_model(name), ours(name)
    probe = RANDOM.normal(size=(*TEXT.shape, VOCAB)).astype(np.float32)
    given = {"input_ids": SOURCE, "decoder_input_ids": TEXT, "attention_mask": MASK}
    out = model(**{key: torch.tensor(x).long() for key, x in given.items()}).logits
    (out * torch.tensor(probe)).sum().backward()
    wanted = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    inputs = Inputs(SOURCE, mask=MASK, decoder_tokens=TEXT)
    found = compiled(jax.grad(lambda p: (forward(p, inputs) * probe).sum()))(params)
    truth = fill(families.family(CONFIGS[name].model_type).tensors(CONFIGS[name]), wanted, found, 3, True)
    for (keys, array), right in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(truth), strict=True):
        where = jax.tree_util.keystr(keys)
        np.testing.assert_allclose(array, right, atol=1e-4 * max(np.abs(right).max(), 1), rtol=1e-3, err_msg=where)


def test_unrolled_and_kept_layers_equal_scanned_ones() -> None:
    for name in ("t5", "bart"):
        close(run(*ours(name, scan=False, remat="none")), run(*ours(name)))
        half = families.family(CONFIGS[name].model_type).build(CONFIGS[name], compute_dtype="bfloat16")
        assert jax.eval_shape(half.features, ours(name)[0], GIVEN, pj.Ports()).dtype == jnp.bfloat16
        assert jax.eval_shape(half, ours(name)[0], GIVEN).dtype == jnp.float32
        spec = families.spec_of(ours(name, scan=False, remat="none")[0])
        assert {t.source for t in spec.tensors} == {t.source for t in ours(name)[1].spec.tensors}


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": -1.0}], ids=["greedy", "beams", "penalty"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_generated_tokens_equal_transformers(name: str, options: dict[str, Any]) -> None:
    model, (params, forward) = torch_model(name), ours(name)
    given = {"input_ids": torch.tensor(SOURCE).long(), "attention_mask": torch.tensor(MASK).long()}
    made = tf.GenerationConfig(max_new_tokens=8, pad_token_id=1, eos_token_id=2, decoder_start_token_id=0, **options)
    with torch.no_grad():
        wanted = model.generate(**given, generation_config=made).numpy()[:, 1:]
    assert len(np.unique(wanted)) > 2
    found = models.generate_tokens(
        forward,
        params,
        SOURCE,
        MASK,
        max_new_tokens=8,
        eos_id=2,
        pad_id=1,
        beams=options.get("num_beams", 1),
        length_penalty=options.get("length_penalty", 1.0),
        decoder_tokens=np.zeros((3, 1), int),
    )
    np.testing.assert_array_equal(np.asarray(found)[:, : wanted.shape[1]], wanted)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save_and_back(name: str, tmp_path: Path) -> None:
    model, (params, forward) = torch_model(name), ours(name)
    models.save(tmp_path / "ours", models.Model(params, forward, CONFIGS[name]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_allclose(theirs(again, MASK), theirs(model, MASK), atol=1e-6)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [type(model).__name__]
    model.save_pretrained(tmp_path / "theirs")
    loaded = models.load(tmp_path / "theirs")
    assert same(loaded.params, params)
    assert loaded.forward.spec.start == ((2,) if name == "bart" else (0,))


def test_what_old_checkpoints_hold_beside(tmp_path: Path) -> None:
    """Copies of the embedding, a bias that nothing reads, logits' bias of zero: passed over; anything else is not."""
    torch_model("t5").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
    extra = {unread: np.ones((8, 4), np.float32), "lm_head.weight": tensors["shared.weight"]}
    save_file(tensors | copies | extra, tmp_path / "model.safetensors")
    assert same(models.load(tmp_path).params, ours("t5")[0])
    save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no place for: encoder\.embed_tokens\.weight"):
        models.load(tmp_path)
    torch_model("bart").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not tensors["final_logits_bias"].any()
    save_file(tensors | {"final_logits_bias": np.ones((1, VOCAB), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no place for: final_logits_bias"):
        models.load(tmp_path)


def test_sizes_are_those_of_the_papers() -> None:
    """Numbers of T5 1.1 and of BART-large's three prefixes, from shapes alone (Lester et al. 2021; Li & Liang 2021)."""
    widths = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16)}
    wide = {"xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}
    totals = [76_961_152, 247_577_856, 783_150_080, 2_849_757_184, 11_135_332_352]
    for (width, hidden, layers, heads), total in zip((widths | wide).values(), totals, strict=True):
        sizes = {"d_model": width, "d_ff": hidden, "num_layers": layers, "num_heads": heads}
        config = tf.T5Config(**sizes, vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        params = jax.eval_shape(lambda key, config=config: t5.init(key, config), KEY)
        assert sum(x.size for x in jax.tree.leaves(params)) == total
    params, _ = abstractly(methods.prompt_tuning(100), params, t5.build(config))
    assert pj.count(params) == (409_600, total, pj.count(params).bytes)
    large = tf.BartConfig()
    params = jax.eval_shape(lambda key: bart.init(key, large), KEY)
    adapted, _ = abstractly(methods.prefix_tuning(100, hidden=None), params, bart.build(large))
    assert pj.count(adapted).trainable == 7_372_800


def abstractly(method: pj.Method, params: Any, forward: pj.Forward) -> tuple[Any, pj.Forward]:
    return jax.eval_shape(lambda p: method.init(KEY, p, forward), params), method.wrap(forward)


# -- prompts and prefixes ---------------------------------------------------------------------------------------------


def prefixed(model: torch.nn.Module, prefix: dict[str, Any], length: int) -> torch.nn.Module:
    """The torch model with keys and values put before those of its attentions, where they are computed."""
    is_bart = model.config.model_type == "bart"

    def part(module: torch.nn.Module, key: torch.Tensor) -> str:
        if is_bart:
            cross = any(module is layer.encoder_attn for layer in model.model.decoder.layers)
            return "cross" if cross else "decoder" if module.is_decoder else "encoder"
        cross = any(module is block.layer[1].EncDecAttention for block in model.decoder.block)
        return "cross" if cross else "decoder" if module.is_decoder else "encoder"

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        where, rows = part(module, key), key.shape[2]
        front = [torch.tensor(np.asarray(x[module.layer_idx])).transpose(0, 1)[None] for x in prefix[where]]
        key, value = (torch.cat([x.expand(len(y), -1, -1, -1), y], 2) for x, y in zip(front, (key, value), strict=True))
        mask = None if mask is None else torch.nn.functional.pad(mask, (length, 0))
        if not is_bart and where != "cross":
            first = getattr(model, where).block[0].layer[0].SelfAttention
            options["position_bias"] = first.compute_bias(length + rows, length + rows)[:, :, length:]
        if not is_bart and where == "cross":
            options["position_bias"] = None
        module_of = tf.models.bart.modeling_bart if is_bart else tf.models.t5.modeling_t5
        return module_of.eager_attention_forward(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("prefixed", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("prefixed", eager_mask)
    for inner in model.modules():
        if getattr(inner, "config", None) is not None:
            inner.config._attn_implementation = "prefixed"
        if hasattr(inner, "embed_positions"):
            inner.embed_positions.offset += length  # tokens stand behind the rows
    return model


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_three_prefixes_equal_torch(name: str) -> None:
    params, forward = methods.prefix_tuning(4, hidden=8)(KEY, *ours(name))
    params = disturbed(params, by=1.0)
    assert pj.count(params).trainable == 3 * (4 * 32 + 33 * 8) + 9 * 2 * 7 * (24 if name == "t5" else 32)
    baked = methods.bake(params)
    rows = {part: leaf.rows() for part, leaf in baked["ports"]["prefix_tuning"].items()}
    assert [rows[part][0].shape[:2] for part in ("encoder", "decoder", "cross")] == [(3, 4), (2, 4), (2, 4)]
    found = run(params, forward)
    close(run(baked, forward), found, atol=1e-4)
    model = prefixed(torch_model(name), rows, 4)
    model.config.use_cache = False
    wanted = theirs(model, MASK, use_cache=False)
    assert differs(wanted, theirs(torch_model(name), MASK), 0.1)
    np.testing.assert_allclose(found[REAL], wanted[REAL], **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_prompt_of_words_is_those_words(name: str) -> None:
    base, plain = ours(name)
    words = [5, 9, 7]
    params, forward = methods.prompt_tuning(3, text=words)(KEY, base, plain)
    read = np.concatenate([np.tile(np.array([words], np.int32), (3, 1)), SOURCE], 1)
    close(
        run(params, forward, Inputs(SOURCE, decoder_tokens=TEXT)), run(base, plain, Inputs(read, decoder_tokens=TEXT))
    )


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_on_either_side_says_the_same(name: str) -> None:
    params, forward = pj.chain(methods.prompt_tuning(3), methods.prefix_tuning(4, hidden=None))(KEY, *ours(name))
    shift = lambda x: np.stack([np.roll(row, 11 - n) for row, n in zip(x, MASK.sum(1), strict=True)])  # noqa: E731
    left = Inputs(shift(SOURCE), mask=shift(MASK), decoder_tokens=TEXT, decoder_mask=REAL)
    found = run(params, forward)
    close(run(params, forward, left)[REAL], found[REAL], atol=1e-4)
    short = Inputs(SOURCE[1:2, :6], decoder_tokens=TEXT[1:2])
    close(run(params, forward, short), found[1:2], atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generating_equals_the_whole_forward(name: str, kind: str) -> None:
    method = methods.prompt_tuning(4) if kind == "prompt" else methods.prefix_tuning(4, hidden=None)
    params, forward = method(KEY, *ours(name))
    found = np.asarray(models.generate_tokens(forward, params, SOURCE, MASK, max_new_tokens=4))
    for row in range(3):
        source = SOURCE[row : row + 1, : MASK[row].sum()]
        whole = [*forward.spec.start, *found[row]]
        logits = run(params, forward, Inputs(source, decoder_tokens=np.array([whole[:-1]], np.int32)))
        np.testing.assert_array_equal(logits[0].argmax(-1)[-4:], found[row])
    beams = np.asarray(models.generate_tokens(forward, params, SOURCE, MASK, max_new_tokens=4, beams=2))
    alone = models.generate_tokens(forward, params, SOURCE[1:2, :6], max_new_tokens=4, beams=2)
    np.testing.assert_array_equal(beams[1:2], alone)


METHODS = {
    "prompt": methods.prompt_tuning(4, start="uniform"),
    "prefix": methods.prefix_tuning(4, hidden=None, parts=["decoder"]),
    "lora": methods.lora(2, 3, "q_proj|v_proj|SelfAttention.q|EncDecAttention.v"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", METHODS)
def test_peft_gives_the_same_logits_and_back(name: str, kind: str, tmp_path: Path) -> None:
    base, plain = ours(name)
    params, forward = METHODS[kind](KEY, base, plain)
    params = disturbed(params)
    wanted = run(params, forward)
    assert differs(wanted, run(base, plain), 1e-2)
    hf_peft.save(tmp_path / "a", params)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(torch_model(name), str(tmp_path / "a")).eval()
    np.testing.assert_allclose(theirs(model, MASK, None if kind == "prefix" else REAL)[REAL], wanted[REAL], **CLOSE)
    bare = SimpleNamespace(params=base, forward=plain)
    again, loaded = hf_peft.load(tmp_path / "a", bare)
    np.testing.assert_allclose(run(again, loaded), wanted, atol=1e-5)
    hf_peft.save(tmp_path / "b", again)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert pj.count(again).trainable == pj.count(params).trainable


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_we_give_the_logits_of_peft_and_train_on(name: str, kind: str, tmp_path: Path) -> None:
    make = peft.PromptTuningConfig if kind == "prompt" else peft.PrefixTuningConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(torch_model(name), make(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
        if kind == "prefix":  # PEFT divides the width; T5's heads together are narrower
            heads, dim = {"t5": (4, 6), "bart": (2, 16)}[name]
            shape = {"num_attention_heads": heads, "token_dim": heads * dim, "num_layers": 3, "num_virtual_tokens": 4}
            model = peft.get_peft_model(torch_model(name), make(task_type="SEQ_2_SEQ_LM", **shape))
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        model.eval().save_pretrained(tmp_path)
    base, plain = ours(name)
    params, forward = hf_peft.load(tmp_path, SimpleNamespace(params=base, forward=plain))
    assert pj.count(params).trainable == (4 * 32 if kind == "prompt" else 2 * 2 * 4 * (24 if name == "t5" else 32))
    np.testing.assert_allclose(run(params, forward)[REAL], theirs(model, MASK)[REAL], **CLOSE)
    check_training(params, forward)


# -- training ---------------------------------------------------------------------------------------------------------


def batch() -> dict[str, Any]:
    """Shifted right behind the first token, as training on text has it."""
    begin = np.concatenate([np.zeros((3, 1), np.int32), TEXT[:, :-1]], 1)
    weights = REAL.astype(np.float32)
    return {"tokens": SOURCE, "mask": MASK, "decoder_tokens": begin, "targets": TEXT, "weights": weights}


def check_training(params: Any, forward: pj.Forward) -> Any:
    before = copied(pj.partition(params)[1])
    tx = pj.freeze(optax.adam(3e-2), params)
    run = training.fit(forward, params, tx, lambda step: batch(), 4, progress=False)
    losses = [record["loss"] for record in run.history]
    assert losses[-1] < losses[0]
    assert same(copied(pj.partition(run.params)[1]), before)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), pj.partition(run.params)[0], pj.partition(params)[0])
    assert all(jax.tree.leaves(moved))
    return run.params


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_methods_train_together_in_either_order(name: str) -> None:
    base, plain = ours(name)
    parts = (methods.prefix_tuning(4, hidden=8, dropout=0.1), methods.prompt_tuning(3), METHODS["lora"])
    (one, first), (two, second) = (pj.chain(*order)(KEY, base, plain) for order in (parts, parts[::-1]))
    assert same(jax.tree.leaves(one), jax.tree.leaves(two))
    close(run(one, first), run(two, second), atol=1e-5)
    trained = check_training(two, second)
    assert same(pj.strip(trained), base)
    lora = {entry: x for entry, x in trained.items() if entry != "ports"}
    close(run(pj.merge(lora), plain), run(lora, METHODS["lora"].wrap(plain)), atol=1e-4)
    if name == "bart":
        assert (second.spec.positions, second.spec.decoder_positions) == (30 - 7, 30 - 4)
    unrolled, loop = ours(name, scan=False, remat="none")
    again, wrapped = parts[0](KEY, unrolled, loop)
    alone, prefix = parts[0](KEY, base, plain)
    assert same(again["ports"], alone["ports"])
    close(run(again, wrapped), run(alone, prefix))


def test_a_prefix_starts_from_another_tasks() -> None:
    base, plain = ours("bart")
    method = methods.p_tuning_v2(4, dropout=0.0)
    trained = check_training(*method(KEY, base, plain))
    later, forward = methods.p_tuning_v2(4, dropout=0.0, start=trained)(jax.random.key(9), base, plain)
    assert same(later["ports"], trained["ports"])
    check_training(later, forward)
    for options, message in (
        ({"length": 5}, "of another length, MLP or model"),
        ({"hidden": 8}, "of another length, MLP or model"),
        ({"name": "other"}, "holds no prefix called 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.p_tuning_v2(**({"length": 4, "start": trained} | options))(KEY, base, plain)


def test_a_batch_mixes_stored_prefixes() -> None:
    base, plain = ours("t5")
    method = methods.prefix_tuning(4, hidden=None)
    trees = {}
    for seed, name in enumerate("ab"):
        tree, forward = method(KEY, base, plain)
        trees[name] = disturbed(tree, seed, by=1.0)
    stacked, mixed = adapters.stack(trees, forward)
    rows = pj.Ports(adapter=jnp.array([1, -1, 0]))
    for given in (GIVEN, Inputs(SOURCE, decoder_tokens=TEXT)):
        found = np.asarray(compiled(mixed)(stacked, given, rows))
        wanted = [run(trees["b"], forward, given)[0], run(base, plain, given)[1], run(trees["a"], forward, given)[2]]
        close(found[REAL], np.stack(wanted)[REAL], atol=1e-4)
    written = models.generate_tokens(mixed, stacked, SOURCE, MASK, max_new_tokens=4, ports=rows)
    alone = [
        np.asarray(models.generate_tokens(f, p, SOURCE, MASK, max_new_tokens=4))[row]
        for row, (p, f) in enumerate(((trees["b"], forward), (base, plain), (trees["a"], forward)))
    ]
    np.testing.assert_array_equal(written, alone)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused(tmp_path: Path) -> None:
    base, plain = ours("bart")

    def refused(message: str, act: Any, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            act(*arguments, **options)

    refused(r"needs Inputs\(tokens, decoder_tokens=...\)", plain, base, SOURCE)
    packed = Inputs(SOURCE, segments=np.ones_like(SOURCE), decoder_tokens=TEXT)
    refused("bart reads a source a row, so rows cannot be packed", plain, base, packed)
    long = np.zeros((1, 31), np.int32)
    refused("31 tokens and the model has 30 positions", plain, base, Inputs(TEXT[:1], decoder_tokens=long))
    refused("31 tokens and the model has 30 positions", plain, base, Inputs(long, decoder_tokens=TEXT[:1]))
    one = pj.Ports(prefix=(jnp.zeros((3, 2, 4, 8)),) * 2)
    refused("takes a prefix as a dict .* by encoder, decoder, cross, and got one pair", plain, base, GIVEN, one)
    wrong = pj.Ports(prefix={"decoder": (jnp.zeros((2, 2, 4, 8)),) * 2})
    refused("4 key heads of 8 and this model 2 of 16: it is another model's", plain, base, GIVEN, wrong)
    refused("parts are memory: choose from encoder", methods.prefix_tuning(4, parts=["memory"]), KEY, base, plain)
    refused("parts are none", methods.prefix_tuning(4, parts=[]), KEY, base, plain)
    refused("reads it with a decoder's cache", methods.prefix_tuning(4, text=[3]), KEY, base, plain)
    refused("two ways to start a prefix", methods.prefix_tuning, 4, text=[3], start={})
    refused(
        "of 30 rows leaves real tokens none of the 30", methods.prefix_tuning(30, parts=["decoder"]), KEY, base, plain
    )
    methods.prefix_tuning(30, hidden=None, parts=["cross"])(KEY, base, plain)  # which takes no position
    generate = functools.partial(models.generate_tokens, plain, base)
    refused("source 1 is empty", generate, SOURCE, MASK & np.array([[1], [0], [1]], bool))
    refused("1 first tokens and 30 new ones exceed the decoder's 30", generate, SOURCE, max_new_tokens=30)
    refused("a source of 31 tokens exceeds the encoder's 30", generate, long)
    refused("are to be one or more for each of the 3 sources", generate, SOURCE, decoder_tokens=[[1]])
    refused("token id 48 is outside the vocabulary", generate, SOURCE, decoder_tokens=[[48]] * 3, max_new_tokens=4)
    params, _ = methods.prefix_tuning(4, hidden=None)(KEY, base, plain)
    refused(r"stands before .*encoder.*, and HF PEFT's .*parts=\['decoder'\]", hf_peft.save, tmp_path, params)
    params, _ = methods.lora(2, 2, "shared")(KEY, base, plain)
    refused("adapts model.shared, the embedding of both stacks", hf_peft.save, tmp_path, params)
    refused("a T5 encoder alone is not supported", t5.build, tf.T5Config(**T5, is_encoder_decoder=False))
    refused("a BART decoder alone is not supported", bart.build, tf.BartConfig(**BART, is_encoder_decoder=False))
    odd = BART | {"encoder_attention_heads": 5}
    refused("d_model 32 is not a multiple of 5", bart.build, tf.BartConfig(**odd))
    small = models.from_config(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=48, n_positions=32), KEY)
    refused("no encoder-decoder model", small.forward, small.params, GIVEN)
    refused(
        "parts decoder are of encoder-decoder models",
        methods.prefix_tuning(2, parts=["decoder"]),
        KEY,
        base,
        small.forward,
    )
