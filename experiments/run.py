"""Runs a paper's table: prints what it will cost, skips what is finished, and may be killed at any time.

    python -m experiments.run TABLE [--profile laptop|paper] [--seeds 0,1,2] [--only ROW,ROW] [--list]
                              [--model PATH] [--data PATH] [--dirty]

Results are small JSON files under experiments/results; ``python -m experiments.tables`` makes tables of them.
"""

import argparse
from pathlib import Path

from experiments import harness
from experiments.harness import RESULTS, TABLES


def listing(table: harness.Table, profile_name: str, results: Path = RESULTS) -> str:
    """The rows of a profile: matrices, cost of a run, and which seeds are finished."""
    profile = table.profiles[profile_name]
    done = harness.read(results, table, profile_name)
    wide = max(16, *(len(name) + 1 for name in profile.rows))
    lines = [f"{'row':<{wide}}{'training':>12}{'evaluation':>12}  finished seeds (places a run)"]
    for name, row in profile.rows.items():
        train, evaluate = profile.places(profile.settings, row)
        seeds = ", ".join(str(seed) for row_name, seed in sorted(done) if row_name == name)
        lines.append(f"{name:<{wide}}{train:>12,}{evaluate:>12,}  {seeds or 'none'}")
    pending = [(row, s) for name, row in profile.rows.items() for s in profile.seeds if (name, s) not in done]
    return "\n".join([*lines, harness.estimate(profile, pending, list(done.values()))])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", metavar="TABLE", help=f"one of {', '.join(TABLES)}")
    parser.add_argument("--profile", default="laptop", choices=("laptop", "paper"))
    parser.add_argument("--seeds", help="separated by commas; by default those of the profile")
    parser.add_argument("--only", default="", help="rows to run, separated by commas")
    parser.add_argument("--list", action="store_true", help="show rows, costs and what is finished; run nothing")
    parser.add_argument("--model", help="a GGUF file, a Hugging Face directory or a Hub name, in place of the default")
    parser.add_argument("--data", help="where the data set is, in place of the default")
    parser.add_argument("--dirty", action="store_true", help="run an uncommitted tree: such results enter no table")
    given = parser.parse_args(arguments)
    try:
        table, _ = harness.with_sources(harness.find(given.table), given.profile, given.model, given.data)
        if given.list:
            print(table.title)
            return print(listing(table, given.profile))
        seeds = None if given.seeds is None else tuple(int(seed) for seed in given.seeds.split(","))
        only = tuple(name for name in given.only.split(",") if name)
        sources = {"model": given.model, "data": given.data}
        harness.run(table, given.profile, seeds=seeds, only=only, dirty=given.dirty, **sources)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
