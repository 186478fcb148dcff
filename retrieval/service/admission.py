"""Who gets in: a bounded number of requests per worker, early refusal with an honest retry hint, deadlines checked at the door."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from retrieval.errors import DeadlinePassed, Overloaded
from retrieval.http2.refusals import Refusal, refusal
from retrieval.status import status_for

KEPT_REFUSALS = 1000
LONGEST_PAUSE_MS = 20.0
PAUSES_PER_PLACE = 8
"""A full server reads each connection this often in the time that a request is inside: few places are free by then, and none for long."""


class Admission:
    """Counts the requests inside one worker.

    All methods run on the event loop and take about a microsecond.

    A request costs one place per search it holds (a batch of 64 costs 64, at most half of all
    places), so that a few large requests cannot hide behind a small number.
    """

    __slots__ = (
        "_service_ms",
        "accepted",
        "coming",
        "in_flight",
        "limit",
        "peak",
        "refused",
        "requests",
    )

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.coming = 0
        self.requests = 0
        self.peak = 0
        self.accepted = 0
        self.refused = 0
        self._service_ms = 1.0  # exponential average of time inside per place

    def cost_of(self, searches: int) -> int:
        """Places that a request with this many searches takes: all it holds, but never more than half of the limit."""
        return max(1, min(searches, self.limit // 2))

    @property
    def full(self) -> bool:
        """Whether no place is free, once those who are coming have theirs."""
        return self.in_flight + self.coming >= self.limit

    def announce(self) -> None:
        """Hold a place for a request that has passed the door and will ``enter`` in the event loop's next turn."""
        if not self.coming:
            asyncio.get_running_loop().call_soon(self._all_enter)
        self.coming += 1

    def _all_enter(self) -> None:
        self.coming = 0

    def enter(self, places: int = 1) -> None:
        """Take places, or raise ``Overloaded`` with a hint. Pair with ``leave``."""
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
        self._service_ms += 0.02 * (seconds * 1e3 - self._service_ms)

    def pause_ms(self) -> float:
        """Milliseconds for which a full server may leave its callers unread; 0 when it is too fast for that to pay."""
        pause = min(LONGEST_PAUSE_MS, self._service_ms / PAUSES_PER_PLACE)
        return float(int(pause))

    def retry_after_ms(self) -> int:
        """Milliseconds after which about half of those inside now will have left; 5 to 5000."""
        return int(min(5000.0, max(5.0, self._service_ms)))


class Refusals:
    """The refusals of one method: encoded once per hint, counted, handed to the transport as they are.

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
        self._made: dict[tuple[str, int, int, float], Refusal] = {}

    def at_the_door(self) -> Refusal | None:
        """The refusal of a call whose message has not come yet, when not one place is free; None lets it in."""
        admission = self._admission
        if not admission.full:
            return None
        admission.refused += 1
        return self.of("server", admission.limit, admission.retry_after_ms(), admission.pause_ms())

    def of(self, what: str, limit: int, retry_after_ms: int, pause_ms: float = 0.0) -> Refusal:
        """Count and return the refusal that ``Overloaded`` with these values would become."""
        self._count("omni_requests", self._labels)
        key = what, limit, retry_after_ms, pause_ms
        made = self._made.get(key)
        if made is None:
            if len(self._made) >= KEPT_REFUSALS:
                self._made.clear()
            error = Overloaded(what, limit, retry_after_ms)
            made = self._made[key] = refusal(
                *status_for(error), retry_trailer(error), pause_ms / 1e3
            )
        return made


def retry_trailer(error: BaseException) -> tuple[tuple[str, str], ...]:
    """Trailing metadata of an error: when to come again, if it says so."""
    return (("retry-after-ms", str(error.retry_after_ms)),) if isinstance(error, Overloaded) else ()


def check_deadline(remaining_seconds: float | None) -> None:
    """Raise ``DeadlinePassed`` when nothing is left of the caller's time; None means that it set no deadline."""
    if remaining_seconds is not None and remaining_seconds <= 0:
        raise DeadlinePassed(
            "the deadline passed before the request was looked at. Give it more time, or send less"
            " at once."
        )
