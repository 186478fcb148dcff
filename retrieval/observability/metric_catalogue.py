"""Every metric of a server: its kind, its help and the names of its labels."""

from __future__ import annotations

from typing import NamedTuple

Labels = tuple[str, ...]

STAGES = ("queue", "encode", "search", "rerank")
"""Of a call, in the order in which they run; the names of the fields ``*_ns`` of ``Timings``."""


class MetricDefinition(NamedTuple):
    """One metric. A counter's name gets the suffix ``_total`` when it is exposed."""

    kind: str  # counter, gauge or histogram
    help: str
    labels: Labels = ()


def _counter(help: str, *labels: str) -> MetricDefinition:
    return MetricDefinition("counter", help, labels)


def _gauge(help: str, *labels: str) -> MetricDefinition:
    return MetricDefinition("gauge", help, labels)


def _histogram(help: str, *labels: str) -> MetricDefinition:
    return MetricDefinition("histogram", help, labels)


_SLICE = ("entity_type", "selectivity", "language")

CATALOGUE: dict[str, MetricDefinition] = {
    # Calls
    "omni_requests": _counter("Finished calls by method and gRPC code.", "method", "code"),
    "omni_request_seconds": _histogram("Time inside the server per call.", "method"),
    "omni_stage_seconds": _histogram("Time per stage: queue, encode, search, rerank.", "stage"),
    "omni_searches": _counter("Searches by entity type and plan.", "entity_type", "plan"),
    "omni_in_flight": _gauge("Places taken by requests inside the server."),
    "omni_refused": _counter("Requests refused because the server was full."),
    "omni_ready": _gauge("1 when a release is served."),
    # Query cache and encoder
    "omni_cache_hits": _counter("Query vectors found in the in-process cache."),
    "omni_cache_misses": _counter("Query vectors not found in the in-process cache."),
    "omni_cache_shared": _counter("Misses that joined an encode under way."),
    "omni_cache_evictions": _counter("Entries that left the query cache."),
    "omni_cache_entries": _gauge("Entries in the query cache."),
    "omni_cache_bytes": _gauge("Estimated bytes in the query cache."),
    "omni_redis": _counter(
        "Redis look-ups by outcome: hit, miss, failure, refused (a value that is not its key's).",
        "outcome",
    ),
    "omni_queries_not_understood": _counter(
        "Queries of which the query tower's tokenizer does not know most characters."
    ),
    "omni_encode_batches": _counter("Batches run by the query tower."),
    "omni_encode_texts": _counter("Texts encoded."),
    "omni_encode_dropped": _counter("Queued texts dropped because their caller had gone."),
    "omni_encode_waiting": _gauge("Texts waiting for the query tower."),
    # Answer cache
    "omni_cached_answers_hits": _counter(
        "Answers found in the answer cache: an earlier search of the same text and target."
    ),
    "omni_cached_answers_misses": _counter(
        "Answers that could have been in the answer cache and were searched for."
    ),
    "omni_cached_answers": _gauge("Answers in the answer cache."),
    "omni_cached_answers_bytes": _gauge("Estimated bytes in the answer cache."),
    # Releases and live writes
    "omni_release_info": _gauge(
        "1 for the release that is served.", "release_id", "space_id", "form_id"
    ),
    "omni_release_swaps": _counter("Releases taken into service."),
    "omni_releases_refused": _counter("Releases refused, by kind of error.", "reason"),
    "omni_release_load_seconds": _gauge("Time to load, verify and prove the last release."),
    "omni_prewarmed_queries": _counter(
        "Cached queries encoded again before a swap to a new space."
    ),
    "omni_store_age_seconds": _gauge("Time since the store at a URL answered last."),
    "omni_store_failing": _gauge("1 when the last look at the store at a URL failed."),
    "omni_live_sequence": _gauge("Last live-log entry visible.", "entity_type"),
    "omni_live_failing": _gauge("1 while the live log cannot be read."),
    # Shadow recall
    "omni_shadow_samples": _counter("Live searches answered again exactly.", *_SLICE),
    "omni_shadow_recall": _gauge("ANN recall@k of live searches over the last window.", *_SLICE),
    "omni_shadow_recall_low": _gauge("Lower end of the 95% interval.", *_SLICE),
    "omni_shadow_recall_high": _gauge("Upper end of the 95% interval.", *_SLICE),
    "omni_shadow_recall_minute": _gauge(
        "ANN recall@k of live searches over the last minute.", *_SLICE
    ),
    "omni_shadow_recall_minute_high": _gauge(
        "Upper end of its 95% interval: alert when it is below the target.", *_SLICE
    ),
    "omni_shadow_skipped": _counter("Sampled searches not replayed: budget spent or queue full."),
    # Connections of the gRPC port (http2 transport)
    "omni_transport_connections": _gauge("Open connections."),
    "omni_transport_connections_opened": _counter("Connections opened."),
    "omni_transport_streams": _gauge("Calls that are open on all connections."),
    "omni_transport_streams_opened": _counter("Streams that clients have opened."),
    "omni_transport_held_bytes": _gauge("Bytes of unanswered requests and unread answers."),
    "omni_transport_received_bytes": _counter("Bytes received, frames included, TLS not."),
    "omni_transport_sent_bytes": _counter("Bytes sent, frames included, TLS not."),
    "omni_transport_control_frames": _counter("Frames received that are not HEADERS or DATA."),
    "omni_transport_client_resets": _counter("Streams that clients have reset: calls given up."),
    "omni_transport_resets": _counter("Streams that the server has reset, by code.", "code"),
    "omni_transport_goaways": _counter(
        "Connections told to go, by code: NO_ERROR drains, the others end at once.", "code"
    ),
    "omni_transport_ended_calls": _counter(
        "Calls that the transport has ended by itself, by status.", "status"
    ),
    "omni_transport_aborted_connections": _counter("Connections cut, by reason.", "reason"),
    # The rest
    "omni_impressions_dropped": _counter("Impressions lost because the log could not keep up."),
    "omni_process_rss_bytes": _gauge("Resident memory."),
}

FORMER_NAMES: dict[str, str] = {
    "omni_answers_kept_hits": "omni_cached_answers_hits",
    "omni_answers_kept_misses": "omni_cached_answers_misses",
    "omni_answers_kept": "omni_cached_answers",
    "omni_answers_kept_bytes": "omni_cached_answers_bytes",
}
"""Old name -> the metric that it is now; exposed for one version more, with the same values."""

AVERAGED = frozenset(
    f"omni_shadow_recall{end}" for end in ("", "_low", "_high", "_minute", "_minute_high")
)
MAXIMUM = frozenset(
    {
        "omni_ready",
        "omni_release_info",
        "omni_release_load_seconds",
        "omni_store_age_seconds",
        "omni_store_failing",
    }
)
MINIMUM = frozenset({"omni_live_sequence"})
"""Metrics that workers do not add up: their mean, largest or smallest value counts."""
