"""A training step against the text's length: full fine-tuning, LoRA and LongLoRA, beside HF PEFT's LoRA on torch.

    python -m experiments.bench_longlora [--rounds 3]

A Llama of two layers of SmolLM2's shape (width 576, 9 heads on 3 key heads, 1,536 hidden) with random weights in fp32
and 8,192 words, so that attention is what grows; one text a step, AdamW, every layer computed anew in the backward
pass.  LoRA has rank 8 on q, k, v and o.

    full, lora   `attention.chunked_attention`: full attention whose memory is linear
    longlora     LoRA, embedding and norms whole, shifted sparse attention in groups of a quarter of the text
    shifted      LoRA alone with that attention: what attention by itself saves
    plain        LoRA with scores of the whole text at once; only compiled, for its temporaries
    peft         HF PEFT's LoRA on `transformers`, with torch's fused attention (sdpa) and its checkpointing.  PEFT has
                 no shifted attention: it is LoRA that is compared

Memory of ours is XLA's temporaries (``memory_analysis``); of both, the process's peak during a step less what importing
took.  Each side is a process of its own that takes all lengths, the shortest first; the sides take turns at each.  The
result is kept in experiments/results/bench_longlora.json, of which `make tables` makes the README's paragraph, with a
picture beside it.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import bench, bench_sides, harness, provenance

LENGTHS = (512, 1024, 2048, 4096, 8192)
WORDS, RANK, ALPHA, RATE = 8192, 8, 16, 1e-4
SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
SIDES = {
    "full": "peft_jax, full fine-tuning",
    "lora": "peft_jax, LoRA",
    "shifted": "peft_jax, LoRA, shifted attention",
    "longlora": "peft_jax, LongLoRA",
    "plain": "peft_jax, LoRA, plain attention",
    "peft": "HF PEFT, torch, LoRA",
}
RESULT = Path(__file__).parent / "results" / "bench_longlora.json"
PICTURE = RESULT.with_suffix(".png")


def config() -> Any:
    import transformers

    return transformers.LlamaConfig(
        **SIZES, vocab_size=WORDS, max_position_embeddings=max(LENGTHS), tie_word_embeddings=True
    )


def text(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, WORDS, (1, length + 1))


class Ready(NamedTuple):
    """One side: a step on a text of so many tokens, which gives its loss; and facts, some by length."""

    step: Callable[[int], float]
    facts: dict[str, Any]
    measures: Callable[[int], dict[str, Any]] = lambda length: {}


def jax_side(name: str, folder: str) -> Ready:
    import jax
    import optax

    import peft_jax as pj
    from peft_jax import methods, models, training
    from peft_jax.attention import chunked_attention

    baseline = bench_sides.peak()
    model = models.load(folder, remat="full")
    method = {
        "full": lambda: methods.unfreeze("", keep_base=False),
        "longlora": lambda: methods.longlora(RANK, ALPHA),
        "shifted": lambda: methods.longlora(RANK, ALPHA, train=None),
        "lora": lambda: methods.lora(RANK, ALPHA, "(q|k|v|o)_proj"),
    }[name]()
    params, forward = method(jax.random.key(0), model.params, model.forward)
    del model
    tx = optax.adamw(RATE)
    make: Any = training.make_step(forward, tx, functools.partial(loss, chunked_attention))
    state, frozen = training.init_state(params, tx, jax.random.key(1))
    facts, found = {"baseline": baseline, "trained": pj.count(params).trainable}, dict[int, Any]()
    del params

    def compiled(length: int) -> Any:
        if length not in found:
            found[length] = training.compile_step(make, state, frozen, batch(length))
        return found[length]

    def step(length: int) -> float:
        nonlocal state
        state, metrics = compiled(length)(state, frozen, batch(length))
        return float(metrics["loss"])

    return Ready(step, facts, lambda length: {"temporary_bytes": temporaries(compiled(length))})


def loss(attend: Any, forward: Any, params: Any, batch: Any, ports: Any) -> Any:
    """Of the model with this attention, in groups where the method makes them."""
    from peft_jax import training

    return training.next_token(forward, params, batch, dataclasses.replace(ports, attend=attend))


def batch(length: int) -> dict[str, Any]:
    row = text(length).astype(np.int32)
    return {"tokens": row[:, :-1], "targets": row[:, 1:], "weights": np.ones((1, length), np.float32)}


def temporaries(compiled: Any) -> int:
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def plain(length: int) -> int:
    """The temporaries of LoRA's step with plain attention; no weight is made."""
    import jax
    import optax

    from peft_jax import methods, models, training, trees
    from peft_jax.attention import plain_attention
    from peft_jax.models import llama

    forward, tx = llama.build(config(), remat="full"), optax.adamw(RATE)
    method = methods.lora(RANK, ALPHA, "(q|k|v|o)_proj")

    def init(key: Any) -> Any:
        params = method.init(key, models.from_config(config(), key).params, forward)
        trained, frozen = trees.partition(params)
        return training.State(trained, tx.init(trained), jax.numpy.int32(0), key), frozen

    step: Any = training.make_step(forward, tx, functools.partial(loss, plain_attention))
    return temporaries(step.lower(*jax.eval_shape(init, jax.random.key(0)), batch(length)).compile())


def torch_side(folder: str) -> Ready:
    import peft
    import torch
    import transformers

    baseline = bench_sides.peak()
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    adapter = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, adapter).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tx = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def step(length: int) -> float:
        row = torch.tensor(text(length))
        logits = model(input_ids=row[:, :-1], use_cache=False).logits
        value = torch.nn.functional.cross_entropy(logits[0].float(), row[0, 1:])
        value.backward()
        tx.step()
        tx.zero_grad()
        return value.item()

    return Ready(step, {"baseline": baseline, "trained": trained})


def side(name: str, folder: str) -> Ready:
    return torch_side(folder) if name == "peft" else jax_side(name, folder)


def serve(ready: Ready) -> None:
    """Answers a length on standard input with one step's seconds, loss and peak; first of all with the facts."""
    print(json.dumps(ready.facts), flush=True)
    seen = set()
    for line in sys.stdin:
        length, more = int(line), dict[str, Any]()
        if length not in seen:
            more = ready.measures(length)  # compiles
            ready.step(length)  # the first one allocates
            seen.add(length)
        with provenance.Peak() as peak:
            begin = time.perf_counter()
            value = ready.step(length)
            seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "loss": value, "peak": peak.bytes, "of": peak.of, **more}), flush=True)


class Side(bench.Side):
    """A worker that is asked for a step of a length."""

    def ask(self, length: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{length}\n")
        self.process.stdin.flush()
        return self.read()


def compare(rounds: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Any]:
    import jax

    from peft_jax import models

    here, dirty = provenance.commit()
    if dirty:
        raise ValueError(f"the tree differs from commit {here[:12]} ({', '.join(dirty[:3])}): commit first")
    rows: dict[str, Any] = {}
    for length in lengths:
        rows[f"plain-{length}"] = {"temporary_bytes": plain(length)}
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as folder:
        models.save(f"{folder}/model", models.from_config(config(), jax.random.key(0)))
        try:
            for name in (name for name in SIDES if name != "plain"):
                print(f"starting {name}", file=sys.stderr)
                sides[name] = Side(name, f"{folder}/model", "experiments.bench_longlora")
            for length in lengths:
                print(f"{length} tokens", file=sys.stderr)
                steps = [{name: side.ask(length) for name, side in sides.items()} for _ in range(rounds)]
                for name, worker in sides.items():
                    rows[f"{name}-{length}"] = row([each[name] for each in steps], worker.facts)
        finally:
            for worker in sides.values():
                worker.close()
    versions = provenance.versions() | {name: version(name) for name in ("torch", "peft")}
    where = {"commit": here, "dirty": dirty, "versions": versions, "machine": provenance.machine()}
    return {"rows": rows, "rounds": rounds, "lengths": list(lengths), "sizes": SIZES, "words": WORDS, **where}


def row(steps: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """What a side's steps of one length took."""
    found = {
        "seconds": statistics.median(step["seconds"] for step in steps),
        "peak_bytes": max(step["peak"] for step in steps) - facts["baseline"],
        "losses": [step["loss"] for step in steps],
        "trained": facts["trained"],
    }
    return found | {name: steps[0][name] for name in ("temporary_bytes", "of") if name in steps[0]}


# -- what it says -----------------------------------------------------------------------------------------------------


def table(result: dict[str, Any], heading: str, cell: Callable[[str, dict[str, Any]], str]) -> list[str]:
    """A row a side, a column a length."""
    lengths = result["lengths"]
    lines = [f"| {heading} | {' | '.join(f'{n:,}' for n in lengths)} |", f"|{'---|' * (len(lengths) + 1)}"]
    for name, what in SIDES.items():
        cells = [cell(name, result["rows"][f"{name}-{n}"]) for n in lengths]
        if any(cells):
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return [*lines, ""]


def report(result: dict[str, Any]) -> str:
    """Time and memory by length, the ratios, and where they come from, for the README."""
    rows, lengths = result["rows"], result["lengths"]
    lines = table(result, "s a step", lambda name, row: "" if name == "plain" else f"{row['seconds']:.2f}")
    lines += table(
        result,
        "temporaries, MB",
        lambda name, row: f"{row['temporary_bytes'] / 1e6:.0f}" if "temporary_bytes" in row else "",
    )
    lines += table(
        result, "peak memory, MB", lambda name, row: "" if name == "plain" else f"{row['peak_bytes'] / 1e6:.0f}"
    )

    def ratios(one: str, other: str, kind: str) -> str:
        return ", ".join(f"{rows[f'{other}-{n}'][kind] / rows[f'{one}-{n}'][kind]:.2f}x" for n in lengths)

    first, last = lengths[0], lengths[-1]
    grown = {
        name: rows[f"{name}-{last}"]["temporary_bytes"] / rows[f"{name}-{first}"]["temporary_bytes"]
        for name in ("longlora", "lora", "plain")
    }
    fast = lambda one, other: ratios(one, other, "seconds")  # noqa: E731
    small = lambda one, other: ratios(other, one, "peak_bytes")  # noqa: E731
    said = [
        f"By length, LongLoRA is {fast('longlora', 'full')} as fast as full fine-tuning, in",
        f"{small('longlora', 'full')} of its memory, and {fast('longlora', 'lora')} as fast as LoRA with full",
        f"attention; shifted attention alone makes LoRA {fast('shifted', 'lora')} as fast.",
        f"Against HF PEFT's LoRA, ours is {fast('lora', 'peft')} as fast in {small('lora', 'peft')} of its memory, and",
        f"LongLoRA {fast('longlora', 'peft')} in {small('longlora', 'peft')}.",
        f"From {first:,} to {last:,} tokens ({last // first}x) temporaries grow {grown['longlora']:.1f}x with",
        f"LongLoRA, {grown['lora']:.1f}x with LoRA, and {grown['plain']:.0f}x with plain attention.",
    ]
    picture = f"![Time and memory by length](experiments/results/{PICTURE.name})"
    return "\n".join(lines) + f"\n{' '.join(said)}\n\n{picture}\n\n{provenance.origin(result)}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds and temporaries against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10.5, 3), layout="constrained")
    kinds = {"seconds": "s a step", "temporary_bytes": "temporaries, bytes", "peak_bytes": "peak memory, bytes"}
    for panel, (kind, heading) in zip(panels, kinds.items(), strict=True):
        for name, what in SIDES.items():
            rows = [result["rows"][f"{name}-{n}"] for n in result["lengths"]]
            if all(kind in row for row in rows) and (name != "plain" or kind == "temporary_bytes"):
                panel.plot(result["lengths"], [row[kind] for row in rows], "o-", ms=3, label=what)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(heading, fontsize=9)
        panel.set_xlabel("tokens", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=6)
    harness.whole(path, lambda part: figure.savefig(part, dpi=120, format="png"))
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("worker", nargs="*", help=argparse.SUPPRESS)  # a side's name, the model's folder
    given = parser.parse_args()
    if given.worker:
        return serve(side(*given.worker))
    try:
        result = compare(given.rounds)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    plot(result, PICTURE)
    print(report(result))


if __name__ == "__main__":
    main()
