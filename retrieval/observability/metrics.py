"""Prometheus metrics of one worker at under a microsecond an event, and how workers are merged."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from retrieval.observability.metric_catalogue import (
    AVERAGED,
    CATALOGUE,
    FORMER_NAMES,
    MAXIMUM,
    MINIMUM,
    Labels,
    MetricDefinition,
)

SECONDS_BOUNDS = (
    *(round(base * 10.0**power, 7) for power in range(-5, 1) for base in (1.0, 1.8, 3.2, 5.6)),
    10.0,
    30.0,
)
"""Upper bounds of the latency histograms, 10 microseconds to 30 seconds, four per decade."""

Snapshot = dict[str, dict[str, Any]]
"""Metric -> labels joined by U+001F -> number, or [bucket counts..., sum] for a histogram."""

SEPARATOR = "\x1f"


class Histogram:
    """Bucket counts and a sum; ``observe`` takes about 300 ns."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS_BOUNDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect_left(SECONDS_BOUNDS, seconds)] += 1
        self.total += seconds


class Metrics:
    """The numbers of one worker.

    Used from its event loop; other threads only add to counters, where a lost update is harmless.
    """

    def __init__(self) -> None:
        self._counters: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, dict[Labels, Histogram]] = {}
        self._sources: list[Callable[[], Iterable[tuple[str, Labels, float]]]] = []

    def count(self, name: str, labels: Labels = (), amount: float = 1) -> None:
        """Add to a counter."""
        family = self._counters.get(name)
        if family is None:
            family = self._counters[name] = {}
        family[labels] = family.get(labels, 0) + amount

    def histogram(self, name: str, labels: Labels = ()) -> Histogram:
        """Return the histogram of these labels; hot paths hold it instead of looking it up."""
        return self._histograms.setdefault(name, {}).setdefault(labels, Histogram())

    def value(self, name: str, labels: Labels = ()) -> float:
        """Return the current value of a counter or of a source's metric; 0 if there is none."""
        found = self.snapshot().get(name, {}).get(SEPARATOR.join(labels), 0)
        return float(found) if not isinstance(found, list) else float(sum(found[:-1]))

    def add_source(self, source: Callable[[], Iterable[tuple[str, Labels, float]]]) -> None:
        """Register a function that is asked for current values at each scrape."""
        self._sources.append(source)

    def snapshot(self) -> Snapshot:
        """Return everything as plain JSON values."""
        out: Snapshot = {}
        for name, family in self._counters.items():
            out[name] = {SEPARATOR.join(labels): value for labels, value in list(family.items())}
        for name, histograms in self._histograms.items():
            out[name] = {
                SEPARATOR.join(labels): [*h.counts, h.total]
                for labels, h in list(histograms.items())
            }
        for source in self._sources:
            for name, labels, value in source():
                out.setdefault(name, {})[SEPARATOR.join(labels)] = value
        return out


def merge_snapshots(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Merge the snapshots of several workers: sums, but recalls are averaged.

    Of live sequences the slowest worker's counts.
    """
    collected: dict[str, dict[str, list[Any]]] = {}
    for snapshot in snapshots:
        for name, family in snapshot.items():
            for labels, value in family.items():
                collected.setdefault(name, {}).setdefault(labels, []).append(value)
    return {
        name: {labels: _merged(name, values) for labels, values in family.items()}
        for name, family in collected.items()
    }


def _merged(name: str, values: list[Any]) -> Any:
    """Merge the values of one metric under one set of labels."""
    if isinstance(values[0], list):
        return [sum(column) for column in zip(*values, strict=True)]
    if name in AVERAGED:
        return sum(values) / len(values)
    if name in MAXIMUM:
        return max(values)
    return min(values) if name in MINIMUM else sum(values)


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Turn a snapshot into Prometheus families, one for every metric of the catalogue."""
    for name, definition in CATALOGUE.items():
        yield _family(name, definition, snapshot.get(name, {}))
    for former, name in FORMER_NAMES.items():
        help_text = f"Former name of {name}; will go in the next version."
        yield _family(former, CATALOGUE[name]._replace(help=help_text), snapshot.get(name, {}))


def _family(name: str, definition: MetricDefinition, samples: dict[str, Any]) -> Metric:
    """Make one Prometheus family; one without labels has a sample even before the first event."""
    kind, help_text, label_names = definition
    if kind == "histogram":
        histogram = HistogramMetricFamily(name, help_text, labels=label_names)
        for labels, row in samples.items():
            histogram.add_metric(_labels(labels, label_names), _buckets(row[:-1]), row[-1])
        return histogram
    family: CounterMetricFamily | GaugeMetricFamily
    if kind == "counter":
        family = CounterMetricFamily(name, help_text, labels=label_names)
    else:
        family = GaugeMetricFamily(name, help_text, labels=label_names)
    if not label_names and not samples:
        samples = {"": 0}
    for labels, value in samples.items():
        family.add_metric(_labels(labels, label_names), value)
    return family


def _buckets(counts: list[int]) -> list[tuple[str, int]]:
    """Return upper bounds, as Prometheus writes them, with cumulative counts."""
    bounds = [*(f"{bound:g}" for bound in SECONDS_BOUNDS), "+Inf"]
    return list(zip(bounds, accumulate(counts), strict=True))


def _labels(joined: str, names: Labels) -> list[str]:
    return joined.split(SEPARATOR) if names else []


class _Collector:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        return families(self._snapshot)


def exposition(snapshot: Snapshot) -> bytes:
    """Return the text that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot))  # type: ignore[arg-type]
    return generate_latest(registry)


def lasting(snapshot: Snapshot) -> Snapshot:
    """Return what outlives a worker: its counters and histograms, not its gauges."""
    return {
        name: family
        for name, family in snapshot.items()
        if name in CATALOGUE and CATALOGUE[name].kind != "gauge"
    }
