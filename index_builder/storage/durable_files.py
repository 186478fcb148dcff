"""Files that survive a crash: fsync, atomic replacement, locks, and typed errors of the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from index_builder.errors import DiskFull, NotWritable

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


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
        NotWritable: This user may not write there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FORBIDDEN:
            raise _not_writable(what, path, error) from error
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


def _not_writable(what: str, path: Path, error: OSError) -> NotWritable:
    return NotWritable(
        f"{what}: {error.filename or path} may not be written by this user ({error.strerror})."
        " Nothing was changed. Run as the store's owner, or give its folders and files to a common"
        " group (chgrp -R GROUP STORE; chmod -R g+rwX STORE) and set the sticky group bit on"
        " folders (chmod g+s)."
    )


def _not_locked(path: Path, error: OSError) -> NotWritable:
    if error.errno in _FORBIDDEN | {errno.EBADF}:  # EBADF: not open for writing, on NFS
        return _not_writable("taking a lock", path, error)
    return NotWritable(
        f"taking a lock: {path} cannot be locked ({error.strerror}). Nothing was changed. The file"
        " system of the store must hold locks (flock): for NFS run its lock service and mount"
        " without nolock, or keep the store elsewhere."
    )


def require_writable(folder: Path) -> None:
    """Refuse to begin what will write to a folder.

    Raises:
        NotWritable: This user may not.
    """
    if not os.access(folder, os.W_OK):
        error = OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        raise _not_writable("changing the store", folder, error)


def open_shared(path: Path, flags: int) -> int:
    """Open a file for writing; one that has to be created is as shared as its folder is.

    Where a group may write to the folder, it may write to the file, whatever the umask.

    Args:
        path: The file.
        flags: Of ``os.open``; with ``O_EXCL`` the file must be new.

    Returns:
        The descriptor.
    """
    flags |= os.O_CREAT | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_EXCL, 0o666)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        return os.open(path, flags, 0o666)
    _share(path.parent, descriptor, stat.S_IRGRP | stat.S_IWGRP)
    return descriptor


def _share(folder: Path, target: int | Path, bits: int) -> None:
    """Give the group of a new file or folder ``bits``, where it may write to ``folder``."""
    with suppress(OSError):  # of a file system without modes
        if folder.stat().st_mode & stat.S_IWGRP:
            os.chmod(target, stat.S_IMODE(os.stat(target).st_mode) | bits)


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
    """Create ``folder`` and its missing parents, each name durable, as shared as where they are.

    Raises:
        NotWritable: This user may not.
    """
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            if error.errno in _FORBIDDEN:
                raise _not_writable("creating a folder", path, error) from error
            raise
        _share(path.parent, path, stat.S_IRWXG)
        fsync_folder(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``.

    After a crash at any moment the file holds all of the old bytes or all of the new ones. The
    name of the temporary file is nobody else's, not even in another container.

    Raises:
        DiskFull: There was no room; the old content is untouched.
        NotWritable: This user may not write there.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with disk_full_is_clear(f"writing {path.name}", path.parent):
            with open(open_shared(temporary, os.O_WRONLY | os.O_EXCL), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


class FileLock:
    """An advisory ``flock`` on a small file.

    The kernel drops it when the holder dies, so a kill -9 never leaves a stale lock. The file may
    be removed by who holds the lock. It holds the process id of the last exclusive holder, for
    error messages only.

    Args:
        path: The file.
        create: False locks a file that is there, without changing it: for who may only read.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self._create = create
        self._descriptor: int | None = None

    def acquire(self, *, shared: bool = False, timeout_seconds: float = 0.0) -> bool:
        """Take the lock; False if another holder keeps it for ``timeout_seconds``.

        Raises:
            NotWritable: This user may neither create nor read the file, or the file system holds
                no locks.
        """
        assert self._descriptor is None, "the lock is already held by this object"
        deadline = time.monotonic() + timeout_seconds
        while True:
            descriptor, writable = self._open()
            try:
                if not _locked(descriptor, shared, deadline):
                    os.close(descriptor)
                    return False
            except OSError as error:
                os.close(descriptor)
                raise _not_locked(self.path, error) from error
            if self._is_named(descriptor):
                break
            os.close(descriptor)  # its last holder removed it: what has the name now is locked
        if writable and not shared:
            with suppress(OSError):  # a full disk: the lock is the kernel's, the pid for messages
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor
        return True

    def _open(self) -> tuple[int, bool]:
        """Open the file, and say whether it may be written: a lock itself needs no such right."""
        try:
            if self._create:
                return open_shared(self.path, os.O_RDWR), True
            # Some file systems (NFS) lock exclusively only what is open for writing
            return os.open(self.path, os.O_RDWR | os.O_CLOEXEC), False
        except OSError as error:
            if error.errno not in _FORBIDDEN:
                raise
            try:
                return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), False
            except OSError:
                raise _not_writable("opening a lock", self.path, error) from error

    def _is_named(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

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


def _locked(descriptor: int, shared: bool, deadline: float) -> bool:
    """Take a ``flock``; False if another holder keeps it until ``deadline``."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
