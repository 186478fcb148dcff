"""One HTTP/1.1 port: uvicorn, with connections bounded in number, silence and age."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from functools import partial
from time import monotonic
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from retrieval.addresses import bound_socket
from retrieval.web.request_policy import MAX_HEAD_BYTES

BACKLOG = 1024
CHECK_SECONDS = 1.0
IDLE_SECONDS = 75.0
"""How long a connection may wait between two requests."""
FIRST_REQUEST_SECONDS = 15.0
"""How long a new connection may take until its first request has begun."""
REQUEST_SECONDS = 20.0
"""How long a request may take to come as a whole, whatever trickles in."""
ANSWER_SECONDS = 120.0
"""How long an answer may take, reading it included."""
STOP_SECONDS = 2


class BoundedProtocol(H11Protocol):
    """One connection that knows for how long it has been waiting for its peer.

    Args:
        connections: Of its port.
        arguments: Of uvicorn.
    """

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._connections_of_port = connections
        self._is_between_requests = True
        self._since = monotonic()
        self._patience = FIRST_REQUEST_SECONDS

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a place; the longest waiting connection leaves when there is none."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._connections_of_port.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self._connections_of_port.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read; the first bytes of a request begin its time."""
        if self._is_between_requests:
            self._is_between_requests = False
            self._since = monotonic()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._is_between_requests = True
        self._since = monotonic()
        self._patience = IDLE_SECONDS
        super().on_response_complete()

    @property
    def waiting_since(self) -> float | None:
        """When it began to wait for its peer; None while the peer waits for us."""
        is_answering = not (
            self._is_between_requests
            or self.cycle is None
            or self.cycle.response_complete
            or self.cycle.more_body
            or self.flow.write_paused
        )
        return None if is_answering else self._since

    def is_overdue(self, now: float) -> bool:
        """Return whether it has had its time."""
        waited = now - self._since
        if self._is_between_requests:
            return waited > self._patience
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return waited > REQUEST_SECONDS
        return waited > ANSWER_SECONDS

    def abort(self) -> None:
        """End the connection now."""
        self._connections_of_port.discard(self)
        self.transport.abort()


class Connections:
    """The open connections of one port, at most so many.

    A new one is always admitted while some other waits for its peer: that which has waited longest
    leaves. So idle, silent and slow connections keep nobody out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[BoundedProtocol] = set()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: BoundedProtocol) -> None:
        """Admit a connection, in the place of another one if need be, or end it."""
        if len(self._open) >= self._limit:
            waiting = [other for other in self._open if other.waiting_since is not None]
            if not waiting:
                connection.abort()
                return
            min(waiting, key=lambda other: other.waiting_since or 0.0).abort()
        self._open.add(connection)

    def discard(self, connection: BoundedProtocol) -> None:
        """Forget a connection that has ended."""
        self._open.discard(connection)

    def end_overdue(self) -> None:
        """End those that have had their time."""
        now = monotonic()
        for connection in [other for other in self._open if other.is_overdue(now)]:
            connection.abort()

    def end_all(self) -> None:
        """End all."""
        for connection in list(self._open):
            connection.abort()


class _Uvicorn(uvicorn.Server):
    """Uvicorn without its signal handlers: the process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


class HttpServer:
    """Serves an application on one port.

    Args:
        app: What answers.
        max_connections: At a time.
        flag: Of the command that chooses the port, for messages.
    """

    def __init__(self, app: ASGIApp, *, max_connections: int, flag: str = "--metrics-port") -> None:
        self._app = app
        self._flag = flag
        self._connections = Connections(max_connections)
        self._server: _Uvicorn | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0

    async def start(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        reuse_port: bool = False,
    ) -> int:
        """Listen; returns the port. Raises ``CannotListen``."""
        bound = bound_socket(host, port, flag=self._flag, reuse_port=reuse_port)
        self.port = int(bound.getsockname()[1])
        config = uvicorn.Config(
            self._app,
            http=partial(BoundedProtocol, self._connections),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # what strangers send is no event; errors are logged by the app
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=int(IDLE_SECONDS),
            timeout_graceful_shutdown=STOP_SECONDS,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )
        self._server = _Uvicorn(config)
        serving = asyncio.ensure_future(self._server.serve(sockets=[bound]))
        self._tasks = [serving, asyncio.ensure_future(self._end_overdue())]
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.001)
        if serving.done():
            await serving
        return self.port

    async def stop(self) -> None:
        """Close the port; requests that run get a moment, every other connection ends."""
        if self._server is None:
            return
        self._server.should_exit = True
        serving, checking = self._tasks
        await asyncio.wait([serving], timeout=STOP_SECONDS + 1)
        checking.cancel()
        self._connections.end_all()
        await asyncio.gather(serving, checking, return_exceptions=True)

    async def _end_overdue(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            self._connections.end_overdue()
