"""OpenTelemetry spans around calls and their stages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message

from encoders.errors import MissingDependency
from retrieval.observability.metric_catalogue import STAGES


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

    def record_call(
        self,
        method: str,
        request: Message,
        response: Message,
        took_ns: int,
        metadata: Iterable[tuple[str, Any]],
    ) -> None:
        """Write the spans of a call that has just been answered; never query text."""
        ended = time.time_ns()
        timings = getattr(response, "timings", None)
        stages = {}
        if timings is not None:
            stages = {stage: int(getattr(timings, f"{stage}_ns")) for stage in STAGES}
        fields = [(request, name) for name in ("entity_type", "k")]
        fields += [(response, name) for name in ("release_id", "plan", "cache_hit")]
        attributes = {
            name: value for message, name in fields if (value := getattr(message, name, "")) != ""
        }
        self.record(method, ended - took_ns, ended, stages, attributes, metadata)

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
            method: RPC name.
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
        inside = self._trace.set_span_in_context(root)
        at = started_ns
        for stage, duration in stages.items():
            if duration > 0:
                span = self._tracer.start_span(stage, context=inside, start_time=at)
                at += duration
                span.end(end_time=at)
        root.end(end_time=ended_ns)
