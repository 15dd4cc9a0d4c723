"""Serving on four devices: the answers of one, each device's own part of everything, and the paper's collectives."""

import collections
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
import zoo
from test_serving_pool import noisy

from peft_jax import methods, models, quant, sharding, trees
from peft_jax.core import Spec
from peft_jax.interop import hf_peft
from peft_jax.serving import engine as serving_engine
from peft_jax.serving import packing, pool, step, tensor
from peft_jax.serving.__main__ import arguments
from peft_jax.serving.building import build_engine
from peft_jax.serving.engine import Engine
from peft_jax.serving.requests import Sampling
from peft_jax.serving.step import Shapes

pytestmark = pytest.mark.usefixtures("quick_compiles")
N, LAYERS, WIDTH, VOCAB, RANK = 4, 2, 32, 64, 8
CONFIG = transformers.LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
SHAPES = Shapes(rows=(4,), prompts=4, chunk=4, context=(16,), ranks=(RANK,))
MODEL = models.from_config(CONFIG, zoo.KEY)
MODEL = dataclasses.replace(MODEL, params=jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, MODEL.params))
KINDS = {  # ranks that four devices divide and do not, fewer than devices; missing modules
    "r5": methods.lora(5, 8, "(q|k|v|o)_proj"),
    "r8": methods.lora(8, 4, "(q|gate|up|down)_proj"),
    "r3": methods.lora(3, 8, "(v|down)_proj", rslora=True),
}
ASKED = [(zoo.TEXT[i, :n].tolist(), name) for i, (n, name) in enumerate(zip((3, 4, 7, 2), (None, *KINDS), strict=True))]
OTHER = [
    (zoo.TEXT[i, :n].tolist(), name)
    for i, (n, name) in enumerate(zip((6, 1, 5, 9), ("r3", "r5", None, "r8"), strict=True))
]


def over() -> Any:
    return sharding.mesh(tensor=N, devices=jax.devices()[:N])


def adapted(name: str) -> Any:
    i = list(KINDS).index(name)
    return noisy(KINDS[name](jax.random.key(i), MODEL.params, MODEL.forward)[0], i)


def run(made: Engine, asked: Any) -> list[Any]:
    """(token, log-probabilities of the most probable ones) of each request, in order."""
    options = Sampling(max_tokens=6, ignore_end=True, logprobs=5)
    ids = [made.submit(prompt, options, name) for prompt, name in asked]
    found: dict[int, list[Any]] = {i: [] for i in ids}
    while made.busy:
        for event in made.step():
            found[event.request] += zip(event.tokens, event.logprobs or (), strict=True)
    return [found[i] for i in ids]


@pytest.fixture(scope="module")
def served(tmp_path_factory: Any) -> Any:
    """The same requests on one device and on four."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in KINDS:
        hf_peft.save(folder / name, adapted(name), MODEL.forward)
    made = {}
    for devices, mesh in ((1, None), (N, over())):
        made[devices] = Engine(MODEL, rows=20_000, shapes=SHAPES, mesh=mesh, prefix_block=0)
        for name in KINDS:
            made[devices].load(name, folder / name)
    return SimpleNamespace(engine=made[N], device=made[N].device, found={n: run(e, ASKED) for n, e in made.items()})


def test_four_devices_answer_as_one_does(served: Any) -> None:
    tokens = {n: [[token for token, _ in each] for each in found] for n, found in served.found.items()}
    assert tokens[N] == tokens[1]
    assert len({tuple(x) for x in tokens[1]}) == len(ASKED) and {len(x) for x in tokens[1]} == {6}
    each = ([x for request in found for x in request] for found in served.found.values())
    for one, four in zip(*each, strict=True):
        assert [token for token, _ in one[1].top] == [token for token, _ in four[1].top]
        np.testing.assert_allclose([x for _, x in one[1].top], [x for _, x in four[1].top], rtol=0, atol=1e-4)


def test_nothing_new_is_compiled_for_other_requests(served: Any) -> None:
    before = step._step._cache_size(), step._write._cache_size(), len(served.device.programs)
    run(served.engine, OTHER)
    assert before == (step._step._cache_size(), step._write._cache_size(), len(served.device.programs))


def test_each_device_holds_its_own_part_and_no_step_copies_it(served: Any) -> None:
    device = served.device
    assert {x.data.shape for x in device.rows.addressable_shards} == {(LAYERS, 20_000, 4 * 4 // N)}
    for path, leaf in trees.leaves(device.params).items():
        if path[-1] == "kernel":
            split = jax.tree.leaves(getattr(leaf, "base", leaf))[0]
            assert split.addressable_shards[0].data.size * N == split.size, path
    for time in (1, SHAPES.chunk):
        used = compiled(device, time, RANK).memory_analysis()
        assert used.alias_size_in_bytes >= device.nbytes // N > 4 * used.temp_size_in_bytes


def compiled(device: Any, time: int, rank: int) -> Any:
    """One of the programs that have run, which is not compiled again."""
    return device.lower(serving_engine._empty(4, time, 16, device, rank)).compile()


@pytest.mark.parametrize("time", [1, SHAPES.chunk])
def test_the_collectives_are_the_paper_s(served: Any, time: int) -> None:
    """Section 6, in numbers a device sends (rings): 5(N−1)Tr/N for attention beside the base's 2(N−1)TH/N."""
    tokens = 4 * time
    found = {rank: sharding.collectives(compiled(served.device, time, rank)) for rank in (0, RANK)}
    assert {c.devices for cs in found.values() for c in cs} == {N}
    assert all(
        array.startswith("f32") and len(c.arrays) == 1 for cs in found.values() for c in cs for array in c.arrays
    )

    def times(cs: Any) -> dict[tuple[str, int], int]:
        total = collections.Counter[tuple[str, int]]()
        for c in cs:
            total[c.kind, c.bytes // 4] += c.times
        return dict(total)

    # Each layer's two blocks, the embedding; and the logits of each row's last token.
    base = {("all-reduce", tokens * WIDTH): 2 * LAYERS + 1, ("all-gather", 4 * VOCAB): 1}
    assert times(found[0]) == base
    adapters = {("all-gather", tokens * RANK): 5 * LAYERS, ("all-reduce", tokens * RANK): 2 * LAYERS}
    assert times(found[RANK]) == base | adapters

    def sent(where: str, numbers: int) -> float:
        ring = {"all-gather": 1, "all-reduce": 2}
        mine = [c for c in found[RANK] if f"/{where}/" in c.where and c.bytes == 4 * numbers]
        return sum(c.times * ring[c.kind] * (N - 1) / N * numbers for c in mine) / LAYERS

    share = (N - 1) / N
    assert sent("self_attn", tokens * RANK) == 5 * share * tokens * RANK  # gathers of q, k, v; the reduction of o
    assert sent("mlp", tokens * RANK) == 4 * share * tokens * RANK  # gathers of gate, up; the reduction of down
    assert sent("self_attn", tokens * WIDTH) == sent("mlp", tokens * WIDTH) == 2 * share * tokens * WIDTH


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_an_adapter_s_columns_are_what_each_device_needs(rank: int, ends: bool) -> None:
    """By hand, number by number: with a table that has room for more directions, too."""
    width, inputs, outputs = 16, 24, 36
    target = pool.Target(("w",), inputs, outputs, N, ends)
    random = np.random.RandomState(rank)
    a, b = (random.standard_normal((LAYERS, rank, n)).astype(np.float32) for n in (inputs, outputs))
    rows = [packing._flat(x, width, np.float32) for x in packing.parts_of(a, b, target)]
    room = target.rows(RANK, width)
    assert all(len(x[0]) <= n for x, n in zip(rows, room, strict=True))
    if rank == RANK:  # as many rows as one device takes
        assert [len(x[0]) for x in rows] == list(target._replace(devices=1, ends=False).rows(rank, width)) == list(room)
    for d in range(N):
        mine = [x[:, :, d * width // N : (d + 1) * width // N].reshape(LAYERS, -1) for x in rows]
        for j in range(rank):
            if ends:
                part = slice(j * inputs // N, (j + 1) * inputs // N)
                np.testing.assert_array_equal(mine[0][:, part], a[:, j, d * inputs // N : (d + 1) * inputs // N])
            elif j % N == d:
                np.testing.assert_array_equal(mine[0][:, j // N * inputs : (j // N + 1) * inputs], a[:, j])
            part = slice(j * outputs // N, (j + 1) * outputs // N)
            np.testing.assert_array_equal(mine[1][:, part], b[:, j, d * outputs // N : (d + 1) * outputs // N])
    held = sum(np.count_nonzero(x) for x in rows)
    assert held == np.count_nonzero(a) + np.count_nonzero(b), "every number lies on one device, once"


def test_a_base_in_four_bits_is_split_too() -> None:
    """Its numbers are made where its codes lie: neither is gathered."""
    params, forward = quant.quantise(quant.nf4(block_size=4, double=False), trees.LAYER_MATRICES)(
        zoo.KEY, MODEL.params, MODEL.forward
    )
    found = []
    for mesh in (None, over()):
        targets = pool.targets_of(forward, params, mesh)
        device = step.Device(forward, params, targets, 400, mesh=mesh)
        packed = packing.pack(adapted("r8"), targets, device.width, np.float32)
        rows = np.random.RandomState(0).permutation(np.arange(1, 400))[: packed.block.shape[1]]
        device.put(rows, packed.block)
        batch = serving_engine._empty(4, 1, 16, device, RANK)
        batch.adapters[1:3] = device.table(packed.ids(rows), RANK)
        batch.tokens[:, 0], batch.new[:] = (5, 5, 6, 6), 1
        found.append(device.step(dataclasses.replace(batch, ranked=np.bool_(True))))
        said = sharding.collectives(device.lower(batch).compile())
        assert not any("u8" in array for c in said for array in c.arrays)
        assert max((c.bytes for c in said), default=0) <= 4 * 4 * VOCAB, "the logits are the largest thing that travels"
    np.testing.assert_allclose(found[0].top_logprob, found[1].top_logprob, rtol=0, atol=1e-4)
    assert not np.allclose(found[0].top_logprob[0], found[0].top_logprob[1], atol=1e-2), "the adapter does something"


def test_meshes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 key heads \(for 9 heads\) do not divide over the 4 devices .* 'tensor'"):
        tensor.check(Spec(heads=9, kv_heads=3), {}, over())  # SmolLM2
    for mesh, words in (
        (sharding.mesh(data=2, tensor=4), "axis 'data' has 2 devices: serving splits over 'tensor' alone"),
        (jax.sharding.Mesh(np.array(jax.devices()[:4]), ("model",)), "axes model: serving needs one called 'tensor'"),
        (sharding.mesh(tensor=8), r"4 key heads \(for 8 heads\) do not divide over the 8 devices"),
    ):
        with pytest.raises(ValueError, match=words):
            Engine(MODEL, rows=100, shapes=SHAPES, mesh=mesh)
    split = dataclasses.replace(MODEL, params=sharding.shard(MODEL.params, MODEL.forward, over()))
    with pytest.raises(ValueError, match="the model lies on 4 devices: give the mesh"):
        Engine(split, rows=100, shapes=SHAPES)
    odd = {"model": {"layers": {"mlp": {"up_proj": {"kernel": jnp.ones((LAYERS, 6, 9))}}}}}
    with pytest.raises(ValueError, match="up_proj/kernel is 6 x 9, and the mesh's axis 'tensor' of 4 divides neither"):
        pool.targets_of(MODEL.forward, odd, over())


def test_the_command_line_splits_a_model(tmp_path: Any) -> None:
    models.save(tmp_path / "model", MODEL)
    assert arguments(["--model", "x", "--tensor", "4"]).tensor == 4
    made = build_engine(tmp_path / "model", tensor=N, context=16, rows=100, warm_up=False)
    rows = made.device.rows
    assert math.prod(rows.addressable_shards[0].data.shape) * N == rows.size
    assert rows.sharding.mesh.shape["tensor"] == N == len(rows.sharding.device_set)
    with pytest.raises(ValueError, match="tensor is 9 and JAX finds 8 devices"):
        build_engine(tmp_path / "model", tensor=9)
