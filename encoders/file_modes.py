"""Give files the modes that the umask says, where a library made them for their owner alone."""

from __future__ import annotations

import os
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
