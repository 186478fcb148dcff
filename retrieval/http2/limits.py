"""Bounds on what one peer can make a server hold and do."""

from __future__ import annotations

from typing import NamedTuple

import grpc

from retrieval.http2.calls import Call
from retrieval.http2.refusals import Aborted

CONTROL_FRAME_BUDGET = 10_000
"""Control frames that a peer may send beyond those that its answered calls allow."""
CONTROL_FRAMES_PER_CALL = 10
CALLS_PER_CONTROL_FRAME = 10
"""Waiting calls that a frame of settings may resume at the price of one more control frame."""
SENT_BYTES_PER_UPDATE = 1024
"""Bytes of answers that allow one window update free of charge.

Readers send one per frame or per half window, whether or not the stream still lives.
"""
MAX_BUFFERED_BYTES = 64 * 2**20
"""Bytes of unanswered requests and unsent answers that one connection may hold."""


class TransportLimits(NamedTuple):
    """What one connection may hold.

    Attributes:
        max_receive_bytes: Of one request message.
        max_send_bytes: Of one answer message.
        max_streams: Calls at a time.
    """

    max_receive_bytes: int
    max_send_bytes: int
    max_streams: int


class ControlFrameBudget:
    """Counts the control frames of one connection against its answered calls.

    Attributes:
        left: Control frames that the peer may still send; below 0 the connection ends.
    """

    __slots__ = ("_free_updates", "left")

    def __init__(self) -> None:
        self.left = CONTROL_FRAME_BUDGET
        self._free_updates = 0

    def refund_update(self, sent_bytes: int) -> None:
        """Give a window update back, as far as the bytes go that the connection has sent."""
        if self._free_updates * SENT_BYTES_PER_UPDATE < sent_bytes:
            self._free_updates += 1
            self.left += 1

    def spend_on_calls(self, calls: int) -> None:
        """Spend what resuming this many calls with one frame costs."""
        self.left -= calls // CALLS_PER_CONTROL_FRAME


class Buffers:
    """Bytes that one connection holds for its calls, and their bound."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = 0

    def count(self, call: Call) -> None:
        """Account for what a call makes the connection hold."""
        size = call.size_bytes()
        self.held += size - call.held
        call.held = size

    def hold(self, call: Call) -> None:
        """Count a call.

        Raises:
            Aborted: The connection holds too much with it.
        """
        self.count(call)
        if self.held > MAX_BUFFERED_BYTES:
            raise Aborted(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "this connection holds too many unfinished requests and unread answers.",
            )

    def release(self, call: Call, size: int) -> None:
        """Count no more ``size`` bytes of a call: they were sent, or it has ended."""
        self.held -= size
        call.held -= size
