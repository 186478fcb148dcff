"""The configuration of a rebuild and its plan, checked before any work is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from encoders.errors import BundleError, ConfigError, SpaceMismatch
from index_builder.ann.choice import kind_available, require_kind
from index_builder.ann.symqg import MIN_ROWS
from index_builder.building.inputs import EntityInput
from index_builder.building.live_fold import (
    read_live,
    refuse_foreign,
    refuse_overridden,
    refuse_shrunken,
)
from index_builder.building.order import LiveChanges, LiveWrites, decide
from index_builder.errors import PublishError
from index_builder.releases.current import check_release_id
from index_builder.releases.manifest import EntityManifest
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import IndexConfig

CALIBRATION_QUERIES = 2_000
DEFAULT_DIMENSION = 256
FIXED_MIB = 430
"""Private memory of any build, MiB: interpreter, libraries, blocks of exact scores."""
BYTES_PER_VECTOR_256 = {
    "auto": 6000,
    "symqg": 4400,
    "int8-graph": 4400,
    "hnsw": 3100,
    "faiss": 3100,
    "exact": 1300,
}
"""Private bytes a 256-d vector needs at the peak of a build, with a copy of distinct vectors.

Measured for symqg (100,000 and 800,000 vectors) and hnsw (30,000 and 100,000), rounded up; the
others follow from their layout. ``auto`` holds both searches of one graph while it times them. The
measured peak of each build goes into its manifest.
"""
BYTES_WITHOUT_SKETCHES_256 = 2400
"""The same for ``int8-graph`` without sketched links, measured at 100,000 vectors."""


DISK_MIB_PER_BUILD = 2
"""Golden queries, the manifest and blocks of many small files, MiB."""
DISK_BYTES_PER_ROW = 128
"""Ids and attributes of one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildConfig:
    """How a release is built."""

    index: IndexConfig = field(default_factory=IndexConfig)
    """Kind and parameters of the indexes, the recall target of the gate, seed and threads."""
    min_recall: float = 0.95
    """The gate: what the lower 95% bound of the measured ANN recall@10 must reach at some ef."""
    calibration_queries: int = CALIBRATION_QUERIES
    """Queries that calibrate, apart from the golden ones."""
    golden_queries: int = 64
    """Golden queries kept per entity type."""
    deterministic: bool = False
    """Same input and seed give the same bytes, but for the manifest's ``measured`` part.

    The release id is derived from the content.
    """
    seed: int = 0
    """Of the choice of golden and calibration queries."""
    max_memory_mib: int | None = None
    """Private memory the build may use at its peak; None: no limit."""
    incremental: bool = True
    """Carry the graphs of the active release over where little changed; deterministic: never."""
    release_id: str | None = None
    """None: time and content (deterministic: content only)."""
    activate: bool = True
    """Make the release active once it is published."""
    resume: bool = True
    """Take over what an interrupted build of the same input left."""
    fold_live: bool = True
    """Put the live log's entries into the base."""
    drop_foreign_live: bool = False
    """Leave out live entries of another space id, which this bundle cannot search."""
    max_overridden: float = 0.1
    """Live writes that a newer catalogue may undo, as a share of its rows; a hundred always may."""
    max_shrink: float = 0.5
    """Share of the active release's entities of one type that a catalogue may lack."""
    wait_seconds: float = 0.0
    """How long to wait for another build in the same store."""

    def __post_init__(self) -> None:
        if not 0.0 < self.min_recall < 1.0:
            raise ConfigError(
                f"RebuildConfig.min_recall must be between 0 and 1, but got {self.min_recall}."
            )
        if not 1 <= self.golden_queries <= 10_000:
            raise ConfigError(
                "RebuildConfig.golden_queries must be between 1 and 10,000, but got"
                f" {self.golden_queries}."
            )
        for name in ("max_overridden", "max_shrink"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(
                    f"RebuildConfig.{name} must be a share between 0 and 1, but got"
                    f" {getattr(self, name)}."
                )
        if self.max_memory_mib is not None and self.max_memory_mib < 64:
            raise ConfigError(
                f"RebuildConfig.max_memory_mib must be at least 64, but got {self.max_memory_mib}."
            )
        if self.release_id is not None:
            check_release_id(self.release_id)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a release takes from a model bundle."""

    path: Path
    space_id: str
    dimension: int
    query_upgrade: dict[str, Any] | None = None
    """Set where the query tower is a newer bundle's: see ``Manifest``."""


def read_bundle(path: Path) -> Bundle:
    """Read ``space.json`` of a model bundle.

    Raises:
        BundleError: The folder is no bundle.
    """
    try:
        values = json.loads((path / "space.json").read_text(encoding="utf-8"))
        space_id = str(values["space_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{path} is not a model bundle: expected space.json with a space_id ({error}). Train"
            " one with `omni train`."
        ) from error
    dimension = values.get("dimension")
    if dimension is None and (path / "config.json").is_file():
        dimension = json.loads((path / "config.json").read_text(encoding="utf-8")).get("dimension")
    if not (path / "query_encoder").is_dir():
        raise BundleError(f"{path} is not a whole model bundle: expected a folder query_encoder/")
    return Bundle(path, space_id, int(dimension or DEFAULT_DIMENSION), values.get("query_upgrade"))


def plan_release(
    inputs: Mapping[str, EntityInput],
    bundle: Bundle,
    store: ReleaseStore,
    config: RebuildConfig,
    changes: Mapping[str, LiveChanges] | None = None,
) -> dict[str, Any]:
    """Plan what ``build_release`` would do; check all that can be checked without building.

    Args:
        inputs: Embedded entities by type.
        bundle: Made their vectors.
        store: Where the release would go.
        config: How it would be built.
        changes: What ``live_changes`` returned for each type; None: it is called here.

    Returns:
        JSON: per entity type what is built, taken over or refused, and the memory and disk it
            needs.

    Raises:
        SpaceMismatch: Signals and bundle differ.
        PublishError: A partial rebuild with a different bundle.
        ConfigError: The memory limit cannot be kept.
        GateFailed: The sources would undo too many live writes, or hold too few entities.
        LiveLogError: Live writes are missing, or exist only as vectors of another space.
    """
    if not inputs:
        raise ConfigError(
            "a rebuild needs at least one entity type, but got none. Give --catalogue, --signals or"
            " --from-active."
        )
    parent = store.current()
    carried = carried_types(inputs, bundle, store, parent)
    plan: dict[str, Any] = {
        "parent": parent,
        "space_id": bundle.space_id,
        "dimension": bundle.dimension,
        "build": {},
        "carry": sorted(carried),
    }
    for entity_type, entities in sorted(inputs.items()):
        if entities.space_id != bundle.space_id:
            raise SpaceMismatch(bundle.space_id, entities.space_id, f"signals of {entity_type!r}")
        index = fit_memory(entity_type, len(entities.ids), bundle.dimension, config)
        if changes is None:
            live = live_changes(entity_type, entities, store, config)
        else:
            live = changes[entity_type]
        check_live(entity_type, entities, live, store, config)
        plan["build"][entity_type] = {
            "entities": len(entities.ids),
            "live_upserts": live.folded.upserts,
            "live_deletes": live.folded.deletes,
            "live": live.folded.report(),
            "watermark": live.folded.watermark,
            "index": index.kind,
            "peak_private_mib_estimate": round(
                estimate_mib(index, len(entities.ids), bundle.dimension)
            ),
            "disk_mib_estimate": round(
                estimate_disk_mib(index, len(entities.ids), bundle.dimension)
            ),
        }
    return plan


def live_changes(
    entity_type: str, entities: EntityInput, store: ReleaseStore, config: RebuildConfig
) -> LiveChanges:
    """Read the live log and decide what it changes; nothing where the log is left alone.

    Raises:
        LiveLogError: Writes that the input needs are gone, or the log is damaged.
    """
    if not config.fold_live:
        return decide(entities, LiveWrites({}, entities.base_watermark))
    return decide(entities, writes_for(entity_type, entities, store))


def writes_for(entity_type: str, entities: EntityInput, store: ReleaseStore) -> LiveWrites:
    """Read the live writes behind an input. Raises as ``read_live`` does."""
    contained = None
    if entities.age is not None:
        active = _active_entity(store, entity_type)
        contained = active.watermark if active is not None else 0
    return read_live(store.live_root, entity_type, entities.base_watermark, contained=contained)


def check_live(
    entity_type: str,
    entities: EntityInput,
    changes: LiveChanges,
    store: ReleaseStore,
    config: RebuildConfig,
) -> None:
    """Refuse a build that would lose live writes, or that a broken export would shrink.

    Raises:
        GateFailed: Too many live writes would be undone, or too few entities are there.
        LiveLogError: Live writes exist only as vectors of another space.
    """
    if entities.age is not None:
        refuse_overridden(entity_type, entities, changes.folded, config.max_overridden)
        active = _active_entity(store, entity_type)
        if active is not None:
            refuse_shrunken(entity_type, changes, len(entities.ids), active, config.max_shrink)
    if not config.drop_foreign_live:
        refuse_foreign(entity_type, changes.folded)


def _active_entity(store: ReleaseStore, entity_type: str) -> EntityManifest | None:
    """Return an entity type of the active release; None where there is none."""
    active = store.current()
    if active is None:
        return None
    return read_manifest(store.path_of(active)).entities.get(entity_type)


def estimate_mib(index: IndexConfig, count: int, dimension: int) -> float:
    """Estimate the private memory that a build needs at its peak, MiB."""
    per_vector_256 = BYTES_PER_VECTOR_256[index.kind]
    if index.kind == "int8-graph" and not index.ann.sketched_links:
        per_vector_256 = BYTES_WITHOUT_SKETCHES_256
    return FIXED_MIB + count * max(per_vector_256 * dimension / 256, 300) / 2**20


def estimate_disk_mib(index: IndexConfig, count: int, dimension: int) -> float:
    """Estimate the disk space that a build needs at its peak, MiB.

    The vectors twice (live writes make a new file of them), the index, and codes and sketches for
    filters. The file from which a library's links are read is gone before the index is saved, and
    smaller.
    """
    signs = (dimension + 63) // 64 * 8
    links = {
        "exact": 0,
        "hnsw": 4 * dimension + 12 * index.ann.m,
        "symqg": 4 * dimension + index.ann.degree * (signs + 16),
        "int8-graph": dimension + index.ann.degree * (signs + 16),
        "faiss": 2 * dimension + 12 * index.ann.m,
    }
    links["auto"] = max(links.values())
    codes = dimension + signs + 16
    per_row = 8 * dimension + links[index.kind] + codes + DISK_BYTES_PER_ROW
    return DISK_MIB_PER_BUILD + count * per_row / 2**20


def fit_memory(entity_type: str, count: int, dimension: int, config: RebuildConfig) -> IndexConfig:
    """Return the index configuration, ``auto`` narrowed to kinds that fit the memory limit.

    Raises:
        ConfigError: The requested kind (or every kind that is installed) needs more.
        MissingDependency: The requested kind is not installed.
        UnsupportedCpu: This CPU cannot search it.
    """
    require_kind(config.index.kind)
    if config.index.kind == "symqg" and count < 2 * MIN_ROWS:
        # Too few for that graph: auto scans them, which is as fast
        return replace(config.index, kind="auto")
    limit = config.max_memory_mib
    needed = estimate_mib(config.index, count, dimension)
    if limit is None or needed <= limit:
        return config.index
    small = [
        replace(config.index, kind="hnsw"),
        replace(
            config.index, kind="int8-graph", ann=replace(config.index.ann, sketched_links=False)
        ),
    ]
    possible = [index for index in small if kind_available(index.kind)]
    if config.index.kind == "auto":
        for index in possible:
            if estimate_mib(index, count, dimension) <= limit:
                return index
    least = min(possible, key=lambda index: estimate_mib(index, count, dimension))
    flags = "hnsw" if least.kind == "hnsw" else "int8-graph --no-sketched-links"
    raise ConfigError(
        f"{entity_type}: --max-memory is {limit:,} MiB, but index kind {config.index.kind} of"
        f" {count:,} x {dimension} needs about {needed:,.0f} MiB at its peak. The installed kind"
        f" that needs least (--index {flags}) needs about"
        f" {estimate_mib(least, count, dimension):,.0f} MiB."
    )


def carried_types(
    inputs: Mapping[str, EntityInput], bundle: Bundle, store: ReleaseStore, parent: str | None
) -> list[str]:
    """Return the entity types to take over from the active release.

    Raises:
        PublishError: The release was proven with another query tower, or has another space.
    """
    if parent is None:
        return []
    manifest = read_manifest(store.path_of(parent))
    missing = sorted(set(manifest.entities) - set(inputs))
    if missing and manifest.query_upgrade != bundle.query_upgrade:
        raise PublishError(
            f"the active release {parent} is searched with another query tower than"
            f" {bundle.path.name}'s (omni rebuild --query-tower), and {', '.join(missing)} would be"
            f" taken over proven with that one. Rebuild {', '.join(missing)} too, or use"
            " --from-active."
        )
    if missing and manifest.space_id != bundle.space_id:
        raise PublishError(
            f"the active release {parent} has {', '.join(sorted(manifest.entities))} under space"
            f" {manifest.space_id[:16]}, but this rebuild brings only {', '.join(sorted(inputs))}"
            f" under space {bundle.space_id[:16]}. One release has one space: rebuild"
            f" {', '.join(missing)} with the new bundle as well."
        )
    return missing
