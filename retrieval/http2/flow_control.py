"""The peer's flow-control windows, and the answers that wait for them (RFC 9113, section 5.2)."""

from __future__ import annotations

from collections import OrderedDict

from retrieval.http2.calls import Call
from retrieval.http2.frames import (
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    FLOW_CONTROL_ERROR,
    MAX_WINDOW,
    PROTOCOL_ERROR,
    Http2Error,
)


class FlowControl:
    """The windows and the frame size that the peer allows, and the answers that wait for them.

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
