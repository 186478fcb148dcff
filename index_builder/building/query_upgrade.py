"""A newer query tower over the indexes that are there: nothing is embedded or built again.

The new release takes every index of the active one over (hard links), with the query tower of a
bundle that declares itself compatible, and golden queries and calibration made anew by that tower;
both gates of a rebuild apply. Going back is ``omni release rollback``.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from encoders.compatibility.declaration import Declaration, write_upgraded_bundle
from encoders.errors import ConfigError
from encoders.inference.onnx_forms import export_forms
from encoders.towers.forms import FORM_FILES
from encoders.towers.query_tower import QueryEncoder
from index_builder.building.build import published
from index_builder.building.carry_over import carried_from, link_files
from index_builder.building.inputs import QuerySet
from index_builder.building.parity import check_forms, require_forms
from index_builder.building.plan import RebuildConfig, read_bundle
from index_builder.building.proof import REAL, golden_record, replay, split_queries
from index_builder.errors import ReleaseNotFound
from index_builder.releases.golden import (
    GOLDEN_K,
    GOLDEN_NAME,
    GoldenQueries,
    answer_exactly,
    read_golden,
    write_golden,
)
from index_builder.releases.manifest import EntityManifest, FileRecord, Manifest, content_digest
from index_builder.releases.release import Release
from index_builder.releases.store import ReleaseStore
from index_builder.releases.verification import record_files
from index_builder.search.calibration import check_gate
from index_builder.search.entity_index import INDEX_FILE, EntityIndex
from index_builder.search.index_files import IndexRecord
from index_builder.storage.durable_files import disk_full_is_clear
from index_builder.storage.peak_memory import PeakMemory

log = logging.getLogger(__name__)

LEAST_FORM_TEXTS = 100
"""Texts without which export forms cannot be checked; the release then serves its torch tower."""
_CALIBRATION_TEXTS = 2_000
"""Texts that calibrate an export form."""


@dataclass(frozen=True)
class Upgrade:
    """What was published."""

    release_id: str
    declaration: Declaration


def upgrade_query_tower(
    store: ReleaseStore,
    bundle: Path,
    texts: Sequence[str] = (),
    config: RebuildConfig | None = None,
) -> Upgrade:
    """Publish a release with the active one's indexes and another bundle's query tower.

    Args:
        store: Its active release is taken over; live writes go on in the older space.
        bundle: Declares itself compatible with the release's space (``omni evaluate NEW
            --against-index OLD --declare``).
        texts: Real queries, to calibrate and prove with; none: the release's golden queries.
        config: Gate, number of golden queries, seed, release id, whether to activate.

    Raises:
        ReleaseNotFound: Nothing is active.
        SpaceMismatch: The bundle declares no compatibility with the release's space.
        BundleError: The bundle or its adapter is damaged.
        ConfigError: There are no real queries.
        GateFailed: The indexes answer the new query vectors too badly, or an export form differs;
            nothing was published.
    """
    config = config or RebuildConfig()
    with store.lock("build", config.wait_seconds):
        if store.current() is None:
            raise ReleaseNotFound(
                f"no release is active in {store.root}, so there are no indexes to keep. Build one:"
                " omni rebuild --bundle ..."
            )
        with store.open_current() as release:
            texts = list(dict.fromkeys(texts)) or _golden_texts(release)
            staging = store.staging(f"query-{content_digest(release.manifest.files)[:16]}")
            shutil.rmtree(staging)
            content = staging / "content"
            content.mkdir(parents=True)
            try:
                work = _Upgrade(release, bundle, texts, config, content)
                manifest, declaration = work.stage()
                release_id = store.publish(
                    content, manifest, activate=config.activate, require_parent=True
                )
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        log.info(published(release_id, config))
        return Upgrade(release_id, declaration)


@dataclass(frozen=True)
class _Upgrade:
    """One upgrade under way; the store's ``build`` lock is held."""

    release: Release
    bundle: Path
    texts: list[str]
    config: RebuildConfig
    content: Path
    """Folder of the new release's files."""

    def stage(self) -> tuple[Manifest, Declaration]:
        """Write and prove the new release's files; return its manifest."""
        started = time.perf_counter()
        content = self.content
        with PeakMemory() as peak, disk_full_is_clear("building the release", content):
            declaration = write_upgraded_bundle(self.release.path, self.bundle, content)
            tower = QueryEncoder.load(content / "query_encoder")
            self._export_forms(tower)
            vectors = np.ascontiguousarray(tower.encode(self.texts), np.float32)
            queries = QuerySet(self.texts, vectors)
            entities: dict[str, EntityManifest] = {}
            golden: GoldenQueries | None = None
            for entity_type, index in self.release.entities.items():
                entities[entity_type], golden = self._take_over(entity_type, index, queries)
            reports = check_forms(content, golden) if golden is not None else {}
            forms = require_forms(reports, "the adapted tower")
            files = record_files(content)
        seconds = round(time.perf_counter() - started, 3)
        return self._manifest(entities, files, forms, _measured(seconds, peak)), declaration

    def _manifest(
        self,
        entities: dict[str, EntityManifest],
        files: dict[str, FileRecord],
        forms: dict[str, dict[str, Any]],
        measured: dict[str, Any],
    ) -> Manifest:
        release, config = self.release, self.config
        unique = f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}-{content_digest(files)[:12]}"
        return Manifest(
            release_id=config.release_id or unique,
            parent=release.release_id,
            code_version=release.manifest.code_version,
            space_id=release.space_id,
            dimension=release.dimension,
            entities=entities,
            files=files,
            forms=forms,
            seed=config.seed,
            query_upgrade=read_bundle(self.content).query_upgrade,
            measured=measured,
        )

    def _export_forms(self, tower: QueryEncoder) -> None:
        """Export the forms that the bundle has, if there are texts enough to prove them."""
        forms = self.bundle / "forms"
        wanted = [form for form, file in FORM_FILES.items() if (forms / file).is_file()]
        if wanted and len(self.texts) < LEAST_FORM_TEXTS:
            log.info(
                f"{', '.join(wanted)} left out: {len(self.texts)} queries cannot prove a form,"
                f" {LEAST_FORM_TEXTS} can (--queries)"
            )
        elif wanted:
            export_forms(tower, self.content / "forms", self.texts[:_CALIBRATION_TEXTS], wanted)

    def _take_over(
        self, entity_type: str, index: EntityIndex, queries: QuerySet
    ) -> tuple[EntityManifest, GoldenQueries]:
        """Link an index's files, and calibrate and prove it with the new query vectors."""
        release, config = self.release, self.config
        source, folder = release.path / entity_type, self.content / entity_type
        folder.mkdir()
        names = {path.name for path in source.iterdir()} - {GOLDEN_NAME, INDEX_FILE}
        link_files(sorted(names), source, folder)
        proof = split_queries(queries, config)
        record = IndexRecord.read(source)
        if index.count and index.calibration is not None:
            calibration = index.calibrate(proof.calibration, proof.source)
            check_gate(calibration, config.min_recall, entity_type)
            record = replace(record, calibration=calibration)
        record.write(folder)
        ids = index.ids.take(np.arange(len(index.ids)))
        golden = answer_exactly(
            proof.golden_texts, proof.golden_vectors, ids, index.base_vectors(), REAL
        )
        write_golden(golden, folder / GOLDEN_NAME)
        recall = replay(EntityIndex.load(folder), golden)
        log.info(
            f"{entity_type}: {index.count:,} entities taken over from {release.release_id}, golden"
            f" recall@{GOLDEN_K} {recall:.3f} with the new query tower"
        )
        curve = index.calibration
        entity = replace(
            carried_from(release.manifest.entities[entity_type], release.release_id),
            calibration=curve.as_dict(latencies=False) if curve is not None else None,
            golden=golden_record(golden, recall),
        )
        return entity, golden


def _measured(seconds: float, peak: PeakMemory) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": {"total": seconds},
        "peak_private_mib": round(peak.private_mib, 1),
        "peak_resident_mib": round(peak.resident_mib, 1),
    }


def _golden_texts(release: Release) -> list[str]:
    texts: dict[str, None] = {}
    for name in release.entities:
        golden = read_golden(release.path / name / GOLDEN_NAME)
        texts.update(dict.fromkeys(text for text in golden.texts if text))
    if not texts:
        raise ConfigError(
            f"release {release.release_id} holds no golden queries with texts, to prove another"
            " query tower with. Give real ones: --queries FILE."
        )
    return list(texts)
