"""Apply a file of changes to a store: embed its rows and append them to the live log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from encoders.errors import RowError, SchemaError
from encoders.tables.cells import cell_texts
from encoders.tables.checks import check_frame, list_cell
from encoders.tables.files import raise_malformed, raise_problems
from encoders.tables.parts import table_files
from encoders.tables.reading import DEFAULT_OPTIONS, read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import ROW, schema
from index_builder.building.inputs import VECTOR_COLUMNS
from index_builder.errors import UnknownEntityType
from index_builder.filters.json_values import check_attributes, learn_types
from index_builder.live_log.files import log_files
from index_builder.live_log.reader import BATCH_ENTRIES, LiveLogReader
from index_builder.live_log.records import LiveEntry, check_entry
from index_builder.live_log.writer import LiveLogWriter
from index_builder.releases.manifest import Manifest
from index_builder.releases.release import read_manifest
from index_builder.releases.store import ReleaseStore

BATCH_ROWS = 1024


class Embedder(Protocol):
    """What ``encoders.towers.bundle.ModelBundle`` offers here."""

    space_id: str

    def embed_entities(self, catalogue: pl.DataFrame) -> np.ndarray:
        """Embed catalogue rows; float32 ``(N, D)``."""


@dataclass(frozen=True, slots=True)
class Changes:
    """A checked file of changes.

    Attributes:
        upserts: Catalogue rows to embed.
        ready: Entity type -> entries that brought their own vector.
        deletes: Entity type -> ids.
    """

    upserts: pl.DataFrame
    ready: dict[str, list[LiveEntry]]
    deletes: dict[str, list[str]]

    def counts(self) -> dict[str, dict[str, int]]:
        """Count upserts and deletes per entity type."""
        result: dict[str, dict[str, int]] = {}

        def add(entity_type: str, operation: str, count: int) -> None:
            counted = result.setdefault(entity_type, {"upserts": 0, "deletes": 0})
            counted[operation] += count

        if self.upserts.height:
            for entity_type, count in self.upserts["entity_type"].value_counts().rows():
                add(entity_type, "upserts", count)
        for entity_type, entries in self.ready.items():
            add(entity_type, "upserts", len(entries))
        for entity_type, ids in self.deletes.items():
            add(entity_type, "deletes", len(ids))
        return dict(sorted(result.items()))


def read_changes(
    path: Path,
    manifest: Manifest,
    live_root: Path | None = None,
    reading: ReadingOptions = DEFAULT_OPTIONS,
) -> Changes:
    """Read and check a whole file of changes before anything is written.

    Columns are those of the catalogue, plus ``op`` (``upsert``, the default, or ``delete``) and
    optionally ``embedding`` (a unit vector of the active release's space; without it the row is
    embedded). Where several rows name one entity, the last one counts.

    Args:
        path: A table file or a folder of them.
        manifest: Of the active release.
        live_root: Its live log, whose attributes keep their types, too; None: not looked at.
        reading: How the files are written.

    Raises:
        DataError: The file cannot be read, or a row is not what the catalogue schema says; names
            row, column and fix.
        UnknownEntityType: The release has no index of a type.
        BadAttribute: A value does not fit the release's attribute, or one of the live log.
        InvalidVectors: A row's own embedding must not enter an index.
    """
    raw, is_text = _read_last_rows(path, reading)
    is_delete = _operations(raw, path) == "delete"
    rest = raw.drop("op", strict=False)
    deletes = _deletes(rest.filter(is_delete), path.name, manifest.dimension)
    checked = check_frame(rest.filter(~is_delete), schema("catalogue"), path.name)
    raise_problems(checked.report)
    columns = checked.frame.columns
    types = {name: _types(manifest, name, columns, live_root) for name in manifest.entities}
    frame = _parsed(checked.frame, types, with_lists=is_text)
    _check_attributes(frame, types, path.name)
    ready: dict[str, list[LiveEntry]] = {}
    if "embedding" in frame.columns:
        has_vector = frame["embedding"].is_not_null()
        if frame["embedding"].dtype == pl.String:
            has_vector = has_vector & (frame["embedding"].str.strip_chars() != "")
        ready = _ready(frame.filter(has_vector), manifest, path.name)
        frame = frame.filter(~has_vector).drop("embedding")
    embedded = frame["entity_type"].unique().to_list() if frame.height else []
    for entity_type in sorted({*deletes, *ready, *embedded} - set(manifest.entities)):
        rows = raw.filter(raw["entity_type"].str.strip_chars() == entity_type)[ROW]
        where = f"{path.name}, row {rows[0]}" if len(rows) else path.name
        raise UnknownEntityType(entity_type, sorted(manifest.entities), where)
    return Changes(frame, ready, deletes)


def _read_last_rows(path: Path, reading: ReadingOptions) -> tuple[pl.DataFrame, bool]:
    """Read the last row about each entity; it wins, as it would one by one.

    Returns:
        The rows, their ids in Unicode form NFC, and whether their cells are texts (CSV).
    """
    files = table_files(path)
    frames = [chunk for file in files for chunk in read_chunks(file, reading)]
    raw = pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()
    raise_malformed(raw, path.name)
    for name in ("id", "entity_type"):
        if name not in raw.columns:
            found = ", ".join(column for column in raw.columns[:13] if column != ROW)
            raise SchemaError(
                f"{path}: expected columns id, entity_type (and op, title, ...), but {name!r} is"
                f" missing; got {found or 'none'}"
            )
    for name in ("id", "entity_type"):
        if raw[name].dtype.is_nested() or raw[name].dtype == pl.Binary:
            raise SchemaError(
                f"{path}: column {name!r} should hold text, but holds {raw[name].dtype}."
            )
    raw = raw.with_columns(
        cell_texts(raw["id"]).str.normalize("NFC"), cell_texts(raw["entity_type"])
    )
    last = raw.unique(["entity_type", "id"], keep="last", maintain_order=True)
    return last, any(file.is_delimited for file in files)


def _operations(raw: pl.DataFrame, path: Path) -> pl.Series:
    """Return ``upsert``, ``delete`` or an empty string for each row.

    Raises:
        RowError: Anything else.
    """
    if "op" not in raw.columns:
        return pl.Series(["upsert"] * raw.height)
    filled = raw["op"].fill_null("upsert").cast(pl.String)
    operations = filled.str.strip_chars().str.to_lowercase()
    bad = (~operations.is_in(["upsert", "delete", ""])).arg_true()
    if len(bad):
        row = int(bad[0])
        raise RowError(
            f"{path}, row {raw[ROW][row]}: op must be 'upsert' or 'delete', but got"
            f" {operations[row]!r}"
        )
    return operations


def _deletes(removed: pl.DataFrame, source: str, dimension: int) -> dict[str, list[str]]:
    """Return the ids to delete by entity type.

    Raises:
        RowError: A row lacks an id, or names no entity type.
    """
    keys = removed.select(ROW, "id", "entity_type")
    checked = check_frame(keys, schema("catalogue"), source)
    raise_problems(checked.report)
    deletes: dict[str, list[str]] = {}
    for id_, entity_type in checked.frame.select("id", "entity_type").iter_rows():
        check_entry(LiveEntry(id=id_), dimension)
        deletes.setdefault(entity_type, []).append(id_)
    return deletes


def _check_attributes(frame: pl.DataFrame, types: dict[str, dict[str, str]], name: str) -> None:
    """Check every row's attributes against the types its entity type has, and add new ones.

    Raises:
        BadAttribute: A value does not fit.
    """
    for row in frame.drop("embedding", strict=False).iter_rows(named=True):
        known = types.get(row["entity_type"])
        if known is not None:
            attributes = attributes_of(row)
            check_attributes(attributes, known, f"{name}, {row['entity_type']} {row['id']!r}")
            learn_types(known, attributes)


def _types(
    manifest: Manifest, entity_type: str, columns: list[str], live_root: Path | None
) -> dict[str, str]:
    """Return types of attributes; the log is read only where the release does not have them all."""
    entity = manifest.entities[entity_type]
    types = dict(entity.index.get("attributes", {}))
    new = set(columns) - types.keys() - {"id", "entity_type", *VECTOR_COLUMNS}
    files = log_files(live_root / entity_type) if live_root is not None and new else []
    if live_root is None or not files:
        return types
    after = max(entity.watermark, files[0][0] - 1)
    reader = LiveLogReader(live_root, entity_type, after=after)
    try:
        while batch := reader.poll(BATCH_ENTRIES):
            for entry in batch:
                found = entry.attributes
                learn_types(types, {name: found[name] for name in new & found.keys()})
    finally:
        reader.close()
    return types


def _parsed(
    frame: pl.DataFrame, types: dict[str, dict[str, str]], *, with_lists: bool
) -> pl.DataFrame:
    """Turn texts into what an entity type has of numbers, booleans or lists, if all cells can be.

    CSV knows no types; only there (``with_lists``) a text may be meant as a list.
    """
    for name in frame.columns:
        if frame[name].dtype != pl.String or name in {"id", "entity_type"}:
            continue
        wanted = {known[name] for known in types.values() if name in known}
        if with_lists and len(wanted) == 1 and next(iter(wanted)).startswith("list"):
            lists = _lists(frame[name], next(iter(wanted)).replace("time", "string"))
            frame = frame if lists is None else frame.with_columns(lists)
            continue
        if len(wanted) != 1 or not wanted & {"int", "float", "bool"}:
            continue
        texts = frame[name].str.strip_chars()
        texts = texts.set(texts == "", None)
        if wanted == {"bool"}:
            values = texts.str.to_lowercase().replace_strict(
                {"true": True, "false": False}, default=None, return_dtype=pl.Boolean
            )
        else:
            numbers = texts.cast(pl.Float64, strict=False)
            whole = texts.cast(pl.Int64, strict=False)
            values = whole if whole.null_count() == numbers.null_count() else numbers
        if values.null_count() == texts.null_count():
            frame = frame.with_columns(values.alias(name))
    return frame


_LIST_TYPES: dict[str, pl.DataType] = {
    "list<string>": pl.List(pl.String()),
    "list<int>": pl.List(pl.Float64()),
    "list<float>": pl.List(pl.Float64()),
}


def _lists(cells: pl.Series, wanted: str) -> pl.Series | None:
    """Read cells as lists (JSON, or parts separated by ``|``); None: one of them is none."""
    lists = [list_cell(cell) for cell in cells.to_list()]
    if any(items is None and cell and cell.strip() for items, cell in zip(lists, cells.to_list())):
        return None
    texts = pl.Series(cells.name, lists, dtype=pl.List(pl.String))
    try:
        values = texts.cast(_LIST_TYPES[wanted])
    except pl.exceptions.PolarsError:
        return None
    numbers = values.explode().drop_nulls() if wanted != "list<string>" else None
    whole = numbers is not None and bool((numbers == numbers.round(0)).all())
    return values.cast(pl.List(pl.Int64)) if wanted == "list<int>" and whole else values


def _ready(frame: pl.DataFrame, manifest: Manifest, source: str) -> dict[str, list[LiveEntry]]:
    ready: dict[str, list[LiveEntry]] = {}
    vectors = frame["embedding"].to_list()
    plain = frame.drop("embedding")
    for row, vector in zip(plain.iter_rows(named=True), vectors):
        where = f"{source}, {row['entity_type']} {row['id']!r}"
        entry = LiveEntry(
            id=row["id"],
            vector=_vector(vector, where, manifest.dimension),
            space_id=manifest.space_id,
            attributes=attributes_of(row),
            source=source_of(row),
        )
        check_entry(entry, manifest.dimension)
        ready.setdefault(row["entity_type"], []).append(entry)
    return ready


def _vector(cell: Any, where: str, dimension: int) -> np.ndarray:
    """Read a row's own embedding, float32 ``(D,)``.

    Raises:
        RowError: It is no list of numbers.
    """
    try:
        values = json.loads(cell) if isinstance(cell, str) else cell
        vector = np.asarray(values, np.float32)
    except (ValueError, TypeError, RecursionError):
        vector = np.zeros((), np.float32)
    if vector.ndim != 1:
        raise RowError(
            f"{where}: embedding must be a JSON list of {dimension} numbers, got"
            f" {str(cell)[:60]!r}. Leave it empty where the row is to be embedded."
        )
    return vector


def source_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return a catalogue row as JSON values, so that another bundle can embed it again.

    Empty cells are left out.
    """
    return {name: _json_value(value) for name, value in row.items() if not _missing(value)}


def attributes_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return what filters and answers see of a row: all but ids, vectors and nested values."""
    return {
        name: _json_value(value)
        for name, value in row.items()
        if not _missing(value)
        and name not in {"id", "entity_type", *VECTOR_COLUMNS}
        and not isinstance(value, dict)
        and not _nested(value)
    }


def _missing(value: Any) -> bool:
    # NaN is how pandas says that a number is missing
    return value is None or (isinstance(value, float) and value != value)


def _nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, list | dict) for item in value)


def _json_value(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | list | dict) or value is None:
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def apply_changes(changes: Changes, store: ReleaseStore, bundle: Embedder | None) -> dict[str, int]:
    """Write changes to the live log; each batch is durable before the next is embedded.

    Running it again does no harm.

    Args:
        changes: From ``read_changes``.
        store: With an active release.
        bundle: Its towers; may be None when every upsert brought its vector.

    Returns:
        Last sequence number per entity type.
    """
    current = store.current()
    assert current is not None, "read_changes needs the active release's manifest"
    manifest = read_manifest(store.path_of(current))
    writers: dict[str, LiveLogWriter] = {}
    last: dict[str, int] = {}
    try:
        for entity_type, entries in _batches(changes, bundle):
            writer = writers.get(entity_type)
            if writer is None:
                writer = writers[entity_type] = LiveLogWriter(
                    store.live_root,
                    entity_type,
                    manifest.dimension,
                    after=manifest.entities[entity_type].watermark,
                )
            last[entity_type] = writer.write(entries)
    finally:
        for writer in writers.values():
            writer.close()
    return last


def _batches(changes: Changes, bundle: Embedder | None) -> Iterator[tuple[str, list[LiveEntry]]]:
    for entity_type, entries in changes.ready.items():
        for start in range(0, len(entries), BATCH_ROWS):
            yield entity_type, entries[start : start + BATCH_ROWS]
    if changes.upserts.height:
        by_type = changes.upserts.group_by("entity_type", maintain_order=True)
        for (name,), frame in by_type:
            for start in range(0, frame.height, BATCH_ROWS):
                yield str(name), embed_rows(frame[start : start + BATCH_ROWS], bundle)
    for entity_type, ids in changes.deletes.items():
        for start in range(0, len(ids), BATCH_ROWS):
            yield entity_type, [LiveEntry(id=id_) for id_ in ids[start : start + BATCH_ROWS]]


def embed_rows(frame: pl.DataFrame, bundle: Embedder | None) -> list[LiveEntry]:
    """Embed catalogue rows; return them as upserts with vectors of the bundle's space."""
    assert bundle is not None, "rows without an embedding need a bundle"
    vectors = np.ascontiguousarray(bundle.embed_entities(frame), np.float32)
    return [
        LiveEntry(
            id=row["id"],
            vector=vector,
            space_id=bundle.space_id,
            attributes=attributes_of(row),
            source=source_of(row),
        )
        for row, vector in zip(frame.iter_rows(named=True), vectors)
    ]


def embed_again(entries: list[LiveEntry], bundle: Embedder) -> list[LiveEntry]:
    """Embed live entries of another space again, from the catalogue rows they carry.

    They repeat what was written: their times are kept, and they say which write it is.

    Args:
        entries: Upserts with a ``source``.
        bundle: Of the new space.
    """
    rows = [{**(entry.source or {}), "id": entry.id} for entry in entries]
    frame = pl.from_dicts(rows, infer_schema_length=None)
    checked = check_frame(frame, schema("catalogue"), "live log")
    raise_problems(checked.report)
    written = {entry.id: entry for entry in entries}
    return [
        replace(entry, time_ns=written[entry.id].time_ns, repeats=written[entry.id].version)
        for entry in embed_rows(checked.frame, bundle)
    ]
