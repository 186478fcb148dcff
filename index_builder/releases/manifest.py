"""The manifest of a release: its contents, space id, and the checksum of every file and itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from index_builder.errors import ReleaseCorrupt, ReleaseVersionError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PUBLISH_NUMBER = "publish_number"
"""Name in ``measured``: how many releases the store had published, this one included."""
_ZERO = "0" * 64
_CHECKSUM = re.compile(r'^  "checksum": "([0-9a-f]{64})"', re.MULTILINE)
_HEX64 = re.compile(r"[0-9a-f]{64}")
_ENTITY_TYPE = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_-]{0,63}")
"""Names that are safe as a folder's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a release."""

    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if self.size_bytes < 0 or not _HEX64.fullmatch(self.sha256):
            raise ReleaseCorrupt(
                "a file record must hold a size and 64 hexadecimal digits, but got"
                f" {self.size_bytes} and {self.sha256[:70]!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EntityManifest:
    """One entity type of a release.

    Attributes:
        count: Entities in the base index.
        watermark: Sequence of the last live-log entry that the base already contains.
        index: What ``EntityIndex.describe`` said: kind, parameters, why, CPU features.
        cpu_features: Flags (as in ``/proc/cpuinfo``) without which the index cannot be searched.
        calibration: ANN recall@10 with its interval and the ef curve (no times); None for exact
            indexes of tiny corpora.
        golden: Number, kind (``real queries`` or ``perturbed entities``) and ``k`` of the golden
            queries, and the recall that the build measured on them.
        built_from: Fingerprint of the vectors, ids and attributes that went in.
        carried_from: Release that this entity type was taken over from unchanged, else None.
    """

    count: int
    watermark: int
    index: dict[str, Any]
    cpu_features: tuple[str, ...] = ()
    calibration: dict[str, Any] | None = None
    golden: dict[str, Any] = field(default_factory=dict)
    built_from: str = ""
    carried_from: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a release says about itself.

    Attributes:
        release_id: Name of the folder.
        parent: Release that was active when this one was built, or None.
        code_version: Version of the distribution that built it.
        space_id: Space of both towers and of every vector inside.
        dimension: Length of the vectors.
        entities: By entity type.
        files: Relative path -> size and SHA-256, every file but the manifest.
        forms: Export form -> parity report against the trained tower.
        deterministic: Whether the build promises identical bytes for identical input.
        seed: Seed of the build.
        query_upgrade: Where the query tower is a newer bundle's than the vectors'
            (``index_builder.building.query_upgrade``): that bundle's ``space_id``, its ``adapter``
            or None, the ``measured`` recall, and ``files_id``, which names the vectors that this
            tower makes.
        measured: The only part that depends on the run: times, latencies, peak memory.
        format_version: Version of the layout.
    """

    release_id: str
    parent: str | None
    code_version: str
    space_id: str
    dimension: int
    entities: dict[str, EntityManifest]
    files: dict[str, FileRecord]
    forms: dict[str, dict[str, Any]] = field(default_factory=dict)
    deterministic: bool = False
    seed: int = 0
    query_upgrade: dict[str, Any] | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """Serialise in the one canonical form, with the checksum of the text inside.

        Its own 64 digits are taken as zeros.
        """
        values = {"checksum": _ZERO, **asdict(self)}
        text = json.dumps(values, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
        text += "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()
        return text.replace(f'  "checksum": "{_ZERO}"', f'  "checksum": "{digest}"', 1).encode()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Manifest:
        """Parse and check a manifest.

        Args:
            content: The bytes of ``manifest.json``.
            where: Path or release id, for messages.

        Raises:
            ReleaseCorrupt: Not a manifest, or one byte differs from what was written.
            ReleaseVersionError: Written by a newer version of the engine.
        """
        text = _checked_text(content, where)
        try:
            values: Any = json.loads(text)
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise ReleaseVersionError(
                    f"{where}: this engine reads release format {FORMAT_VERSION}, but the release"
                    f" is format {version}. Install the engine that wrote it (pip install -U"
                    " omnisearchsage), or rebuild the release with this one."
                )
            del values["checksum"]
            values["files"] = {
                name: FileRecord(**record) for name, record in values["files"].items()
            }
            values["entities"] = {
                name: EntityManifest(**{**entity, "cpu_features": tuple(entity["cpu_features"])})
                for name, entity in values["entities"].items()
            }
            _check_names(values["entities"], where)
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReleaseCorrupt(
                f"{where}: manifest.json does not have the shape of format {FORMAT_VERSION}:"
                f" {error}"
            ) from error

    def total_bytes(self) -> int:
        """Return the bytes of all files of the release, without the manifest."""
        return sum(record.size_bytes for record in self.files.values())


def publish_number(manifest: Manifest) -> int:
    """Return the number of a release; 0 for one of an earlier version."""
    number = manifest.measured.get(PUBLISH_NUMBER, 0)
    return number if isinstance(number, int) else 0


def _check_names(entity_types: Iterable[str], where: str) -> None:
    """Refuse names of entity types that are no plain folder names, before they become paths.

    Raises:
        ReleaseCorrupt: Such a name.
    """
    for name in entity_types:
        if not _ENTITY_TYPE.fullmatch(name):
            raise ReleaseCorrupt(
                f"{where}: manifest.json names the entity type {name[:80]!r}; expected letters,"
                " digits, '_' and '-'. Restore the release or roll back."
            )


def _checked_text(content: bytes, where: str) -> str:
    """Decode a manifest and compare its checksum.

    Raises:
        ReleaseCorrupt: Not a manifest, or one byte differs from what was written.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ReleaseCorrupt(
            f"{where}: manifest.json is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    found = _CHECKSUM.search(text)
    if found is None:
        raise ReleaseCorrupt(
            f"{where}: manifest.json holds no checksum; it is not a manifest or was cut off"
            f" ({len(content)} bytes)"
        )
    blank = text[: found.start(1)] + _ZERO + text[found.end(1) :]
    digest = hashlib.sha256(blank.encode()).hexdigest()
    if digest != found.group(1):
        raise ReleaseCorrupt(
            f"{where}: manifest.json should have checksum {found.group(1)[:16]}, but its text"
            f" gives {digest[:16]}: it was changed after publishing"
        )
    return text


def content_digest(files: Mapping[str, FileRecord]) -> str:
    """Return SHA-256 over names and checksums of all files: releases that share it are the same."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{files[name].size_bytes}\0{files[name].sha256}\n".encode())
    return digest.hexdigest()
