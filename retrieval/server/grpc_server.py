"""The gRPC side of a server: transport, TLS, health and reflection."""

from __future__ import annotations

import socket
from typing import Any, TypeAlias

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from retrieval.config import ServeConfig
from retrieval.errors import AddressInUse
from retrieval.http2.frames import MAX_HEADER_BYTES
from retrieval.http2.limits import Lifetimes
from retrieval.http2.server import Http2Server
from retrieval.releases.manager import LiveReleases
from retrieval.releases.serving_release import ServingRelease
from retrieval.security import server_credentials, tls_context
from retrieval.service.handlers import ADMIN, RETRIEVAL

GrpcServer: TypeAlias = grpc.aio.Server | Http2Server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def address_is_free(host: str, port: int) -> bool:
    """Ask whether nobody listens there.

    With SO_REUSEPORT two servers would silently share a port and its callers, so this is asked
    first.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def require_free_ports(config: ServeConfig) -> None:
    """Raise ``AddressInUse`` if another process listens on a port that is not to be picked."""
    if config.port and not address_is_free(config.host, config.port):
        raise AddressInUse(f"{config.host}:{config.port}")
    if config.metrics_port and not address_is_free(config.host, config.metrics_port):
        raise AddressInUse(f"{config.host}:{config.metrics_port}", "--metrics-port")


def credentials_of(config: ServeConfig) -> Any:
    """Return TLS as the configured transport takes it; None without TLS."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    make = tls_context if config.transport == "http2" else server_credentials
    return make(config.tls_cert, config.tls_key, config.tls_client_ca)


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
            max_send_bytes=4 * limits.max_message_bytes,
            max_streams=config.max_streams,
            listener=listener,
        )
    lifetimes = Lifetimes()
    options = [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", 4 * limits.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams),
        ("grpc.max_metadata_size", MAX_HEADER_BYTES),
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
    """Add the reflection service, so that clients need no .proto file."""
    servicer = reflection.aio.ReflectionServicer(
        [RETRIEVAL, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME]
    )
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, grpc_server)
