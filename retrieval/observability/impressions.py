"""The impression log: answers in the form of the log table, for the next training."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)


class Impression(NamedTuple):
    """One answered search."""

    request_id: str
    release_id: str
    query: str  # empty unless query text may be logged
    language: str
    country: str
    entity_type: str
    ids: Sequence[str]


class ImpressionLog:
    """Appends one JSON line per returned id.

    Its columns are those of the log table, ``request_id`` and ``release_id``. The action is
    ``impression``, positions start at 1, the user is left empty. There is one file a day and
    process; a slow disk loses lines, it never delays an answer.

    Args:
        folder: Where ``impressions-<date>-<worker>.jsonl`` go; created when missing.
        worker: Number of the process, in the file name.
        max_pending: Searches that may wait to be written.
    """

    def __init__(self, folder: Path, worker: int = 0, max_pending: int = 10_000) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._worker = worker
        self._queue: queue.Queue[Impression | None] = queue.Queue(max_pending)
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def add(self, impression: Impression) -> None:
        """Queue one answer; counted as dropped when the queue is full."""
        try:
            self._queue.put_nowait(impression)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued and stop."""
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty() and len(batch) < 1000:
                batch.append(self._queue.get_nowait())
            now = datetime.now(UTC)
            lines = [line for item in batch if item is not None for line in _lines(item, now)]
            try:
                with open(
                    self._folder / f"impressions-{now:%Y-%m-%d}-{self._worker}.jsonl",
                    "a",
                    encoding="utf-8",
                ) as file:
                    file.writelines(lines)
            except OSError as error:
                self.dropped += sum(item is not None for item in batch)
                log.warning("impressions could not be written: %s", error)
            if None in batch:
                return


def _lines(item: Impression, now: datetime) -> list[str]:
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
    return [
        json.dumps({**common, "entity_id": id, "position": i}, ensure_ascii=False) + "\n"
        for i, id in enumerate(item.ids, start=1)
    ]
