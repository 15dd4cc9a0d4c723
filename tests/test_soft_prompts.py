"""Prompt tuning, prefix tuning and P-tuning v2: against HF PEFT on torch, real text in their place, and each other."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from checks import close, differs, same
from oracles.peft_models import TOKENS, assert_same_files, base, stir, stir_torch, tensors, unmerged
from oracles.torch_models import numbers, ours, torch_model

import peft_jax as pj
from peft_jax import Inputs, Ports, methods, models, training
from peft_jax.interop import hf_peft
from peft_jax.methods.prefix_tuning import Prefix, flatten, unflatten
from peft_jax.methods.prompt_tuning import majority

KEY = jax.random.key(0)
MASK = np.arange(9)[None] < np.array([[9], [6]])
METHODS = {
    "prompt": methods.prompt_tuning(4),
    "prefix": methods.prefix_tuning(4, hidden=None),
    "prefix, mlp": methods.prefix_tuning(4, hidden=8),
}


def made(name: str, method: pj.Method) -> tuple[Any, pj.Forward]:
    params, forward = method(KEY, base(name).params, base(name).forward)
    return stir(params), forward


def run(forward: pj.Forward, params: Any, tokens: Any, **options: Any) -> np.ndarray:
    given = Inputs(jnp.asarray(tokens, jnp.int32), **{k: jnp.asarray(x) for k, x in options.items()})
    return np.asarray(jax.jit(lambda params: forward(params, given))(params))


def in_peft(name: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base(name).torch(), str(folder)).eval()


def theirs(model: torch.nn.Module, mask: np.ndarray | None = None) -> np.ndarray:
    """The logits of the real tokens."""
    extra = {} if mask is None else {"attention_mask": torch.tensor(mask).long()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(torch.tensor(TOKENS).long(), **extra).logits.numpy()[:, -TOKENS.shape[1] :]


# -- HF PEFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", METHODS)
def test_peft_gives_the_same_logits(name: str, kind: str, tmp_path: Path) -> None:
    params, forward = made(name, METHODS[kind])
    wanted = unmerged(forward, params)
    assert wanted.shape[1] == TOKENS.shape[1] and differs(wanted, unmerged(base(name).forward, base(name).params), 0.1)
    hf_peft.save(tmp_path / "a", params)
    model = in_peft(name, tmp_path / "a")
    np.testing.assert_allclose(theirs(model), wanted, atol=1e-4)
    padded = run(forward, params, TOKENS, mask=MASK)
    np.testing.assert_allclose(theirs(model, MASK)[MASK], padded[MASK], atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs")
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "theirs"))

    again, loaded = hf_peft.load(tmp_path / "a", base(name).model)
    np.testing.assert_allclose(unmerged(loaded, again), wanted, atol=1e-5)
    hf_peft.save(tmp_path / "b", again, loaded)
    assert_same_files(tmp_path / "a", tmp_path / "b")


CONFIGS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix, mlp": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_we_give_the_logits_of_peft_and_train_on(name: str, kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(name).torch(), CONFIGS[kind]()).eval()
        stir_torch(model)
        model.save_pretrained(tmp_path)
    params, forward = hf_peft.load(tmp_path, base(name).model)
    np.testing.assert_allclose(unmerged(forward, params), theirs(model), atol=1e-4)
    batch = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, 1), "weights": np.ones(TOKENS.shape, np.float32)}
    fitted = training.fit(forward, params, optax.adam(1e-2), lambda step: batch, 3, progress=False)
    losses = [record["loss"] for record in fitted.history]
    assert losses[2] < losses[0]


def test_generated_tokens_equal_peft(tmp_path: Path) -> None:
    """Its forward function, run anew for each token: peft 0.21.2's own `generate` on transformers 5 writes others."""
    for kind in ("prompt", "prefix"):
        params, forward = made("llama", METHODS[kind])
        hf_peft.save(tmp_path / kind, params)
        model, text = in_peft("llama", tmp_path / kind), torch.tensor(TOKENS).long()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(6):
                text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
        found = models.generate_tokens(forward, params, TOKENS, max_new_tokens=6)
        np.testing.assert_array_equal(found, text.numpy()[:, -6:])


def test_files_for_other_models_are_refused(tmp_path: Path) -> None:
    for kind in ("prompt", "prefix"):
        hf_peft.save(tmp_path / kind, made("llama", METHODS[kind])[0])
    with pytest.raises(ValueError, match=r"prompt_embeddings with shape \[4, 48\].* ask for \[4, 96\].*another base"):
        hf_peft.load(tmp_path / "prefix", base("gpt2").model)  # as many layers, twice the key heads
    config = (tmp_path / "prompt" / "adapter_config.json").read_text()
    spoilt = {
        '"num_virtual_tokens": 4': ('"num_virtual_tokens": 5', r"shape \[4, 16\].* ask for \[5, 16\]"),
        '"num_transformer_submodules": 1': ('"num_transformer_submodules": 2', "for an encoder-decoder model"),
        '"revision": null': ('"modules_to_save": ["norm"]', "modules_to_save .* not supported"),
    }
    for old, (new, message) in spoilt.items():
        (tmp_path / "prompt" / "adapter_config.json").write_text(config.replace(old, new))
        with pytest.raises(ValueError, match=message):
            hf_peft.load(tmp_path / "prompt", base("llama").model)
    both, _ = pj.chain(METHODS["prompt"], methods.lora(2))(KEY, base("llama").params, base("llama").forward)
    with pytest.raises(ValueError, match=r"holds ports/prompt_tuning and an adapter of model.*save them apart"):
        hf_peft.save(tmp_path / "both", both)
    for half in pj.partition(made("llama", METHODS["prefix"])[0])[1:]:
        with pytest.raises(ValueError, match="ports/prefix_tuning has holes: combine"):
            hf_peft.save(tmp_path / "half", half, base("llama").forward)


# -- real text in their place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method",
    [methods.prompt_tuning(5, text=[7, 8, 9, 10, 11]), methods.prefix_tuning(5, hidden=None, text=range(7, 12))],
)
def test_a_start_from_text_is_the_text(name: str, method: pj.Method) -> None:
    """Exactly: what real tokens before the others do, a prompt or prefix made of them does."""
    params, forward = method(KEY, base(name).params, base(name).forward)
    longer = np.concatenate([np.broadcast_to(np.arange(7, 12), (2, 5)), TOKENS], 1)
    close(run(forward, params, TOKENS), run(base(name).forward, base(name).params, longer)[:, 5:], atol=1e-5)


def test_an_mlp_is_fitted_to_the_text() -> None:
    text = [7, 8, 9, 10, 11]
    fitted, _ = methods.prefix_tuning(5, hidden=64, text=text)(KEY, base("llama").params, base("llama").forward)
    random, _ = methods.prefix_tuning(5, hidden=64)(KEY, base("llama").params, base("llama").forward)
    exact, _ = methods.prefix_tuning(5, hidden=None, text=text)(KEY, base("llama").params, base("llama").forward)
    rows = lambda params: np.stack(params["ports"]["prefix_tuning"].rows())  # noqa: E731
    assert np.square(rows(fitted) - rows(exact)).mean() < 0.02 * np.square(rows(random) - rows(exact)).mean()


def test_starts_of_a_prompt() -> None:
    table = np.asarray(base("llama").params["model"]["embed_tokens"]["embedding"])

    def start(length: int = 6, **options: Any) -> np.ndarray:
        method = methods.prompt_tuning(length, **options)
        return np.asarray(method.init(KEY, base("llama").params, base("llama").forward)["ports"]["prompt_tuning"].value)

    def rows_of(value: np.ndarray) -> list[int]:
        found = [np.flatnonzero((table == row).all(1)).tolist() for row in value]
        assert all(len(ids) == 1 for ids in found)
        return [ids[0] for ids in found]

    uniform = start(30, start="uniform")
    assert uniform.min() < -0.4 and uniform.max() > 0.4 and abs(uniform).max() <= 0.5
    drawn = rows_of(start(10, common=10))
    assert sorted(drawn) == list(range(10)) and drawn != sorted(drawn)
    assert set(rows_of(start(3, common=[40, 41, 44]))) == {40, 41, 44}
    assert rows_of(start(text=[5, 6, 7, 8])) == [5, 6, 7, 8, 5, 6]
    assert rows_of(start(2, text=[5, 6, 7, 8])) == [5, 6]
    labelled = start(labels=[[3], [4, 5, 6]])
    np.testing.assert_array_equal(labelled[0], table[3])
    np.testing.assert_allclose(labelled[1], table[4:7].mean(0), atol=1e-6)
    assert len(set(rows_of(labelled[2:]))) == 4


# -- padding, packing, caches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_padding_and_packing_change_nothing(name: str, kind: str) -> None:
    params, forward = made(name, METHODS[kind])
    short = [TOKENS[0, :9], TOKENS[1, :5]]
    alone = [run(forward, params, row[None])[0] for row in short]
    left, right = np.zeros((2, 9), np.int32), np.zeros((2, 9), np.int32)
    left[0], left[1, 4:], right[0], right[1, :5] = short[0], short[1], short[0], short[1]
    padded = run(forward, params, left, mask=np.array([[True] * 9, [False] * 4 + [True] * 5]))
    close([padded[0], padded[1, 4:]], alone, atol=1e-5)
    padded = run(forward, params, right, mask=np.array([[True] * 9, [True] * 5 + [False] * 4]))
    close([padded[0], padded[1, :5]], alone, atol=1e-5)
    packed, segments = np.concatenate([*short, [0]])[None], np.array([[1] * 9 + [2] * 5 + [0]])
    positions = np.array([[*range(9), *range(5), 0]])
    for extra in ({}, {"positions": positions}):
        found = run(forward, params, packed, segments=segments, **extra)[0]
        close([found[:9], found[9:14]], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", METHODS)
def test_the_cache_takes_their_rows_and_nothing_else(name: str, kind: str) -> None:
    params, forward = made(name, METHODS[kind])
    tokens = jnp.asarray(TOKENS, jnp.int32)
    whole = run(forward, params, tokens)
    first, cache = forward(params, Inputs(tokens[:, :6], cache=forward.spec.cache(2, 9)))
    assert cache.keys.shape[2] == 9 + 4 and int(cache.filled) == 6 + 4
    second, cache = forward(params, Inputs(tokens[:, 6:8], cache=cache))
    given = Inputs(tokens[:, 8:], positions=jnp.full((2, 1), 8), cache=cache)
    third, cache = forward(params, given)
    assert cache.keys.shape[2] == int(cache.filled) == 9 + 4
    close(np.concatenate([first, second, third], 1), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["prompt", "prefix, mlp"])
def test_generating_equals_the_whole_forward(name: str, kind: str) -> None:
    """Rows of two lengths, padded on the left; greedy and by beams, against the model run anew for each token."""
    params, forward = made(name, METHODS[kind])
    tokens, mask = np.where(MASK[:, ::-1], TOKENS, 0), MASK[:, ::-1]
    found = np.asarray(models.generate_tokens(forward, params, tokens, mask, max_new_tokens=4))
    assert np.array_equal(models.generate_tokens(forward, params, tokens, mask, max_new_tokens=4, beams=1), found)
    for row, real, written in zip(tokens, mask, found, strict=True):
        text = list(row[real])
        for token in written:
            assert run(forward, params, np.array([text]))[0, -1].argmax() == token
            text.append(token)
    beams = np.asarray(models.generate_tokens(forward, params, tokens, mask, max_new_tokens=4, beams=2))
    one = np.asarray(models.generate_tokens(forward, params, tokens[1:, 3:], max_new_tokens=4, beams=2))
    np.testing.assert_array_equal(beams[1:], one)


# -- between tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_infix_stands_between_the_tokens(name: str) -> None:
    """Against a cache in which the rows were put by hand, behind the tokens before them."""
    params, forward = made(name, METHODS["prefix"])
    plain, leaf, place = base(name), params["ports"]["prefix_tuning"], np.array([5, 3])
    whole = run(forward, params, TOKENS, infix=place)
    for row, n in enumerate(place):
        cache = plain.forward.spec.cache(1, 9 + 4)
        first, cache = plain.forward(plain.params, Inputs(jnp.asarray(TOKENS[row : row + 1, :n]), cache=cache))
        keys, values = (
            x.at[:, 0, n : n + 4].set(y) for x, y in zip((cache.keys, cache.values), leaf.rows(), strict=True)
        )
        held = cache.segments.at[:, n : n + 4].set(1)
        cache = dataclasses.replace(cache, keys=keys, values=values, segments=held, filled=cache.filled + 4)
        rest, _ = plain.forward(plain.params, Inputs(jnp.asarray(TOKENS[row : row + 1, n:]), cache=cache))
        np.testing.assert_allclose(whole[row], np.concatenate([first[0], rest[0]]), atol=1e-4)
    assert differs(whole[:, 5:], unmerged(forward, params)[:, 5:], 1e-2)
    close(run(forward, params, TOKENS, infix=np.zeros(2, int)), unmerged(forward, params), atol=1e-5)
    close(run(forward, params, TOKENS, infix=np.array([9, 9])), unmerged(plain.forward, plain.params), atol=1e-5)
    left = run(forward, params, np.where(MASK[:, ::-1], np.roll(TOKENS, 3, 1), 0), mask=MASK[:, ::-1], infix=place)
    right = run(forward, params, TOKENS, mask=MASK, infix=place)
    close(left[1, 3:], right[1, :6], atol=1e-5)

    tokens, mask = np.where(MASK[:, ::-1], TOKENS, 0), MASK[:, ::-1]
    last = mask.sum(1) - 1
    found = np.asarray(models.generate_tokens(forward, params, tokens, mask, max_new_tokens=4, infix=last))
    for row, real, n, written in zip(tokens, mask, last, found, strict=True):
        text = list(row[real])
        for token in written:
            assert run(forward, params, np.array([text]), infix=np.array([n]))[0, -1].argmax() == token
            text.append(token)
    packed = {"segments": np.ones(TOKENS.shape, int), "infix": place}
    with pytest.raises(ValueError, match="packed rows hold several texts and infix names one place a row"):
        run(forward, params, TOKENS, **packed)


# -- together ---------------------------------------------------------------------------------------------------------


def test_each_row_has_its_own_prefix() -> None:
    both = [made("llama", methods.prefix_tuning(4, hidden=None, name=name)) for name in ("a", "b")]
    keys, values = zip(
        *(params["ports"][name].rows() for (params, _), name in zip(both, "ab", strict=True)), strict=True
    )
    plain, tokens = base("llama"), jnp.asarray(TOKENS, jnp.int32)
    mixed = plain.forward(plain.params, tokens, Ports(prefix=(jnp.stack(keys, 1), jnp.stack(values, 1))))
    apart = [unmerged(forward, params)[row] for row, (params, forward) in enumerate(both)]
    close(mixed, np.stack(apart), atol=1e-5)
    soft = jnp.asarray(np.random.RandomState(0).standard_normal((2, 3, 16)), jnp.float32)
    mixed = plain.forward(plain.params, tokens, Ports(prompt=soft))
    close(mixed, np.stack([plain.forward(plain.params, tokens, Ports(prompt=soft[i]))[i] for i in (0, 1)]), atol=1e-5)


def test_an_ensemble_is_one_batch() -> None:
    """Several prompts on one frozen model: vmap over the prompts, the majority of their answers."""
    prompts = [made("llama", methods.prompt_tuning(3, name=str(i)))[0]["ports"][str(i)].value for i in range(3)]
    plain, tokens = base("llama"), jnp.asarray(TOKENS, jnp.int32)
    rows, soft = jnp.tile(tokens, (3, 1)), jnp.repeat(jnp.stack(prompts), 2, 0)
    answers = plain.forward(plain.params, rows, Ports(prompt=soft))[:, -1].argmax(-1).reshape(3, 2)
    voted = majority(answers)
    alone = [plain.forward(plain.params, tokens, Ports(prompt=p))[:, -1].argmax(-1) for p in prompts]
    np.testing.assert_array_equal(answers, np.stack(alone))
    assert majority(jnp.array([[1, 2], [3, 2], [1, 0]])).tolist() == [1, 2]
    assert majority(jnp.array([[4, 5], [3, 2]])).tolist() == [4, 5]  # a tie goes to the first prompt
    assert voted.shape == (2,)


@pytest.mark.parametrize("kind", ["prompt", "prefix, mlp"])
def test_with_lora_in_either_order(kind: str) -> None:
    lora = methods.lora(2, dropout=0.1)
    made_by = [pj.chain(*pair) for pair in ((METHODS[kind], lora), (lora, METHODS[kind]))]
    (one, first), (two, second) = (m(KEY, base("llama").params, base("llama").forward) for m in made_by)
    assert same(jax.tree.leaves(one), jax.tree.leaves(two))
    one = stir(one)
    close(unmerged(first, one), unmerged(second, one), atol=1e-6)
    alone, _ = METHODS[kind](KEY, base("llama").params, base("llama").forward)
    assert same(two["ports"], alone["ports"]), "a method's draws depend on its company"
    batch = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, 1), "weights": np.ones(TOKENS.shape, np.float32)}
    run = training.fit(second, two, pj.freeze(optax.adam(1e-2), two), lambda step: batch, 2, progress=False)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), pj.partition(run.params)[0], pj.partition(two)[0])
    assert all(jax.tree.leaves(moved))


def test_two_prompts_and_two_prefixes_stand_side_by_side() -> None:
    plain, tokens = base("llama"), jnp.asarray(TOKENS, jnp.int32)
    method = pj.chain(methods.prompt_tuning(2, name="a"), methods.prompt_tuning(3, name="b"))
    params, forward = method(KEY, plain.params, plain.forward)
    both = jnp.concatenate([params["ports"][name].value for name in "ab"])
    close(forward(params, tokens), plain.forward(plain.params, tokens, Ports(prompt=both)), atol=1e-5)
    assert forward.spec.positions == 32 - 5
    method = pj.chain(*(methods.prefix_tuning(n, hidden=None, name=name) for n, name in ((2, "a"), (3, "b"))))
    params, forward = method(KEY, plain.params, plain.forward)
    both = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *(params["ports"][name].rows() for name in "ab"))
    close(forward(params, tokens), plain.forward(plain.params, tokens, Ports(prefix=both)), atol=1e-5)
    rows = jax.tree.map(lambda x: jnp.stack([x, 2 * x], 1), both)
    wanted = jax.tree.map(lambda x, more: jnp.concatenate([jnp.stack([x, x], 1), more], 2), both, rows)
    mixed = plain.forward(plain.params, tokens, Ports(prefix=wanted))
    close(forward(params, tokens, Ports(prefix=rows)), mixed, atol=1e-5)


def test_baking_keeps_the_function_and_drops_the_mlp() -> None:
    params, forward = made("llama", METHODS["prefix, mlp"])
    baked = methods.bake(params)
    close(unmerged(forward, baked), unmerged(forward, params), atol=1e-5)
    assert isinstance(baked["ports"]["prefix_tuning"], Prefix)
    assert pj.count(baked).trainable == 2 * 3 * 8 * 4  # 2 · layers · d · l
    assert pj.count(params).trainable == 4 * 16 + 16 * 8 + 8 + (8 + 1) * 2 * 3 * 8
    with pytest.raises(ValueError, match="no reparametrised prefix called 'b' here: prefix_tuning"):
        methods.bake(params, "b")
    with pytest.raises(ValueError, match="no reparametrised prefix here: none at all"):
        methods.bake(baked)


def test_the_layout_of_the_papers_code() -> None:
    rows = jnp.arange(3 * 2 * 2 * 2 * 4.0).reshape(3, -1)
    keys, values = unflatten(rows, (2, 2, 4))
    view = np.asarray(rows).reshape(3, 4, 2, 4)  # K of layer l is [:, 2l], V is [:, 2l + 1]
    for layer in (0, 1):
        np.testing.assert_array_equal(keys[layer], view[:, 2 * layer])
        np.testing.assert_array_equal(values[layer], view[:, 2 * layer + 1])
    np.testing.assert_array_equal(flatten(keys, values), rows)


def test_dropout_acts_in_training_only() -> None:
    params, forward = made("llama", methods.prefix_tuning(4, hidden=None, dropout=0.5))
    _, without = made("llama", METHODS["prefix"])
    tokens = jnp.asarray(TOKENS, jnp.int32)
    plain = forward(params, tokens)
    close(plain, without(params, tokens), atol=0)
    dropped = [forward(params, tokens, Ports(micro_key=jax.random.key(i))) for i in (0, 1, 0)]
    assert differs(dropped[0], plain) and differs(dropped[0], dropped[1])
    close(dropped[0], dropped[2], atol=0)


def test_unrolled_layers_have_the_same_prefix() -> None:
    params, forward = made("llama", METHODS["prefix"])
    config = base("llama").config
    unrolled, loop = ours(config, numbers(torch_model(config)), scan=False)
    again, loop = METHODS["prefix"](KEY, unrolled, loop)
    again["ports"] = params["ports"]
    close(unmerged(loop, again), unmerged(forward, params), atol=1e-5)


def test_bad_input_is_refused() -> None:
    plain = base("llama")

    def refused(message: str, method: pj.Method, forward: pj.Forward = plain.forward) -> None:
        with pytest.raises(ValueError, match=message):
            method(KEY, plain.params, forward)

    for factory in (methods.prompt_tuning, methods.prefix_tuning, methods.p_tuning_v2):
        with pytest.raises(ValueError, match="length is 0: give the number of"):
            factory(0)
        refused("of 32 rows leaves real tokens none of the 32 positions", factory(32))
        refused("already applied: give this one another name=", pj.chain(factory(2), factory(3)))
        bare = pj.Forward(lambda params, inputs, ports: inputs.tokens)
        refused(
            r"has no port '(prompt|prefix)' \(it has none\): let its features read ports\.(prompt|prefix)",
            factory(2),
            bare,
        )
        params, forward = factory(4)(KEY, plain.params, plain.forward)
        with pytest.raises(ValueError, match="29 tokens and the model has 28 positions"):
            forward(params, jnp.zeros((1, 29), jnp.int32))
        with pytest.raises(ValueError, match="exceed the model's 28 positions"):
            models.generate_tokens(forward, params, TOKENS, max_new_tokens=20)
        with pytest.raises(ValueError, match=r"the tree lacks ports/.*give it the method's params"):
            forward(plain.params, jnp.zeros((1, 4), jnp.int32))
        with pytest.raises(ValueError, match="acts beside the weights and cannot be merged"):
            pj.merge(params)
        assert same(pj.strip(params), plain.params)
    too_long = pj.chain(methods.prompt_tuning(20, name="a"), methods.prompt_tuning(20, name="b"))
    refused("a prompt of 20 rows leaves real tokens none of the 12 positions", too_long)
    for options, message in (
        ({"start": "labels"}, "start is 'labels': choose one of uniform, vocabulary, or give labels="),
        ({"labels": []}, "a start from class labels needs the token ids"),
        ({"labels": [[1], []]}, "a start from class labels needs the token ids"),
        ({"labels": [[1]] * 3, "length": 2}, "3 class labels do not fit into a prompt of 2"),
        ({"text": []}, "text that the prompt is to start as has no tokens"),
        ({"text": [1], "labels": [[1]]}, "two ways to start a prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.prompt_tuning(**options)
    refused("token id 48 is outside the vocabulary of 48", methods.prompt_tuning(2, text=[1, 48]))
    refused("9 soft tokens cannot be drawn without replacement from 5", methods.prompt_tuning(9, common=5))
    for options, message in (
        ({"hidden": 0}, "hidden is 0"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"text": []}, "text that the prefix is to start as has no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.prefix_tuning(**options)
    refused("token id 48 is outside the vocabulary of 48", methods.prefix_tuning(2, text=[48]))
    foreign = Ports(prefix=(jnp.zeros((3, 2, 4, 4)), jnp.zeros((3, 2, 4, 4))))
    with pytest.raises(
        ValueError, match="the prefix has 4 key heads of 4 and this model 2 of 4: it is another model's"
    ):
        plain.forward(plain.params, jnp.zeros((1, 4), jnp.int32), foreign)
