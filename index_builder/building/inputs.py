"""What goes into a build: embedded entities, checked row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from encoders.errors import InvalidVectors, SpaceMismatch
from encoders.tables.schemas import Kind, schema
from index_builder.errors import DuplicateIds
from index_builder.fusion.engagements import Engagements
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.live_log.source_age import NOTHING_SETTLED, Settled, SourceAge
from index_builder.storage.corpus import check_vectors

BLOCK_ROWS = 65_536
VECTOR_COLUMNS = frozenset(
    column.name for column in schema("catalogue").columns if column.kind is Kind.VECTOR
)
"""Columns of a catalogue that hold vectors, which are no attributes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityInput:
    """The embedded entities of one type.

    Attributes:
        ids: Unique, non-empty NFC strings, in row order.
        vectors: float32 ``(N, D)``, unit rows; a ``numpy.memmap`` keeps memory bounded.
        space_id: Space of the vectors.
        attributes: ``N`` rows aligned with ``ids`` (no ``id`` column), or None.
        base_watermark: Live-log sequence already inside (for vectors taken from a release).
        age: How old the rows of a catalogue or signal store are; None: every live write behind
            ``base_watermark`` is later.
        settled: Live writes that an earlier catalogue had caught up with.
        texts: Catalogue columns with words, ``N`` rows of strings, or None.
        words: Words of the rows where ``texts`` are not at hand (taken from a release), or None.
        engagements: Known queries of these entities, or None.
    """

    ids: Sequence[str]
    vectors: np.ndarray
    space_id: str
    attributes: pl.DataFrame | None = None
    base_watermark: int = 0
    age: SourceAge | None = None
    settled: Settled = NOTHING_SETTLED
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


def check_input(
    entity_type: str, entities: EntityInput, space_id: str, dimension: int
) -> np.ndarray:
    """Refuse what must never enter an index; reads the vectors once, block by block.

    Returns:
        The vectors, of unit norm, as the index holds them.

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
        return check_vectors(entities.vectors, ids, dimension)
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


def fingerprint(entities: EntityInput) -> str:
    """Return SHA-256 over ids, vectors, attributes, texts and space of an input.

    By it an interrupted build recognises its own work.
    """
    digest = hashlib.sha256(entities.space_id.encode())
    digest.update("\0".join(entities.ids).encode())
    for start in range(0, len(entities.vectors), BLOCK_ROWS):
        digest.update(np.ascontiguousarray(entities.vectors[start : start + BLOCK_ROWS]).data)
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
