"""Thousands of adapters served from one base: throughput, attainment and latency, beside other ways to serve them.

    python -m experiments.bench_serving [--again]

SmolLM2-135M in fp32, adapters of rank 8 on queries and values in bf16, read from disk when they are asked for; keys and
values in bf16.  First a closed loop of ours measures capacity, in requests a second; then each row runs the paper's
trace (`experiments.serving_trace`): gamma gaps, prompts and answers of U[8, 64) tokens, at 80 % of that capacity.  The
deadline for the first token is the paper's 6 s, scaled: there it is 12 mean gaps between requests, at 2 requests a
second, and here it is 12 gaps at capacity.

    ours        `peft_jax.serving.engine.Engine`, adapters mixed in a batch
    sequential  the same, but one adapter a batch (`Cluster(adapters=1)`)
    merge-swap  one adapter at a time, merged into the base's matrices, and swapped
    copies      a merged model for each adapter, with pools of their own, under the memory cap of ours
    padded      all adapters on the device, in slots of rank 64
    peft        HF PEFT's mixed batch on torch (`adapter_names=`)
    pool-S      a share S of the rows set apart for adapters, 0 for one pool; the load changes on the way
    policy-P    policies at twice the capacity

Each row's result is kept when it is done, in experiments/results/bench_serving.json, and a further call does what is
left (`--again` forgets what there is).  `make tables` makes the README's paragraph of it.  Adapters, 2 GB, are under
runs/bench_serving.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments import harness, provenance
from experiments.serving_rows import POLICIES, Bench, Scale, Sizes

RESULT = Path(__file__).parent / "results" / "bench_serving.json"
FOLDER = Path("runs/bench_serving")
SIDES = {
    "ours": "peft_jax, adapters mixed in a batch",
    "sequential": "peft_jax, one adapter a batch",
    "merge-swap": "merged, swapped, one adapter at a time",
    "copies": "merged copies, as many as fit",
    "padded": "padded slots of rank 64",
    "peft": "HF PEFT, torch, mixed batch",
}
# Requests a second, as printed: A100 with 80 GB, Llama-7B, rank 8, 10 requests a second.
PAPER = {
    "S-LoRA's paper: S-LoRA": {5: 8.05, 100: 7.99, 1000: 7.64, 2000: 7.61},
    "its paper: HF PEFT": {5: 0.88, 100: 0.25},
    "its paper: merged copies (vLLM-packed)": {5: 2.04},
}


def model() -> Any:
    from experiments.data import smollm2
    from peft_jax import models

    return models.load(smollm2(), remat="none")


def config(sizes: Sizes) -> dict[str, Any]:
    """The sizes as JSON has them."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(sizes)))
    return found


def run(bench: Bench, path: Path, where: dict[str, Any], again: bool = False) -> dict[str, Any]:
    """Runs the rows that the file lacks, each written when it is done.

    Raises:
        ValueError: if the file is of other sizes.
    """
    sizes = bench.sizes
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not again else {"rows": {}}
    if result["rows"] and result["config"] != config(sizes):
        raise ValueError(f"{path} holds rows of other sizes: run with --again, which forgets them")

    def keep(name: str, found: dict[str, Any], begin: float) -> None:
        found |= {"commit": where["commit"], "took": time.perf_counter() - begin}
        result["rows"][name] = found
        text = json.dumps(result | {"config": config(sizes)} | where, indent=2) + "\n"
        harness.whole(path, functools.partial(Path.write_text, data=text, encoding="utf-8"))
        print(f"{name}: {found['took']:.0f} s", file=sys.stderr)

    for name in ("scale", *sizes.names()):
        if name in result["rows"]:
            continue
        begin = time.perf_counter()
        if name == "scale":
            keep(name, bench.scale()._asdict(), begin)
            continue
        scale = Scale(*(result["rows"]["scale"][key] for key in Scale._fields))
        keep(name, row(bench, name, scale), begin)
    return result | {"config": config(sizes)} | where


def row(bench: Bench, name: str, scale: Scale) -> dict[str, Any]:
    """One row; torch's in a process of its own, so that its threads and ours do not meet."""
    if not name.startswith("peft-"):
        return bench.row(name, scale)
    bench.saved()
    bench.adapters(int(name.removeprefix("peft-")))
    asked = json.dumps({"row": name, "scale": scale, "folder": str(bench.folder), "sizes": config(bench.sizes)})
    command = [sys.executable, "-m", "experiments.bench_serving", "worker", asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(asked: dict[str, Any]) -> dict[str, Any]:
    """A row of torch's, from what `row` says: only loads differ from a test's sizes."""
    from peft_jax import models

    given = asked["sizes"]
    kept = ("seconds", "grace", "batch", "share", "seed")
    sizes = Sizes(prompt=tuple(given["prompt"]), new=tuple(given["new"]), **{key: given[key] for key in kept})
    folder = Path(asked["folder"])
    return Bench(models.load(folder / "base"), folder, sizes).row(asked["row"], Scale(*asked["scale"]))


def origin(result: dict[str, Any]) -> str:
    commits = ", ".join(sorted({found["commit"][:12] for found in result["rows"].values()}))
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    minutes = sum(found["took"] for found in result["rows"].values()) / 60
    cores = result["machine"]["cores"]
    return f"{minutes:.0f} minutes on {cores} CPU cores; commit {commits}; {versions}. No GPU has been measured yet.\n"


# -- what it says -----------------------------------------------------------------------------------------------------


def seconds(found: dict[str, float]) -> str:
    return f"{found['p50']:.2f} / {found['p90']:.2f} / {found['p99']:.2f}" if found else "–"


COLUMNS = {  # heading: a cell
    "requests a second": lambda r: f"{r['requests_per_second']:.2f}",
    "first token within the deadline, %": lambda r: f"{100 * r['attainment']:.0f}",
    "s to the first token, at 50 / 90 / 99 %": lambda r: seconds(r["first_token"]),
    "s a token behind it, at 50 / 90 / 99 %": lambda r: seconds(r["each_token"]),
}


def curve(result: dict[str, Any], heading: str, counts: list[int]) -> list[str]:
    """A row a system, a column a number of adapters."""
    lines = [f"| {heading} | {' | '.join(f'{n:,}' for n in counts)} |", f"|{'---|' * (len(counts) + 1)}"]
    for side, what in SIDES.items():
        found = [result["rows"].get(f"{side}-{n}") for n in counts]
        cells = ["" if r is None else "does not fit" if not r.get("fits", True) else COLUMNS[heading](r) for r in found]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    if heading == "requests a second":
        for what, figures in PAPER.items():
            lines.append(f"| {what} | {' | '.join(str(figures.get(n, '')) for n in counts)} |")
    return [*lines, ""]


def listing(result: dict[str, Any], heading: str, rows: dict[str, str], more: dict[str, Any]) -> list[str]:
    columns = COLUMNS | more
    lines = [f"| {heading} | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, what in rows.items():
        if found := result["rows"].get(name):
            lines.append(f"| {what} | {' | '.join(cell(found) for cell in columns.values())} |")
    return [*lines, ""]


def report(result: dict[str, Any]) -> str:
    """The curves, the pools, the policies, what they say, and where they come from, for the README."""
    rows, sizes = result["rows"], result["config"]
    counts = sorted({n for each in sizes["counts"].values() for n in each})
    scale = rows["scale"]
    lines = [
        f"Capacity: {scale['capacity']:.2f} requests a second; traces of {sizes['seconds']:g} s at "
        f"{scale['rate']:.2f}; deadline {scale['deadline']:.1f} s.",
        "",
    ]
    wanted = ["scale", *Sizes(**{k: sizes[k] for k in ("counts", "shares")}).names()]
    if missing := [name for name in wanted if name not in rows]:
        lines += [f"**Incomplete**: {len(missing)} of {len(wanted)} rows are missing ({', '.join(missing)}).", ""]
    for heading in COLUMNS:
        lines += curve(result, heading, counts)
    count = lambda name: lambda r: f"{r[name]:.0f}"  # noqa: E731
    pools = {f"pool-{s:g}": f"{s:.0%} for adapters" if s else "one for both" for s in sizes["shares"]}
    lines += listing(result, "pool", pools, {"adapters loaded": count("adapter_loads")})
    more = {"given up": count("aborted"), "adapters loaded": count("adapter_loads")}
    more |= {"Jain's index": lambda r: f"{r['fairness']:.2f}"}
    lines += listing(result, "policy at twice the capacity", {f"policy-{p}": p for p in POLICIES}, more)
    return "\n".join(lines) + f"{' '.join(sentences(rows, sizes))}\n\n{origin(result)}"


def sentences(rows: dict[str, Any], sizes: dict[str, Any]) -> list[str]:
    """What the numbers say, of the rows that there are; the paper's figures behind."""

    def ratio(one: str, other: str) -> str:
        return f"{rows[one]['requests_per_second'] / max(1e-9, rows[other]['requests_per_second']):.2f}x"

    def have(*names: str) -> bool:
        return all(rows.get(name, {}).get("requests_per_second") is not None for name in names)

    said = []
    if have("ours-1000", "ours-5"):
        said += [f"With 1,000 adapters ours does {ratio('ours-1000', 'ours-5')} of what it does with 5 (paper: 0.95x)."]
    for side, of, paper in (
        ("sequential", "one adapter a batch", ""),
        ("peft", "HF PEFT", "; paper: 9x at 5, 32x at 100"),
        ("merge-swap", "merge-swap", "; paper, at 1, 2 and 5: 0.89x, 1.25x and 1.95x"),
        ("copies", "merged copies", "; paper: 3.9x at 5"),
    ):
        both = [n for n in sizes["counts"].get(side, ()) if have(f"ours-{n}", f"{side}-{n}")]
        if both:
            pairs = ", ".join(f"{ratio(f'ours-{n}', f'{side}-{n}')} at {n:,}" for n in both)
            said += [f"Against {of}: {pairs}{paper}."]
    split = [f"pool-{s:g}" for s in sizes["shares"] if s]
    if have("pool-0", *split):
        best = max(split, key=lambda name: rows[name]["requests_per_second"])
        said += [
            f"One pool against the best split: {ratio('pool-0', best)} (paper: 1.33x with mixed ranks, 1.03x else)."
        ]
    if have("policy-abort", "policy-fcfs"):
        pair = " against ".join(f"{rows[f'policy-{p}']['attainment']:.2f}" for p in ("abort", "fcfs"))
        said += [f"Early abort keeps the deadline for {pair} of all requests (paper: 0.94 against 0.52)."]
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="forget the rows that there are")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where adapters lie")
    parser.add_argument("worker", nargs="*", help=argparse.SUPPRESS)  # a row of torch's
    given = parser.parse_args()
    if given.worker:
        return print(json.dumps(worker(json.loads(given.worker[-1]))))
    here, dirty = provenance.commit()
    if dirty:
        parser.exit(1, f"the tree differs from commit {here[:12]} ({', '.join(dirty[:3])}): commit first\n")
    versions = provenance.versions() | {name: version(name) for name in ("torch", "peft")}
    where = {"commit": here, "dirty": dirty, "versions": versions, "machine": provenance.machine()}
    try:
        result = run(Bench(model(), given.folder, Sizes()), RESULT, where, given.again)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    print(report(result))


if __name__ == "__main__":
    main()
