"""The end of a live log, where one writer at a time appends, all or nothing.

It is found again before each write, and cleaned of what a crash left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from index_builder.errors import LiveLogBusy, LiveLogCorrupt, LiveLogError, PublishError
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
    open_shared,
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
    ) -> None:
        self.folder = live_root / entity_type
        self.entity_type = entity_type
        self.sequence = 0
        self._file_bytes = file_bytes
        self._timeout = lock_timeout_seconds
        self._file: tuple[int, Path] | None = None
        self._descriptor: int | None = None
        self._offset = 0  # behind the last entry
        self._acknowledged = Acknowledged()
        self._failed: _Failed | None = None

    @contextmanager
    def held(self, after: int = 0) -> Iterator[None]:
        """Hold the writer's lock, and know the end of the log inside.

        Args:
            after: Watermark of the release: a log that is not there begins behind it, one that ends
                before it is refused.

        Raises:
            LiveLogBusy: Another process kept the lock.
            LiveLogCorrupt: What was acknowledged does not check any more.
            DiskFull: No room for what has to be repaired first.
        """
        lock = self._locked()
        try:
            self._catch_up(after)
            yield
        finally:
            lock.release()

    def append(self, payloads: Sequence[bytes]) -> int:
        """Write records, make them durable and acknowledge them; within ``held``.

        What fails before that is taken back.

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
        end = Acknowledged(
            self._file[0], self._offset + len(content), self.sequence + len(payloads)
        )
        with (
            self._all_or_nothing(self._offset, end),
            disk_full_is_clear("writing the live log", self.folder),
        ):
            write_all(self._descriptor, content, self._offset)
            self._sync()
            write_acknowledged(self.folder, end)
        self._offset = end.offset
        self.sequence = end.sequence
        return self.sequence

    def _sync(self) -> None:
        assert self._descriptor is not None
        os.fdatasync(self._descriptor)

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
    def _all_or_nothing(self, start: int, wanted: Acknowledged) -> Iterator[None]:
        """Let a write count if ``wanted`` is on disk in the end; else leave nothing of it.

        Args:
            start: Offset where the write began.
            wanted: What it acknowledges.
        """
        assert self._file is not None
        try:
            yield
        except BaseException as error:
            self._failed = _Failed(self._file, start, self._acknowledged, wanted)
            happened = False
            with suppress(OSError, LiveLogError):
                happened = self._settle()
            if not (happened and isinstance(error, OSError | PublishError)):
                raise
        self._acknowledged = wanted

    def _settle(self) -> bool:
        """Decide a write that failed: it counts if it was acknowledged, else nothing of it stays.

        The writer's lock is held. A disk that fails may refuse this, too. The next write begins
        with it, so that what was refused is not found whole and acknowledged.

        Returns:
            Whether that write was acknowledged.

        Raises:
            OSError: The disk refuses.
            LiveLogCorrupt: ``acknowledged`` is gone.
        """
        failed = self._failed
        if failed is None:
            return False
        try:
            acknowledged = read_acknowledged(self.folder)
        except LiveLogCorrupt:
            if not (self.folder / ACKNOWLEDGED_NAME).exists():
                raise
            acknowledged = failed.before  # torn by the write that failed
            write_acknowledged(self.folder, acknowledged)
        # Else what follows was acknowledged, by this writer or the next: nobody may cut it off
        if acknowledged == failed.before:
            _cut(failed.file[1], failed.start)
        self._failed = None
        return acknowledged == failed.wanted

    def _new_file(self) -> None:
        self.close()
        first = self.sequence + 1
        path = self.folder / f"log-{first:020d}.bin"
        if not (self.folder / ACKNOWLEDGED_NAME).exists():
            begin_acknowledged(self.folder, Acknowledged())
        with disk_full_is_clear("starting a live-log file", self.folder):
            descriptor = open_shared(path, os.O_RDWR)
            try:
                os.ftruncate(descriptor, 0)
                write_all(descriptor, FILE_HEADER.pack(FILE_MAGIC, FILE_VERSION, 0, first), 0)
                os.fdatasync(descriptor)
                fsync_folder(self.folder)
            except BaseException:
                os.close(descriptor)
                raise
        self._file = (first, path)
        self._descriptor = descriptor
        self._offset = FILE_HEADER.size

    def _catch_up(self, after: int) -> None:
        """Find the end of the log: other processes may have written, or died while writing.

        The writer's lock is held.
        """
        with disk_full_is_clear("taking back a write that failed", self.folder):
            self._settle()
        acknowledged = self._acknowledged = read_acknowledged(self.folder)
        files = log_files(self.folder)
        if not files:
            self.close()  # of a file that was removed
            self._file = None
            if (lost := max(acknowledged.sequence, self.sequence)) > after:
                raise LiveLogCorrupt(
                    f"live log of {self.entity_type!r}: entries up to {lost} were acknowledged, but"
                    " its files are gone; restore them"
                )
            self.sequence = after
            return
        known = self.sequence
        first, path = files[-1]
        try:
            if not self._is_open(first, path) and not self._reopen(first, path, acknowledged):
                # A writer died while starting the file: nothing in it was acknowledged
                path.unlink()
                fsync_folder(self.folder)
                self._catch_up(after)
                return
            self._find_end()
            self._check_end(path, acknowledged, known, after)
            self._adopt_end(acknowledged)
        except BaseException:
            # The next call begins at the start of the file, which may have been restored, and knows
            # what it has to hold
            self.close()
            self.sequence = known
            raise

    def _is_open(self, first: int, path: Path) -> bool:
        """Return whether this very file is open, and was not replaced or shortened."""
        if self._file != (first, path) or self._descriptor is None:
            return False
        return still_named(path, self._descriptor, self._offset)

    def _reopen(self, first: int, path: Path, acknowledged: Acknowledged) -> bool:
        """Open a file at its start.

        False, with none open, if its header was not finished and nothing in it was acknowledged.
        """
        self.close()
        self._file = (first, path)
        with disk_full_is_clear("opening the live log", path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        head = os.pread(self._descriptor, FILE_HEADER.size, 0)
        if len(head) < FILE_HEADER.size and acknowledged.file != first:
            self.close()
            self._file = None
            return False
        if not check_header(head, first, path):
            raise LiveLogCorrupt(f"{path}: the file is shorter than its header; restore it")
        self._offset = FILE_HEADER.size
        self.sequence = first - 1
        return True

    def _find_end(self) -> None:
        """Go to the end of the open file's valid entries."""
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        while self._offset < size:
            wanted = min(_READ_BYTES, size - self._offset)
            content = memoryview(os.pread(self._descriptor, wanted, self._offset))
            position = 0
            while (found := next_record(content, position, self.sequence + 1)) is not None:
                position = found[1]
                self.sequence += 1
            self._offset += position
            if position == 0:
                break

    def _check_end(self, path: Path, acknowledged: Acknowledged, known: int, after: int) -> None:
        """Check that the valid entries reach as far as they must.

        Raises:
            LiveLogCorrupt: Entries are missing that were acknowledged, are known here, or are in
                the release.
        """
        if self.sequence < acknowledged.sequence:
            raise LiveLogCorrupt(
                f"live log of {self.entity_type!r}: entries up to {acknowledged.sequence} were"
                f" acknowledged, but {path.name} is valid only up to entry {self.sequence} (byte"
                f" {self._offset}). Nothing was written or cut off; restore the file from a replica"
                " or backup."
            )
        if self.sequence < after:
            raise LiveLogCorrupt(ends_early(self.entity_type, after, self.sequence))
        if self.sequence < known:
            raise LiveLogCorrupt(was_cut(self.entity_type, known, self.sequence))

    def _adopt_end(self, acknowledged: Acknowledged) -> None:
        """Acknowledge valid entries that are not yet, and cut off what is behind them."""
        assert self._descriptor is not None and self._file is not None
        if self._offset < os.fstat(self._descriptor).st_size:
            # The torn tail of a writer that died before it acknowledged anything
            os.ftruncate(self._descriptor, self._offset)
            os.fdatasync(self._descriptor)
        is_begun = acknowledged.file == self._file[0]
        nothing_new = self.sequence <= acknowledged.sequence or self._offset == FILE_HEADER.size
        if is_begun and nothing_new:
            return
        with disk_full_is_clear("making the end of the live log durable", self.folder):
            _write_again(self._descriptor, acknowledged.offset if is_begun else 0, self._offset)
            os.fdatasync(self._descriptor)
            if not is_begun:
                fsync_folder(self.folder)
        if nothing_new:
            return
        # Whole entries of a writer that died, or whose acknowledgement was lost
        end = Acknowledged(self._file[0], self._offset, self.sequence)
        with (
            self._all_or_nothing(self._offset, end),
            disk_full_is_clear("acknowledging the end of the live log", self.folder),
        ):
            write_acknowledged(self.folder, end)


class _Failed(NamedTuple):
    """A write about which nothing is decided."""

    file: tuple[int, Path]
    """First sequence number and path of its file."""
    start: int
    """Offset where it began."""
    before: Acknowledged
    """What was acknowledged before it."""
    wanted: Acknowledged
    """What it was to acknowledge."""


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
    """Write the same bytes once more.

    After an fsync that failed, the next one says nothing of pages that never reached the disk.
    """
    for offset in range(start, end, _READ_BYTES):
        write_all(descriptor, os.pread(descriptor, min(_READ_BYTES, end - offset), offset), offset)
