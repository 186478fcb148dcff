"""One HTTP/2 connection: bytes in, frames apart, handed to those who serve them.

Answers to calls that came in one read leave in one write. Everything a peer can make a connection
hold is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from retrieval.http2 import frames
from retrieval.http2.calls import MethodTable
from retrieval.http2.control_frames import ControlFrames
from retrieval.http2.draining import Drain
from retrieval.http2.frames import DEFAULT_WINDOW, Http2Error, frame
from retrieval.http2.limits import TransportLimits
from retrieval.http2.read_pacing import ReadPacer
from retrieval.http2.requests import RECEIVE_WINDOW, STREAM_WINDOW, RequestReader
from retrieval.http2.responses import ResponseWriter
from retrieval.http2.streams import FrameWriter, Streams

log = logging.getLogger(__name__)

_unpack = frames.FRAME.unpack_from


class Connection(asyncio.Protocol):
    """The server's end of one connection.

    Args:
        methods: What can be called.
        limits: Of streams and messages.
        loop: Runs the calls.
        pacer: Of the server's reads.
        connections: The server's open connections; this one enters when it is made.

    Attributes:
        last_read: When bytes came last, by ``time.monotonic``.
        preface_received: Whether the peer has said that it speaks HTTP/2.
        ping_sent: Whether the peer has been silent since a PING.
    """

    def __init__(
        self,
        methods: MethodTable,
        limits: TransportLimits,
        loop: asyncio.AbstractEventLoop,
        pacer: ReadPacer,
        connections: set[Connection],
    ) -> None:
        self.limits = limits
        self.out = FrameWriter()
        self.streams = Streams()
        self.responses = ResponseWriter(self.out, self.streams, limits.max_send_bytes)
        self.drain = Drain(self.out, self.streams, loop, self.close)
        self.requests = RequestReader(self.streams, self.responses, methods, limits, loop)
        self.closed = False
        self.preface_received = False
        self.last_read = monotonic()
        self.ping_sent = False
        self._connections = connections
        self._pacer = pacer
        self._rest = b""  # of the last read: a frame that is not whole yet
        self._reads_paused = False  # the server is full
        self._writes_paused = False  # the peer does not read
        self._budget = self.streams.budget
        self._on_data = self.requests.on_data
        self._on_headers = self.requests.on_headers
        self._control = {
            **ControlFrames(self.streams, self.responses, self.drain).handlers(),
            frames.CONTINUATION: self.requests.on_continuation,
        }

    # --- the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the server's settings."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write"), (
            "a stream transport"
        )
        self.out.transport = transport  # type: ignore[assignment]
        self._connections.add(self)
        settings = {
            frames.MAX_CONCURRENT_STREAMS: self.limits.max_streams,
            frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            frames.MAX_HEADER_LIST_SIZE: frames.MAX_HEADER_BYTES,
        }
        self.out.frames.append(frames.settings(settings))
        self.out.frames.append(frames.window_update(0, RECEIVE_WINDOW - DEFAULT_WINDOW))
        self.out.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the work of a peer who has gone."""
        self.closed = True
        self.drain.stop()
        self._connections.discard(self)
        self.streams.drop_all()

    def pause_writing(self) -> None:
        """Read nothing from a peer that does not read, until it does."""
        self._writes_paused = True
        if self.out.transport is not None:
            self.out.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read on: the peer reads again."""
        self._writes_paused = False
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
        stopped = self.closed or self._reads_paused or self._writes_paused
        if self.out.transport is not None and not stopped:
            self.out.transport.resume_reading()

    # --- frames ---

    def data_received(self, data: bytes) -> None:
        """Take frames apart and serve them."""
        if self.closed:
            return
        self.last_read = monotonic()
        self.ping_sent = False
        if self._rest:
            data = self._rest + data
        try:
            self._rest = self._serve_frames(data)
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

    def _serve_frames(self, data: bytes) -> bytes:
        """Serve the whole frames of ``data``; return what is left of it."""
        at = 0
        end = len(data)
        if not self.preface_received:
            at = len(frames.PREFACE)
            if data[:at] != frames.PREFACE[:end]:
                raise Http2Error(frames.PROTOCOL_ERROR, "this port speaks gRPC over HTTP/2")
            if end < at:
                return bytes(data)
            self.preface_received = True
        budget = self._budget
        requests = self.requests
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
            elif (handle := self._control.get(kind)) is not None:
                handle(stream, flags, data[start:at])
                budget.left -= 1
            if budget.left < 0:
                raise Http2Error(frames.ENHANCE_YOUR_CALM, "too many control frames")
            if self.closed:
                return b""
        return bytes(data[at:])

    # --- the end ---

    def _fail(self, error: Http2Error) -> None:
        log.debug("a connection ends: %s", error)
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

    def abort(self) -> None:
        """End the connection now."""
        self.close()
        if self.out.transport is not None:
            self.out.transport.abort()

    def ping(self) -> None:
        """Ask whether the peer is still there."""
        self.ping_sent = True
        self.out.frames.append(frame(frames.PING, 0, 0, b"liveness"))
        self.out.flush()
