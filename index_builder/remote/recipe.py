"""What a store at a URL holds: packs of blocks, and for each release the recipe of its files.

Layout below the URL: ``packs/<sha256>`` (blocks, one after the other), ``releases/<id>`` (a recipe:
the manifest, and for each file where its blocks lie), ``CURRENT`` (as in a local store) and
``garbage`` (``collection.py``). A recipe is one object, written after all it names: a release is
there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass

import numpy as np

from index_builder.errors import ReleaseCorrupt, ReleaseNotFound, ReleaseVersionError
from index_builder.releases.current import CURRENT_NAME, Current, check_release_id
from index_builder.releases.manifest import Manifest
from index_builder.remote.blocks import BLOCK
from index_builder.remote.object_store import ObjectStore

RELEASES = "releases"
PACKS = "packs"
_HEAD = struct.Struct("<8sII")  # magic, version, bytes of the header
_MAGIC = b"OMNIRECI"
_VERSION = 1
_CHECKSUM_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to make the files of a release from packs.

    Attributes:
        content: The bytes of ``manifest.json``.
        manifest: What they say.
        packs: Names of the packs.
        files: Name of a file -> its blocks in order, of type ``BLOCK``.
    """

    content: bytes
    manifest: Manifest
    packs: tuple[str, ...]
    files: dict[str, np.ndarray]

    def to_bytes(self) -> bytes:
        """Serialise, with a checksum at the end."""
        header = json.dumps(
            {
                "manifest": self.content.decode(),
                "packs": self.packs,
                "files": {name: len(blocks) for name, blocks in self.files.items()},
            },
            ensure_ascii=False,
        ).encode()
        parts = [_HEAD.pack(_MAGIC, _VERSION, len(header)), header]
        parts += [blocks.tobytes() for blocks in self.files.values()]
        body = b"".join(parts)
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Recipe:
        """Parse what ``to_bytes`` wrote.

        Raises:
            ReleaseCorrupt: A byte differs, or the blocks do not give the files of the manifest.
            ReleaseVersionError: A newer engine wrote it.
        """
        body, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        if len(body) < _HEAD.size or hashlib.sha256(body).digest() != checksum:
            raise ReleaseCorrupt(
                f"{where}: the recipe was changed or cut ({len(content)} bytes). Push it again."
            )
        magic, version, length = _HEAD.unpack_from(body)
        if magic == _MAGIC and version > _VERSION:
            raise ReleaseVersionError(
                f"{where}: this engine reads recipes of version {_VERSION}, but got {version}."
                " Install the engine that pushed it."
            )
        try:
            header = json.loads(body[_HEAD.size : _HEAD.size + length])
            text = header["manifest"].encode()
            files = {}
            offset = _HEAD.size + length
            for name, count in header["files"].items():
                files[name] = np.frombuffer(body, BLOCK, count, offset)
                offset += count * BLOCK.itemsize
            packs = tuple(header["packs"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReleaseCorrupt(f"{where}: the recipe has another shape: {error}") from error
        recipe = cls(
            content=text, manifest=Manifest.from_bytes(text, where), packs=packs, files=files
        )
        recipe.check(where)
        return recipe

    def check(self, where: str) -> None:
        """Compare files and sizes with the manifest.

        Raises:
            ReleaseCorrupt: They differ.
        """
        sizes = {name: int(blocks["length"].sum()) for name, blocks in self.files.items()}
        expected = {name: record.size_bytes for name, record in self.manifest.files.items()}
        last_pack = max((int(b["pack"].max()) for b in self.files.values() if len(b)), default=-1)
        if sizes != expected or last_pack >= len(self.packs):
            raise ReleaseCorrupt(
                f"{where}: the recipe does not give the files of its manifest. Push it again."
            )


def read_recipe(remote: ObjectStore, release_id: str) -> Recipe:
    """Read the recipe of a release.

    Raises:
        ReleaseNotFound: There is no such release at the URL.
        ReleaseCorrupt: It is damaged, or belongs to another release.
        RemoteUnreachable: The store does not answer.
    """
    where = f"{remote.url}/{RELEASES}/{check_release_id(release_id)}"
    try:
        content = remote.get(f"{RELEASES}/{release_id}")
    except FileNotFoundError as error:
        raise ReleaseNotFound(
            f"no release {release_id!r} at {remote.url}; push it with `omni release push`, or see"
            f" what is there with `omni release list --store {remote.url}`"
        ) from error
    recipe = Recipe.from_bytes(content, where)
    if recipe.manifest.release_id != release_id:
        raise ReleaseCorrupt(f"{where} holds the release {recipe.manifest.release_id!r}")
    return recipe


def read_current(remote: ObjectStore) -> Current | None:
    """Read which release is active at the URL; None: none was ever.

    Raises:
        ReleaseCorrupt: ``CURRENT`` was damaged.
        RemoteUnreachable: The store does not answer.
    """
    try:
        content = remote.get(CURRENT_NAME)
    except FileNotFoundError:
        return None
    return Current.from_bytes(content, remote.url)
