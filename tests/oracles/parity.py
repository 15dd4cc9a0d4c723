"""What every decoder family must show against transformers, each check on whole logits of a tiny random model."""

import functools
from typing import Any

import jax
import numpy as np
import torch
from oracles.torch_models import family, fill, numbers, on_disk, ours, pair, torch_logits

from peft_jax import Forward, Inputs

# Compiling is most of the cost of a tiny model: half of it is saved, and no number changes by more than rounding.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CLOSE = {"atol": 1e-4, "rtol": 0.0}
TIME = 12


def tokens_for(config: Any, rows: int = 3, time: int = TIME) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (rows, time)).astype(np.int32)


def check_logits(config: Any, scan: bool = True) -> None:
    """Plain, padded on either side, packed, and token by token with the cache: all equal torch's logits."""
    model, params, forward = pair(config, scan=scan)
    run = compiled(forward)
    tokens = tokens_for(config)
    plain = torch_logits(model, tokens)
    assert plain.std() > 0.5, "logits this small would hide a mistake"
    np.testing.assert_allclose(run(params, tokens), plain, **CLOSE)

    mask = np.ones(tokens.shape, bool)
    mask[1, :5], mask[2, 9:] = False, False
    padded = torch_logits(model, tokens, mask)
    assert abs(padded - plain)[1, 5:].max() > 1e-2, "padding that changes nothing would hide a mistake"
    np.testing.assert_allclose(run(params, Inputs(tokens, mask=mask))[mask], padded[mask], **CLOSE)

    # Two beginnings of rows, and padding, in one row: each sees itself alone, from position 0.
    packed = np.concatenate([tokens[0, :6], tokens[1, :4], tokens[2, :2]])[None]
    segments = np.array([[1] * 6 + [2] * 4 + [0] * 2], np.int32)
    logits = run(params, Inputs(packed, segments=segments))[0]
    np.testing.assert_allclose(logits[:10], np.concatenate([plain[0, :6], plain[1, :4]]), **CLOSE)

    # The cache, with one slot to spare: a padded beginning, then single tokens.
    cache, found = forward.spec.cache(len(tokens), TIME + 1), []
    left = mask | (np.arange(3) == 2)[:, None]  # the row padded on the right cannot go on: take it whole
    logits, cache = run(params, Inputs(tokens[:, :8], mask=left[:, :8], cache=cache))
    found.append(logits)
    for i in range(8, TIME):
        logits, cache = run(params, Inputs(tokens[:, i : i + 1], cache=cache))
        found.append(logits)
    whole = np.where((np.arange(3) == 1)[:, None, None], padded, plain)
    np.testing.assert_allclose(np.concatenate(found, 1)[left], whole[left], **CLOSE)
    assert int(cache.filled) == TIME


def check_gradients(config: Any, variants: bool = False) -> None:
    """Gradients of every weight equal torch's; with `variants`, also with layers unrolled, recomputed less or kept."""
    model, params, forward = pair(config)
    tokens = tokens_for(config, rows=2)
    probe = np.random.default_rng(2).normal(size=(*tokens.shape, config.vocab_size)).astype(np.float32)
    (model(torch.tensor(tokens).long()).logits * torch.tensor(probe)).sum().backward()
    wanted = on_disk(model, {name: parameter.grad for name, parameter in model.named_parameters()})

    def gradients(params: Any, forward: Forward) -> Any:
        return compiled(jax.grad(lambda p: (forward(p, tokens) * probe).sum()))(params)

    def compare(found: Any, scan: bool) -> None:
        table = family(config).tensors(config)
        expected = fill(table, wanted, found, config.num_hidden_layers, scan)
        for keys, array in jax.tree_util.tree_leaves_with_path(found):
            name, truth = jax.tree_util.keystr(keys), expected
            for key in keys:
                truth = truth[key.key]
            # Without rotation a key's bias shifts all scores alike: its true gradient is 0, and small is right.
            np.testing.assert_allclose(array, truth, atol=1e-4 * max(np.abs(truth).max(), 1), rtol=1e-3, err_msg=name)
            assert np.abs(truth).max() > 1e-2 or name.endswith("['k']['bias']"), name

    compare(gradients(params, forward), scan=True)
    if not variants:
        return
    for remat in ("dots", "none"):
        compare(gradients(params, family(config).build(config, remat=remat)), scan=True)
    compare(gradients(*ours(config, numbers(model), scan=False)), scan=False)
