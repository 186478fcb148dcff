"""When to read which release of a store is active."""

from __future__ import annotations

import os
import time

from index_builder.releases.store import CURRENT_NAME, ReleaseStore

RETRY_REFUSED_SECONDS = 30.0
"""A refused release is tried again after this, as its files may have been restored."""


class CurrentFile:
    """Notices that a store's ``CURRENT`` has changed, or that what it names may be tried again.

    Args:
        store: Which store.
    """

    def __init__(self, store: ReleaseStore) -> None:
        self._path = store.releases / CURRENT_NAME
        self._read: tuple[int, int, int] | None = None
        self._refused_at: float | None = None

    def is_due(self) -> bool:
        """Ask whether to read the file."""
        if self._stamp() != self._read:
            return True
        waited = None if self._refused_at is None else time.monotonic() - self._refused_at
        return waited is not None and waited > RETRY_REFUSED_SECONDS

    def mark_read(self) -> None:
        """Remember the file as it is; call this before it is read."""
        self._read = self._stamp()
        self._refused_at = None

    def mark_refused(self) -> None:
        """Remember that what it names cannot be served now."""
        self._refused_at = time.monotonic()

    def mark_unread(self) -> None:
        """Forget ``mark_read``: the file could not be read after all."""
        self._read = None

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size
