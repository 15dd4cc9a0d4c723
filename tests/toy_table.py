"""A toy paper table, for tests of the harness."""

import dataclasses

from experiments.harness import Metric, Outcome, Part, Profile, Speed, Table, Work


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str = "toy-model"
    data: str = "toy-data"
    steps: int = 4


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    width: int


ROWS = (Row("narrow", 1), Row("wide", 3))


def outcome(task, settings, row, seed):
    task.append((row.name, seed))
    metrics = {"score": 10.0 * row.width + seed / 3, "loss": 1 / row.width}
    return Outcome(metrics, 8 * row.width, 100, Work(300, 400, 2.0), Work(90, 100, 0.25))


def toy(run=outcome, calls=None, **settings):
    parts = (
        Part("Table 1: widths", ROWS, {"narrow": {"GLUE": 88.0}, "wide": {"GLUE": 89.5}}, {"wide": "wider"}),
        Part("Table 2: the wide one", ROWS[1:], {}),
    )
    places = lambda s, row: (100 * s.steps, 100)  # noqa: E731
    metrics = (Metric("score", "score, %", 1), Metric("loss", "loss, nats", 3))
    load = lambda *sources: [] if calls is None else calls  # noqa: E731
    profile = Profile(parts, Settings(**settings), metrics, Speed(200, 50, "recorded"), places, load, run)
    return Table("toy", "A toy", "A. Author 2020, Table 1", {"laptop": profile})
