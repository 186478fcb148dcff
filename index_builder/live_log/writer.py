"""Writing a live log: upserts and deletes of many threads, durable before they return.

Threads that wait together share one fsync; ``append.py`` writes and syncs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from index_builder.live_log.append import DEFAULT_FILE_BYTES, LiveLogEnd
from index_builder.live_log.reader import LiveLogReader
from index_builder.live_log.records import LiveEntry, check_entry, encode_payload


class LiveLogWriter:
    """Appends to one entity type's log.

    Safe to call from many threads and processes: they take turns, and a group shares one fsync.

    Args:
        live_root: ``<store>/live``; created when missing.
        entity_type: Which log.
        dimension: Length of the vectors.
        file_bytes: A new file is begun when the last one is larger.
        after: Watermark of the active release: a log that is not there begins behind it, one that
            ends before it is refused.
        lock_timeout_seconds: How long to wait for another writing process.
    """

    def __init__(
        self,
        live_root: Path,
        entity_type: str,
        dimension: int,
        *,
        file_bytes: int = DEFAULT_FILE_BYTES,
        after: int = 0,
        lock_timeout_seconds: float = 30.0,
    ) -> None:
        self.folder = live_root / entity_type
        self.after = after
        self.entity_type = entity_type
        self.dimension = dimension
        self._end = LiveLogEnd(
            live_root,
            entity_type,
            file_bytes=file_bytes,
            lock_timeout_seconds=lock_timeout_seconds,
        )
        self._queue: list[_Batch] = []
        self._queue_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        with self._end.held(after):
            pass

    @property
    def sequence(self) -> int:
        """Sequence number of the last entry that this writer knows."""
        return self._end.sequence

    def write(self, entries: Iterable[LiveEntry]) -> int:
        """Append entries; return when they are on disk (fsync).

        Only then may the caller acknowledge them.

        Args:
            entries: In order. All of them are checked before the first is written.

        Returns:
            Sequence number of the last one (of the whole log if ``entries`` is empty).

        Raises:
            LiveLogError: An id or space id is malformed.
            LiveLogBusy: Another process kept the writer's lock.
            InvalidVectors: A vector has NaN, Inf, a wrong shape, dtype or norm.
            DiskFull: No room; nothing of this call stays in the log.
            LiveLogCorrupt: What was acknowledged earlier does not check any more.
        """
        batch_entries = list(entries)
        for entry in batch_entries:
            check_entry(entry, self.dimension)
        if not batch_entries:
            return self._end.sequence
        now = time.time_ns()
        batch = _Batch([encode_payload(entry, entry.time_ns or now) for entry in batch_entries])
        with self._queue_lock:
            self._queue.append(batch)
        with self._commit_lock:  # whoever gets it first writes for everyone who queued meanwhile
            if batch.sequence == 0 and batch.error is None:
                with self._queue_lock:
                    group, self._queue = self._queue, []
                if batch not in group:  # whoever took it was interrupted before writing anything
                    group.append(batch)
                self._commit(group)
        if batch.error is not None:
            raise batch.error
        return batch.sequence

    def write_unless_changed(self, entries: Iterable[LiveEntry], since: int) -> int:
        """Append those entries whose id has no newer write than sequence ``since``.

        That is looked up under the writer's lock, so that what is made from an older entry never
        undoes a newer one. Otherwise as ``write``.

        Args:
            entries: In order, with different ids.
            since: Sequence number of the last entry that the caller knew when it made them.

        Returns:
            How many were written.

        Raises:
            LiveLogError: As ``write``, or what lies behind ``since`` was collected already.
        """
        candidates = list(entries)
        for entry in candidates:
            check_entry(entry, self.dimension)
        now = time.time_ns()
        payloads = {entry.id: encode_payload(entry, entry.time_ns or now) for entry in candidates}
        batch = _Batch([])
        reader = LiveLogReader(self.folder.parent, self.entity_type, after=since)

        def drop_changed() -> None:
            while newer := reader.poll(50_000):
                for entry in newer:
                    payloads.pop(entry.id, None)
            batch.payloads = list(payloads.values())

        try:
            drop_changed()  # most of them before others have to wait
            with self._commit_lock:
                self._commit([batch], drop_changed)
        finally:
            reader.close()
        if batch.error is not None:
            raise batch.error
        return len(batch.payloads)

    def close(self) -> None:
        """Close the open file; what was written is durable already."""
        self._end.close()

    def __enter__(self) -> LiveLogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _commit(self, group: Sequence[_Batch], prepare: Callable[[], None] = lambda: None) -> None:
        """Write a group of batches.

        ``prepare`` is called when the log's end is known and nobody else can write.
        """
        try:
            with self._end.held(self.after):
                prepare()
                payloads = [payload for batch in group for payload in batch.payloads]
                if not payloads:
                    return
                last = self._end.append(payloads)
                for batch in reversed(group):
                    batch.sequence = last
                    last -= len(batch.payloads)
        except BaseException as error:
            for batch in group:
                batch.error = error


class _Batch:
    """The payloads of one ``write`` call, waiting for the group's fsync."""

    __slots__ = ("error", "payloads", "sequence")

    def __init__(self, payloads: list[bytes]) -> None:
        self.payloads = payloads
        self.sequence = 0
        self.error: BaseException | None = None
