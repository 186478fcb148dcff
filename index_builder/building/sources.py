"""Where a rebuild's vectors, attributes and queries come from: signal stores and releases."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from encoders.errors import DataError, SpaceMismatch
from encoders.inference.signal_store import SignalStore, read_part
from encoders.tables.files import read_whole_table
from index_builder.building.inputs import VECTOR_COLUMNS, EntityInput, align_attributes
from index_builder.errors import NotWritable, PublisherBusy, ReleaseNotFound, UnknownEntityType
from index_builder.fusion.engagements import NO_PAIRS, Engagements
from index_builder.fusion.fused_search import FusedIndex
from index_builder.lexical.counting import TEXT_FIELDS, text_fields
from index_builder.live_log.source_age import Settled
from index_builder.releases.store import ReleaseStore
from index_builder.storage.durable_files import FileLock, make_folder


@contextmanager
def scratch_folder(store: ReleaseStore) -> Iterator[Path]:
    """Make a folder inside the store for streamed vectors; it is removed at the end.

    No other process has its name, and a lock beside it, which the kernel drops when its holder
    dies, says that it is in use. What dead processes left is removed at the start.

    Raises:
        PublisherBusy: Another process keeps the new lock, which it takes for an abandoned one.
    """
    make_folder(store.root)
    _remove_abandoned(store.root)
    lock = FileLock(store.root / f".input-{secrets.token_hex(8)}.lock")
    if not lock.acquire(timeout_seconds=5.0):
        raise PublisherBusy(
            f"process {lock.holder()} is tidying up {store.root} and keeps the lock of a new folder"
            f" ({lock.path.name}). Nothing was changed; run it again."
        )
    folder = lock.path.with_suffix("")
    try:
        make_folder(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.path.unlink(missing_ok=True)
        lock.release()


def _remove_abandoned(root: Path) -> None:
    """Remove scratch folders whose lock nobody holds, and locks that are left alone."""
    for folder in sorted({path.with_suffix("") for path in root.glob(".input-*")}):
        lock = FileLock(folder.with_suffix(".lock"))
        with suppress(NotWritable, OSError):  # of another user, who removes it
            if lock.acquire():
                shutil.rmtree(folder, ignore_errors=True)
                lock.path.unlink(missing_ok=True)
                lock.release()


def from_signals(
    signals: SignalStore, entity_types: Sequence[str], catalogue: pl.DataFrame | None, scratch: Path
) -> dict[str, EntityInput]:
    """Stream embeddings out of a signal store; one part and the ids are in memory at a time.

    Args:
        signals: The signal store.
        entity_types: Which; empty for all it holds.
        catalogue: Its other columns become attributes; None: no attributes.
        scratch: Where the vectors are laid out, raw float32.

    Raises:
        DataError: The store holds no such type or a part is damaged.
        SpaceMismatch: Parts were made under different space ids.
    """
    inputs = {}
    for entity_type in entity_types or signals.entity_types():
        described = signals.describe(entity_type)
        path = scratch / f"{entity_type}.f32"
        ids = _stream_parts(signals, entity_type, described["space_id"], path)
        if len(ids) != described["rows"]:
            raise DataError(
                f"signals.json of {entity_type!r} promises {described['rows']} rows, but the parts"
                f" hold {len(ids)}; embed again"
            )
        shape = (len(ids), int(described["dimension"]))
        vectors: np.ndarray = np.zeros(shape, np.float32)
        if ids:
            vectors = np.memmap(path, np.float32, "r", shape=shape)
        inputs[entity_type] = EntityInput(
            ids=ids,
            vectors=vectors,
            space_id=described["space_id"],
            attributes=attributes_for(catalogue, entity_type, ids),
            texts=texts_for(catalogue, entity_type, ids),
        )
    return inputs


def _stream_parts(signals: SignalStore, entity_type: str, space_id: str, path: Path) -> list[str]:
    """Write the vectors of all parts to ``path``, raw float32; return the ids in row order.

    Raises:
        SpaceMismatch: A part was made under another space id.
    """
    ids: list[str] = []
    with open(path, "wb") as file:
        for part_path in signals.part_paths(entity_type):
            part = read_part(part_path)
            if part.space_id != space_id:
                raise SpaceMismatch(space_id, part.space_id, str(part_path))
            part.vectors.tofile(file)
            ids += part.ids
    return ids


def from_release(
    store: ReleaseStore, entity_types: Sequence[str]
) -> tuple[dict[str, EntityInput], Path]:
    """Read the active release's own vectors and attributes, to fold the live log into them.

    Returns:
        Inputs by entity type, and the release's folder, which serves as the bundle.

    Raises:
        ReleaseNotFound: Nothing is active.
        UnknownEntityType: The release lacks a requested type.
    """
    current = store.current()
    if current is None:
        raise ReleaseNotFound(
            f"no release is active in {store.root}, so there is nothing to rebuild from; give"
            " --bundle and --catalogue or --signals"
        )
    release = store.open_current()
    inputs = {}
    for entity_type in entity_types or sorted(release.entities):
        if entity_type not in release.entities:
            raise UnknownEntityType(entity_type, list(release.entities))
        index = release.entities[entity_type]
        inputs[entity_type] = EntityInput(
            ids=index.ids.take(np.arange(len(index.ids))),
            vectors=index.base_vectors(),
            space_id=release.space_id,
            attributes=index.attribute_table.frame,
            base_watermark=release.manifest.entities[entity_type].watermark,
            words=index.lexical,
            engagements=_engagements_of(release.fused[entity_type]),
            settled=Settled.read(release.path / entity_type),
        )
    release.close()
    return inputs, release.path


def _engagements_of(fused: FusedIndex) -> Engagements | None:
    """Return the pairs that vote in a release, and its weights; None where neither is there.

    Its measured recall is that of the indexes of then.
    """
    if fused.votes is None or fused.queries is None:
        return None if fused.fusion is None else Engagements(NO_PAIRS, fusion=fused.fusion)
    pairs = fused.votes.pairs(fused.queries.ids, fused.entities.ids)
    fusion = None if fused.fusion is None else replace(fused.fusion, recall=())
    return Engagements(pairs, fusion=fusion)


def attributes_for(
    catalogue: pl.DataFrame | None, entity_type: str, ids: Sequence[str]
) -> pl.DataFrame | None:
    """Return attributes of one entity type, in row order.

    They are every catalogue column but ids, declared vectors and nested values.
    """
    if catalogue is None:
        return None
    rows = _rows_of(catalogue, entity_type)
    drop = [
        name
        for name, dtype in rows.schema.items()
        if name in VECTOR_COLUMNS or _nested(dtype) or rows[name].null_count() == rows.height
    ]
    return align_attributes(rows, ids, drop)


def texts_for(
    catalogue: pl.DataFrame | None, entity_type: str, ids: Sequence[str]
) -> pl.DataFrame | None:
    """Return the texts of one entity type, in row order; None where there are none."""
    if catalogue is None:
        return None
    rows = _rows_of(catalogue, entity_type)
    names = [name for name in TEXT_FIELDS if name in rows.columns]
    fields = text_fields(align_attributes(rows.select("id", *names), ids))
    return pl.DataFrame(fields) if fields else None


def _rows_of(catalogue: pl.DataFrame, entity_type: str) -> pl.DataFrame:
    if "entity_type" not in catalogue.columns:
        return catalogue
    return catalogue.filter(pl.col("entity_type") == entity_type)


def _nested(dtype: pl.DataType) -> bool:
    return isinstance(dtype, pl.Struct | pl.Object | pl.Binary) or (
        isinstance(dtype, pl.List | pl.Array)
        and isinstance(dtype.inner, pl.List | pl.Array | pl.Struct)
    )


def read_query_texts(path: Path, limit: int, seed: int) -> list[str]:
    """Read distinct query strings for calibration and golden queries.

    Args:
        path: A text file (one per line), or a table with a column ``query`` (also a folder of part
            files).
        limit: At most this many, drawn at random.
        seed: Of the draw.

    Raises:
        DataError: There is no such file or column, or it holds no query.
    """
    if path.suffix == ".txt":
        try:
            texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the queries cannot be read ({error})") from error
    else:
        frame = read_whole_table(path)
        if "query" not in frame.columns:
            raise DataError(
                f"{path}: expected a column 'query', but got {', '.join(frame.columns[:8])}"
            )
        texts = [str(text).strip() for text in frame["query"].drop_nulls().to_list()]
    distinct = sorted({text for text in texts if text})
    if not distinct:
        raise DataError(f"{path}: no query in it; give a file with at least one")
    order = np.random.default_rng(seed).permutation(len(distinct))[:limit]
    return [distinct[int(i)] for i in order]
