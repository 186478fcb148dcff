"""A newer query tower over the indexes that are there: no entity is embedded again, no graph is built again.

The new release takes every index of the active one over (hard links), with the query tower of a
bundle that declares itself compatible, and golden queries and calibration made anew by that tower;
both gates of a rebuild apply. Going back is ``omni release rollback``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
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
from index_builder.building.parity import check_forms
from index_builder.building.plan import RebuildConfig, read_bundle
from index_builder.errors import GateFailed, ReleaseNotFound
from index_builder.releases.manifest import EntityManifest, Manifest, content_digest
from index_builder.releases.release import Release
from index_builder.releases.store import ReleaseStore
from index_builder.releases.verification import record_files
from index_builder.search.calibration import check_gate
from index_builder.search.entity_index import INDEX_FILE, EntityIndex
from index_builder.search.golden import (
    GOLDEN_NAME,
    GoldenQueries,
    answer_exactly,
    read_golden,
    recall_of,
    write_golden,
)
from index_builder.storage.durable_files import disk_full_is_clear
from index_builder.storage.peak_memory import PeakMemory

LEAST_FORM_TEXTS = 100
"""Texts without which export forms cannot be checked; the release then serves its torch tower."""


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
    progress: Callable[[str], None] = lambda _: None,
) -> Upgrade:
    """Publish a release with the active one's indexes and another bundle's query tower.

    Args:
        store: Its active release is taken over; live writes go on in the older space.
        bundle: Declares itself compatible with the release's space (``omni evaluate NEW
            --against-index OLD --declare``).
        texts: Real queries, to calibrate and prove with; none: the release's golden queries.
        config: Gate, number of golden queries, seed, release id, whether to activate.
        progress: Called with one line per step.

    Raises:
        ReleaseNotFound: Nothing is active.
        SpaceMismatch: The bundle declares no compatibility with the release's space.
        BundleError: The bundle or its adapter is damaged.
        ConfigError: There are no real queries.
        GateFailed: The indexes answer the new query vectors too badly, or an export form differs;
            nothing was published.
    """
    config = config or RebuildConfig()
    started = time.perf_counter()
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
                manifest, declaration = _stage(
                    release, bundle, texts, config, content, progress, started
                )
                release_id = store.publish(
                    content, manifest, activate=config.activate, require_parent=True
                )
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        progress(f"published {release_id}{' and made it active' if config.activate else ''}")
        return Upgrade(release_id, declaration)


def _stage(
    release: Release,
    bundle: Path,
    texts: Sequence[str],
    config: RebuildConfig,
    content: Path,
    progress: Callable[[str], None],
    started: float,
) -> tuple[Manifest, Declaration]:
    with PeakMemory() as peak, disk_full_is_clear("building the release", content):
        declaration = write_upgraded_bundle(release.path, bundle, content)
        tower = QueryEncoder.load(content / "query_encoder")
        wanted = [form for form, file in FORM_FILES.items() if (bundle / "forms" / file).is_file()]
        if wanted and len(texts) < LEAST_FORM_TEXTS:
            progress(
                f"{', '.join(wanted)} left out: {len(texts)} queries cannot prove a form,"
                f" {LEAST_FORM_TEXTS} can (--queries)"
            )
        elif wanted:
            export_forms(tower, content / "forms", texts[:2000], wanted)
        vectors = np.ascontiguousarray(tower.encode(list(texts)), np.float32)
        entities, golden = {}, None
        for name, index in release.entities.items():
            entities[name], golden = _take_over(
                release, name, index, texts, vectors, config, content / name, progress
            )
        forms = check_forms(content, golden) if golden is not None else {}
        for form, report in forms.items():
            if not report["passed"]:
                raise GateFailed(
                    f"export form {form!r} does not agree with the adapted tower:"
                    f" {json.dumps(report)}. Nothing was published."
                )
        files = record_files(content)
    upgraded = read_bundle(content)
    digest = content_digest(files)[:12]
    created = datetime.now(UTC)
    return (
        Manifest(
            release_id=config.release_id or f"{created:%Y-%m-%dT%H-%M-%SZ}-{digest}",
            parent=release.release_id,
            code_version=release.manifest.code_version,
            space_id=release.space_id,
            dimension=release.dimension,
            entities=entities,
            files=files,
            forms=forms,
            seed=config.seed,
            query_upgrade=upgraded.query_upgrade,
            measured={
                "created": created.isoformat(timespec="milliseconds"),
                "seconds": {"total": round(time.perf_counter() - started, 3)},
                "peak_private_mib": round(peak.private_mib, 1),
                "peak_resident_mib": round(peak.resident_mib, 1),
            },
        ),
        declaration,
    )


def _take_over(
    release: Release,
    name: str,
    index: EntityIndex,
    texts: Sequence[str],
    vectors: np.ndarray,
    config: RebuildConfig,
    folder: Path,
    progress: Callable[[str], None],
) -> tuple[EntityManifest, GoldenQueries]:
    """Link an index's files, and calibrate and prove it with the new query vectors."""
    folder.mkdir()
    for file in (release.path / name).iterdir():
        if file.name not in (GOLDEN_NAME, INDEX_FILE):
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)
    order = np.random.default_rng(config.seed).permutation(len(texts))
    count = min(config.golden_queries, max(1, len(order) // 4))
    first, rest = order[:count], order[count : count + config.calibration_queries]
    rest = rest if len(rest) else first
    shutil.copyfile(release.path / name / INDEX_FILE, folder / INDEX_FILE)
    if index.count and index.calibration is not None:
        index.calibrate(vectors[rest], "real queries")
        check_gate(index.calibration, config.min_recall, name)
        settings: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        settings["calibration"] = index.calibration.as_dict(latencies=False)
        (folder / INDEX_FILE).write_text(
            json.dumps(settings, ensure_ascii=False, indent=1, sort_keys=True) + "\n",
            encoding="utf-8",
        )
    ids = index.ids.take(np.arange(len(index.ids)))
    golden = answer_exactly(
        [texts[i] for i in first], vectors[first], ids, index.base_vectors(), "real queries"
    )
    write_golden(golden, folder / GOLDEN_NAME)
    proven = EntityIndex.load(folder)
    answers = [proven.search(query, 10) for query in golden.vectors] if proven.count else []
    recall = (
        float(recall_of(golden, [a.ids for a in answers], [a.scores for a in answers]).mean())
        if answers
        else 1.0
    )
    progress(
        f"{name}: {index.count:,} entities taken over from {release.release_id}, golden recall@10"
        f" {recall:.3f} with the new query tower"
    )
    before = release.manifest.entities[name]
    entity = replace(
        before,
        calibration=(
            index.calibration.as_dict(latencies=False) if index.calibration is not None else None
        ),
        golden={"queries": len(golden), "k": 10, "kind": golden.kind, "recall": round(recall, 6)},
        carried_from=before.carried_from or release.release_id,
    )
    return entity, golden


def _golden_texts(release: Release) -> list[str]:
    texts: dict[str, None] = {}
    for name in release.entities:
        texts.update(
            (text, None) for text in read_golden(release.path / name / GOLDEN_NAME).texts if text
        )
    if not texts:
        raise ConfigError(
            f"release {release.release_id} holds no golden queries with texts, to prove another"
            " query tower with. Give real ones: --queries FILE."
        )
    return list(texts)
