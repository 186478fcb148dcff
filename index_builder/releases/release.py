"""An opened release: one immutable, verified folder with both towers and every entity index."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from index_builder.ann import AnnIndex
from index_builder.errors import ReleaseCorrupt, ReleaseNotFound, UnknownEntityType
from index_builder.fusion.fused_search import FusedIndex
from index_builder.releases.golden import (
    GOLDEN_K,
    GOLDEN_NAME,
    GoldenQueries,
    read_golden,
    replayed_recall,
)
from index_builder.releases.manifest import MANIFEST_NAME, Manifest
from index_builder.releases.verification import check_contents, check_cpu, check_names_and_sizes
from index_builder.search.entity_index import EntityIndex
from index_builder.storage.durable_files import FileLock

BUNDLE_PARTS = ("query_encoder", "entity_encoder", "forms")
REPLAY_SLACK = 0.02
"""How far below the build's own figure the replayed golden recall may be.

Threads and libraries may break ties differently.
"""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What replaying the golden queries of one entity type gave."""

    queries: int
    recall: float
    expected: float


def read_manifest(path: Path, expected_sha256: str | None = None) -> Manifest:
    """Read and check the manifest of the release folder ``path``, nothing else.

    Args:
        path: The release folder.
        expected_sha256: SHA-256 of the manifest as ``CURRENT`` names it; None: not compared.

    Raises:
        ReleaseNotFound: There is no such folder or it holds no manifest.
        ReleaseCorrupt: The manifest does not check, or belongs to another release.
        ReleaseVersionError: A newer engine wrote it.
    """
    try:
        content = (path / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReleaseNotFound(
            f"no release at {path}: expected a folder with {MANIFEST_NAME}. `omni release list`"
            " shows what there is."
        ) from error
    except OSError as error:
        raise ReleaseCorrupt(
            f"{path}/{MANIFEST_NAME}: the file cannot be read ({error.strerror}). Restore the"
            " release or roll back."
        ) from error
    manifest = Manifest.from_bytes(content, path.name)
    if manifest.release_id != path.name:
        raise ReleaseCorrupt(
            f"{path}: the folder should hold release {path.name!r}, but its manifest belongs to"
            f" {manifest.release_id!r}: it was swapped or renamed"
        )
    if expected_sha256 is not None and hashlib.sha256(content).hexdigest() != expected_sha256:
        raise ReleaseCorrupt(
            f"{path}: the manifest is not the one that was activated; restore the release or"
            " activate it again"
        )
    return manifest


class Release:
    """One opened release.

    Searches go through ``release.entities[entity_type]``, fused ones through
    ``release.fused[entity_type]``; close it when no request uses it any more.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        entities: dict[str, EntityIndex],
        lease: FileLock | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.entities = entities
        self.fused = {
            name: FusedIndex.load(path / name, index, entities.get("query"))
            for name, index in entities.items()
        }
        self._lease = lease
        self._golden: dict[str, GoldenQueries] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        verify: bool = True,
        expected_sha256: str | None = None,
        threads: int | None = None,
        lease: FileLock | None = None,
        graphs: Mapping[str, AnnIndex] | None = None,
    ) -> Release:
        """Open a release folder.

        The order is fixed: the manifest's own checksum, format version and name, the CPU's
        features, names and sizes of all files, their SHA-256, and only then do libraries parse
        them.

        Args:
            path: The release folder.
            verify: False skips the SHA-256 of the files (sizes are always compared): only for
                folders this very process has just written.
            expected_sha256: SHA-256 of the manifest that ``CURRENT`` names.
            threads: For hashing; None: one per core, at most 8.
            graphs: ANN indexes by entity type that a parent process loaded from this release
                (``EntityIndex.load_graph``).
            lease: A shared lock that keeps ``gc`` away while the release is open; released by
                ``close``.

        Raises:
            ReleaseNotFound: No such release.
            ReleaseCorrupt: Anything differs from the manifest.
            ReleaseVersionError: A newer engine wrote it.
            UnsupportedCpu: This CPU cannot search its indexes.
        """
        path = Path(path)
        manifest = read_manifest(path, expected_sha256)
        check_cpu(manifest)
        check_names_and_sizes(path, manifest)
        if verify:
            check_contents(path, manifest, threads)
        entities = {}
        for entity_type, entity in manifest.entities.items():
            index = EntityIndex.load(path / entity_type, graph=(graphs or {}).get(entity_type))
            if index.count != entity.count:
                raise ReleaseCorrupt(
                    f"{path.name}/{entity_type}: the manifest counts {entity.count:,} entities, but"
                    f" the index holds {index.count:,}"
                )
            entities[entity_type] = index
        return cls(path, manifest, entities, lease)

    @property
    def release_id(self) -> str:
        """Name of the release."""
        return self.manifest.release_id

    @property
    def space_id(self) -> str:
        """Space of both towers and of every vector inside."""
        return self.manifest.space_id

    @property
    def query_space_id(self) -> str:
        """Space of the query tower: ``space_id``, unless a newer bundle's tower searches here."""
        upgrade = self.manifest.query_upgrade
        return self.space_id if upgrade is None else str(upgrade["space_id"])

    @property
    def query_vectors_id(self) -> str:
        """Name of the query vectors this release makes; those under another name are foreign."""
        upgrade = self.manifest.query_upgrade
        return self.space_id if upgrade is None else str(upgrade["files_id"])

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return self.manifest.dimension

    @property
    def query_encoder_path(self) -> Path:
        """Folder of the query tower (a Sentence-Transformers model)."""
        return self.path / "query_encoder"

    @property
    def forms_path(self) -> Path:
        """Folder of the query tower's export forms; may not exist."""
        return self.path / "forms"

    def entity(self, entity_type: str) -> EntityIndex:
        """Return the index of one entity type.

        Raises:
            UnknownEntityType: The release has none.
        """
        try:
            return self.entities[entity_type]
        except KeyError:
            raise UnknownEntityType(entity_type, list(self.entities)) from None

    def golden(self, entity_type: str) -> GoldenQueries:
        """Return the golden queries of one entity type with their exact answers (read once).

        Raises:
            UnknownEntityType: The release has no such index.
            ReleaseCorrupt: The table cannot be read.
        """
        self.entity(entity_type)
        with self._lock:
            if entity_type not in self._golden:
                self._golden[entity_type] = read_golden(self.path / entity_type / GOLDEN_NAME)
            return self._golden[entity_type]

    def replay_golden(self) -> dict[str, ReplayResult]:
        """Replay every golden query through the indexes as they are served.

        Call it before live entries are attached.

        Returns:
            Measured and expected recall per entity type.

        Raises:
            ReleaseCorrupt: The recall is more than ``REPLAY_SLACK`` below what the build measured,
                or an answer is malformed.
        """
        results = {}
        for entity_type, index in self.entities.items():
            golden = self.golden(entity_type)
            built = self.manifest.entities[entity_type].golden
            k = int(built.get("k", GOLDEN_K))
            answers = [index.search(query, k) for query in golden.vectors] if index.count else []
            recall = replayed_recall(golden, answers)
            expected = float(built.get("recall", 1.0))
            results[entity_type] = ReplayResult(len(answers), recall, expected)
            if recall < expected - REPLAY_SLACK:
                raise ReleaseCorrupt(
                    f"{self.release_id}/{entity_type}: golden queries should answer with ANN"
                    f" recall@{k} of {expected:.3f}, but gave {recall:.3f} on {len(answers)}"
                    " queries. The release is not fit to serve on this machine: roll back, or"
                    " rebuild it here."
                )
        return results

    def close(self) -> None:
        """Let ``gc`` collect this release again."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def __enter__(self) -> Release:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
