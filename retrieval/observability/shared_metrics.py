"""Metrics of several worker processes, summed over snapshots in a shared folder."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from retrieval.observability.metrics import Metrics, Snapshot, lasting, log, merge_snapshots


class SharedSnapshots:
    """Snapshots of all workers of a server, exchanged as small files in a private folder, so that any worker answers a scrape for all.

    Counters never go down when a worker ends, which Prometheus would take for a restart: what it
    counted is added once to ``gone.json``, by whoever scrapes next and gets the lock. That file
    names the files it has taken in, so that those who read meanwhile, or come after a worker that
    was killed before it removed them, count nobody twice.
    """

    def __init__(self, folder: Path, metrics: Metrics) -> None:
        self._folder = folder
        self._metrics = metrics
        self._path = folder / f"{os.getpid()}-{time.time_ns()}.json"
        self._gone_path = folder / "gone.json"

    def write(self) -> Snapshot:
        """Replace this worker's file; returns what it says."""
        snapshot = self._metrics.snapshot()
        _replace(self._path, snapshot)
        return snapshot

    def remove(self) -> None:
        """Take this worker's file away when it ends; what it counted stays."""
        try:
            self.write()
            self._add_up([self._path])
        except OSError as error:
            log.warning("the last metrics of this worker could not be shared: %s", error)

    def merged(self) -> Snapshot:
        """This worker's numbers now, the others' latest, and the counts of those who have ended."""
        own = self._metrics.snapshot()
        try:
            _replace(
                self._path, own
            )  # what this scrape says is there for the next, even if this worker dies at once
            self._add_up([path for path in self._others() if self._has_ended(path)])
        except OSError as error:
            log.warning("metrics of the workers that have ended could not be added up: %s", error)
        return merge_snapshots([own, *self._read()])

    def _others(self) -> list[Path]:
        return [path for path in self._folder.glob("[0-9]*.json") if path != self._path]

    def _has_ended(self, path: Path) -> bool:
        """Whether the worker of another file has ended; one with our process number has."""
        pid = path.name.partition("-")[0]
        return pid == str(os.getpid()) or not _alive(pid)

    def _gone(self) -> tuple[str, list[str], Snapshot]:
        """The text of ``gone.json``; from it the names of the files already taken in, and the sum of all who have ended."""
        text = ""
        try:
            text = self._gone_path.read_text(encoding="utf-8")
            content = json.loads(text)
            return text, content["names"], content["snapshot"]
        except (OSError, ValueError, KeyError, TypeError):
            return text, [], {}

    def _read(self) -> list[Snapshot]:
        """The others' latest and the sum of those who have ended; begins again when somebody is added to the sum meanwhile."""
        while True:
            text, names, total = self._gone()
            found = [total]
            for path in self._others():
                snapshot = _loaded(path) if path.name not in names else None
                if snapshot is not None:
                    found.append(lasting(snapshot) if self._has_ended(path) else snapshot)
            if self._gone()[0] == text:
                return found

    def _add_up(self, paths: list[Path]) -> None:
        """Add the files of workers that have ended to the sum and remove them; does nothing while another worker is at it."""
        if not paths:
            return
        with open(self._folder / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            _, names, total = self._gone()
            fresh = {
                path.name: snapshot
                for path in paths
                if path.name not in names and (snapshot := _loaded(path)) is not None
            }
            left = [name for name in names if (self._folder / name).exists()]
            total = merge_snapshots([total, *map(lasting, fresh.values())])
            _replace(self._gone_path, {"names": [*left, *fresh], "snapshot": total})
            for path in paths:
                path.unlink(missing_ok=True)


def _replace(path: Path, content: Any) -> None:
    """Write JSON so that readers see the old file or the whole new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def _loaded(path: Path) -> Snapshot | None:
    """A worker's snapshot; None when it has just been taken in, or is none."""
    try:
        snapshot: Snapshot = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return snapshot


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return False
    return True
