"""A server that can be built without being started: gRPC, health, reflection, the HTTP port."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from index_builder.ann import AnnIndex
from retrieval.addresses import cannot_listen, joined
from retrieval.config import ServeConfig
from retrieval.encoding.query_cache import QueryCache
from retrieval.encoding.redis_tier import RedisTier
from retrieval.errors import AddressInUse, CannotListen
from retrieval.http2.server import Http2Server
from retrieval.observability.impressions import ImpressionLog, LogBounds
from retrieval.observability.metric_catalogue import Labels
from retrieval.observability.metrics import Metrics
from retrieval.observability.shared_metrics import SharedSnapshots
from retrieval.observability.tracing import Tracer
from retrieval.releases.manager import LiveReleases
from retrieval.releases.serving_release import ServingRelease
from retrieval.security import Tokens
from retrieval.server.caches import RedisTiers, cache_measurements
from retrieval.server.grpc_server import (
    GrpcServer,
    add_health,
    add_reflection,
    create_grpc_server,
    require_free_ports,
    tls_of,
)
from retrieval.server.http_routes import http_apps
from retrieval.server.reloading import Reloaded, Reloader
from retrieval.service.admin import AdminService, ChangeRelease
from retrieval.service.handlers import generic_handlers
from retrieval.service.service import RetrievalService
from retrieval.tls import ServerTls
from retrieval.web.http_server import HttpServer
from retrieval.web.over_http2 import http_method

log = logging.getLogger(__name__)

SWITCH_INTERVAL_SECONDS = 0.0005
"""How often Python threads may take turns.

The default of 5 ms would make the event loop wait that long behind a loading thread.
"""
WEB_CONNECTIONS = 512
PROBE_CONNECTIONS = 64
"""At a time, per process; a new one takes the place of the longest idle one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """What makes a server one of several workers on one port.

    Attributes:
        number: Of this worker.
        graphs: By release id, graphs that the supervisor loaded; it has verified every release.
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
    sockets of their own. Nobody is listened to on it before a release is loaded: clients that wait
    for a server that is ready wait on.
    """

    config: ServeConfig
    grpc_server: GrpcServer
    tls: ServerTls | None
    service: RetrievalService
    admin: AdminService
    releases: LiveReleases
    metrics: Metrics
    health: Any
    web: HttpServer | None
    probe: HttpServer | None
    redis: list[RedisTier]
    reloader: Reloader
    snapshots: SharedSnapshots | None = None
    port: int = 0
    metrics_port: int | None = None
    probe_port: int | None = None
    listen_failed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the port turns out to be taken: see ``raise_listen_error``."""
    _snapshot_writer: asyncio.Task[None] | None = None
    _is_listening: bool = False
    _listen_error: CannotListen | None = None

    def bind(self) -> None:
        """Take the gRPC port. Raises ``CannotListen``."""
        address = joined(self.config.host, self.config.port)
        try:
            if isinstance(self.grpc_server, Http2Server):
                self.port = self.grpc_server.add_port(address, self._grpc_context())
            elif self.tls is not None:
                credentials = self.tls.grpc_credentials()
                self.port = self.grpc_server.add_secure_port(address, credentials)
            else:
                self.port = self.grpc_server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            raise cannot_listen(address, error) from error
        if self.port == 0:
            raise AddressInUse(address)

    def share(self, listener: socket.socket) -> None:
        """Accept from a socket that other workers accept from, too."""
        assert isinstance(self.grpc_server, Http2Server), "only this transport shares a listener"
        self.port = int(listener.getsockname()[1])
        context = self._grpc_context()
        if context is not None:
            self.grpc_server.secure(context)

    def _grpc_context(self) -> ssl.SSLContext | None:
        return None if self.tls is None else self.tls.context("h2")

    async def start(self) -> None:
        """Answer over HTTP, load the active release, and take calls once there is one."""
        await self._listen_http()
        self.releases.on_change.append(self._listen_grpc)
        await self.releases.start()
        self.raise_listen_error()

    def raise_listen_error(self) -> None:
        """Raise ``CannotListen`` if a release is loaded, but the port was taken meanwhile."""
        if self._listen_error is not None:
            raise self._listen_error

    async def listen(self) -> None:
        """Answer over HTTP, and on the gRPC port if a release is loaded: a worker's start."""
        await self._listen_http()
        if self.releases.active is not None:
            await self._listen_grpc(self.releases.active)

    async def _listen_grpc(self, serving: ServingRelease) -> None:
        """Take calls, as a release is loaded."""
        if self._is_listening:
            return
        self._is_listening = True
        if self.port == 0:
            self.bind()
        try:
            await self.grpc_server.start()
        except OSError as error:  # another server that waited for a release on this port, too
            self._is_listening = False
            self._listen_error = cannot_listen(joined(self.config.host, self.port), error)
            self.listen_failed.set()
            raise self._listen_error from error
        self.service.listening = True

    async def _listen_http(self) -> None:
        config = self.config
        shared = config.workers > 1
        self.reloader.start()
        if self.probe is not None and config.probe_port is not None:
            self.probe_port = await self.probe.start(
                config.host, config.probe_port, reuse_port=shared
            )
        if self.web is not None and config.metrics_port is not None:
            context = None if self.tls is None else self.tls.context("http/1.1")
            self.metrics_port = await self.web.start(
                config.host, config.metrics_port, tls=context, reuse_port=shared
            )
        if self.snapshots is not None:
            self._snapshot_writer = asyncio.ensure_future(self._write_snapshots(self.snapshots))

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drain: health says NOT_SERVING, calls in flight get the grace period, new ones none."""
        grace = self.config.grace_seconds if grace_seconds is None else grace_seconds
        self.service.draining = True
        self.reloader.stop()
        await self.health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace)
        await asyncio.gather(*(port.stop() for port in (self.web, self.probe) if port is not None))
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
            except Exception as error:  # of any type: else nothing would be shared ever again
                log.warning(
                    "metrics of this worker could not be shared: %s: %s",
                    type(error).__name__,
                    error,
                )


async def create_server(config: ServeConfig, *, worker: WorkerContext | None = None) -> Server:
    """Build a server on the running event loop and bind its port.

    Args:
        config: Everything an operator can set; ``port=0`` picks a free port.
        worker: What it shares with other workers; None: it is alone.

    Raises:
        CannotListen: A port cannot be had: another process listens there, say.
        ConfigError: TLS files or tokens are unusable.
    """
    tls = tls_of(config)
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
    handlers = generic_handlers(service, admin)
    grpc_server.add_generic_rpc_handlers(handlers)
    snapshots = SharedSnapshots(worker.snapshots_folder, metrics) if worker else None
    apps = http_apps(config, service, snapshots, handlers)
    if isinstance(grpc_server, Http2Server):
        grpc_server.methods.serve_http(http_method(apps.calls))
        metrics.add_source(grpc_server.measurements)
    server = Server(
        config=config,
        grpc_server=grpc_server,
        tls=tls,
        service=service,
        admin=admin,
        releases=releases,
        metrics=metrics,
        health=await add_health(grpc_server, releases),
        web=None
        if config.metrics_port is None
        else HttpServer(apps.web, max_connections=WEB_CONNECTIONS),
        probe=None
        if config.probe_port is None
        else HttpServer(apps.probe, max_connections=PROBE_CONNECTIONS, flag="--probe-port"),
        redis=tiers.opened,
        reloader=Reloader(_reloaded(service.tokens, tls)),
        snapshots=snapshots,
    )
    add_reflection(grpc_server)
    if worker is None:
        server.bind()
    elif worker.listener is not None:
        server.share(worker.listener)
    return server


def _reloaded(tokens: Tokens | None, tls: ServerTls | None) -> Iterator[Reloaded]:
    """Yield what is read again when its files change."""
    if tokens is not None and tokens.path is not None:
        yield Reloaded("tokens", (tokens.path,), tokens.reload)
    if tls is not None:
        files = tuple(path for path in tls.files if path is not None)
        yield Reloaded("TLS certificates", files, tls.reload)


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
        bounds = LogBounds(
            max_file_bytes=config.impression_file_bytes,
            max_folder_bytes=config.impression_log_bytes,
        )
        impressions = ImpressionLog(config.impression_log, worker.number if worker else 0, bounds)
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
    """Start, call ``ready``, serve until SIGTERM or SIGINT, drain. SIGHUP reads files again."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, server.reloader.reload_all)
    starting = asyncio.ensure_future(server.start())
    stopping = asyncio.ensure_future(stop.wait())
    failed = asyncio.ensure_future(server.listen_failed.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        try:
            await starting
            ready(server)
            await asyncio.wait((stopping, failed), return_when=asyncio.FIRST_COMPLETED)
            server.raise_listen_error()
        except BaseException:
            stopping.cancel()
            raise
    else:  # the release is still being loaded: nobody depends on it
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    log.info("draining, at most %.0f s", server.config.grace_seconds)
    await server.stop()
