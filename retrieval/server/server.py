"""A server that can be built without being started: gRPC, health, reflection, the HTTP port."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from index_builder.ann import AnnIndex
from retrieval.config import ServeConfig
from retrieval.encoding.query_cache import QueryCache
from retrieval.encoding.redis_tier import RedisTier
from retrieval.errors import AddressInUse
from retrieval.http2.server import Http2Server
from retrieval.observability.impressions import ImpressionLog
from retrieval.observability.metric_catalogue import Labels
from retrieval.observability.metrics import Metrics
from retrieval.observability.shared_metrics import SharedSnapshots
from retrieval.observability.tracing import Tracer
from retrieval.releases.manager import LiveReleases
from retrieval.security import Tokens
from retrieval.server.caches import RedisTiers, cache_measurements
from retrieval.server.grpc_server import (
    GrpcServer,
    add_health,
    add_reflection,
    create_grpc_server,
    credentials_of,
    require_free_ports,
)
from retrieval.server.http_routes import http_routes
from retrieval.service.admin import AdminService, ChangeRelease
from retrieval.service.handlers import generic_handlers
from retrieval.service.service import RetrievalService
from retrieval.web.http_server import HttpServer

log = logging.getLogger(__name__)

SWITCH_INTERVAL_SECONDS = 0.0005
"""How often Python threads may take turns.

The default of 5 ms would make the event loop wait that long behind a loading thread.
"""


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

    ``port`` is known at once, also when it was given as 0, unless it is one of several workers with
    sockets of their own.
    """

    config: ServeConfig
    grpc_server: GrpcServer
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
    credentials = credentials_of(config)
    if worker is None:
        require_free_ports(config)
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
    service = _create_service(config, releases, metrics, worker)
    admin = AdminService(config, releases, worker.change_release if worker else None)
    metrics.add_source(lambda: cache_measurements(cache, tiers.opened))
    metrics.add_source(_process_measurements)
    grpc_server = create_grpc_server(
        config, listener=worker.listener if worker else None, reuse_port=worker is not None
    )
    grpc_server.add_generic_rpc_handlers(generic_handlers(service, admin))
    snapshots = SharedSnapshots(worker.snapshots_folder, metrics) if worker else None
    http = None
    if config.metrics_port is not None:
        http = HttpServer(http_routes(service, metrics, snapshots))
    server = Server(
        config=config,
        grpc_server=grpc_server,
        credentials=credentials,
        service=service,
        admin=admin,
        releases=releases,
        metrics=metrics,
        health=await add_health(grpc_server, releases),
        http=http,
        redis=tiers.opened,
        snapshots=snapshots,
    )
    add_reflection(grpc_server)
    if worker is None:
        server.bind()
    elif worker.listener is not None:
        server.share(worker.listener)
    return server


def _tune_process() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    # BLAS threads spin after each product: shadow recall would use more cores than its share of one
    threadpool_limits(1, user_api="blas")


def _create_service(
    config: ServeConfig,
    releases: LiveReleases,
    metrics: Metrics,
    worker: WorkerContext | None,
) -> RetrievalService:
    tokens = None if config.tokens is None else Tokens.load(config.tokens)
    tracer = None if config.otlp_endpoint is None else Tracer(config.otlp_endpoint)
    impressions = None
    if config.impression_log is not None:
        impressions = ImpressionLog(config.impression_log, worker.number if worker else 0)
    return RetrievalService(
        config, releases, metrics, tokens=tokens, impressions=impressions, tracer=tracer
    )


def _process_measurements() -> list[tuple[str, Labels, float]]:
    return [("omni_process_rss_bytes", (), float(_resident_bytes()))]


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
