"""Makes tables and plots of the results, beside the paper's figures.

    python -m experiments.tables            writes experiments/results/<table>/<profile>.md and .png, and the README
    python -m experiments.tables --check    writes nothing; fails, naming the file, where one differs from its results

In the README a table goes between ``<!-- table:NAME -->`` and ``<!-- /table -->``; NAME is ``table/profile``; or a
table, whose laptop profile is meant; or ``bench``, ``bench_many``, ``bench_qlora`` or ``bench_longlora``, comparisons
of the training step (`experiments.bench` and its neighbours); or ``bench_serving`` or ``serving_exact``, of serving.
A profile without results has no files; one that lacks some says so.
``docs/parameter_counts.md`` has a place for the numbers that train (`experiments.parameter_counts`), which need no run.
"""

import argparse
import functools
import hashlib
import json
import re
import statistics
from pathlib import Path

from experiments import (
    bench,
    bench_longlora,
    bench_many,
    bench_qlora,
    bench_serving,
    harness,
    parameter_counts,
    serving_exact,
)
from experiments.harness import RESULTS, TABLES, Metric, Part, Profile, Result, Table
from experiments.provenance import ROOT

README = ROOT / "README.md"
COUNTS = ROOT / "docs" / "parameter_counts.md"
PLACE = re.compile(r"(<!-- table:([\w/]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
Results = dict[tuple[str, int], Result]


# -- Markdown ---------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def markdown(table: Table, name: str, results: Results, image: str) -> str:
    """A profile's table, or '' where there are no results."""
    if not results:
        return ""
    profile = table.profiles[name]
    lines = [f"**{table.title}** ({name} profile; mean ± standard deviation over {len(profile.seeds)} seeds)", ""]
    if missing := [f"{r}, seed {s}" for r in profile.rows for s in profile.seeds if (r, s) not in results]:
        total = len(profile.rows) * len(profile.seeds)
        lines += [f"**Incomplete**: {len(missing)} of {total} runs are missing ({'; '.join(missing)}).", ""]
    for part in profile.parts:
        lines += [*part_lines(part, profile, results), ""]
    source = f"On {profile.settings.model} and {profile.settings.data}"
    if any(part.figures for part in profile.parts):
        source += "; the last columns are the paper's, as printed for its own model and task"
    lines += [f"{source}: {table.paper}.", ""]
    return "\n".join([*lines, f"![{table.title}]({image})", "", origin(results)]) + "\n"


def part_lines(part: Part, profile: Profile, results: Results) -> list[str]:
    columns, metrics = headings(part), profile.measures(part)
    head = ["row", "trainable", *(m.heading for m in metrics), "s a run", "peak, GB", *columns]
    lines = [f"{part.title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in part.rows:
        found = [results[row.name, seed] for seed in profile.seeds if (row.name, seed) in results]
        label = f"{row.name} (paper: {part.stands_for[row.name]})" if row.name in part.stands_for else row.name
        cells = [label, *(["not run"] + [""] * (len(metrics) + 2) if not found else measured(found, metrics))]
        if 0 < len(found) < len(profile.seeds):
            cells[0] += f" ({len(found)} of {len(profile.seeds)} seeds)"
        lines.append(f"| {' | '.join([*cells, *(figure(part, row.name, column) for column in columns)])} |")
    return lines


def measured(found: list[Result], metrics: tuple[Metric, ...]) -> list[str]:
    means = [spread([r["metrics"][m.name] for r in found], m.digits) for m in metrics]
    seconds, peak = statistics.mean(r["seconds"] for r in found), max(r["peak_bytes"] for r in found)
    return [f"{found[0]['trainable']:,}", *means, f"{seconds:.0f}", f"{peak / 1e9:.2f}"]


def headings(part: Part) -> list[str]:
    """The paper's columns, in order."""
    return list(dict.fromkeys(heading for figures in part.figures.values() for heading in figures))


def figure(part: Part, row: str, heading: str) -> str:
    found = part.figures.get(row, {}).get(heading)
    return "" if found is None else str(found)


def origin(results: Results) -> str:
    """Where the results come from, in a line."""
    found = list(results.values())
    one = found[0]
    commits = ", ".join(dict.fromkeys(r["commit"][:12] for r in found))
    versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
    dates = sorted(r["date"][:10] for r in found)
    train, evaluate = (range_of([r[kind]["places"] for r in found]) for kind in harness.KINDS)
    work = f"{train} training and {evaluate} evaluation places a run"
    machine = f"{one['machine']['device']}, {one['machine']['cores']} cores"
    hours = sum(r["seconds"] for r in found) / 3600
    return f"{work}; {hours:.2f} hours in all on {machine}; {dates[0]} to {dates[-1]}; commit {commits}; {versions}."


def range_of(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# -- plots ------------------------------------------------------------------------------------------------------------


def digest(markdown: str, results: Results) -> str:
    """What a plot is made from: the table's text, and every seed's measures."""
    measures = [[*pair, result["metrics"]] for pair, result in sorted(results.items())]
    return hashlib.sha256(json.dumps([markdown, measures], sort_keys=True).encode()).hexdigest()


def plot(table: Table, name: str, results: Results, path: Path, made_from: str) -> None:
    """A panel for each part and measure, ours with every seed's result, the paper's as printed; and the parts' own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    profile = table.profiles[name]
    width = max(len(profile.measures(part)) + len(headings(part)) + len(part.panels) for part in profile.parts)
    size = (3.2 * width, 2.6 * len(profile.parts))
    figure, grid = pyplot.subplots(len(profile.parts), width, figsize=size, squeeze=False, layout="constrained")
    for part, axes in zip(profile.parts, grid, strict=True):
        panels = [(m.heading, ours(part, profile, results, m.name), "C0") for m in profile.measures(part)]
        panels += [(f"paper, {h}", paper(part, h), "0.4") for h in headings(part)]
        for (heading, points, colour), panel in zip(panels, axes, strict=False):
            for place, values in enumerate(points):
                panel.plot([place] * len(values), values, ".", color=colour, alpha=0.4)
                if values:
                    deviation = statistics.stdev(values) if len(values) > 1 else 0
                    panel.errorbar(place, statistics.mean(values), deviation, fmt="o", color=colour, capsize=3)
            panel.set_title(heading, fontsize=8)
            panel.set_xticks(
                range(len(part.rows)), [row.name for row in part.rows], rotation=45, ha="right", fontsize=7
            )
            panel.set_xlim(-0.5, len(part.rows) - 0.5)
            panel.tick_params(axis="y", labelsize=7)
            panel.grid(alpha=0.3)
        axes[0].set_ylabel(part.title.split(":")[0], fontsize=8)
        pairs = {row.name: [(row.name, seed) for seed in profile.seeds] for row in part.rows}
        by_row = {name: [results[pair]["metrics"] for pair in row if pair in results] for name, row in pairs.items()}
        own = axes[len(panels) : len(panels) + len(part.panels)]
        for (heading, draw), panel in zip(part.panels, own, strict=True):
            draw(panel, by_row)
            panel.set_title(heading, fontsize=8)
            panel.tick_params(labelsize=7)
        for panel in axes[len(panels) + len(own) :]:
            panel.set_axis_off()
    figure.suptitle(f"{table.title} ({name} profile)", fontsize=10)
    harness.whole(path, lambda part: figure.savefig(part, dpi=120, format="png", metadata={"Description": made_from}))
    pyplot.close(figure)


def ours(part: Part, profile: Profile, results: Results, metric: str) -> list[list[float]]:
    pairs = [[(row.name, seed) for seed in profile.seeds] for row in part.rows]
    return [[results[pair]["metrics"][metric] for pair in row if pair in results] for row in pairs]


def paper(part: Part, heading: str) -> list[list[float]]:
    return [
        [figures[heading]] if heading in figures else []
        for figures in (part.figures.get(r.name, {}) for r in part.rows)
    ]


def made_from(path: Path) -> str:
    """What `plot` wrote into a PNG of its origin."""
    from PIL import Image

    with Image.open(path) as image:
        return str(image.info.get("Description", ""))


# -- files ------------------------------------------------------------------------------------------------------------


def gather(table: Table, name: str, results: Path) -> Results:
    """A profile's results.

    Raises:
        ValueError: if one comes from an uncommitted tree.
    """
    found = harness.read(results, table, name)
    for (row, seed), result in found.items():
        if result["dirty"]:
            path = harness.path_of(results, table, name, table.profiles[name].rows[row], seed)
            raise ValueError(f"{path} comes from an uncommitted tree: commit, and run it again without --dirty")
    seeds = table.profiles[name].seeds
    return {pair: result for pair, result in found.items() if pair[1] in seeds}


def update(tables: list[Table], results: Path = RESULTS, readme: Path = README, *, check: bool = False) -> list[str]:
    """Writes what differs from the results, or with `check` only names it: the paths, with what is wrong."""
    stale: list[str] = []
    shown: dict[str, str] = {}
    for table in tables:
        for name in table.profiles:
            found = gather(table, name, results)
            text, image = (results / table.name / f"{name}{suffix}" for suffix in (".md", ".png"))
            written = markdown(table, name, found, image.name)
            shown[f"{table.name}/{name}"] = written.replace(f"({image.name})", f"({address(image, readme)})")
            if not written:
                stale += [f"{path}: there are no results for it" for path in (text, image) if path.exists()]
                continue
            if not text.exists() or text.read_text(encoding="utf-8") != written:
                stale.append(f"{text}: differs from its results")
                if not check:
                    harness.whole(text, functools.partial(Path.write_text, data=written, encoding="utf-8"))
            key = digest(written, found)
            if not image.exists() or made_from(image) != key:
                stale.append(f"{image}: was not made from these results")
                if not check:
                    plot(table, name, found, image, key)
    for module in (bench, bench_many, bench_qlora, bench_longlora, bench_serving, serving_exact):
        path = results / module.RESULT.name
        shown[path.stem] = module.report(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ""
    return stale + in_readme(shown, readme, check)


def address(image: Path, readme: Path) -> str:
    return image.relative_to(readme.parent).as_posix() if image.is_relative_to(readme.parent) else image.as_posix()


def in_readme(shown: dict[str, str], readme: Path, check: bool) -> list[str]:
    before = readme.read_text(encoding="utf-8") if readme.exists() else ""

    def fill(match: re.Match[str]) -> str:
        name = match[2] if match[2] in shown else f"{match[2]}/laptop"
        if name not in shown:
            raise ValueError(f"{readme} has a place for the table {name!r}: choose from {', '.join(shown)}")
        return f"{match[1]}{shown[name] or 'No results yet.' + chr(10)}{match[3]}"

    after = PLACE.sub(fill, before)
    if after == before:
        return []
    if not check:
        harness.whole(readme, functools.partial(Path.write_text, data=after, encoding="utf-8"))
    return [f"{readme}: its tables differ from the results"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is stale")
    given = parser.parse_args(arguments)
    tables = [harness.find(name) for name in TABLES]
    try:
        stale = update(tables, check=given.check)
        stale += in_readme({"parameter_counts": parameter_counts.report()}, COUNTS, given.check)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    for table in tables:
        for name, profile in table.profiles.items():
            count = len(gather(table, name, RESULTS))
            print(f"{table.name}, {name}: {count} of {len(profile.rows) * len(profile.seeds)} runs")
    if given.check and stale:
        parser.exit(1, "\n".join([*stale, "run `make tables`, and commit what it writes\n"]))
    for message in stale:
        print(f"wrote {message.split(':')[0]}")


if __name__ == "__main__":
    main()
