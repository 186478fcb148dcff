"""Care of a live log between writes: adopt what a crash left, trust checksums, collect files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from index_builder.errors import LiveLogBusy, LiveLogCorrupt, LiveLogError, PublishError
from index_builder.live_log.append import LiveLogEnd
from index_builder.live_log.files import (
    Acknowledged,
    begin_acknowledged,
    log_files,
    read_acknowledged,
)
from index_builder.live_log.reader import LiveLogReader
from index_builder.storage.durable_files import FileLock, fsync_folder

ADOPT_SECONDS = 5.0
"""How long ``adopt_tail`` waits for a writer."""


def adopt_tail(live_root: Path, entity_type: str) -> None:
    """Acknowledge what a crash left whole, as the next writer would.

    A power failure may lose acknowledgements of durable writes, so whoever begins to read a log
    should not wait for the next write to see them. Nothing is done where that is impossible: for a
    damaged log (which reading it reports), or one that only others may write.
    """
    folder = live_root / entity_type
    try:
        files = log_files(folder)
        if not files:
            return
        acknowledged = read_acknowledged(folder)
        first, path = files[-1]
        if acknowledged.file == first and acknowledged.offset == path.stat().st_size:
            return
        end = LiveLogEnd(live_root, entity_type, lock_timeout_seconds=ADOPT_SECONDS)
        try:
            with end.held():
                pass
        finally:
            end.close()
    except (LiveLogError, PublishError, OSError):
        # A writer that holds the lock for so long has adopted it itself
        return


def trust_log(live_root: Path, entity_type: str) -> int:
    """Take what a log's own checksums prove as all that was ever acknowledged.

    For a log whose file ``acknowledged`` was lost or damaged.

    Returns:
        Sequence number of the last entry.

    Raises:
        LiveLogCorrupt: A file in the middle is missing or damaged.
        LiveLogBusy: A writer holds the log.
    """
    folder = live_root / entity_type
    lock = FileLock(folder / "writer.lock")
    if not lock.acquire(timeout_seconds=5.0):
        raise LiveLogBusy(
            f"live log of {entity_type!r}: process {lock.holder()} holds the writer's lock; stop it"
            " or try again"
        )
    try:
        files = log_files(folder)
        reader = LiveLogReader(live_root, entity_type, after=files[0][0] - 1 if files else 0)
        while reader.read(100_000, None):
            pass
        file, offset = reader.position
        reader.close()
        if files and file != files[-1][0]:
            raise LiveLogCorrupt(
                f"live log of {entity_type!r}: valid entries end at {reader.sequence}, before"
                f" {files[-1][1].name}: there is a hole. Restore what is missing, or move the files"
                " behind the hole away to give up what they hold."
            )
        begin_acknowledged(folder, Acknowledged(file, offset, reader.sequence))
        return reader.sequence
    finally:
        lock.release()


def collect_files(live_root: Path, entity_type: str, watermark: int) -> list[Path]:
    """Remove whole log files whose entries are all at or below ``watermark``.

    The newest file always stays.

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
