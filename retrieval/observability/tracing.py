"""OpenTelemetry spans around calls and their stages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from encoders.errors import MissingDependency
from retrieval.observability.call_log import FinishedCall
from retrieval.observability.metric_catalogue import STAGES

FAULTS = frozenset(
    ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
)
"""Statuses of gRPC that are errors of the server in OpenTelemetry's conventions."""


class Tracer:
    """Writes OpenTelemetry spans, one per call and one per stage.

    They are written after the call, from its timings: the hot path pays nothing for them.

    Args:
        endpoint: OTLP/gRPC collector, e.g. ``http://localhost:4317``; None uses the tracer provider
            that the process has set up.
        service_name: Resource attribute ``service.name``.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        service_name: str = "omnisearchsage",
        provider: Any = None,
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._owned: Any = None
        self._propagator = TraceContextTextMapPropagator()
        if provider is None and endpoint is not None:
            try:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
                from opentelemetry.sdk.resources import Resource
                from opentelemetry.sdk.trace import TracerProvider
                from opentelemetry.sdk.trace.export import BatchSpanProcessor
            except ImportError as error:
                raise MissingDependency(
                    "opentelemetry-exporter-otlp-proto-grpc", "otel", "tracing (--otlp)"
                ) from error
            provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
            self._owned = provider
        self._tracer = (provider or trace.get_tracer_provider()).get_tracer(
            "omnisearchsage.retrieval"
        )

    def close(self) -> None:
        """Send what waits to the collector, if this object made the connection to it."""
        if self._owned is not None:
            self._owned.shutdown()

    def record_call(self, call: FinishedCall) -> None:
        """Write the spans of a call that has just ended; never query text."""
        ended = time.time_ns()
        timings = getattr(call.response, "timings", None)
        stages = {}
        if timings is not None:
            stages = {stage: int(getattr(timings, f"{stage}_ns")) for stage in STAGES}
        fields = [(call.request, name) for name in ("entity_type", "k")]
        fields += [(call.response, name) for name in ("release_id", "plan", "cache_hit")]
        attributes = rpc_attributes(call)
        for message, name in fields:
            if message is not None and name in message.DESCRIPTOR.fields_by_name:
                attributes[name] = getattr(message, name)
        started = ended - int(call.seconds * 1e9)
        method = attributes["rpc.method"]
        self.record(method, started, ended, stages, attributes, call.metadata or ())

    def record(
        self,
        method: str,
        started_ns: int,
        ended_ns: int,
        stages: Mapping[str, int],
        attributes: Mapping[str, Any],
        metadata: Iterable[tuple[str, Any]],
    ) -> None:
        """Write the spans of one finished call.

        Args:
            method: Full name of the method.
            started_ns: Unix time, ns.
            ended_ns: Unix time, ns.
            stages: Stage -> duration in ns, in the order in which they ran.
            attributes: Of the call; never query text.
            metadata: The call's, for ``traceparent``.
        """
        parent = self._propagator.extract(
            {key: value for key, value in metadata if key in ("traceparent", "tracestate")}
        )
        root = self._tracer.start_span(
            method,
            context=parent,
            start_time=started_ns,
            kind=self._trace.SpanKind.SERVER,
            attributes=dict(attributes),
        )
        if "error.type" in attributes:
            root.set_status(self._trace.StatusCode.ERROR)
        inside = self._trace.set_span_in_context(root)
        at = started_ns
        for stage, duration in stages.items():
            if duration > 0:
                span = self._tracer.start_span(stage, context=inside, start_time=at)
                at += duration
                span.end(end_time=at)
        root.end(end_time=ended_ns)


def rpc_attributes(call: FinishedCall) -> dict[str, Any]:
    """Return what OpenTelemetry's semantic conventions for RPC say of a call."""
    found: dict[str, Any] = {
        "rpc.system.name": "grpc",
        "rpc.method": f"{call.service}/{call.method}",
        "rpc.response.status_code": call.code,
    }
    if call.code in FAULTS:
        found["error.type"] = call.code
    kind, _, address = call.peer.partition(":")
    if kind in ("ipv4", "ipv6"):
        host, _, port = address.rpartition(":")
        found["network.peer.address"] = host.strip("[]")
        found["network.peer.port"] = int(port)
    return found
