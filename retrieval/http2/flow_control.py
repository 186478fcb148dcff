"""What a peer says beside its calls: settings, windows, pings, resets."""

from __future__ import annotations

import asyncio
import struct
from collections import OrderedDict
from collections.abc import Callable

from retrieval.http2 import frames as wire
from retrieval.http2.calls import Call
from retrieval.http2.frames import WireError, frame

CALLS_PER_NOISE = 10
"""Calls that a frame of settings may set going at the price of one more control frame."""
SENT_BYTES_PER_UPDATE = 1024
"""Bytes of answers that excuse one window update: readers send one per frame or per half window, whether or not the stream still lives."""


class ControlFrames(asyncio.Protocol):
    """The part of a connection that keeps the peer's settings and windows; ``Connection`` sets the attributes."""

    calls: dict[int, Call]
    last_stream: int
    draining: bool
    _out: list[bytes]
    _window: int
    _granted: int
    _opened: int
    _excused: int
    _starved: OrderedDict[int, Call]
    _peer_window: int
    _peer_frame: int
    _size_update: bytes
    _buffered: int
    _noise: int
    _served: int
    _turned_away: set[int]
    _farewell: Callable[[], None] | None

    def control_frames(self) -> dict[int, Callable[[int, int, bytes], None]]:
        """By frame type, what takes stream, flags and payload of such a frame."""
        return {
            wire.PRIORITY: self._on_priority,
            wire.RST_STREAM: self._on_reset,
            wire.SETTINGS: self._on_settings,
            wire.PUSH_PROMISE: self._on_push,
            wire.PING: self._on_ping,
            wire.GOAWAY: self._on_goaway,
            wire.WINDOW_UPDATE: self._on_window_update,
        }

    def _send_ok(self, call: Call) -> None:
        """End a call whose whole answer has left."""
        raise NotImplementedError

    def _close_call(self, call: Call) -> None:
        """Forget a call that has ended."""
        raise NotImplementedError

    def _reset(self, stream: int, code: int) -> None:
        self._out.append(frame(wire.RST_STREAM, 0, stream, code.to_bytes(4, "big")))

    def _on_priority(self, stream: int, flags: int, payload: bytes) -> None:
        if len(payload) != 5:
            raise WireError(wire.FRAME_SIZE_ERROR, "PRIORITY")

    def _on_push(self, stream: int, flags: int, payload: bytes) -> None:
        raise WireError(wire.PROTOCOL_ERROR, "a client cannot push")

    def _on_goaway(self, stream: int, flags: int, payload: bytes) -> None:
        """The client opens no more streams; it closes the connection itself."""

    def _on_reset(self, stream: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise WireError(wire.FRAME_SIZE_ERROR, "RST_STREAM")
        if stream == 0 or (stream > self.last_stream and not self.draining):
            raise WireError(wire.PROTOCOL_ERROR, "RST_STREAM of a stream that was never opened")
        self._turned_away.discard(stream)
        call = self.calls.get(stream)
        if call is not None:
            call.drop()
            call.task = call.timer = None
            self._close_call(call)
            self._served -= 1

    def _on_ping(self, stream: int, flags: int, payload: bytes) -> None:
        if len(payload) != 8 or stream:
            raise WireError(wire.FRAME_SIZE_ERROR, "PING")
        if not flags & wire.ACK:
            self._out.append(frame(wire.PING, wire.ACK, 0, payload))
        elif self._farewell is not None:
            farewell, self._farewell = self._farewell, None
            farewell()

    def _on_settings(self, stream: int, flags: int, payload: bytes) -> None:
        if len(payload) % 6 or stream or (flags & wire.ACK and payload):
            raise WireError(wire.FRAME_SIZE_ERROR, "SETTINGS")
        if flags & wire.ACK:
            return
        before = self._peer_window
        for key, value in struct.iter_unpack(">HL", payload):
            if key == wire.INITIAL_WINDOW_SIZE:
                if value > wire.MAX_WINDOW:
                    raise WireError(wire.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE")
                self._peer_window = value
            elif key == wire.MAX_FRAME_SIZE:
                if not wire.DEFAULT_FRAME_BYTES <= value < 2**24:
                    raise WireError(wire.PROTOCOL_ERROR, "MAX_FRAME_SIZE")
                self._peer_frame = value
            elif key == wire.HEADER_TABLE_SIZE and value < 4096:
                self._size_update = b"\x20"
        self._out.append(frame(wire.SETTINGS, wire.ACK, 0))
        if self._peer_window > before and self._buffered:
            self._pump_all()

    def _on_window_update(self, stream: int, flags: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise WireError(wire.FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        increment = int.from_bytes(payload, "big") & wire.MAX_WINDOW
        if stream == 0:
            if (
                self._window < self._granted
            ):  # answers left since the last one: it is part of reading them
                self._noise -= 1
            else:
                self._excuse()
            self._window += increment
            self._opened += increment
            if not increment or self._window > wire.MAX_WINDOW:
                raise WireError(
                    wire.FLOW_CONTROL_ERROR if increment else wire.PROTOCOL_ERROR, "WINDOW_UPDATE"
                )
            self._granted = self._window
            while self._starved and self._window > 0:
                self._pump(self._starved.popitem(last=False)[1])
            return
        call = self.calls.get(stream)
        if call is None:
            if stream > self.last_stream and not self.draining:
                raise WireError(
                    wire.PROTOCOL_ERROR, "WINDOW_UPDATE of a stream that was never opened"
                )
            self._excuse()
            return
        call.window += increment
        if not increment or self._peer_window + call.window > wire.MAX_WINDOW:
            self._reset(stream, wire.FLOW_CONTROL_ERROR if increment else wire.PROTOCOL_ERROR)
            call.drop()
            call.task = call.timer = None
            self._close_call(call)
            return
        self._excuse()
        if call.pending:
            self._pump(call)

    def _excuse(self) -> None:
        """A window update is part of reading answers, and no noise, as far as the bytes go that have left on this connection."""
        if self._excused * SENT_BYTES_PER_UPDATE < self._opened - self._window:
            self._excused += 1
            self._noise -= 1

    def _pump(self, call: Call) -> None:
        """Send what the windows allow of an answer that waits; note it down if it is the connection's that ends it."""
        pending = call.pending
        while pending and isinstance(pending, bytearray):
            room = min(
                self._window, self._peer_window + call.window, self._peer_frame, len(pending)
            )
            if room <= 0:
                if self._window <= 0 < self._peer_window + call.window:
                    self._starved[call.stream] = call
                return
            self._out.append(frame(wire.DATA, 0, call.stream, bytes(pending[:room])))
            del pending[:room]
            self._window -= room
            call.window -= room
            call.held -= room
            self._buffered -= room
        if call.finishing:
            self._send_ok(call)

    def _pump_all(self) -> None:
        """After a larger window for every call.

        One frame makes this much work, so it counts for more than one.
        """
        waiting = [call for call in self.calls.values() if call.pending]
        self._noise += len(waiting) // CALLS_PER_NOISE
        for call in waiting:
            self._pump(call)
