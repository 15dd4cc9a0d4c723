"""The pool and the step over it: each row of a batch gives what its request gives alone, on merged weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
import zoo
from checks import close

import peft_jax as pj
from peft_jax import methods, models, trees
from peft_jax.models.generation import generate_tokens
from peft_jax.serving import packing, pool, step

pytestmark = pytest.mark.usefixtures("quick_compiles")
KINDS = {
    "llama": zoo.CONFIGS["llama"],
    "mistral": zoo.CONFIGS["mistral"],
    "gpt2": zoo.CONFIGS["gpt2"],
    "gemma2": transformers.Gemma2Config(
        **zoo.SIZES, head_dim=8, sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **zoo.SIZES,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        tie_word_embeddings=False,
    ),
}


def noisy(params: Any, seed: int) -> Any:
    """Adapters that have learnt something."""
    random = np.random.RandomState(seed)
    grown = lambda path, w: dataclasses.replace(w, b=jnp.asarray(0.3 * random.standard_normal(w.b.shape), w.b.dtype))  # noqa: E731
    return trees.rewrite(params, "lora", grown)


class Host:
    """The smallest host that there can be: rows at random, requests in slots."""

    def __init__(self, model: Any, dtype: Any = jnp.float32, rows: int = 600) -> None:
        self.model, self.targets = model, pool.targets_of(model.forward, model.params)
        self.device = step.Device(model.forward, model.params, self.targets, rows, dtype)
        self.free = np.random.RandomState(0).permutation(np.arange(1, rows)).astype(np.int32)
        self.adapters: dict[Any, Any] = {None: ({}, 0)}
        self.dtype = dtype

    def take(self, n: int) -> np.ndarray:
        taken, self.free = self.free[:n], self.free[n:]
        return taken

    def load(self, name: str, params: Any) -> None:
        packed = packing.pack(params, self.targets, self.device.width, self.dtype)
        ids = self.take(packed.block.shape[1])
        self.device.put(ids, packed.block)
        self.adapters[name] = packed.ids(ids), packed.rank

    def generate(self, requests: list[Any], new: int, chunk: int = 5, context: int = 24, batch: int = 4) -> Any:
        """Greedy, `chunk` tokens of each prompt at a time."""
        rows: list[list[Any]] = [[] for _ in requests]
        written: list[list[int]] = [[] for _ in requests]
        while any(len(w) < new for w in written):
            pieces = []
            for (prompt, _), held, w in zip(requests, rows, written, strict=True):
                whole = prompt + w
                size = chunk if any(len(r) < len(q[0]) for r, q in zip(rows, requests, strict=True)) else 1
                pieces.append(whole[len(held) : len(held) + size])
            chosen = self.device.step(self.batch(requests, rows, pieces, context, batch))
            for i, (prompt, _) in enumerate(requests):
                if len(rows[i]) == len(prompt) + len(written[i]) and len(written[i]) < new:
                    written[i].append(int(chosen.token[i]))
        return written

    def batch(self, requests: list[Any], rows: list[Any], pieces: list[Any], context: int, batch: int) -> step.Batch:
        time = max(map(len, pieces))
        rank = step.fit(max(self.adapters[name][1] for _, name in requests), (8,), "directions")
        tokens, ids = np.zeros((batch, time), np.int32), np.full((batch, time, 2), self.device.total, np.int32)
        past, new, earlier = (
            np.zeros(batch, np.int32),
            np.zeros(batch, np.int32),
            np.zeros((batch, context, 2), np.int32),
        )
        table = np.zeros((batch, pool.Tables(self.targets, self.device.width, rank).size), np.int32)
        for i, (piece, held) in enumerate(zip(pieces, rows, strict=True)):
            tokens[i, : len(piece)], past[i], new[i] = piece, len(held), len(piece)
            earlier[i, : len(held)] = np.reshape(held, (-1, 2))
            ids[i, : len(piece)] = self.take(2 * len(piece)).reshape(-1, 2)
            held += ids[i, : len(piece)].tolist()
            table[i] = self.device.table(self.adapters[requests[i][1]][0], rank)
        zeros, ones = np.zeros(batch, np.int32), np.ones(batch, np.float32)
        options = (zeros.astype(np.float32), ones, zeros, zeros.astype(np.uint32), zeros, np.bool_(False))
        return step.Batch(tokens, past, new, earlier, ids, table, *options, rank)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_writes_what_each_request_writes_alone(kind: str) -> None:
    """Greedy tokens, of chunked prompts of unequal lengths, under adapters of several ranks and modules, or none."""
    random = np.random.RandomState(2)
    model = models.from_config(KINDS[kind], zoo.KEY)
    model = dataclasses.replace(model, params=jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, model.params))
    host = Host(model)
    attention = "attn" if kind == "gpt2" else "self_attn"
    every = "(c_attn|c_proj|c_fc)" if kind == "gpt2" else rf"{attention}|mlp\.(up|gate|down)_proj$"
    kinds = {"a": methods.lora(2, 4), "b": methods.lora(7, 3, every, rank_pattern={"q": 3}, rslora=True)}
    trees_of = {None: model.params}
    for i, (name, method) in enumerate(kinds.items()):
        params, _ = method(jax.random.key(i), model.params, model.forward)
        trees_of[name] = noisy(params, i)
        host.load(name, trees_of[name])
    requests = [(random.randint(0, zoo.VOCAB, n).tolist(), name) for n, name in ((7, "a"), (11, "b"), (2, None))]
    found = host.generate(requests, 6)
    for (prompt, name), tokens in zip(requests, found, strict=True):
        alone = generate_tokens(model.forward, pj.merge(trees_of[name]), np.array([prompt]), max_new_tokens=6)
        assert tokens == np.asarray(alone)[0].tolist(), name
    assert len({tuple(w) for w in found}) == 3
    assert len(host.device.programs) <= 5  # two blocks, chunks, what is left of them, single tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_copies_the_pool(dtype: str) -> None:
    model = models.from_config(zoo.CONFIGS["llama"], zoo.KEY)
    host = Host(model, jnp.dtype(dtype), rows=20_000)
    host.load("a", noisy(methods.lora(4, 8)(zoo.KEY, model.params, model.forward)[0], 0))
    requests = [([1, 2, 3], "a"), ([4, 5], None)]
    for batch in (
        host.batch(requests, [[], []], [[1, 2, 3], [4, 5]], 24, 4),
        host.batch(requests, [[], []], [[1], [4]], 24, 4),
    ):
        device = host.device
        lowered = device.lower(batch).compile().memory_analysis()
        assert lowered.alias_size_in_bytes >= device.nbytes > 4 * lowered.temp_size_in_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_freed_row_that_holds_no_numbers_shows_nowhere(dtype: str) -> None:
    model = models.from_config(zoo.CONFIGS["llama"], zoo.KEY)
    host = Host(model, jnp.dtype(dtype))
    host.load("a", noisy(methods.lora(3, 8)(zoo.KEY, model.params, model.forward)[0], 0))
    requests = [([1, 2, 3, 4, 5, 6, 7], "a"), ([4, 5], None)]
    clean = host.generate(requests, 4)
    host.device.put(host.free, np.full((zoo.LAYERS, len(host.free), host.device.width), np.nan, np.float32))
    assert host.generate(requests, 4) == clean


def test_a_block_of_any_dtype_is_written_by_one_program() -> None:
    """What a warm-up compiles serves adapters of the pool's own dtype."""
    host = Host(models.from_config(zoo.CONFIGS["llama"], zoo.KEY), jnp.bfloat16)
    ids, block = np.array([3], np.int32), np.ones((zoo.LAYERS, 1, host.device.width), np.float32)
    host.device.put(ids, block)
    compiled = step._write._cache_size()
    host.device.put(ids, block.astype(jnp.bfloat16))
    assert step._write._cache_size() == compiled


def test_what_is_no_product_of_low_rank_is_refused() -> None:
    model = models.from_config(zoo.CONFIGS["llama"], zoo.KEY)
    targets = pool.targets_of(model.forward, model.params)
    for method, words in (
        (methods.lora(2, select="embed_tokens"), "model/embed_tokens/embedding, which is not served"),
        (
            methods.unfreeze(lambda n: n.endswith("q_proj")),
            "Unfrozen at model/layers/self_attn/q_proj/kernel, which is no product of low rank",
        ),
        (methods.prefix_tuning(2), "prefix_tuning in its ports"),
        (pj.chain(), "adapts nothing"),
    ):
        params, _ = method(zoo.KEY, model.params, model.forward)
        with pytest.raises(ValueError, match=words):
            packing.pack(params, targets, 16, np.float32)
    unrolled = models.from_config(zoo.CONFIGS["llama"], zoo.KEY, scan=False)
    with pytest.raises(ValueError, match="no stacked matrices to adapt: load it with scan=True"):
        pool.targets_of(unrolled.forward, unrolled.params)


@pytest.mark.parametrize("kind", ["lora", "dylora", "adalora", "vera", "pissa"])
def test_every_kind_of_low_rank_is_laid_flat(kind: str) -> None:
    """What an adapter adds to the base, read back from its rows; pruned triplets take none."""
    model = models.from_config(zoo.CONFIGS["llama"], zoo.KEY)
    method = {
        "lora": methods.lora(4, 2, "(q|down)_proj", rank_pattern={"q_proj": 2}, rslora=True),
        "dylora": methods.dylora(6, 3.0),
        "adalora": methods.adalora(2, initial_rank=5),
        "vera": methods.vera(12, "(q|v|up)_proj"),
        "pissa": methods.pissa(2),
    }[kind]
    random, targets = np.random.RandomState(3), pool.targets_of(model.forward, model.params)
    params, _ = method(zoo.KEY, model.params, model.forward)
    params = methods.use_rank(params, 3) if kind == "dylora" else params
    if kind == "pissa":
        with pytest.raises(ValueError, match=r"LoRA at .*, which is no product of low rank on the base"):
            packing.pack(params, targets, 16, np.float32)
        return
    trained, frozen = pj.partition(params)
    trained = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), x.dtype), trained)
    params = pj.combine(trained, frozen)
    if kind == "adalora":
        prune = lambda path, w: dataclasses.replace(w, values=w.values.at[:, ::2].set(0.0))  # noqa: E731
        params = trees.rewrite(params, "adalora", prune)
    packed = packing.pack(params, targets, 16, np.float32)
    assert packed.rank == {"lora": 4, "dylora": 3, "adalora": 2, "vera": 12}[kind]
    merged, base = trees.leaves(pj.merge(params)), trees.leaves(model.params)
    assert len(packed.spans) == {"lora": 2, "dylora": 2, "adalora": 7, "vera": 3}[kind]
    for path, (start, middle, end) in packed.spans.items():
        inputs, outputs = base[path].shape[-2:]
        a = packed.block[:, start:middle].reshape(zoo.LAYERS, -1)
        b = packed.block[:, middle:end].reshape(zoo.LAYERS, -1)
        a, b = (x[:, : x.shape[1] // n * n].reshape(zoo.LAYERS, -1, n) for x, n in ((a, inputs), (b, outputs)))
        r = min(a.shape[1], b.shape[1])
        assert not np.any(a[:, r:]) and not np.any(b[:, r:])
        close(a[:, :r].swapaxes(1, 2) @ b[:, :r], merged[path] - base[path], atol=1e-4)


def test_rows_are_the_paper_s_where_matrices_are_as_wide_as_a_row() -> None:
    assert pool.Target((), 64, 64).rows(5, 64) == (5, 5)  # section 4: r rows a matrix
    assert pool.Target((), 576, 192).rows(8, 192) == (24, 8)
    assert pool.Target((), 40, 24).rows(3, 16) == (8, 5)
