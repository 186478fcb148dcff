"""Carry what a release keeps from its parent: link or copy the files of entity types that are not rebuilt."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from index_builder.errors import ReleaseCorrupt
from index_builder.releases.manifest import EntityManifest
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.releases.verification import record_files


def _carry(entity_type: str, store: ReleaseStore, parent: str, content: Path) -> EntityManifest:
    source = store.path_of(parent)
    manifest = read_manifest(source)
    target = content / entity_type
    shutil.rmtree(target, ignore_errors=True)
    for name in manifest.files:
        if name.startswith(f"{entity_type}/"):
            path = content / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / name, path)
            except OSError:
                shutil.copyfile(source / name, path)
    entity = manifest.entities[entity_type]
    found = record_files(target)
    expected = {
        name[len(entity_type) + 1 :]: record
        for name, record in manifest.files.items()
        if name.startswith(f"{entity_type}/")
    }
    if found != expected:
        raise ReleaseCorrupt(
            f"{parent}/{entity_type}: the files to take over differ from their manifest; rebuild"
            f" {entity_type} too, or roll back"
        )
    return replace(entity, carried_from=entity.carried_from or parent)
