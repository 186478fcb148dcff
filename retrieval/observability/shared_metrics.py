"""Metrics of several worker processes, summed over snapshots in a shared folder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from retrieval.observability.metrics import Metrics, Snapshot, lasting, merge_snapshots

log = logging.getLogger(__name__)


class _Ended(NamedTuple):
    """Content of ``gone.json``: names of the files added to the sum, and the sum."""

    text: str
    names: list[str]
    snapshot: Snapshot


class SharedSnapshots:
    """Exchanges the snapshots of a server's workers as small files in a private folder.

    So any worker answers a scrape for all.

    Counters never go down when a worker ends, as Prometheus would take that for a restart: what it
    counted is added once to ``gone.json``, by the next scrape that gets the lock. That file names
    the files that are in its sum, so that no worker is counted twice: neither by a reader in
    between, nor after a worker was killed before it had removed them.
    """

    def __init__(self, folder: Path, metrics: Metrics) -> None:
        self._folder = folder
        self._metrics = metrics
        self._path = folder / f"{os.getpid()}-{time.time_ns()}.json"
        self._gone_path = folder / "gone.json"

    def write(self) -> Snapshot:
        """Replace this worker's file and return its content."""
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
        """Merge this worker's numbers, the others' latest, and the counts of ended ones."""
        own = self._metrics.snapshot()
        try:
            # What this scrape says must be there for the next, even if this worker dies at once
            _replace(self._path, own)
            self._add_up([path for path in self._others() if self._has_ended(path)])
        except OSError as error:
            log.warning("metrics of the workers that have ended could not be added up: %s", error)
        return merge_snapshots([own, *self._read()])

    def _others(self) -> list[Path]:
        return [path for path in self._folder.glob("[0-9]*.json") if path != self._path]

    def _has_ended(self, path: Path) -> bool:
        """Return whether the worker of another file has ended; one with our process id has."""
        pid = path.name.partition("-")[0]
        return pid == str(os.getpid()) or not _alive(pid)

    def _ended(self) -> _Ended:
        """Read ``gone.json``; one that is missing or damaged counts as empty."""
        text = ""
        try:
            text = self._gone_path.read_text(encoding="utf-8")
            content = json.loads(text)
            return _Ended(text, content["names"], content["snapshot"])
        except (OSError, ValueError, KeyError, TypeError):
            return _Ended(text, [], {})

    def _read(self) -> list[Snapshot]:
        """Read the others' latest and the sum of ended ones.

        Begins again when a worker is added to the sum meanwhile.
        """
        while True:
            ended = self._ended()
            found = [ended.snapshot]
            for path in self._others():
                snapshot = _loaded(path) if path.name not in ended.names else None
                if snapshot is not None:
                    found.append(lasting(snapshot) if self._has_ended(path) else snapshot)
            if self._ended().text == ended.text:
                return found

    def _add_up(self, paths: list[Path]) -> None:
        """Add the files of ended workers to the sum and remove them.

        Does nothing while another worker does it.
        """
        if not paths:
            return
        with open(self._folder / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            ended = self._ended()
            fresh = {
                path.name: snapshot
                for path in paths
                if path.name not in ended.names and (snapshot := _loaded(path)) is not None
            }
            left = [name for name in ended.names if (self._folder / name).exists()]
            total = merge_snapshots([ended.snapshot, *map(lasting, fresh.values())])
            _replace(self._gone_path, {"names": [*left, *fresh], "snapshot": total})
            for path in paths:
                path.unlink(missing_ok=True)


def _replace(path: Path, content: Any) -> None:
    """Write JSON so that readers see the old file or the whole new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def _loaded(path: Path) -> Snapshot | None:
    """Read a worker's snapshot; None when it has just been added to the sum, or is damaged."""
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
