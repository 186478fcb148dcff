"""When what has died may be started again."""

from __future__ import annotations

import time


class Backoff:
    """Pauses before restarts; each doubles, until all was well for a while.

    Args:
        first_seconds: The first pause.
        max_seconds: The longest.
    """

    def __init__(self, first_seconds: float, max_seconds: float) -> None:
        self._first_seconds = first_seconds
        self._max_seconds = max_seconds
        self._next_seconds = first_seconds
        self._until = 0.0

    def remaining_seconds(self) -> float:
        """Return how long nothing may be started; 0 outside a pause."""
        return max(0.0, self._until - time.monotonic())

    def fail(self) -> None:
        """Begin a pause; failures during one count once."""
        now = time.monotonic()
        if now < self._until:
            return
        if now - self._until > 2 * self._max_seconds:
            self._next_seconds = self._first_seconds
        self._until = now + self._next_seconds
        self._next_seconds = min(2 * self._next_seconds, self._max_seconds)

    def reset(self) -> None:
        """End the pause and forget the failures."""
        self._until = 0.0
        self._next_seconds = self._first_seconds
