"""Declare that a newer query tower may search vectors of an older space (no backfill).

A declaration is an entry of ``compatible`` in the new bundle's ``space.json``; a learned adapter
is a file in ``compatibility/``. Neither is in the space id, for both towers still write the same
vectors; an adapter is guarded by the SHA-256 in its entry instead.

```
space.json       "compatible": [{"space_id": OLD, "dimension": 256, "measured": {...},
                                 "adapter": {"file", "sha256", "rank", ...} or null}]
compatibility/   adapters, safetensors
```
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.compatibility.adapter import SpaceAdapter
from encoders.errors import BundleError, SpaceMismatch
from encoders.file_modes import follow_umask
from encoders.towers.bundle import QUERY_UPGRADE, check_space_id, compute_space_id, read_space
from encoders.towers.query_tower import QueryEncoder

FOLDER = "compatibility"
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Declaration:
    """The statement that queries of one space may search vectors of another, with measured recall.

    Attributes:
        space_id: The older space, of the vectors that are searched.
        dimension: Width of those vectors.
        adapter: ``file``, ``sha256``, ``rank`` and how it was learned; None: query vectors search
            as they are.
        measured: What ``omni evaluate --against-index`` found, by entity type.
    """

    space_id: str
    dimension: int
    adapter: dict[str, Any] | None
    measured: dict[str, Any]


def read_declarations(bundle: Path) -> list[Declaration]:
    """Read the older spaces that a bundle declares itself compatible with.

    Raises:
        BundleError: ``space.json`` is missing or a declaration has not the expected shape.
    """
    entries = read_space(bundle).get("compatible", [])
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        try:
            adapter = entry["adapter"]
            declaration = Declaration(
                str(entry["space_id"]), int(entry["dimension"]), adapter, dict(entry["measured"])
            )
            fits = bool(_HEX64.fullmatch(declaration.space_id)) and declaration.dimension > 0
            if adapter is not None:
                fits &= Path(adapter["file"]).name == adapter["file"]
                fits &= bool(_HEX64.fullmatch(adapter["sha256"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{bundle}/space.json: a declaration of compatibility is damaged ({error!r})."
                " Declare it again."
            ) from error
        if not fits:
            raise BundleError(
                f"{bundle}/space.json: a declaration of compatibility is damaged"
                f" ({str(entry)[:120]}). Declare it again."
            )
        found.append(declaration)
    return found


def require_declaration(bundle: Path, space_id: str, where: str) -> Declaration:
    """Return the declaration that lets a bundle's queries search vectors of ``space_id``.

    Raises:
        SpaceMismatch: There is none.
        BundleError: As ``read_declarations``.
    """
    for declaration in read_declarations(bundle):
        if declaration.space_id == space_id:
            return declaration
    raise SpaceMismatch(
        space_id,
        str(read_space(bundle)["space_id"]),
        f"{where}: {bundle.name} declares no compatibility with it",
    )


def load_adapter(bundle: Path, declaration: Declaration) -> SpaceAdapter | None:
    """Load the adapter of a declaration; None where vectors search as they are.

    Raises:
        BundleError: The file is missing, was changed, or does not map this bundle's vectors to the
            older space.
    """
    dimension = int(read_space(bundle)["dimension"])
    if declaration.adapter is None:
        if dimension != declaration.dimension:
            raise BundleError(
                f"{bundle}: vectors of {dimension} numbers cannot search vectors of"
                f" {declaration.dimension} without an adapter. Declare the compatibility again with"
                " an adapter."
            )
        return None
    path = bundle / FOLDER / declaration.adapter["file"]
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BundleError(
            f"{path}: the adapter cannot be read ({error.strerror}). Copy the bundle again."
        ) from error
    if digest != declaration.adapter["sha256"]:
        raise BundleError(
            f"{path}: expected SHA-256 {declaration.adapter['sha256'][:16]}, but the file has"
            f" {digest[:16]}: it was changed or cut short after it was declared. Copy the bundle"
            " again."
        )
    return SpaceAdapter.load(path, (declaration.dimension, dimension))


def declare(
    bundle: Path,
    space_id: str,
    dimension: int,
    adapter: SpaceAdapter | None,
    measured: Mapping[str, Any],
    learned: Mapping[str, Any] | None = None,
) -> Declaration:
    """Write a declaration into a bundle; one about the same space is replaced.

    A kill at any moment leaves the old or the new one.

    Args:
        bundle: The newer bundle.
        space_id: The older space.
        dimension: Its width.
        adapter: What its queries go through; None: nothing.
        measured: Recall by entity type.
        learned: How the adapter was learned, recorded beside it.

    Raises:
        BundleError: The space is the bundle's own.
    """
    space = read_space(bundle)
    if space["space_id"] == space_id:
        raise BundleError(
            f"{bundle}: space {space_id[:16]} is this bundle's own; there is nothing to declare."
        )
    about = None
    if adapter is not None:
        about = {**_save_adapter(bundle / FOLDER, adapter, space_id[:16]), **(learned or {})}
    entry = {
        "space_id": space_id,
        "dimension": dimension,
        "adapter": about,
        "measured": dict(measured),
    }
    others = [other for other in space.get("compatible", []) if other["space_id"] != space_id]
    _write_atomically(bundle / "space.json", {**space, "compatible": [*others, entry]})
    declared = read_declarations(bundle)
    named = {d.adapter["file"] for d in declared if d.adapter}
    for path in (bundle / FOLDER).glob("*"):
        if path.name not in named:
            path.unlink()
    return next(d for d in declared if d.space_id == space_id)


def _save_adapter(folder: Path, adapter: SpaceAdapter, prefix: str) -> dict[str, Any]:
    """Write an adapter under a name that holds its hash; returns its part of a declaration."""
    folder.mkdir(exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=folder, prefix=".adapter-")
    os.close(handle)
    adapter.save(Path(scratch))
    digest = hashlib.sha256(Path(scratch).read_bytes()).hexdigest()
    name = f"{prefix}-{digest[:16]}.safetensors"
    follow_umask(Path(scratch))
    os.replace(scratch, folder / name)
    return {"file": name, "sha256": digest, "rank": adapter.rank}


def write_upgraded_bundle(old: Path, new: Path, target: Path) -> Declaration:
    """Write a bundle of the older space with the newer query tower, adapter folded in.

    ``space.json`` keeps the older space id (entities are embedded as before) and names under
    ``query_upgrade`` the space of the query tower, the measured recall, and ``files_id``, the
    checksum of both towers' files that loading checks.

    Args:
        old: Bundle (or release) of the space that is searched.
        new: Bundle that declares itself compatible with it.
        target: Folder to write the parts into; export forms are left to the caller.

    Raises:
        SpaceMismatch: ``new`` declares no compatibility with the space of ``old``.
        BundleError: Either bundle or the adapter is damaged.
    """
    old_space = read_space(old)
    declaration = require_declaration(new, str(old_space["space_id"]), str(old))
    adapter = load_adapter(new, declaration)
    new_space = check_space_id(new)
    newest = QueryEncoder.load(new / "query_encoder")
    tower = newest if adapter is None else adapter.fold(newest)
    for part in ("query_encoder", "entity_encoder"):
        shutil.rmtree(target / part, ignore_errors=True)
    tower.save(target / "query_encoder")
    shutil.copytree(old / "entity_encoder", target / "entity_encoder")
    shutil.copyfile(old / "config.json", target / "config.json")
    upgrade = {
        "space_id": new_space,
        "adapter": declaration.adapter,
        "measured": declaration.measured,
        "files_id": compute_space_id(target),
    }
    _write_atomically(
        target / "space.json", {**old_space, "compatible": [], QUERY_UPGRADE: upgrade}
    )
    return declaration


def _write_atomically(path: Path, value: Mapping[str, Any]) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        follow_umask(Path(scratch))
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
