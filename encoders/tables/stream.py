"""Read and check catalogues larger than memory in chunks; where the chunks end changes nothing.

Notable: 32 bytes of memory per row (hashes of its key and of its content) find a row that repeats
one of an earlier chunk or file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from encoders.errors import DataError, RowError, SchemaError
from encoders.tables.cells import AttributeTypes, cell_texts
from encoders.tables.checks import KEEP_ONE, Problem, check_frame
from encoders.tables.files import raise_problems
from encoders.tables.parts import (
    TableFile,
    TableSource,
    check_shapes,
    leaf_type,
    source_name,
    table_files,
)
from encoders.tables.reading import DEFAULT_OPTIONS, read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import DTYPES, ROW, Kind, schema
from encoders.text.normal_forms import normalize_queries

UInt64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]
_TEXT_KINDS = (Kind.ID, Kind.TEXT, Kind.CHOICE, Kind.NAME, Kind.TEXT_LIST)
_TEXT_COLUMNS = {
    c.name: c.dtype
    for table in ("catalogue", "queries")
    for c in schema(table).columns
    if c.kind in _TEXT_KINDS
}


def stream_catalogue(
    paths: Sequence[Path],
    *,
    columns: Collection[str] | None = None,
    entity_type: str | None = None,
    chunk_rows: int = 8_192,
    reading: ReadingOptions = DEFAULT_OPTIONS,
) -> Iterator[pl.DataFrame]:
    """Yield the checked rows of catalogue or query files in order.

    All formats are streamed, CSV twice: its attributes become what ``read_table`` makes of them,
    and all CSV files decide what that is. Those of ``columns``, which a tower reads, come as text
    where they are single numbers or truth values: one file may hold 38 where the next one holds
    38.5 or XL. A table of queries (column ``query``, no ``id``) yields query entities whose id and
    title are the query. A
    row of a catalogue that repeats an earlier one exactly, in any of the files, is left out, as
    ``read_table`` does; of Parquet only the columns wanted are read, and so compared.

    Args:
        paths: Files, or folders of them.
        columns: Columns wanted beside ``id`` and ``entity_type``; None: all.
        entity_type: Type of every row where the files have no such column.
        chunk_rows: Rows of a frame.
        reading: What is known about how the files are written.

    Yields:
        Frames of at most ``chunk_rows`` rows with ``id``, ``entity_type`` and those of ``columns``
        that are there.

    Raises:
        DataError: A file is missing or unreadable, or there are no rows.
        SchemaError: A required column is missing, or a column holds lists in one place and single
            values in another; both are named.
        RowError: A row breaks a rule of the catalogue, or repeats an id with other content; file,
            row, column, value and fix are named.
    """
    seen = _RowsSeen()
    shapes: dict[str, tuple[str, str]] = {}
    files = table_files(paths)
    attributes = AttributeTypes(schema("catalogue"))
    for file in files:
        if file.is_delimited:
            for raw in read_chunks(file, reading):
                attributes.add(raw, file)
    rows_read = 0
    for file in files:
        for raw in _raw_chunks(file, columns, chunk_rows, reading):
            rows = _checked(raw, file.name, entity_type, columns, seen)
            rows = attributes.typed(rows) if file.is_delimited else rows
            rows = _numbers_as_texts(rows, columns or ())
            first_row = raw[ROW][0] if raw.height else 1
            where = f"{file.name} (rows from {first_row:,})"
            check_shapes(rows, where, shapes)
            rows_read += raw.height
            if rows.height:
                yield rows
    if not rows_read:
        raise DataError(f"{source_name(paths)}: there are no rows. Was the export cut short?")


def count_rows(paths: Sequence[Path]) -> int | None:
    """Count the rows of all files where the footers tell (Parquet only), else return None.

    Raises:
        DataError: A Parquet file is unreadable.
    """
    files = table_files(paths)
    if any(file.format != ".parquet" for file in files):
        return None
    return sum(parquet_rows(file.path) for file in files)


def _numbers_as_texts(rows: pl.DataFrame, columns: Collection[str]) -> pl.DataFrame:
    """Turn the attributes among ``columns`` that hold numbers or truth values into texts."""
    single = [
        name
        for name in columns
        if name in rows.columns
        and schema("catalogue").column(name) is None
        and (rows.schema[name].is_numeric() or rows.schema[name] == pl.Boolean)
    ]
    return rows.with_columns(cell_texts(rows[name]) for name in single)


def _checked(
    raw: pl.DataFrame,
    source: str,
    entity_type: str | None,
    columns: Collection[str] | None,
    seen: _RowsSeen,
) -> pl.DataFrame:
    """Check a chunk of a file, and leave out repeated rows."""
    if "id" not in raw.columns and "query" in raw.columns:
        return _query_entities(raw, source)
    if "entity_type" not in raw.columns:
        if entity_type is None:
            raise SchemaError(
                f"{source}: no column 'entity_type'; found:"
                f" {', '.join(name for name in raw.columns if name != ROW)}. Add it, or"
                " say --entity-type pin"
            )
        raw = raw.with_columns(pl.lit(entity_type).alias("entity_type"))
    checked = check_frame(raw, schema("catalogue"), source)
    raise_problems(checked.report)
    wanted = [
        name
        for name in checked.frame.columns
        if columns is None or name in {"id", "entity_type", *columns}
    ]
    repeated, clashing = seen.add(*_row_hashes(checked.frame))
    if clashing.any():
        raise _clash(checked.frame.row(int(clashing.argmax()), named=True), raw, source)
    return checked.frame.select(wanted).filter(pl.Series(~repeated))


def _query_entities(raw: pl.DataFrame, source: str) -> pl.DataFrame:
    """Check a chunk of a table of queries and return them as entities."""
    checked = check_frame(raw, schema("queries"), source)
    raise_problems(checked.report)
    title = normalize_queries(checked.frame["query"])
    entity_type = pl.Series(["query"] * len(title), dtype=pl.String)
    return pl.DataFrame({"id": title, "entity_type": entity_type, "title": title})


def _clash(row: dict[str, Any], raw: pl.DataFrame, source: str) -> RowError:
    """Return the error for a row whose id stood in an earlier chunk with other content."""
    same_id = cell_texts(raw["id"]).str.normalize("NFC") == row["id"]
    same_type = raw["entity_type"].cast(pl.String) == row["entity_type"]
    number = raw[ROW][(same_id & same_type).arg_max() or 0]
    rule = "id repeats an earlier one with different content"
    problem = Problem(number, "id", repr(row["id"]), rule, KEEP_ONE)
    return RowError(problem.describe(source))


class _RowsSeen:
    """Remember rows by hashes of their key and content, 32 bytes a row.

    In sorted runs, each less than half as long as the one before. A run is (4, N): two words of
    each key's hash, sorted by the first, and two of the content's.
    """

    def __init__(self) -> None:
        self._runs: list[UInt64] = []

    def add(self, keys: UInt64, contents: UInt64) -> tuple[Bool, Bool]:
        """Add rows with distinct keys, except those whose key was there already.

        Args:
            keys: (2, N) hashes of what names the row.
            contents: (2, N) hashes of all it holds.

        Returns:
            Which rows (N,) are exact repeats of earlier ones, and which repeat a key with other
            content.
        """
        repeated = np.zeros(keys.shape[1], dtype=bool)
        clashing = np.zeros(keys.shape[1], dtype=bool)
        for run in self._runs:
            places = np.searchsorted(run[0], keys[0])
            found = run[0][np.minimum(places, run.shape[1] - 1)] == keys[0]
            for row in np.flatnonzero(found).tolist():
                place = int(places[row])
                while place < run.shape[1] and run[0, place] == keys[0, row]:
                    if run[1, place] == keys[1, row]:
                        same = bool((run[2:, place] == contents[:, row]).all())
                        repeated[row], clashing[row] = same, not same
                    place += 1
        new = ~(repeated | clashing)
        if new.any():
            self._insert(np.concatenate([keys, contents])[:, new])
        return repeated, clashing

    def _insert(self, run: UInt64) -> None:
        """Add a run, merged with those that are not more than twice as long."""
        while self._runs and self._runs[-1].shape[1] <= 2 * run.shape[1]:
            run = np.concatenate([self._runs.pop(), run], axis=1)
        self._runs.append(np.ascontiguousarray(run[:, np.argsort(run[0], kind="stable")]))


def _row_hashes(rows: pl.DataFrame) -> tuple[UInt64, UInt64]:
    """Hash the keys (entity type and id) and contents of rows; null cells count as absent.

    Returns:
        (2, N) of the keys and (2, N) of the contents.
    """
    keys = [f"{kind}\x1f{id}" for kind, id in rows.select("entity_type", "id").iter_rows()]
    names = [name for name in sorted(rows.columns) if rows.schema[name] != pl.Null]
    cells = pl.DataFrame([_content_texts(rows[name]) for name in names])
    contents = cells.select(pl.concat_str(pl.all(), ignore_nulls=True)).to_series()
    return _hash_words(keys), _hash_words(contents.to_list())


def _hash_words(texts: Sequence[str]) -> UInt64:
    """Hash texts to two words each (xxh3, 128 bits), uint64 (2, N)."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
    return np.ascontiguousarray(np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2).T)


def _content_texts(cells: pl.Series) -> pl.Series:
    """Write each cell with its column's name as text, null as null.

    1, 1.0 and "1" give one text, since a file's other rows decide which of them it is.
    """
    name = cells.name
    present = cells.is_not_null()
    if isinstance(cells.dtype, pl.Array):
        cells = cells.arr.to_list()
    dtype = cells.dtype
    leaf, depth = leaf_type(dtype)
    sizes = cells.list.len() if depth else cells
    if dtype.is_float():
        whole = ((cells == cells.floor()) & (cells.abs() < 2**53)).fill_null(False)
        integers = cells.cast(pl.Int64, strict=False).cast(pl.String)
        cells = integers.zip_with(whole, cells.cast(pl.String))
    elif not dtype.is_nested() and dtype not in (pl.Binary, pl.Object, pl.Duration):
        cells = cells.cast(pl.String)
    elif depth == 1 and (leaf.is_numeric() or leaf == pl.Null):
        cells = _vector_digests(cells.cast(pl.List(pl.Float64)))
    elif depth == 2 and leaf.is_numeric():
        cells = _several_digests(cells.cast(pl.List(pl.List(pl.Float64))))
    elif leaf != pl.String:
        values = [
            json.dumps(_plain(value), sort_keys=True, ensure_ascii=False, default=repr)
            for value in cells.to_list()
        ]
        cells = pl.Series(name, values, dtype=pl.String)
    texts = cells.to_frame().select(pl.struct(pl.all()).struct.json_encode()).to_series()
    if depth:  # an empty list has any type
        empty = pl.Series([f"{name}:[]"], dtype=pl.String)
        texts = texts.zip_with((sizes != 0).fill_null(True), empty)
    return texts.zip_with(present, pl.Series([None], dtype=pl.String)).alias(name)


def _vector_digests(vectors: pl.Series) -> pl.Series:
    """Hash each list of float64; JSON text of long vectors takes longer than reading them."""
    ends = np.cumsum(vectors.list.len().fill_null(0).to_numpy(), dtype=np.int64)
    numbers = vectors.drop_nulls().filter(vectors.drop_nulls().list.len() > 0).explode().to_numpy()
    digests = [
        xxhash.xxh3_128_hexdigest(numbers[start:end].data)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return pl.Series(vectors.name, digests, dtype=pl.String)


def _several_digests(lists: pl.Series) -> pl.Series:
    """Hash each vector of a cell and join the hashes; null where there is no vector."""
    rows = pl.DataFrame({"row": np.arange(len(lists))})
    filled = rows.with_columns(lists.alias("vector")).filter(pl.col("vector").list.len() > 0)
    vectors = filled.explode("vector")
    vectors = vectors.with_columns(_vector_digests(vectors["vector"]))
    joined = vectors.group_by("row").agg(pl.col("vector").str.join(","))
    digests = rows.join(joined, on="row", how="left", maintain_order="left")["vector"]
    return digests.alias(lists.name)


def _plain(value: Any) -> Any:
    """Remove from a nested value what depends on the rows around it.

    Fields that are null go, and whole numbers become floats.
    """
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    return value


def _raw_chunks(
    file: TableFile | Path,
    columns: Collection[str] | None,
    chunk_rows: int,
    reading: ReadingOptions = DEFAULT_OPTIONS,
) -> Iterator[pl.DataFrame]:
    """Read the wanted columns of a file in chunks, as they are."""
    file = TableFile(file) if isinstance(file, Path) else file
    wanted = None if columns is None else {"id", "entity_type", "query", *columns}
    # An attribute that a tower reads is a text field, or else lists of numbers.
    attributes = [name for name in columns or () if schema("catalogue").column(name) is None]
    texts = dict.fromkeys(attributes, DTYPES[Kind.TEXT]) | _TEXT_COLUMNS
    # What is found out about CSV was said when its attributes were read.
    notes: list[str] | None = [] if file.is_delimited else None
    yield from read_chunks(
        file, reading, columns=wanted, chunk_rows=chunk_rows, texts=texts, notes=notes
    )


def log_rows(path: TableSource) -> int:
    """Count a log's rows by Parquet footers; other files count as one row per 80 bytes.

    Of gzip files, one row per 10 bytes.
    """
    files = [file.path for file in table_files(path)]
    parquet = [file for file in files if file.suffix == ".parquet"]
    others = [file for file in files if file.suffix != ".parquet"]
    sizes = [file.stat().st_size * (8 if file.suffix == ".gz" else 1) for file in others]
    return sum(parquet_rows(file) for file in parquet) + sum(sizes) // 80


def parquet_rows(file: Path) -> int:
    """Count the rows of a Parquet file by its footer.

    Raises:
        DataError: The file is unreadable.
    """
    try:
        return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file.name}: not a readable Parquet file ({error}). Is the file complete?"
        ) from error
