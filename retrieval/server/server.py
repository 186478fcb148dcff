"""A server that can be built without being started: gRPC, health, reflection, the HTTP port."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
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
from retrieval.encoding.redis_tier import RedisSettings, RedisTier
from retrieval.errors import AddressInUse
from retrieval.http2.server import Http2Server
from retrieval.observability.impressions import ImpressionLog
from retrieval.observability.metric_catalogue import Labels
from retrieval.observability.metrics import Metrics, exposition
from retrieval.observability.shared_metrics import SharedSnapshots
from retrieval.observability.tracing import Tracer
from retrieval.releases.manager import LiveReleases
from retrieval.releases.serving_release import ServingRelease
from retrieval.security import Tokens, server_credentials, tls_context
from retrieval.service.admin import AdminService, ChangeRelease
from retrieval.service.handlers import ADMIN, RETRIEVAL, generic_handlers
from retrieval.service.service import RetrievalService
from retrieval.web.http_server import Handler, HttpServer, Request, Response

log = logging.getLogger("omni.server")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SWITCH_INTERVAL_SECONDS = 0.0005
"""How often Python threads may take turns.

The default of 5 ms would make the event loop wait that long behind a loading thread.
"""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """What makes a server one of several workers on one port.

    Attributes:
        number: Of this worker.
        graphs: By release id, graphs that the supervisor verified and loaded.
        change_release: Has the supervisor carry out Activate and Rollback.
        snapshots_folder: Where the workers exchange their metrics.
        listener: A listening socket that all workers share; the http2 transport accepts from it.
            None: each binds the port in ``listen``, and not before, as the kernel gives a bound
            worker connections at once.
    """

    number: int
    graphs: Mapping[str, Mapping[str, AnnIndex]]
    change_release: ChangeRelease
    snapshots_folder: Path
    listener: socket.socket | None


@dataclass(kw_only=True)
class Server:
    """One worker's server, built and not yet started.

    ``port`` is known at once, also when 0 was asked for, unless it is one of several workers with
    sockets of their own.
    """

    config: ServeConfig
    grpc_server: grpc.aio.Server | Http2Server
    credentials: Any
    service: RetrievalService
    admin: AdminService
    releases: LiveReleases
    metrics: Metrics
    health: Any
    http: HttpServer | None
    redis: list[RedisTier]
    snapshots: SharedSnapshots | None = None
    port: int = 0
    metrics_port: int | None = None
    _snapshot_writer: asyncio.Task[None] | None = None

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

    def share(self, listener: socket.socket) -> None:
        """Accept from a socket that other workers accept from, too."""
        assert isinstance(self.grpc_server, Http2Server), "only this transport shares a listener"
        self.port = int(listener.getsockname()[1])
        if self.credentials is not None:
            self.grpc_server.secure(self.credentials)

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
            self._snapshot_writer = asyncio.ensure_future(self._write_snapshots(self.snapshots))

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drain: health says NOT_SERVING, calls in flight get the grace period, new ones none."""
        grace = self.config.grace_seconds if grace_seconds is None else grace_seconds
        self.service.draining = True
        await self.health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace)
        if self.http is not None:
            await self.http.stop()
        if self._snapshot_writer is not None:
            self._snapshot_writer.cancel()
        if self.snapshots is not None:
            self.snapshots.remove()
        self.service.close()
        self.admin.close()
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


async def create_server(config: ServeConfig, *, worker: WorkerContext | None = None) -> Server:
    """Build a server on the running event loop and bind its port.

    Args:
        config: Everything an operator can set; ``port=0`` picks a free port.
        worker: What it shares with other workers; None: it is alone.

    Raises:
        AddressInUse: Another process listens on the port.
        ConfigError: TLS files or tokens are unusable.
    """
    tokens = Tokens.load(config.tokens) if config.tokens is not None else None
    credentials = _credentials(config)
    if worker is None:
        _require_free_ports(config)
    _tune_process()
    metrics = Metrics()
    cache = QueryCache(config.cache_bytes, config.cache_ttl_seconds)
    tiers = RedisTiers(config)
    releases = LiveReleases(
        config,
        cache,
        metrics,
        redis=tiers.of_dimension,
        graphs=worker.graphs if worker else None,
        watch=worker is None,
    )
    service = RetrievalService(
        config,
        releases,
        metrics,
        tokens=tokens,
        impressions=_impression_log(config, worker),
        tracer=Tracer(config.otlp_endpoint) if config.otlp_endpoint is not None else None,
    )
    admin = AdminService(config, releases, worker.change_release if worker else None)
    metrics.add_source(lambda: _cache_measurements(cache, tiers.opened))
    grpc_server = _transport(config, worker)
    grpc_server.add_generic_rpc_handlers(generic_handlers(service, admin))
    snapshots = SharedSnapshots(worker.snapshots_folder, metrics) if worker else None
    http = None
    if config.metrics_port is not None:
        http = HttpServer(_routes(service, metrics, snapshots))
    server = Server(
        config=config,
        grpc_server=grpc_server,
        credentials=credentials,
        service=service,
        admin=admin,
        releases=releases,
        metrics=metrics,
        health=await _add_health(grpc_server, releases),
        http=http,
        redis=tiers.opened,
        snapshots=snapshots,
    )
    _add_reflection(grpc_server)
    if worker is None:
        server.bind()
    elif worker.listener is not None:
        server.share(worker.listener)
    return server


# ---- parts of create_server ----------------------------------------------------------------------


class RedisTiers:
    """Second cache tiers, opened when a release of their dimension is loaded.

    Attributes:
        opened: All of them.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._by_dimension: dict[int, RedisTier] = {}
        self.opened: list[RedisTier] = []

    def of_dimension(self, dimension: int) -> RedisTier | None:
        """Return the tier for vectors of this length; None where no Redis is configured."""
        config = self._config
        if config.redis_url is None:
            return None
        tier = self._by_dimension.get(dimension)
        if tier is None:
            settings = RedisSettings(
                url=config.redis_url,
                ttl_seconds=config.cache_ttl_seconds,
                timeout_seconds=config.redis_timeout_ms / 1e3,
                secret=config.redis_secret,
            )
            tier = RedisTier(settings, dimension)
            self._by_dimension[dimension] = tier
            self.opened.append(tier)
        return tier


def _credentials(config: ServeConfig) -> Any:
    """Return TLS as the configured transport takes it; None without TLS."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    make = tls_context if config.transport == "http2" else server_credentials
    return make(config.tls_cert, config.tls_key, config.tls_client_ca)


def _require_free_ports(config: ServeConfig) -> None:
    if config.port and not address_is_free(config.host, config.port):
        raise AddressInUse(f"{config.host}:{config.port}")
    if config.metrics_port and not address_is_free(config.host, config.metrics_port):
        raise AddressInUse(f"{config.host}:{config.metrics_port}", "--metrics-port")


def _tune_process() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    # BLAS threads spin after each product: shadow recall would use more cores than its share of one
    threadpool_limits(1, user_api="blas")


def _impression_log(config: ServeConfig, worker: WorkerContext | None) -> ImpressionLog | None:
    if config.impression_log is None:
        return None
    return ImpressionLog(config.impression_log, worker.number if worker else 0)


def _transport(config: ServeConfig, worker: WorkerContext | None) -> grpc.aio.Server | Http2Server:
    limits = config.limits
    if config.transport == "http2":
        return Http2Server(
            max_receive_bytes=limits.max_message_bytes,
            max_send_bytes=4 * limits.max_message_bytes,
            max_streams=config.max_streams_per_connection,
            listener=worker.listener if worker else None,
        )
    options = [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", 4 * limits.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        ("grpc.so_reuseport", int(worker is not None)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
    ]
    return grpc.aio.server(options=options)


async def _add_health(grpc_server: grpc.aio.Server | Http2Server, releases: LiveReleases) -> Any:
    """Add the health service: of the server, and of each entity type of the active release."""
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


def _add_reflection(grpc_server: grpc.aio.Server | Http2Server) -> None:
    names = [pb.DESCRIPTOR.services_by_name[name].full_name for name in ("Retrieval", "Admin")]
    servicer = reflection.aio.ReflectionServicer(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME]
    )
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, grpc_server)


def _routes(
    service: RetrievalService, metrics: Metrics, snapshots: SharedSnapshots | None
) -> dict[str, Handler]:
    """Return the paths of the HTTP port."""

    async def scrape(request: Request) -> Response:
        merged = snapshots.merged() if snapshots is not None else metrics.snapshot()
        return Response(exposition(merged), "text/plain; version=0.0.4; charset=utf-8")

    async def healthz(request: Request) -> Response:
        active = service.releases.active
        if active is None or service.draining:
            reason = "draining" if service.draining else service.releases.reason_not_ready
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
        page = importlib.import_module("retrieval.web.page")
    except ModuleNotFoundError as error:
        if error.name != "retrieval.web.page":
            raise
    else:
        routes.update(page.routes(service))
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
        rows += [
            ("omni_redis", ("hit",), float(sum(tier.hits for tier in tiers))),
            ("omni_redis", ("miss",), float(sum(tier.misses for tier in tiers))),
            ("omni_redis", ("failure",), float(sum(tier.failures for tier in tiers))),
            ("omni_redis", ("refused",), float(sum(tier.refused for tier in tiers))),
        ]
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
