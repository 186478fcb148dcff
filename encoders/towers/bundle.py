"""Save and load model bundles: both towers in one folder under one space id.

A bundle is written whole or not at all, and checked on load.

```
config.json       format version, dimension, entity types, the resolved training config
space.json        the space id, and older spaces declared compatible with their measured recall
query_encoder/    a valid Sentence-Transformers model
entity_encoder/   one tower for all entity types, or one folder per entity type; with a text
                  embedding, its frozen tower is in text_tower/
forms/            exports (ONNX) of the query tower; not part of the space
compatibility/    adapters from this space to older ones, not part of the space
                  (encoders/compatibility/declaration.py)
metrics.json      evaluation figures; not part of the space
README.md         model card
```
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from encoders.errors import BundleError, DataError
from encoders.file_modes import follow_umask, replace_folder
from encoders.towers.entity_tower import EntityEncoder
from encoders.towers.query_tower import QueryEncoder

FORMAT_VERSION = 1
_TOWERS = ("query_encoder", "entity_encoder")
QUERY_UPGRADE = "query_upgrade"
"""Key of ``space.json`` where the query tower is a newer bundle's.

Its ``files_id`` then stands for the files instead of the space id.
"""


@dataclass
class ModelBundle:
    """Both towers of one embedding space, loaded.

    Attributes:
        path: The folder.
        space_id: SHA-256 (64 hex digits) over every file of both towers; vectors are comparable
            only under one space id.
        dimension: D.
        config: ``config.json``.
        query_encoder: Text -> vector.
        entity_encoders: Entity type -> tower; with a unified tower every type holds the same
            object.
    """

    path: Path
    space_id: str
    dimension: int
    config: dict[str, Any]
    query_encoder: QueryEncoder
    entity_encoders: dict[str, EntityEncoder] = field(default_factory=dict)

    @property
    def engaged_queries(self) -> int:
        """Engaged queries that the entity towers read; 0: as many as a catalogue holds."""
        featurizers = (tower.featurizer for tower in self.entity_encoders.values())
        depths = [f.config.engaged_queries for f in featurizers if f is not None]
        return 0 if 0 in depths else max(depths, default=0)

    def embeds(self, entity_type: str) -> bool:
        """Tell whether there is a tower for this entity type."""
        return entity_type == "query" or entity_type in self.entity_encoders

    def embed_queries(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Embed query texts; float32 (B, D), unit rows."""
        return self.query_encoder.encode(texts, batch_size)

    def embed_entities(self, catalogue: pl.DataFrame, batch_size: int = 1024) -> np.ndarray:
        """Embed catalogue rows; ``entity_type`` chooses the tower.

        A row of type ``query`` goes through the query tower by its title, or else its id.

        Returns:
            float32 (N, D), unit rows, in the order of the rows.

        Raises:
            DataError: A row's entity type has no tower in this bundle.
        """
        out = np.empty((catalogue.height, self.dimension), np.float32)
        types = catalogue["entity_type"]
        for entity_type in types.unique().to_list():
            rows = np.flatnonzero((types == entity_type).to_numpy())
            part = catalogue[rows]
            if entity_type == "query":
                out[rows] = self.embed_queries(part["title"].fill_null(part["id"]).to_list())
            elif entity_type in self.entity_encoders:
                out[rows] = self.entity_encoders[entity_type].encode(part, batch_size)
            else:
                known = ", ".join([*self.entity_encoders, "query"])
                raise DataError(
                    f"{self.path}: no tower for entity type {entity_type!r}; this bundle embeds"
                    f" {known}. Train with pairs of that type."
                )
        return out


def save_bundle(
    path: Path,
    query_encoder: QueryEncoder,
    entity_encoders: Mapping[str, EntityEncoder],
    *,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    filled: Mapping[str, float] | None = None,
) -> ModelBundle:
    """Write a bundle beside ``path`` and rename it into place.

    An existing bundle there is replaced only when the new one is whole.

    Args:
        path: Target folder.
        query_encoder: The query tower.
        entity_encoders: Entity type -> tower; types that share one object are saved once.
        training: The resolved training config, recorded.
        metrics: Evaluation figures, recorded.
        filled: Column -> share of the trained-on catalogue's rows that have a value, recorded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        query_encoder.save(staging / "query_encoder")
        unified = len({id(tower) for tower in entity_encoders.values()}) == 1
        for entity_type, tower in entity_encoders.items():
            tower.save(
                staging / "entity_encoder" if unified else staging / "entity_encoder" / entity_type
            )
            if unified:
                break
        config = {
            "format_version": FORMAT_VERSION,
            "dimension": query_encoder.dimension,
            "entity_types": sorted(entity_encoders),
            "unified_entity_tower": unified,
            "training": dict(training or {}),
            "filled": dict(filled or {}),
        }
        _write_json(staging / "config.json", config)
        space_id = compute_space_id(staging)
        _write_json(
            staging / "space.json",
            {
                "space_id": space_id,
                "dimension": query_encoder.dimension,
                "compatible": [],
            },
        )
        _write_json(staging / "metrics.json", dict(metrics or {}))
        card = _model_card(config, space_id, metrics or {})
        (staging / "README.md").write_text(card, encoding="utf-8")
        (staging / "forms").mkdir()
        follow_umask(staging)
        replace_folder(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return load_bundle(path)


def load_bundle(path: Path) -> ModelBundle:
    """Read a bundle and check that its files still make its space id.

    Raises:
        BundleError: Missing, truncated, changed after saving, or of another format version.
    """
    config = _read_json(path / "config.json")
    if config.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path}: bundle format {config.get('format_version')!r}, but this version reads"
            f" {FORMAT_VERSION}. Train again, or load it with the version of omnisearchsage that"
            " wrote it."
        )
    space_id = check_space_id(path)
    query_encoder = QueryEncoder.load(path / "query_encoder")
    root = path / "entity_encoder"
    dimension, types, unified = _shape(path / "config.json", config)
    if unified:
        tower = EntityEncoder.load(root)
        towers = dict.fromkeys(types, tower)
    else:
        towers = {entity_type: EntityEncoder.load(root / entity_type) for entity_type in types}
    return ModelBundle(path, space_id, dimension, config, query_encoder, towers)


def _shape(path: Path, config: Mapping[str, Any]) -> tuple[int, list[str], bool]:
    """Read dimension, entity types and whether one tower serves them all."""
    dimension, types, unified = (
        config.get(name) for name in ("dimension", "entity_types", "unified_entity_tower")
    )
    if (
        not isinstance(dimension, int)
        or not isinstance(types, list)
        or not isinstance(unified, bool)
    ):
        raise BundleError(
            f"{path}: expected 'dimension' (a number), 'entity_types' (a list) and"
            f" 'unified_entity_tower' (true or false), but got {dimension!r}, {types!r} and"
            f" {unified!r}. Copy the bundle again."
        )
    return dimension, types, unified


def read_space(path: Path) -> dict[str, Any]:
    """Read ``space.json`` of a bundle, or of a release's copy of its files.

    Raises:
        BundleError: Missing, unreadable, or without ``space_id``.
    """
    space = _read_json(path / "space.json")
    if not isinstance(space.get("space_id"), str):
        raise BundleError(
            f"{path}/space.json: expected a space_id, but there is none. Copy the bundle again."
        )
    return space


def read_space_id(path: Path) -> str:
    """Read the space id that a bundle, or a release's copy of its files, declares."""
    return str(read_space(path)["space_id"])


def check_space_id(path: Path) -> str:
    """Check that the towers' files are those that were saved, and return the space id.

    Raises:
        BundleError: A tower's file was changed, is missing or was added.
    """
    space = read_space(path)
    found, expected = compute_space_id(path), space["space_id"]
    upgrade = space.get(QUERY_UPGRADE)
    if isinstance(upgrade, dict):
        expected = str(upgrade.get("files_id"))
    if found != expected:
        raise BundleError(
            f"{path}: the towers' files make space id {found[:16]}, but space.json says"
            f" {expected[:16]}. A file was changed or cut short after saving: copy the bundle"
            " again."
        )
    return str(space["space_id"])


def compute_space_id(path: Path) -> str:
    """Hash the relative names and contents of every file of both towers, in sorted order (SHA-256).

    Raises:
        BundleError: A tower's folder is missing.
    """
    digest = hashlib.sha256(b"omnisearchsage space v1\n")
    for tower in _TOWERS:
        files = sorted(file for file in (path / tower).rglob("*") if file.is_file())
        if not files:
            raise BundleError(
                f"{path}: {tower}/ is missing or empty. Expected a model bundle, as written by"
                " `omni train`."
            )
        for file in files:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(path).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _model_card(config: Mapping[str, Any], space_id: str, metrics: Mapping[str, Any]) -> str:
    """Describe a bundle, with the head that the Hugging Face hub reads."""
    lines = [
        "---",
        "library_name: omnisearchsage",
        "pipeline_tag: sentence-similarity",
        "tags: [search, retrieval, embeddings]",
        "---",
        "",
        "# Model bundle",
        "",
        (
            f"Query tower and entity tower ({', '.join(config['entity_types'])}) in one"
            f" {config['dimension']}-d space."
        ),
        (
            "`query_encoder/` loads with Sentence-Transformers; the whole folder with"
            " `encoders.load_bundle`, or `encoders.towers.hub.from_pretrained` by its name."
        ),
        f"Space id: `{space_id}`. Vectors are comparable only under one space id.",
        "",
        "## Metrics",
        "",
        *(f"- {name}: {value}" for name, value in metrics.items()),
    ]
    return "\n".join(lines) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path}: cannot be read ({error}). Expected a model bundle, as written by `omni"
            " train`."
        ) from error
    if not isinstance(value, dict):
        raise BundleError(f"{path}: expected a JSON object, but got {type(value).__name__}.")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(
        json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8"
    )
