"""What devices say to each other in a step of serving Llama-3-8B: of shapes, without a weight or a GPU.

    python -m experiments.serving_tensor                             # eight devices, 16 rows of one token, rank 16
    python -m experiments.serving_tensor --rows 4 --tokens 64        # chunks of prompts

The program is compiled for fake devices of the CPU at the model's true size, and its collectives are read off it.  The
last column is what a device sends where they go round in a ring: (N−1)/N of what it has then for an all-gather, twice
that for an all-reduce, as section 6 of the paper counts.
"""

import argparse
import collections
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax import plan, sharding
from peft_jax.models.families import family
from peft_jax.serving import pool, step, tensor
from peft_jax.serving.engine import _empty

RING = {"all-gather": 1, "all-reduce": 2}


def compile_step(config: Any, mesh: jax.sharding.Mesh, rows: int, tokens: int, earlier: int, rank: int) -> Any:
    """A step of serving, compiled from shapes alone."""
    module = family(config.model_type)
    forward = module.build(config, remat="none")
    key: Any = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda key: module.init(key, config), key)
    like: Any = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    params = jax.tree.map(like, params, sharding.shardings(params, forward, mesh))
    targets, spec, total = pool.targets_of(forward, params, mesh), forward.spec, 4 * rows * (tokens + earlier)
    held = jax.ShapeDtypeStruct((spec.layers, total, pool.width_of(spec)), jnp.float32)
    held = like(held, jax.NamedSharding(mesh, tensor.ROWS))
    device: Any = SimpleNamespace(targets=targets, width=pool.width_of(spec), total=total)
    batch = _empty(rows, tokens, earlier, device, rank)
    return step._step.lower(forward, targets, pool.adapt(params, targets, spec.layers), held, batch).compile()


def table(found: Sequence[sharding.Collective]) -> str:
    """Markdown, in the order of a step."""
    rows: dict[Any, list[sharding.Collective]] = collections.defaultdict(list)
    for c in found:
        name = re.search(r"/(\w+_proj|embed_tokens)/", c.where)
        rows[name[1] if name else "logits", c.kind, ", ".join(c.arrays)].append(c)
    lines = [
        "| where | collective | what each device has of it then | times | numbers a device sends |",
        "|---|---|---|---|---|",
    ]
    for (where, kind, arrays), group in rows.items():
        numbers = sum(c.times * c.bytes // 4 * RING[c.kind] * (c.devices - 1) / c.devices for c in group)
        lines.append(f"| {where} | {kind} | `{arrays}` | {sum(c.times for c in group)} | {numbers:,.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("devices", 8), ("rows", 16), ("tokens", 1), ("earlier", 256), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--model", default="llama-3-8b", help="a name of peft_jax.plan, or a config's directory")
    args = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = sharding.mesh(tensor=args.devices, devices=jax.devices()[: args.devices])
    config = plan.read(args.model)
    print(table(sharding.collectives(compile_step(config, mesh, args.rows, args.tokens, args.earlier, args.rank))))


if __name__ == "__main__":
    main()
