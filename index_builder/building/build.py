"""Build a release: check, fold the live log in, index, calibrate, gate, prove, publish; interrupted builds go on where they stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from index_builder.building.carry_over import _carry
from index_builder.building.inputs import (
    EntityInput,
    Folded,
    QuerySet,
    check_input,
    fingerprint,
    fold_live,
    read_live,
    refuse_foreign,
)
from index_builder.building.plan import (
    Bundle,
    RebuildConfig,
    carried_types,
    fit_memory,
    plan_release,
    read_bundle,
)
from index_builder.errors import DiskFull, GateFailed, ReleaseCorrupt
from index_builder.releases.manifest import EntityManifest, FileRecord, Manifest, content_digest
from index_builder.releases.release import BUNDLE_PARTS
from index_builder.releases.store import ReleaseStore
from index_builder.releases.verification import record_files
from index_builder.search.calibration import check_gate
from index_builder.search.construction import CalibrationQueries
from index_builder.search.entity_index import EntityIndex
from index_builder.search.golden import (
    GOLDEN_K,
    GOLDEN_NAME,
    GoldenQueries,
    answer_exactly,
    perturbed_entities,
    recall_of,
    write_golden,
)
from index_builder.storage.durable_files import disk_full_is_clear, write_durably
from index_builder.storage.peak_memory import PeakMemory

ParityGate = Callable[[Path, GoldenQueries], dict[str, dict[str, Any]]]
"""(staged release folder, golden queries with texts) -> export form -> report with ``passed``; a form that fails stops the build."""
Progress = Callable[[str], None]


@dataclass(slots=True)
class _Built:
    entity: EntityManifest
    measured: dict[str, Any]


def build_release(
    inputs: Mapping[str, EntityInput],
    bundle_path: Path,
    store: ReleaseStore,
    config: RebuildConfig | None = None,
    queries: Mapping[str, QuerySet] | None = None,
    *,
    parity: ParityGate | None = None,
    progress: Progress = lambda _: None,
) -> str:
    """Build, prove and publish one release.

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
        progress: Called with one line per step.

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
    config = config or RebuildConfig()
    bundle = read_bundle(bundle_path)
    if config.deterministic:
        config = replace(
            config,
            index=replace(
                config.index, ann=replace(config.index.ann, threads=1), deterministic=True
            ),
        )
    started = time.perf_counter()
    timings: dict[str, float] = {}
    with store.lock("build", config.wait_seconds):
        plan_release(inputs, bundle, store, config)
        parent = store.current()
        carried = carried_types(inputs, bundle, store, parent)
        if set(inputs) & set(carried):
            raise AssertionError("an entity type is either built or carried")
        _check_disk(inputs, bundle, store)
        key = _key(inputs, bundle, config, parent if carried else None, queries)
        staging = store.staging(key)
        if not config.resume:
            shutil.rmtree(staging)
            staging = store.staging(key)
        content = staging / "content"
        content.mkdir(exist_ok=True)
        with PeakMemory() as peak, disk_full_is_clear("building the release", store.releases):
            entities: dict[str, EntityManifest] = {}
            measured: dict[str, Any] = {}
            for entity_type in sorted(inputs):
                built = _build_or_resume(
                    entity_type,
                    inputs[entity_type],
                    bundle,
                    store,
                    config,
                    queries,
                    staging,
                    progress,
                )
                entities[entity_type], measured[entity_type] = built.entity, built.measured
            for entity_type in carried:
                progress(f"{entity_type}: taken over from {parent}")
                entities[entity_type] = _carry(entity_type, store, str(parent), content)
            step = time.perf_counter()
            _copy_bundle(bundle, content)
            forms = _parity(content, entities, parity, progress)
            timings["bundle and parity"] = round(time.perf_counter() - step, 3)
            step = time.perf_counter()
            files = record_files(content)
            timings["checksums"] = round(time.perf_counter() - step, 3)
        if config.max_memory_mib is not None and peak.private_mib > config.max_memory_mib:
            raise GateFailed(
                f"the build used {peak.private_mib:,.0f} MiB of private memory at its peak, more"
                f" than --max-memory {config.max_memory_mib:,}. Nothing was published. Choose a"
                " leaner kind (--index rabitq) or raise the limit."
            )
        timings["total"] = round(time.perf_counter() - started, 3)
        manifest = Manifest(
            release_id=config.release_id or _release_id(files, entities, config),
            parent=parent,
            code_version=_code_version(),
            space_id=bundle.space_id,
            dimension=bundle.dimension,
            entities=dict(sorted(entities.items())),
            files=files,
            forms=forms,
            deterministic=config.deterministic,
            seed=config.seed,
            query_upgrade=bundle.query_upgrade,
            measured={
                "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "seconds": timings,
                "peak_private_mib": round(peak.private_mib, 1),
                "peak_resident_mib": round(peak.resident_mib, 1),
                "entities": measured,
            },
        )
        release_id = store.publish(
            content, manifest, activate=config.activate, require_parent=bool(carried)
        )
        shutil.rmtree(staging, ignore_errors=True)
        progress(f"published {release_id}{' and made it active' if config.activate else ''}")
        return release_id


# --- one entity type ------------------------------------------------------------------------------


def _build_or_resume(
    entity_type: str,
    entities: EntityInput,
    bundle: Bundle,
    store: ReleaseStore,
    config: RebuildConfig,
    queries: Mapping[str, QuerySet] | None,
    staging: Path,
    progress: Progress,
) -> _Built:
    marker = staging / f"{entity_type}.done.json"
    folder = staging / "content" / entity_type
    latest, watermark = (
        read_live(store.live_root, entity_type, entities.base_watermark)
        if config.fold_live
        else ({}, entities.base_watermark)
    )
    if marker.is_file() and folder.is_dir():
        done = json.loads(marker.read_text())
        if (
            done["watermark"] == watermark
            and {k: asdict(v) for k, v in record_files(folder).items()} == done["files"]
        ):
            progress(f"{entity_type}: finished by an earlier run, taken over")
            entity = EntityManifest(
                **{**done["entity"], "cpu_features": tuple(done["entity"]["cpu_features"])}
            )
            return _Built(entity, done["measured"])
    marker.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    built = _build_entity(
        entity_type,
        entities,
        latest,
        watermark,
        bundle,
        config,
        _queries_for(entity_type, queries),
        staging,
        folder,
        progress,
    )
    files = {name: asdict(record) for name, record in record_files(folder).items()}
    write_durably(
        marker,
        json.dumps(
            {
                "watermark": watermark,
                "files": files,
                "entity": asdict(built.entity),
                "measured": built.measured,
            }
        ).encode(),
    )
    return built


def _build_entity(
    entity_type: str,
    entities: EntityInput,
    latest: dict[str, Any],
    watermark: int,
    bundle: Bundle,
    config: RebuildConfig,
    queries: QuerySet | None,
    staging: Path,
    folder: Path,
    progress: Progress,
) -> _Built:
    seconds: dict[str, float] = {}

    def lap(name: str, since: float) -> float:
        now = time.perf_counter()
        seconds[name] = round(now - since, 3)
        return now

    with PeakMemory() as peak:
        clock = time.perf_counter()
        input_file = staging / f"{entity_type}.input.f32"
        entities, folded = fold_live(entities, latest, watermark, input_file)
        if not config.drop_foreign_live:
            refuse_foreign(entity_type, folded)
        check_input(entity_type, entities, bundle.space_id, bundle.dimension)
        clock = lap("check and fold", clock)
        progress(f"{entity_type}: {len(entities.ids):,} entities checked" + _folded_text(folded))
        golden_texts, golden_vectors, calibration, kind = _split_queries(entities, queries, config)
        golden = answer_exactly(golden_texts, golden_vectors, entities.ids, entities.vectors, kind)
        clock = lap("golden answers", clock)
        index_config = fit_memory(entity_type, len(entities.ids), bundle.dimension, config)
        index = EntityIndex.build(
            entity_type,
            entities.ids,
            entities.vectors,
            entities.attributes,
            index_config,
            calibration_queries=CalibrationQueries(calibration, kind),
        )
        clock = lap("index and calibrate", clock)
        if index.calibration is not None and index.count:
            check_gate(index.calibration, config.min_recall, entity_type)
        index.save(folder)
        write_golden(golden, folder / GOLDEN_NAME)
        description, curve = index.describe(), index.calibration
        before = _replay(index, golden)
        del index
        clock = lap("save", clock)
        # Loaded again as a server will: catches a library that saved less than it built (a full
        # disk, a bug), before anything is published.
        after = _replay(EntityIndex.load(folder), golden)
        if after + 1e-9 < before:
            raise ReleaseCorrupt(
                f"{entity_type}: golden recall is {before:.4f} in memory but {after:.4f} after"
                " loading what was saved; nothing was published"
            )
        lap("load and replay", clock)
        input_file.unlink(missing_ok=True)
    progress(
        f"{entity_type}: {description.get('kind')} index, golden recall@{GOLDEN_K} {after:.3f},"
        f" peak {peak.private_mib:,.0f} MiB, {sum(seconds.values()):.1f} s"
    )
    entity = EntityManifest(
        count=len(entities.ids),
        watermark=watermark,
        index=description,
        cpu_features=tuple(description.get("cpu_features", ())),
        calibration=curve.as_dict(latencies=False) if curve is not None else None,
        golden={"queries": len(golden), "k": GOLDEN_K, "kind": kind, "recall": round(after, 6)},
        built_from=fingerprint(entities),
    )
    measured = {
        "seconds": seconds,
        "peak_private_mib": round(peak.private_mib, 1),
        "peak_resident_mib": round(peak.resident_mib, 1),
        "live": {
            "upserts": folded.upserts,
            "deletes": folded.deletes,
            "stale": folded.stale,
            "foreign": len(folded.foreign),
        },
        "curve": curve.as_dict()["points"] if curve is not None else [],
    }
    return _Built(entity, measured)


def _folded_text(folded: Folded) -> str:
    if not (folded.upserts or folded.deletes or folded.stale or folded.foreign):
        return ""
    return (
        f"; live log up to {folded.watermark}: {folded.upserts:,} upserts and {folded.deletes:,}"
        f" deletes folded in, {folded.stale:,} stale, {len(folded.foreign):,} foreign"
    )


def _replay(index: EntityIndex, golden: GoldenQueries) -> float:
    if not len(golden) or not index.count:
        return 1.0
    answers = [index.search(query, GOLDEN_K) for query in golden.vectors]
    return float(recall_of(golden, [a.ids for a in answers], [a.scores for a in answers]).mean())


def _queries_for(entity_type: str, queries: Mapping[str, QuerySet] | None) -> QuerySet | None:
    return None if queries is None else queries.get(entity_type, queries.get("*"))


def _split_queries(
    entities: EntityInput, queries: QuerySet | None, config: RebuildConfig
) -> tuple[list[str], np.ndarray, np.ndarray, str]:
    """Golden texts and vectors, calibration vectors, and where they come from; the two sets are disjoint."""
    if queries is not None and len(queries.texts):
        order = np.random.default_rng(config.seed).permutation(len(queries.texts))
        golden = min(config.golden_queries, max(1, len(order) // 4))
        first, rest = order[:golden], order[golden : golden + config.calibration_queries]
        if len(rest) == 0:
            rest = first
        vectors = np.ascontiguousarray(queries.vectors, np.float32)
        return [queries.texts[int(i)] for i in first], vectors[first], vectors[rest], "real queries"
    if len(entities.ids) == 0:
        empty = np.zeros((0, entities.vectors.shape[1]), np.float32)
        return [], empty, empty, "perturbed entities"
    golden_vectors = perturbed_entities(entities.vectors, config.golden_queries, config.seed)
    calibration = perturbed_entities(entities.vectors, config.calibration_queries, config.seed + 1)
    return [""] * len(golden_vectors), golden_vectors, calibration, "perturbed entities"


# --- the rest of the release ----------------------------------------------------------------------


def _copy_bundle(bundle: Bundle, content: Path) -> None:
    for part in (*BUNDLE_PARTS, "space.json", "config.json"):
        source, target = bundle.path / part, content / part
        if (
            target.is_dir()
        ):  # of an interrupted build; what the bundle no longer holds must not be published ungated
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.is_file():
            shutil.copyfile(source, target)


def _parity(
    content: Path,
    entities: Mapping[str, EntityManifest],
    parity: ParityGate | None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    from index_builder.search.golden import read_golden

    if parity is None:
        return {}
    texts: dict[str, np.ndarray] = {}
    for entity_type, entity in entities.items():
        if entity.golden.get("kind") == "real queries":
            golden = read_golden(content / entity_type / GOLDEN_NAME)
            texts.update(
                (text, vector) for text, vector in zip(golden.texts, golden.vectors) if text
            )
    if not texts:
        return {}
    some = GoldenQueries(
        list(texts),
        np.stack(list(texts.values())),
        [[] for _ in texts],
        [np.zeros(0, np.float32) for _ in texts],
        "real queries",
    )
    reports = parity(content, some)
    for form, report in reports.items():
        progress(
            f"form {form}:"
            f" {'agrees with the trained tower' if report.get('passed') else 'DIFFERS from the trained tower'}"
        )
        if not report.get("passed"):
            raise GateFailed(
                f"export form {form!r} does not agree with the trained tower: {json.dumps(report)}."
                " Nothing was published; export again or remove the form."
            )
    return reports


def _key(
    inputs: Mapping[str, EntityInput],
    bundle: Bundle,
    config: RebuildConfig,
    parent: str | None,
    queries: Mapping[str, QuerySet] | None,
) -> str:
    digest = sha256(
        f"{bundle.space_id} {config.index!r} {config.golden_queries} {config.calibration_queries}"
        f" {config.min_recall} {config.deterministic} {config.seed} {config.max_memory_mib}"
        f" {parent}".encode()
    )
    for entity_type in sorted(inputs):
        digest.update(f"{entity_type} {fingerprint(inputs[entity_type])}".encode())
        chosen = _queries_for(entity_type, queries)
        if chosen is not None:
            digest.update("\0".join(chosen.texts).encode())
            digest.update(np.ascontiguousarray(chosen.vectors, np.float32).data)
    return digest.hexdigest()[:16]


def _release_id(
    files: Mapping[str, FileRecord], entities: Mapping[str, EntityManifest], config: RebuildConfig
) -> str:
    watermarks = json.dumps({name: entity.watermark for name, entity in sorted(entities.items())})
    content = sha256((content_digest(files) + watermarks).encode()).hexdigest()[:12]
    return (
        f"content-{content}"
        if config.deterministic
        else f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}-{content}"
    )


def _check_disk(inputs: Mapping[str, EntityInput], bundle: Bundle, store: ReleaseStore) -> None:
    need = sum(len(e.ids) for e in inputs.values()) * bundle.dimension * 4 * 1.2
    free = shutil.disk_usage(store.releases).free
    if need > free:
        raise DiskFull(
            f"the release needs at least {need / 2**20:,.0f} MiB, but only {free / 2**20:,.0f} MiB"
            f" are free in {store.root}. Nothing was written; free some space (omni release gc) or"
            " choose another --store."
        )


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
