"""Admit or refuse calls: bounded places per worker, early refusals with a hint, deadlines.

``Refusals.when_full`` is what refuses a call before its message has come (``http2/requests.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from retrieval.errors import DeadlinePassed, Overloaded
from retrieval.http2.refusals import Refusal, refusal
from retrieval.status import status_for

MAX_ENCODED_REFUSALS = 1000
MAX_PAUSE_MS = 20.0
PAUSES_PER_PLACE = 8
"""How often a full server reads each connection in the time that a request is inside.

Few places are free by then, and none for long.
"""


class Admission:
    """Counts the requests inside one worker.

    All methods run on the event loop and take about a microsecond.

    A request costs one place per search it holds (a batch of 64 costs 64, at most half of all
    places), so that a few large requests cannot hide behind a small number.
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

    def cost_of(self, searches: int) -> int:
        """Return the places of a request with so many searches: one each, at most half of all."""
        return max(1, min(searches, self.limit // 2))

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

    def enter(self, places: int = 1) -> None:
        """Take places. Pair with ``leave``.

        Raises:
            Overloaded: There are not so many; its hint says when to come again.
        """
        inside = self.in_flight + places
        if inside > self.limit:
            self.refused += 1
            raise Overloaded("server", self.limit, self.retry_after_ms())
        self.in_flight = inside
        self.requests += 1
        self.accepted += 1
        if inside > self.peak:
            self.peak = inside

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
        """Refuse a call whose message has not come yet if no place is free; None lets it in."""
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
