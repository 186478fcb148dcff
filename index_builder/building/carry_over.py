"""Carry what a release keeps from its parent: entity types not built again, graphs to reuse."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from index_builder.errors import ReleaseCorrupt
from index_builder.releases.manifest import EntityManifest, Manifest
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.releases.verification import hash_files, record_files

log = logging.getLogger(__name__)

_REUSABLE = ("int8-graph", "symqg")
"""Kinds whose links are read from a release."""


class Reusable(NamedTuple):
    """An earlier index whose graph may be carried over, or why there is none."""

    folder: Path | None
    why_not: str = ""
    """A clause for reports; empty where there is a folder."""


def link_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Link files from one folder into another; copy them where links are not possible."""
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, path)
        except OSError:
            shutil.copyfile(source / name, path)


def carry_entity(
    entity_type: str, store: ReleaseStore, parent: str, content: Path
) -> EntityManifest:
    """Take one entity type over from the release ``parent`` unchanged, and check its files.

    Raises:
        ReleaseCorrupt: The files differ from the parent's manifest.
    """
    source = store.path_of(parent)
    manifest = read_manifest(source)
    target = content / entity_type
    prefix = f"{entity_type}/"
    expected = {
        name.removeprefix(prefix): record
        for name, record in manifest.files.items()
        if name.startswith(prefix)
    }
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    link_files(expected, source / entity_type, target)
    if record_files(target) != expected:
        raise ReleaseCorrupt(
            f"{parent}/{entity_type}: the files to take over differ from their manifest; rebuild"
            f" {entity_type} too, or roll back"
        )
    return carried_from(manifest.entities[entity_type], parent)


def carried_from(entity: EntityManifest, parent: str) -> EntityManifest:
    """Return an entity's manifest with the release that its index was first taken over from."""
    return replace(entity, carried_from=entity.carried_from or parent)


def reusable_index(entity_type: str, folder: Path, manifest: Manifest) -> Reusable:
    """Return the folder of a release's index whose graph may be carried over.

    None where the release has no such graph, or where its vectors, codes or links are damaged; with
    the reason.

    Args:
        entity_type: Which.
        folder: Of the release.
        manifest: Of the release.
    """
    entity = manifest.entities.get(entity_type)
    if entity is None:
        return Reusable(None, f"{manifest.release_id} holds no {entity_type} index")
    kind = entity.index.get("kind")
    if kind not in _REUSABLE:
        return Reusable(None, f"links of kind {kind} are not read from a release")
    parts = (f"{entity_type}/index.", f"{entity_type}/vectors.")
    expected = {
        name: file.sha256 for name, file in manifest.files.items() if name.startswith(parts)
    }
    try:
        if hash_files({name: folder / name for name in expected}) == expected:
            return Reusable(folder / entity_type)
        damage = "its files differ from their manifest"
    except OSError as error:
        damage = str(error)
    log.warning(f"{manifest.release_id}/{entity_type}: {damage}; its graph is not carried over")
    return Reusable(None, f"{manifest.release_id} is damaged: {damage}")
