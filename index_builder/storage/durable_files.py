"""Files that survive a crash: fsync, atomic replacement, locks, and a typed error when full."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from index_builder.errors import DiskFull

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _free_space(path: Path) -> str:
    """Describe the free space of a file system."""
    try:
        return f"{shutil.disk_usage(path).free / 2**20:,.0f} MiB are free"
    except OSError:
        return "free space unknown"


@contextmanager
def disk_full_is_clear(what: str, path: Path) -> Iterator[None]:
    """Turn "no space left" into ``DiskFull``, also for quotas and limits of file sizes.

    Raises:
        DiskFull: The operating system refused to store more bytes; names the free space.
    """
    try:
        yield
    except OSError as error:
        if not _is_full(error):
            raise
        raise DiskFull(
            f"{what}: the disk, its quota or the file size limit is full ({_free_space(path)})."
            " Nothing was published. Free some space (for example `omni release gc`) and run"
            " again."
        ) from error


def _is_full(error: OSError) -> bool:
    """Return whether there was no room; numpy gives no number, but counts what it wrote."""
    short_write = error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error))
    return error.errno in _FULL or bool(short_write)


def fsync_folder(folder: Path) -> None:
    """Make the names inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file below ``folder`` and every name on the way durable."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_folder(Path(parent))


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its missing parents, each name durable."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``.

    After a crash at any moment the file holds all of the old bytes or all of the new ones.

    Raises:
        DiskFull: There was no room; the old content is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_full_is_clear(f"writing {path.name}", path.parent), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


class FileLock:
    """An advisory ``flock`` on a small file.

    The kernel drops it when the holder dies, so a kill -9 never leaves a stale lock.

    The file holds the process id of the last exclusive holder, for error messages only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, *, shared: bool = False, timeout_seconds: float = 0.0) -> bool:
        """Take the lock; False if another holder keeps it for ``timeout_seconds``."""
        assert self._descriptor is None, "the lock is already held by this object"
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + timeout_seconds
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return False
                time.sleep(0.005)
        if not shared:
            with suppress(OSError):  # a full disk: the lock is the kernel's, the pid for messages
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def holder(self) -> str:
        """Read the process id of the last exclusive holder, or ``unknown``."""
        try:
            return self.path.read_text().strip() or "unknown"
        except OSError:
            return "unknown"

    @property
    def held(self) -> bool:
        """Return whether this object holds the lock."""
        return self._descriptor is not None
