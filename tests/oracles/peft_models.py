"""HF PEFT as an oracle: the same tiny random models on both sides, random adapters, and the files of both."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from oracles.torch_models import numbers, ours, torch_model
from safetensors import safe_open

import peft_jax as pj
from peft_jax.interop.hf_peft import files
from peft_jax.methods.lora import LoRA
from peft_jax.methods.vera import VeRA
from peft_jax.models import Model

SIZES: dict[str, Any] = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 32}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES, **LLAMA, tie_word_embeddings=False),
    "tied": transformers.LlamaConfig(**SIZES, **LLAMA, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES, **LLAMA, tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(**SIZES, n_embd=16, n_layer=3, n_head=4, n_positions=32),
}
TOKENS = np.random.default_rng(0).integers(3, 48, (2, 9))
PREFIX = "base_model.model."


class Base(NamedTuple):
    """The same random model on both sides."""

    config: Any
    params: Any
    forward: pj.Forward
    compiled: Any

    def torch(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        model = torch_model(self.config)
        for parameter in model.parameters():  # not the buffers: transformers keeps rotary frequencies in fp32
            parameter.data = parameter.data.to(dtype)
        return model

    @property
    def model(self) -> Model:
        return Model(self.params, self.forward, self.config)


BASES: dict[str, Base] = {}


def base(name: str) -> Base:
    if name not in BASES:
        params, forward = ours(CONFIGS[name], numbers(torch_model(CONFIGS[name])), remat="none")
        BASES[name] = Base(CONFIGS[name], params, forward, jax.jit(forward))
    return BASES[name]


def logits(name: str, params: Any) -> np.ndarray:
    """Of the merged tree: one compiled function for all adapters of a base."""
    with jax.disable_jit():
        plain = pj.merge(params)
    return np.asarray(base(name).compiled(plain, jnp.asarray(TOKENS, jnp.int32)))


def unmerged(forward: pj.Forward, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(forward)(params, jnp.asarray(TOKENS, jnp.int32)))


def stir(params: Any, seed: int = 1) -> Any:
    """Every trainable number moved by 0.3 at random, the padding of ranks apart."""
    random = np.random.default_rng(seed)
    mask = pj.trainable(params)
    move = lambda on, x: x + jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype) if on else x  # noqa: E731
    params = jax.tree.map(move, mask, params)

    def unpad(w: Any) -> Any:
        if type(w) is VeRA and w.scale.ndim:
            used = jnp.array(w.ranks)[:, None] > 0
            return dataclasses.replace(w, d=w.d * used.astype(w.d.dtype), b=w.b * used.astype(w.b.dtype))
        if not isinstance(w, LoRA) or not w.scale.ndim:
            return w
        used = jnp.arange(w.a.shape[-1])[None] < jnp.array(w.ranks)[:, None]
        return dataclasses.replace(
            w, a=w.a * used[:, None, :].astype(w.a.dtype), b=w.b * used[:, :, None].astype(w.b.dtype)
        )

    return pj.trees.map_weights(unpad, params)


def stir_torch(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.requires_grad}.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def adapted(name: str, method: pj.Method, seed: int = 1) -> tuple[Any, pj.Forward]:
    params, forward = method(jax.random.key(0), base(name).params, base(name).forward)
    return stir(params, seed), forward


def in_peft(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """What peft makes of a directory, which must hold neither more nor less than peft wants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own deprecations, and its advice on tied weights
        model = peft.PeftModel.from_pretrained(base(name).torch(dtype), str(folder))
        result = model.load_adapter(str(folder), "default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model


def from_peft(
    name: str, folder: Path, seed: int = 1, kind: type[peft.PeftConfig] = peft.LoraConfig, **options: Any
) -> peft.PeftModel:
    """A random adapter that peft has made and saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(name).torch(), kind(task_type="CAUSAL_LM", **options)).eval()
        stir_torch(model, seed)
        model.save_pretrained(folder)
    return model


def tensors(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def assert_same_bits(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_same_files(first: Path, second: Path) -> None:
    for file in (files.WEIGHTS, files.CONFIG):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Halved(pj.Weight):
    """A frozen leaf that stores half of its array: what a quantised one looks like from outside."""

    half: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.half.shape

    @property
    def dtype(self) -> Any:
        return self.half.dtype

    def materialise(self) -> Any:
        return self.half * 2


def packed(params: Any) -> Any:
    """Every matrix of the decoder's layers stored by half."""
    return pj.trees.map_leaves(lambda path, x: Halved(x / 2) if path[-1] == "kernel" and x.ndim == 3 else x, params)
