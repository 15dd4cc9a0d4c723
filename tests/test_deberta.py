"""DeBERTa against transformers in torch: distances, features, heads, gradients, files; adapters and prompts on it."""

import copy
import functools
import importlib.util
import json
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
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, make_log_bucket_position
from zoo import disturbed

import peft_jax as pj
from peft_jax import Inputs, Ports, adapters, methods, models, training
from peft_jax.interop import hf_peft
from peft_jax.models import deberta

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 48,
    "max_position_embeddings": 20,
    "relative_attention": True,
}
V3: dict[str, Any] = {
    "pos_att_type": "p2c|c2p",
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
CONFIGS = {
    "v3": tf.DebertaV2Config(**SHAPE, **V3),
    "v2-xxlarge": tf.DebertaV2Config(**SHAPE, **V3, conv_kernel_size=3, conv_act="gelu"),
    "c2p": tf.DebertaV2Config(
        **SHAPE, pos_att_type=["c2p"], position_buckets=6, embedding_size=24, type_vocab_size=2, conv_kernel_size=5
    ),
    "p2c": tf.DebertaV2Config(
        **SHAPE, pos_att_type="p2c", max_relative_positions=5, norm_rel_ebd="layer_norm", hidden_act="relu"
    ),
    "no distances": tf.DebertaV2Config(**SHAPE | {"relative_attention": False}, type_vocab_size=2),
}
CLASSES = {
    "classification": tf.DebertaV2ForSequenceClassification,
    "tokens": tf.DebertaV2ForTokenClassification,
    "answers": tf.DebertaV2ForQuestionAnswering,
    None: tf.DebertaV2Model,
}
ALL = [("v3", "classification"), ("v2-xxlarge", None), ("c2p", "tokens"), ("p2c", "answers"), ("no distances", None)]
pytestmark = pytest.mark.usefixtures("quick_compiles")
KEY = jax.random.key(0)
RANDOM = np.random.default_rng(1)
TOKENS = RANDOM.integers(3, 48, (3, 12)).astype(np.int32)
TYPES = RANDOM.integers(0, 2, (3, 12)).astype(np.int32)
MASK = np.arange(12)[None] < np.array([[12], [7], [9]])
WHOLE = np.ones((3, 12), bool)


def config_of(name: str, head: str | None) -> Any:
    config = copy.deepcopy(CONFIGS[name])
    config.num_labels = 2 if head == "answers" else 3
    return config


@functools.cache
def pair(name: str, head: str | None, scan: bool = True, **options: Any) -> tuple[torch.nn.Module, Any, pj.Forward]:
    """The same random model on both sides."""
    config = config_of(name, head)
    model = CLASSES[head](config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = key.endswith("LayerNorm.weight")
            large = 1 if "rel_emb" in key else 1.5 / max(parameter.shape) ** 0.5
            parameter.copy_(1 + 0.3 * noise if one else noise * (0.3 if parameter.ndim == 1 else large))
    abstract = jax.eval_shape(lambda key: deberta.init(key, config, scan=scan, head=head), KEY)
    params = fill(deberta.tensors(config, head), numbers(model), abstract, 3, scan)
    return model, params, deberta.build(config, scan=scan, head=head, **options)


def outputs(model: torch.nn.Module, head: str | None, mask: np.ndarray = WHOLE) -> torch.Tensor:
    given = {"input_ids": TOKENS, "token_type_ids": TYPES, "attention_mask": mask}
    out = model(**{key: torch.tensor(x).long() for key, x in given.items()})
    if head == "answers":
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.logits if head else out.last_hidden_state


def theirs(model: torch.nn.Module, head: str | None, mask: np.ndarray = WHOLE) -> np.ndarray:
    return outputs(model, head, mask).detach().numpy()


def real_rows(head: str | None) -> np.ndarray:
    return np.ones(3, bool) if head == "classification" else MASK


def to_the_left(x: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(row, 12 - n) for row, n in zip(x, MASK.sum(1), strict=True)])


# -- distances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buckets", "longest"), [(256, 512), (512, 1024), (512, 512), (256, 24528), (64, 512), (8, 20)]
)
def test_buckets_equal_those_of_transformers(buckets: int, longest: int) -> None:
    """At every distance, far beyond the longest that training sees."""
    far = torch.arange(-3 * longest, 3 * longest + 1)
    wanted = make_log_bucket_position(far, buckets, longest).long()
    wanted = torch.clamp(wanted + buckets, 0, 2 * buckets - 1).numpy()
    config = tf.DebertaV2Config(**SHAPE | {"max_position_embeddings": longest}, position_buckets=buckets)
    found = deberta.rows_of(jnp.asarray(-far.numpy(), jnp.int32)[None, None], deberta.read_config(config))
    np.testing.assert_array_equal(found[0, 0], wanted)
    assert {0, 2 * buckets - 1} <= set(wanted.tolist())
    for most in (1, 11, buckets, 3 * longest):
        some = wanted[np.abs(far.numpy()) <= most]
        assert deberta.used_rows(most, deberta.read_config(config)) == (some.min(), some.max() + 1)


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), ALL)
def test_outputs_equal_torch(name: str, head: str | None) -> None:
    model, params, forward = pair(name, head)
    run = compiled(forward)
    plain, padded = theirs(model, head), theirs(model, head, MASK)
    assert plain.std() > 0.3 and differs(plain, padded, 1e-2)
    real = real_rows(head)
    np.testing.assert_allclose(run(params, Inputs(TOKENS, types=TYPES)), plain, **CLOSE)
    np.testing.assert_allclose(run(params, Inputs(TOKENS, types=TYPES, mask=MASK))[real], padded[real], **CLOSE)
    given = np.maximum(np.cumsum(MASK, 1) - 1, 0).astype(np.int32) + 2 * (forward.spec.positions == 0)
    shifted = run(params, Inputs(TOKENS, types=TYPES, mask=MASK, positions=given))
    np.testing.assert_allclose(shifted[real], padded[real], **CLOSE)
    left = run(params, Inputs(to_the_left(TOKENS), types=to_the_left(TYPES), mask=to_the_left(MASK)))
    np.testing.assert_allclose(left if head == "classification" else left[to_the_left(MASK)], padded[real], **CLOSE)
    if head != "classification":  # packed
        packed = Inputs(TOKENS[:2].reshape(1, -1), types=TYPES[:2].reshape(1, -1), segments=np.repeat([[1, 2]], 12, 1))
        if forward.spec.positions:
            with pytest.raises(ValueError, match="24 tokens and the model has 20 positions"):
                run(params, packed)
        else:
            np.testing.assert_allclose(run(params, packed)[0], plain[:2].reshape(24, -1), **CLOSE)


@pytest.mark.parametrize(("name", "head"), ALL)
def test_gradients_equal_torch(name: str, head: str | None) -> None:
    """Of every weight, under padding."""
    model, params, forward = pair(name, head)
    given = Inputs(TOKENS, types=TYPES, mask=MASK)
    probe = RANDOM.normal(size=theirs(model, head).shape).astype(np.float32)
    probe[~real_rows(head)] = 0
    model.zero_grad()
    (outputs(model, head, MASK) * torch.tensor(probe)).sum().backward()
    wanted = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}

    found = compiled(jax.grad(lambda p: (forward(p, given) * probe).sum()))(params)
    truth = fill(deberta.tensors(CONFIGS[name], head), wanted, found, 3, True)
    for (keys, array), right in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(truth), strict=True):
        where = jax.tree_util.keystr(keys)
        np.testing.assert_allclose(array, right, atol=2e-5 * max(np.abs(right).max(), 1), rtol=2e-3, err_msg=where)
        assert np.abs(right).max() > 1e-3 or "key_proj']['bias" in where, where  # shifts all scores alike


def test_unrolled_and_kept_layers_equal_scanned_ones() -> None:
    _, params, forward = pair("v2-xxlarge", None)
    given = Inputs(TOKENS, types=TYPES, mask=MASK)
    _, unrolled, loop = pair("v2-xxlarge", None, scan=False, remat="none")
    close(compiled(loop)(unrolled, given)[MASK], compiled(forward)(params, given)[MASK])


def test_half_precision() -> None:
    _, params, _ = pair("v2-xxlarge", None)
    half = deberta.build(CONFIGS["v2-xxlarge"], compute_dtype="bfloat16")
    assert jax.eval_shape(half.features, params, Inputs(TOKENS, mask=MASK), Ports()).dtype == jnp.bfloat16
    assert jax.eval_shape(half, params, TOKENS).dtype == jnp.bfloat16


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), ALL)
def test_transformers_loads_what_we_save_and_back(name: str, head: str | None, tmp_path: Path) -> None:
    model, params, forward = pair(name, head)
    models.save(tmp_path / "ours", models.Model(params, forward, config_of(name, head), head=head))
    again = CLASSES[head].from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(theirs(again, head, MASK), theirs(model, head, MASK), atol=1e-6)
    assert tf.AutoConfig.from_pretrained(tmp_path / "ours").architectures == [type(model).__name__]
    model.save_pretrained(tmp_path / "theirs")
    loaded = models.load(tmp_path / "theirs", head=head)
    assert same(loaded.params, params) and loaded.tokenizer is None
    assert loaded.forward.spec.labels == {None: 0, "answers": 2}.get(head, 3)


def test_a_new_head_trains_and_the_pretrained_model_does_not(tmp_path: Path) -> None:
    """From a pretraining checkpoint as they were released: other heads, and positions that the model does not read."""
    tf.DebertaV2ForMaskedLM(CONFIGS["v3"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {
        "mask_predictions.dense.weight": np.ones((32, 32), np.float32),
        "lm_predictions.lm_head.bias": np.ones(48, np.float32),
        "deberta.embeddings.position_embeddings.weight": np.ones((20, 32), np.float32),
        "deberta.embeddings.position_ids": np.arange(20)[None],
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    models.load(tmp_path)
    loaded = models.load(tmp_path, head="classification", labels=3)
    assert loaded.params["pooler"]["dense"]["kernel"].shape == (32, 32)
    assert pj.count(loaded.params).trainable == 32 * 32 + 32 + 32 * 3 + 3
    params, forward = methods.lora(2)(KEY, loaded.params, loaded.forward)
    assert pj.count(params).trainable == 32 * 32 + 32 + 32 * 3 + 3 + 3 * 2 * 2 * 64
    batch = {"tokens": TOKENS, "mask": MASK, "labels": np.array([0, 2, 1])}
    before = copied(pj.partition(params)[1])
    tx = pj.freeze(optax.adam(3e-3), params)
    run = training.fit(forward, params, tx, lambda step: batch, 3, loss=training.classification, progress=False)
    losses = [record["loss"] for record in run.history]
    assert losses[2] < losses[1] < losses[0] and same(copied(pj.partition(run.params)[1]), before)


# -- adapters and prompts ---------------------------------------------------------------------------------------------


def of_peft(model: Any, head: str | None) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.tensor(TOKENS).long(), attention_mask=torch.tensor(MASK).long())
    scores = out.logits.numpy()
    return scores if head == "classification" else scores[:, -12:]


@pytest.mark.parametrize(("kind", "head"), [("lora", "classification"), ("prompt", "tokens")])
@pytest.mark.filterwarnings("ignore")  # HF PEFT's own
def test_peft_gives_the_same_outputs_and_back(kind: str, head: str, tmp_path: Path) -> None:
    model, base, plain = pair("v2-xxlarge", head)
    one = methods.lora(2, 3) if kind == "lora" else methods.prompt_tuning(4, start="uniform")
    params, forward = pj.chain(one, methods.unfreeze("classifier|pooler" if kind == "lora" else "classifier"))(
        KEY, base, plain
    )
    params, run = disturbed(params), compiled(forward)
    hf_peft.save(tmp_path / "a", params)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    if kind == "lora":
        assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier", "pooler.dense"]
        assert config["target_modules"] == ["query_proj", "value_proj"]
    given = Inputs(TOKENS, mask=MASK)
    wanted = np.asarray(run(params, given))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a")).eval()
    np.testing.assert_allclose(of_peft(theirs, head)[real_rows(head)], wanted[real_rows(head)], **CLOSE)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("a", "theirs"):
        again, loaded = hf_peft.load(tmp_path / folder, SimpleNamespace(params=base, forward=plain))
        assert pj.count(again).trainable == pj.count(params).trainable
        np.testing.assert_allclose(compiled(loaded)(again, given), wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_makes_by_itself(tmp_path: Path) -> None:
    """Its own targets for this architecture, and the head that it trains for classes."""
    model, base, plain = pair("v2-xxlarge", "classification")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    theirs.eval().save_pretrained(str(tmp_path))
    params, forward = hf_peft.load(tmp_path, SimpleNamespace(params=base, forward=plain))
    assert pj.count(params).trainable == 3 * 2 * 8 * 64 + 32 * 3 + 3
    found = compiled(forward)(params, Inputs(TOKENS, mask=MASK))
    np.testing.assert_allclose(found, of_peft(theirs, "classification"), **CLOSE)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_padding_on_either_side_gives_the_same(kind: str) -> None:
    _, base, plain = pair("v2-xxlarge", None)
    method = methods.prompt_tuning(4, start="uniform") if kind == "prompt" else methods.prefix_tuning(4, hidden=None)
    params, forward = method(KEY, base, plain)
    run = compiled(forward)
    right = run(params, Inputs(TOKENS, mask=MASK))[MASK]
    left = run(params, Inputs(to_the_left(TOKENS), mask=to_the_left(MASK)))[to_the_left(MASK)]
    assert differs(right, compiled(plain)(base, Inputs(TOKENS, mask=MASK))[MASK], 0.01)
    close(right, left, atol=1e-5)


def test_a_prompt_made_of_words_is_the_words() -> None:
    _, base, plain = pair("v2-xxlarge", None)
    params, forward = methods.prompt_tuning(3, text=[7, 8, 9])(KEY, base, plain)
    longer = np.concatenate([np.broadcast_to([7, 8, 9], (3, 3)), TOKENS], 1).astype(np.int32)
    close(compiled(forward)(params, TOKENS), compiled(plain)(base, longer)[:, 3:], atol=1e-5)


def test_a_prefix_has_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' own terms of positions, with zeros for the prefix, as the code of P-tuning v2 has it."""
    model, base, plain = pair("v2-xxlarge", None)
    params, forward = methods.prefix_tuning(4, hidden=None)(KEY, base, plain)
    leaf = params["ports"]["prefix_tuning"]
    before = {
        layer.attention.self: [torch.tensor(np.asarray(x[i])) for x in (leaf.keys, leaf.values)]
        for i, layer in enumerate(model.encoder.layer)
    }

    def attend(self: Any, x: Any, mask: Any, *rest: Any, relative_pos: Any, rel_embeddings: Any, **more: Any) -> Any:
        split = lambda y: self.transpose_for_scores(y, 4)  # noqa: E731
        query, key, value = (split(project(x)) for project in (self.query_proj, self.key_proj, self.value_proj))
        terms = self.disentangled_attention_bias(query, key, relative_pos, rel_embeddings, 3)
        keys, values = (y.transpose(0, 1).repeat(len(x), 1, 1) for y in before[self])
        scores = torch.cat([query @ keys.mT / 24**0.5, query @ key.mT / 24**0.5 + terms], -1).view(len(x), 4, 12, 16)
        mask = torch.nn.functional.pad(mask.bool().expand(len(x), 1, 12, 12), (4, 0), value=True)
        shares = scores.masked_fill(~mask, -1e30).softmax(-1).view(-1, 12, 16)
        y = (shares @ torch.cat([values, value], 1)).view(len(x), 4, 12, 8).transpose(1, 2)
        return y.reshape(x.shape), None

    monkeypatch.setattr(DisentangledSelfAttention, "forward", attend)
    wanted = theirs(model, None, MASK)[MASK]
    found = compiled(forward)(params, Inputs(TOKENS, types=TYPES, mask=MASK))[MASK]
    np.testing.assert_allclose(found, wanted, **CLOSE)


def test_each_row_by_its_own_adapter() -> None:
    """An adapter of the projections changes what they make of the distances, too."""
    _, base, plain = pair("v3", "tokens")
    made = {name: methods.lora(2, select=f"{name}_proj")(KEY, base, plain) for name in ("query", "key")}
    each = {name: disturbed(params) for name, (params, _) in made.items()}
    params, forward = adapters.stack(each, plain)
    found = compiled(forward)(params, TOKENS, Ports(adapter=jnp.array([0, 1, -1])))
    alone = compiled(plain)
    for row, tree in enumerate((pj.merge(each["query"]), pj.merge(each["key"]), base)):
        close(found[row], alone(tree, TOKENS)[row], atol=1e-4)
    assert differs(found[0], alone(base, TOKENS)[0])


# -- counts and errors ------------------------------------------------------------------------------------------------

BASE: dict[str, Any] = V3 | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "relative_attention": True,
    "position_buckets": 256,
    "max_relative_positions": -1,
}
XXL: dict[str, Any] = V3 | {"num_hidden_layers": 48, "relative_attention": True, "position_buckets": 256}
SIX = r"(query|key|value)_proj|output\.dense|intermediate\.dense"


def counted(config: Any, method: pj.Method) -> Any:
    def make(key: Any) -> Any:
        return method.init(key, models.from_config(config, key).params, deberta.build(config))

    return pj.count(jax.eval_shape(make, KEY))


def test_counts_of_the_papers() -> None:
    """AdaLoRA's Table 1 (DeBERTaV3-base, all six matrices), LoRA's Table 9 (DeBERTa XXL, queries and values)."""
    base = tf.DebertaV2Config(**BASE)
    for rank, trainable in ((2, 331_776), (8, 1_327_104)):
        found = counted(base, methods.lora(rank, select=SIX))
        assert found.trainable == trainable
    assert found.frozen == 183_831_552  # "184M"
    model = tf.DebertaV2Config(**XXL, conv_kernel_size=3, conv_act="gelu")
    assert counted(model, methods.lora(16)).trainable == 4_718_592
    with torch.device("meta"):
        for config in (base, model):
            assert (
                sum(p.numel() for p in tf.DebertaV2Model(config).parameters()) == counted(config, methods.lora()).frozen
            )


def test_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, message in (
        ({"pos_att_type": "p2p"}, "pos_att_type 'p2p' is not supported: c2p and p2c are"),
        ({"attention_head_size": 5}, "4 heads of 5 do not make a width of 32"),
        ({"conv_kernel_size": 3, "conv_groups": 2}, "conv_kernel_size 3 with conv_groups 2 is not supported"),
        ({"position_buckets": 7}, "7 position_buckets for distances up to 20 are not supported: give an even number"),
        ({"position_buckets": 40}, "40 position_buckets for distances up to 20 are not supported"),
        ({"hidden_act": "gulp"}, "activation 'gulp' is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            deberta.build(tf.DebertaV2Config(**SHAPE | wrong))
    with pytest.raises(ValueError, match="deberta-v2 has no head 'score'"):
        deberta.build(CONFIGS["v3"], head="score")
    model, base, plain = pair("v3", "classification")
    with pytest.raises(ValueError, match="rel_embeddings, whose numbers transformers reads past an adapter of HF PEFT"):
        hf_peft.save(tmp_path / "a", methods.lora(2, select="rel_embeddings")(KEY, base, plain)[0])
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "spm.model").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"keeps its tokenizer in spm\.model, which takes the package sentencepiece"):
        models.load(tmp_path / "m")
