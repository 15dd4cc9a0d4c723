"""What is refused, saved or loaded in HF PEFT's format; and what an interrupted save leaves behind."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from oracles.peft_models import (
    LLAMA,
    PREFIX,
    SIZES,
    Halved,
    adapted,
    base,
    config,
    from_peft,
    tensors,
)
from safetensors.numpy import save_file

import peft_jax as pj
from peft_jax import methods
from peft_jax.interop import hf_peft
from peft_jax.interop.hf_peft import files
from peft_jax.models import Model, llama


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter of the llama model, for tests to spoil."""
    folder = tmp_path_factory.mktemp("sound")
    hf_peft.save(folder, *adapted("llama", methods.lora(2, 3, "q_proj|embed")))
    return folder


def spoil(sound: Path, folder: Path, change: Any = None, **fields: Any) -> Path:
    """A copy with other fields in its config, and other tensors: `change` gets them in a dict."""
    content = tensors(sound)
    if change is not None:
        change(content)
    folder.mkdir(exist_ok=True)
    save_file({key: np.ascontiguousarray(x) for key, x in content.items()}, folder / files.WEIGHTS)
    (folder / files.CONFIG).write_text(json.dumps(config(sound) | fields))
    return folder


Q = "model.layers.1.self_attn.q_proj"
TABLE = "model.embed_tokens.base_layer.weight"


def without(*names: str) -> Any:
    return lambda content: [content.pop(PREFIX + name) for name in names]


def with_one(name: str, *shape: int, dtype: Any = np.float32) -> Any:
    return lambda content: content.update({PREFIX + name: np.zeros(shape, dtype)})


TENSORS: dict[str, tuple[Any, str]] = {
    "missing": (without(f"{Q}.lora_B.weight"), rf"lacks the tensor {PREFIX}{Q}.lora_B.weight \[16, 2\], which its"),
    "a layer missing": (without(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"), rf"lacks .*{Q}.lora_A.weight"),
    "extra": (with_one(f"{Q}.lora_B.bias", 16), rf"the tensor {PREFIX}{Q}.lora_B.bias \[16\], which its config"),
    "extra module": (with_one(Q.replace("q_", "k_") + ".lora_A.weight", 2, 16), "k_proj.lora_A.weight .* its config"),
    "not of this model": (with_one("score.weight", 2, 16), "score.weight .*another base"),
    "no prefix": (lambda content: content.update({"hello": np.zeros(3)}), "the tensor hello"),
    "misshapen": (
        with_one(f"{Q}.lora_A.weight", 3, 16),
        rf"{Q}.lora_A.weight with shape \[3, 16\], and model/layers/self_attn/q_proj/kernel\[1\] .* \[2, 16\]",
    ),
    "integers": (with_one(f"{Q}.lora_A.weight", 2, 16, dtype=np.int32), "q_proj.lora_A.weight as int32"),
    "another embedding": (with_one(TABLE, 48, 16), TABLE),
    "a longer embedding": (with_one(TABLE, 50, 16), rf"{TABLE} \[50, 16\]"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_are_read_strictly(case: str, sound: Path, tmp_path: Path) -> None:
    change, message = TENSORS[case]
    with pytest.raises(ValueError, match=message):
        hf_peft.load(spoil(sound, tmp_path / "a", change), base("llama").model)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "of the type LOHA, and these are supported: .*LORA, .*PREFIX_TUNING"),
    ({"peft_type": None}, "names no peft_type"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ({"lora_bias": True}, "lora_bias"),
    ({"target_parameters": ["mlp"]}, "target_parameters"),
    ({"something_new": 3}, r"something_new \(3\), which is not supported"),
    ({"init_lora_weights": "corda"}, "'corda', which changes the base"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"bias": "some"}, "bias='some'"),
    ({"r": 0}, "the rank 0"),
    ({"r": None}, "the rank None"),
    ({"lora_alpha": "8"}, "the alpha '8'"),
    ({"r": 3}, r"\[2, 48\], and .* asks for \[3, 48\]"),
    ({"target_modules": ["q_proj"]}, "embed_tokens.lora_embedding_A .*does not account for"),
    ({"target_modules": ["nothing"]}, "does not account for"),
    ({"modules_to_save": ["norm"]}, "lacks the tensor base_model.model.model.norm.weight"),
    ({"modules_to_save": ["oj"]}, "both adapts model.layers.0.self_attn.q_proj and lists it"),
    ({"use_dora": True}, "lacks the tensor .*lora_magnitude_vector"),
    ({"bias": "all"}, None),
]


@pytest.mark.parametrize(("fields", "message"), OPTIONS, ids=[str(fields) for fields, _ in OPTIONS])
def test_options_are_not_passed_over(fields: dict[str, Any], message: str | None, sound: Path, tmp_path: Path) -> None:
    folder = spoil(sound, tmp_path / "a", **fields)
    if message is None:  # no bias in this model: nothing is promised that is not there
        hf_peft.load(folder, base("llama").model)
        return
    with pytest.raises(ValueError, match=message):
        hf_peft.load(folder, base("llama").model)


def test_another_base(sound: Path) -> None:
    def model(**sizes: Any) -> Model:
        wanted = transformers.LlamaConfig(**SIZES, **{**LLAMA, **sizes}, tie_word_embeddings=False)
        forward = llama.build(wanted)
        return Model(jax.eval_shape(lambda key: llama.init(key, wanted), jax.random.key(0)), forward, wanted)

    wide = r"embed_tokens.lora_embedding_B with shape \[16, 2\], and model/embed_tokens/embedding .* \[32, 2\]"
    with pytest.raises(ValueError, match=wide):
        hf_peft.load(sound, model(hidden_size=32))
    with pytest.raises(
        ValueError, match=r"layers.2.self_attn.q_proj.lora_A.weight \[2, 16\], which this model does not"
    ):
        hf_peft.load(sound, model(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"lacks the tensor .*layers.3.self_attn.q_proj.lora_A.weight"):
        hf_peft.load(sound, model(num_hidden_layers=4))
    with pytest.raises(ValueError, match="which this model does not have: another base"):
        hf_peft.load(sound, base("gpt2").model)


def test_damaged_files(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no adapter_config.json$"):
        hf_peft.load(tmp_path / "nowhere", base("llama").model)
    folder = spoil(sound, tmp_path / "a")
    whole = (folder / files.WEIGHTS).read_bytes()
    for content in (whole[:-5], whole[:40], b"", b"PK not a tensor", b"\xff" * 64):
        (folder / files.WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match="cut short or is not a safetensors file"):
            hf_peft.load(folder, base("llama").model)
    (folder / files.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        hf_peft.load(folder, base("llama").model)
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="a pickle, which can run any code"):
        hf_peft.load(folder, base("llama").model)
    for content in ("{", "[1]", '{"peft_type": 3}'):
        (folder / files.CONFIG).write_text(content)
        with pytest.raises(ValueError, match=r"is not JSON|names no peft_type"):
            hf_peft.load(folder, base("llama").model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["embed_tokens"]},
            "the adapter adapts model.embed_tokens alone: make it .*ensure_weight_tying",
        ),
        ({"target_modules": ["lm_head"]}, "adapts lm_head alone"),
        ({"target_modules": ["lm_head", "embed_tokens"]}, "adapts them differently"),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True}, r"on its own \(DoRA\)"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "trains lm_head alone"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, "trains them apart"),
    ],
    ids=str,
)
def test_halves_of_a_tied_embedding(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    from_peft("tied", tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        hf_peft.load(tmp_path, base("tied").model)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Foreign(pj.Weight):
    trains = ("value",)
    base: Any
    value: Any


def test_trees_that_the_format_cannot_hold(tmp_path: Path) -> None:
    key, forward = jax.random.key(0), base("llama").forward

    def refused(params: Any, message: str, name: str = "llama") -> None:
        with pytest.raises(ValueError, match=message):
            hf_peft.save(tmp_path / "a", params, base(name).forward)
        assert not list(tmp_path.iterdir())

    def made(*made_by: pj.Method, name: str = "llama") -> Any:
        return pj.chain(*made_by).init(key, base(name).params, base(name).forward)

    query, plain = "model/layers/self_attn/q_proj/kernel", base("llama").params
    refused(plain, "holds no adapter to save")
    prompt = {"ports": {"prompt": jnp.zeros(3)}}
    refused(made(methods.lora(2)) | prompt, "holds ports/prompt and an adapter of model.layers.0.self_attn.q_proj")
    refused(plain | prompt, "ports/prompt is a ArrayImpl, for which HF PEFT has no format")
    refused(made(methods.lora(2)) | {"methods": {"pair": jnp.zeros(3)}}, "methods/pair is shared by the layers")
    for half in pj.partition(made(methods.dora(2))):
        refused(half, f"{query} has holes: combine the two halves")
    foreign = pj.trees.map_leaves(lambda path, x: Foreign(x, x) if "q_proj" in path else x, plain)
    refused(foreign, f"{query} holds a Foreign leaf")
    refused(made(methods.dora(2, select="q_proj"), methods.lora(2)), "q_proj/kernel holds a DoRA leaf")
    refused(
        made(methods.dora(2, select="q_proj"), methods.lora(2, select="k_proj")),
        "k_proj.* has LoRA where .*q_proj.*DoRA",
    )
    refused(made(methods.unfreeze("q_proj"), methods.lora(2)), rf"{query}\[0\] trains whole beside an adapter")
    refused(made(methods.dora(2, select="embed"), name="tied"), "tied embedding with DoRA", "tied")
    half = pj.trees.map_leaves(lambda path, x: Halved(x / 2) if path[-1] == "scale" else x, base("gpt2").params)
    refused(methods.unfreeze("ln_f.bias").init(key, half, base("gpt2").forward), "ln_f/scale is a Halved", "gpt2")
    infinite = pj.set_scale(made(methods.lora(2)), float("inf"))
    refused(infinite, "scale is inf")
    hf_peft.save(tmp_path / "a", made(methods.lora(2)), forward)
    with pytest.raises(ValueError, match="'lora' is already applied"):
        hf_peft.load(tmp_path / "a", Model(made(methods.lora(2)), forward, None))


def test_an_interrupted_save_leaves_the_old_adapter(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "a", adapted("llama", methods.lora(3, 3, "v_proj"))
    spoil(sound, folder)
    (folder / "README.md").write_text("kept")
    (folder / "checkpoint").mkdir()
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def unchanged() -> bool:
        now = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        return now == before and sorted(file.name for file in tmp_path.iterdir()) == ["a"]

    def broken(*args: Any, **options: Any) -> None:
        raise OSError("the disk is full")

    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        return broken() if len(calls) == 2 else rename(self, target)

    for where, name, instead in [(files, "save_file", broken), (json, "dumps", broken), (Path, "rename", second_fails)]:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, instead)
            with pytest.raises(OSError, match="disk is full"):
                hf_peft.save(folder, *other)
        assert unchanged()
    hf_peft.save(folder, *other)
    assert sorted(file.name for file in folder.iterdir()) == sorted([*before, "checkpoint"])
    assert not unchanged()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]
    assert config(folder)["r"] == 3
    with pytest.raises(FileExistsError, match="is a file"):
        hf_peft.save(folder / "README.md", *other)
