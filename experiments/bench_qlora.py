"""A QLoRA step beside qwix's (google/qwix, Google's quantisation library for JAX), on the same model and numbers.

    python -m experiments.bench_qlora [--rounds 5]

Residual blocks ``x + down(gelu(up(x)))`` in fp32, unrolled; the kernels in NF4 with an fp32 scale for every 64 inputs
(4.5 bits a number, on both sides), LoRA of rank 8 on each, AdamW, mean squared error.  ``residuals`` are what the
backward pass keeps of the forward one (`jax.vjp`'s, arguments apart), ``temporaries`` XLA's, by ``memory_analysis``.
``ours-double`` has its scales in eight bits too (4.127 bits a number), which qwix does not offer.  Each side is a
process of its own, and rounds alternate between them, as in `experiments.bench`.  The result is kept in
experiments/results/bench_qlora.json, of which `make tables` makes the README's paragraph.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import peft_jax as pj
from experiments import bench, bench_sides, provenance
from peft_jax import methods, quant
from peft_jax.layers import Linear

ROWS, RANK, ALPHA, BLOCK = 512, 8, 16, 64
RESULT = Path(__file__).parent / "results" / "bench_qlora.json"
SIDES = ("qwix", "ours", "qwix-checkpointed", "ours-checkpointed", "ours-double")
KINDS = {
    "seconds": "time",
    "peak_bytes": "peak memory",
    "residual_bytes": "residuals",
    "temporary_bytes": "temporaries",
    "argument_bytes": "arguments",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 1024
    hidden: int = 4096
    layers: int = 8


class Block(nn.Module):
    sizes: Sizes
    ours: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def dense(features: int, name: str) -> Any:
            return Linear(features, name=name) if self.ours else nn.Dense(features, use_bias=False, name=name)

        return x + dense(self.sizes.width, "down")(nn.gelu(dense(self.sizes.hidden, "up")(x)))


class Blocks(nn.Module):
    sizes: Sizes
    ours: bool
    checkpointed: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        block = nn.remat(Block) if self.checkpointed else Block
        for i in range(self.sizes.layers):
            x = block(self.sizes, self.ours, name=f"block_{i}")(x)
        return x


Loss = Callable[[Any, Any, Any], Any]  # (trained, frozen, batch)


def made(name: str, sizes: Sizes) -> tuple[Any, Any, Loss]:
    """What trains, what rests, and the loss of a side; the base is the same in all."""
    x, key = jnp.zeros((1, sizes.width)), jax.random.key(0)
    base = Blocks(sizes, True, False).init(key, x)["params"]
    side = ours if name.startswith("ours") else qwixs
    return side(Blocks(sizes, name.startswith("ours"), name.endswith("checkpointed")), base, x, name.endswith("double"))


def ours(module: Any, base: Any, x: Any, double: bool) -> tuple[Any, Any, Loss]:
    forward = pj.Forward(lambda params, inputs, ports: module.apply({"params": params}, inputs.tokens))
    method = methods.qlora(RANK, ALPHA, "", format=quant.nf4(BLOCK, double=double), dropout=0.0)
    params, forward = method(jax.random.key(1), base, forward)

    def loss(trained: Any, frozen: Any, batch: Any) -> Any:
        return jnp.mean((forward(pj.combine(trained, frozen), batch[0]) - batch[1]) ** 2)

    return *pj.partition(params), loss


def qwixs(module: Any, base: Any, x: Any, double: bool) -> tuple[Any, Any, Loss]:
    import qwix

    rule = qwix.LoraRule(module_path=".*", weight_qtype="nf4", tile_size=BLOCK, rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(module, qwix.LoraProvider([rule]))
    params = model.init(jax.random.key(1), x)["params"]
    abstract = qwix.apply_lora_to_model(module, qwix.PtqProvider([dataclasses.replace(rule)]))
    shapes = jax.eval_shape(lambda key: abstract.init(key, x), jax.random.key(1))["params"]
    stored = qwix.quantize_params(base, shapes)
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for block, parts in params.items():
        for part, leaves in parts.items():
            place = f"{block}/{part}"
            trained[place] = {name: leaf for name, leaf in leaves.items() if "lora" in name}
            frozen[place] = {"kernel": stored[block][part]["kernel"]}

    def loss(trained: Any, frozen: Any, batch: Any) -> Any:
        whole: dict[str, Any] = {}
        for place in trained:
            block, part = place.split("/")
            whole.setdefault(block, {})[part] = trained[place] | frozen[place]
        return jnp.mean((model.apply({"params": whole}, batch[0]) - batch[1]) ** 2)

    return trained, frozen, loss


def size(x: Any) -> int:
    """Bytes; a four-bit number is half a byte."""
    return -(-x.size * jax.dtypes.itemsize_bits(x.dtype) // 8)


def residual_bytes(loss: Loss, trained: Any, frozen: Any, batch: Any) -> int:
    def residuals(trained: Any, frozen: Any, batch: Any) -> Any:
        given = {id(x) for x in jax.tree.leaves((trained, frozen, batch))}
        _, back = jax.vjp(lambda t: loss(t, frozen, batch), trained)
        return [x for x in jax.tree.leaves(back) if id(x) not in given]

    return sum(map(size, jax.eval_shape(residuals, trained, frozen, batch)))


def side(name: str, sizes: Sizes = Sizes(), rows: int = ROWS) -> tuple[Callable[[], float], dict[str, Any]]:
    """One side, compiled."""
    baseline = bench_sides.peak()
    trained, frozen, loss = made(name, sizes)
    tx = optax.adamw(1e-3)
    batch = tuple(jax.random.normal(jax.random.key(i), (rows, sizes.width)) for i in (2, 3))

    def update(state: Any, frozen: Any, batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(state[0], frozen, batch)
        updates, moments = tx.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), moments), value

    state = (trained, tx.init(trained))
    begin = time.perf_counter()
    compiled = jax.jit(update, donate_argnums=0).lower(state, frozen, batch).compile()
    facts: dict[str, Any] = {"baseline": baseline, "compile_seconds": time.perf_counter() - begin}
    analysis = compiled.memory_analysis()
    assert analysis is not None
    facts |= {"argument_bytes": analysis.argument_size_in_bytes, "temporary_bytes": analysis.temp_size_in_bytes}
    facts |= {"residual_bytes": residual_bytes(loss, trained, frozen, batch), "tokens": rows}

    def run() -> float:
        nonlocal state
        state, value = compiled(state, frozen, batch)
        return float(value)

    return run, facts


def compare(rounds: int) -> dict[str, Any]:
    sides = bench.take_turns(list(SIDES), rounds, "", "experiments.bench_qlora")
    rows = {name: bench.row(each) for name, each in sides.items()}
    here, dirty = provenance.commit()
    versions = provenance.versions() | {"qwix": version("qwix")}
    where = {"commit": here, "dirty": dirty, "versions": versions, "machine": provenance.machine()}
    return {"rows": rows, "rounds": rounds, "sizes": dataclasses.asdict(Sizes()), "batch": ROWS, **where}


def report(result: dict[str, Any]) -> str:
    """The table, where each side is ahead, and where it comes from."""
    lines = [
        "| step | checkpointing | s | peak memory, GB | residuals, MB | temporaries, MB | arguments, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = result["rows"]
    for name, found in rows.items():
        what = {"q": "qwix", "o": "peft_jax"}[name[0]] + (", scales in 8 bits" if name.endswith("double") else "")
        kept = "every block" if name.endswith("checkpointed") else "none"
        sizes = (f"{found[f'{kind}_bytes'] / 1e6:.1f}" for kind in ("residual", "temporary", "argument"))
        times = f"{found['seconds']:.3f} | {found['peak_bytes'] / 1e9:.2f}"
        lines.append(f"| {what} | {kept} | {times} | {' | '.join(sizes)} |")
    ratios = {
        (kind, kept): rows[f"ours{kept}"][kind] / rows[f"qwix{kept}"][kind]
        for kept in ("", "-checkpointed")
        for kind in KINDS
    }
    said = [
        f"{KINDS[kind]} {ratio:.2f}x{' with checkpointing' if kept else ''}" for (kind, kept), ratio in ratios.items()
    ]
    wins = [text for text, ratio in zip(said, ratios.values(), strict=True) if ratio >= 1.005]  # as it is printed
    weights = 4 * 2 * result["sizes"]["layers"] * result["sizes"]["width"] * result["sizes"]["hidden"]
    text = (
        f"The kernels would be {weights / 1e6:.0f} MB in fp32. Ours over qwix's: {', '.join(said)}. "
        f"qwix is ahead in {', '.join(wins) or 'none of them'}."
    )
    return "\n".join(lines) + f"\n\n{text}\n\n{provenance.origin(result)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("worker", nargs="*", help=argparse.SUPPRESS)  # a side's name, and a folder that none reads
    given = parser.parse_args()
    if given.worker:
        return bench_sides.serve(*side(given.worker[0]))
    result = compare(given.rounds)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()
