"""BERT and RoBERTa against transformers in torch: features, heads, gradients, files; and the prompts before them."""

import copy
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
from safetensors.numpy import load_file
from zoo import disturbed

import peft_jax as pj
from peft_jax import Inputs, Ports, methods, models, training
from peft_jax.interop import hf_peft
from peft_jax.models import bert
from peft_jax.models.checkpoint import plan

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 48,
    "max_position_embeddings": 34,
}
CONFIGS = {
    "bert": tf.BertConfig(**SHAPE, pad_token_id=0),
    "roberta": tf.RobertaConfig(**SHAPE, pad_token_id=1, type_vocab_size=2, hidden_act="relu"),
}
CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "answers": "AutoModelForQuestionAnswering",
    None: "AutoModel",
}
pytestmark = pytest.mark.usefixtures("quick_compiles")
KEY = jax.random.key(0)
RANDOM = np.random.default_rng(1)
TOKENS = RANDOM.integers(3, 48, (3, 12)).astype(np.int32)
TYPES = RANDOM.integers(0, 2, (3, 12)).astype(np.int32)
MASK = np.arange(12)[None] < np.array([[12], [7], [9]])
WHOLE = np.ones((3, 12), bool)
BOTH = [(name, head) for name in CONFIGS for head in CLASSES]


def config_of(name: str, head: str | None) -> Any:
    config = copy.deepcopy(CONFIGS[name])
    config.num_labels = 2 if head == "answers" else 3
    return config


def pair(name: str, head: str | None, scan: bool = True, **options: Any) -> tuple[torch.nn.Module, Any, pj.Forward]:
    """The same random model on both sides."""
    config = config_of(name, head)
    make = getattr(tf, CLASSES[head])
    extra = {} if head else {"add_pooling_layer": False}
    model = make.from_config(config, attn_implementation="eager", **extra).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = key.endswith("LayerNorm.weight")
            large = 1.5 / max(parameter.shape) ** 0.5
            parameter.copy_(1 + 0.3 * noise if one else noise * (0.3 if parameter.ndim == 1 else large))
    named = {key: x for key, x in numbers(model).items() if "position_ids" not in key}
    abstract = jax.eval_shape(lambda key: bert.init(key, config, scan=scan, head=head), KEY)
    params = fill(bert.tensors(config, head), named, abstract, 3, scan)
    return model, params, bert.build(config, scan=scan, head=head, **options)


def theirs(model: torch.nn.Module, head: str | None, mask: np.ndarray = WHOLE) -> np.ndarray:
    given = {"input_ids": TOKENS, "token_type_ids": TYPES, "attention_mask": mask}
    with torch.no_grad():
        out = model(**{key: torch.tensor(x).long() for key, x in given.items()})
    if head == "answers":
        return np.stack([out.start_logits.numpy(), out.end_logits.numpy()], -1)
    return (out.logits if head else out.last_hidden_state).numpy()


@pytest.mark.parametrize(("name", "head"), BOTH)
def test_outputs_equal_torch(name: str, head: str | None) -> None:
    model, params, forward = pair(name, head)
    run = compiled(forward)
    plain, padded = theirs(model, head), theirs(model, head, MASK)
    assert plain.std() > 0.3 and differs(plain, padded, 1e-2)
    real = np.ones(3, bool) if head == "classification" else MASK
    np.testing.assert_allclose(run(params, Inputs(TOKENS, types=TYPES)), plain, **CLOSE)
    np.testing.assert_allclose(run(params, Inputs(TOKENS, types=TYPES, mask=MASK))[real], padded[real], **CLOSE)
    # Padded on the left: every row begins later, and says the same.
    shift = lambda x: np.stack([np.roll(row, 12 - n) for row, n in zip(x, MASK.sum(1), strict=True)])  # noqa: E731
    left = run(params, Inputs(shift(TOKENS), types=shift(TYPES), mask=shift(MASK)))
    np.testing.assert_allclose(left if head == "classification" else left[shift(MASK)], padded[real], **CLOSE)
    if head != "classification":  # packed
        packed = Inputs(TOKENS[:2].reshape(1, -1), types=TYPES[:2].reshape(1, -1), segments=np.repeat([[1, 2]], 12, 1))
        np.testing.assert_allclose(run(params, packed)[0], plain[:2].reshape(24, -1), **CLOSE)


@pytest.mark.parametrize(("name", "head"), [("bert", "classification"), ("roberta", "tokens"), ("bert", "answers")])
def test_losses_and_gradients_equal_torch(name: str, head: str) -> None:
    model, params, forward = pair(name, head)
    labels = RANDOM.integers(0, 3, (3, 12) if head == "tokens" else 3)
    given: dict[str, Any] = {"input_ids": TOKENS, "token_type_ids": TYPES, "attention_mask": MASK}
    batch: dict[str, Any] = {"tokens": TOKENS, "types": TYPES, "mask": MASK}
    if head == "classification":
        given, batch, loss = given | {"labels": labels}, batch | {"labels": labels}, training.classification
    elif head == "tokens":
        given["labels"] = np.where(MASK, labels, -100)
        batch |= {"targets": labels.astype(np.int32), "weights": MASK.astype(np.float32)}
        loss = training.next_token
    else:
        given |= {"start_positions": labels, "end_positions": labels + 3}
        batch |= {"starts": labels, "ends": labels + 3}
        given["attention_mask"] = np.ones_like(MASK)  # transformers would let padding be an answer
        batch["mask"] = np.ones_like(MASK)
        loss = training.answers
    out = model(**{key: torch.tensor(x).long() for key, x in given.items()})
    out.loss.backward()
    wanted = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}

    def mean(params: Any) -> Any:
        total, weight = loss(forward, params, batch)
        return total / weight

    value, found = compiled(jax.value_and_grad(mean))(params)
    assert float(value) == pytest.approx(out.loss.item(), abs=1e-5)
    truth = fill(bert.tensors(config_of(name, head), head), wanted, found, 3, True)
    for (keys, array), right in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(truth), strict=True):
        name_of = jax.tree_util.keystr(keys)
        np.testing.assert_allclose(array, right, atol=2e-5 * max(np.abs(right).max(), 1), rtol=2e-3, err_msg=name_of)


def test_unrolled_and_kept_layers_equal_scanned_ones() -> None:
    _, params, forward = pair("bert", "tokens")
    given = Inputs(TOKENS, mask=MASK)
    wanted = compiled(forward)(params, given)
    _, unrolled, loop = pair("bert", "tokens", scan=False, remat="none")
    close(compiled(loop)(unrolled, given), wanted)
    half = bert.build(config_of("bert", "tokens"), head="tokens", compute_dtype="bfloat16")
    assert jax.eval_shape(half.features, params, given, Ports()).dtype == jnp.bfloat16
    assert jax.eval_shape(half, params, given).dtype == jnp.float32


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), BOTH)
def test_transformers_loads_what_we_save_and_back(name: str, head: str | None, tmp_path: Path) -> None:
    model, params, forward = pair(name, head)
    models.save(tmp_path / "ours", models.Model(params, forward, config_of(name, head), head=head))
    extra = {} if head else {"add_pooling_layer": False}
    again = getattr(tf, CLASSES[head]).from_pretrained(tmp_path / "ours", attn_implementation="eager", **extra).eval()
    np.testing.assert_allclose(theirs(again, head, MASK), theirs(model, head, MASK), atol=1e-6)
    assert tf.AutoConfig.from_pretrained(tmp_path / "ours").architectures == [type(model).__name__]
    model.save_pretrained(tmp_path / "theirs")
    loaded = models.load(tmp_path / "theirs", head=head)
    assert same(loaded.params, params) and loaded.tokenizer is None
    assert loaded.forward.spec.labels == {None: 0, "answers": 2}.get(head, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_head_trains_and_the_pretrained_model_does_not(name: str, tmp_path: Path) -> None:
    """From a masked language model's checkpoint, whose own head nobody needs."""
    tf.AutoModelForMaskedLM.from_config(CONFIGS[name]).save_pretrained(tmp_path / "mlm")
    models.load(tmp_path / "mlm")
    loaded = models.load(tmp_path / "mlm", head="tokens", labels=5, key=jax.random.key(7))
    assert loaded.params["classifier"]["kernel"].shape == (32, 5) and loaded.forward.spec.labels == 5
    assert pj.count(loaded.params).trainable == 32 * 5 + 5
    assert compiled(loaded.forward)(loaded.params, TOKENS).shape == (3, 12, 5)
    rows = pj.trainable(loaded.params)
    assert all(jax.tree.leaves(rows["classifier"]["kernel"].value))
    assert not any(jax.tree.leaves(rows[name]))
    other = models.load(tmp_path / "mlm", head="tokens", labels=5)
    assert differs(other.params["classifier"]["kernel"].value, loaded.params["classifier"]["kernel"].value)

    params, forward = methods.p_tuning_v2(4)(KEY, loaded.params, loaded.forward)
    assert pj.count(params).trainable == 32 * 5 + 5 + 2 * 3 * 4 * 32
    targets = (TOKENS % 5).astype(np.int32)
    batch = {"tokens": TOKENS, "targets": targets, "weights": MASK.astype(np.float32), "mask": MASK}
    before = copied(pj.partition(params)[1])
    tx = pj.freeze(optax.adam(3e-2), params)
    run = training.fit(forward, params, tx, lambda step: batch, 4, progress=False, checkpoints=tmp_path / "run")
    losses = [record["loss"] for record in run.history]
    assert losses[-1] < losses[0] and same(copied(pj.partition(run.params)[1]), before)
    resumed = training.fit(forward, params, tx, lambda step: batch, 4, progress=False, checkpoints=tmp_path / "run")
    assert same(resumed.params, run.params)
    wrong = batch | {"targets": targets + 1}
    with pytest.raises(ValueError, match="batch 0: label 5 is none of the head's 5, which count from 0"):
        training.fit(forward, params, tx, lambda step: wrong, 1, progress=False)

    # Prompts leave, and what is left is a model that transformers loads.
    plain = pj.merge({key: x for key, x in run.params.items() if key != "ports"})
    models.save(tmp_path / "merged", loaded, plain)
    again = tf.AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = again(torch.tensor(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(
        compiled(bert.build(CONFIGS[name], head="tokens", labels=5))(plain, TOKENS), found, **CLOSE
    )


# -- adapters of HF PEFT ----------------------------------------------------------------------------------------------

TASKS = {"classification": "SEQ_CLS", "tokens": "TOKEN_CLS", "answers": "QUESTION_ANS", None: "FEATURE_EXTRACTION"}


def quietly(fn: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args)


def of_peft(model: Any, head: str | None, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = quietly(lambda: model(torch.tensor(TOKENS).long(), attention_mask=torch.tensor(mask).long()))
    if head == "answers":
        scores = np.stack([out.start_logits.numpy(), out.end_logits.numpy()], -1)
    else:
        scores = (out.logits if head else out.last_hidden_state).numpy()
    return scores if head == "classification" else scores[:, -12:]


PEFT: dict[str, Any] = {
    "prompt": methods.prompt_tuning(4, start="uniform"),
    "lora": methods.lora(2, 3, "query|value"),
    "vera": methods.vera(8, "query|value|intermediate", seed=5),  # two shapes
}


@pytest.mark.parametrize(
    ("kind", "name", "head"),
    [*((kind, *both) for kind in ("prompt", "lora") for both in BOTH), ("vera", "bert", "classification")],
)
def test_peft_gives_the_same_outputs_and_back(name: str, head: str | None, kind: str, tmp_path: Path) -> None:
    model, base, plain = pair(name, head)
    new = methods.unfreeze("classifier|qa_outputs") if head else pj.chain()
    params, forward = pj.chain(PEFT[kind], new)(KEY, base, plain)
    params = disturbed(params)
    if kind == "prompt" and head == "classification":
        with pytest.raises(ValueError, match=r"HF PEFT lets read the first soft token and this library .* \[CLS\]"):
            hf_peft.save(tmp_path / "a", params)
        return
    hf_peft.save(tmp_path / "a", params)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == TASKS[head]
    given = Inputs(TOKENS, mask=MASK)
    wanted = np.asarray(compiled(forward)(params, given))
    real = np.ones(3, bool) if head == "classification" else MASK
    theirs = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(model), str(tmp_path / "a")).eval()
    np.testing.assert_allclose(of_peft(theirs, head, MASK)[real], wanted[real], **CLOSE)

    again, loaded = hf_peft.load(tmp_path / "a", SimpleNamespace(params=base, forward=plain))
    np.testing.assert_allclose(compiled(loaded)(again, given), wanted, atol=1e-5)
    hf_peft.save(tmp_path / "b", again)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    quietly(theirs.save_pretrained, str(tmp_path / "theirs"))
    last, loaded = hf_peft.load(tmp_path / "theirs", SimpleNamespace(params=base, forward=plain))
    np.testing.assert_allclose(compiled(loaded)(last, given), wanted, atol=1e-5)
    assert pj.count(last).trainable == pj.count(params).trainable


@pytest.mark.parametrize("head", ["classification", "tokens", "answers"])
def test_prefixes_are_saved_as_peft_saves_them(head: str, tmp_path: Path) -> None:
    """Files alone: HF PEFT 0.21.2 does not run prefixes on the encoders of transformers 5."""
    model, base, plain = pair("roberta", head)
    params, forward = pj.chain(methods.p_tuning_v2(4), methods.unfreeze("classifier|qa_outputs"))(KEY, base, plain)
    hf_peft.save(tmp_path / "a", params)
    made = peft.PrefixTuningConfig(task_type=TASKS[head], num_virtual_tokens=4)
    quietly(quietly(peft.get_peft_model, model, made).save_pretrained, str(tmp_path / "theirs"))
    shapes = [
        {key: x.shape for key, x in load_file(tmp_path / folder / "adapter_model.safetensors").items()}
        for folder in ("a", "theirs")
    ]
    assert shapes[0] == shapes[1]
    again, loaded = hf_peft.load(tmp_path / "theirs", SimpleNamespace(params=base, forward=plain), name="p_tuning_v2")
    assert pj.count(again).trainable == pj.count(params).trainable
    again, loaded = hf_peft.load(tmp_path / "a", SimpleNamespace(params=base, forward=plain))
    close(compiled(loaded)(again, TOKENS), compiled(forward)(params, TOKENS), atol=1e-5)


def test_adapters_of_other_heads_are_refused(tmp_path: Path) -> None:
    _, base, plain = pair("bert", "tokens")
    method = pj.chain(methods.prompt_tuning(4, start="uniform"), methods.unfreeze("classifier"))
    hf_peft.save(tmp_path, method(KEY, base, plain)[0])
    for head, message in (
        ("answers", r"base_model.classifier.bias \[3\], which this model does not have"),
        (None, r"base_model.classifier.bias \[3\], which this model does not have"),
    ):
        _, other, forward = pair("bert", head)
        with pytest.raises(ValueError, match=message):
            hf_peft.load(tmp_path, SimpleNamespace(params=other, forward=forward))
    wide = models.from_config(CONFIGS["bert"], KEY, head="tokens", labels=7)
    with pytest.raises(ValueError, match=r"classifier.bias with shape \[3\], and classifier/bias .* for \[7\]"):
        hf_peft.load(tmp_path, wide)
    both = pj.chain(methods.prompt_tuning(4, start="uniform"), methods.unfreeze("LayerNorm"))
    with pytest.raises(ValueError, match=r"ports/prompt_tuning and an adapter of bert.*LayerNorm"):
        hf_peft.save(tmp_path / "b", both(KEY, base, plain)[0])


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_laws(name: str) -> None:
    """The start, merging, strip, the falling loss and frozen leaves, of LoRA and of what stands before the tokens."""
    _, base, forward = pair(name, "classification")
    method = pj.chain(methods.lora(4, 8, "query|value|dense|word_emb"), methods.unfreeze("LayerNorm|classifier$"))
    params, adapted = method(KEY, base, forward)
    given = Inputs(TOKENS, mask=MASK)
    close(compiled(adapted)(params, given), compiled(forward)(base, given))
    noisy = disturbed(params)
    close(compiled(forward)(pj.merge(noisy), given), compiled(adapted)(noisy, given), atol=1e-4)
    assert all(a is b for a, b in zip(jax.tree.leaves(pj.strip(noisy)), jax.tree.leaves(base), strict=True))
    batch = {"tokens": TOKENS, "mask": MASK, "labels": np.array([0, 2, 1])}
    before = methods.prompt_tuning(3, start="uniform"), methods.p_tuning_v2(3, dropout=0.0)
    for one in (method, *(pj.chain(methods.unfreeze("classifier"), m) for m in before)):
        params, adapted = one(KEY, base, forward)
        tx = pj.freeze(optax.adam(3e-4), params)
        frozen = copied(pj.partition(params)[1])
        run = training.fit(adapted, params, tx, lambda step: batch, 3, loss=training.classification, progress=False)
        losses = [record["loss"] for record in run.history]
        assert losses[2] < losses[1] < losses[0]
        assert same(copied(pj.partition(run.params)[1]), frozen)
        scored = training.evaluate(
            adapted, run.params, [batch], training.classification, also={"accuracy": training.label_accuracy}
        )
        answers = np.asarray(adapted(run.params, given)).argmax(-1)
        assert scored["accuracy"] == pytest.approx((answers == batch["labels"]).mean())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_padding_on_either_side_gives_the_same(name: str, kind: str) -> None:
    method = methods.prompt_tuning(4, start="uniform") if kind == "prompt" else methods.prefix_tuning(4, hidden=None)
    for head in (None, "classification"):
        _, base, plain = pair(name, head)
        params, forward = method(KEY, base, plain)
        run = compiled(forward)
        shift = lambda x: np.stack([np.roll(row, 12 - n) for row, n in zip(x, MASK.sum(1), strict=True)])  # noqa: E731
        right = run(params, Inputs(TOKENS, mask=MASK))
        left = run(params, Inputs(shift(TOKENS), mask=shift(MASK)))
        assert differs(right, compiled(plain)(base, Inputs(TOKENS, mask=MASK)), 0.01)
        if head is None:
            right, left = right[MASK], left[shift(MASK)]
        close(right, left, atol=1e-5)


def test_a_prompt_made_of_words_is_the_words() -> None:
    """An encoder's prompt is read by all tokens and reads them: as real words before a row would."""
    _, base, plain = pair("bert", None)
    params, forward = methods.prompt_tuning(3, text=[7, 8, 9])(KEY, base, plain)
    longer = np.concatenate([np.broadcast_to([7, 8, 9], (3, 3)), TOKENS], 1).astype(np.int32)
    close(compiled(forward)(params, TOKENS), compiled(plain)(base, longer)[:, 3:], atol=1e-5)


def test_bad_input_is_refused() -> None:
    config = CONFIGS["bert"]
    with pytest.raises(ValueError, match="bert has no head 'score': it has classification, tokens, answers"):
        models.from_config(config, KEY, head="score")
    with pytest.raises(ValueError, match="gpt2 has no head 'tokens': it has its own alone"):
        models.from_config(tf.GPT2Config(), KEY, head="tokens")
    with pytest.raises(ValueError, match="labels is 1: give 2 or more"):
        models.from_config(config, KEY, head="tokens", labels=1)
    with pytest.raises(ValueError, match="this bert is an encoder"):
        bert.build(tf.BertConfig(**SHAPE, is_decoder=True))
    _, params, forward = pair("roberta", None)
    with pytest.raises(ValueError, match="33 tokens and the model has 32 positions"):
        forward(params, np.zeros((1, 33), np.int32))
    _, params, forward = pair("bert", None)
    with pytest.raises(ValueError, match="bert reads a whole text at once: it keeps no key-value cache"):
        forward.features(params, Inputs(TOKENS, cache=object()), Ports())
    with pytest.raises(ValueError, match="packed rows cannot share one: pad them instead"):
        forward(params, Inputs(TOKENS, segments=np.ones_like(TOKENS)), Ports(prompt=jnp.zeros((2, 32))))
    with pytest.raises(ValueError, match="reads it with a decoder's cache, which this model does not keep"):
        methods.prefix_tuning(2, hidden=None, text=[3])(KEY, params, forward)


def test_random_weights_and_names() -> None:
    for name, config in CONFIGS.items():
        for head in CLASSES:
            made = jax.eval_shape(lambda key, c=config, h=head: models.from_config(c, key, head=h).params, KEY)
            plan(made, bert.tensors(config, head), 3, True)
        made = models.from_config(config, KEY, head="classification")
        assert np.isfinite(np.asarray(compiled(made.forward)(made.params, TOKENS))).all()
        found = pj.select(r"layer\.1\..*query", made.params, made.forward)
        assert [site.names[1] for site in found.values()] == [f"{name}.encoder.layer.1.attention.self.query"]
