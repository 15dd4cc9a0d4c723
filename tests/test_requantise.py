"""Adapters taken into quantised bases, and what rounding them again costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from checks import close, same

import peft_jax as pj
from peft_jax import methods, quant

ADAPTED = r"(q|down)_proj|lm_head"
FORMATS = {"nf4": quant.nf4(16), "fp4": quant.fp4(16, double=False), "int8": quant.int8(), "int3": quant.grouped(3, 16)}


@pytest.mark.parametrize("name", FORMATS)
def test_a_merged_weight_is_stored_as_its_base_was(name: str) -> None:
    rows = "" if name == "int3" else "|embed"  # groups have no rows
    select = ADAPTED + rows
    quantised, forward = quant.quantise(FORMATS[name], "proj|lm_head" + rows)(
        zoo.KEY, zoo.base("llama"), zoo.build("llama")
    )
    params = zoo.disturbed(methods.lora(4, 8, select)(zoo.KEY, quantised, forward)[0])
    found, errors = quant.requantise(params)
    layers, before = found["model"]["layers"], quantised["model"]["layers"]
    assert same(layers["mlp"]["up_proj"], before["mlp"]["up_proj"])  # which nothing adapts
    assert jax.tree.structure(found) == jax.tree.structure(quantised)  # kinds, block sizes and shapes
    merged = pj.merge(params)
    names = {"model/layers/self_attn/q_proj/kernel", "model/layers/mlp/down_proj/kernel", "lm_head/kernel"}
    names |= {"model/embed_tokens/embedding"} if rows else set()
    assert errors.keys() == names
    wide = np.asarray(merged["model"]["layers"]["mlp"]["down_proj"]["kernel"])
    leaf = layers["mlp"]["down_proj"]["kernel"]
    assert same(leaf, FORMATS[name].quantise(jnp.asarray(wide)))
    off = np.asarray(pj.materialise(leaf)) - wide
    expected = np.linalg.norm(off, axis=(1, 2)) / np.linalg.norm(wide, axis=(1, 2))
    close(errors["model/layers/mlp/down_proj/kernel"], expected, rtol=1e-4)
    assert errors["lm_head/kernel"].shape == () and (expected > 0.001).all()


def test_another_format_and_what_is_lossless() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    method = pj.chain(quant.quantise(quant.nf4(16)), methods.lora(4, 8, "q_proj|lm_head"))
    params = zoo.disturbed(method(zoo.KEY, base, forward)[0])
    found, errors = quant.requantise(params, quant.grouped(8, 16))
    assert set(errors) == {"model/layers/self_attn/q_proj/kernel"}  # the head's base is a plain array, and merged
    assert same(found["lm_head"], pj.merge(params)["lm_head"])
    assert found["model"]["layers"]["self_attn"]["q_proj"]["kernel"].bits == 8
    coarse = quant.requantise(params, quant.grouped(2, 16))[1]
    assert all((8 * errors[name] < coarse[name]).all() for name in errors)
    # A base on the format's own grid, and an adapter that adds nothing.
    still, errors = quant.requantise(methods.lora(4, 8, "q_proj")(zoo.KEY, found, forward)[0])
    assert all(float(error.max()) < 1e-5 for error in errors.values())
    close(
        pj.materialise(still["model"]["layers"]["self_attn"]["q_proj"]["kernel"]),
        pj.materialise(found["model"]["layers"]["self_attn"]["q_proj"]["kernel"]),
    )


def test_errors_name_what_is_wrong() -> None:
    base, forward = zoo.base("llama"), zoo.build("llama")
    with pytest.raises(ValueError, match="no quantised base is adapted here"):
        quant.requantise(methods.lora(2)(zoo.KEY, base, forward)[0])
    method = pj.chain(quant.quantise(quant.nf4(16)), methods.lora(2, select="down_proj"))
    params, _ = method(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match="down_proj/kernel: 48 inputs are not a whole number of groups of 32"):
        quant.requantise(params, quant.grouped(4, 32))
    kernel = params["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    down = {"kernel": dataclasses.replace(kernel, b=kernel.b.at[0, 0, 0].set(jnp.inf))}
    mlp = {**params["model"]["layers"]["mlp"], "down_proj": down}
    params = {**params, "model": {**params["model"], "layers": {**params["model"]["layers"], "mlp": mlp}}}
    with pytest.raises(ValueError, match="down_proj/kernel: the array holds NaN or Inf"):
        quant.requantise(params)
    both, _ = pj.chain(method, methods.prompt_tuning(2))(zoo.KEY, base, forward)
    with pytest.raises(ValueError, match="ports/prompt_tuning acts beside the weights"):
        quant.requantise(both)
