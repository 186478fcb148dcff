"""TLS, mutual TLS and traces, each with the real thing at the other end: openssl's certificates,
grpcio's clients, an OTLP collector.
"""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from encoders.errors import ConfigError
from protos import retrieval_pb2 as pb
from protos import retrieval_pb2_grpc as rpc
from retrieval.client import ClientConfig, RetrievalClient, TlsConfig
from retrieval.client.errors import CallError
from retrieval.service.handlers import RETRIEVAL
from retrieval.tls import ServerTls, TlsFiles
from tests.helpers.serving.certificates import Certificates, make_certificates, needs_openssl
from tests.helpers.serving.real_server import Running, SmallStore, serving
from tests.helpers.waiting import until


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def ask(running: Running, tls: TlsConfig | None) -> Any:
    config = ClientConfig(tls=tls, deadline_seconds=5)
    with RetrievalClient(f"localhost:{running.address.rpartition(':')[2]}", config) as client:
        return client.retrieve("red cat", "pin", 3)


@needs_openssl
@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_tls_server_proves_itself_and_refuses_plaintext(
    certificates: Certificates, small_store: SmallStore, transport: str
) -> None:
    with serving(
        small_store,
        transport=transport,
        tls_cert=certificates["server.pem"],
        tls_key=certificates["server.key"],
    ) as running:
        trusting = TlsConfig(root_certificates=certificates["ca.pem"])
        assert len(ask(running, trusting).hits) == 3
        for wrong in (None, TlsConfig(root_certificates=certificates["other.pem"])):
            with pytest.raises(CallError):
                ask(running, wrong)
        host, _, port = running.address.rpartition(":")
        for noise in (b"\x16\x03\x01\x00\x05hello", b"GET / HTTP/1.1\r\n\r\n", b""):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(noise)
        assert len(ask(running, trusting).hits) == 3


@needs_openssl
@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_mutual_tls_admits_only_clients_of_its_authority(
    certificates: Certificates, small_store: SmallStore, transport: str
) -> None:
    files = {
        "tls_cert": certificates["server.pem"],
        "tls_key": certificates["server.key"],
        "tls_client_ca": certificates["ca.pem"],
    }
    with serving(small_store, transport=transport, **files) as running:

        def as_client(name: str | None) -> TlsConfig:
            mine = (
                {}
                if name is None
                else {
                    "client_certificate": certificates[f"{name}.pem"],
                    "client_key": certificates[f"{name}.key"],
                }
            )
            return TlsConfig(root_certificates=certificates["ca.pem"], **mine)

        assert len(ask(running, as_client("client")).hits) == 3
        for name in (None, "stranger"):
            with pytest.raises(CallError):
                ask(running, as_client(name))
        assert len(ask(running, as_client("client")).hits) == 3


@needs_openssl
def test_tls_files_that_do_not_belong_together_are_refused(
    certificates: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    for cert, key in (
        ("server.pem", "client.key"),
        ("server.pem", str(tmp_path / "no.pem")),
        ("missing.pem", "server.key"),
    ):
        with pytest.raises(ConfigError, match="--tls"):
            ServerTls(TlsFiles(certificates[cert], certificates[key]))


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP/gRPC receiver that keeps spans."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
    spans: list[Any] = []

    class Receiver(service.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            spans.extend(
                span
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            )
            return messages.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    service.add_TraceServiceServicer_to_server(Receiver(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", spans
    server.stop(0)


def test_tracing_exports_a_span_per_call_and_stage_in_the_callers_trace(
    collector: tuple[str, list[Any]], small_store: SmallStore
) -> None:
    endpoint, spans = collector
    trace = "0af7651916cd43dd8448eb211c80319c"
    with (
        serving(small_store, otlp_endpoint=endpoint) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        stub = rpc.RetrievalStub(channel)
        metadata = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"),)
        asked = pb.RetrieveRequest(query="private words", entity_type="pin", k=3, diversity=0.5)
        stub.Retrieve(asked, metadata=metadata)
        stub.RetrieveBatch(
            pb.RetrieveBatchRequest(
                queries=["blue fish"], target=pb.Target(entity_type="pin", k=3)
            ),
            metadata=metadata,
        )
    until(lambda: len(spans) >= 8)
    by_name = {span.name.removeprefix(f"{RETRIEVAL}/"): span for span in spans}
    assert {"Retrieve", "RetrieveBatch", "queue", "encode", "search", "rerank"} <= set(by_name)
    assert {span.trace_id.hex() for span in spans} == {trace}
    call = by_name["Retrieve"]
    inside = [span for span in spans if span.parent_span_id == call.span_id]
    assert {span.name for span in inside} == {"queue", "encode", "search", "rerank"}
    assert all(span.start_time_unix_nano >= call.start_time_unix_nano for span in inside)
    attributes = {item.key: item.value for item in call.attributes}
    assert (
        attributes["entity_type"].string_value == "pin"
        and attributes["release_id"].string_value == running.release_id
    )
    assert attributes["rpc.system.name"].string_value == "grpc"
    assert attributes["rpc.method"].string_value == f"{RETRIEVAL}/Retrieve"
    assert attributes["rpc.response.status_code"].string_value == "OK"
    assert attributes["network.peer.address"].string_value == "127.0.0.1"
    assert "private" not in str(spans)


def test_tracing_exports_a_span_of_a_call_that_failed(
    collector: tuple[str, list[Any]], small_store: SmallStore
) -> None:
    endpoint, spans = collector
    with (
        serving(small_store, otlp_endpoint=endpoint) as running,
        grpc.insecure_channel(running.address) as channel,
        pytest.raises(grpc.RpcError),
    ):
        rpc.RetrievalStub(channel).Retrieve(pb.RetrieveRequest(query="x", entity_type="pin", k=0))
    until(lambda: bool(spans))
    found = {item.key: item.value.string_value for item in spans[0].attributes}
    assert found["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert "error.type" not in found, "it is the caller's mistake"
