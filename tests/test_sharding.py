"""Where arrays lie on a mesh, what devices say to each other, and that they compute what one device does."""

import collections
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
import transformers
import zoo
from checks import close, same
from test_longlora import draw, sight
from zoo import KEY

import peft_jax as pj
from experiments.fsdp_llama3 import compile_step, main, table
from peft_jax import methods, models, quant, sharding, trees
from peft_jax.methods.longlora import ShiftedAttention
from peft_jax.models.families import family
from peft_jax.training import next_token

pytestmark = pytest.mark.usefixtures("quick_compiles")


# -- the rules --------------------------------------------------------------------------------------------------------


def abstract(config: Any, **options: Any) -> tuple[Any, pj.Forward]:
    module = family(config.model_type)
    return jax.eval_shape(lambda key: module.init(key, config, **options), KEY), module.build(config)


LLAMA3 = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_a_llama_s_weights_lie_as_the_page_says() -> None:
    params, forward = abstract(transformers.LlamaConfig(**LLAMA3, tie_word_embeddings=False))
    found = trees.leaves(sharding.shardings(params, forward, sharding.mesh(fsdp=4, tensor=2)))
    specs = {"/".join(path[-2:]): tuple(x.spec) for path, x in found.items()}
    columns, rows = (None, "fsdp", "tensor"), (None, "tensor", "fsdp")
    assert specs == {
        "embed_tokens/embedding": ("tensor", "fsdp"),
        "lm_head/kernel": ("fsdp", "tensor"),
        "norm/scale": (None,),
        "input_layernorm/scale": (None, None),
        "post_attention_layernorm/scale": (None, None),
        **{f"{name}_proj/kernel": columns for name in ("q", "k", "v", "gate", "up")},
        **{f"{name}_proj/kernel": rows for name in ("o", "down")},
    }
    arrays = zip(*map(jax.tree.leaves, (found, params)), strict=True)
    assert sum(math.prod(where.shard_shape(x.shape)) for where, x in arrays) == pytest.approx(
        sum(x.size for x in jax.tree.leaves(params)) / 8, rel=1e-3
    )


def test_experts_lie_as_other_kernels_do() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    params, forward = abstract(transformers.MixtralConfig(**sizes, num_local_experts=4))
    placed = sharding.shardings(params, forward, sharding.mesh(fsdp=4, tensor=2))["model"]["layers"]["mlp"]["experts"]
    specs = {name: tuple(module["kernel"].spec) for name, module in placed.items()}
    columns = (None, None, "fsdp", "tensor")  # layers and experts stay together
    assert specs == {"gate_proj": columns, "up_proj": columns, "down_proj": (None, None, "tensor", "fsdp")}


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_every_family_s_matrices_are_split_both_ways(name: str) -> None:
    """What ends a block takes its inputs from what the block's other kernels put out: these are split alike."""
    placed = sharding.shardings(zoo.base(name), zoo.build(name), sharding.mesh(fsdp=4, tensor=2))
    ends = 0
    for path, x in trees.leaves(placed).items():
        if path[-1] not in ("kernel", "embedding"):
            assert x.is_fully_replicated
            continue
        if min(trees.leaves(zoo.base(name))[path].shape[-2:]) >= 16:
            assert {"fsdp", "tensor"} <= set(x.spec), path
            ends += path[-1] == "kernel" and x.spec[-1] == "fsdp"
    assert ends == {"t5": 5, "bart": 5}.get(name, 2), "the last kernels of attentions and MLPs, by kind of layer"


@pytest.mark.parametrize("row", zoo.ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_every_leaf_says_how_its_arrays_lie(row: Any) -> None:
    """Of each typed leaf on a matrix, every own array with as many numbers as an axis of it has twice is split."""
    params = jax.eval_shape(lambda base: row.method(KEY, base, zoo.build("llama"))[0], zoo.base("llama"))
    placed = sharding.shardings(params, zoo.build("llama"), sharding.mesh(fsdp=2, tensor=2, data=2))
    for path, leaf in trees.leaves(params).items():
        if path[-1] not in ("kernel", "embedding"):
            continue
        layers = leaf.shape[0] if len(leaf.shape) == 3 else 1
        arrays = zip(*map(jax.tree.leaves, (leaf, trees.leaves(placed)[path])), strict=True)
        for x, s in arrays:
            if x.size // layers >= 2 * min(leaf.shape[-2:]):
                assert not s.is_fully_replicated, (path, x.shape)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"fsdp": 7},
            r"lm_head/kernel is 4096 x 128256, and the mesh's axis 'fsdp' of 7 divides none of these: choose",
        ),
        ({"tensor": 6}, r"layers/mlp/down_proj/kernel is 14336 x 4096, and the mesh's axis 'tensor' of 6 divides none"),
    ],
)
def test_a_mesh_that_divides_no_dimension_of_a_big_weight_raises(sizes: dict[str, int], said: str) -> None:
    params, forward = abstract(transformers.LlamaConfig(**LLAMA3, tie_word_embeddings=False))
    with pytest.raises(ValueError, match=said):
        sharding.shardings(params, forward, sharding.mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())]))


def test_what_a_mesh_does_not_divide_goes_to_the_other_axis_or_stays_whole() -> None:
    over = sharding.mesh(tensor=8)
    gpt2, forward = abstract(transformers.GPT2Config(n_layer=1))
    placed = sharding.shardings(gpt2, forward, over)["transformer"]["wte"]["embedding"]
    assert placed.spec == jax.P(None, "tensor"), "50257 is odd"
    small = {"head": {"kernel": jnp.ones((12, 3))}, "mixer": {"w": jnp.ones((3, 12, 5))}}
    forward = pj.Forward(lambda params, inputs, ports: inputs.tokens)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(sharding.shardings(small, forward, over)))
    odd = {"mixer": {"w": jax.ShapeDtypeStruct((1023, 1027), jnp.float32)}}
    with pytest.raises(ValueError, match=r"mixer/w is 1023 x 1027, and the mesh's axis 'fsdp' of 8 divides none"):
        sharding.shardings(odd, forward, sharding.mesh(fsdp=8))
    big = {"mixer": {"w": jax.ShapeDtypeStruct((16, 1024, 1027), jnp.float32)}}
    assert sharding.shardings(big, forward, sharding.mesh(fsdp=8))["mixer"]["w"].spec == jax.P(None, "fsdp", None)
    with pytest.raises(ValueError, match=r"make it by sharding.mesh, whose axes are Auto"):
        sharding.shardings(small, forward, jax.make_mesh((8,), ("fsdp",)))


def test_a_model_is_loaded_in_its_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(**zoo.SIZES, tie_word_embeddings=False)
    folder, mesh = tmp_path / "model", sharding.mesh(fsdp=4, tensor=2)
    plain = models.from_config(config, KEY)
    models.save(folder, plain)
    made: list[Any] = []
    create = jax.make_array_from_callback
    monkeypatch.setattr(
        jax, "make_array_from_callback", lambda shape, *rest: (made.append(shape), create(shape, *rest))[1]
    )
    loaded = models.load(folder, mesh=mesh)
    wanted = sharding.shardings(loaded.params, loaded.forward, mesh)
    assert jax.tree.map(lambda x: x.sharding, loaded.params) == wanted
    assert same(jax.device_get(loaded.params), jax.device_get(plain.params))
    assert sorted(made) == sorted(x.shape for x in jax.tree.leaves(plain.params)), "an array was first made whole"
    # From disk, what adapters left there included; and what is stored in few bits.
    lazy = models.load(folder, lazy=True)
    method = pj.chain(quant.quantise(quant.nf4(16), "mlp", progress=False), methods.lora(2))
    params, forward = method(KEY, lazy.params, lazy.forward)
    made.clear()
    placed = sharding.shard(params, forward, mesh)
    assert made, "nothing was read in pieces"
    up, query = (placed["model"]["layers"][a][b]["kernel"] for a, b in (("mlp", "up_proj"), ("self_attn", "q_proj")))
    assert (up.codes.sharding.spec, up.use) == (jax.P(None, "tensor", "fsdp"), jax.P(None, "tensor"))
    assert query.base.sharding.spec == jax.P(None, "fsdp", "tensor")
    assert query.a.sharding.spec == jax.P(None, "fsdp", None)
    models.save(tmp_path / "few", plain, pj.strip(placed))
    again = models.load(tmp_path / "few", mesh=mesh).params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert [x.sharding for x in jax.tree.leaves(again)] == [x.sharding for x in jax.tree.leaves(up)]
    assert same(jax.device_get(again), jax.device_get(up))
    for options, said in (({"lazy": True}, "the mesh to sharding.shard"), ({"shardings": wanted}, "not both")):
        with pytest.raises(ValueError, match=said):
            models.load(folder, mesh=mesh, **options)


# -- what devices say to each other -----------------------------------------------------------------------------------


def test_collectives_are_read_off_a_program() -> None:
    mesh = sharding.mesh(fsdp=4, tensor=2)
    given = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=given.sharding.spec, out_specs=jax.P(None, "tensor"), check_vma=False
    )
    def several(x: Any) -> Any:
        whole = jax.lax.all_gather(x.view(jnp.uint16), "fsdp", tiled=True).astype(jnp.float32)
        passed = lambda i, y: jax.lax.ppermute(y, "tensor", [(0, 1), (1, 0)]) + 1  # noqa: E731
        return jax.lax.psum(jax.lax.fori_loop(0, 5, passed, whole), ("fsdp", "tensor"))

    found = {c.kind: c for c in sharding.collectives(jax.jit(several).lower(given).compile())}
    said = {kind: (c.arrays, c.bytes, c.times, c.devices) for kind, c in found.items()}
    assert said == {
        "all-gather": (("u16[8,3]",), 48, 1, 4),
        "collective-permute": (("f32[8,3]",), 96, 5, 2),
        "all-reduce": (("f32[8,3]",), 96, 1, 8),
    }
    assert "ppermute" in found["collective-permute"].where


def shapes(found: list[sharding.Collective], *kinds: str) -> collections.Counter[str]:
    """How often a step has each array, axes of one apart."""
    counted: collections.Counter[str] = collections.Counter()
    for c in found:
        for array in c.arrays if c.kind in kinds else ():
            counted[array.replace("[1,", "[").replace("[1,", "[")] += c.times
    return counted


def test_fsdp_gathers_codes_and_what_lora_adds_is_small() -> None:
    """At 16,384 tokens, for less would be exchanged otherwise: attention's bases are plain, the MLP's are NF4.  The CPU
    backend widens bf16 to fp32 before it gathers."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=256, tie_word_embeddings=False)
    method = pj.chain(quant.quantise(quant.nf4(16), "mlp"), methods.lora(3, select="q_proj|gate_proj|down_proj"))
    found = sharding.collectives(compile_step(config, method, sharding.mesh(fsdp=8), batch=8, length=2048))
    gathers = shapes(found, "all-gather")
    codes = {"u8[96,32]", "u8[64,48]"}  # gate and up, output by output; down
    assert gathers["u8[96,32]"] == 2 * 2 * 2 and gathers["u8[64,48]"] == 2 * 2, "a layer's, forward and backward"
    scales = {"u8[96,4]", "u8[64,6]"}
    base = {"f32[64,64]": 2, "f32[64,32]": 2}  # how many of them a layer has
    for shape, kernels in base.items():
        assert 2 * kernels <= gathers[shape] <= 3 * 2 * kernels, "forward, recomputed, backward"
    ends = {"f32[256,64]", "f32[64,256]"}  # the embedding and the head
    low_rank = {"f32[64,3]", "f32[3,64]"}
    integers = {shape for shape in gathers if shape.startswith(("s32", "pred"))}  # tokens
    assert set(gathers) <= codes | scales | set(base) | ends | low_rank | integers, gathers
    assert gathers["f32[64,256]"] == 1, "once a step, not once a chunk of the loss"
    for array in shapes(found, "all-reduce", "reduce-scatter"):
        dims = [int(n) for n in array[array.index("[") + 1 : -1].split(",") if n]
        assert 3 in dims or math.prod(dims) == 1, "a gradient of LoRA's, or a number"
    assert not any("2048" in array for array in shapes(found, "all-gather", "all-reduce")), "activations were exchanged"
    assert "| all-gather | `u8[1,96,32]`" in table(found)


# -- a text on several devices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrap", "packed"), [(False, True), (True, False)])
def test_shifted_attention_passes_half_a_group(wrap: bool, packed: bool) -> None:
    """Four devices a text: values and gradients of one device, to the bit or nearly, and nothing else is exchanged."""
    mesh, time, group = sharding.mesh(data=2, sequence=4), 32, 4
    q, k, v = draw(3, 2, time, 4, 2)
    segments = np.where(np.arange(time) < np.array([[13], [30]]), 1, 2).astype(np.int32) if packed else None
    weights = np.random.RandomState(1).standard_normal(q.shape).astype(np.float32)
    attend = ShiftedAttention(group, wrap)

    def run(q: Any, k: Any, v: Any, segments: Any) -> Any:
        y = attend(q, k, v, sight(time, segments), 0.5)
        return jnp.sum(y * weights), y

    slopes = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))
    given = jax.tree.map(
        lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", "sequence"))), (q, k, v, segments)
    )
    compiled = slopes.lower(*given).compile()
    close(compiled(*given), slopes(q, k, v, segments))
    found = sharding.collectives(compiled)
    half = {f"f32[1,{group // 2},2,4]", f"f32[1,{group // 2},1,4]", f"s32[1,{group // 2}]"}  # of queries, keys, texts
    assert set(shapes(found, "collective-permute")) <= {x.replace("[1,", "[") for x in half}
    assert sum(c.times for c in found if c.kind == "collective-permute") <= 8 + packed
    assert {c.kind for c in found} == {"collective-permute", "all-reduce"}
    assert set(shapes(found, "all-reduce")) == {"f32[]"}, "of the sum that is differentiated"
    with pytest.raises(
        ValueError, match=r"32 tokens is split over 4 devices .* 8 tokens are no whole number of groups of 3"
    ):
        ShiftedAttention(3)(*given[:3], sight(time), 0.5)


def test_longlora_gathers_no_keys() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=256, max_position_embeddings=16384)
    method, mesh = methods.longlora(3, select="q_proj", group=1 / 8, train="norm"), sharding.mesh(fsdp=2, sequence=4)
    found = sharding.collectives(compile_step(config, method, mesh, batch=2, length=8192, remat="none"))
    passed = shapes(found, "collective-permute")
    assert passed and all("512" in array for array in passed), "half a group of 1024"
    others = shapes(found, "all-gather", "all-to-all", "all-reduce")
    assert not any({"8192", "2048", "1024"} & set(array[:-1].replace("[", ",").split(",")) for array in others), others


# -- the old way, and the script --------------------------------------------------------------------------------------


def test_a_step_under_pmap() -> None:
    """Legacy: whole parameters on every device, rows split, sums by psum; one device's numbers."""
    params, forward, tx = toy.params(), toy.forward(48), optax.sgd(0.5)
    trained, frozen = pj.partition(params)
    state, batch = tx.init(trained), toy.batch(0, rows=16)

    def step(trained: Any, frozen: Any, state: Any, batch: Any, axis: str | None) -> Any:
        total = lambda trained: next_token(forward, pj.combine(trained, frozen), batch)  # noqa: E731
        (value, weight), gradient = jax.value_and_grad(total, has_aux=True)(trained)
        if axis:
            value, weight, gradient = jax.lax.psum((value, weight, gradient), axis)
        updates, state = tx.update(jax.tree.map(lambda g: g / weight, gradient), state, trained)
        return pj.apply_updates(trained, updates), state, value / weight

    rows = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    many = jax.pmap(functools.partial(step, axis="devices"), axis_name="devices", in_axes=(None, None, None, 0))
    after = many(trained, frozen, state, rows)
    one = jax.jit(functools.partial(step, axis=None))(trained, frozen, state, batch)
    for i in (0, 7):
        close(jax.tree.map(lambda x, i=i: x[i], after), one)


def test_the_script_trains_a_tiny_llama(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On eight fake devices, as it is: load, adapt, shard, fit."""
    main(["--profile", "tiny", "--steps", "2", "--length", "16", "--fsdp", "4", "--tensor", "2", "--rank", "2"])
    assert "LoRA" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"a mesh of .* does not fit 8 devices"):
        main(["--profile", "tiny", "--fsdp", "3"])
