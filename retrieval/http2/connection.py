"""One HTTP/2 connection: bytes in, frames apart, handed to those who serve them.

Answers to calls that came in one read leave in one write. Everything a peer can make a connection
hold is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import NamedTuple

from retrieval.bounds.work_threads import WorkThreads
from retrieval.http2 import frames
from retrieval.http2.calls import MethodTable
from retrieval.http2.control_frames import ControlFrames
from retrieval.http2.draining import Drain
from retrieval.http2.frames import DEFAULT_WINDOW, Http2Error, frame
from retrieval.http2.limits import (
    MAX_CONTROL_FRAMES,
    SLICE_SECONDS,
    ReadPacer,
    SharedBuffers,
    TransportLimits,
)
from retrieval.http2.requests import RECEIVE_WINDOW, STREAM_WINDOW, RequestReader
from retrieval.http2.responses import ResponseWriter
from retrieval.http2.streams import FrameWriter, Streams, TransportCounts

log = logging.getLogger(__name__)

HTTP1_STARTS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ", b"OPTIONS ")
HTTP1_TEXT = (
    b"this port speaks HTTP/2: gRPC, gRPC-Web, and JSON with curl --http2-prior-knowledge."
    b" HTTP/1.1 is spoken on the port of --metrics-port.\n"
)
HTTP1_ANSWER = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(HTTP1_TEXT), HTTP1_TEXT)
)
"""What a client of HTTP/1.1 is told: it cannot read frames."""

_unpack = frames.FRAME.unpack_from


class ServerParts(NamedTuple):
    """What all connections of a server share.

    Attributes:
        methods: What can be called.
        limits: Of streams and messages.
        loop: Runs the calls.
        pacer: Of the server's reads.
        buffers: Counts what all hold.
        inflating: Inflates long messages, one at a time.
        connections: Those that are open; each enters when it is made.
        counts: Of what all carry and end.
    """

    methods: MethodTable
    limits: TransportLimits
    loop: asyncio.AbstractEventLoop
    pacer: ReadPacer
    buffers: SharedBuffers
    inflating: WorkThreads
    connections: set[Connection]
    counts: TransportCounts


class Connection(asyncio.Protocol):
    """The server's end of one connection.

    Args:
        server: What it shares with the others.

    Attributes:
        last_read: When bytes came last, by ``time.monotonic``.
        last_call: When it had a call last, as far as the server has looked.
        opened_at: When it was made.
        preface_received: Whether the peer has said that it speaks HTTP/2.
        ping_sent: Whether the peer has been silent since a PING.
    """

    def __init__(self, server: ServerParts) -> None:
        limits = server.limits
        self.limits = limits
        self.out = FrameWriter(server.counts)
        self.streams = Streams(server.buffers)
        self.responses = ResponseWriter(self.out, self.streams, limits.max_send_bytes)
        self.drain = Drain(self.out, self.streams, server.loop, self.close)
        self.requests = RequestReader(
            self.streams, self.responses, server.methods, limits, server.loop, server.inflating
        )
        self.closed = False
        self._is_greeted = False
        self.preface_received = False
        self.opened_at = self.last_call = self.last_read = monotonic()
        self.ping_sent = False
        self._connections = server.connections
        self._counts = server.counts
        self._loop = server.loop
        self._pacer = server.pacer
        self._rest = b""  # of the last read: what is not served yet
        self._has_turn = False  # the rest is served in a later turn of the loop
        self._slice_ended = False  # the rest holds whole frames
        self._reads_paused = False  # the server is full
        self._budget = self.streams.budget
        self._on_data = self.requests.on_data
        self._on_headers = self.requests.on_headers
        self._control = {
            **ControlFrames(self.streams, self.responses, self.drain).handlers(),
            frames.CONTINUATION: self.requests.on_continuation,
        }

    # --- the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Enter the open connections; what the peer speaks is not known yet."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write"), (
            "a stream transport"
        )
        self.out.transport = transport  # type: ignore[assignment]
        self.responses.peer = peer_name(transport)
        self.responses.auth_context = auth_context(transport)
        self._connections.add(self)
        self._counts.connections += 1

    def _greet(self) -> None:
        """Send the server's settings: the first frame of all."""
        if self._is_greeted:
            return
        self._is_greeted = True
        settings = {
            frames.MAX_CONCURRENT_STREAMS: self.limits.max_streams,
            frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            frames.MAX_HEADER_LIST_SIZE: frames.MAX_HEADER_BYTES,
        }
        self.out.frames.append(frames.settings(settings))
        self.out.frames.append(frames.window_update(0, RECEIVE_WINDOW - DEFAULT_WINDOW))
        self.out.flush()

    def start_draining(self) -> None:
        """Ask the peer to go elsewhere, and end the connection when its calls have ended."""
        self._greet()
        self.drain.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the work of a peer who has gone."""
        self.closed = True
        self.drain.stop()
        if self in self._connections:
            self._connections.remove(self)
            self._counts.streams += self.streams.opened
        self.streams.drop_all()

    def pause_writing(self) -> None:
        """Read nothing from a peer that does not read, until it does."""
        self.out.is_congested = True
        if self.out.transport is not None:
            self.out.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on: the peer reads again."""
        self.out.is_congested = False
        self.responses.resume_congested()
        self._read_on()

    def pause_reads(self) -> None:
        """Read nothing until ``resume_reads``: the server is full, so calls may gather."""
        self._reads_paused = True
        if self.out.transport is not None:
            self.out.transport.pause_reading()

    def resume_reads(self) -> None:
        """Read what has come meanwhile, and go on reading."""
        self._reads_paused = False
        self._read_on()

    def _read_on(self) -> None:
        """Serve what is left of the last read; then read, unless something forbids it."""
        if self.closed or self._reads_paused or self.out.is_congested or self._has_turn:
            return
        if self._rest:
            self._take_turn()
        elif self.out.transport is not None:
            self.out.transport.resume_reading()

    def _take_turn(self) -> None:
        """Go on in the loop's next turn, after others have had theirs; read nothing until then."""
        self._has_turn = True
        if self.out.transport is not None:
            self.out.transport.pause_reading()
        self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._has_turn = False
        if self.closed or self._reads_paused or self.out.is_congested:
            return
        data = self._rest
        self._rest = b""
        self._serve(data)
        stopped = self.closed or self._has_turn or self._reads_paused or self.out.is_congested
        if self.out.transport is not None and not stopped:
            self.out.transport.resume_reading()

    # --- frames ---

    def data_received(self, data: bytes) -> None:
        """Take frames apart and serve them."""
        if self.closed:
            return
        self.last_read = monotonic()
        self.ping_sent = False
        self._counts.received_bytes += len(data)
        if self._rest:
            data = self._rest + data
            if self._has_turn:
                self._rest = data
                return
        self._serve(data)

    def _serve(self, data: bytes) -> None:
        """Serve frames for one slice of time; the rest has its turn when others have had theirs."""
        try:
            at = self._serve_frames(data)
            self._rest = data[at:] if at < len(data) else b""
            requests = self.requests
            if self.streams.calls and self.streams.last > requests.timed_to:
                requests.set_deadlines()
        except Http2Error as error:
            self._fail(error)
            return
        except Exception:
            log.exception("a connection ends: reading what came failed")
            self._fail(Http2Error(frames.INTERNAL_ERROR, "internal error"))
            return
        if self.out.frames:
            self.out.flush()
        responses = self.responses
        if responses.pause_seconds and not self._reads_paused:
            pause = responses.pause_seconds
            responses.pause_seconds = 0.0
            self._pacer.pause(self, pause)
        if self._slice_ended:
            self._slice_ended = False
            if not (self._reads_paused or self.out.is_congested):
                self._take_turn()

    def _serve_frames(self, data: bytes) -> int:
        """Serve whole frames of ``data``; return where the rest begins."""
        at = 0
        end = len(data)
        if not self.preface_received:
            at = self._take_preface(data)
            if not at:
                return 0
        budget = self._budget
        requests = self.requests
        out = self.out
        if budget.left > MAX_CONTROL_FRAMES:
            budget.left = MAX_CONTROL_FRAMES
        until = monotonic() + SLICE_SECONDS
        while end - at >= frames.FRAME_HEADER_BYTES:
            high, low, kind, flags, stream = _unpack(data, at)
            start = at + frames.FRAME_HEADER_BYTES
            if high or low > frames.DEFAULT_FRAME_BYTES:
                size = (high << 16) + low
                raise Http2Error(frames.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            if start + low > end:
                break
            at = start + low
            stream &= frames.MAX_WINDOW  # the highest bit is reserved
            if requests.interrupted_block is not None and kind != frames.CONTINUATION:
                raise Http2Error(frames.PROTOCOL_ERROR, "a header block was interrupted")
            if kind == frames.DATA:
                self._on_data(stream, flags, data[start:at])
            elif kind == frames.HEADERS:
                self._on_headers(stream, flags, data[start:at])
            else:
                budget.left -= 1
                self._counts.control_frames += 1
                if (handle := self._control.get(kind)) is not None:
                    handle(stream, flags, data[start:at])
            if budget.left < 0 and budget.is_spent():
                raise Http2Error(frames.ENHANCE_YOUR_CALM, "too many frames that are no calls")
            if self.closed:
                return end
            # The end of a call needs no look at the clock: its HEADERS had one, or are charged
            is_end = kind == frames.DATA and flags & frames.END_STREAM
            if out.is_congested or (not is_end and monotonic() > until):
                self._slice_ended = at < end
                break
        return at

    def _take_preface(self, data: bytes) -> int:
        """Check that a connection begins as it must (section 3.4); return where the frames begin.

        0: not all of it is here.
        """
        at = len(frames.PREFACE)
        if data[:at] != frames.PREFACE[: len(data)]:
            if not self._is_greeted and data.startswith(HTTP1_STARTS):
                self._counts.aborted["HTTP/1.1"] += 1
                self.out.frames.append(HTTP1_ANSWER)
                self.out.flush()
                self.close()
                return 0
            raise Http2Error(frames.PROTOCOL_ERROR, "this port speaks gRPC over HTTP/2")
        if len(data) >= at:
            self._greet()
        if len(data) < at + frames.FRAME_HEADER_BYTES:
            return 0
        _, _, kind, flags, _ = _unpack(data, at)
        if kind != frames.SETTINGS or flags & frames.ACK:
            raise Http2Error(frames.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        self.preface_received = True
        return at

    # --- the end ---

    def _fail(self, error: Http2Error) -> None:
        log.debug("a connection ends: %s", error)
        self._greet()
        self._counts.goaways[error.code] += 1
        reason = str(error).encode()[:100]
        self.out.frames.append(frames.goaway(self.streams.last, error.code, reason))
        self.out.flush()
        self.close()

    def close(self) -> None:
        """End the connection once what was written has left."""
        self.closed = True
        self.drain.stop()
        self.streams.drop_all()
        if self.out.transport is not None:
            self.out.transport.close()

    def abort(self, reason: str = "stopping") -> None:
        """End the connection now; ``reason`` is a word for the metrics."""
        if not self.closed:
            self._counts.aborted[reason] += 1
        self.close()
        if self.out.transport is not None:
            self.out.transport.abort()

    def is_stalled(self, now: float) -> bool:
        """Return whether a half-sent request or a half-read answer has not moved for too long."""
        streams = self.streams
        if now - streams.buffers.moved_at <= self.limits.lifetimes.stalled_seconds:
            return False
        return self.out.is_congested or any(
            call.pending or call.body or (call.message is not None and not call.ended)
            for call in streams.calls.values()
        )

    def ping(self) -> None:
        """Ask whether the peer is still there."""
        self.ping_sent = True
        self.out.frames.append(frame(frames.PING, 0, 0, b"liveness"))
        self.out.flush()


def peer_name(transport: asyncio.BaseTransport) -> str:
    """Return the client's address as gRPC writes it."""
    peer = transport.get_extra_info("peername") if hasattr(transport, "get_extra_info") else None
    if isinstance(peer, tuple) and len(peer) == 2:
        return f"ipv4:{peer[0]}:{peer[1]}"
    if isinstance(peer, tuple) and len(peer) > 2:
        return f"ipv6:[{peer[0]}]:{peer[1]}"
    return f"unix:{peer}" if peer else "unknown"


def auth_context(transport: asyncio.BaseTransport) -> dict[str, list[bytes]]:
    """Return what the client's certificate says, under the keys of gRPC; empty without one."""
    held = transport.get_extra_info("peercert") if hasattr(transport, "get_extra_info") else None
    if not held:
        return {}
    names = [
        value for part in held.get("subject", ()) for key, value in part if key == "commonName"
    ]
    alternatives = [value for _, value in held.get("subjectAltName", ())]
    found = {
        "transport_security_type": [b"ssl"],
        "x509_common_name": [name.encode() for name in names],
        "x509_subject_alternative_name": [name.encode() for name in alternatives],
    }
    return {key: values for key, values in found.items() if values}
