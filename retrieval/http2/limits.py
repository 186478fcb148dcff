"""Bounds on what one peer can make a server hold and do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple, Protocol

import grpc

from retrieval.http2.calls import Call
from retrieval.http2.refusals import Aborted

SLICE_SECONDS = 0.002
"""Work for one connection before others have their turn."""
CONTROL_FRAME_BUDGET = 10_000
"""Frames that a peer may send beyond those that its answered calls allow.

Charged is every frame that is not part of an accepted call: settings, pings, updates that release
nothing, resets, unknown types, frames of closed streams, headers of refused ones.
"""
CONTROL_FRAMES_PER_SECOND = 200
"""How fast the budget fills up again."""
MAX_CONTROL_FRAMES = 2 * CONTROL_FRAME_BUDGET
"""The budget never grows beyond this."""
CONTROL_FRAMES_PER_CALL = 10
CALLS_PER_CONTROL_FRAME = 10
"""Waiting calls that a frame of settings may resume at the price of one more control frame."""
SENT_BYTES_PER_UPDATE = 1024
"""Bytes of answers that allow one window update free of charge.

Readers send one per frame or per half window, whether or not the stream still lives.
"""
MAX_BUFFERED_BYTES = 64 * 2**20
"""Bytes of unanswered requests and unsent answers that one connection may hold."""


MAX_SHARED_BYTES = 128 * 2**20
"""The same of all connections of a server together."""


class Lifetimes(NamedTuple):
    """How long a connection may last.

    Attributes:
        max_idle_seconds: Without a call for so long it is asked to go.
        max_age_seconds: So old it is asked to go, whatever it does.
        age_grace_seconds: And ended so much later.
        stalled_seconds: What is half sent or half read for so long without moving ends it.
    """

    max_idle_seconds: float = 1800.0
    max_age_seconds: float = 7200.0
    age_grace_seconds: float = 600.0
    stalled_seconds: float = 60.0


class TransportLimits(NamedTuple):
    """What one connection may hold, and for how long.

    Attributes:
        max_receive_bytes: Of one request message; a method may allow less.
        max_send_bytes: Of one answer message.
        max_streams: Calls at a time.
        lifetimes: Of the connection.
    """

    max_receive_bytes: int
    max_send_bytes: int
    max_streams: int
    lifetimes: Lifetimes = Lifetimes()


class ControlFrameBudget:
    """Counts the control frames of one connection against its answered calls, and against time.

    Attributes:
        left: Control frames that the peer may still send; below 0 the connection ends.
    """

    __slots__ = ("_filled_at", "_free_updates", "left")

    def __init__(self) -> None:
        self.left = CONTROL_FRAME_BUDGET
        self._filled_at = monotonic()
        self._free_updates = 0

    def is_spent(self) -> bool:
        """Return whether nothing is left of the budget, with what time has added to it."""
        now = monotonic()
        added = int((now - self._filled_at) * CONTROL_FRAMES_PER_SECOND)
        if added:
            self._filled_at = now
            self.left = min(CONTROL_FRAME_BUDGET, self.left + added)
        return self.left < 0

    def refund_update(self, sent_bytes: int) -> None:
        """Give a window update back, as far as the bytes go that the connection has sent."""
        if self._free_updates * SENT_BYTES_PER_UPDATE < sent_bytes:
            self._free_updates += 1
            self.left += 1

    def spend_on_calls(self, calls: int) -> None:
        """Spend what resuming this many calls with one frame costs."""
        self.left -= calls // CALLS_PER_CONTROL_FRAME


class SharedBuffers:
    """Bytes that all connections of one server hold for their calls.

    Args:
        relieve: Called when they are more than ``MAX_SHARED_BYTES``: ends a connection.
    """

    __slots__ = ("_relieve", "held")

    def __init__(self, relieve: Callable[[], None] = lambda: None) -> None:
        self.held = 0
        self._relieve = relieve

    def add(self, size: int) -> None:
        """Count bytes that a connection holds; negative: holds no more."""
        self.held += size
        if self.held > MAX_SHARED_BYTES and size > 0:
            self._relieve()


class Buffers:
    """Bytes that one connection holds for its calls, and their bound.

    Args:
        shared: Counts those of all connections.

    Attributes:
        held: Of this connection.
        moved_at: When some of it was last received or sent, by ``time.monotonic``.
    """

    __slots__ = ("_shared", "held", "moved_at")

    def __init__(self, shared: SharedBuffers) -> None:
        self.held = 0
        self.moved_at = monotonic()
        self._shared = shared

    def count(self, call: Call) -> None:
        """Account for what a call makes the connection hold."""
        size = call.size_bytes()
        added = size - call.held
        self.held += added
        call.held = size
        self.moved_at = monotonic()
        self._shared.add(added)

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
        """Count no more ``size`` bytes of a call: they were sent, or it has ended.

        Less where the connection was ended meanwhile, to relieve the others: it holds none then.
        """
        size = min(size, call.held)
        self.held -= size
        call.held -= size
        self.moved_at = monotonic()
        self._shared.add(-size)


class PausableReader(Protocol):
    """A connection."""

    def pause_reads(self) -> None:
        """Read nothing until ``resume_reads``."""

    def resume_reads(self) -> None:
        """Read what has come meanwhile, and go on reading."""


class ReadPacer:
    """The pauses of one server's connections: those that pause together resume together.

    A full server reads each connection every few milliseconds, not at every packet. Calls are then
    refused by the handful, and what the reads would have cost goes to the calls that were admitted.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._paused: list[PausableReader] = []

    def pause(self, reader: PausableReader, seconds: float) -> None:
        """Let a connection pause for ``seconds``, less if others pause already."""
        if not self._paused:
            self._loop.call_later(seconds, self._resume)
        self._paused.append(reader)
        reader.pause_reads()

    def _resume(self) -> None:
        """Resume all; who was refused last is read first."""
        paused = self._paused
        self._paused = []
        for reader in reversed(paused):
            reader.resume_reads()
