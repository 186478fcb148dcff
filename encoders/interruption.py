"""End on Ctrl-C and SIGTERM: at once with cleaning up, or after a step where it is asked for."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import NoReturn, Self


class Terminated(KeyboardInterrupt):
    """SIGTERM came: like Ctrl-C, a process ends with its cleaning up done."""


def end_process(number: int, frame: FrameType | None) -> NoReturn:
    """End at once, as a signal without a handler does: the handler of a process numbered 1."""
    os._exit(128 + number)


class StopRequest:
    """Inside the block, the first Ctrl-C or SIGTERM is noted; the second one interrupts.

    A loop looks at ``came`` between its steps. Outside the main thread nothing changes.
    """

    def __init__(self, *, active: bool = True) -> None:
        self.came: type[KeyboardInterrupt] | None = None
        """What to raise: ``KeyboardInterrupt``, or ``Terminated``; None: nothing came."""
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if self.came is not None:
            raise kind
        self.came = kind
