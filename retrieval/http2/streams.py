"""The streams of one connection, their flow control, the frames that leave on them, and counts."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable

from retrieval.http2.calls import Call
from retrieval.http2.frames import (
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    FLOW_CONTROL_ERROR,
    MAX_WINDOW,
    PROTOCOL_ERROR,
    Http2Error,
)
from retrieval.http2.limits import (
    CONTROL_FRAMES_PER_CALL,
    Buffers,
    ControlFrameBudget,
    SharedBuffers,
)

MAX_REMEMBERED = 1000
"""Streams that were reset by us, and skipped ones, that a connection remembers."""


class FlowControl:
    """The windows and the frame size that the peer allows, and the answers that wait for them.

    RFC 9113, section 5.2.

    Attributes:
        window: Bytes that may be sent on the connection now.
        stream_window: Initial window of a stream; ``Call.window`` says how far one is from it.
        frame_bytes: Longest frame that the peer takes.
        blocked: Calls whose answers wait for the connection's window, not for their stream's.
        congested: Calls whose answers wait until the peer reads what was sent.
    """

    __slots__ = (
        "_granted",
        "_opened",
        "blocked",
        "congested",
        "frame_bytes",
        "stream_window",
        "window",
    )

    def __init__(self) -> None:
        self.window = DEFAULT_WINDOW
        self.stream_window = DEFAULT_WINDOW
        self.frame_bytes = DEFAULT_FRAME_BYTES
        self.blocked: OrderedDict[int, Call] = OrderedDict()
        self.congested: OrderedDict[int, Call] = OrderedDict()
        self._granted = DEFAULT_WINDOW  # the window after the last update
        self._opened = DEFAULT_WINDOW  # by all updates together

    @property
    def sent_bytes(self) -> int:
        """Bytes of answers that have been sent: all that is not in the window any more."""
        return self._opened - self.window

    @property
    def sent_since_update(self) -> bool:
        """Whether answers have been sent since the last update of the connection's window."""
        return self.window < self._granted

    def room(self, call: Call) -> int:
        """Return how many bytes of a call's answer may be sent in one frame now."""
        return min(self.window, self.stream_window + call.window, self.frame_bytes)

    def block(self, call: Call) -> None:
        """Note that an answer waits, if it is the connection's window that stops it."""
        if self.window <= 0 < self.stream_window + call.window:
            self.blocked[call.stream] = call

    def enlarge(self, increment: int) -> None:
        """Apply a window update of the connection.

        Raises:
            Http2Error: The increment is 0, or too much.
        """
        self.window += increment
        self._opened += increment
        if not increment:
            raise Http2Error(PROTOCOL_ERROR, "WINDOW_UPDATE")
        if self.window > MAX_WINDOW:
            raise Http2Error(FLOW_CONTROL_ERROR, "WINDOW_UPDATE")
        self._granted = self.window

    def enlarge_stream(self, call: Call, increment: int) -> int | None:
        """Apply a window update of one stream; return the error code that ends it, or None."""
        call.window += increment
        if not increment:
            return PROTOCOL_ERROR
        return FLOW_CONTROL_ERROR if self.stream_window + call.window > MAX_WINDOW else None


class TransportCounts:
    """What the connections of one server have carried and ended, for its metrics.

    Attributes:
        connections: That were opened.
        streams: That clients of connections which have ended had opened.
        received_bytes: Of frames.
        sent_bytes: Likewise.
        control_frames: Received frames that are neither HEADERS nor DATA.
        client_resets: RST_STREAM frames received.
        resets: RST_STREAM frames sent, by error code.
        goaways: GOAWAY frames sent, by error code; of the two of a drained connection the first.
        ended_calls: Calls that never reached a method, or ended before it had, by status.
        aborted: Connections that were cut, by reason.
    """

    __slots__ = (
        "aborted",
        "client_resets",
        "connections",
        "control_frames",
        "ended_calls",
        "goaways",
        "received_bytes",
        "resets",
        "sent_bytes",
        "streams",
    )

    def __init__(self) -> None:
        self.connections = 0
        self.streams = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self.control_frames = 0
        self.client_resets = 0
        self.resets: Counter[int] = Counter()
        self.goaways: Counter[int] = Counter()
        self.ended_calls: Counter[str] = Counter()
        self.aborted: Counter[str] = Counter()


class FrameWriter:
    """Gathers outgoing frames and hands them to the transport in one write.

    Args:
        counts: Of the server.

    Attributes:
        frames: What leaves with the next flush; always the same list.
        answers: Whole answers among them.
        transport: Of the connection, once it is made.
        is_congested: The transport holds as much as it should: the peer does not read.
    """

    __slots__ = ("answers", "counts", "frames", "is_congested", "transport")

    def __init__(self, counts: TransportCounts) -> None:
        self.counts = counts
        self.frames: list[bytes] = []
        self.answers = 0
        self.transport: asyncio.Transport | None = None
        self.is_congested = False

    def flush(self) -> None:
        """Write what has been gathered."""
        frames = self.frames
        self.answers = 0
        if frames and self.transport is not None:
            content = frames[0] if len(frames) == 1 else b"".join(frames)
            self.counts.sent_bytes += len(content)
            self.transport.write(content)
        frames.clear()


class Streams:
    """The streams of one connection: open calls, and refused ones whose message is yet to come.

    Attributes:
        calls: Open calls by stream, in the order in which they were opened.
        refused: Streams that were refused before their message had come.
        reset: The last streams that were reset before the client had ended them: what still comes
            on these is ignored.
        lingering: Timers of those that are answered, and will be reset unless the client ends them.
        last: Highest stream that the client has opened.
        draining: No stream opens any more, as GOAWAY has named the last one.
        on_drained: Called when the last call of a draining connection has ended.
    """

    __slots__ = (
        "_skipped",
        "_skipped_count",
        "budget",
        "buffers",
        "calls",
        "draining",
        "flow",
        "last",
        "lingering",
        "on_drained",
        "refused",
        "reset",
    )

    def __init__(self, shared: SharedBuffers) -> None:
        self.calls: dict[int, Call] = {}
        self.refused: set[int] = set()
        self.reset: dict[int, None] = {}  # oldest first
        self.lingering: dict[int, asyncio.TimerHandle] = {}
        self._skipped: list[range] = []
        self._skipped_count = 0
        self.last = 0
        self.draining = False
        self.on_drained: Callable[[], None] | None = None
        self.budget = ControlFrameBudget()
        self.buffers = Buffers(shared)
        self.flow = FlowControl()

    def never_opened(self, stream: int) -> bool:
        """Return whether a frame of this stream is an error: the client has not opened it.

        A draining server ignores new streams, so it knows none beyond the last that it named.
        """
        return stream > self.last and not self.draining

    def skip_to(self, stream: int) -> None:
        """Note that a client opens a stream and thereby closes all before it that it never opened.

        Each gap costs a control frame: no client leaves one.
        """
        self.budget.left -= 1
        gap = range(self.last + 2 if self.last else 1, stream, 2)
        self._skipped_count += len(gap)
        if len(self._skipped) < MAX_REMEMBERED:
            self._skipped.append(gap)

    @property
    def opened(self) -> int:
        """How many the client has opened."""
        return (self.last + 1) // 2 - self._skipped_count

    def was_skipped(self, stream: int) -> bool:
        """Return whether a stream is known to have been skipped."""
        return any(stream in gap for gap in self._skipped)

    def remember_reset(self, stream: int) -> None:
        """Ignore what still comes on a stream that the client has not ended."""
        self.reset[stream] = None
        if len(self.reset) > MAX_REMEMBERED:
            del self.reset[next(iter(self.reset))]

    def end_lingering(self, stream: int) -> None:
        """Note that the client has ended a stream, which may be an answered one."""
        timer = self.lingering.pop(stream, None)
        if timer is not None:
            timer.cancel()

    def is_open(self, call: Call) -> bool:
        """Return whether a call has not ended."""
        return self.calls.get(call.stream) is call

    def close(self, call: Call) -> None:
        """Forget a call that has ended."""
        self.budget.left += CONTROL_FRAMES_PER_CALL
        self.calls.pop(call.stream, None)
        if call.timer is not None or call.task is not None:
            call.drop()
        if call.held:
            self.buffers.release(call, call.held)
            self.flow.blocked.pop(call.stream, None)
            self.flow.congested.pop(call.stream, None)
            if call.outcome is not None and call.outcome.drained is not None:
                call.outcome.drained.cancel()
        if self.draining and not self.calls and self.on_drained is not None:
            self.on_drained()

    def cancel(self, call: Call) -> None:
        """Drop the work of a call that the peer has given up, and forget it.

        It is not answered, so it allows no control frames.
        """
        call.is_cancelled = True
        call.drop()
        self.close(call)
        self.budget.left -= CONTROL_FRAMES_PER_CALL

    def drop_all(self) -> None:
        """Drop the work of every call: the connection has ended."""
        calls = list(self.calls.values())
        self.calls.clear()
        self.flow.blocked.clear()
        self.flow.congested.clear()
        for stream in list(self.lingering):
            self.end_lingering(stream)
        for call in calls:
            call.is_cancelled = True
            call.drop()
            self.buffers.release(call, call.held)
