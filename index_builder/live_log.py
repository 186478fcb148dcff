"""The live log: upserts and deletes between two builds. Durable before acknowledged, one writer at a time, any number of polling readers.

Layout of ``<store>/live/<entity_type>/``:

- ``log-<first sequence>.bin``: append-only records, a new file every 64 MiB.
- ``acknowledged``: how far writes were promised. What is invalid before that point is corruption and refused. Readers stop there: behind
  it lies a write under way, which may still fail, or what a crash left; the next writer promises what is whole of it and cuts off the rest.
- ``writer.lock``: an ``flock``; the kernel frees it when its holder dies.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from index_builder.durability import FileLock, disk_full_is_clear, fsync_folder, make_folder
from index_builder.errors import DiskFull, LiveLogBusy, LiveLogCorrupt, LiveLogError
from index_builder.live_files import (
    ACKNOWLEDGED_NAME,
    Acknowledged,
    begin_acknowledged,
    check_header,
    log_files,
    read_acknowledged,
    still_named,
    write_acknowledged,
    write_all,
)
from index_builder.live_records import (
    FILE_HEADER,
    FILE_MAGIC,
    FILE_VERSION,
    RECORD_HEADER,
    LiveEntry,
    check_entry,
    decode_payload,
    encode_payload,
    frame,
    next_record,
)

DEFAULT_FILE_BYTES = 64 * 2**20
ADOPT_SECONDS = 5.0
"""How long ``adopt_tail`` waits for a writer."""
_READ_BYTES = 8 * 2**20


class LiveLogReader:
    """Follows one entity type's log; every process that serves has its own.

    Args:
        live_root: ``<store>/live``.
        entity_type: Which log.
        after: Sequence number of the last entry already known; polling starts behind it.
    """

    def __init__(self, live_root: Path, entity_type: str, after: int = 0) -> None:
        self.folder = live_root / entity_type
        self.entity_type = entity_type
        self.sequence = after
        self._after = after
        self._file: tuple[int, Path] | None = None
        self._descriptor: int | None = None
        self._offset = 0
        self._next = 0  # sequence number of the record at _offset

    def close(self) -> None:
        """Close the open file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()

    def poll(self, limit: int = 1_000_000) -> list[LiveEntry]:
        """Entries acknowledged since the last call, in order; empty when there is nothing new.

        What lies before a damage is returned; it is the next call that raises, and each one after it until the damage is put right.

        Args:
            limit: At most about this many entries in one call.

        Returns:
            Entries with consecutive sequence numbers behind ``self.sequence``, which is advanced.

        Raises:
            LiveLogCorrupt: An acknowledged entry is missing or changed.
            LiveLogError: Entries behind ``after`` were already collected, or a newer engine wrote the log.
        """
        return self.read(limit, read_acknowledged(self.folder))  # read first: what it promises must be in the files read afterwards

    def read(self, limit: int, promised: Acknowledged | None) -> list[LiveEntry]:
        """``poll`` with a promise that was read before; None reads whatever checks."""
        entries: list[LiveEntry] = []
        try:
            self._collect(entries, limit, promised)
        except Exception:
            if not entries:  # they count as delivered: the caller gets them first, and what is wrong is found again by the next call
                raise
        return entries

    def _collect(self, entries: list[LiveEntry], limit: int, promised: Acknowledged | None) -> None:
        # Behind the promise lie writes that may still fail. What is in the release already is only checked, promised or not.
        last_readable = sys.maxsize if promised is None else max(promised.sequence, self.sequence)
        while self._open():
            grown = self._read_file(entries, limit, last_readable)
            if len(entries) >= limit:
                return
            following = self.folder / f"log-{self._next:020d}.bin"
            if following != self._file_path() and following.exists() and not grown:
                self.close()
                self._file = None
            elif not grown:
                break
        last = max(self._next - 1, 0)
        if promised is not None and last < promised.sequence:
            raise LiveLogCorrupt(
                f"live log of {self.entity_type!r}: entries up to {promised.sequence} were acknowledged, but the files hold "
                f"valid entries only up to {last} "
                f"({self._file_path().name if self._file else 'no file'}, byte {self._offset}). Restore the file from a replica or backup; "
                "serving goes on with what was read before."
            )
        if self._file is not None and last < self.sequence:
            was_read = self.sequence > self._after
            raise LiveLogCorrupt((_was_cut if was_read else _ends_early)(self.entity_type, self.sequence, last))

    @property
    def position(self) -> tuple[int, int]:
        """First sequence number of the file being read, and the offset behind the last entry."""
        return (self._file[0] if self._file else 0), self._offset

    def _file_path(self) -> Path:
        return self._file[1] if self._file else self.folder / "-"

    def _open(self) -> bool:
        if self._descriptor is not None:
            if self._is_current():
                return True
            self.close()
        files = log_files(self.folder)
        if not files:
            return False
        wanted = self._next or self.sequence + 1
        usable = [file for file in files if file[0] <= wanted]
        if not usable:
            raise LiveLogError(
                f"live log of {self.entity_type!r}: entries from {wanted} are needed, but the oldest kept is {files[0][0]}. "
                "Serve a release whose watermark is newer, or rebuild."
            )
        first, path = self._file = usable[-1]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        whole = False
        try:
            whole = check_header(os.pread(descriptor, FILE_HEADER.size, 0), first, path)
        finally:
            if not whole:
                os.close(descriptor)
        if whole:
            self._descriptor, self._offset, self._next = descriptor, FILE_HEADER.size, first
        return whole

    def _is_current(self) -> bool:
        """Whether the open file is the one to go on in."""
        assert self._descriptor is not None and self._file is not None
        try:
            return still_named(self._file[1], self._descriptor, self._offset)
        except FileNotFoundError:  # collected, since every release holds its entries: what is open is read to its end
            return True

    def _read_file(self, entries: list[LiveEntry], limit: int, last_readable: int) -> bool:
        """Append new entries of the open file; False when it held nothing new."""
        assert self._descriptor is not None
        want = _READ_BYTES
        while self._next <= last_readable:
            content = memoryview(os.pread(self._descriptor, want, self._offset))
            position = 0
            start = self._offset
            while (
                len(entries) < limit and self._next <= last_readable and (found := next_record(content, position, self._next)) is not None
            ):
                payload, position = found
                if self._next > self.sequence:
                    entries.append(decode_payload(payload, self._next))
                    self.sequence = self._next
                self._next += 1
                self._offset = start + position
            if position:
                return True
            if len(content) < want or want > 4 * _READ_BYTES:
                return False
            want *= 2  # one record larger than the buffer
        return False


class LiveLogWriter:
    """Appends to one entity type's log. Safe to call from many threads and processes: they take turns, and a group shares one fsync.

    Args:
        live_root: ``<store>/live``; created when missing.
        entity_type: Which log.
        dimension: Length of the vectors.
        file_bytes: A new file is begun when the last one is larger.
        after: Watermark of the active release: a log that is not there begins behind it, one that ends before it is refused.
        lock_timeout_seconds: How long to wait for another writing process.
        before_sync: Called between write and fsync; for fault injection only.
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
        before_sync: Callable[[], None] | None = None,
    ) -> None:
        self.folder = live_root / entity_type
        self.after = after
        self.entity_type, self.dimension = entity_type, dimension
        self._file_bytes, self._timeout, self._before_sync = file_bytes, lock_timeout_seconds, before_sync
        self._file: tuple[int, Path] | None = None
        self._descriptor: int | None = None
        self._end, self._sequence = 0, 0
        self._promised = Acknowledged()
        self._failed: _Failed | None = None
        self._queue: list[_Batch] = []
        self._queue_lock, self._commit_lock = threading.Lock(), threading.Lock()
        self._pending: list[LiveEntry] = []
        lock = self._locked()
        try:
            self._catch_up()
        finally:
            lock.release()

    @property
    def sequence(self) -> int:
        """Sequence number of the last entry that this writer knows."""
        return self._sequence

    def upsert(
        self, id: str, vector: np.ndarray, attributes: dict[str, Any] | None = None, *, space_id: str, source: dict[str, Any] | None = None
    ) -> None:
        """Queue an upsert; it is durable after ``sync``. Raises as ``write`` does."""
        entry = LiveEntry(id=id, vector=vector, space_id=space_id, attributes=attributes or {}, source=source)
        check_entry(entry, self.dimension)
        self._pending.append(entry)

    def delete(self, id: str) -> None:
        """Queue a delete; it is durable after ``sync``."""
        entry = LiveEntry(id=id)
        check_entry(entry, self.dimension)
        self._pending.append(entry)

    def sync(self) -> int:
        """Write what is queued and return its last sequence number once it is durable."""
        pending, self._pending = self._pending, []
        return self.write(pending)

    def write(self, entries: Iterable[LiveEntry]) -> int:
        """Append entries; returns when they are on disk (fsync), and only then may the caller acknowledge them.

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
            return self._sequence
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
        """Append those entries about whose id nobody has written behind sequence ``since``, as ``write`` does.

        That is looked up under the writer's lock, so that what is made from an older entry never undoes a newer one.

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
            drop_changed()  # most of it before others have to wait
            with self._commit_lock:
                self._commit([batch], drop_changed)
        finally:
            reader.close()
        if batch.error is not None:
            raise batch.error
        return len(batch.payloads)

    def close(self) -> None:
        """Close the open file; what was written is durable already."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> LiveLogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _locked(self) -> FileLock:
        with disk_full_is_clear("opening the live log", self.folder.parent):
            make_folder(self.folder)  # somebody may have removed it
        lock = FileLock(self.folder / "writer.lock")
        if not lock.acquire(timeout_seconds=self._timeout):
            raise LiveLogBusy(
                f"live log of {self.entity_type!r}: process {lock.holder()} has held the writer's lock for "
                f"{self._timeout:.0f} s; stop it or try again"
            )
        return lock

    def _commit(self, group: Sequence[_Batch], prepare: Callable[[], None] = lambda: None) -> None:
        """Write a group of batches; ``prepare`` is called when the log's end is known and nobody else can write."""
        try:
            lock = self._locked()
            try:
                self._catch_up()
                prepare()
                if any(batch.payloads for batch in group):
                    self._append(group)
            finally:
                lock.release()
        except BaseException as error:
            for batch in group:
                batch.error = error

    def _append(self, group: Sequence[_Batch]) -> None:
        """Write a group behind the log's end, make it durable and promise it. What fails before the promise stands is taken back."""
        if self._descriptor is None or self._end >= self._file_bytes:
            self._new_file()
        assert self._descriptor is not None and self._file is not None
        sequence, frames = self._sequence, []
        lasts = []
        for batch in group:
            for payload in batch.payloads:
                sequence += 1
                frames.append(frame(payload, sequence))
            lasts.append(sequence)
        content = b"".join(frames)
        promise = Acknowledged(self._file[0], self._end + len(content), sequence)
        with self._all_or_nothing(self._end, promise), disk_full_is_clear("writing the live log", self.folder):
            write_all(self._descriptor, content, self._end)
            if self._before_sync is not None:
                self._before_sync()
            os.fdatasync(self._descriptor)
            write_acknowledged(self.folder, promise)
        self._end, self._sequence = promise.offset, promise.sequence
        for batch, last in zip(group, lasts):
            batch.sequence = last

    @contextmanager
    def _all_or_nothing(self, end: int, promise: Acknowledged) -> Iterator[None]:
        """What fails in here has happened where ``promise`` stands all the same; else nothing of it stays behind ``end``."""
        assert self._file is not None
        try:
            yield
        except BaseException as error:
            self._failed = _Failed(self._file, end, self._promised, promise)
            stands = False
            with suppress(OSError, LiveLogError):
                stands = self._settle()
            if not (stands and isinstance(error, OSError | DiskFull)):
                raise
        self._promised = promise

    def _settle(self) -> bool:
        """Decide a write that failed: it counts if its promise stands, else nothing may stay of it. Holds the writer's lock.

        A disk that fails may refuse this, too. The next write begins with it, so that what was refused is not found whole and promised.

        Returns:
            Whether the promise of that write stands.

        Raises:
            OSError: Not yet.
            LiveLogCorrupt: ``acknowledged`` is gone.
        """
        failed = self._failed
        if failed is None:
            return False
        try:
            promised = read_acknowledged(self.folder)
        except LiveLogCorrupt:
            if not (self.folder / ACKNOWLEDGED_NAME).exists():
                raise
            promised = failed.before  # torn by the write that failed
            write_acknowledged(self.folder, promised)
        if promised == failed.before:  # else nobody may cut off what stands behind it: it was promised, by this writer or the next
            _cut(failed.file[1], failed.end)
        self._failed = None
        return promised == failed.promise

    def _new_file(self) -> None:
        self.close()
        first = self._sequence + 1
        path = self.folder / f"log-{first:020d}.bin"
        if not (self.folder / ACKNOWLEDGED_NAME).exists():
            begin_acknowledged(self.folder, Acknowledged())
        with disk_full_is_clear("starting a live-log file", self.folder):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(descriptor, 0)
                write_all(descriptor, FILE_HEADER.pack(FILE_MAGIC, FILE_VERSION, 0, first), 0)
                os.fdatasync(descriptor)
                fsync_folder(self.folder)
            except BaseException:
                os.close(descriptor)
                raise
        self._file, self._descriptor, self._end = (first, path), descriptor, FILE_HEADER.size

    def _catch_up(self) -> None:
        """Find the end of the log: other processes may have written, or died while writing. Holds the writer's lock."""
        with disk_full_is_clear("taking back a write that failed", self.folder):
            self._settle()
        promised = self._promised = read_acknowledged(self.folder)
        files = log_files(self.folder)
        if not files:
            self.close()  # of a file that was removed
            self._file = None
            if (lost := max(promised.sequence, self._sequence)) > self.after:
                raise LiveLogCorrupt(
                    f"live log of {self.entity_type!r}: entries up to {lost} were acknowledged, but its files are gone; restore them"
                )
            self._sequence = self.after
            return
        known = self._sequence
        try:
            if self._file != files[-1] or self._descriptor is None or not still_named(files[-1][1], self._descriptor, self._end):
                first, path = files[-1]
                if not self._reopen(first, path, promised):  # died while starting the file: nothing in it was promised
                    path.unlink()
                    fsync_folder(self.folder)
                    self._catch_up()
                    return
            self._find_end(files[-1][1], promised, known)
        except BaseException:  # the next call begins at the start of the file, which may have been restored, and knows what it has to hold
            self.close()
            self._sequence = known
            raise

    def _reopen(self, first: int, path: Path, promised: Acknowledged) -> bool:
        """Open a file at its start; False, with none open, if its header was not finished and nothing in it was promised."""
        self.close()
        self._file = (first, path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        head = os.pread(self._descriptor, FILE_HEADER.size, 0)
        if len(head) < FILE_HEADER.size and promised.file != first:
            self.close()
            self._file = None
            return False
        if not check_header(head, first, path):
            raise LiveLogCorrupt(f"{path}: the file is shorter than its header; restore it")
        self._end, self._sequence = FILE_HEADER.size, first - 1
        return True

    def _find_end(self, path: Path, promised: Acknowledged, known: int) -> None:
        """Go to the end of the open file's valid entries, promise those that are not, and cut off what is behind them."""
        assert self._descriptor is not None and self._file is not None
        size = os.fstat(self._descriptor).st_size
        while self._end < size:
            content = memoryview(os.pread(self._descriptor, min(_READ_BYTES * 8, size - self._end), self._end))
            position = 0
            while (found := next_record(content, position, self._sequence + 1)) is not None:
                position = found[1]
                self._sequence += 1
            self._end += position
            if position == 0:
                break
        if self._sequence < promised.sequence:
            raise LiveLogCorrupt(
                f"live log of {self.entity_type!r}: entries up to {promised.sequence} were acknowledged, but "
                f"{path.name} is valid only up to entry "
                f"{self._sequence} (byte {self._end}). Nothing was written or cut off; restore the file from a replica or backup."
            )
        if self._sequence < self.after:
            raise LiveLogCorrupt(_ends_early(self.entity_type, self.after, self._sequence))
        if self._sequence < known:
            raise LiveLogCorrupt(_was_cut(self.entity_type, known, self._sequence))
        if self._end < size:  # the torn tail of a writer that died before it promised anything
            os.ftruncate(self._descriptor, self._end)
            os.fdatasync(self._descriptor)
        is_begun = promised.file == self._file[0]
        is_promised = self._sequence <= promised.sequence or self._end == FILE_HEADER.size
        if is_begun and is_promised:
            return
        with disk_full_is_clear("making the end of the live log durable", self.folder):
            _write_again(self._descriptor, promised.offset if is_begun else 0, self._end)
            os.fdatasync(self._descriptor)
            if not is_begun:
                fsync_folder(self.folder)
        if not is_promised:  # whole entries of a writer that died, or its promise was lost
            promise = Acknowledged(self._file[0], self._end, self._sequence)
            with self._all_or_nothing(self._end, promise), disk_full_is_clear("promising the end of the live log", self.folder):
                write_acknowledged(self.folder, promise)


def _ends_early(entity_type: str, watermark: int, last: int) -> str:
    return (
        f"live log of {entity_type!r}: entries up to {watermark} are in the release, but the log ends at {last}: it was removed and begun "
        "again, or belongs to another store. Restore it; to go on with this one, rebuild from the sources into a new store and apply its "
        "changes there."
    )


def _was_cut(entity_type: str, known: int, last: int) -> str:
    return (
        f"live log of {entity_type!r}: entries up to {known} were acknowledged and seen here, but the log now ends at {last}: it was put "
        "back without its end. Put it back whole; to give up what is missing, restart the servers: those that run have read it."
    )


class _Failed(NamedTuple):
    """A write about which nothing is decided: where it began, what was promised before, and what it was to promise."""

    file: tuple[int, Path]
    end: int
    before: Acknowledged
    promise: Acknowledged


def _cut(path: Path, end: int) -> None:
    """Leave nothing of a file behind ``end``, durably. Where the disk refuses, at least no record begins there for whoever reads on."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        try:
            os.ftruncate(descriptor, end)
        except OSError:
            os.pwrite(descriptor, bytes(RECORD_HEADER.size), end)
            raise
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _write_again(descriptor: int, start: int, end: int) -> None:
    """Write what stands there once more: after an fsync that failed, the next one says nothing of pages that never reached the disk."""
    for offset in range(start, end, _READ_BYTES):
        write_all(descriptor, os.pread(descriptor, min(_READ_BYTES, end - offset), offset), offset)


class _Batch:
    """The payloads of one ``write`` call, waiting for the group's fsync."""

    __slots__ = ("error", "payloads", "sequence")

    def __init__(self, payloads: list[bytes]) -> None:
        self.payloads = payloads
        self.sequence = 0
        self.error: BaseException | None = None


def last_sequence(live_root: Path, entity_type: str) -> int:
    """Sequence number of the last acknowledged entry of a log; 0 when there is none."""
    return read_acknowledged(live_root / entity_type).sequence


def adopt_tail(live_root: Path, entity_type: str) -> None:
    """Promise what a crash left whole behind the last promise, as the next writer would; costs a glance where there is nothing.

    A power failure may lose promises of durable writes, so whoever begins to read a log should not wait for the next write to see them.
    Nothing is done where that is impossible: for a damaged log (which reading it reports), or one that only others may write.
    """
    folder = live_root / entity_type
    try:
        files = log_files(folder)
        if not files:
            return
        promised = read_acknowledged(folder)
        if promised.file == files[-1][0] and promised.offset == files[-1][1].stat().st_size:
            return
        LiveLogWriter(live_root, entity_type, 0, lock_timeout_seconds=ADOPT_SECONDS).close()
    except (LiveLogError, DiskFull, OSError):  # a writer that holds the lock for so long has adopted it itself
        return


def trust_log(live_root: Path, entity_type: str) -> int:
    """Take what a log's own checksums prove as all that was ever promised: the way out when ``acknowledged`` was lost or damaged.

    Returns:
        Sequence number of the last entry.

    Raises:
        LiveLogCorrupt: A file in the middle is missing or damaged.
        LiveLogBusy: A writer holds the log.
    """
    folder = live_root / entity_type
    lock = FileLock(folder / "writer.lock")
    if not lock.acquire(timeout_seconds=5.0):
        raise LiveLogBusy(f"live log of {entity_type!r}: process {lock.holder()} holds the writer's lock; stop it or try again")
    try:
        files = log_files(folder)
        reader = LiveLogReader(live_root, entity_type, after=files[0][0] - 1 if files else 0)
        while reader.read(100_000, None):
            pass
        file, offset = reader.position
        reader.close()
        if files and file != files[-1][0]:
            raise LiveLogCorrupt(
                f"live log of {entity_type!r}: valid entries end at {reader.sequence}, before {files[-1][1].name}: there is a hole. "
                "Restore what is missing, or move the files behind the hole away to give up what they hold."
            )
        begin_acknowledged(folder, Acknowledged(file, offset, reader.sequence))
        return reader.sequence
    finally:
        lock.release()


def collect_files(live_root: Path, entity_type: str, watermark: int) -> list[Path]:
    """Remove whole log files whose entries are all at or below ``watermark``; the newest file always stays.

    Args:
        live_root: ``<store>/live``.
        entity_type: Which log.
        watermark: The smallest watermark of all releases that are kept.

    Returns:
        Removed files.
    """
    folder = live_root / entity_type
    files = log_files(folder)
    removed = []
    for (_, path), (following, _) in pairwise(files):
        if following - 1 <= watermark:
            path.unlink()
            removed.append(path)
    if removed:
        fsync_folder(folder)
    return removed
