"""Whether the engine writes, for each request, what the model alone writes with that request's adapter merged in.

    python -m experiments.serving_exact

SmolLM2-135M in fp32, greedy.  Adapters of ranks 4, 8, 16 and 64, each on other matrices, and the base; 24 requests
whose prompts are mostly longer than a chunk.  The engine answers them

    mixed     in batches of 8, with rows enough
    short     with so few rows that requests are preempted, and adapters evicted and loaded again
    prefixes  twice over, the second time with what the first has left in the prefix cache

and each answer is compared with `models.generate_tokens` on the weights of `pj.merge`, one request at a time.  Where
tokens differ, the distance of the model's two largest logits there tells whether it was a matter of rounding: from
1e-4 on it is a failure, and the status is 1; below, a tie, counted and printed.  It is a failure too if a pass was not
what it is for (nothing was preempted, say).  The result is kept in experiments/results/serving_exact.json, of which
`make tables` makes the README's paragraph.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import peft_jax as pj
from experiments import provenance, serving_adapters
from peft_jax import models
from peft_jax.interop import hf_peft
from peft_jax.serving.engine import Engine
from peft_jax.serving.requests import Sampling
from peft_jax.serving.rounds import Limits
from peft_jax.serving.step import Shapes

RESULT = Path(__file__).parent / "results" / "serving_exact.json"
FOLDER = Path("runs/serving_exact")
TIE = 1e-4
KINDS = {  # name: rank, and the matrices that it adapts
    "r4": (4, "(q|k|v|o)_proj"),
    "r8": (8, "(q|v|gate|up|down)_proj"),
    "r16": (16, "v_proj"),
    "r64": (64, "(q|down)_proj"),
}
TEXT = """The sea was calm that morning, and the boats had gone out before light. On the wall of the harbour an old man
mended a net and counted the gulls. He had been to every port between here and the ice, he said, and had brought back
one compass, two languages and no money. The children asked him what lay behind the horizon. Another one, he answered,
and behind that the place where you began. In the afternoon the wind turned to the north, the light grew hard, and one
by one the boats came home, low in the water, with more fish than anyone had room for."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """lengths   of prompts, in turn; `new` tokens behind each
    requests  in all
    rows      of the pool; `short` of the one that is too small
    """

    lengths: tuple[int, ...] = (5, 33, 48, 90)
    new: int = 12
    requests: int = 24
    rows: int = 12_000
    short: int = 1_500
    block: int = 8
    kinds: Any = dataclasses.field(default_factory=lambda: dict(KINDS))
    shapes: Shapes = dataclasses.field(
        default_factory=lambda: Shapes(rows=(8,), prompts=4, chunk=32, context=(128,), ranks=(16, 64))
    )


class Difference(NamedTuple):
    """The first token that is not the one written alone, and the distance of the two largest logits there."""

    request: int
    at: int
    gap: float


def compare(
    found: Sequence[Sequence[int]], alone: Sequence[Sequence[int]], gap_at: Callable[[int, int], float]
) -> list[Difference]:
    """Where answers first differ.

    >>> compare([[1, 2], [3, 4]], [[1, 2], [3, 5]], lambda request, at: 0.5)
    [Difference(request=1, at=1, gap=0.5)]
    """
    differences = []
    for number, (one, other) in enumerate(zip(found, alone, strict=True)):
        unlike = [i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]]
        if unlike or len(one) != len(other):
            at = unlike[0] if unlike else min(len(one), len(other))
            differences.append(Difference(number, at, gap_at(number, at)))
    return differences


def write(folder: Path, model: Any, sizes: Sizes) -> dict[str, Path]:
    """The adapters, each in a directory."""
    found = {}
    for name, (rank, select) in sizes.kinds.items():
        (only,) = serving_adapters.write(folder / name, model, 1, ranks=(rank,), select=select)
        found[name] = folder / name / only
    return found


def asked_of(words: Sequence[int], sizes: Sizes) -> list[tuple[list[int], str | None]]:
    """Prompts that begin at different places of a text, and the adapter of each."""
    names = [*sizes.kinds, None]
    prompts = []
    for i in range(sizes.requests):
        length = sizes.lengths[i % len(sizes.lengths)]
        start = 7 * i % max(1, len(words) - length)
        prompts.append((list(words[start : start + length]), names[i % len(names)]))
    return prompts


class Alone:
    """What the model writes with an adapter merged in; and the distance of the two largest logits at a token of it."""

    def __init__(self, model: Any, places: dict[str, Path], asked: list[tuple[list[int], str | None]], new: int):
        self.model, self.places, self.asked = model, places, asked
        self.tokens: list[list[int]] = [[] for _ in asked]
        for name in (*places, None):
            params = self.merged(name)
            for i, (prompt, wanted) in enumerate(asked):
                if wanted == name:
                    made = models.generate_tokens(model.forward, params, np.array([prompt]), max_new_tokens=new)
                    self.tokens[i] = np.asarray(made)[0].tolist()

    def merged(self, name: str | None) -> Any:
        return pj.merge(hf_peft.load(self.places[name], self.model)[0]) if name else self.model.params

    def gap(self, request: int, at: int) -> float:
        prompt, name = self.asked[request]
        text = np.array([prompt + self.tokens[request][:at]])
        second, first = np.sort(np.asarray(self.model.forward(self.merged(name), text))[0, -1])[-2:]
        return float(first - second)


def answers(engine: Engine, asked: list[tuple[list[int], str | None]], new: int) -> list[list[int]]:
    """The engine's tokens of all requests, asked for at once."""
    numbers = [engine.submit(prompt, Sampling(max_tokens=new, ignore_end=True), name) for prompt, name in asked]
    found = {number: list[int]() for number in numbers}
    while engine.busy:
        for event in engine.step():
            found[event.request] += event.tokens
            if event.finish not in (None, "length"):
                raise RuntimeError(f"request {event.request} ended with {event.finish}: {event.reason}")
    return [found[number] for number in numbers]


def check(model: Any, folder: Path, words: Sequence[int], sizes: Sizes) -> dict[str, Any]:
    """All passes: of each, how many answers are exact, where the others differ, and what happened on the way."""
    places, asked = write(folder, model, sizes), asked_of(words, sizes)
    alone = Alone(model, places, asked, sizes.new)
    passes = {
        "mixed": (sizes.rows, 1.0, 0, 1),
        "short": (sizes.short, 0.0, 0, 1),
        "prefixes": (sizes.rows, 1.0, sizes.block, 2),
    }
    found: dict[str, Any] = {}
    for name, (rows, optimism, block, times) in passes.items():
        engine = Engine(model, rows=rows, shapes=sizes.shapes, limits=Limits(optimism=optimism), prefix_block=block)
        for adapter, place in places.items():
            engine.load(adapter, place)
        differences = list[Difference]()
        for _ in range(times):
            differences += compare(answers(engine, asked, sizes.new), alone.tokens, alone.gap)
        stats = engine.stats()
        found[name] = {
            "answers": times * len(asked),
            "tokens": times * sizes.new * len(asked),
            "differences": [each._asdict() for each in differences],
            "ties": sum(each.gap < TIE for each in differences),
            "failures": sum(not each.gap < TIE for each in differences),
            "smallest_gap": min(engine.gaps.values()),
            "chunked": sum(len(prompt) > sizes.shapes.chunk for prompt, _ in asked),
            "preemptions": stats["preemptions_total"],
            "evictions": stats["adapter_evictions_total"],
            "reloads": stats["adapter_loads_total"] - len(places),
            "hit_tokens": stats["prefix_hit_tokens_total"],
        }
        engine.close()
    return {"rows": found, "failures": sum(row["failures"] for row in found.values()), "missing": missing(found)}


def missing(found: dict[str, Any]) -> list[str]:
    """What a pass was for and did not happen."""
    wanted = {"mixed": ("chunked",), "short": ("preemptions", "evictions", "reloads"), "prefixes": ("hit_tokens",)}
    return [f"{name}: no {what}" for name, whats in wanted.items() for what in whats if not found[name][what] > 0]


def report(result: dict[str, Any]) -> str:
    """How many answers are exact, for the README."""
    rows = result["rows"]
    total, ties = (sum(row[key] for row in rows.values()) for key in ("answers", "ties"))
    tokens, failures = (sum(row[key] for row in rows.values()) for key in ("tokens", "failures"))
    short = rows["short"]
    said = [
        f"{total - ties - failures} of {total} answers ({tokens:,} tokens) are those of the request alone on merged",
        f"weights; {ties} differ where the two largest logits are less than {TIE:g} apart, {failures} elsewhere.",
        f"On the way: {rows['mixed']['chunked']} prompts in chunks, {short['preemptions']} preemptions,",
        f"{short['evictions']} evictions and {short['reloads']} reloads of adapters,",
        f"{rows['prefixes']['hit_tokens']} tokens found in the prefix cache.",
        f"The smallest distance of two largest logits was {min(row['smallest_gap'] for row in rows.values()):.1e}.",
    ]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"{' '.join(said)}\n\n{result['seconds']:.0f} s; commit {result['commit'][:12]}; {versions}.\n"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from experiments.data import smollm2

    begin = time.perf_counter()
    here, dirty = provenance.commit()
    model = models.load(smollm2(), remat="none")
    result = check(model, FOLDER, model.tokenizer(TEXT)["input_ids"], Sizes())
    where = {"commit": here, "dirty": dirty, "versions": provenance.versions(), "machine": provenance.machine()}
    result |= where | {"seconds": time.perf_counter() - begin}
    for name, row in result["rows"].items():
        for each in row["differences"]:
            print(
                f"{name}: request {each['request']} differs at token {each['at']}; two largest logits {each['gap']:.1e}"
            )
    print(report(result))
    for what in result["missing"]:
        print(what, file=sys.stderr)
    if not dirty:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if result["failures"] or result["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
