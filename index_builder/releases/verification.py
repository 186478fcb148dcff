"""Checking a release's files against its manifest, before any library parses a byte."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from index_builder.ann.cpu import cpu_features
from index_builder.errors import ReleaseCorrupt, UnsupportedCpu
from index_builder.releases.manifest import MANIFEST_NAME, FileRecord, Manifest

_BLOCK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """Return SHA-256 of a file as 64 hexadecimal digits (the GIL is free while it hashes)."""
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def hash_files(paths: Mapping[str, Path], threads: int | None = None) -> dict[str, str]:
    """Hash many files at once, the largest first so that threads finish together.

    Args:
        paths: Name -> file.
        threads: None: one per core, at most 8.

    Returns:
        Name -> 64 hexadecimal digits.
    """
    order = sorted(paths, key=lambda name: -paths[name].stat().st_size)
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(order, pool.map(lambda name: sha256_of(paths[name]), order)))


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Return size and SHA-256 of every file below ``folder`` but the manifest, by relative path."""
    paths = {name: folder / name for name in _names(folder) if name != MANIFEST_NAME}
    digests = hash_files(paths)
    return {
        name: FileRecord(size_bytes=paths[name].stat().st_size, sha256=digests[name])
        for name in sorted(paths)
    }


def _names(folder: Path) -> Iterable[str]:
    for parent, folders, names in os.walk(folder):
        for name in [*names, *(f for f in folders if os.path.islink(os.path.join(parent, f)))]:
            path = Path(parent, name)
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ReleaseCorrupt(
                    f"{path}: a release holds plain files only, but this is a link or a special"
                    " file. Remove it or roll back."
                )
            yield path.relative_to(folder).as_posix()


def check_names_and_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare the folder's listing with the manifest.

    Raises:
        ReleaseCorrupt: A file is missing, not listed, no plain file, or has another size; or the
            manifest lists a path outside the folder.
    """
    where = manifest.release_id
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.as_posix() != name:
            raise ReleaseCorrupt(
                f"{where}: the manifest lists {name!r}, which is not a plain path inside the"
                " release"
            )
    found = set(_names(folder))
    missing = sorted(set(manifest.files) - found)
    if missing:
        raise ReleaseCorrupt(
            f"{where}: {len(missing)} of {len(manifest.files)} files are missing, first"
            f" {missing[0]!r}. Restore the release or roll back."
        )
    extra = sorted(found - set(manifest.files) - {MANIFEST_NAME})
    if extra:
        raise ReleaseCorrupt(
            f"{where}: {len(extra)} files are not in the manifest, first {extra[0]!r}. A release is"
            " immutable: remove them or roll back."
        )
    for name, record in manifest.files.items():
        size = (folder / name).stat().st_size
        if size != record.size_bytes:
            raise ReleaseCorrupt(
                f"{where}/{name}: expected {record.size_bytes:,} bytes, but got {size:,}. Restore"
                " the release or roll back."
            )


def check_contents(folder: Path, manifest: Manifest, threads: int | None = None) -> None:
    """Compare the SHA-256 of every file with the manifest; stops at the first that differs.

    Raises:
        ReleaseCorrupt: A file's bytes differ, or it cannot be read.
    """
    stop = threading.Event()

    def check(name: str) -> None:
        if stop.is_set():
            return
        try:
            digest = sha256_of(folder / name)
        except OSError as error:
            stop.set()
            raise ReleaseCorrupt(
                f"{manifest.release_id}/{name}: the file cannot be read ({error.strerror}). Restore"
                " the release or roll back."
            ) from error
        if digest != manifest.files[name].sha256:
            stop.set()
            raise ReleaseCorrupt(
                f"{manifest.release_id}/{name}: expected sha256 {manifest.files[name].sha256[:16]},"
                f" but got {digest[:16]}: the file was damaged, changed or swapped. Restore the"
                " release or roll back."
            )

    order = sorted(manifest.files, key=lambda name: -manifest.files[name].size_bytes)
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(check, order):
            pass


def check_cpu(manifest: Manifest, features: frozenset[str] | None = None) -> None:
    """Refuse indexes that this CPU cannot search, before a library dies of an illegal instruction.

    Args:
        manifest: Of the release to open.
        features: Flags of the CPU; None: of this machine.

    Raises:
        UnsupportedCpu: Features are missing.
    """
    have = cpu_features() if features is None else features
    for entity in manifest.entities.values():
        missing = sorted(set(entity.cpu_features) - have)
        if missing:
            raise UnsupportedCpu(str(entity.index.get("kind", "unknown")), missing)
