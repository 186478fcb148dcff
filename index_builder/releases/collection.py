"""Removing what a store no longer needs: releases, unfinished builds, folded live-log files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from index_builder.live_log.maintenance import collect_files
from index_builder.releases.current import CURRENT_NAME
from index_builder.releases.manifest import Manifest
from index_builder.storage.durable_files import FileLock, fsync_folder


def remove_release(releases: Path, release_id: str, lease: FileLock, dry_run: bool) -> bool:
    """Remove a release; False where some process has it open."""
    if not lease.acquire():
        return False
    try:
        if not dry_run:
            trash = releases / f".trash-{release_id}"
            os.rename(releases / release_id, trash)
            fsync_folder(releases)
            shutil.rmtree(trash)
            lease.path.unlink(missing_ok=True)
    finally:
        lease.release()
    return True


def empty_trash(releases: Path) -> None:
    """Remove what killed collections had moved away."""
    for path in releases.glob(".trash-*"):
        shutil.rmtree(path)


def remove_leftovers(releases: Path, build_lock: FileLock) -> None:
    """Remove what killed processes left unfinished; builds only while nobody builds."""
    for path in releases.glob(f".{CURRENT_NAME}.*.tmp"):
        path.unlink(missing_ok=True)
    if build_lock.acquire():
        try:
            for path in releases.glob(".staging-*"):
                shutil.rmtree(path)
        finally:
            build_lock.release()


def remove_folded_log(live_root: Path, manifests: Iterable[Manifest]) -> None:
    """Remove live-log files whose entries all releases contain."""
    watermarks: dict[str, int] = {}
    for manifest in manifests:
        for entity_type, entity in manifest.entities.items():
            known = watermarks.get(entity_type, entity.watermark)
            watermarks[entity_type] = min(entity.watermark, known)
    for entity_type, watermark in watermarks.items():
        collect_files(live_root, entity_type, watermark)
