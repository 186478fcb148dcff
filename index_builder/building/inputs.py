"""What goes into a build: embedded entities, checked row by row, with the live log folded in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from encoders.errors import InvalidVectors, SpaceMismatch
from index_builder.errors import DuplicateIds, LiveLogError
from index_builder.filters.folding import fold_attributes
from index_builder.fusion.engagements import Engagements
from index_builder.lexical.counting import attribute_texts
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.live_log.files import log_files
from index_builder.live_log.reader import LiveLogReader
from index_builder.live_log.records import LiveEntry
from index_builder.search.live_blocks import attribute_frame
from index_builder.storage.corpus import check_vectors

_BLOCK_ROWS = 65_536
_BATCH_ENTRIES = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityInput:
    """The embedded entities of one type.

    Attributes:
        ids: Unique, non-empty NFC strings, in row order.
        vectors: float32 ``(N, D)``, unit rows; a ``numpy.memmap`` keeps memory bounded.
        space_id: Space of the vectors.
        attributes: ``N`` rows aligned with ``ids`` (no ``id`` column), or None.
        updated_at_ns: int64 ``(N,)`` when each vector was made, nanoseconds since 1970, or None if
            unknown. A live write that is older than the row loses.
        base_watermark: Live-log sequence already inside (for vectors taken from a release).
        texts: Catalogue columns with words, ``N`` rows of strings, or None.
        words: Words of the rows where ``texts`` are not at hand (taken from a release), or None.
        engagements: Known queries of these entities, or None.
    """

    ids: Sequence[str]
    vectors: np.ndarray
    space_id: str
    attributes: pl.DataFrame | None = None
    updated_at_ns: np.ndarray | None = None
    base_watermark: int = 0
    texts: pl.DataFrame | None = None
    words: LexicalIndex | None = None
    engagements: Engagements | None = None

    def lexical(self) -> LexicalIndex | None:
        """Return the words of the rows; None where there are no texts."""
        if self.texts is None:
            return self.words
        fields = {name: self.texts[name].to_list() for name in self.texts.columns}
        return LexicalIndex.build(fields, len(self.ids))


@dataclass(frozen=True, slots=True)
class QuerySet:
    """Queries with their vectors: some become golden queries, the others calibrate.

    Attributes:
        texts: Query strings; empty strings where unknown.
        vectors: float32 ``(Q, D)``, unit rows, made by the bundle's query tower.
    """

    texts: list[str]
    vectors: np.ndarray


class LiveWrites(NamedTuple):
    """What the live log holds behind a watermark."""

    latest: dict[str, LiveEntry]
    """The last write per id."""
    watermark: int
    """Sequence of the last write."""


@dataclass(frozen=True, slots=True)
class Folded:
    """How the live log changed an input."""

    watermark: int
    upserts: int = 0
    deletes: int = 0
    stale: int = 0
    """Writes older than the row they would change."""
    foreign: list[str] = field(default_factory=list)
    """Ids whose live vector belongs to another space, without a source row to embed again."""

    def __str__(self) -> str:
        """Say what was folded; empty where nothing was."""
        if not (self.upserts or self.deletes or self.stale or self.foreign):
            return ""
        return (
            f"live log up to {self.watermark}: {self.upserts:,} upserts and {self.deletes:,}"
            f" deletes folded in, {self.stale:,} stale, {len(self.foreign):,} foreign"
        )

    def counts(self) -> dict[str, int]:
        """Return the counts for the manifest."""
        return {
            "upserts": self.upserts,
            "deletes": self.deletes,
            "stale": self.stale,
            "foreign": len(self.foreign),
        }


def check_input(entity_type: str, entities: EntityInput, space_id: str, dimension: int) -> None:
    """Refuse what must never enter an index; reads the vectors once, block by block.

    Raises:
        SpaceMismatch: The vectors were made under another space id.
        InvalidVectors: Shape, dtype, NaN, Inf, zero or norm; names the first bad row, its id and
            the fix.
        DuplicateIds: An id occurs twice; names both rows.
    """
    if entities.space_id != space_id:
        raise SpaceMismatch(space_id, entities.space_id, f"signals of {entity_type!r}")
    ids = entities.ids
    if (
        entities.attributes is not None
        and entities.attributes.width
        and entities.attributes.height != len(ids)
    ):
        raise InvalidVectors(
            f"{entity_type}: expected one row of attributes per id, but got"
            f" {entities.attributes.height:,} rows for {len(ids):,} ids"
        )
    _check_distinct(entity_type, ids)
    try:
        check_vectors(entities.vectors, ids, dimension)
    except InvalidVectors as error:
        raise InvalidVectors(f"{entity_type}: {error}") from error


def _check_distinct(entity_type: str, ids: Sequence[str]) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: dict[str, int] = {}
    for row, id_ in enumerate(ids):
        if id_ in seen:
            raise DuplicateIds(
                f"{entity_type}: id {id_!r} occurs in rows {seen[id_]} and {row}; keep one of them"
            )
        seen[id_] = row


def read_live(live_root: Path, entity_type: str, after: int) -> LiveWrites:
    """Read the live writes behind sequence ``after``.

    Args:
        live_root: ``<store>/live``.
        entity_type: Which log.
        after: Watermark of the source; where older entries were collected already, what is left is
            read.
    """
    files = log_files(live_root / entity_type)
    if not files:
        return LiveWrites({}, after)
    reader = LiveLogReader(live_root, entity_type, after=max(after, files[0][0] - 1))
    latest: dict[str, LiveEntry] = {}
    try:
        while batch := reader.poll(_BATCH_ENTRIES):
            for entry in batch:
                latest[entry.id] = entry
        return LiveWrites(latest, reader.sequence)
    finally:
        reader.close()


class _Changes(NamedTuple):
    """What live writes do to the rows of an input."""

    dead: list[int]
    """Rows replaced or deleted."""
    fresh: list[LiveEntry]
    """Upserts, to be appended."""
    folded: Folded


def fold_live(entities: EntityInput, live: LiveWrites, into: Path) -> tuple[EntityInput, Folded]:
    """Apply live writes to an input.

    Args:
        entities: The input.
        live: Writes behind its watermark.
        into: File for the new vectors (raw float32), written only when something changes.

    Returns:
        The changed input (its vectors memory-mapped) and what was done.
    """
    dead, fresh, folded = _changes(entities, live)
    if not dead and not fresh:
        return entities, folded
    keep = np.ones(len(entities.ids), bool)
    keep[dead] = False
    _write_vectors(into, entities.vectors, keep, fresh)
    ids = [id_ for id_, stays in zip(entities.ids, keep) if stays] + [e.id for e in fresh]
    shape = (len(ids), entities.vectors.shape[1])
    vectors: np.ndarray = np.zeros(shape, np.float32)
    if ids:
        vectors = np.memmap(into, np.float32, "r", shape=shape)
    changed = EntityInput(
        ids=ids,
        vectors=vectors,
        space_id=entities.space_id,
        attributes=fold_attributes(
            entities.attributes,
            keep,
            attribute_frame([entry.attributes for entry in fresh]),
            [entry.sequence for entry in fresh],
        ),
        base_watermark=live.watermark,
        texts=_fold_texts(entities.texts, keep, fresh),
        words=_fold_words(entities.words, keep, fresh),
        engagements=entities.engagements,
    )
    return changed, folded


def _changes(entities: EntityInput, live: LiveWrites) -> _Changes:
    """Decide for each live write whether it is stale, of another space, or changes a row."""
    row_of = {id_: row for row, id_ in enumerate(entities.ids) if id_ in live.latest}
    times = entities.updated_at_ns
    dead: list[int] = []
    fresh: list[LiveEntry] = []
    foreign: list[str] = []
    deletes = stale = 0
    for id_ in sorted(live.latest):
        entry, row = live.latest[id_], row_of.get(id_)
        if row is not None and times is not None and int(times[row]) > entry.time_ns:
            stale += 1
            continue
        if entry.vector is not None and entry.space_id != entities.space_id:
            foreign.append(id_)
            continue
        if row is not None:
            dead.append(row)
        if entry.vector is not None:
            fresh.append(entry)
        else:
            deletes += 1
    return _Changes(dead, fresh, Folded(live.watermark, len(fresh), deletes, stale, foreign))


def _write_vectors(
    path: Path, vectors: np.ndarray, keep: np.ndarray, fresh: list[LiveEntry]
) -> None:
    """Write the rows that stay and those of fresh entries, raw float32."""
    with open(path, "wb") as file:
        for start in range(0, len(keep), _BLOCK_ROWS):
            block = np.asarray(vectors[start : start + _BLOCK_ROWS])
            block[keep[start : start + _BLOCK_ROWS]].tofile(file)
        for entry in fresh:
            assert entry.vector is not None
            entry.vector.tofile(file)


def _fold_texts(
    texts: pl.DataFrame | None, keep: np.ndarray, fresh: list[LiveEntry]
) -> pl.DataFrame | None:
    """Append the texts of fresh entries to those of the rows that stay."""
    if texts is None:
        return None
    added = pl.DataFrame(attribute_texts([entry.attributes for entry in fresh]))
    if not added.width:
        added = pl.DataFrame({texts.columns[0]: [""] * len(fresh)}, schema_overrides=texts.schema)
    return pl.concat([texts.filter(pl.Series(keep)), added], how="diagonal").fill_null("")


def _fold_words(
    words: LexicalIndex | None, keep: np.ndarray, fresh: list[LiveEntry]
) -> LexicalIndex | None:
    """Append the words of fresh entries to those of the rows that stay."""
    if words is None:
        return None
    return words.updated(keep, attribute_texts([entry.attributes for entry in fresh]), len(fresh))


def fingerprint(entities: EntityInput) -> str:
    """Return SHA-256 over ids, vectors, attributes, texts and space of an input.

    By it an interrupted build recognises its own work.
    """
    digest = hashlib.sha256(entities.space_id.encode())
    digest.update("\0".join(entities.ids).encode())
    for start in range(0, len(entities.vectors), _BLOCK_ROWS):
        digest.update(np.ascontiguousarray(entities.vectors[start : start + _BLOCK_ROWS]).data)
    if entities.attributes is not None and entities.attributes.width:
        digest.update(repr(entities.attributes.schema).encode())
        digest.update(entities.attributes.hash_rows(seed=1).to_numpy().tobytes())
    if entities.texts is not None:
        digest.update(repr(entities.texts.columns).encode())
        digest.update(entities.texts.hash_rows(seed=1).to_numpy().tobytes())
    if entities.words is not None:
        digest.update(entities.words.postings.rows.data)
        digest.update(entities.words.postings.weights.data)
    return digest.hexdigest()


def align_attributes(
    catalogue: pl.DataFrame, ids: Sequence[str], drop: Sequence[str] = ()
) -> pl.DataFrame:
    """Return catalogue rows in the order of ``ids``; an id without a row gets nulls.

    Args:
        catalogue: With an ``id`` column.
        ids: Row order wanted.
        drop: Columns that are not attributes.
    """
    names = [name for name in catalogue.columns if name not in {"id", "entity_type", *drop}]
    wanted = pl.DataFrame({"id": pl.Series(list(ids), dtype=pl.String)})
    return wanted.join(
        catalogue.select("id", *names).unique("id", keep="first"),
        on="id",
        how="left",
        maintain_order="left",
    ).drop("id")


def refuse_foreign(entity_type: str, folded: Folded) -> None:
    """Stop before live writes get lost.

    Raises:
        LiveLogError: Some live entities exist only as vectors of another space.
    """
    if folded.foreign:
        raise LiveLogError(
            f"{entity_type}: {len(folded.foreign)} live entities (first {folded.foreign[0]!r}) were"
            " written under another space id and cannot enter this index. Write them again with"
            " the new bundle (omni update), put them into the catalogue, or pass"
            " --drop-foreign-live."
        )
