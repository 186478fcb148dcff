"""A gRPC server on asyncio protocols.

It takes the same handlers as ``grpc.aio.server`` and serves them at a fraction of the cost a call.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

import grpc

from retrieval.bounds.work_threads import WorkThreads
from retrieval.http2.calls import MethodTable
from retrieval.http2.connection import Connection, ServerParts
from retrieval.http2.frames import ERROR_NAMES
from retrieval.http2.limits import Lifetimes, ReadPacer, SharedBuffers, TransportLimits
from retrieval.http2.streams import TransportCounts

log = logging.getLogger(__name__)

BACKLOG = 4096
IDLE_CHECK_SECONDS = 5.0
HANDSHAKE_SECONDS = 20.0
"""How long a connection may stay silent before it has said that it speaks HTTP/2."""
PING_AFTER_SECONDS = 60.0
DEAD_AFTER_SECONDS = 80.0
ACCEPT_RETRY_SECONDS = 0.5
YIELD_SECONDS = 0.0002
"""Of workers that share a socket, one waits this long per connection that it holds.

So an emptier one accepts first.
"""
MAX_ACCEPTED = 64
"""Connections that are accepted in one turn of the loop."""
AGE_SPREAD = 0.2
"""Connections made together are not ended together: their ages differ by up to this share."""
MAX_CONNECTIONS = 20_000
RESERVED_DESCRIPTORS = 128
"""Of files, releases, workers and the HTTP port."""


class Http2Server:
    """Listens, keeps connections, drains them.

    Args:
        max_receive_bytes: Of one request message.
        max_send_bytes: Of one answer message.
        max_streams: Calls at a time on one connection.
        max_connections: At a time; None: as many as the process may open files, less some.
        lifetimes: Of connections.
        listener: A listening socket shared with other processes; None: ``add_port`` makes one.
    """

    def __init__(
        self,
        *,
        max_receive_bytes: int,
        max_send_bytes: int,
        max_streams: int,
        max_connections: int | None = None,
        lifetimes: Lifetimes | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self.limits = TransportLimits(
            max_receive_bytes, max_send_bytes, max_streams, lifetimes or Lifetimes()
        )
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.methods = MethodTable()
        self.buffers = SharedBuffers(self._end_largest)
        self.counts = TransportCounts()
        self._inflating = WorkThreads(1, "inflate")
        self._parts = ServerParts(
            self.methods,
            self.limits,
            self.loop,
            ReadPacer(self.loop),
            self.buffers,
            self._inflating,
            self.connections,
            self.counts,
        )
        self._max_connections = max_connections or connections_allowed()
        self._batch = 1  # connections that the next turn accepts
        self._shared = listener is not None
        self._listeners: list[tuple[socket.socket, ssl.SSLContext | None]] = (
            [] if listener is None else [(listener, None)]
        )
        self._handshakes: set[asyncio.Task[Any]] = set()
        self._idle_check: asyncio.Task[None] | None = None
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
        """Do nothing: generated code registers everything twice, and once is enough here."""

    def add_port(self, address: str, tls: ssl.SSLContext | None = None) -> int:
        """Bind ``host:port`` and return the port; raises ``OSError``."""
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, int(port)))
        except OSError:
            bound.close()
            raise
        self._listeners.append((bound, tls))
        return int(bound.getsockname()[1])

    def secure(self, tls: ssl.SSLContext) -> None:
        """Speak TLS on a shared listener."""
        self._listeners = [(listener, tls) for listener, _ in self._listeners]

    # --- connections ---

    async def start(self) -> None:
        """Accept connections."""
        self._accepting = True
        for listener, tls in self._listeners:
            listener.setblocking(False)
            listener.listen(BACKLOG)
            self.loop.add_reader(listener, self._on_connection, listener, tls)
        self._idle_check = self.loop.create_task(self._check_idle())

    def make_connection(self) -> Connection:
        """Make the protocol object of a connection."""
        return Connection(self._parts)

    def _on_connection(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        if self._shared and self.connections:
            self.loop.remove_reader(listener)
            delay = min(len(self.connections), 25) * YIELD_SECONDS
            self.loop.call_later(delay, self._accept, listener, tls, True)
        else:
            self._accept(listener, tls, False)

    def _accept(
        self, listener: socket.socket, tls: ssl.SSLContext | None, listen_again: bool
    ) -> None:
        """Accept a few connections; twice as many as last time while more wait in the queue.

        So a few are dealt out evenly among workers, and many do not wait.
        """
        if not self._accepting:
            return
        if listen_again:
            self.loop.add_reader(listener, self._on_connection, listener, tls)
        for _ in range(self._batch):
            try:
                accepted, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                self._batch = 1
                return
            except OSError as error:  # out of file descriptors, for one: what is open goes on
                log.warning("a connection was not accepted: %s", error)
                self._end_idlest()
                self.loop.remove_reader(listener)
                self.loop.call_later(ACCEPT_RETRY_SECONDS, self._accept, listener, tls, True)
                return
            is_full = len(self.connections) + len(self._handshakes) >= self._max_connections
            if is_full and not self._end_idlest():
                self.counts.aborted["no room"] += 1
                accepted.close()
            else:
                self._begin_handshake(accepted, tls)
            if is_full:  # the others wait a turn: what was ended is gone by then
                self._batch = 1
                return
        self._batch = min(MAX_ACCEPTED, 2 * self._batch)

    def _end_idlest(self) -> bool:
        """End the connection that has been silent longest of those without a call, if there is one.

        It makes room for a new one.
        """
        idle = [one for one in self.connections if not one.streams.calls and not one.closed]
        if not idle:
            return False
        min(idle, key=lambda connection: connection.last_read).abort("made room")
        return True

    def _end_largest(self) -> None:
        """End the connection that holds the most, as all together hold too much."""
        largest = max(
            self.connections, key=lambda connection: connection.streams.buffers.held, default=None
        )
        if largest is not None and not largest.closed:
            log.warning("a connection holds %d bytes and is ended", largest.streams.buffers.held)
            largest.abort("memory")

    def _accept_backlog(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Accept all that wait in the queue of a listener that will close."""
        while self._accepting:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            self._begin_handshake(accepted, tls)

    def _begin_handshake(self, accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self.loop.create_task(self._handshake(accepted, tls))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _handshake(self, accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
        options: dict[str, Any] = {}
        if tls is not None:
            options = {"ssl": tls, "ssl_handshake_timeout": HANDSHAKE_SECONDS}
        try:
            await self.loop.connect_accepted_socket(self.make_connection, accepted, **options)
        except (OSError, ssl.SSLError, EOFError) as error:
            log.debug("a handshake failed: %s", error)
            accepted.close()

    async def _check_idle(self) -> None:
        """Look after connections that are silent, stalled, without calls, or old."""
        while True:
            await asyncio.sleep(min(IDLE_CHECK_SECONDS, self.limits.lifetimes.stalled_seconds / 4))
            now = monotonic()
            for connection in list(self.connections):
                try:
                    self._check(connection, now)
                except Exception:  # of one connection: the others must still be looked after
                    log.exception("a connection could not be looked after")

    def _check(self, connection: Connection, now: float) -> None:
        limits = self.limits.lifetimes
        silent = now - connection.last_read
        patience = DEAD_AFTER_SECONDS if connection.preface_received else HANDSHAKE_SECONDS
        if silent > patience:
            connection.abort("silent")
            return
        if connection.is_stalled(now):
            connection.abort("stalled")
            return
        if silent > PING_AFTER_SECONDS and not connection.ping_sent:
            connection.ping()
        if connection.streams.calls:
            connection.last_call = now
        age = (now - connection.opened_at) * (1 + AGE_SPREAD * (id(connection) % 97) / 97)
        if age > limits.max_age_seconds + limits.age_grace_seconds:
            connection.abort("age")
        elif age > limits.max_age_seconds or now - connection.last_call > limits.max_idle_seconds:
            connection.start_draining()

    # --- the end ---

    async def stop(self, grace: float | None) -> None:
        """Accept no more, drain connections, and wait at most ``grace`` seconds for their calls."""
        for listener, tls in self._listeners:
            self.loop.remove_reader(listener)
            # Closing would reset those in the queue; a shared queue is served by others
            if not self._shared:
                self._accept_backlog(listener, tls)
            listener.close()
        self._listeners = []
        self._accepting = False
        if self._idle_check is not None:
            self._idle_check.cancel()
        self._drain_all()
        until = monotonic() + (grace or 0.0)
        while (self.connections or self._handshakes) and monotonic() < until:
            self._drain_all()  # those whose handshake has ended meanwhile
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        for task in list(self._handshakes):
            task.cancel()
        self._inflating.close()
        self._stopped.set()

    def _drain_all(self) -> None:
        for connection in list(self.connections):
            connection.start_draining()

    def measurements(self) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """Yield name, labels and value of each metric of the transport."""
        counts = self.counts
        streams = sum(connection.streams.opened for connection in self.connections)
        yield "omni_transport_connections", (), len(self.connections)
        yield "omni_transport_connections_opened", (), counts.connections
        yield (
            "omni_transport_streams",
            (),
            sum(len(connection.streams.calls) for connection in self.connections),
        )
        yield "omni_transport_streams_opened", (), counts.streams + streams
        yield "omni_transport_held_bytes", (), self.buffers.held
        yield "omni_transport_received_bytes", (), counts.received_bytes
        yield "omni_transport_sent_bytes", (), counts.sent_bytes
        yield "omni_transport_control_frames", (), counts.control_frames
        yield "omni_transport_client_resets", (), counts.client_resets
        for code, count in counts.resets.items():
            yield "omni_transport_resets", (ERROR_NAMES[code],), count
        for code, count in counts.goaways.items():
            yield "omni_transport_goaways", (ERROR_NAMES[code],), count
        for status, count in counts.ended_calls.items():
            yield "omni_transport_ended_calls", (status,), count
        for reason, count in counts.aborted.items():
            yield "omni_transport_aborted_connections", (reason,), count

    async def wait_for_termination(self) -> None:
        """Return when stopped."""
        await self._stopped.wait()


def connections_allowed() -> int:
    """Return how many connections the process's limit of file descriptors has room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(8, min(MAX_CONNECTIONS, soft - min(RESERVED_DESCRIPTORS, soft // 2)))
