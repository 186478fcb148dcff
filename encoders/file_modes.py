"""Put finished folders into place: give them the modes that the umask says, replace older ones."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Set the modes of a file, or of a folder and all below it, to what ``open`` would give.

    ``tempfile`` and safetensors write 0600 and 0700, which another user, such as a container's,
    cannot read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for entry in (path, *(path.rglob("*") if path.is_dir() else ())):
        if not entry.is_symlink():
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)


def replace_folder(staging: Path, path: Path) -> None:
    """Rename ``staging`` to ``path``; what is there is moved aside first and removed last.

    Interrupted or refused in between, ``path`` holds either the old or the new whole.
    """
    if not path.exists():
        os.rename(staging, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    try:
        os.rename(path, aside / "old")
        os.rename(staging, path)
    except BaseException:
        if not path.exists():
            os.rename(aside / "old", path)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside)
