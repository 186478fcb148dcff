"""A disk that fails at any one call of a write, and keeps failing: nothing acknowledged is lost,
nothing refused comes back.

Every system call that changes files is counted; each scenario is played once for each of them.
"""

import errno
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_builder.errors import DiskFull, LiveLogCorrupt
from index_builder.live_log.files import log_files, read_acknowledged
from index_builder.live_log.maintenance import trust_log
from index_builder.live_log.reader import LiveLogReader
from index_builder.live_log.records import LiveEntry
from index_builder.live_log.writer import LiveLogWriter
from tests.helpers.live_logs import kill_before_sync

D = 8
VECTOR = np.full(D, D**-0.5, np.float32)
CHANGING = ("open", "pwrite", "fdatasync", "fsync", "ftruncate", "replace", "unlink")


def upserts(*identifiers: str) -> list[LiveEntry]:
    return [
        LiveEntry(id=identifier, vector=VECTOR, space_id="ab" * 32) for identifier in identifiers
    ]


def ids(reader: LiveLogReader) -> list[str]:
    found: list[str] = []
    while more := reader.poll():
        found += [entry.id for entry in more]
    return found


class Disk:
    """Stands between the code and the operating system, and knows what would be left of the log's
    files if the power failed now.

    Attributes:
        calls: Those made since the disk was last set to fail, by name and file.
        dirty: Bytes of a log file that were written and not yet synced. An fsync that fails forgets
            them, as Linux does.
        synced: Bytes that are on the disk.
        named: Log files whose name is on the disk.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.dirty: dict[str, set[int]] = {}
        self.synced: dict[str, set[int]] = {}
        self.named: set[str] = set()
        self._at: int | None = None
        self._times = 0.0
        self._how = ""
        for name in CHANGING:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def fail(self, at: int, how: str, times: float) -> None:
        """Let call number ``at`` fail as ``how`` says, and so many in all with those behind it."""
        self.calls, self._at, self._how, self._times = [], at, how, times

    def repair(self) -> bool:
        """Work again; returns whether anything failed."""
        reached = self._at is not None and len(self.calls) > self._at
        self._at = None
        return reached

    def would_survive(self, root: Path) -> None:
        """Check that what is acknowledged would be there after a power failure."""
        folder = root / "pin"
        acknowledged = read_acknowledged(folder)
        for first, path in log_files(folder):
            if first <= acknowledged.file:
                end = acknowledged.offset if first == acknowledged.file else path.stat().st_size
                missing = set(range(end)) - self.synced.get(str(path), set())
                assert str(path) in self.named and not missing, (
                    path.name,
                    sorted(missing)[:3],
                    self.calls,
                )

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            target = arguments[0]
            path = (
                os.readlink(f"/proc/self/fd/{target}")
                if isinstance(target, int)
                else str(arguments[1] if name == "replace" else target)
            )
            if path.endswith(".lock") or (name == "open" and not arguments[1] & os.O_CREAT):
                return real(*arguments)
            number = len(self.calls)
            self.calls.append((name, os.path.basename(path)))
            if self._at is None or not self._at <= number < self._at + self._times:
                result = real(*arguments)
                self._did(name, path, arguments)
                return result
            part = (
                (target, bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
                if name == "pwrite"
                else arguments
            )
            if number == self._at and name == "pwrite" and self._how in ("half", "short"):
                written = real(*part)
                self._did(name, path, part)
                if self._how == "short":
                    return written
            if number == self._at and self._how == "late":
                real(*arguments)
                self._did(name, path, arguments)
            if name in ("fsync", "fdatasync"):
                self.dirty.pop(path, None)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call

    def _did(self, name: str, path: str, arguments: tuple[Any, ...]) -> None:
        dirty, synced = self.dirty.setdefault(path, set()), self.synced.setdefault(path, set())
        if name == "pwrite":
            written = set(range(arguments[2], arguments[2] + len(arguments[1])))
            dirty |= written
            synced -= written
        elif name == "ftruncate":
            for held in (dirty, synced):
                held.difference_update([at for at in held if at >= arguments[1]])
        elif name == "fdatasync":
            synced |= dirty
            dirty.clear()
        elif name == "fsync" and os.path.isdir(path):
            self.named |= {str(found) for _, found in log_files(Path(path))}


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def killed_writer(root: Path) -> None:
    """Leave a whole record and a torn one behind what was acknowledged."""
    kill_before_sync(root, D, upserts("x"))
    with open(log_files(root / "pin")[-1][1], "ab") as file:
        file.write(b"OLR1 torn")


SCENARIOS = ["append", "first", "rotate", "adopt"]


def prepared(scenario: str, root: Path) -> list[str]:
    """A log before the write that fails; returns what it holds."""
    if scenario == "first":
        return []
    with LiveLogWriter(root, "pin", D) as writer:
        writer.write(upserts("a", "b"))
    if scenario != "adopt":
        return ["a", "b"]
    killed_writer(root)
    return ["a", "b", "x"]


def plays(
    scenario: str, how: str, lasting: bool, tmp_path: Path, disk: Disk
) -> Iterator[tuple[Path, LiveLogWriter | None, LiveLogReader, list[str]]]:
    """The scenario once for each call of its failing write: the log, its writer, a reader that
    followed, and what was acknowledged.
    """
    for number in range(60):
        root = tmp_path / f"{number}"
        held = prepared(scenario, root)
        reader = LiveLogReader(root, "pin")
        known = ids(reader)
        assert known == held[:2]
        writer = (
            LiveLogWriter(root, "pin", D, file_bytes=1 if scenario == "rotate" else 2**20)
            if scenario != "adopt"
            else None
        )
        disk.fail(number, how, math.inf if lasting else 1)
        try:
            writer = writer or LiveLogWriter(root, "pin", D)
            writer.write(upserts("lost1", "lost2"))
            held += ["lost1", "lost2"]
        except (OSError, DiskFull):
            pass
        try:
            seen = ids(reader)  # while the disk still fails
            assert seen == held[len(known) :][: len(seen)], disk.calls
        except LiveLogCorrupt:
            assert ("pwrite", "acknowledged") in disk.calls and lasting
        failed = disk.repair()
        yield root, writer, reader, held
        disk.would_survive(root)
        if not failed:
            assert number > 2, "nothing was tried"
            return
    raise AssertionError("the write never ended")


HOW = ["early", "half", "late", "short"]


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_writer_failing_disk_keeps_acknowledged_entries_only(
    scenario: str, how: str, lasting: bool, tmp_path: Path, disk: Disk
) -> None:
    for root, opened, reader, held in plays(scenario, how, lasting, tmp_path, disk):
        calls = str(disk.calls)
        writer = opened or reopened(root, held)
        assert writer.write(upserts("c")) == len(held) + 1, calls
        assert ids(LiveLogReader(root, "pin")) == [*held, "c"], calls
        assert reader.sequence <= len(held), calls
        ids(reader)
        assert reader.sequence == len(held) + 1, calls
        with LiveLogWriter(root, "pin", D) as other:
            assert other.write(upserts("d")) == len(held) + 2, calls
        assert ids(LiveLogReader(root, "pin")) == [*held, "c", "d"], calls


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_writer_other_process_after_disk_failure_continues(
    scenario: str, how: str, tmp_path: Path, disk: Disk
) -> None:
    """Only where every way to take a write back failed, too, may a process that knows nothing of it
    find it whole.
    """
    for root, writer, _, held in plays(scenario, how, True, tmp_path, disk):
        calls = str(disk.calls)
        if writer is not None:
            writer.close()
        with reopened(root, held) as other:
            last = other.write(upserts("c"))
        found = ids(LiveLogReader(root, "pin"))
        assert len(found) == last and found[: len(held)] == held and found[-1] == "c", calls
        assert found[len(held) : -1] == ["lost1", "lost2"][: last - len(held) - 1], calls


def reopened(root: Path, held: list[str]) -> LiveLogWriter:
    """Return a writer that knows nothing; where ``acknowledged`` was torn, trust the log first."""
    try:
        return LiveLogWriter(root, "pin", D)
    except LiveLogCorrupt as error:
        assert "--trust-log" in str(error)
        assert trust_log(root, "pin") >= len(held)
        return LiveLogWriter(root, "pin", D)


def test_writer_failing_recovery_keeps_disk_full_error(tmp_path: Path, disk: Disk) -> None:
    writer = LiveLogWriter(tmp_path, "pin", D)
    writer.write(upserts("a"))
    disk.fail(0, "early", math.inf)
    with pytest.raises(DiskFull, match="writing the live log"):
        writer.write(upserts("b"))
    with pytest.raises(DiskFull, match="taking back a write that failed"):
        writer.write(upserts("b"))
    disk.repair()
    assert writer.write(upserts("c")) == 2


def test_writer_uncut_failed_write_is_no_record_elsewhere(tmp_path: Path, disk: Disk) -> None:
    with LiveLogWriter(tmp_path, "pin", D) as first:
        first.write(upserts("a"))
        disk.fail(
            1, "early", 2
        )  # the record is written; its fsync fails, and so does cutting it off
        with pytest.raises(DiskFull):
            first.write(upserts("b"))
        assert [name for name, _ in disk.calls[1:3]] == ["fdatasync", "ftruncate"]
    disk.repair()
    with LiveLogWriter(tmp_path, "pin", D) as second:
        assert second.write(upserts("c")) == 2
    assert ids(LiveLogReader(tmp_path, "pin")) == ["a", "c"]


def test_writer_entries_acknowledged_elsewhere_are_not_cut_off(tmp_path: Path, disk: Disk) -> None:
    first = LiveLogWriter(tmp_path, "pin", D)
    first.write(upserts("a"))
    disk.fail(
        1, "early", math.inf
    )  # the record is written; its fsync, and all that could take it back, fail
    with pytest.raises(DiskFull):
        first.write(upserts("b"))
    disk.repair()
    with LiveLogWriter(tmp_path, "pin", D) as second:  # it knows nothing of that
        assert second.write(upserts("c")) == 3
    assert first.write(upserts("d")) == 4
    assert ids(LiveLogReader(tmp_path, "pin")) == ["a", "b", "c", "d"]
    disk.would_survive(tmp_path)


def test_writer_batch_of_interrupted_thread_is_written(tmp_path: Path) -> None:
    """Another thread may have taken it from the queue and never come to write it."""
    writer = LiveLogWriter(tmp_path, "pin", D)
    sequences: list[int] = []
    waiting = threading.Thread(target=lambda: sequences.append(writer.write(upserts("b"))))
    with writer._commit_lock:
        waiting.start()
        while not writer._queue:
            time.sleep(0.001)
        taken, writer._queue = writer._queue, []  # what the interrupted thread did last
    waiting.join()
    assert len(taken) == 1 and sequences == [1]
    assert ids(LiveLogReader(tmp_path, "pin")) == ["b"]
