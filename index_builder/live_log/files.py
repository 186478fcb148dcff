"""Files of the live log: their names and headers, and how far writes were acknowledged.

Layout of ``<store>/live/<entity_type>/``:

- ``log-<first sequence>.bin``: append-only records, a new file every 64 MiB.
- ``acknowledged``: how far writes were acknowledged. What is invalid before that point is
  corruption and refused. Readers stop there: behind it lies a write under way, which may still
  fail, or what a crash left; the next writer acknowledges what is whole of it and cuts off the
  rest.
- ``writer.lock``: an ``flock``; the kernel frees it when its holder dies.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import xxhash

from index_builder.errors import LiveLogCorrupt, LiveLogError
from index_builder.live_log.records import FILE_HEADER, FILE_MAGIC, FILE_VERSION
from index_builder.storage.durable_files import open_shared, write_durably

# Magic, first sequence of the file, end offset in it, last sequence
_ACKNOWLEDGED = struct.Struct("<8sQQQ")
_ACK_MAGIC = b"OMNIACK1"
ACKNOWLEDGED_NAME = "acknowledged"
_READ_ATTEMPTS = 20
_RETRY_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """How far writes were acknowledged."""

    file: int = 0
    """First sequence number of the file that holds the last acknowledged record."""
    offset: int = 0
    """Offset behind that record."""
    sequence: int = 0
    """Its sequence number."""


def log_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the log's files as ``(first sequence, path)``, in order."""
    found = []
    for path in folder.glob("log-*.bin"):
        digits = path.stem[4:]
        if digits.isdigit():
            found.append((int(digits), path))
    return sorted(found)


def read_acknowledged(folder: Path) -> Acknowledged:
    """Read how far writes were acknowledged; zeros for a new log.

    Raises:
        LiveLogCorrupt: The file does not check, or is gone while the log's files are there.
    """
    path = folder / ACKNOWLEDGED_NAME
    content = b""
    for _ in range(_READ_ATTEMPTS):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            if not log_files(folder):
                return Acknowledged()
            if path.exists():  # the log was begun this moment: this file comes first
                continue
            raise LiveLogCorrupt(
                f"{path}: the file is missing, so nothing tells whether the log lost its end."
                " Restore it from a replica or backup; or take what the log's own checksums prove"
                " as all that was written: omni release verify --live --trust-log"
            ) from None
        value = _decoded(content)
        if value is not None:
            return value
        time.sleep(_RETRY_SECONDS)  # a write of these 40 bytes may be under way
    raise LiveLogCorrupt(
        f"{path}: expected {_ACKNOWLEDGED.size + 8} bytes with a valid checksum, but got"
        f" {len(content)} bytes that do not check. The log itself may be whole: to take what its"
        " own checksums prove as all that was written, run `omni release verify --live"
        " --trust-log`."
    )


def _decoded(content: bytes) -> Acknowledged | None:
    """Return what ``_content`` encoded; None if it does not check."""
    if len(content) != _ACKNOWLEDGED.size + 8:
        return None
    body, checksum = content[:-8], struct.unpack("<Q", content[-8:])[0]
    magic, file, offset, sequence = _ACKNOWLEDGED.unpack(body)
    if magic != _ACK_MAGIC or xxhash.xxh3_64_intdigest(body) != checksum:
        return None
    return Acknowledged(file, offset, sequence)


def _content(value: Acknowledged) -> bytes:
    body = _ACKNOWLEDGED.pack(_ACK_MAGIC, value.file, value.offset, value.sequence)
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def still_named(path: Path, descriptor: int, end: int) -> bool:
    """Return whether ``path`` names the open file and it reaches ``end``.

    False after a restore, be it by rename or in place.

    Raises:
        FileNotFoundError: Nothing has that name.
    """
    named = os.stat(path)
    return os.path.samestat(named, os.fstat(descriptor)) and named.st_size >= end


def begin_acknowledged(folder: Path, value: Acknowledged) -> None:
    """Create ``acknowledged`` durably, whole or not at all.

    It comes before the first file of a log, so that a log without it is known to be damaged.

    Raises:
        DiskFull: No room.
    """
    write_durably(folder / ACKNOWLEDGED_NAME, _content(value))


def write_acknowledged(folder: Path, value: Acknowledged) -> None:
    """Acknowledge more.

    Not synced: losing power may lose what it says, which then guards less, but never the entries it
    is about.

    Raises:
        OSError: The file is the old one, the new one, or torn.
    """
    descriptor = open_shared(folder / ACKNOWLEDGED_NAME, os.O_RDWR)
    try:
        write_all(descriptor, _content(value), 0)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes, offset: int) -> None:
    """Write all of ``content`` at ``offset``, however little the system takes at a time."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += written
        view = view[written:]


def check_header(content: bytes | memoryview, first: int, path: Path) -> bool:
    """Return whether a whole file header stands at the start; False while it is being written.

    Raises:
        LiveLogCorrupt: The header belongs to another log or file.
        LiveLogError: A newer engine wrote it.
    """
    if len(content) < FILE_HEADER.size:
        return False
    magic, version, reserved, found = FILE_HEADER.unpack_from(content)
    if magic == FILE_MAGIC and version > FILE_VERSION:
        raise LiveLogError(
            f"{path}: this engine reads live-log format {FILE_VERSION}, but the file is format"
            f" {version}; install the engine that wrote it"
        )
    if magic != FILE_MAGIC or version != FILE_VERSION or reserved or found != first:
        raise LiveLogCorrupt(
            f"{path}: the header of a live log starting at sequence {first} was expected, but got"
            f" magic {bytes(magic)!r}, sequence {found}"
        )
    return True


def ends_early(entity_type: str, watermark: int, last: int) -> str:
    """Return the message about a log that ends before the watermark of its release."""
    return (
        f"live log of {entity_type!r}: entries up to {watermark} are in the release, but the log"
        f" ends at {last}: it was removed and begun again, or belongs to another store. Restore it;"
        " to go on with this one, rebuild from the sources into a new store and apply its changes"
        " there."
    )


def was_cut(entity_type: str, known: int, last: int) -> str:
    """Return the message about a log that lost entries which this process knows."""
    return (
        f"live log of {entity_type!r}: entries up to {known} were acknowledged and seen here, but"
        f" the log now ends at {last}: it was put back without its end. Put it back whole; to give"
        " up what is missing, restart the servers: those that run have read it."
    )
