"""``omni rebuild --query-tower``: another bundle's query tower over the active indexes."""

from __future__ import annotations

from pathlib import Path

from encoders.commands.console import print_json, print_table
from encoders.compatibility.declaration import (
    Declaration,
    load_adapter,
    require_declaration,
)
from encoders.errors import ConfigError
from index_builder.building.plan import RebuildConfig
from index_builder.building.query_upgrade import upgrade_query_tower
from index_builder.building.sources import read_query_texts
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore

_MEASURES = ("recall@10", "low", "high", "overlap@10_with_old")
_COLUMNS = (
    "entity type",
    "way",
    "Recall@10",
    "95% low",
    "high",
    "top 10 shared with the old tower",
)


def declared_upgrade(store: ReleaseStore, bundle: Path) -> tuple[str, Declaration]:
    """Return the active release and what the bundle declares about its space.

    Raises:
        ConfigError: Nothing is active.
        SpaceMismatch: The bundle declares nothing about that space.
        BundleError: The bundle or its adapter is damaged.
    """
    current = store.current()
    if current is None:
        raise ConfigError(
            f"no release is active in {store.root}, so there are no indexes to keep. Build one with"
            " --bundle first."
        )
    space_id = read_manifest(store.path_of(current)).space_id
    declaration = require_declaration(bundle, space_id, current)
    load_adapter(bundle, declaration)
    return current, declaration


def print_declared(bundle: Path, declaration: Declaration) -> None:
    """Print the recall that was measured when the bundle was declared compatible."""
    rows = [
        (entity_type, way, *(figures.get(measure) for measure in _MEASURES))
        for entity_type, found in declaration.measured.items()
        for way, figures in found.items()
        if isinstance(figures, dict)
    ]
    title = (
        f"measured when {bundle.name} was declared compatible with space"
        f" {declaration.space_id[:16]} (labelled Recall@10, exact search)"
    )
    print_table(title, _COLUMNS, rows)


def print_declared_json(current: str, declaration: Declaration) -> None:
    """Print what a dry run would take over, as JSON."""
    print_json(
        {
            "dry_run": True,
            "parent": current,
            "space_id": declaration.space_id,
            "measured": declaration.measured,
        }
    )


def upgrade(store: ReleaseStore, bundle: Path, queries: Path | None, config: RebuildConfig) -> str:
    """Publish the active indexes with the bundle's query tower; return the release id."""
    texts: list[str] = []
    if queries is not None:
        wanted = config.golden_queries + config.calibration_queries
        texts = read_query_texts(queries, wanted, config.seed)
    return upgrade_query_tower(store, bundle, texts, config).release_id
