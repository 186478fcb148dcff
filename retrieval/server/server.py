"""A server that can be built without being started: gRPC, health, reflection, the metrics port, one event loop."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from threadpoolctl import threadpool_limits

from index_builder.ann import AnnIndex
from protos import retrieval_pb2 as pb
from retrieval.config import ServeConfig
from retrieval.encoding.query_cache import QueryCache
from retrieval.encoding.redis_tier import RedisTier
from retrieval.errors import AddressInUse
from retrieval.http2.server import Http2Server
from retrieval.observability.impressions import ImpressionLog
from retrieval.observability.metrics import Labels, Metrics, exposition
from retrieval.observability.shared_metrics import SharedSnapshots
from retrieval.observability.tracing import Tracer
from retrieval.releases.manager import LiveReleases
from retrieval.releases.serving_release import ServingRelease
from retrieval.security import Tokens, server_credentials, tls_context
from retrieval.service.service import ADMIN, RETRIEVAL, RetrievalService
from retrieval.web.http_server import Handler, HttpServer, Request, Response

log = logging.getLogger("omni.server")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SWITCH_INTERVAL_SECONDS = 0.0005
"""How often Python threads may take turns; the default of 5 ms would make the event loop wait that long behind a loading thread."""


def address_is_free(host: str, port: int) -> bool:
    """Whether nobody listens there.

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


@dataclass
class Server:
    """One worker's server, built and not yet started.

    ``port`` is known at once, also when 0 was asked for.
    """

    config: ServeConfig
    grpc_server: grpc.aio.Server | Http2Server
    port: int
    service: RetrievalService
    releases: LiveReleases
    metrics: Metrics
    health: Any
    http: HttpServer | None
    redis: list[RedisTier]
    snapshots: SharedSnapshots | None = None
    metrics_port: int | None = None
    credentials: Any = None
    _writer: asyncio.Task[None] | None = None

    def bind(self) -> None:
        """Take the port. Raises ``AddressInUse``."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        address = f"{host}:{self.config.port}"
        try:
            if isinstance(self.grpc_server, Http2Server):
                self.port = self.grpc_server.add_port(address, self.credentials)
            elif self.credentials is not None:
                self.port = self.grpc_server.add_secure_port(address, self.credentials)
            else:
                self.port = self.grpc_server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            raise AddressInUse(address) from error
        if self.port == 0:
            raise AddressInUse(address)

    async def start(self) -> None:
        """Listen, then load the active release; health says NOT_SERVING until it has proved itself.

        Without a release, wait for one.
        """
        await self.listen()
        await self.releases.start()

    async def listen(self) -> None:
        """Answer on the gRPC and HTTP ports."""
        if self.port == 0:
            self.bind()
        await self.grpc_server.start()
        if self.http is not None:
            assert self.config.metrics_port is not None
            self.metrics_port = await self.http.start(
                self.config.host, self.config.metrics_port, reuse_port=self.config.workers > 1
            )
        if self.snapshots is not None:
            self._writer = asyncio.ensure_future(self._write_snapshots(self.snapshots))

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drain: health turns NOT_SERVING, calls in flight get the grace period, new ones UNAVAILABLE."""
        grace = self.config.grace_seconds if grace_seconds is None else grace_seconds
        self.service.leaving = True
        await self.health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace)
        if self.http is not None:
            await self.http.stop()
        if self._writer is not None:
            self._writer.cancel()
        if self.snapshots is not None:
            self.snapshots.remove()
        self.service.close()
        await self.releases.stop()
        for tier in self.redis:
            await tier.close()

    async def _write_snapshots(self, snapshots: SharedSnapshots) -> None:
        while True:
            await asyncio.sleep(1.0)
            try:
                snapshots.write()
            except OSError as error:
                log.warning("metrics of this worker could not be shared: %s", error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """What makes a server one of the workers on one port; a supervisor follows ``releases/CURRENT`` for them.

    Attributes:
        number: Of this worker.
        graphs: By release id, graphs that the supervisor verified and loaded.
        change_release: Has the supervisor carry out Activate ("" means Rollback).
        snapshots_folder: Where the workers exchange their metrics.
        listener: A listening socket that all workers share; the http2 transport accepts from it.
            None: each binds the port in ``listen``, and not before, as the kernel gives a bound
            worker connections at once.
    """

    number: int
    graphs: Mapping[str, Mapping[str, AnnIndex]]
    change_release: Callable[[str], Awaitable[tuple[str, str]]]
    snapshots_folder: Path
    listener: socket.socket | None


async def create_server(config: ServeConfig, *, crew: Crew | None = None) -> Server:
    """Build a server on the running event loop and bind its port.

    Args:
        config: Everything an operator can set; ``port=0`` picks a free port.
        crew: What it shares with other workers; None: it is alone.

    Raises:
        AddressInUse: Another process listens on the port.
        ConfigError: TLS files or tokens are unusable.
    """
    tokens = Tokens.load(config.tokens) if config.tokens is not None else None
    credentials: Any = None
    if config.tls_cert is not None and config.tls_key is not None:
        make = tls_context if config.transport == "http2" else server_credentials
        credentials = make(config.tls_cert, config.tls_key, config.tls_client_ca)
    if config.port and crew is None and not address_is_free(config.host, config.port):
        raise AddressInUse(f"{config.host}:{config.port}")
    if (
        config.metrics_port
        and crew is None
        and not address_is_free(config.host, config.metrics_port)
    ):
        raise AddressInUse(f"{config.host}:{config.metrics_port}", "--metrics-port")

    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    # BLAS workers spin for a while after each product: shadow recall, which scans exactly, took
    # three times its share of a core with them.
    threadpool_limits(1, user_api="blas")
    metrics = Metrics()
    cache = QueryCache(config.cache_bytes, config.cache_ttl_seconds)
    tiers: dict[int, RedisTier] = {}

    def redis_for(dimension: int) -> RedisTier | None:
        if config.redis_url is None:
            return None
        if dimension not in tiers:
            tier = RedisTier(
                config.redis_url,
                dimension,
                config.cache_ttl_seconds,
                config.redis_timeout_ms / 1e3,
                config.redis_secret,
            )
            tiers[dimension] = tier
            redis_tiers.append(tier)
        return tiers[dimension]

    redis_tiers: list[RedisTier] = []
    releases = LiveReleases(
        config,
        cache,
        metrics,
        redis=redis_for,
        graphs=crew.graphs if crew else None,
        watch=crew is None,
    )
    service = RetrievalService(
        config,
        releases,
        metrics,
        tokens=tokens,
        impressions=(
            ImpressionLog(config.impression_log, crew.number if crew else 0)
            if config.impression_log is not None
            else None
        ),
        tracer=Tracer(config.otlp_endpoint) if config.otlp_endpoint is not None else None,
        change_release=crew.change_release if crew else None,
    )
    metrics.add_source(lambda: _cache_measurements(cache, redis_tiers))

    grpc_server = _transport(config, crew is not None, crew.listener if crew else None)
    grpc_server.add_generic_rpc_handlers(service.generic_handlers())
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, grpc_server)
    names = [pb.DESCRIPTOR.services_by_name[name].full_name for name in ("Retrieval", "Admin")]
    reflected = [*names, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
        reflection.aio.ReflectionServicer(reflected), grpc_server
    )
    for name in ("", RETRIEVAL, ADMIN):
        await health_service.set(name, NOT_SERVING)

    known: set[str] = set()

    async def report_health(serving: ServingRelease) -> None:
        for name in ("", RETRIEVAL, ADMIN, *serving.entities):
            await health_service.set(name, SERVING)
        for name in known - set(serving.entities):
            await health_service.set(name, NOT_SERVING)
        known.update(serving.entities)

    async def measure_anew(serving: ServingRelease) -> None:
        service.shadow.forget()

    releases.on_change += [report_health, measure_anew]
    snapshots = SharedSnapshots(crew.snapshots_folder, metrics) if crew else None
    http = (
        HttpServer(_routes(service, metrics, snapshots))
        if config.metrics_port is not None
        else None
    )
    server = Server(
        config,
        grpc_server,
        0,
        service,
        releases,
        metrics,
        health_service,
        http,
        redis_tiers,
        snapshots,
    )
    server.credentials = credentials
    if crew is not None and crew.listener is not None:
        assert isinstance(grpc_server, Http2Server), "only this transport shares a listener"
        server.port = int(crew.listener.getsockname()[1])
        if credentials is not None:
            grpc_server.secure(credentials)
    elif crew is None:
        server.bind()
    return server


def _transport(
    config: ServeConfig, reuse_port: bool, listener: socket.socket | None
) -> grpc.aio.Server | Http2Server:
    limits = config.limits
    if config.transport == "http2":
        return Http2Server(
            max_receive_bytes=limits.max_message_bytes,
            max_send_bytes=4 * limits.max_message_bytes,
            max_streams=config.max_streams_per_connection,
            listener=listener,
        )
    options = [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", 4 * limits.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
    ]
    return grpc.aio.server(options=options)


def _routes(
    service: RetrievalService, metrics: Metrics, snapshots: SharedSnapshots | None
) -> dict[str, Handler]:
    async def scrape(request: Request) -> Response:
        return Response(
            exposition(snapshots.merged() if snapshots is not None else metrics.snapshot()),
            "text/plain; version=0.0.4; charset=utf-8",
        )

    async def healthz(request: Request) -> Response:
        active = service.releases.active
        if active is None or service.leaving:
            reason = "draining" if service.leaving else service.releases.reason_not_ready
            return Response.of_json({"ready": False, "reason": reason}, 503)
        return Response.of_json(
            {
                "ready": True,
                "release_id": active.release_id,
                "space_id": active.space_id,
                "entity_types": sorted(active.entities),
            }
        )

    routes: dict[str, Handler] = {"/metrics": scrape, "/healthz": healthz}
    try:
        web_page = importlib.import_module("retrieval.web.page")
    except ModuleNotFoundError as error:
        if error.name != "retrieval.web.page":
            raise
    else:
        routes.update(web_page.routes(service))
    return routes


def _cache_measurements(
    cache: QueryCache, tiers: list[RedisTier]
) -> list[tuple[str, Labels, float]]:
    rows: list[tuple[str, Labels, float]] = [
        ("omni_cache_hits", (), float(cache.hits)),
        ("omni_cache_misses", (), float(cache.misses)),
        ("omni_cache_evictions", (), float(cache.evictions)),
        ("omni_cache_entries", (), float(len(cache))),
        ("omni_cache_bytes", (), float(cache.size_bytes)),
        ("omni_process_rss_bytes", (), float(_resident_bytes())),
    ]
    if tiers:
        for outcome, attribute in (
            ("hit", "hits"),
            ("miss", "misses"),
            ("failure", "failures"),
            ("refused", "refused"),
        ):
            rows.append(
                ("omni_redis", (outcome,), float(sum(getattr(tier, attribute) for tier in tiers)))
            )
    return rows


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


async def run_until_signalled(server: Server, ready: Callable[[Server], None]) -> None:
    """Start, call ``ready``, serve until SIGTERM or SIGINT, drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    ready(server)
    await stop.wait()
    log.info("draining, at most %.0f s", server.config.grace_seconds)
    await server.stop()
