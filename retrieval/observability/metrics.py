"""What operators see: Prometheus metrics at under a microsecond per event, structured logs without query text, traces per stage."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

log = logging.getLogger("omni")

SECONDS_BOUNDS = (
    *(round(base * 10.0**power, 7) for power in range(-5, 1) for base in (1.0, 1.8, 3.2, 5.6)),
    10.0,
    30.0,
)
"""Upper bounds of the latency histograms, 10 microseconds to 30 seconds, four per decade."""

Labels = tuple[str, ...]

STAGES = ("queue", "encode", "search", "rerank")
"""Of a call, in the order in which they run; the names of the fields ``*_ns`` of ``Timings``."""

CATALOGUE: dict[str, tuple[str, str, Labels]] = {
    "omni_requests": ("counter", "Finished calls by method and gRPC code.", ("method", "code")),
    "omni_request_seconds": ("histogram", "Time inside the server per call.", ("method",)),
    "omni_stage_seconds": (
        "histogram",
        "Time per stage: queue, encode, search, rerank.",
        ("stage",),
    ),
    "omni_searches": ("counter", "Searches by entity type and plan.", ("entity_type", "plan")),
    "omni_in_flight": ("gauge", "Places taken by requests inside the server.", ()),
    "omni_refused": ("counter", "Requests refused because the server was full.", ()),
    "omni_ready": ("gauge", "1 when a release is served.", ()),
    "omni_cache_hits": ("counter", "Query vectors found in the in-process cache.", ()),
    "omni_cache_misses": ("counter", "Query vectors not found in the in-process cache.", ()),
    "omni_cache_shared": ("counter", "Misses that joined an encode under way.", ()),
    "omni_cache_evictions": ("counter", "Entries that left the cache.", ()),
    "omni_cache_entries": ("gauge", "Entries in the cache.", ()),
    "omni_cache_bytes": ("gauge", "Estimated bytes in the cache.", ()),
    "omni_cached_answers_hits": ("counter", "Answers found in the answer cache.", ()),
    "omni_cached_answers_misses": (
        "counter",
        "Answers that could have been cached and were searched for.",
        (),
    ),
    "omni_cached_answers": ("gauge", "Answers in the cache.", ()),
    "omni_cached_answers_bytes": ("gauge", "Estimated bytes of cached answers.", ()),
    "omni_answers_kept_hits": ("counter", "Former name of omni_cached_answers_hits.", ()),
    "omni_answers_kept_misses": ("counter", "Former name of omni_cached_answers_misses.", ()),
    "omni_answers_kept": ("gauge", "Former name of omni_cached_answers.", ()),
    "omni_answers_kept_bytes": ("gauge", "Former name of omni_cached_answers_bytes.", ()),
    "omni_redis": (
        "counter",
        (
            "Redis look-ups by outcome: hit, miss, failure, refused (the value was not what its key"
            " says)."
        ),
        ("outcome",),
    ),
    "omni_encode_batches": ("counter", "Batches run by the query tower.", ()),
    "omni_encode_texts": ("counter", "Texts encoded.", ()),
    "omni_encode_dropped": (
        "counter",
        "Texts dropped from the queue because their caller had gone.",
        (),
    ),
    "omni_encode_waiting": ("gauge", "Texts waiting for the query tower.", ()),
    "omni_release_info": (
        "gauge",
        "1 for the release being served.",
        ("release_id", "space_id", "form_id"),
    ),
    "omni_release_swaps": ("counter", "Releases taken into service.", ()),
    "omni_releases_refused": ("counter", "Releases refused, by kind of error.", ("reason",)),
    "omni_release_load_seconds": ("gauge", "Load, verify and prove of the last release.", ()),
    "omni_prewarmed_queries": (
        "counter",
        "Cached queries encoded again before a swap to a new space.",
        (),
    ),
    "omni_live_sequence": ("gauge", "Last live-log entry visible.", ("entity_type",)),
    "omni_live_failing": ("gauge", "1 while the live log cannot be read.", ()),
    "omni_shadow_samples": (
        "counter",
        "Live searches answered again exactly.",
        ("entity_type", "selectivity", "language"),
    ),
    "omni_shadow_recall": (
        "gauge",
        "ANN recall@k of live searches over the last window.",
        ("entity_type", "selectivity", "language"),
    ),
    "omni_shadow_recall_low": (
        "gauge",
        "Lower end of the 95% interval.",
        ("entity_type", "selectivity", "language"),
    ),
    "omni_shadow_recall_high": (
        "gauge",
        "Upper end of the 95% interval.",
        ("entity_type", "selectivity", "language"),
    ),
    "omni_shadow_recall_minute": (
        "gauge",
        "The same over the last minute.",
        ("entity_type", "selectivity", "language"),
    ),
    "omni_shadow_recall_minute_high": (
        "gauge",
        "Upper end of its 95% interval: alert when it is below the target.",
        ("entity_type", "selectivity", "language"),
    ),
    "omni_shadow_skipped": (
        "counter",
        "Sampled searches not replayed: budget spent or queue full.",
        (),
    ),
    "omni_impressions_dropped": (
        "counter",
        "Impressions lost because the log could not keep up.",
        (),
    ),
    "omni_process_rss_bytes": ("gauge", "Resident memory.", ()),
}
"""Every metric: kind, help, label names. Counters get the suffix _total."""

Snapshot = dict[str, dict[str, Any]]
"""Metric -> labels joined by U+001F -> number, or [bucket counts..., sum] for a histogram.

Plain JSON.
"""

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
        """The histogram of these labels; keep it, so that the hot path need not look it up."""
        return self._histograms.setdefault(name, {}).setdefault(labels, Histogram())

    def value(self, name: str, labels: Labels = ()) -> float:
        """Current value of a counter or of a source's metric; 0 if there is none."""
        found = self.snapshot().get(name, {}).get(SEPARATOR.join(labels), 0)
        return float(found) if not isinstance(found, list) else float(sum(found[:-1]))

    def add_source(self, source: Callable[[], Iterable[tuple[str, Labels, float]]]) -> None:
        """Register a function that is asked for current values at each scrape."""
        self._sources.append(source)

    def snapshot(self) -> Snapshot:
        """Everything as plain JSON values."""
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


AVERAGED = frozenset(
    f"omni_shadow_recall{end}" for end in ("", "_low", "_high", "_minute", "_minute_high")
)
MAXIMUM = frozenset({"omni_ready", "omni_release_info", "omni_release_load_seconds"})
MINIMUM = frozenset({"omni_live_sequence"})


def merge_snapshots(snapshots: Iterable[Snapshot]) -> Snapshot:
    """One picture of several workers: sums; the slowest worker's live sequence; recalls averaged."""
    collected: dict[str, dict[str, list[Any]]] = {}
    for snapshot in snapshots:
        for name, family in snapshot.items():
            for labels, value in family.items():
                collected.setdefault(name, {}).setdefault(labels, []).append(value)
    out: Snapshot = {}
    for name, families in collected.items():
        out[name] = {}
        for labels, values in families.items():
            if isinstance(values[0], list):
                out[name][labels] = [sum(column) for column in zip(*values, strict=True)]
            elif name in AVERAGED:
                out[name][labels] = sum(values) / len(values)
            else:
                out[name][labels] = (max if name in MAXIMUM else min if name in MINIMUM else sum)(
                    values
                )
    return out


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Turn a snapshot into Prometheus families; every metric of the catalogue appears, with or without samples."""
    for name, (kind, help_text, label_names) in CATALOGUE.items():
        samples = snapshot.get(name, {})
        if not label_names and not samples and kind != "histogram":
            samples = {"": 0}
        family: Any
        if kind == "histogram":
            family = HistogramMetricFamily(name, help_text, labels=label_names)
            for labels, row in samples.items():
                cumulative, buckets = 0, []
                for bound, value in zip((*SECONDS_BOUNDS, float("inf")), row[:-1], strict=True):
                    cumulative += value
                    buckets.append((f"{bound:g}" if bound != float("inf") else "+Inf", cumulative))
                family.add_metric(_labels(labels, label_names), buckets, row[-1])
        else:
            family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(
                name, help_text, labels=label_names
            )
            for labels, value in samples.items():
                family.add_metric(_labels(labels, label_names), value)
        yield family


def _labels(joined: str, names: Labels) -> list[str]:
    return joined.split(SEPARATOR) if names else []


class _Collector:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        return families(self._snapshot)


def exposition(snapshot: Snapshot) -> bytes:
    """The text that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(snapshot))  # type: ignore[arg-type]
    return generate_latest(registry)


def lasting(snapshot: Snapshot) -> Snapshot:
    """What a worker leaves behind when it ends: its counters and histograms, not its gauges."""
    return {
        name: family
        for name, family in snapshot.items()
        if name in CATALOGUE and CATALOGUE[name][0] != "gauge"
    }
