"""GGUF files: a model's weights, usually quantised, with its config; and its tokenizer, see `gguf_tokenizer`.

The `gguf` package reads the container and dequantises; here its names and conventions become those of transformers, so
that a GGUF file is one more checkpoint `Reader`.  Two conventions matter.  Files of architecture "llama" hold the rows
of the query and key projections in another order: rotary pairs lie side by side, where transformers keeps first halves
before second halves.  And every matrix is ``[out, in]``, also GPT-2's, which transformers keeps as ``[in, out]``.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.  The conventions: llama.cpp,
convert_hf_to_gguf.py (``LlamaModel.permute`` and ``generate_extra_tensors``, ``GPT2Model.modify_tensors``).
"""

import re
import typing
from collections.abc import Collection, Mapping
from pathlib import Path as File
from typing import Any, NamedTuple

import gguf
import numpy as np
import transformers
from gguf.quants import dequantize

READABLE = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K"  # the types of tensors


class Architecture(NamedTuple):
    """What an architecture calls things: in GGUF, and in transformers."""

    config: type
    layer: str
    top: Mapping[str, str]
    inner: Mapping[str, str]
    permuted: bool = False  # rows of the query and key projections
    transposed: tuple[str, ...] = ()  # matrices that transformers keeps as [in, out]


LLAMA = Architecture(
    transformers.LlamaConfig,
    "model.layers.{}.",
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    permuted=True,
)
GPT2 = Architecture(
    transformers.GPT2Config,
    "transformer.h.{}.",
    {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
)
ARCHITECTURES = {
    "llama": LLAMA,
    "qwen2": LLAMA._replace(config=transformers.Qwen2Config, permuted=False),
    "qwen3": LLAMA._replace(config=transformers.Qwen3Config, permuted=False),
    "gpt2": GPT2,
}


# -- the container ----------------------------------------------------------------------------------------------------


class _Strict(gguf.GGUFReader):
    """The package's slices beyond a file's end give less than was asked for; these raise, and are cheaper to make."""

    @typing.no_type_check  # called for each word of a vocabulary
    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        if not count:
            return np.empty(0, dtype)
        array = np.frombuffer(self.data, dtype, int(count), int(offset))
        return array.view(array.dtype.newbyteorder(override_order or self.byte_order))


def open_file(path: File) -> gguf.GGUFReader:
    """Opens and maps a GGUF file.

    Raises:
        ValueError: if it is not one, is cut short or damaged, or is one part of several.
    """
    with path.open("rb") as start:
        magic = start.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}")
    try:
        file = _Strict(path)
    except Exception as error:  # a damaged header can make the package raise anything
        raise ValueError(f"{path} is cut short or damaged: download it again ({error})") from error
    if get(file, "split.count", 1) > 1:
        raise ValueError(f"{path} is one part of several: join them first, with llama.cpp's `llama-gguf-split --merge`")
    return file


def path_of(file: gguf.GGUFReader) -> str:
    """The file's name, for messages."""
    return str(getattr(file.data, "filename", "the GGUF file"))


def get(file: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """A field of the metadata."""
    field = file.get_field(key)
    return default if field is None else field.contents()


def need(file: gguf.GGUFReader, key: str) -> Any:
    """A field of the metadata that must be there."""
    value = get(file, key)
    if value is None:
        raise ValueError(f"{path_of(file)} does not say its {key}")
    return value


def _architecture(file: gguf.GGUFReader) -> tuple[str, Architecture]:
    kind = need(file, "general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"the architecture {kind!r} of {path_of(file)} is not supported: {', '.join(ARCHITECTURES)} are"
        )
    return kind, ARCHITECTURES[kind]


# -- config -----------------------------------------------------------------------------------------------------------


def read_config(file: gguf.GGUFReader) -> Any:
    """The transformers config of a file, read off its metadata and its list of tensors.

    Raises:
        ValueError: if the architecture, its rotary scaling, or mixtures of experts are not supported.
    """
    kind, architecture = _architecture(file)
    shapes = {tensor.name: tensor.shape.tolist()[::-1] for tensor in file.tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path_of(file)} does not hold the tensor token_embd.weight")
    heads, width = need(file, f"{kind}.attention.head_count"), need(file, f"{kind}.embedding_length")
    common = {
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": get(file, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": get(file, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": get(file, "tokenizer.ggml.padding_token_id"),
    }
    if kind == "gpt2":
        return transformers.GPT2Config(
            n_positions=need(file, "gpt2.context_length"),
            n_embd=width,
            n_layer=need(file, "gpt2.block_count"),
            n_head=heads,
            n_inner=need(file, "gpt2.feed_forward_length"),
            layer_norm_epsilon=_decimal(need(file, "gpt2.attention.layer_norm_epsilon")),
            **common,
        )
    kv_heads = get(file, f"{kind}.attention.head_count_kv", heads)
    if get(file, f"{kind}.expert_count", 0) or not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise ValueError(f"{path_of(file)} has experts, or heads that differ by layer: neither is supported")
    head_dim = get(file, f"{kind}.attention.key_length", width // heads)
    rotated = get(file, f"{kind}.rope.dimension_count", head_dim)
    if rotated != head_dim or get(file, f"{kind}.attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{path_of(file)} rotates {rotated} of {head_dim} dimensions of a head: all must be rotated")
    fields = common | {
        "hidden_size": width,
        "intermediate_size": need(file, f"{kind}.feed_forward_length"),
        "num_hidden_layers": need(file, f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": need(file, f"{kind}.context_length"),
        "rms_norm_eps": _decimal(need(file, f"{kind}.attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rotary(file, kind, head_dim),
    }
    if kind != "qwen2" or head_dim * heads != width:  # a Qwen2 config has no such field, though the model reads it
        fields["head_dim"] = head_dim
    window = get(file, f"{kind}.attention.sliding_window")
    if kind == "llama" and window:
        return transformers.MistralConfig(sliding_window=window, **fields)
    if window:
        raise ValueError(f"{path_of(file)} has a sliding window of {window}, which is supported for llama files only")
    if kind != "qwen2":
        fields["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if kind == "llama":
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return architecture.config(**fields)


def _decimal(value: float) -> float:
    """The short decimal that a 32-bit float of the metadata stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rotary(file: gguf.GGUFReader, kind: str, head_dim: int) -> dict[str, Any]:
    """transformers' rope_parameters.  Llama 3's scaling is stored as its effect: a divisor for each frequency."""
    theta = _decimal(get(file, f"{kind}.rope.freq_base", 10000.0))
    scaling = get(file, f"{kind}.rope.scaling.type", "none")
    stored = [tensor.data for tensor in file.tensors if tensor.name == "rope_freqs.weight"]
    if stored and not np.all(stored[0] == 1):
        # The parameters of every Llama 3.1 to 3.3; only the factor differs.
        rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        factor = _decimal(float(np.max(stored[0])))
        turns = 8192 / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
        blend = np.clip((turns - 1.0) / 3.0, 0, 1)
        expected = 1 / ((1 - blend) / factor + blend)
        if stored[0].shape != expected.shape or not np.allclose(stored[0], expected, rtol=1e-3):
            raise ValueError(
                f"{path_of(file)}: rope_freqs.weight is not the scaling of Llama 3.1, 3.2 or 3.3, nor none"
            )
        return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **rope}
    if scaling == "linear":
        return {
            "rope_type": "linear",
            "rope_theta": theta,
            "factor": _decimal(need(file, f"{kind}.rope.scaling.factor")),
        }
    if scaling != "none":
        raise ValueError(
            f"{path_of(file)} scales rotary frequencies by {scaling!r}: none, linear and Llama 3's are supported"
        )
    return {"rope_type": "default", "rope_theta": theta}


# -- tensors ----------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A tensor of the file, and what to undo: `heads` > 0 for permuted rows, `transposed` for GPT-2's matrices."""

    tensor: Any
    heads: int
    transposed: bool


class Tensors(NamedTuple):
    """A checkpoint `Reader` of a GGUF file, which dequantises what is read to fp32."""

    source: str
    tensors: Mapping[str, Stored]

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self.tensors[name]
        shape = tuple(stored.tensor.shape.tolist())  # the innermost axis first
        return shape if stored.transposed else shape[::-1]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor, heads, transposed = self.tensors[name]
        rows, *columns = index[::-1] if transposed else index
        if heads:
            values = dequantize(tensor.data[_order(len(tensor.data), heads)[rows]], tensor.tensor_type)
        elif columns:
            values = dequantize(tensor.data[rows], tensor.tensor_type)
        else:
            values = dequantize(tensor.data, tensor.tensor_type)[rows]
        values = values[(slice(None), *columns)]
        return values.T if transposed else values


def _order(rows: int, heads: int) -> np.ndarray:
    """Where the file keeps each row of a permuted projection: rotary pairs side by side, in each head."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def open_tensors(file: gguf.GGUFReader, config: Any) -> Tensors:
    """The file's tensors under their Hugging Face names.  One without such a name keeps its own, which loading refuses.

    Raises:
        ValueError: if a tensor is quantised in a way that cannot be read here, with its name and type.
    """
    _, architecture = _architecture(file)
    found = {}
    for tensor in file.tensors:
        if tensor.name == "rope_freqs.weight":
            continue  # read_config has read it
        if tensor.tensor_type.name not in READABLE.split():
            raise ValueError(
                f"{path_of(file)} holds {tensor.name} as {tensor.tensor_type.name}, which is none of {READABLE}"
            )
        heads = 0
        part = re.sub(r"^blk\.\d+\.", "", tensor.name).rpartition(".")[0]
        if architecture.permuted and part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        transposed = part in architecture.transposed and len(tensor.shape) == 2
        found[_rename(tensor.name, architecture)] = Stored(tensor, heads, transposed)
    return Tensors(path_of(file), found)


def _rename(name: str, architecture: Architecture) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in architecture.top:
        return f"{architecture.top[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in architecture.inner:
        return f"{architecture.layer.format(layer[1])}{architecture.inner[layer[2]]}.{kind}"
    return name
