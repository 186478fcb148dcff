"""Build a release: index each entity type, prove it, publish; interrupted builds are resumed."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from index_builder.building.carry_over import Reusable, carry_entity, reusable_index
from index_builder.building.entity_build import BuiltEntity, EntityBuild, build_or_resume
from index_builder.building.fusion_build import add_fusion, remove_fusion
from index_builder.building.inputs import EntityInput, QuerySet, fingerprint
from index_builder.building.order import LiveChanges
from index_builder.building.parity import require_forms
from index_builder.building.plan import (
    Bundle,
    RebuildConfig,
    carried_types,
    estimate_disk_mib,
    fit_memory,
    live_changes,
    plan_release,
    read_bundle,
)
from index_builder.building.proof import REAL
from index_builder.errors import DiskFull, GateFailed
from index_builder.releases.golden import GOLDEN_NAME, GoldenQueries, read_golden
from index_builder.releases.manifest import (
    MANIFEST_NAME,
    EntityManifest,
    FileRecord,
    Manifest,
    content_digest,
)
from index_builder.releases.release import BUNDLE_PARTS, read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.releases.verification import record_files
from index_builder.storage.durable_files import disk_full_is_clear
from index_builder.storage.peak_memory import PeakMemory

log = logging.getLogger(__name__)

ParityGate = Callable[[Path, GoldenQueries], dict[str, dict[str, Any]]]
"""Compares the export forms in a staged release with golden queries.

Returns a report for each form; one without ``passed`` stops the build.
"""


def build_release(
    inputs: Mapping[str, EntityInput],
    bundle_path: Path,
    store: ReleaseStore,
    config: RebuildConfig | None = None,
    queries: Mapping[str, QuerySet] | None = None,
    *,
    parity: ParityGate | None = None,
) -> str:
    """Build, prove and publish one release; steps are logged.

    Entity types of the active release that are not among ``inputs`` are taken over unchanged if
    they were made with the same bundle.

    Args:
        inputs: Embedded entities by type.
        bundle_path: Model bundle; ``query_encoder/``, ``entity_encoder/`` and ``forms/`` are
            copied.
        store: Where to publish.
        config: How.
        queries: Real queries by entity type (key ``"*"``: for all types without their own); without
            them perturbed entities stand in, labelled so.
        parity: Checks the export forms against the trained tower.

    Returns:
        Id of the published release.

    Raises:
        SpaceMismatch: Vectors and bundle belong to different spaces.
        InvalidVectors: A row must not enter an index.
        DuplicateIds: An id occurs twice.
        GateFailed: Recall, memory or parity misses its target; nothing was published.
        PublisherBusy: Another build is running in this store.
        DiskFull: No room; nothing was published.
    """
    config = _settled(config or RebuildConfig())
    bundle = read_bundle(bundle_path)
    with store.lock("build", config.wait_seconds):
        changes = {
            entity_type: live_changes(entity_type, entities, store, config)
            for entity_type, entities in inputs.items()
        }
        plan_release(inputs, bundle, store, config, changes)
        build = _Build(
            inputs=inputs,
            changes=changes,
            bundle=bundle,
            store=store,
            config=config,
            queries=queries or {},
            parity=parity,
            parent=store.current(),
        )
        return build.run()


def _settled(config: RebuildConfig) -> RebuildConfig:
    """Apply what a deterministic build needs to the settings of its indexes."""
    if not config.deterministic:
        return config
    ann = replace(config.index.ann, threads=1)
    return replace(config, index=replace(config.index, ann=ann, deterministic=True))


@dataclass(frozen=True, kw_only=True)
class _Build:
    """One build under way; the store's ``build`` lock is held."""

    inputs: Mapping[str, EntityInput]
    changes: Mapping[str, LiveChanges]
    bundle: Bundle
    store: ReleaseStore
    config: RebuildConfig
    queries: Mapping[str, QuerySet]
    parity: ParityGate | None
    parent: str | None

    def run(self) -> str:
        """Stage everything, check it as a whole and publish it."""
        started = time.perf_counter()
        config, store = self.config, self.store
        carried = carried_types(self.inputs, self.bundle, store, self.parent)
        assert not set(self.inputs) & set(carried), "an entity type is either built or carried"
        reuse = {entity_type: self._earlier(entity_type) for entity_type in self.inputs}
        staging = self._staging(of_parent=bool(carried) or any(r.folder for r in reuse.values()))
        self._check_disk(staging)
        content = staging / "content"
        content.mkdir(exist_ok=True)
        seconds: dict[str, float] = {}
        with PeakMemory() as peak, disk_full_is_clear("building the release", store.releases):
            for entity_type in self.inputs:
                remove_fusion(content / entity_type)  # of an interrupted run
            built = {
                entity_type: build_or_resume(
                    self._entity_build(entity_type, staging, reuse[entity_type])
                )
                for entity_type in sorted(self.inputs)
            }
            entities = {entity_type: item.entity for entity_type, item in built.items()}
            for entity_type in carried:
                log.info("%s: taken over from %s", entity_type, self.parent)
                entities[entity_type] = carry_entity(entity_type, store, str(self.parent), content)
            step = time.perf_counter()
            add_fusion(content, self.inputs, entities)
            seconds["votes and weights"] = _seconds_since(step)
            step = time.perf_counter()
            _copy_bundle(self.bundle, content)
            forms = self._check_forms(content, entities)
            seconds["bundle and parity"] = _seconds_since(step)
            step = time.perf_counter()
            for path in content.glob(f".{MANIFEST_NAME}.*.tmp"):  # of a killed publication
                path.unlink()
            files = record_files(content)
            seconds["checksums"] = _seconds_since(step)
        self._check_memory(peak)
        seconds["total"] = _seconds_since(started)
        manifest = Manifest(
            release_id=config.release_id or _release_id(files, entities, config),
            parent=self.parent,
            code_version=_code_version(),
            space_id=self.bundle.space_id,
            dimension=self.bundle.dimension,
            entities=dict(sorted(entities.items())),
            files=files,
            forms=forms,
            deterministic=config.deterministic,
            seed=config.seed,
            query_upgrade=self.bundle.query_upgrade,
            measured=_measured(built, seconds, peak),
        )
        release_id = store.publish(
            content, manifest, activate=config.activate, require_parent=bool(carried)
        )
        shutil.rmtree(staging, ignore_errors=True)
        log.info(published(release_id, config))
        return release_id

    def _check_disk(self, staging: Path) -> None:
        """Check that there is room for the build, counting what an interrupted run left.

        Raises:
            DiskFull: There is not.
        """
        need = _bytes_below(self.bundle.path) / 2**20
        for entity_type, entities in self.inputs.items():
            count, dimension = len(entities.ids), self.bundle.dimension
            index = fit_memory(entity_type, count, dimension, self.config)
            need += estimate_disk_mib(index, count, dimension)
        there = _bytes_below(staging) / 2**20
        free = shutil.disk_usage(self.store.releases).free / 2**20
        if need > free + there:
            if not there:
                shutil.rmtree(staging, ignore_errors=True)
            raise DiskFull(
                f"the build needs about {need:,.1f} MiB, but only {free:,.1f} MiB are free in"
                f" {self.store.root}. Nothing was written; free some space (omni release gc) or"
                " choose another --store."
            )

    def _earlier(self, entity_type: str) -> Reusable:
        """Return the active release's index of a type, if its graph may be reused; else why not."""
        if not self.config.incremental:
            return Reusable(None, "a full build was asked for")
        if self.config.deterministic:
            return Reusable(None, "a deterministic build rests on its input alone")
        if self.parent is None:
            return Reusable(None, "no release is active")
        folder = self.store.path_of(self.parent)
        manifest = read_manifest(folder)
        if manifest.space_id != self.bundle.space_id:
            return Reusable(None, "the vectors are of another space")
        return reusable_index(entity_type, folder, manifest)

    def _staging(self, of_parent: bool) -> Path:
        """Return the folder of this build, with what an interrupted run left unless unwanted.

        Args:
            of_parent: Whether something of the active release goes into the new one.
        """
        key = self._key(self.parent if of_parent else None)
        staging = self.store.staging(key)
        if not self.config.resume:
            shutil.rmtree(staging)
            staging = self.store.staging(key)
        return staging

    def _key(self, parent: str | None) -> str:
        """Return a digest of everything that decides what is built."""
        config = self.config
        digest = sha256(
            f"{self.bundle.space_id} {config.index!r} {config.golden_queries}"
            f" {config.calibration_queries} {config.min_recall} {config.deterministic}"
            f" {config.seed} {config.max_memory_mib} {parent} {_code_version()}".encode()
        )
        for entity_type in sorted(self.inputs):
            digest.update(f"{entity_type} {fingerprint(self.inputs[entity_type])}".encode())
            chosen = self._queries_for(entity_type)
            if chosen is not None:
                digest.update("\0".join(chosen.texts).encode())
                digest.update(np.ascontiguousarray(chosen.vectors, np.float32).data)
        return digest.hexdigest()[:16]

    def _queries_for(self, entity_type: str) -> QuerySet | None:
        return self.queries.get(entity_type, self.queries.get("*"))

    def _entity_build(self, entity_type: str, staging: Path, reuse: Reusable) -> EntityBuild:
        return EntityBuild(
            entity_type=entity_type,
            entities=self.inputs[entity_type],
            changes=self.changes[entity_type],
            queries=self._queries_for(entity_type),
            bundle=self.bundle,
            config=self.config,
            staging=staging,
            reuse=reuse,
        )

    def _check_forms(
        self, content: Path, entities: Mapping[str, EntityManifest]
    ) -> dict[str, dict[str, Any]]:
        """Run the parity gate over the golden queries that have texts; return its reports.

        Raises:
            GateFailed: A form differs from the trained tower.
        """
        if self.parity is None:
            return {}
        vectors: dict[str, np.ndarray] = {}
        for entity_type, entity in entities.items():
            if entity.golden.get("kind") == REAL:
                golden = read_golden(content / entity_type / GOLDEN_NAME)
                pairs = zip(golden.texts, golden.vectors)
                vectors.update((text, vector) for text, vector in pairs if text)
        if not vectors:
            return {}
        texts = list(vectors)
        no_scores = [np.zeros(0, np.float32) for _ in texts]
        some = GoldenQueries(
            texts, np.stack(list(vectors.values())), [[] for _ in texts], no_scores, REAL
        )
        return require_forms(self.parity(content, some), "the trained tower")

    def _check_memory(self, peak: PeakMemory) -> None:
        """Check the peak of the build.

        Raises:
            GateFailed: It is above the limit.
        """
        limit = self.config.max_memory_mib
        if limit is not None and peak.private_mib > limit:
            raise GateFailed(
                f"the build used {peak.private_mib:,.0f} MiB of private memory at its peak, more"
                f" than --max-memory {limit:,}. Nothing was published. Choose a kind that needs"
                " less (--index int8-graph --no-sketched-links) or raise the limit."
            )


def published(release_id: str, config: RebuildConfig) -> str:
    """Return the last line of progress."""
    return f"published {release_id}{' and made it active' if config.activate else ''}"


def _seconds_since(start: float) -> float:
    return round(time.perf_counter() - start, 3)


def _measured(
    built: Mapping[str, BuiltEntity], seconds: Mapping[str, float], peak: PeakMemory
) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": dict(seconds),
        "peak_private_mib": round(peak.private_mib, 1),
        "peak_resident_mib": round(peak.resident_mib, 1),
        "entities": {entity_type: item.measured for entity_type, item in built.items()},
    }


def _copy_bundle(bundle: Bundle, content: Path) -> None:
    for part in (*BUNDLE_PARTS, "space.json", "config.json"):
        source, target = bundle.path / part, content / part
        # An interrupted build may have left more than the bundle holds, which must not be published
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.is_file():
            shutil.copyfile(source, target)


def _release_id(
    files: Mapping[str, FileRecord], entities: Mapping[str, EntityManifest], config: RebuildConfig
) -> str:
    watermarks = json.dumps({name: entity.watermark for name, entity in sorted(entities.items())})
    content = sha256((content_digest(files) + watermarks).encode()).hexdigest()[:12]
    if config.deterministic:
        return f"content-{content}"
    return f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}-{content}"


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _code_version() -> str:
    try:
        return metadata.version("omnisearchsage")
    except metadata.PackageNotFoundError:
        return "unknown"


__all__ = [
    "Bundle",
    "EntityInput",
    "QuerySet",
    "RebuildConfig",
    "build_release",
    "plan_release",
    "read_bundle",
]
