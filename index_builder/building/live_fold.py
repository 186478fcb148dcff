"""Folding the live log into an input: read its last writes, apply them, refuse what would be lost.

What is in effect is decided in ``order.py``.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import polars as pl

from index_builder.building.inputs import BLOCK_ROWS, EntityInput
from index_builder.building.order import Folded, LiveChanges, LiveWrites, some_ids
from index_builder.errors import GateFailed, LiveLogCorrupt, LiveLogError
from index_builder.filters.folding import fold_attributes
from index_builder.lexical.counting import attribute_texts
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.live_log.files import ends_early, log_files
from index_builder.live_log.reader import BATCH_ENTRIES, LiveLogReader
from index_builder.live_log.records import LiveEntry
from index_builder.releases.manifest import EntityManifest
from index_builder.search.live_blocks import attribute_frame

log = logging.getLogger(__name__)

_FEW_IDS = 100
"""So many live writes may always be lost to a newer source."""


def read_live(
    live_root: Path, entity_type: str, after: int, *, contained: int | None = None
) -> LiveWrites:
    """Read the last live write of each id behind sequence ``after``.

    Args:
        live_root: ``<store>/live``.
        entity_type: Which log.
        after: Watermark of the source.
        contained: For a source that never held live writes (a catalogue): watermark of the active
            release. Writes up to there may have been collected, and are then left out with a
            warning. None: every write behind ``after`` is needed.

    Raises:
        LiveLogError: Writes that are needed are no longer there.
        LiveLogCorrupt: The log is damaged.
    """
    files = log_files(live_root / entity_type)
    start = after
    if contained is not None and files and after < files[0][0] - 1 <= contained:
        start = files[0][0] - 1
        log.warning(
            f"{entity_type}: live writes {after + 1:,} to {start:,} were collected (omni release gc"
            " --drop-folded-log): deletes and entities among them that the source does not know are"
            " not in this release"
        )
    if files and files[0][0] > start + 1:
        raise LiveLogError(
            f"live log of {entity_type!r}: the writes from {start + 1} on are needed, but its"
            f" oldest file begins at {files[0][0]}: {files[0][0] - start - 1:,} acknowledged writes"
            " are gone. Nothing was published; restore the missing files from a replica or backup."
        )
    reader = LiveLogReader(live_root, entity_type, after=start)
    latest: dict[str, LiveEntry] = {}
    try:
        while batch := reader.poll(BATCH_ENTRIES):
            for entry in batch:
                latest[entry.id] = entry
    finally:
        reader.close()
    if contained is not None and reader.sequence < contained:
        raise LiveLogCorrupt(
            f"{ends_early(entity_type, contained, reader.sequence)} To build without the live log,"
            " pass --no-live."
        )
    return LiveWrites(latest, reader.sequence)


def apply_live(entities: EntityInput, changes: LiveChanges, into: Path) -> EntityInput:
    """Apply live writes to an input.

    Args:
        entities: The input.
        changes: What is in effect over its rows.
        into: File for the new vectors (raw float32), written only when something changes.

    Returns:
        The changed input, its vectors memory-mapped.
    """
    dead, fresh = changes.dead, changes.fresh
    if not dead and not fresh:
        return entities
    keep = np.ones(len(entities.ids), bool)
    keep[dead] = False
    _write_vectors(into, entities.vectors, keep, fresh)
    ids = [id_ for id_, stays in zip(entities.ids, keep) if stays] + [e.id for e in fresh]
    shape = (len(ids), entities.vectors.shape[1])
    vectors: np.ndarray = np.zeros(shape, np.float32)
    if ids:
        vectors = np.memmap(into, np.float32, "r", shape=shape)
    return EntityInput(
        ids=ids,
        vectors=vectors,
        space_id=entities.space_id,
        attributes=fold_attributes(
            entities.attributes,
            keep,
            attribute_frame([entry.attributes for entry in fresh]),
            [entry.sequence for entry in fresh],
        ),
        base_watermark=changes.folded.watermark,
        settled=changes.folded.settled,
        texts=_fold_texts(entities.texts, keep, fresh),
        words=_fold_words(entities.words, keep, fresh),
        engagements=entities.engagements,
    )


def _write_vectors(
    path: Path, vectors: np.ndarray, keep: np.ndarray, fresh: list[LiveEntry]
) -> None:
    """Write the rows that stay and those of fresh entries, raw float32."""
    with open(path, "wb") as file:
        for start in range(0, len(keep), BLOCK_ROWS):
            block = np.asarray(vectors[start : start + BLOCK_ROWS])
            block[keep[start : start + BLOCK_ROWS]].tofile(file)
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


def refuse_overridden(
    entity_type: str, entities: EntityInput, folded: Folded, max_share: float
) -> None:
    """Stop where a source would undo more live writes than is plausible.

    Raises:
        GateFailed: More than ``max_share`` of its rows, and more than a hundred.
    """
    allowed = max(_FEW_IDS, int(max_share * len(entities.ids)))
    if len(folded.lost) > allowed:
        raise GateFailed(
            f"{entity_type}: the source would undo {len(folded.lost):,} acknowledged live writes,"
            f" more than the {allowed:,} allowed: {some_ids(folded.lost)}. Nothing was published."
            " If its data is older than they are, say when it was current (--exported-at TIME, or a"
            " column modified_at); if it is right, raise --max-overridden."
        )


def refuse_shrunken(
    entity_type: str, changes: LiveChanges, rows: int, active: EntityManifest, max_shrink: float
) -> None:
    """Stop where a source holds far fewer entities than the active release.

    Args:
        entity_type: Which.
        changes: What live writes do to the source.
        rows: Rows of the source.
        active: The entity type in the active release.
        max_shrink: Share of its entities that may be missing. What was deleted live does not count.

    Raises:
        GateFailed: More are missing.
    """
    count = rows - len(changes.dead) + len(changes.fresh)
    expected = active.count - sum(s > active.watermark for s in changes.deleted)
    if count < (1 - max_shrink) * expected:
        raise GateFailed(
            f"{entity_type}: this release would hold {count:,} entities, the active one holds"
            f" {active.count:,}: {1 - count / max(expected, 1):.0%} would be gone, more than"
            f" --max-shrink {max_shrink:g} allows. Nothing was published. Check that the export is"
            " whole; if it is, pass --max-shrink 1."
        )
