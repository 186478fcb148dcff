"""A full server listens in turns: while it refuses calls it reads each connection every few milliseconds instead of at every packet.

Calls are then refused by the handful, and what the reads would have cost goes to the calls that
were accepted.
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class Listener(Protocol):
    """A connection."""

    def rest(self) -> None:
        """Read nothing until ``listen_again``."""

    def listen_again(self) -> None:
        """Read what has come meanwhile, and go on reading."""


class Pacer:
    """The pauses of one server's connections: those that pause together wake together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._resting: list[Listener] = []

    def rest(self, listener: Listener, seconds: float) -> None:
        """Let a connection pause for ``seconds``, less if others pause already."""
        if not self._resting:
            self._loop.call_later(seconds, self._wake)
        self._resting.append(listener)
        listener.rest()

    def _wake(self) -> None:
        """Who was refused last is read first."""
        resting, self._resting = self._resting, []
        for listener in reversed(resting):
            listener.listen_again()
