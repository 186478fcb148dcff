"""Pushing a release to a URL: blocks that are not there yet, then the recipe, then ``CURRENT``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from index_builder.errors import PublisherBusy, ReleaseError
from index_builder.releases.current import CURRENT_NAME, HISTORY_LENGTH, Current
from index_builder.releases.manifest import MANIFEST_NAME, FileRecord, Manifest
from index_builder.releases.store import ReleaseStore
from index_builder.remote.blocks import BLOCK, by_digest, cut_blocks, find_blocks, map_file
from index_builder.remote.object_store import ObjectStore
from index_builder.remote.recipe import PACKS, RELEASES, Recipe, read_current, read_recipe

PACK_BYTES = 32 * 2**20
"""A pack is uploaded when it has grown to this: few requests, and little to send again."""
_COMPARED = 3
"""Releases at the URL whose blocks are used again: the active one and those before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What a push or a pull has done.

    Attributes:
        release_id: Of the release.
        total_bytes: Of all its files.
        moved_bytes: Of blocks that went over the network; recipes are not counted.
        active: Whether it is the active release there now.
    """

    release_id: str
    total_bytes: int
    moved_bytes: int
    active: bool


def push_release(
    store: ReleaseStore, release_id: str, remote: ObjectStore, *, activate: bool = True
) -> Moved:
    """Check every byte of a release and push it; what a killed push has uploaded is used again.

    Args:
        store: Where it is published.
        release_id: Which.
        remote: Where it goes.
        activate: Make it the active release there, too.

    Raises:
        ReleaseCorrupt: The release here, or one there, is damaged.
        PublisherBusy: There is another release of that id at the URL.
        RemoteUnreachable: The URL does not answer; what was active there stays.
    """
    with store.held(release_id) as folder:
        manifest = store.verify(release_id)
        content = (folder / MANIFEST_NAME).read_bytes()
        packer = _Packer(remote)
        recipe = _already_there(remote, manifest)
        if recipe is None:
            for other in _compared(remote, manifest.parent):
                packer.learn(other)
            recipe = packer.pack(folder, manifest, content)
            _require_packs(remote, recipe.packs)
            remote.put(f"{RELEASES}/{release_id}", recipe.to_bytes())
    if activate:
        _set_current(remote, release_id, recipe.content)
    return Moved(
        release_id=release_id,
        total_bytes=manifest.total_bytes(),
        moved_bytes=packer.moved_bytes,
        active=activate,
    )


def _already_there(remote: ObjectStore, manifest: Manifest) -> Recipe | None:
    """Return the recipe of this release, if the URL has it.

    Raises:
        PublisherBusy: It has another one of that id.
    """
    if manifest.release_id not in remote.sizes(RELEASES):
        return None
    recipe = read_recipe(remote, manifest.release_id)
    if recipe.manifest.files != manifest.files:
        raise PublisherBusy(
            f"{remote.url} has a release {manifest.release_id!r} with other content; choose another"
            " --release-id when you build"
        )
    return recipe


def _compared(remote: ObjectStore, parent: str | None) -> Iterable[Recipe]:
    """Yield the recipes whose blocks are used again: of what is active, was active, the parent."""
    current = read_current(remote)
    ids = [] if current is None else [current.release_id, *current.history]
    names = dict.fromkeys([*([] if parent is None else [parent]), *ids])
    there = remote.sizes(RELEASES)
    for release_id in [name for name in names if name in there][:_COMPARED]:
        with suppress(ReleaseError):  # a damaged one is not used; its release is no worse for it
            yield read_recipe(remote, release_id)


def _require_packs(remote: ObjectStore, packs: Iterable[str]) -> None:
    there = remote.sizes(PACKS)
    if gone := [name for name in packs if name not in there]:
        raise PublisherBusy(
            f"{remote.url}: {len(gone)} packs that this release uses were collected while it was"
            " pushed. Nothing was published; run it again."
        )


def _set_current(remote: ObjectStore, release_id: str, content: bytes) -> None:
    before = None
    with suppress(ReleaseError):  # naming a release again repairs a damaged CURRENT
        before = read_current(remote)
    earlier = [] if before is None else [before.release_id, *before.history]
    current = Current(
        release_id=release_id,
        manifest_sha256=hashlib.sha256(content).hexdigest(),
        activated=datetime.now(UTC).isoformat(timespec="milliseconds"),
        history=tuple(name for name in dict.fromkeys(earlier) if name != release_id)[
            :HISTORY_LENGTH
        ],
    )
    remote.put(CURRENT_NAME, current.to_bytes())


class _Packer:
    """Cuts files, finds their blocks in known packs, and packs the others.

    Args:
        remote: Where packs go.

    Attributes:
        moved_bytes: Of the packs that were uploaded.
    """

    def __init__(self, remote: ObjectStore) -> None:
        self.moved_bytes = 0
        self._remote = remote
        self._names: list[str] = []  # of packs, by their number here
        self._files: dict[FileRecord, np.ndarray] = {}  # that known recipes make
        self._known = np.empty(0, BLOCK)  # their blocks, sorted by digest
        self._new: dict[bytes, tuple[int, int]] = {}  # digest -> pack, offset
        self._waiting = bytearray()  # a pack that grows; its number is the last one

    def learn(self, recipe: Recipe) -> None:
        """Use the blocks of a release again."""
        first = len(self._names)
        self._names += recipe.packs
        for name, blocks in recipe.files.items():
            renumbered = blocks.copy()
            renumbered["pack"] += first
            self._files.setdefault(recipe.manifest.files[name], renumbered)
        self._known = by_digest(np.concatenate(list(self._files.values())))

    def pack(self, folder: Path, manifest: Manifest, content: bytes) -> Recipe:
        """Upload what is new of a release; return its recipe."""
        uploaded = self._remote.sizes(PACKS)
        files: dict[str, np.ndarray] = {}
        for name, record in sorted(manifest.files.items()):
            known = self._files.get(record)
            if known is None:
                files[name] = self._cut(folder / name, uploaded)
            else:
                files[name] = known.copy()
        self._flush(uploaded)
        used = np.unique(np.concatenate([blocks["pack"] for blocks in files.values()]))
        for blocks in files.values():
            blocks["pack"] = np.searchsorted(used, blocks["pack"])
        packs = tuple(self._names[number] for number in used.tolist())
        return Recipe(content=content, manifest=manifest, packs=packs, files=files)

    def _cut(self, path: Path, uploaded: Mapping[str, int]) -> np.ndarray:
        """Cut a file and pack the blocks that are new; return all of them."""
        content = map_file(path)
        blocks = cut_blocks(content)
        starts = blocks["offset"].copy()
        found, places = find_blocks(self._known, blocks["digest"])
        for name in ("pack", "offset"):
            blocks[name][found] = self._known[name][places]
        for row in np.flatnonzero(~found).tolist():
            digest = bytes(blocks["digest"][row])
            if digest not in self._new:
                start, length = int(starts[row]), int(blocks["length"][row])
                block = content[start : start + length].tobytes()
                self._new[digest] = self._append(block, uploaded)
            blocks["pack"][row], blocks["offset"][row] = self._new[digest]
        return blocks

    def _append(self, block: bytes, uploaded: Mapping[str, int]) -> tuple[int, int]:
        """Put a block into the pack that waits; return its pack and offset."""
        if len(self._waiting) >= PACK_BYTES:
            self._flush(uploaded)
        if not self._waiting:
            self._names.append("")
        offset = len(self._waiting)
        self._waiting += block
        return len(self._names) - 1, offset

    def _flush(self, uploaded: Mapping[str, int]) -> None:
        """Upload the pack that waits, if it is not there, under the name its content gives it."""
        if not self._waiting:
            return
        content = bytes(self._waiting)
        self._waiting.clear()
        name = self._names[-1] = hashlib.sha256(content).hexdigest()
        if uploaded.get(name) != len(content):
            self._remote.put(f"{PACKS}/{name}", content)
            self.moved_bytes += len(content)
