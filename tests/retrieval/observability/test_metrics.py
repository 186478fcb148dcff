"""Metrics, logs and traces."""

import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from retrieval.observability.call_log import FinishedCall
from retrieval.observability.logs import PACKAGES, JsonFormatter, configure_logging
from retrieval.observability.metric_catalogue import CATALOGUE, FORMER_NAMES
from retrieval.observability.metrics import Metrics, exposition, merge_snapshots
from retrieval.observability.tracing import Tracer, rpc_attributes


def sample(metrics: Metrics) -> dict:
    return {
        f.name: f for f in text_string_to_metric_families(exposition(metrics.snapshot()).decode())
    }


def test_exposition_holds_every_metric_of_the_catalogue() -> None:
    metrics = Metrics()
    metrics.count("omni_requests", ("Retrieve", "OK"), 3)
    metrics.histogram("omni_request_seconds", ("Retrieve",)).observe(0.004)
    families = sample(metrics)
    assert set(families) == set(CATALOGUE) | set(FORMER_NAMES)
    assert families["omni_requests"].samples[0].value == 3
    buckets = {
        s.labels["le"]: s.value
        for s in families["omni_request_seconds"].samples
        if s.name.endswith("_bucket")
    }
    assert buckets["0.0032"] == 0 and buckets["0.0056"] == 1 and buckets["+Inf"] == 1
    assert (
        metrics.value("omni_requests", ("Retrieve", "OK")) == 3
        and metrics.value("omni_request_seconds", ("Retrieve",)) == 1
    )


def test_exposition_former_name_has_the_values_of_the_new_one() -> None:
    metrics = Metrics()
    metrics.add_source(
        lambda: [("omni_cached_answers_hits", (), 4.0), ("omni_cached_answers_bytes", (), 90.0)]
    )
    families = sample(metrics)
    for former, value in (("omni_answers_kept_hits", 4.0), ("omni_answers_kept_bytes", 90.0)):
        (found,) = families[former].samples
        assert found.value == value
        assert FORMER_NAMES[former] in families[former].documentation


def test_merge_snapshots_sums_counters_and_takes_slowest_sequence() -> None:
    a, b = Metrics(), Metrics()
    for metrics, sequence, ready in ((a, 7.0, 1.0), (b, 5.0, 0.0)):
        metrics.count("omni_requests", ("Retrieve", "OK"), 2)
        metrics.histogram("omni_request_seconds", ("Retrieve",)).observe(0.1)
        metrics.add_source(
            lambda s=sequence, r=ready: [("omni_live_sequence", ("pin",), s), ("omni_ready", (), r)]
        )
    merged = merge_snapshots([a.snapshot(), json.loads(json.dumps(b.snapshot()))])
    assert merged["omni_requests"] == {"Retrieve\x1fOK": 4}
    assert sum(merged["omni_request_seconds"]["Retrieve"][:-1]) == 2
    assert merged["omni_live_sequence"] == {"pin": 5.0}, "the slowest worker counts"
    assert merged["omni_ready"] == {"": 1.0}


def test_json_formatter_extra_fields_are_in_the_line() -> None:
    record = logging.LogRecord("omni.x", logging.INFO, "f", 1, "served %s", ("r1",), None)
    record.release_id = "r1"
    line = json.loads(JsonFormatter().format(record))
    assert line["message"] == "served r1" and line["release_id"] == "r1" and line["level"] == "info"


def test_configure_logging_library_lines_are_written_once_in_the_same_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(list(one.handlers), one.level, one.propagate) for one in loggers]
    try:
        configure_logging(as_json=True)
        for name in ("retrieval.x", "index_builder.y", "encoders.z"):
            logging.getLogger(name).warning("hello from %s", name)
    finally:
        for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
            one.handlers[:] = handlers
            one.setLevel(level)
            one.propagate = propagate
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["logger"] for line in lines] == ["retrieval.x", "index_builder.y", "encoders.z"]


def test_tracer_call_joins_callers_trace_with_a_span_per_stage() -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    provider = trace.TracerProvider()
    exporter = memory.InMemorySpanExporter()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    stages = {"queue": 0, "encode": 300, "search": 200}
    Tracer(provider=provider).record(
        "Retrieve", 1000, 2000, stages, {"k": 5}, [("traceparent", parent)]
    )
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"Retrieve", "encode", "search"}
    assert format(spans["Retrieve"].context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert (spans["search"].start_time, spans["search"].end_time) == (1300, 1500)


@pytest.mark.parametrize(
    ("code", "peer", "more"),
    [
        ("OK", "ipv4:10.0.0.7:41000", ("10.0.0.7", 41000, None)),
        ("NOT_FOUND", "ipv6:[::1]:9", ("::1", 9, None)),
        ("INTERNAL", "unix:/run/x", (None, None, "INTERNAL")),
    ],
)
def test_rpc_attributes_have_the_names_of_the_conventions(
    code: str, peer: str, more: tuple[str | None, int | None, str | None]
) -> None:
    call = FinishedCall(
        method="Retrieve",
        code=code,
        seconds=0.1,
        peer=peer,
        token="",
        metadata=(),
        request=None,
        response=None,
        service="omnisearchsage.v1.Retrieval",
    )
    names = ("network.peer.address", "network.peer.port", "error.type")
    wanted = {name: value for name, value in zip(names, more, strict=True) if value is not None}
    assert rpc_attributes(call) == {
        "rpc.system.name": "grpc",
        "rpc.method": "omnisearchsage.v1.Retrieval/Retrieve",
        "rpc.response.status_code": code,
        **wanted,
    }
