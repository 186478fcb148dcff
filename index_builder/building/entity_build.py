"""One entity type of a release: folded, checked, indexed, calibrated, gated, saved and replayed."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from index_builder.building.carry_over import Reusable
from index_builder.building.inputs import (
    EntityInput,
    QuerySet,
    check_input,
    fingerprint,
)
from index_builder.building.live_fold import apply_live
from index_builder.building.order import LiveChanges
from index_builder.building.plan import Bundle, RebuildConfig, fit_memory
from index_builder.building.proof import golden_record, replay, split_queries, stand_in_queries
from index_builder.errors import GateFailed, ReleaseCorrupt
from index_builder.releases.golden import (
    GOLDEN_K,
    GOLDEN_NAME,
    GoldenQueries,
    answer_exactly,
    write_golden,
)
from index_builder.releases.manifest import EntityManifest
from index_builder.releases.verification import record_files
from index_builder.search.calibration import check_gate
from index_builder.search.construction import INCREMENTAL
from index_builder.search.entity_index import CalibrationQueries, EntityIndex
from index_builder.storage.durable_files import write_durably
from index_builder.storage.peak_memory import PeakMemory

log = logging.getLogger(__name__)


class BuiltEntity(NamedTuple):
    """An entity type that lies in the staging folder."""

    entity: EntityManifest
    measured: dict[str, Any]
    """Times, peaks and counts of the run that built it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EntityBuild:
    """What one entity type is built from, and where.

    Attributes:
        entity_type: Which.
        entities: Embedded entities, before live writes.
        changes: What live writes do to them.
        queries: Real queries that calibrate and prove it, or None.
        bundle: Model bundle that made the vectors.
        config: How to build.
        staging: Folder of the build; the index goes to ``content/<entity type>``.
        reuse: An earlier index whose graph may be carried over, or why there is none.
    """

    entity_type: str
    entities: EntityInput
    changes: LiveChanges
    queries: QuerySet | None
    bundle: Bundle
    config: RebuildConfig
    staging: Path
    reuse: Reusable

    @property
    def folder(self) -> Path:
        """Where the index goes."""
        return self.staging / "content" / self.entity_type

    @property
    def marker(self) -> Path:
        """File that says the index is finished, and what it should hold."""
        return self.staging / f"{self.entity_type}.done.json"


class _Laps:
    """Times of consecutive steps, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        """Record the time since the last step ended."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._since, 3)
        self._since = now


def build_or_resume(build: EntityBuild) -> BuiltEntity:
    """Take over what an interrupted run finished; build it where there is nothing, or damage."""
    finished = _finished(build)
    if finished is not None:
        log.info("%s: finished by an earlier run, taken over", build.entity_type)
        return finished
    build.marker.unlink(missing_ok=True)
    shutil.rmtree(build.folder, ignore_errors=True)
    build.folder.mkdir(parents=True)
    built = _build_entity(build)
    done = {
        "live": _digest(build.changes),
        "files": _files(build.folder),
        "entity": asdict(built.entity),
        "measured": built.measured,
    }
    write_durably(build.marker, json.dumps(done).encode())
    return built


def _finished(build: EntityBuild) -> BuiltEntity | None:
    """Return what an earlier run finished, if it is whole and the live log changes the same."""
    if not build.marker.is_file() or not build.folder.is_dir():
        return None
    done = json.loads(build.marker.read_text())
    if done.get("live") != _digest(build.changes) or done["files"] != _files(build.folder):
        return None
    values = {**done["entity"], "cpu_features": tuple(done["entity"]["cpu_features"])}
    return BuiltEntity(EntityManifest(**values), done["measured"])


def _digest(changes: LiveChanges) -> str:
    """Return SHA-256 over what live writes do to an input."""
    folded = changes.folded
    sequences = [entry.sequence for entry in changes.fresh]
    settled = (folded.settled.sequence, sorted(folded.settled.open))
    decided = (folded.watermark, changes.dead, sequences, settled, folded.report())
    return sha256(repr(decided).encode()).hexdigest()


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: asdict(record) for name, record in record_files(folder).items()}


def _build_entity(build: EntityBuild) -> BuiltEntity:
    laps = _Laps()
    config = build.config
    with PeakMemory() as peak:
        input_file = build.staging / f"{build.entity_type}.input.f32"
        entities, vectors = _checked_input(build, input_file)
        laps.end("check and fold")
        if build.queries is not None and len(build.queries.texts):
            proof = split_queries(build.queries, config)
        else:
            proof = stand_in_queries(entities, config)
        golden = answer_exactly(
            proof.golden_texts, proof.golden_vectors, entities.ids, vectors, proof.source
        )
        laps.end("golden answers")
        queries = CalibrationQueries(proof.calibration, proof.source)
        index, incremental = _build_index(build, entities, vectors, queries)
        laps.end("index and calibrate")
        facts, curve = index.describe(), index.calibration
        recall_before = _save(index, golden, build.folder)
        build.changes.folded.settled.write(build.folder)
        del index
        laps.end("save")
        recall = _replay_saved(build, golden, recall_before)
        laps.end("load and replay")
        input_file.unlink(missing_ok=True)
    log.info(
        f"{build.entity_type}: {facts.get('kind')} index, {_how_built(incremental)}, golden"
        f" recall@{GOLDEN_K} {recall:.3f},"
        f" peak {peak.private_mib:,.0f} MiB, {sum(laps.seconds.values()):.1f} s"
    )
    entity = EntityManifest(
        count=len(entities.ids),
        watermark=build.changes.folded.watermark,
        index=facts,
        cpu_features=tuple(facts.get("cpu_features", ())),
        calibration=curve.as_dict(latencies=False) if curve is not None else None,
        golden=golden_record(golden, recall),
        built_from=fingerprint(entities),
    )
    measured = {
        "seconds": laps.seconds,
        "peak_private_mib": round(peak.private_mib, 1),
        "peak_resident_mib": round(peak.resident_mib, 1),
        "live": build.changes.folded.report(),
        INCREMENTAL: incremental,
        "curve": curve.as_dict()["points"] if curve is not None else [],
    }
    return BuiltEntity(entity, measured)


def _build_index(
    build: EntityBuild, entities: EntityInput, vectors: np.ndarray, queries: CalibrationQueries
) -> tuple[EntityIndex, dict[str, Any]]:
    """Build and gate an index; in full where one that carries a graph over misses the gate.

    Returns:
        The index, and what of it was carried over, or why nothing was.

    Raises:
        GateFailed: Its recall misses the target.
    """
    kind = fit_memory(build.entity_type, len(entities.ids), build.bundle.dimension, build.config)
    config = replace(kind, ann=replace(kind.ann, scratch=build.staging), reuse=build.reuse.folder)
    lexical = entities.lexical()
    why = build.reuse.why_not or "the index is exact"
    while True:
        index = EntityIndex.build(
            build.entity_type,
            entities.ids,
            vectors,
            entities.attributes,
            config,
            calibration_queries=queries,
            lexical=lexical,
        )
        incremental = index.describe().get(INCREMENTAL, {"used": False, "why": why})
        try:
            if index.calibration is not None and index.count:
                check_gate(index.calibration, build.config.min_recall, build.entity_type)
            return index, incremental
        except GateFailed as error:
            if not incremental["used"]:
                raise
            log.warning("%s: with a graph carried over: %s", build.entity_type, error)
            why = "the graph that was carried over missed the gate"
            config = replace(config, reuse=None)


def _how_built(incremental: dict[str, Any]) -> str:
    """Return a clause on what was carried over."""
    if not incremental["used"]:
        return f"built in full ({incremental['why']})"
    return (
        f"{incremental['kept']:,} vectors carried over, {incremental['inserted']:,} inserted,"
        f" {incremental['removed']:,} removed"
    )


def _checked_input(build: EntityBuild, input_file: Path) -> tuple[EntityInput, np.ndarray]:
    """Fold the live writes in; return the input, and its vectors as the index holds them."""
    entity_type, bundle, folded = build.entity_type, build.bundle, build.changes.folded
    entities = apply_live(build.entities, build.changes, input_file)
    vectors = check_input(entity_type, entities, bundle.space_id, bundle.dimension)
    changes = f"; {folded}" if str(folded) else ""
    log.info(f"{entity_type}: {len(entities.ids):,} entities checked{changes}")
    for line in folded.warnings():
        log.warning(f"{entity_type}: {line}")
    return entities, vectors


def _save(index: EntityIndex, golden: GoldenQueries, folder: Path) -> float:
    """Write an index with its golden queries; return their recall in memory."""
    index.save(folder)
    write_golden(golden, folder / GOLDEN_NAME)
    return replay(index, golden)


def _replay_saved(build: EntityBuild, golden: GoldenQueries, recall_before: float) -> float:
    """Load the index as a server will and return its golden recall.

    Catches a library that saved less than it built (a full disk, a bug) before anything is
    published.

    Raises:
        ReleaseCorrupt: The recall is below that in memory.
    """
    recall = replay(EntityIndex.load(build.folder), golden)
    if recall + 1e-9 < recall_before:
        raise ReleaseCorrupt(
            f"{build.entity_type}: golden recall is {recall_before:.4f} in memory but {recall:.4f}"
            " after loading what was saved; nothing was published"
        )
    return recall
