"""How many calls a second one token may make."""

from __future__ import annotations

import time

from retrieval.errors import RateExceeded


class Rate:
    """Bounds the work of one caller (a token bucket).

    A call costs as many as it holds searches. One call may cost more than what is left: the next
    ones wait for it then.

    Args:
        name: Of the token, for messages.
        per_second: Searches that it may ask for in the long run.
        burst: Searches at once after a rest.
    """

    __slots__ = ("_burst", "_left", "_name", "_per_second", "_seen")

    def __init__(self, name: str, per_second: float, burst: float) -> None:
        self._name = name
        self._per_second = per_second
        self._burst = burst
        self._left = burst
        self._seen = time.monotonic()

    def try_take(self, cost: float = 1.0) -> bool:
        """Count a call if the caller may make it now."""
        now = time.monotonic()
        left = min(self._burst, self._left + (now - self._seen) * self._per_second)
        self._seen = now
        self._left = left
        if left < 1.0:
            return False
        self._left = left - cost
        return True

    def take(self, cost: float = 1.0) -> None:
        """Count a call. Raises ``RateExceeded`` if the caller may not make it now."""
        if not self.try_take(cost):
            wait = (1.0 - self._left) / self._per_second
            raise RateExceeded(self._name, self._per_second, max(1, round(1e3 * wait)))
