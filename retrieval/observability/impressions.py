"""The impression log: answers in the form of the log table, for the next training."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

log = logging.getLogger(__name__)

MEASURE_SECONDS = 10.0
"""How often the folder is measured; others may write and remove files."""
WARNING_SECONDS = 60.0
CLOSE_SECONDS = 2.0
"""How long the end of the server waits for what is queued."""


class Impression(NamedTuple):
    """One answered search."""

    request_id: str
    release_id: str
    query: str  # empty unless query text may be logged
    language: str
    country: str
    entity_type: str
    ids: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogBounds:
    """What an impression log may take."""

    max_pending_ids: int = 100_000
    """Ids that may wait to be written, in memory."""
    max_file_bytes: int = 128 * 2**20
    """A file that has grown to this is followed by another."""
    max_folder_bytes: int = 10 * 2**30
    """Of all files; beyond it lines are dropped, and no file is removed."""


class ImpressionLog:
    """Appends one JSON line per returned id.

    Its columns are those of the log table, ``request_id`` and ``release_id``. The action is
    ``impression``, positions start at 1, the user is left empty. A slow or full disk loses lines,
    it never delays an answer.

    Args:
        folder: Where ``impressions-<date>-<worker>.jsonl`` go, and ``....1.jsonl`` and so on when
            one is full; created when missing.
        worker: Number of the process, in the file name.
        bounds: Of memory and disk.

    Attributes:
        dropped: Searches that were not written.
    """

    def __init__(self, folder: Path, worker: int = 0, bounds: LogBounds | None = None) -> None:
        self.dropped = 0
        self._bounds = bounds or LogBounds()
        self._files = _Files(folder, worker, self._bounds)
        self._waiting: deque[Impression] = deque()
        self._pending_ids = 0
        self._changed = threading.Condition()
        self._closed = False
        self._warned_at = -WARNING_SECONDS
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def add(self, impression: Impression) -> None:
        """Queue one answer; counted as dropped when too much waits."""
        size = 1 + len(impression.ids)
        with self._changed:
            if self._closed or self._pending_ids + size > self._bounds.max_pending_ids:
                self.dropped += 1
                return
            self._pending_ids += size
            self._waiting.append(impression)
            self._changed.notify()

    def close(self) -> None:
        """Write what is queued, as far as that takes a moment, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("impressions: %d searches were not written in time", len(self._waiting))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    break
                item = self._waiting.popleft()
                self._pending_ids -= 1 + len(item.ids)
                is_last = not self._waiting
            self._write(item, is_last)
        self._files.close()

    def _write(self, item: Impression, is_last: bool) -> None:
        now = datetime.now(UTC)
        try:
            written = self._files.write(now, _lines(item, now))
            if is_last:
                self._files.flush()
        except Exception as error:  # of any type: the thread must outlive one bad search
            self._files.close()
            self._drop(f"impressions could not be written: {error}")
            return
        if not written:
            self._drop(
                f"impressions: the folder holds {self._bounds.max_folder_bytes} bytes, the most"
                " that it may. Take files away, or raise --impression-log-mib."
            )

    def _drop(self, reason: str) -> None:
        self.dropped += 1
        if time.monotonic() - self._warned_at > WARNING_SECONDS:
            self._warned_at = time.monotonic()
            log.warning("%s", reason)


class _Files:
    """The files of one worker: one a day, and another when one is full."""

    def __init__(self, folder: Path, worker: int, bounds: LogBounds) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._worker = worker
        self._bounds = bounds
        self._file: IO[str] | None = None
        self._day = ""
        self._size = 0
        self._folder_bytes = 0
        self._measured_at = -MEASURE_SECONDS

    def write(self, now: datetime, lines: Iterator[str]) -> bool:
        """Append lines; False if the folder is full. Raises ``OSError``."""
        if time.monotonic() - self._measured_at > MEASURE_SECONDS:
            self._measured_at = time.monotonic()
            self._folder_bytes = self._measure()
            if self._was_taken_away():
                self.close()
        if self._folder_bytes >= self._bounds.max_folder_bytes:
            return False
        file = self._open(f"{now:%Y-%m-%d}")
        for line in lines:
            file.write(line)
            size = len(line.encode())
            self._size += size
            self._folder_bytes += size
        return True

    def flush(self) -> None:
        """Give what is written to the system."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                log.warning("impressions could not be written: %s", error)

    def _open(self, day: str) -> IO[str]:
        """Return the file to append to."""
        if self._file is not None and day == self._day and self._size < self._bounds.max_file_bytes:
            return self._file
        self.close()
        self._day = day
        number = 0
        while True:
            suffix = f".{number}" if number else ""
            path = self._folder / f"impressions-{day}-{self._worker}{suffix}.jsonl"
            self._size = path.stat().st_size if path.exists() else 0
            if self._size < self._bounds.max_file_bytes:
                break
            number += 1
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by ``close``
        if self._size and not _ends_line(path):
            self._file.write("\n")  # a full disk has torn the last one
        return self._file

    def _was_taken_away(self) -> bool:
        """Return whether the open file has been removed or renamed."""
        if self._file is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._file.name))
        except OSError:
            return True

    def _measure(self) -> int:
        total = 0
        for path in self._folder.glob("impressions-*.jsonl"):
            try:
                total += path.stat().st_size
            except OSError:
                continue  # removed meanwhile
        return total


def _ends_line(path: Path) -> bool:
    """Return whether the last byte of a file ends a line. Raises ``OSError``."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _lines(item: Impression, now: datetime) -> Iterator[str]:
    common = {
        "timestamp": now.isoformat(timespec="milliseconds"),
        "query": item.query,
        "language": item.language,
        "country": item.country,
        "user_id": "",
        "entity_type": item.entity_type,
        "action": "impression",
        "dwell_seconds": None,
        "request_id": item.request_id,
        "release_id": item.release_id,
    }
    for i, id_ in enumerate(item.ids, start=1):
        values = {**common, "entity_id": id_, "position": i}
        yield json.dumps(values, ensure_ascii=False) + "\n"
