"""What Prometheus is told: the engine's counters and gauges, and what HTTP clients see.

Text by `prometheus_client`, into a registry of the server's own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

PREFIX = "peft_jax_"
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 6.0, 10.0, 30.0, 60.0, 120.0)
PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)


class Metrics:
    """Counts of answers by path and status; seconds to the first token, per token after it, and in all."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.answers = prometheus.Counter(
            PREFIX + "http_requests", "HTTP requests that were answered", ("path", "status"), **own
        )
        self.disconnects = prometheus.Counter(
            PREFIX + "http_disconnects", "Clients that left before their answer was whole", **own
        )
        self.open = prometheus.Gauge(PREFIX + "http_open_choices", "Choices that clients wait for", **own)
        self.first = prometheus.Histogram(
            PREFIX + "time_to_first_token_seconds", "From a request's arrival to a choice's first token",
            buckets=SECONDS, **own,
        )  # fmt: skip
        self.per_token = prometheus.Histogram(
            PREFIX + "time_per_output_token_seconds", "A choice's mean time between two tokens, behind its first",
            buckets=PER_TOKEN, **own,
        )  # fmt: skip
        self.whole = prometheus.Histogram(
            PREFIX + "request_seconds", "From a request's arrival to the end of a choice", buckets=SECONDS, **own
        )

    def text(self, stats: Mapping[str, float]) -> bytes:
        """The whole exposition.

        Args:
            stats: what the engine counts; ``name{label}`` gives the label `reason`.

        >>> b"peft_jax_rows_free 7.0" in Metrics().text({"rows_free": 7})
        True
        """
        engine = prometheus.CollectorRegistry()
        engine.register(_Stats(stats))
        return prometheus.generate_latest(engine) + prometheus.generate_latest(self.registry)


class _Stats:
    """The engine's numbers as families, read when Prometheus asks."""

    def __init__(self, stats: Mapping[str, float]) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for key, value in self.stats.items():
            name, _, label = key.removesuffix("}").partition("{")
            if name not in families:
                family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                words = name.removesuffix("_total").replace("_", " ")
                families[name] = family(PREFIX + name, f"The engine's {words}", labels=["reason"] if label else [])
            families[name].add_metric([label] if label else [], float(value))
        yield from families.values()


class Clock:
    """The times of one choice, observed as its events come.

    Args:
        metrics: where they are observed.
        arrived: when the request came, by the clock that stamps events.
    """

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self.metrics, self.arrived = metrics, arrived
        self.first: float | None = None
        self.last = arrived
        self.tokens = 0  # behind the first event

    def see(self, now: float, tokens: int, done: bool) -> None:
        """An event with `tokens` more; `done` when it was the last, and the answer whole."""
        if tokens and self.first is None:
            self.first = now
            self.metrics.first.observe(now - self.arrived)
            self.last = now
        elif tokens:
            self.last, self.tokens = now, self.tokens + tokens
        if done:
            self.metrics.whole.observe(now - self.arrived)
            if self.first is not None and self.tokens:
                self.metrics.per_token.observe((self.last - self.first) / self.tokens)
