"""Upserts and deletes on their way into the live log.

One writer per entity type and process; processes take turns on the log's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter


class LiveWrites:
    """Writers of a store's live logs, opened when first used.

    Call from threads: a write returns when it is on disk.

    Args:
        live_root: ``<store>/live``.
    """

    def __init__(self, live_root: Path) -> None:
        self._live_root = live_root
        self._writers: dict[tuple[str, int], LiveLogWriter] = {}
        self._lock = threading.Lock()

    def write(
        self, entity_type: str, dimension: int, entries: Sequence[LiveEntry], *, after: int = 0
    ) -> int:
        """Append entries, all or none; returns the sequence number of the last one.

        Args:
            entity_type: Whose log.
            dimension: Of the vectors.
            entries: Upserts and deletes.
            after: Watermark of the active release for this type.

        Raises:
            LiveLogError: As ``LiveLogWriter.write``.
        """
        with self._lock:
            key = (entity_type, dimension)
            writer = self._writers.get(key)
            if writer is None:
                writer = self._writers[key] = LiveLogWriter(
                    self._live_root, entity_type, dimension, after=after
                )
            writer.after = after
        return writer.write(entries)

    def close(self) -> None:
        """Close the files; written entries are durable already."""
        with self._lock:
            for writer in self._writers.values():
                writer.close()
            self._writers.clear()
