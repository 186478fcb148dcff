"""Admit or refuse calls: bounded places per worker, early refusals with a hint, deadlines.

``Refusals.when_full`` is what refuses a call before its message has come (``http2/requests.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from retrieval.errors import DeadlinePassed, Overloaded, Unauthenticated
from retrieval.http2.refusals import Refusal, refusal
from retrieval.status import status_for

MAX_ENCODED_REFUSALS = 1000
MAX_PAUSE_MS = 20.0
BYTES_PER_PLACE = 64 * 2**10
PAUSES_PER_PLACE = 8
"""How often a full server reads each connection in the time that a request is inside.

Few places are free by then, and none for long.
"""


class Admission:
    """Counts the requests inside one worker.

    All methods run on the event loop and take about a microsecond.

    A request costs one place per search it holds, and one per ``BYTES_PER_PLACE`` of its message
    (at most half of all places), so that a few large requests cannot hide behind a small number.
    """

    __slots__ = (
        "_place_ms",
        "accepted",
        "announced",
        "in_flight",
        "limit",
        "peak",
        "refused",
        "requests",
    )

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.announced = 0
        self.requests = 0
        self.peak = 0
        self.accepted = 0
        self.refused = 0
        self._place_ms = 1.0  # exponential average of the time that a place is held

    def cost_of(self, searches: int, size_bytes: int = 0) -> int:
        """Return the places of a request; ``searches`` is 0 while it is not parsed."""
        wanted = max(searches, size_bytes // BYTES_PER_PLACE)
        return max(1, min(wanted, self.limit // 2))

    @property
    def is_full(self) -> bool:
        """Whether no place is free, announced requests counted."""
        return self.in_flight + self.announced >= self.limit

    def announce(self) -> None:
        """Reserve a place for a request that will ``enter`` in the event loop's next turn."""
        if not self.announced:
            asyncio.get_running_loop().call_soon(self._forget_announced)
        self.announced += 1

    def _forget_announced(self) -> None:
        self.announced = 0

    def enter(self, places: int = 1, held: int = 0) -> int:
        """Take places, and return how many; ``held`` are those that the request has already.

        Pair with ``leave``.

        Raises:
            Overloaded: There are not so many; its hint says when to come again.
        """
        if places <= 0 < held:
            return 0
        inside = self.in_flight + places
        if inside > self.limit:
            self.refused += 1
            raise Overloaded("server", self.limit, self.retry_after_ms())
        self.in_flight = inside
        if not held:
            self.requests += 1
            self.accepted += 1
        if inside > self.peak:
            self.peak = inside
        return places

    def leave(self, places: int, seconds: float) -> None:
        """Give the places back and learn how long a place is held."""
        self.in_flight -= places
        self.requests -= 1
        self._place_ms += 0.02 * (seconds * 1e3 - self._place_ms)

    def pause_ms(self) -> float:
        """Return for how long a full server may leave its callers unread.

        0 when it is too fast for that to pay.
        """
        return float(int(min(MAX_PAUSE_MS, self._place_ms / PAUSES_PER_PLACE)))

    def retry_after_ms(self) -> int:
        """Return when about half of those inside now will have left; 5 to 5000 ms."""
        return int(min(5000.0, max(5.0, self._place_ms)))


class Refusals:
    """Refusals of one method: encoded once per hint, counted, sent by the transport as they are.

    Args:
        method: RPC name.
        admission: Who is inside.
        count: Counts one event under labels.
    """

    def __init__(
        self, method: str, admission: Admission, count: Callable[[str, tuple[str, ...]], None]
    ) -> None:
        self._admission = admission
        self._count = count
        self._labels = (method, "RESOURCE_EXHAUSTED")
        self._encoded: dict[tuple[str, int, int, float], Refusal] = {}

    def when_full(self) -> Refusal | None:
        """Refuse a call if no place is free, its message need not be here; None lets it in."""
        admission = self._admission
        if not admission.is_full:
            return None
        admission.refused += 1
        return self._refuse(
            "server", admission.limit, admission.retry_after_ms(), admission.pause_ms()
        )

    def of(self, error: Overloaded) -> Refusal:
        """Return, and count, the refusal that says what the error says."""
        return self._refuse(error.what, error.limit, error.retry_after_ms, 0.0)

    def unauthenticated(self, error: Unauthenticated) -> Refusal:
        """Return, and count, the refusal of a caller whom no token names."""
        self._count("omni_requests", (self._labels[0], "UNAUTHENTICATED"))
        return refusal(*status_for(error))

    def _refuse(self, what: str, limit: int, retry_after_ms: int, pause_ms: float) -> Refusal:
        """Count a refusal and return it; a full server makes thousands a second, hence no error."""
        self._count("omni_requests", self._labels)
        key = what, limit, retry_after_ms, pause_ms
        encoded = self._encoded.get(key)
        if encoded is None:
            if len(self._encoded) >= MAX_ENCODED_REFUSALS:
                self._encoded.clear()
            error = Overloaded(what, limit, retry_after_ms)
            code, message = status_for(error)
            encoded = refusal(code, message, retry_trailer(error), pause_ms / 1e3)
            self._encoded[key] = encoded
        return encoded


def retry_trailer(error: BaseException) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata of an error: when to come again, if it says so."""
    if isinstance(error, Overloaded):
        return (("retry-after-ms", str(error.retry_after_ms)),)
    return ()


def check_deadline(remaining_seconds: float | None) -> None:
    """Raise ``DeadlinePassed`` when nothing is left of the caller's time; None: no deadline."""
    if remaining_seconds is not None and remaining_seconds <= 0:
        raise DeadlinePassed(
            "the deadline passed before the request was looked at. Give it more time, or send less"
            " at once."
        )
