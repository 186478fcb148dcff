"""The end of a live log, where one writer at a time appends: found, cleaned of what a crash left, written all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from index_builder.errors import DiskFull, LiveLogBusy, LiveLogCorrupt, LiveLogError
from index_builder.live_log.files import (
    ACKNOWLEDGED_NAME,
    Acknowledged,
    begin_acknowledged,
    check_header,
    ends_early,
    log_files,
    read_acknowledged,
    still_named,
    was_cut,
    write_acknowledged,
    write_all,
)
from index_builder.live_log.records import (
    FILE_HEADER,
    FILE_MAGIC,
    FILE_VERSION,
    RECORD_HEADER,
    frame,
    next_record,
)
from index_builder.storage.durable_files import (
    FileLock,
    disk_full_is_clear,
    fsync_folder,
    make_folder,
)

DEFAULT_FILE_BYTES = 64 * 2**20
_READ_BYTES = 64 * 2**20


class LiveLogEnd:
    """Where the next record of a log goes. Use it from one thread at a time.

    Args:
        live_root: ``<store>/live``; created when missing.
        entity_type: Which log.
        file_bytes: A new file is begun when the last one is larger.
        lock_timeout_seconds: How long to wait for another writing process.
        before_sync: Called between write and fsync; for fault injection only.

    Attributes:
        sequence: Number of the last entry, as this object knows it.
    """

    def __init__(
        self,
        live_root: Path,
        entity_type: str,
        *,
        file_bytes: int = DEFAULT_FILE_BYTES,
        lock_timeout_seconds: float = 30.0,
        before_sync: Callable[[], None] | None = None,
    ) -> None:
        self.folder = live_root / entity_type
        self.entity_type = entity_type
        self.sequence = 0
        self._file_bytes, self._timeout, self._before_sync = (
            file_bytes,
            lock_timeout_seconds,
            before_sync,
        )
        self._file: tuple[int, Path] | None = None
        self._descriptor: int | None = None
        self._offset = 0  # behind the last entry
        self._promised = Acknowledged()
        self._failed: _Failed | None = None

    @contextmanager
    def held(self, after: int = 0) -> Iterator[None]:
        """Hold the writer's lock, and know the end of the log inside.

        Args:
            after: Watermark of the release: a log that is not there begins behind it, one that ends
                before it is refused.

        Raises:
            LiveLogBusy: Another process kept the lock.
            LiveLogCorrupt: What was promised does not check any more.
            DiskFull: No room for what has to be mended first.
        """
        lock = self._locked()
        try:
            self._catch_up(after)
            yield
        finally:
            lock.release()

    def append(self, payloads: Sequence[bytes]) -> int:
        """Write records, make them durable and promise them; within ``held``.

        What fails before the promise stands is taken back.

        Returns:
            Sequence number of the last one.

        Raises:
            DiskFull: No room; nothing of them stays.
        """
        if self._descriptor is None or self._offset >= self._file_bytes:
            self._new_file()
        assert self._descriptor is not None and self._file is not None
        content = b"".join(
            frame(payload, sequence) for sequence, payload in enumerate(payloads, self.sequence + 1)
        )
        promise = Acknowledged(
            self._file[0], self._offset + len(content), self.sequence + len(payloads)
        )
        with (
            self._all_or_nothing(self._offset, promise),
            disk_full_is_clear("writing the live log", self.folder),
        ):
            write_all(self._descriptor, content, self._offset)
            if self._before_sync is not None:
                self._before_sync()
            os.fdatasync(self._descriptor)
            write_acknowledged(self.folder, promise)
        self._offset, self.sequence = promise.offset, promise.sequence
        return self.sequence

    def close(self) -> None:
        """Close the open file; what was written is durable already."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _locked(self) -> FileLock:
        with disk_full_is_clear("opening the live log", self.folder.parent):
            make_folder(self.folder)  # somebody may have removed it
        lock = FileLock(self.folder / "writer.lock")
        if not lock.acquire(timeout_seconds=self._timeout):
            raise LiveLogBusy(
                f"live log of {self.entity_type!r}: process {lock.holder()} has held the writer's"
                f" lock for {self._timeout:.0f} s; stop it or try again"
            )
        return lock

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
        """Decide a write that failed: it counts if its promise stands, else nothing may stay of it.

        Holds the writer's lock.

        A disk that fails may refuse this, too. The next write begins with it, so that what was
        refused is not found whole and promised.

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
        if (
            promised == failed.before
        ):  # else nobody may cut off what stands behind it: it was promised, by this writer or the next
            _cut(failed.file[1], failed.end)
        self._failed = None
        return promised == failed.promise

    def _new_file(self) -> None:
        self.close()
        first = self.sequence + 1
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
        self._file, self._descriptor, self._offset = (first, path), descriptor, FILE_HEADER.size

    def _catch_up(self, after: int) -> None:
        """Find the end of the log: other processes may have written, or died while writing.

        Holds the writer's lock.
        """
        with disk_full_is_clear("taking back a write that failed", self.folder):
            self._settle()
        promised = self._promised = read_acknowledged(self.folder)
        files = log_files(self.folder)
        if not files:
            self.close()  # of a file that was removed
            self._file = None
            if (lost := max(promised.sequence, self.sequence)) > after:
                raise LiveLogCorrupt(
                    f"live log of {self.entity_type!r}: entries up to {lost} were acknowledged, but"
                    " its files are gone; restore them"
                )
            self.sequence = after
            return
        known = self.sequence
        try:
            if (
                self._file != files[-1]
                or self._descriptor is None
                or not still_named(files[-1][1], self._descriptor, self._offset)
            ):
                first, path = files[-1]
                if not self._reopen(
                    first, path, promised
                ):  # died while starting the file: nothing in it was promised
                    path.unlink()
                    fsync_folder(self.folder)
                    self._catch_up(after)
                    return
            self._find_end(files[-1][1], promised, known, after)
        except BaseException:  # the next call begins at the start of the file, which may have been restored, and knows what it has to hold
            self.close()
            self.sequence = known
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
        self._offset, self.sequence = FILE_HEADER.size, first - 1
        return True

    def _find_end(self, path: Path, promised: Acknowledged, known: int, after: int) -> None:
        """Go to the end of the open file's valid entries, promise those that are not, and cut off what is behind them."""
        assert self._descriptor is not None and self._file is not None
        size = os.fstat(self._descriptor).st_size
        while self._offset < size:
            content = memoryview(
                os.pread(self._descriptor, min(_READ_BYTES, size - self._offset), self._offset)
            )
            position = 0
            while (found := next_record(content, position, self.sequence + 1)) is not None:
                position = found[1]
                self.sequence += 1
            self._offset += position
            if position == 0:
                break
        if self.sequence < promised.sequence:
            raise LiveLogCorrupt(
                f"live log of {self.entity_type!r}: entries up to {promised.sequence} were"
                f" acknowledged, but {path.name} is valid only up to entry {self.sequence} (byte"
                f" {self._offset}). Nothing was written or cut off; restore the file from a replica"
                " or backup."
            )
        if self.sequence < after:
            raise LiveLogCorrupt(ends_early(self.entity_type, after, self.sequence))
        if self.sequence < known:
            raise LiveLogCorrupt(was_cut(self.entity_type, known, self.sequence))
        if self._offset < size:  # the torn tail of a writer that died before it promised anything
            os.ftruncate(self._descriptor, self._offset)
            os.fdatasync(self._descriptor)
        is_begun = promised.file == self._file[0]
        is_promised = self.sequence <= promised.sequence or self._offset == FILE_HEADER.size
        if is_begun and is_promised:
            return
        with disk_full_is_clear("making the end of the live log durable", self.folder):
            _write_again(self._descriptor, promised.offset if is_begun else 0, self._offset)
            os.fdatasync(self._descriptor)
            if not is_begun:
                fsync_folder(self.folder)
        if not is_promised:  # whole entries of a writer that died, or its promise was lost
            promise = Acknowledged(self._file[0], self._offset, self.sequence)
            with (
                self._all_or_nothing(self._offset, promise),
                disk_full_is_clear("promising the end of the live log", self.folder),
            ):
                write_acknowledged(self.folder, promise)


class _Failed(NamedTuple):
    """A write about which nothing is decided: where it began, what was promised before, and what it was to promise."""

    file: tuple[int, Path]
    end: int
    before: Acknowledged
    promise: Acknowledged


def _cut(path: Path, end: int) -> None:
    """Leave nothing of a file behind ``end``, durably.

    Where the disk refuses, at least no record begins there for whoever reads on.
    """
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
