"""FSDP: Llama-3-8B fine-tuned on eight GPUs, and every collective of its step.

    python -m experiments.fsdp_llama3 --model /models/Llama-3-8B --text corpus.txt
    python -m experiments.fsdp_llama3 --collectives          # the table alone: of shapes, without a weight or a GPU
    python -m experiments.fsdp_llama3 --profile tiny         # a small random Llama on eight fake devices

The first line is what a machine with eight GPUs runs: LoRA of rank 16 on every matrix of the layers (`--method qlora`
keeps the base in NF4), bf16, 8 rows of 2048 tokens a step, the weights split over all devices and gathered a layer at a
time.  Weights are created in their pieces, from safetensors; `--fsdp 4 --tensor 2` splits the heads too.  With
`--checkpoints` a run that was stopped goes on.  Eight fake devices are not eight GPUs: they share a processor, and say
nothing of speed.
"""

import argparse
import collections
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peft_jax as pj
from peft_jax import methods, models, plan, quant, sharding, training, trees
from peft_jax.models.families import family
from peft_jax.training.step import shardings_of

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def method_of(name: str, rank: int) -> pj.Method:
    adapter = methods.lora(rank, 2 * rank, trees.LAYER_MATRICES)
    made = {
        "lora": adapter,
        "qlora": pj.chain(quant.quantise(quant.nf4()), adapter),
        "full": methods.unfreeze("", keep_base=False),
    }
    if name not in made:
        raise ValueError(f"--method is {name!r}: choose one of {', '.join(made)}")
    return made[name]


def train(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> training.Run:
    """The run itself: what is needed beside a script for one device are the lines with `mesh`."""
    model = models.load(args.model, dtype=args.dtype, mesh=mesh)
    method = method_of(args.method, args.rank)
    params, forward = method(jax.random.key(0), model.params, model.forward)
    params = sharding.shard(params, forward, mesh)
    print(pj.summary(params))
    rows = training.batches(texts(args, model), args.batch)
    tx = pj.freeze(optax.adamw(args.rate), params)
    batches = lambda step: sharding.spread(rows.batch(step), mesh)  # noqa: E731
    return training.fit(forward, params, tx, batches, args.steps, checkpoints=args.checkpoints)


def texts(args: argparse.Namespace, model: models.Model) -> training.data.Rows:
    """Rows of a text file, or of numbers drawn at random, which show how fast a step is."""
    if args.text is None:
        drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, (64, args.length + 1))
        return training.pack(list(drawn.astype(np.int32)), args.length)
    if model.tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer, and --text is given: leave it out, or add the tokenizer")
    tokens = model.tokenizer(Path(args.text).read_text(encoding="utf-8"))["input_ids"]
    return training.pack([tokens], args.length)


# -- what a step's devices say to each other --------------------------------------------------------------------------


def compile_step(
    config: Any,
    method: pj.Method,
    mesh: jax.sharding.Mesh,
    *,
    batch: int = 8,
    length: int = 2048,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> jax.stages.Compiled:
    """A training step for a mesh, compiled from shapes alone: no weight is made."""
    module, wrapped = family(config.model_type), []
    forward = module.build(config, compute_dtype=jnp.dtype(dtype), **options)

    def init(key: jax.Array) -> Any:
        params, made = method(key, module.init(key, config, dtype=dtype), forward)
        wrapped.append(made)
        return params

    key: Any = jax.eval_shape(lambda: jax.random.key(0))
    params = sharding.told(jax.eval_shape(init, key), mesh)
    like: Any = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    params = jax.tree.map(like, params, sharding.shardings(params, wrapped[0], mesh))
    trained, frozen = pj.partition(params)
    tx, whole = optax.adamw(1e-4), jax.NamedSharding(mesh, jax.P())
    structure: Any = jax.tree.structure(trained)
    is_moments = lambda node: structure == jax.tree.structure(node)  # noqa: E731
    moments = jax.tree.map(
        lambda node: (
            jax.tree.map(lambda x, t: like(x, t.sharding), node, trained) if is_moments(node) else like(node, whole)
        ),
        jax.eval_shape(tx.init, trained),
        is_leaf=is_moments,
    )
    count: Any = like(jax.eval_shape(lambda: jnp.int32(0)), whole)
    state = training.State(trained, moments, count, like(key, whole))
    rows = jax.NamedSharding(mesh, jax.P(sharding.ROWS, "sequence"))
    given = {name: jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows) for name in ("tokens", "targets")}
    given["weights"] = jax.ShapeDtypeStruct((batch, length), jnp.float32, sharding=rows)
    step: Any = training.make_step(wrapped[0], tx, shardings=shardings_of(state))
    return step.lower(state, frozen, given).compile()


def table(found: Sequence[sharding.Collective]) -> str:
    """Markdown: alike collectives in a row, those of most bytes first."""
    rows: dict[Any, list[sharding.Collective]] = collections.defaultdict(list)
    for c in found:
        arrays = c.arrays if len(c.arrays) < 4 else (*c.arrays[:2], f"and {len(c.arrays) - 2} more")
        rows[c.kind, ", ".join(arrays), _when(c.where)].append(c)
    size = lambda group: sum(c.times * c.bytes for c in group)  # noqa: E731
    lines = [
        "| collective | what each device has of it then | when | times a step | GB a step |",
        "|---|---|---|---|---|",
    ]
    for (kind, arrays, when), group in sorted(rows.items(), key=lambda row: -size(row[1])):
        lines.append(f"| {kind} | `{arrays}` | {when} | {sum(c.times for c in group):,} | {size(group) / 1e9:.4f} |")
    return "\n".join([*lines, f"| all | | | {sum(c.times for c in found):,} | {size(found) / 1e9:.4f} |"])


def _when(where: str) -> str:
    parts = "recomputed" if "rematted" in where else "backward" if "transpose(" in where else "forward"
    if "layers" in where or "while/body" in where:
        return parts + ", each layer" if "Decoder" in where else "loss"
    return parts if "Decoder" in where else "step"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Meta-Llama-3-8B", help="a directory, or a name on the Hub")
    parser.add_argument("--method", default="lora", help="lora, qlora or full")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--text", help="a text file; without one, tokens are drawn at random")
    parser.add_argument("--batch", type=int, default=8, help="rows a step, over all devices")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--checkpoints")
    for axis in sharding.AXES:
        parser.add_argument(f"--{axis}", type=int, default=-1 if axis == "fsdp" else 1, help="of the mesh")
    parser.add_argument("--profile", default="paper", choices=("paper", "tiny"))
    parser.add_argument("--collectives", action="store_true", help="print the table and stop")
    args = parser.parse_args(arguments)
    mesh = sharding.mesh(**{axis: getattr(args, axis) for axis in sharding.AXES})
    if args.collectives:
        config = plan.read("llama-3-8b")
        print(
            table(sharding.collectives(compile_step(config, method_of(args.method, args.rank), mesh, **_sizes(args))))
        )
        return
    if args.profile == "paper":
        train(args, mesh)
        return
    with tempfile.TemporaryDirectory() as folder:
        import transformers

        model = models.from_config(transformers.LlamaConfig(**TINY), jax.random.key(1))
        models.save(Path(folder) / "tiny", model)
        args.model, args.rank = str(Path(folder) / "tiny"), min(args.rank, 8)
        args.length, args.steps = min(args.length, 64), min(args.steps, 5)
        train(args, mesh)


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    return {"batch": args.batch, "length": args.length, "dtype": args.dtype}


if __name__ == "__main__":
    if {"tiny", "--collectives"} & set(sys.argv):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    main()
