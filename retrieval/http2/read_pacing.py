"""Paced reads: a full server reads each connection every few milliseconds, not at every packet.

Calls are then refused by the handful, and what the reads would have cost goes to the calls that
were admitted.
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class PausableReader(Protocol):
    """A connection."""

    def pause_reads(self) -> None:
        """Read nothing until ``resume_reads``."""

    def resume_reads(self) -> None:
        """Read what has come meanwhile, and go on reading."""


class ReadPacer:
    """The pauses of one server's connections: those that pause together resume together."""

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
