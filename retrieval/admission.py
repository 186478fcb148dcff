"""Who gets in: a bounded number of requests per worker, early refusal with an honest retry hint, deadlines checked at the door."""

from __future__ import annotations

from retrieval.errors import DeadlinePassed, NotReady, Overloaded


class Admission:
    """Counts the requests inside one worker. All methods run on the event loop and take about a microsecond.

    A request costs one place per search it holds (a batch of 64 costs 64, at most half of all places), so that a few large
    requests cannot hide behind a small number.
    """

    __slots__ = ("_service_ms", "accepted", "draining", "in_flight", "limit", "peak", "refused", "requests")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.requests = 0
        self.peak = 0
        self.accepted = 0
        self.refused = 0
        self.draining = False
        self._service_ms = 1.0  # exponential average of time inside per place

    def cost_of(self, searches: int) -> int:
        """Places that a request with this many searches takes: all it holds, but never more than half of the limit."""
        return max(1, min(searches, self.limit // 2))

    def enter(self, places: int = 1) -> None:
        """Take places, or raise ``Overloaded`` with a hint, or ``NotReady`` while draining. Pair with ``leave``."""
        if self.draining:
            raise NotReady("the server is shutting down; connect to another replica.")
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

    def retry_after_ms(self) -> int:
        """Milliseconds after which about half of those inside now will have left; 5 to 5000."""
        return int(min(5000.0, max(5.0, self._service_ms)))


def check_deadline(remaining_seconds: float | None) -> None:
    """Raise ``DeadlinePassed`` when nothing is left of the caller's time; None means that it set no deadline."""
    if remaining_seconds is not None and remaining_seconds <= 0:
        raise DeadlinePassed("the deadline passed before the request was looked at. Give it more time, or send less at once.")
