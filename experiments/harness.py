"""What all paper tables share: their description, one run and what is recorded of it, and the results on disk.

    Table    a paper's table (or tables that one experiment answers), in two profiles
    Profile  one way to run it: `paper` on the real models and data, `laptop` on what packages carry
    Part     rows in the order of one of the paper's tables, and what the paper prints for them
    row      one configuration: a frozen dataclass with a `name` that never changes

A run is one (row, seed).  Its result is one small JSON file, ``results/<table>/<profile>/<row>.<seed>.<key>.json``,
where the key is a hash of the whole configuration: a finished run is never repeated, and a changed configuration is
another run.  A result appears whole or not at all, so a killed run is simply run again.
"""

import dataclasses
import datetime
import hashlib
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.provenance import ROOT, Peak, commit, machine, versions
from peft_jax import training
from peft_jax.training.losses import Batch
from peft_jax.training.step import Step

# Each is a module of this package with a TABLE.
TABLES = (
    "lora_ablation",
    "lora_family",
    "dylora_ranks",
    "adalora_ablation",
    "vera_ablation",
    "lora_family_e2e",
    "vera_alpaca",
    "prompt_ablation",
    "prefix_ablation",
    "p_tuning_v2_tasks",
    "quant_perplexity",
    "qlora_formats",
    "qalora_merge",
    "longlora_attention",
    "longlora_trainable",
)
RESULTS = Path(__file__).parent / "results"
KINDS = ("train", "evaluate")  # of work

Result = dict[str, Any]


class Work(NamedTuple):
    """Part of a run's cost.  `places` counts padding too: it is what is computed."""

    tokens: int
    places: int
    seconds: float = 0.0


class Outcome(NamedTuple):
    """What a profile's `run` gives: measures by name, trainable and total numbers, and the cost."""

    metrics: dict[str, float]
    trainable: int
    total: int
    train: Work
    evaluate: Work


class Speed(NamedTuple):
    """Places a second, recorded on some machine: what estimates start from until there are results."""

    train: float
    evaluate: float
    where: str


class Metric(NamedTuple):
    """A measure of our own: its name in the results, its heading, and how its numbers are printed."""

    name: str
    heading: str
    digits: int


class Panel(NamedTuple):
    """A picture of a part's results: ``draw(axes, found)``, where `found` holds each row's measures, a dict a seed."""

    heading: str
    draw: Callable[[Any, Mapping[str, list[dict[str, float]]]], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the paper's tables.

    figures     by row, what the paper prints for it, by heading
    stands_for  by row, the paper's own row where ours is not the same
    metrics     of these rows, where they are not the profile's
    panels      that are drawn beside a point for each row and measure
    """

    title: str
    rows: tuple[Any, ...]
    figures: Mapping[str, Mapping[str, float]]
    stands_for: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    panels: tuple[Panel, ...] = ()


@dataclasses.dataclass(frozen=True)
class Profile:
    """One way to run a table.

    settings    what all rows share: a frozen dataclass with the names `model` and `data`
    places      (settings, row) -> (training, evaluation) places of one run
    load        (settings, model, data) -> task: reads model and data once a process; None stands for the default source
    run         (task, settings, row, seed) -> Outcome
    """

    parts: tuple[Part, ...]
    settings: Any
    metrics: tuple[Metric, ...]
    speed: Speed
    places: Callable[[Any, Any], tuple[int, int]]
    load: Callable[[Any, str | None, str | None], Any]
    run: Callable[[Any, Any, Any, int], Outcome]
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def rows(self) -> dict[str, Any]:
        """All rows by name, each once."""
        return {row.name: row for part in self.parts for row in part.rows}

    def measures(self, part: Part) -> tuple[Metric, ...]:
        """What is measured of a part's rows."""
        return part.metrics or self.metrics


@dataclasses.dataclass(frozen=True)
class Table:
    """`paper` says where the paper's figures were read, and of what they are."""

    name: str
    title: str
    paper: str
    profiles: Mapping[str, Profile]


def find(name: str) -> Table:
    """The table called `name`.

    Raises:
        ValueError: if there is none, with those there are.
    """
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}: choose from {', '.join(TABLES)}")
    return importlib.import_module(f"experiments.{name}").TABLE


# -- results ----------------------------------------------------------------------------------------------------------


def config_of(profile: Profile, row: Any) -> dict[str, Any]:
    """Everything that a run depends on beside its seed, as JSON holds it."""
    return json.loads(json.dumps({**dataclasses.asdict(profile.settings), "row": dataclasses.asdict(row)}))


def key_of(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def path_of(results: Path, table: Table, profile: str, row: Any, seed: int) -> Path:
    key = key_of(config_of(table.profiles[profile], row))
    return results / table.name / profile / f"{row.name}.{seed}.{key}.json"


def read(results: Path, table: Table, profile: str) -> dict[tuple[str, int], Result]:
    """The results of a profile as it is configured now, by row and seed.

    Raises:
        ValueError: if a file is not a result, or not the one that its name says.
    """
    found = {}
    for row in table.profiles[profile].rows.values():
        folder = results / table.name / profile
        for path in sorted(folder.glob(f"{row.name}.*.{key_of(config_of(table.profiles[profile], row))}.json")):
            try:
                result = json.loads(path.read_text(encoding="utf-8"))
                same = result["row"] == row.name and key_of(result["config"]) == path.name.split(".")[-2]
                seed = int(result["seed"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not a result: delete it, and run it again ({error!r})") from None
            if not same or path.name.split(".")[-3] != str(seed):
                raise ValueError(f"{path} holds another run's result: delete it, and run it again")
            found[row.name, seed] = result
    return found


def write(path: Path, result: Result) -> None:
    whole(path, lambda part: part.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8"))


def whole(path: Path, fill: Callable[[Path], Any]) -> None:
    """Writes a file whole or not at all: `fill` is given another name, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        fill(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# -- running ----------------------------------------------------------------------------------------------------------


def estimate(profile: Profile, pending: list[tuple[Any, int]], done: list[Result]) -> str:
    """What the pending runs will cost, at the speed of those that are done, or else the recorded one."""
    speed = profile.speed
    if done:
        rates = [statistics.median(r[k]["places"] / max(r[k]["seconds"], 1e-9) for r in done) for k in KINDS]
        speed = Speed(rates[0], rates[1], f"measured in {len(done)} runs")
    places = [profile.places(profile.settings, row) for row, _ in pending]
    train, evaluate = sum(t for t, _ in places), sum(e for _, e in places)
    times = ((train, speed.train), (evaluate, speed.evaluate))
    minutes = sum(number / rate for number, rate in times if rate) / 60  # half of the runs may not train
    time = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
    return (
        f"estimate: {len(pending)} runs, {train:,} training + {evaluate:,} evaluation places: about {time} "
        f"at {speed.train:,.0f} and {speed.evaluate:,.0f} a second ({speed.where}), compilation apart"
    )


def run(
    table: Table,
    profile_name: str,
    *,
    seeds: tuple[int, ...] | None = None,
    only: tuple[str, ...] = (),
    model: str | None = None,
    data: str | None = None,
    dirty: bool = False,
    results: Path = RESULTS,
    root: Path = ROOT,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Runs what is not finished, row by row; returns the files it wrote.

    Raises:
        ValueError: if a row is unknown, or the tree differs from its commit and `dirty` does not allow it.
    """
    table, profile = with_sources(table, profile_name, model, data)
    if unknown := sorted(set(only) - set(profile.rows)):
        raise ValueError(f"{table.name} has no row {unknown[0]!r} in {profile_name}: {', '.join(profile.rows)}")
    rows = [row for name, row in profile.rows.items() if not only or name in only]
    wanted = [(row, seed) for row in rows for seed in (profile.seeds if seeds is None else seeds)]
    found = read(results, table, profile_name)
    done = {pair for pair, result in found.items() if dirty or not result["dirty"]}
    pending = [(row, seed) for row, seed in wanted if (row.name, seed) not in done]
    say(f"{table.name}, {profile_name}: {len(wanted) - len(pending)} of {len(wanted)} runs are finished")
    if not pending:
        return []
    say(estimate(profile, pending, list(found.values())))
    here, changes = commit(root)
    if changes and not dirty:
        raise ValueError(
            f"the tree differs from commit {here[:12]} ({', '.join(changes[:3])}{', …' if len(changes) > 3 else ''}): "
            "commit first, or run with --dirty, whose results are marked and enter no table"
        )
    source = {"commit": here, "dirty": bool(changes), "versions": versions(), "machine": machine()}
    task = profile.load(profile.settings, model, data)
    written = []
    for number, (row, seed) in enumerate(pending, 1):
        begin = time.perf_counter()
        with Peak() as peak:
            outcome = profile.run(task, profile.settings, row, seed)
        result = {
            "table": table.name,
            "profile": profile_name,
            "row": row.name,
            "seed": seed,
            "config": config_of(profile, row),
            "metrics": outcome.metrics,
            "trainable": outcome.trainable,
            "total": outcome.total,
            **{name: getattr(outcome, name)._asdict() for name in KINDS},
            "seconds": time.perf_counter() - begin,
            "peak_bytes": peak.bytes,
            "peak_of": peak.of,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **source,
        }
        written.append(path_of(results, table, profile_name, row, seed))
        write(written[-1], rounded(result))
        measures = profile.measures(next(part for part in profile.parts if row in part.rows))
        shown = ", ".join(f"{m.heading} {outcome.metrics[m.name]:.{m.digits}f}" for m in measures)
        say(f"{number}/{len(pending)} {row.name}, seed {seed}: {shown} ({result['seconds']:.0f} s)")
    return written


def with_sources(table: Table, name: str, model: str | None, data: str | None) -> tuple[Table, Profile]:
    """The table whose profile reads another model or other data; their last names are part of the configuration."""
    if name not in table.profiles:
        raise ValueError(f"{table.name} has no profile {name!r}: choose from {', '.join(table.profiles)}")
    profile = table.profiles[name]
    given = {k: Path(v).name for k, v in (("model", model), ("data", data)) if v is not None}
    profile = dataclasses.replace(profile, settings=dataclasses.replace(profile.settings, **given))
    return dataclasses.replace(table, profiles={**table.profiles, name: profile}), profile


def rounded(x: Any) -> Any:
    """Floats to eight digits: results stay readable, and no difference that matters is lost."""
    if isinstance(x, float):
        return float(f"{x:.8g}")
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return x


def train(
    step: Step, state: training.State, frozen: Any, batch: Callable[[int], Batch], steps: int
) -> tuple[training.State, Work]:
    """Takes `steps` steps of a compiled step that several runs share (`training.fit` compiles its own).

    Raises:
        FloatingPointError: if one was not finite.
    """
    tokens = places = 0
    finite = jnp.bool_(True)
    begin = time.perf_counter()
    for index in range(steps):
        rows = batch(index)
        tokens, places = tokens + int(rows["mask"].sum()), places + rows["tokens"].size
        state, measured = step(state, frozen, rows)
        finite &= measured["finite"]
    if not bool(finite):
        raise FloatingPointError("a training step was not finite: this configuration diverges")
    return jax.block_until_ready(state), Work(tokens, places, time.perf_counter() - begin)
