"""Removing what a store no longer needs: releases, unfinished builds, folded live-log files.

What cannot be removed is logged and left, so that it holds nothing else up.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from index_builder.errors import NotWritable, ReleaseError
from index_builder.live_log.maintenance import collect_files
from index_builder.releases.current import CURRENT_NAME
from index_builder.releases.release import read_manifest
from index_builder.storage.durable_files import FileLock, fsync_folder

log = logging.getLogger(__name__)


def remove_release(
    releases: Path, release_id: str, leases: Sequence[FileLock], dry_run: bool
) -> bool:
    """Remove a release; False where some process has it open, or it cannot be removed."""
    with ExitStack() as held:
        for lease in leases:
            try:
                if not lease.acquire():
                    return False
            except FileNotFoundError:  # its manifest went this moment
                continue
            except NotWritable as error:
                log.warning("%s was left: %s", release_id, error)
                return False
            held.callback(lease.release)
        if dry_run:
            return True
        removed = False
        with _logged(releases / release_id):
            trash = releases / f".trash-{release_id}"
            os.rename(releases / release_id, trash)
            removed = True
            fsync_folder(releases)
            _remove(trash)
            leases[0].path.unlink(missing_ok=True)
        return removed


def empty_trash(releases: Path) -> None:
    """Remove what killed collections had moved away."""
    for path in releases.glob(".trash-*"):
        with _logged(path):
            _remove(path)


def remove_leftovers(releases: Path, build_lock: FileLock) -> None:
    """Remove what killed processes left unfinished; builds only while nobody builds."""
    for path in releases.glob(f".{CURRENT_NAME}.*.tmp"):
        with _logged(path):
            path.unlink(missing_ok=True)
    with _logged(build_lock.path):
        if build_lock.acquire():
            try:
                for path in releases.glob(".staging-*"):
                    with _logged(path):
                        _remove(path)
            finally:
                build_lock.release()


def remove_folded_log(live_root: Path, releases: Sequence[Path]) -> None:
    """Remove live-log files whose entries all releases contain; none where one cannot be read."""
    watermarks: dict[str, int] = {}
    for path in releases:
        try:
            manifest = read_manifest(path)
        except ReleaseError as error:
            log.warning("the live log was left whole, since a release cannot be read: %s", error)
            return
        for entity_type, entity in manifest.entities.items():
            known = watermarks.get(entity_type, entity.watermark)
            watermarks[entity_type] = min(entity.watermark, known)
    for entity_type, watermark in watermarks.items():
        with _logged(live_root / entity_type):
            collect_files(live_root, entity_type, watermark)


def _remove(path: Path) -> None:
    """Remove a folder with all it holds; of a link to one, the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Log that something could not be removed, and go on."""
    try:
        yield
    except (OSError, NotWritable) as error:
        log.warning("%s could not be removed and was left: %s", path, error)
