"""Log how far a long loop is: how much is done, how fast, and how much time is left."""

from __future__ import annotations

import logging
import threading
import time

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Logs a line every few seconds, and none for a loop that is over by then.

    Args:
        log: Of the module that works.
        what: What is done, for example ``embed``.
        total: How many there are; None: unknown.
        unit: What is counted.
        then: What comes next; empty: the caller says it.
    """

    def __init__(
        self,
        log: logging.Logger,
        what: str,
        total: int | None = None,
        *,
        unit: str = "rows",
        then: str = "",
    ) -> None:
        self._log = log
        self._what = what
        self._total = total
        self._unit = unit
        self._then = f"; next: {then}" if then else ""
        self._begun = self._last = time.monotonic()
        self.done = 0
        self._lock = threading.Lock()

    def add(self, count: int, note: str = "") -> None:
        """Count what was done, from any thread; ``note`` is said with the line, if one is due."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self._last < SECONDS_BETWEEN_LINES:
                return
            self._last = now
        self._log.info("%s%s%s", self.line(now - self._begun), note, self._then)

    def line(self, seconds: float) -> str:
        """Word how far it is after some seconds."""
        rate = self.done / seconds if seconds else 0.0
        if not self._total:
            return f"{self._what}: {self.done:,} {self._unit}, {rate:,.0f}/s"
        share = min(self.done / self._total, 1.0)
        left = f", {duration(max(self._total - self.done, 0) / rate)} left" if rate else ""
        return (
            f"{self._what}: {self.done:,} of {self._total:,} {self._unit} ({share:.0%}),"
            f" {rate:,.0f}/s{left}"
        )


def duration(seconds: float) -> str:
    """Write a time as it is said: ``4.2 s``, ``75 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
