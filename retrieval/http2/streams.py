"""The streams of one connection, and the frames that leave on them together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from retrieval.http2.calls import Call
from retrieval.http2.flow_control import FlowControl
from retrieval.http2.limits import CONTROL_FRAMES_PER_CALL, Buffers, ControlFrameBudget


class FrameWriter:
    """Gathers outgoing frames and hands them to the transport in one write.

    Attributes:
        frames: What leaves with the next flush; always the same list.
        answers: Whole answers among them.
        transport: Of the connection, once it is made.
    """

    __slots__ = ("answers", "frames", "transport")

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.answers = 0
        self.transport: asyncio.Transport | None = None

    def flush(self) -> None:
        """Write what has been gathered."""
        frames = self.frames
        self.answers = 0
        if frames and self.transport is not None:
            self.transport.write(frames[0] if len(frames) == 1 else b"".join(frames))
        frames.clear()


class Streams:
    """The streams of one connection: open calls, and refused ones whose message is yet to come.

    Attributes:
        calls: Open calls by stream, in the order in which they were opened.
        refused: Streams that were refused before their message had come.
        last: Highest stream that the client has opened.
        draining: No stream opens any more, as GOAWAY has named the last one.
        on_drained: Called when the last call of a draining connection has ended.
    """

    __slots__ = (
        "budget",
        "buffers",
        "calls",
        "draining",
        "flow",
        "last",
        "on_drained",
        "refused",
    )

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.refused: set[int] = set()
        self.last = 0
        self.draining = False
        self.on_drained: Callable[[], None] | None = None
        self.budget = ControlFrameBudget()
        self.buffers = Buffers()
        self.flow = FlowControl()

    def never_opened(self, stream: int) -> bool:
        """Return whether a frame of this stream is an error: the client has not opened it.

        A draining server ignores new streams, so it knows none beyond the last that it named.
        """
        return stream > self.last and not self.draining

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
        if self.draining and not self.calls and self.on_drained is not None:
            self.on_drained()

    def count_refusal(self) -> None:
        """Count a call that was refused before it was opened: it is answered, too."""
        self.budget.left += CONTROL_FRAMES_PER_CALL

    def cancel(self, call: Call) -> None:
        """Drop the work of a call that the peer has given up, and forget it.

        It is not answered, so it allows no control frames.
        """
        call.drop()
        call.task = call.timer = None
        self.close(call)
        self.budget.left -= CONTROL_FRAMES_PER_CALL

    def drop_all(self) -> None:
        """Drop the work of every call: the connection has ended."""
        calls = list(self.calls.values())
        self.calls.clear()
        for call in calls:
            call.drop()
