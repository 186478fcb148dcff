"""Reading a live log: acknowledged entries in order as they come.

Damage is reported and never skipped; files that are restored are read on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from index_builder.errors import LiveLogCorrupt, LiveLogError
from index_builder.live_log.files import (
    Acknowledged,
    check_header,
    ends_early,
    log_files,
    read_acknowledged,
    still_named,
    was_cut,
)
from index_builder.live_log.records import FILE_HEADER, LiveEntry, decode_payload, next_record

BATCH_ENTRIES = 50_000
"""Entries to poll at once by who reads a whole log, so that memory stays bounded."""
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
        """Read the entries acknowledged since the last call, in order.

        What lies before a damage is returned; it is the next call that raises, and each one after
        it until the damage is repaired.

        Args:
            limit: At most about this many entries in one call.

        Returns:
            Entries with consecutive sequence numbers behind ``self.sequence``, which is advanced.

        Raises:
            LiveLogCorrupt: An acknowledged entry is missing or changed.
            LiveLogError: Entries behind ``after`` were already collected, or a newer engine wrote
                the log.
        """
        # Read first: what it acknowledges must be in the files read afterwards
        acknowledged = read_acknowledged(self.folder)
        return self.read(limit, acknowledged)

    def read(self, limit: int, acknowledged: Acknowledged | None) -> list[LiveEntry]:
        """Read up to what was acknowledged; None reads whatever checks."""
        entries: list[LiveEntry] = []
        try:
            self._collect(entries, limit, acknowledged)
        except Exception:
            # They count as delivered: the caller gets them first, and the next call finds what is
            # wrong again
            if not entries:
                raise
        return entries

    def _collect(
        self, entries: list[LiveEntry], limit: int, acknowledged: Acknowledged | None
    ) -> None:
        # Behind what was acknowledged lie writes that may still fail. What is in the release
        # already is only checked, acknowledged or not.
        last_readable = (
            sys.maxsize if acknowledged is None else max(acknowledged.sequence, self.sequence)
        )
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
        if acknowledged is not None and last < acknowledged.sequence:
            raise LiveLogCorrupt(
                f"live log of {self.entity_type!r}: entries up to {acknowledged.sequence} were"
                f" acknowledged, but the files hold valid entries only up to {last}"
                f" ({self._file_path().name if self._file else 'no file'}, byte {self._offset})."
                " Restore the file from a replica or backup; serving goes on with what was read"
                " before."
            )
        if self._file is not None and last < self.sequence:
            was_read = self.sequence > self._after
            raise LiveLogCorrupt(
                (was_cut if was_read else ends_early)(self.entity_type, self.sequence, last)
            )

    @property
    def position(self) -> tuple[int, int]:
        """First sequence number of the open file, and the offset behind the last entry."""
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
                f"live log of {self.entity_type!r}: entries from {wanted} are needed, but the"
                f" oldest kept is {files[0][0]}. Serve a release whose watermark is newer, or"
                " rebuild."
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
            self._descriptor = descriptor
            self._offset = FILE_HEADER.size
            self._next = first
        return whole

    def _is_current(self) -> bool:
        """Return whether the open file is the one to go on in."""
        assert self._descriptor is not None and self._file is not None
        try:
            return still_named(self._file[1], self._descriptor, self._offset)
        except FileNotFoundError:
            # Collected, since every release holds its entries: what is open is read to its end
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
                len(entries) < limit
                and self._next <= last_readable
                and (found := next_record(content, position, self._next)) is not None
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
