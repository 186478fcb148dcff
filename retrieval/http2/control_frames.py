"""The peer's control frames: settings, window updates, pings, resets."""

from __future__ import annotations

import struct
from collections.abc import Callable

from retrieval.http2 import frames
from retrieval.http2.draining import Drain
from retrieval.http2.frames import Http2Error, frame
from retrieval.http2.responses import ResponseWriter
from retrieval.http2.streams import Streams

SETTINGS_BYTES_PER_FRAME = 60
"""Settings of so many bytes cost one more control frame."""

Handler = Callable[[int, int, bytes], None]
"""Takes stream, flags and payload of a frame."""


class ControlFrames:
    """Serves the control frames of one connection.

    Each costs the peer one of its budget; a window update is free as far as it goes with reading
    answers.
    """

    __slots__ = ("_budget", "_drain", "_flow", "_responses", "_streams")

    def __init__(self, streams: Streams, responses: ResponseWriter, drain: Drain) -> None:
        self._streams = streams
        self._budget = streams.budget
        self._flow = streams.flow
        self._responses = responses
        self._drain = drain

    def handlers(self) -> dict[int, Handler]:
        """Return the handler of each frame type."""
        return {
            frames.PRIORITY: self._on_priority,
            frames.RST_STREAM: self._on_reset,
            frames.SETTINGS: self._on_settings,
            frames.PUSH_PROMISE: self._on_push,
            frames.PING: self._on_ping,
            frames.GOAWAY: self._on_goaway,
            frames.WINDOW_UPDATE: self._on_window_update,
        }

    def _on_priority(self, stream: int, flags: int, payload: bytes) -> None:
        if stream == 0:
            raise Http2Error(frames.PROTOCOL_ERROR, "PRIORITY of the connection")
        if len(payload) != frames.PRIORITY_BYTES:  # an error of the stream (section 6.3)
            self._responses.reset(stream, frames.FRAME_SIZE_ERROR)
            call = self._streams.calls.get(stream)
            if call is not None:
                self._streams.cancel(call)

    def _on_push(self, stream: int, flags: int, payload: bytes) -> None:
        raise Http2Error(frames.PROTOCOL_ERROR, "a client cannot push")

    def _on_goaway(self, stream: int, flags: int, payload: bytes) -> None:
        """The client opens no more streams; it closes the connection itself."""
        if stream:
            raise Http2Error(frames.PROTOCOL_ERROR, "GOAWAY of a stream")
        if len(payload) < 8:
            raise Http2Error(frames.FRAME_SIZE_ERROR, "GOAWAY")

    def _on_reset(self, stream: int, flags: int, payload: bytes) -> None:
        streams = self._streams
        if len(payload) != 4:
            raise Http2Error(frames.FRAME_SIZE_ERROR, "RST_STREAM")
        if stream == 0 or streams.never_opened(stream):
            raise Http2Error(frames.PROTOCOL_ERROR, "RST_STREAM of a stream that was never opened")
        self._responses.out.counts.client_resets += 1
        streams.refused.discard(stream)
        streams.end_lingering(stream)
        call = streams.calls.get(stream)
        if call is not None:
            streams.cancel(call)

    def _on_ping(self, stream: int, flags: int, payload: bytes) -> None:
        if stream:
            raise Http2Error(frames.PROTOCOL_ERROR, "PING of a stream")
        if len(payload) != 8:
            raise Http2Error(frames.FRAME_SIZE_ERROR, "PING")
        if flags & frames.ACK:
            self._drain.acknowledged()
        else:
            self._responses.out.frames.append(frame(frames.PING, frames.ACK, 0, payload))

    def _on_settings(self, stream: int, flags: int, payload: bytes) -> None:
        if stream:
            raise Http2Error(frames.PROTOCOL_ERROR, "SETTINGS of a stream")
        if len(payload) % 6 or (flags & frames.ACK and payload):
            raise Http2Error(frames.FRAME_SIZE_ERROR, "SETTINGS")
        if flags & frames.ACK:
            return
        before = self._flow.stream_window
        self._budget.left -= len(payload) // SETTINGS_BYTES_PER_FRAME
        for key, value in struct.iter_unpack(">HL", payload):
            self._set(key, value)
        self._responses.out.frames.append(frame(frames.SETTINGS, frames.ACK, 0))
        if self._flow.stream_window > before:
            self._require_windows()
            if self._streams.buffers.held:
                self._responses.resume_all()

    def _require_windows(self) -> None:
        """Raise if a stream's window has become larger than a window may be (section 6.9.2)."""
        largest = frames.MAX_WINDOW - self._flow.stream_window
        if largest < 0 or any(call.window > largest for call in self._streams.calls.values()):
            raise Http2Error(frames.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE")

    def _set(self, key: int, value: int) -> None:
        if key == frames.INITIAL_WINDOW_SIZE:
            if value > frames.MAX_WINDOW:
                raise Http2Error(frames.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE")
            self._flow.stream_window = value
        elif key == frames.ENABLE_PUSH:
            if value > 1:
                raise Http2Error(frames.PROTOCOL_ERROR, "ENABLE_PUSH")
        elif key == frames.MAX_FRAME_SIZE:
            if not frames.DEFAULT_FRAME_BYTES <= value < 2**24:
                raise Http2Error(frames.PROTOCOL_ERROR, "MAX_FRAME_SIZE")
            self._flow.frame_bytes = value
        elif key == frames.HEADER_TABLE_SIZE and value < frames.DEFAULT_TABLE_BYTES:
            self._responses.table_shrunk = True

    def _on_window_update(self, stream: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Http2Error(frames.FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        increment = int.from_bytes(payload, "big") & frames.MAX_WINDOW
        if stream == 0:
            self._on_connection_update(increment)
        else:
            self._on_stream_update(stream, increment)

    def _on_connection_update(self, increment: int) -> None:
        flow = self._flow
        if flow.sent_since_update:  # the update is part of reading what was sent
            self._budget.left += 1
        else:
            self._budget.refund_update(flow.sent_bytes)
        flow.enlarge(increment)
        if flow.blocked:
            self._responses.resume_blocked()

    def _on_stream_update(self, stream: int, increment: int) -> None:
        flow = self._flow
        call = self._streams.calls.get(stream)
        if call is None:
            if self._streams.never_opened(stream):
                raise Http2Error(
                    frames.PROTOCOL_ERROR, "WINDOW_UPDATE of a stream that was never opened"
                )
            self._budget.refund_update(flow.sent_bytes)
            return
        error = flow.enlarge_stream(call, increment)
        if error is not None:
            self._responses.reset(stream, error)
            self._streams.cancel(call)
            return
        self._budget.refund_update(flow.sent_bytes)
        if call.pending:
            self._responses.resume(call)
