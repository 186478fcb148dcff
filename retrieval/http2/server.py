"""A gRPC server on asyncio protocols; takes the same handlers as ``grpc.aio.server`` and serves them at a fraction of the cost per call."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from retrieval.http2.calls import Methods
from retrieval.http2.connection import Connection
from retrieval.http2.read_pacing import Pacer

log = logging.getLogger("omni.http2")

BACKLOG = 1024
LOOK_AROUND_SECONDS = 5.0
GREETING_SECONDS = 20.0
"""How long a connection may stay silent before it has said that it speaks HTTP/2."""
PING_AFTER_SECONDS = 60.0
GONE_AFTER_SECONDS = 80.0
YIELD_SECONDS = 0.0002
"""Workers that share a listening socket: one that holds connections waits this long per connection, so that an emptier one accepts."""


class Http2Server:
    """Listens, keeps connections, drains them.

    Args:
        max_receive_bytes: Of one request message.
        max_send_bytes: Of one answer message.
        max_streams: Calls at a time on one connection.
        listener: A listening socket shared with other processes; None: ``add_port`` makes one.
    """

    def __init__(
        self,
        *,
        max_receive_bytes: int,
        max_send_bytes: int,
        max_streams: int,
        listener: socket.socket | None = None,
    ) -> None:
        self.max_receive_bytes = max_receive_bytes
        self.max_send_bytes = max_send_bytes
        self.max_streams = max_streams
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.methods = Methods()
        self.pacer = Pacer(self.loop)
        self.now = time.monotonic
        self._shared = listener is not None
        self._listeners: list[tuple[socket.socket, ssl.SSLContext | None]] = (
            [] if listener is None else [(listener, None)]
        )
        self._pending: set[asyncio.Task[Any]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._accepting = False

    # --- what registration code calls, as on grpc.aio.Server ---

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]
    ) -> None:
        """Register handlers."""
        self.methods.add(generic_rpc_handlers)

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, Any]
    ) -> None:
        """Generated code registers everything twice; once is enough here."""

    def add_port(self, address: str, tls: ssl.SSLContext | None = None) -> int:
        """Bind ``host:port`` and return the port; raises ``OSError``."""
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, int(port)))
        except OSError:
            held.close()
            raise
        self._listeners.append((held, tls))
        return int(held.getsockname()[1])

    def secure(self, tls: ssl.SSLContext) -> None:
        """Speak TLS on a shared listener."""
        self._listeners = [(listener, tls) for listener, _ in self._listeners]

    async def start(self) -> None:
        """Accept connections."""
        self._accepting = True
        for listener, tls in self._listeners:
            listener.setblocking(False)
            listener.listen(BACKLOG)
            self.loop.add_reader(listener, self._on_connection, listener, tls)
        self._watcher = self.loop.create_task(self._look_around())

    def _on_connection(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        if self._shared and self.connections:
            self.loop.remove_reader(listener)
            self.loop.call_later(
                min(len(self.connections), 25) * YIELD_SECONDS, self._accept, listener, tls, True
            )
        else:
            self._accept(listener, tls, False)

    def _accept(
        self, listener: socket.socket, tls: ssl.SSLContext | None, listen_again: bool
    ) -> None:
        if not self._accepting:
            return
        if listen_again:
            self.loop.add_reader(listener, self._on_connection, listener, tls)
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # out of file descriptors, for one: what is open goes on
            log.warning("a connection was not accepted: %s", error)
            self.loop.remove_reader(listener)
            self.loop.call_later(0.5, self._accept, listener, tls, True)
            return
        self._welcome(accepted, tls)

    def _accept_waiting(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        while self._accepting:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            self._welcome(accepted, tls)

    def _welcome(self, accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self.loop.create_task(self._greet(accepted, tls))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _greet(self, accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
        options: dict[str, Any] = (
            {} if tls is None else {"ssl": tls, "ssl_handshake_timeout": GREETING_SECONDS}
        )
        try:
            await self.loop.connect_accepted_socket(lambda: Connection(self), accepted, **options)
        except (OSError, ssl.SSLError, EOFError) as error:
            log.debug("a handshake failed: %s", error)
            accepted.close()

    async def _look_around(self) -> None:
        """Ping the silent, close the gone and those who never greeted."""
        while True:
            await asyncio.sleep(LOOK_AROUND_SECONDS)
            now = self.now()
            for connection in list(self.connections):
                silent = now - connection.heard
                if (
                    not connection.greeted and silent > GREETING_SECONDS
                ) or silent > GONE_AFTER_SECONDS:
                    connection.abort()
                elif silent > PING_AFTER_SECONDS and not connection.pinged:
                    connection.ping()

    async def stop(self, grace: float | None) -> None:
        """Accept no more, tell clients to go elsewhere, wait for calls under way, at most ``grace`` seconds."""
        for listener, tls in self._listeners:
            self.loop.remove_reader(listener)
            # Closing would reset those who wait in the queue; a shared queue is served by others
            if not self._shared:
                self._accept_waiting(listener, tls)
            listener.close()
        self._listeners, self._accepting = [], False
        if self._watcher is not None:
            self._watcher.cancel()
        for connection in list(self.connections):
            connection.drain()
        until = self.now() + (grace or 0.0)
        while (self.connections or self._pending) and self.now() < until:
            for connection in list(self.connections):
                connection.drain()  # those whose handshake ended meanwhile
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        for task in list(self._pending):
            task.cancel()
        self._stopped.set()

    async def wait_for_termination(self) -> None:
        """Return when stopped."""
        await self._stopped.wait()
