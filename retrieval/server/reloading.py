"""Tokens and certificates read again when their files change, or on SIGHUP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from encoders.errors import ConfigError

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class Reloaded(NamedTuple):
    """Something made of files.

    Attributes:
        what: For the log.
        files: That it is made of.
        reload: Reads them again; raises ``ConfigError`` and keeps the former content.
    """

    what: str
    files: tuple[Path, ...]
    reload: Callable[[], None]


class Reloader:
    """Looks at files once a second.

    Args:
        watched: What is made of them.
    """

    def __init__(self, watched: Iterable[Reloaded]) -> None:
        self._watched = list(watched)
        self._stamps = [_stamps(one) for one in self._watched]
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        if self._watched:
            self._task = asyncio.ensure_future(self._poll())

    def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    def reload_all(self) -> None:
        """Read everything again, changed or not."""
        for number, one in enumerate(self._watched):
            self._reload(number, one)

    def reload_changed(self) -> None:
        """Read again what is made of files that have changed."""
        for number, one in enumerate(self._watched):
            if _stamps(one) != self._stamps[number]:
                self._reload(number, one)

    def _reload(self, number: int, one: Reloaded) -> None:
        # Before reading: what changes meanwhile is read again
        self._stamps[number] = _stamps(one)
        try:
            one.reload()
        except ConfigError as error:
            log.error("%s: the former stay in use: %s", one.what, error)
        except Exception:  # of any type: what changes later must still be read
            log.exception("%s: the former stay in use", one.what)
        else:
            log.info("%s: read again", one.what)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self.reload_changed()


def _stamps(one: Reloaded) -> list[tuple[int, int, int] | None]:
    """Return what changes with a file's content: times, size, and which file the name means."""
    found: list[tuple[int, int, int] | None] = []
    for path in one.files:
        try:
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            found.append(None)
    return found
