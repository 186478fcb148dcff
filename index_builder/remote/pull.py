"""Pulling a release from a URL: only blocks that no local release holds go over the network."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from index_builder.errors import ReleaseCorrupt, ReleaseError, ReleaseNotFound
from index_builder.releases.manifest import FileRecord
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.releases.verification import check_contents, sha256_of
from index_builder.remote.blocks import (
    BLOCK,
    by_digest,
    cut_blocks,
    digest_of,
    find_blocks,
    map_file,
)
from index_builder.remote.object_store import ObjectStore
from index_builder.remote.push import Moved
from index_builder.remote.recipe import PACKS, Recipe, read_current, read_recipe
from index_builder.storage.durable_files import disk_full_is_clear

RANGE_BYTES = 8 * 2**20
"""Most bytes of a request for blocks that lie one behind the other."""
GAP_BYTES = 16 * 2**10
"""Bytes between two wanted blocks that cost less to read than another request does."""
REQUESTS = 8
"""At the same time."""
_PART = ".part"


_WANTED = np.dtype([*BLOCK.descr, ("file", "<u4"), ("position", "<u8")])
"""A block to fetch, the number of the file that needs it, and where it goes there."""


def pull_release(
    store: ReleaseStore,
    remote: ObjectStore,
    release_id: str | None = None,
    *,
    activate: bool = True,
) -> Moved:
    """Pull a release, check every byte, publish it; a killed pull goes on where it stopped.

    Args:
        store: Where it goes; its other releases give the blocks that they share.
        remote: Where it is.
        release_id: Which; None: the one that is active there.
        activate: Make it the active release here.

    Raises:
        ReleaseNotFound: It is not there, or none is active there.
        ReleaseCorrupt: What came is not what was pushed; nothing was published.
        PublisherBusy: There is another release of that id here, or somebody builds here.
        RemoteUnreachable: The URL does not answer; what was active here stays.
        DiskFull: No room.
    """
    recipe = _wanted_recipe(remote, release_id)
    manifest = recipe.manifest
    moved = 0
    with store.lock("build"):
        if not _is_here(store, recipe):
            staging = store.staging(f"pull-{manifest.release_id}")
            for other in store.releases.glob(".staging-pull-*"):
                if other != staging:  # else what is wanted no more takes the room
                    shutil.rmtree(other, ignore_errors=True)
            with disk_full_is_clear("pulling the release", store.releases):
                moved = _fill(staging, recipe, store, remote)
            try:
                check_contents(staging, manifest)
                store.adopt(staging, recipe.content, activate=False)
            except ReleaseCorrupt:
                shutil.rmtree(staging, ignore_errors=True)  # else it would be kept and fail again
                raise
        if activate:
            store.activate(manifest.release_id, verify=False)
    return Moved(
        release_id=manifest.release_id,
        total_bytes=manifest.total_bytes(),
        moved_bytes=moved,
        active=activate,
    )


def _wanted_recipe(remote: ObjectStore, release_id: str | None) -> Recipe:
    """Read the recipe of a release, or of the active one as ``CURRENT`` names it."""
    if release_id is not None:
        return read_recipe(remote, release_id)
    current = read_current(remote)
    if current is None:
        raise ReleaseNotFound(
            f"no release is active at {remote.url}: push one with `omni release push`"
        )
    recipe = read_recipe(remote, current.release_id)
    if hashlib.sha256(recipe.content).hexdigest() != current.manifest_sha256:
        raise ReleaseCorrupt(
            f"{remote.url}: release {current.release_id} is not the one that was activated there;"
            " push it again"
        )
    return recipe


def _is_here(store: ReleaseStore, recipe: Recipe) -> bool:
    """Return whether the store has this release, whole."""
    release_id = recipe.manifest.release_id
    with suppress(ReleaseNotFound):
        if read_manifest(store.path_of(release_id)).files == recipe.manifest.files:
            store.verify(release_id)
            return True
    return False


def _fill(staging: Path, recipe: Recipe, store: ReleaseStore, remote: ObjectStore) -> int:
    """Make all files of a release in its staging folder; return the bytes that were fetched."""
    _remove_others(staging, recipe)
    base = _Base(store)
    names = list(recipe.files)
    wanted = [np.empty(0, _WANTED)]
    for number, name in enumerate(names):
        path = staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or base.link(recipe.manifest.files[name], path):
            continue
        missing = _fill_part(_part_of(path), recipe.files[name], base.content(name))
        missing["file"] = number
        wanted.append(missing)
    parts = [_part_of(staging / name) for name in names]
    moved = _fetch(np.concatenate(wanted), recipe.packs, parts, remote)
    for name, part in zip(names, parts):
        if part.exists():
            os.replace(part, staging / name)
    return moved


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _remove_others(staging: Path, recipe: Recipe) -> None:
    """Remove what an earlier pull has left under the names of other files."""
    expected = {staging / name for name in recipe.manifest.files}
    expected |= {_part_of(path) for path in expected}
    for path in list(staging.rglob("*")):
        if not path.is_dir() and path not in expected:
            path.unlink()


class _Base:
    """What local releases hold: whole files by their checksum, others by name in the newest.

    Args:
        store: Whose releases.
    """

    def __init__(self, store: ReleaseStore) -> None:
        self._whole: dict[FileRecord, Path] = {}
        self._newest: dict[str, Path] = {}
        active = None
        with suppress(ReleaseError):
            active = store.current()
        ids = [name for name in store.ids() if name != active]
        for release_id in [*ids, *([] if active is None else [active])]:
            with suppress(ReleaseError):
                folder = store.path_of(release_id)
                for name, record in read_manifest(folder).files.items():
                    self._whole[record] = self._newest[name] = folder / name

    def link(self, record: FileRecord, target: Path) -> bool:
        """Link a file that is here already; False if it is not, or is damaged."""
        source = self._whole.get(record)
        try:
            if source is None or sha256_of(source) != record.sha256:
                return False
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
        except FileNotFoundError:  # collected meanwhile
            return False
        return True

    def content(self, name: str) -> np.ndarray:
        """Map the file of that name in the newest release; empty if there is none."""
        path = self._newest.get(name)
        try:
            return np.empty(0, np.uint8) if path is None else map_file(path)
        except FileNotFoundError:  # collected meanwhile
            return np.empty(0, np.uint8)


def _fill_part(part: Path, blocks: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Put blocks that are here into the part of a file; return those that it lacks then.

    Args:
        part: What an earlier pull has written of it stays, where it is right.
        blocks: Of the file.
        base: A file that may share blocks, uint8 ``(bytes,)``.

    Returns:
        Blocks of type ``_WANTED``, whose file is not set.
    """
    ends = np.cumsum(blocks["length"], dtype=np.int64)
    starts = ends - blocks["length"]
    size = int(ends[-1]) if len(ends) else 0
    lacks = np.ones(len(blocks), bool)
    if part.exists() and part.stat().st_size == size:
        before = map_file(part)
        digests = [digest_of(before[start:end].data) for start, end in zip(starts, ends)]
        lacks = blocks["digest"] != np.array(digests, "S16")
        del before
    local = by_digest(cut_blocks(base))
    with open(part, "r+b" if part.exists() else "wb") as file:
        file.truncate(size)
        rows = np.flatnonzero(lacks)
        found, places = find_blocks(local, blocks["digest"][rows])
        for row, place in zip(rows[found].tolist(), places.tolist()):
            begin = int(local["offset"][place])
            file.seek(int(starts[row]))
            file.write(base[begin : begin + int(local["length"][place])].data)
    wanted = np.zeros(int((~found).sum()), _WANTED)
    for name in BLOCK.names or ():
        wanted[name] = blocks[name][rows[~found]]
    wanted["position"] = starts[rows[~found]]
    return wanted


def _fetch(
    wanted: np.ndarray, packs: Sequence[str], parts: Sequence[Path], remote: ObjectStore
) -> int:
    """Fetch blocks in few requests, check them and write them; return the bytes that came."""
    wanted = wanted[np.lexsort((wanted["offset"], wanted["pack"]))]
    with _opened(parts, np.unique(wanted["file"]).tolist()) as files:

        def fetch(blocks: np.ndarray) -> int:
            first, last = int(blocks["offset"][0]), blocks[-1]
            name = packs[blocks["pack"][0]]
            try:
                content = remote.get(
                    f"{PACKS}/{name}", first, int(last["offset"]) + int(last["length"])
                )
            except FileNotFoundError as error:
                raise ReleaseCorrupt(
                    f"{remote.url}: the pack {name} is gone; push the release again"
                ) from error
            for block in blocks:
                start = int(block["offset"]) - first
                piece = content[start : start + int(block["length"])]
                # numpy leaves zeros at the end of bytes out
                if digest_of(piece).rstrip(b"\0") != block["digest"]:
                    raise ReleaseCorrupt(
                        f"{remote.url}/{PACKS}/{name}: the bytes from {block['offset']:,} on are"
                        " not the block that the release needs. Nothing was published; push the"
                        " release again."
                    )
                os.pwrite(files[int(block["file"])], piece, int(block["position"]))
            return len(content)

        with ThreadPoolExecutor(REQUESTS) as pool:
            try:
                return sum(pool.map(fetch, _ranges(wanted)))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


@contextmanager
def _opened(parts: Sequence[Path], numbers: Sequence[int]) -> Iterator[dict[int, int]]:
    """Open parts of files for writing; gives their descriptors by number."""
    with ExitStack() as closing:
        opened = {}
        for number in numbers:
            opened[number] = os.open(parts[number], os.O_RDWR | os.O_CLOEXEC)
            closing.callback(os.close, opened[number])
        yield opened


def _ranges(wanted: np.ndarray) -> list[np.ndarray]:
    """Group sorted blocks of one pack that lie together, up to ``RANGE_BYTES``."""
    ranges = []
    begin = 0
    ends = (wanted["offset"] + wanted["length"]).tolist()
    offsets, packs = wanted["offset"].tolist(), wanted["pack"].tolist()
    for row in range(1, len(wanted) + 1):
        if (
            row == len(wanted)
            or packs[row] != packs[begin]
            or offsets[row] - ends[row - 1] > GAP_BYTES
            or ends[row] - offsets[begin] > RANGE_BYTES
        ):
            ranges.append(wanted[begin:row])
            begin = row
    return ranges
