"""The engine: whatever it does with rows and rounds, each request gets the tokens that it would get alone."""

import dataclasses
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import zoo
from safetensors.numpy import load_file, save_file
from test_serving_pool import noisy

import peft_jax as pj
from peft_jax import methods, models, quant
from peft_jax.interop import hf_peft
from peft_jax.models.generation import generate_tokens
from peft_jax.serving import engine as serving_engine
from peft_jax.serving import packing, pool, step
from peft_jax.serving.engine import Engine
from peft_jax.serving.requests import Refused, Sampling
from peft_jax.serving.rounds import Limits
from peft_jax.serving.rows import Allocator
from peft_jax.serving.step import Shapes

pytestmark = pytest.mark.usefixtures("quick_compiles")
SHAPES = Shapes(rows=(4,), prompts=2, chunk=4, context=(32,), ranks=(8, 64))
KINDS = {  # ranks 4, 8, 16, 64; missing modules; scales of their own
    "r4": methods.lora(4, 8, "(q|k|v|o)_proj"),
    "r8": methods.lora(8, 4, "(q|up|down)_proj"),
    "r16": methods.lora(16, 8, "v_proj", rslora=True),
    "r64": methods.lora(64, 64, "down_proj", layers=[0, 2]),
}
MODEL = models.from_config(zoo.CONFIGS["llama"], zoo.KEY)
MODEL = dataclasses.replace(MODEL, params=jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, MODEL.params))


RANDOM = np.random.RandomState(0)
ASKED = [  # (prompt, adapter): chunks of unequal number, each adapter twice
    (RANDOM.randint(0, zoo.VOCAB, n).tolist(), name)
    for n, name in zip((3, 9, 14, 1, 6, 11, 2, 8, 5, 17), [*KINDS, None] * 2, strict=True)
]
NEW = 7


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Any:
    """Adapters in HF PEFT's format; and what each request writes alone, on merged weights."""
    folder, merged = tmp_path_factory.mktemp("adapters"), {None: MODEL.params}
    for i, (name, method) in enumerate(KINDS.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # rank 64 is above these matrices' own
            params, _ = method(jax.random.key(i), MODEL.params, MODEL.forward)
        params = noisy(params, i)
        hf_peft.save(folder / name, params, MODEL.forward)
        merged[name] = pj.merge(params)
    alone = [
        np.asarray(generate_tokens(MODEL.forward, merged[name], np.array([prompt]), max_new_tokens=NEW))[0].tolist()
        for prompt, name in ASKED
    ]
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    return SimpleNamespace(folder=folder, alone=alone)


def engine(saved: Any, left: int = 4000, model: Any = MODEL, **options: Any) -> Engine:
    """An engine that gives out so many rows; all have pools of one size, and share their programs."""
    with mock.patch.object(serving_engine, "Allocator", return_value=Allocator(left)):
        made = Engine(model, rows=4000, shapes=SHAPES, **options)
    identities = [made.load(name, saved.folder / name) for name in KINDS]
    made.store.prefetch(identities)  # who joins a batch must not hang on how fast a disk is
    while made.store.copies.reading:
        made.store.wait(60)
        made.store.poll()
    return made


def run(engine: Engine, asked: Any = ASKED, **sampling: Any) -> tuple[list[list[int]], list[Any]]:
    """The tokens of all requests, and their last events."""
    ids = [engine.submit(prompt, Sampling(**{"max_tokens": NEW, **sampling}), name) for prompt, name in asked]
    tokens, last = {i: list[int]() for i in ids}, dict[int, Any]()
    for _ in range(10_000):
        if not engine.busy:
            break
        for event in engine.step():
            tokens.setdefault(event.request, []).extend(event.tokens)
            if event.finish:
                last[event.request] = event
    assert not engine.busy and set(last) >= set(ids)
    rows = engine.scheduler.rows()
    assert rows["rows_kv"] == 0, "a request has left rows behind"
    assert rows["rows_free"] + rows["rows_adapters"] + rows["rows_prefixes"] == rows["rows_total"]
    return [tokens[i] for i in ids], [last[i] for i in ids]


def pool_rows(saved: Any) -> dict[str, int]:
    """How many rows each adapter takes."""
    targets = pool.targets_of(MODEL.forward, MODEL.params)
    read = lambda name: packing.read(saved.folder / name, MODEL, targets, zoo.KV, np.float32)  # noqa: E731
    return {name: read(name).block.shape[1] for name in KINDS}


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_mixed_batch_writes_what_each_request_writes_alone_and_compiles_nothing_new(saved: Any) -> None:
    made = engine(saved)
    programs = made.warm_up()
    assert programs == 2 * 3 + 12, "chunks and single tokens, at three ranks; adapters of up to 2048 rows"
    compiled = step._step._cache_size(), step._write._cache_size()
    tokens, last = run(made)
    assert (step._step._cache_size(), step._write._cache_size()) == compiled
    assert tokens == saved.alone
    assert [event.finish for event in last] == ["length"] * len(ASKED)
    assert [event.usage.prompt for event in last] == [len(prompt) for prompt, _ in ASKED]
    assert min(made.gaps.values()) > 1e-4, "near-ties would make exactness a matter of luck"
    assert made.stats()["compilations_total"] == programs
    made.close()


def test_evicted_and_loaded_again(saved: Any) -> None:
    """A pool that holds one large adapter at a time."""
    largest = max(pool_rows(saved).values())
    tokens, _ = run(made := engine(saved, largest + 60, prefix_block=0))
    assert tokens == saved.alone
    stats = made.stats()
    assert stats["adapter_evictions_total"] > 0 and stats["adapter_loads_total"] > len(KINDS)


def test_preempted_and_computed_again(saved: Any) -> None:
    """A pool with room for the prompts of four requests, but not for all that they write."""
    asked = [ask for ask in ASKED if ask[1] in ("r16", None)]
    made = engine(saved, pool_rows(saved)["r16"] + 100, limits=Limits(optimism=0.0), prefix_block=0)
    tokens, _ = run(made, asked)
    assert tokens == [alone for ask, alone in zip(ASKED, saved.alone, strict=True) if ask in asked]
    assert made.stats()["preemptions_total"] > 0


def test_what_was_computed_before_is_found_again_by_the_same_load_alone(saved: Any) -> None:
    made = engine(saved, prefix_block=2)
    assert run(made)[0] == saved.alone
    before = made.stats()["prefix_hit_tokens_total"]
    tokens, last = run(made)
    assert tokens == saved.alone
    hits = [event.usage.cached for event in last]
    assert hits == [(len(prompt) - 1) // 2 * 2 for prompt, _ in ASKED]
    assert made.stats()["prefix_hit_tokens_total"] - before == sum(hits)
    for name in KINDS:  # another load of the same name
        made.load(name, saved.folder / name)
    again, last = run(made)
    assert again == saved.alone
    assert [event.usage.cached > 0 for event in last] == [name is None and len(p) > 2 for p, name in ASKED]


def test_a_base_in_few_bits(saved: Any) -> None:
    params, forward = quant.quantise(quant.nf4(16), progress=False)(zoo.KEY, MODEL.params, MODEL.forward)
    model = dataclasses.replace(MODEL, params=params, forward=forward)
    asked = ASKED[3:5]
    tokens, _ = run(engine(saved, model=model), asked)
    for (prompt, name), found in zip(asked, tokens, strict=True):
        tree, run_alone = hf_peft.load(saved.folder / name, model) if name else (params, forward)
        alone = generate_tokens(run_alone, tree, np.array([prompt]), max_new_tokens=NEW)
        assert found == np.asarray(alone)[0].tolist()


# -- draws ------------------------------------------------------------------------------------------------------------


def test_a_seed_s_draws_do_not_depend_on_the_batch(saved: Any) -> None:
    made = engine(saved)
    options = {"temperature": 1.0, "seed": 5, "top_p": 0.95}
    together, _ = run(made, **options)
    apart = [run(made, [ask], **options)[0][0] for ask in ASKED[:3]]
    assert together[:3] == apart and together != saved.alone
    assert run(made, ASKED[:3], **{**options, "seed": 6})[0] != apart
    assert run(made, temperature=1.0, top_k=1)[0] == saved.alone


def test_probabilities_are_those_of_the_model(saved: Any) -> None:
    made = engine(saved)
    prompt, name = ASKED[1]
    made.submit(prompt, Sampling(max_tokens=3, logprobs=4), name)
    events = [event for _ in range(20) if made.busy for event in made.step()]
    params, forward = hf_peft.load(saved.folder / name, MODEL)
    tokens = [token for event in events for token in event.tokens]
    shares = np.asarray(jax.nn.log_softmax(forward(params, np.array([prompt + tokens]))[0]))
    for i, event in enumerate(events):
        row, (told,) = shares[len(prompt) - 1 + i], event.logprobs
        np.testing.assert_allclose(told.logprob, row[told.token], atol=1e-4)
        assert [token for token, _ in told.top] == np.argsort(-row)[:4].tolist()
        np.testing.assert_allclose([share for _, share in told.top], np.sort(row)[::-1][:4], atol=1e-4)


# -- ends and refusals ------------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_refused_with_a_reason(saved: Any, tmp_path: Path) -> None:
    made = engine(saved)
    for prompt, sampling, adapter, status, words in (
        ([1], Sampling(), "nobody", 404, "no adapter is loaded as 'nobody'"),
        ([1] * 30, Sampling(max_tokens=4), None, 400, "exceed the 32 tokens that a request has"),
        ([], Sampling(), None, 400, "the prompt is empty"),
        ([zoo.VOCAB], Sampling(), None, 400, "not in the vocabulary of 64"),
        ([1], Sampling(logprobs=50), None, 400, "20 are told at most"),
    ):
        with pytest.raises(Refused, match=words) as refused:
            made.submit(prompt, sampling, adapter)
        assert refused.value.status == status
    with pytest.raises(Refused, match="'base' is the base's name"):
        made.load("base", saved.folder / "r4")
    with pytest.raises(FileNotFoundError):
        made.load("empty", tmp_path)
    # Broken adapters: their own requests are told, and nobody else's.
    for name in ("cut", "nan", "other"):
        shutil.copytree(saved.folder / "r4", tmp_path / name)
        made.load(name, tmp_path / name)
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    for name, factor in (("nan", np.nan), ("other", 1.0)):
        file = tmp_path / name / "adapter_model.safetensors"
        tensors = {key: factor * x for key, x in load_file(file).items()}
        if name == "other":
            tensors = {key: x[..., :5].copy() if "lora_A" in key else x for key, x in tensors.items()}
        save_file(tensors, file)
    asked = [([1, 2, 3], name) for name in ("cut", "nan", "other")]
    _, last = run(made, [*asked, *ASKED[:2]])
    assert [event.finish for event in last] == ["error"] * 3 + ["length"] * 2
    for event, words in zip(last, ("cut", "NaN", "q_proj"), strict=False):
        assert words in event.reason, event.reason


def test_cancelled_requests_leave_nothing(saved: Any) -> None:
    made = engine(saved)
    ids = [made.submit(prompt, Sampling(max_tokens=NEW), name) for prompt, name in ASKED]
    made.cancel(ids[0])
    for _ in range(6):
        made.step()
    for i in ids[1:6]:
        made.cancel(i)
    made.cancel(10_000)
    tokens, _ = run(made, ASKED[:3])
    assert tokens == saved.alone[:3]
    assert made.stats()["requests_finished_total{cancelled}"] == 6
    assert {info.users for info in made.adapters()} == {0}


def test_only_decoders_with_stacked_layers_are_served() -> None:
    unrolled = models.from_config(zoo.CONFIGS["llama"], zoo.KEY, scan=False)
    for model, words in ((unrolled, "scan=True"), (models.from_config(zoo.CONFIGS["t5"], zoo.KEY), "only decoders")):
        with pytest.raises(ValueError, match=words):
            Engine(model, rows=100)
    with pytest.raises(ValueError, match="context=64: the model has 32 positions"):
        Engine(MODEL, rows=100, context=64)
