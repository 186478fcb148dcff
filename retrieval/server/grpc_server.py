"""The gRPC side of a server: transport, TLS, health and reflection."""

from __future__ import annotations

import socket
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from retrieval.addresses import bound_socket
from retrieval.config import ServeConfig
from retrieval.http2.frames import MAX_HEADER_BYTES
from retrieval.http2.limits import Lifetimes
from retrieval.http2.server import Http2Server
from retrieval.releases.manager import LiveReleases
from retrieval.releases.serving_release import ServingRelease
from retrieval.service.handlers import ADMIN, RETRIEVAL
from retrieval.tls import ServerTls, TlsFiles

GrpcServer: TypeAlias = grpc.aio.Server | Http2Server

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
REFLECTION_V1_FILE = "grpc/reflection/v1/reflection.proto"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NO_COMPRESSION = 1
"""Bit set of the message encodings that grpcio reads: the identity alone.

It would inflate 16 KB to 16 MiB before this server sees the message, for each open call.
"""


def require_free_ports(config: ServeConfig) -> None:
    """Raise ``CannotListen`` where a port cannot be had.

    With SO_REUSEPORT two servers would silently share a port and its callers, so this is asked
    first.
    """
    for port, flag in (
        (config.port, "--port"),
        (config.metrics_port, "--metrics-port"),
        (config.probe_port, "--probe-port"),
    ):
        if port is not None:
            bound_socket(config.host, port, flag=flag).close()


def tls_of(config: ServeConfig) -> ServerTls | None:
    """Return the configured TLS, or None. Raises ``ConfigError``."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    return ServerTls(TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca))


def create_grpc_server(
    config: ServeConfig, *, listener: socket.socket | None, reuse_port: bool
) -> GrpcServer:
    """Make the transport, without a port yet.

    Args:
        config: Which transport, and its limits.
        listener: For ``http2``: a socket shared with other processes; None: ``add_port`` makes one.
        reuse_port: For grpcio: whether other processes bind the same port.
    """
    limits = config.limits
    if config.transport == "http2":
        return Http2Server(
            max_receive_bytes=limits.max_message_bytes,
            max_send_bytes=limits.max_answer_bytes,
            max_streams=config.max_streams,
            listener=listener,
        )
    lifetimes = Lifetimes()
    options = [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_answer_bytes),
        ("grpc.max_concurrent_streams", config.max_streams),
        ("grpc.max_metadata_size", MAX_HEADER_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", NO_COMPRESSION),
        ("grpc.max_connection_idle_ms", int(lifetimes.max_idle_seconds * 1e3)),
        ("grpc.max_connection_age_ms", int(lifetimes.max_age_seconds * 1e3)),
        ("grpc.max_connection_age_grace_ms", int(lifetimes.age_grace_seconds * 1e3)),
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
    ]
    return grpc.aio.server(options=options)


async def add_health(grpc_server: GrpcServer, releases: LiveReleases) -> Any:
    """Add the health service, and return it.

    It knows the server, and each entity type of the active release.
    """
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, grpc_server)
    for name in ("", RETRIEVAL, ADMIN):
        await servicer.set(name, NOT_SERVING)
    known: set[str] = set()

    async def report(serving: ServingRelease) -> None:
        for name in ("", RETRIEVAL, ADMIN, *serving.entities):
            await servicer.set(name, SERVING)
        for name in known - set(serving.entities):
            await servicer.set(name, NOT_SERVING)
        known.update(serving.entities)

    releases.on_change.append(report)
    return servicer


def add_reflection(grpc_server: GrpcServer) -> None:
    """Add the reflection services v1 and v1alpha, so that clients need no .proto file."""
    _define_reflection_v1()
    names = [RETRIEVAL, ADMIN, health.SERVICE_NAME, REFLECTION_V1, reflection.SERVICE_NAME]
    servicer = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, grpc_server)
    # Both versions have the same messages on the wire
    info = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    grpc_server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": info}),)
    )


def _define_reflection_v1() -> None:
    """Add grpc/reflection/v1/reflection.proto to the descriptors, unless another package has."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(REFLECTION_V1_FILE)
    except KeyError:
        described = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(described)
        described.name = REFLECTION_V1_FILE
        described.package = described.package.replace("v1alpha", "v1")
        for message in described.message_type:
            for field in filter(lambda field: field.type_name, message.field):
                field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
        for method in described.service[0].method:
            method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
            method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
        pool.AddSerializedFile(described.SerializeToString())
