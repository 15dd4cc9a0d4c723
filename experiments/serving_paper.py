"""The S-LoRA paper's own settings, S1 to S6, on a GPU: Llama-7B to 70B, adapters on q, k, v and o.

    python -m experiments.serving_paper S1 --model huggyllama/llama-7b --adapters 5,100,1000,2000 --rate 10

| setting | base      | ranks          |
|---------|-----------|----------------|
| S1      | Llama-7B  | 8              |
| S2      | Llama-7B  | 64, 32, 16, 8  |
| S3      | Llama-13B | 16             |
| S4      | Llama-13B | 64, 32, 16     |
| S5      | Llama-30B | 32             |
| S6      | Llama-70B | 64             |

The trace has lengths of U[8, 512), α = 1 and cv = 1, over 5 minutes; the deadline for the first token is 6 s.  Weights,
adapters and pool are bf16 (the paper: fp16).  S5 and S6 need several GPUs there, and a model that one device holds
here.  One line of JSON is printed for each number of adapters, and appended to --out.  Nothing has been measured with
it yet: no GPU with so much memory was at hand.

Source: Sheng et al. 2023 (arXiv 2311.03285), Table 1 and section 7; benchmarks/exp_suite.py of S-LoRA/S-LoRA, which has
S3.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from experiments import provenance, serving_adapters, serving_load
from experiments.serving_load import Served
from experiments.serving_trace import PAPER_DEADLINE, Load, draw
from peft_jax import models
from peft_jax.serving.building import build_engine
from peft_jax.serving.step import Shapes


class Setting(NamedTuple):
    """The base, and the ranks that adapters have in turn."""

    base: str
    ranks: tuple[int, ...]


SETTINGS = {
    "S1": Setting("Llama-7B", (8,)),
    "S2": Setting("Llama-7B", (64, 32, 16, 8)),
    "S3": Setting("Llama-13B", (16,)),
    "S4": Setting("Llama-13B", (64, 32, 16)),
    "S5": Setting("Llama-30B", (32,)),
    "S6": Setting("Llama-70B", (64,)),
}
SELECT = "(q|k|v|o)_proj"


def run(setting: str, given: Any) -> list[dict[str, Any]]:
    """One result for each number of adapters."""
    ranks = SETTINGS[setting].ranks
    loaded = models.load(given.model, dtype=jnp.dtype(given.dtype), remat="none")
    folder = given.folder / setting
    most = max(given.adapters)
    names = serving_adapters.write(folder, loaded, most, ranks=ranks, select=SELECT, dtype=jnp.dtype(given.dtype))
    words = loaded.forward.spec.vocab
    del loaded
    longest = 2 * (given.longest - 1)
    shapes = Shapes(
        rows=(*(n for n in (1, 4, 16, 64) if n < given.batch), given.batch),
        prompts=min(4, given.batch),
        chunk=min(256, given.longest),
        context=(*(n for n in (256,) if n < longest), longest),
        ranks=tuple(sorted(set(ranks))),
    )
    found = []
    for count in given.adapters:
        engine = build_engine(
            given.model,
            rows=given.rows,
            memory=given.memory,
            max_batch=given.batch,
            context=longest,
            policy=given.policy,
            dtype=given.dtype,
            shapes=shapes,
            host_bytes=given.host_bytes,
        )
        for name in names[:count]:
            engine.load(name, folder / name)
        programs = engine.warm_up()
        lengths = (given.shortest, given.longest)
        load = Load(count, given.rate, given.seconds, given.alpha, given.cv, lengths, lengths)
        trace = draw(load, given.seed)
        limit = max(given.seconds, trace[-1].time) + given.grace
        outcomes, elapsed = serving_load.drive(Served(engine, names), trace, words, limit)
        result = {"setting": setting, "adapters": count, "rate": given.rate, "programs": programs}
        result |= serving_load.measures(outcomes, elapsed, PAPER_DEADLINE) | engine.stats()
        here, dirty = provenance.commit()
        where = {"commit": here, "dirty": dirty, "versions": provenance.versions(), "machine": provenance.machine()}
        found.append(result | where)
        engine.close()
    return found


def parse(arguments: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=sorted(SETTINGS))
    parser.add_argument("--model", required=True, help="as `models.load` takes it")
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--adapters", type=numbers, default=[5, 100, 1000, 2000], help="how many, by commas")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second: in the paper 10, or 6 with 13B")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--grace", type=float, default=60.0, help="seconds behind the trace until what is left is cut")
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--shortest", type=int, default=8, help="tokens of a prompt or an answer, at least")
    parser.add_argument("--longest", type=int, default=512, help="the same, less than")
    parser.add_argument("--batch", type=int, default=64, help="requests at once")
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", type=float, default=0.9, help="share of the device's memory for model and pool")
    parser.add_argument("--rows", type=int, help="of the pool, in place of --memory")
    parser.add_argument("--host-bytes", type=int, default=64 << 30, help="of adapters in host memory")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--folder", type=Path, default=Path("runs/serving_paper"), help="where adapters are written")
    parser.add_argument("--out", type=Path, help="a file to append the results to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    for result in run(given.setting, given):
        line = json.dumps(result)
        print(line)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
