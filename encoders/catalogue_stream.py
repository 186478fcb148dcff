"""Catalogues larger than memory, read and checked a few thousand rows at a time."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from encoders.errors import DataError, RowError, SchemaError
from encoders.schemas import schema
from encoders.table_checks import check_frame
from encoders.tables import raise_problems, read_raw, records_to_frame, table_files


def stream_catalogue(
    paths: Sequence[Path], *, columns: Collection[str] | None = None, entity_type: str | None = None, chunk_rows: int = 8_192
) -> Iterator[pl.DataFrame]:
    """Yield the checked rows of catalogue or query files in order.

    Parquet and JSON Lines (also ``.gz``) are streamed; other formats are read whole, file by file. A table of queries (column ``query``,
    no ``id``) yields query entities whose id and title are the query.

    Args:
        paths: Files, or folders of them.
        columns: Columns wanted beside ``id`` and ``entity_type``; None: all.
        entity_type: Type of every row where the files have no such column.
        chunk_rows: Rows held at once.

    Yields:
        Frames of at most ``chunk_rows`` rows with ``id``, ``entity_type`` and those of ``columns`` that are there.

    Raises:
        DataError: A file is missing or unreadable.
        SchemaError: A required column is missing.
        RowError: A row breaks a rule of the catalogue; file, row, column, value and fix are named.
    """
    for path in paths:
        for file in table_files(path):
            first_row = 1
            for raw in _raw_chunks(file, columns, chunk_rows):
                yield _checked(raw, file.name, entity_type, first_row, columns)
                first_row += raw.height


def count_rows(paths: Sequence[Path]) -> int | None:
    """Rows in all files where that is known without reading them (Parquet only), else None."""
    files = [file for path in paths for file in table_files(path)]
    if any(file.suffix != ".parquet" for file in files):
        return None
    try:
        return sum(int(pq.read_metadata(file).num_rows) for file in files)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not a readable Parquet file ({error}). Is the file complete?") from error


def _checked(raw: pl.DataFrame, source: str, entity_type: str | None, first_row: int, columns: Collection[str] | None) -> pl.DataFrame:
    if "id" not in raw.columns and "query" in raw.columns:
        report = check_frame(raw, schema("queries"), source, first_row=first_row)
        raise_problems(report.report)
        title = report.frame["query"].str.replace_all(r"\s+", " ").str.strip_chars()
        return pl.DataFrame({"id": title, "entity_type": pl.Series(["query"] * len(title), dtype=pl.String), "title": title})
    if "entity_type" not in raw.columns:
        if entity_type is None:
            raise SchemaError(f"{source}: no column 'entity_type'; found: {', '.join(raw.columns)}. Add it, or say --entity-type pin")
        raw = raw.with_columns(pl.lit(entity_type).alias("entity_type"))
    checked = check_frame(raw, schema("catalogue"), source, first_row=first_row)
    raise_problems(checked.report)
    wanted = [name for name in checked.frame.columns if columns is None or name in {"id", "entity_type", *columns}]
    return checked.frame.select(wanted)


def _raw_chunks(file: Path, columns: Collection[str] | None, chunk_rows: int) -> Iterator[pl.DataFrame]:
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _parquet_chunks(file, columns, chunk_rows)
    elif name.endswith((".jsonl", ".ndjson")):
        yield from _json_chunks(file, chunk_rows)
    else:
        whole = read_raw(file)
        for start in range(0, whole.height, chunk_rows):
            yield whole[start : start + chunk_rows]


def _parquet_chunks(file: Path, columns: Collection[str] | None, chunk_rows: int) -> Iterator[pl.DataFrame]:
    try:
        parquet = pq.ParquetFile(file)
        present = parquet.schema_arrow.names
        wanted = None if columns is None else [name for name in present if name in {"id", "entity_type", "query", *columns}]
        for batch in parquet.iter_batches(batch_size=chunk_rows, columns=wanted):
            yield cast(pl.DataFrame, pl.from_arrow(batch))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.name}: cannot be read as parquet ({error}). Is the file complete?") from error


def _json_chunks(file: Path, chunk_rows: int) -> Iterator[pl.DataFrame]:
    first_row = 1
    try:
        with cast(IO[bytes], gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")) as lines:
            held: list[bytes] = []
            for line in lines:
                if line.strip():
                    held.append(line)
                if len(held) == chunk_rows:
                    yield _json_frame(held, file.name, first_row)
                    first_row += len(held)
                    held = []
            if held:
                yield _json_frame(held, file.name, first_row)
    except (OSError, EOFError) as error:
        raise DataError(f"{file.name}: cannot be read ({error}). Is the file complete?") from error


def _json_frame(lines: list[bytes], source: str, first_row: int) -> pl.DataFrame:
    try:
        return pl.read_ndjson(io.BytesIO(b"".join(lines)), infer_schema_length=None)
    except pl.exceptions.PolarsError:
        records = []
        for number, line in enumerate(lines, first_row):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise RowError(
                    f"{source}: row {number}: not valid JSON ({error}), got {line[:60]!r}. Write one JSON object a line"
                ) from error
            if not isinstance(record, dict):
                raise RowError(f"{source}: row {number}: expected a JSON object, got {line[:60]!r}. Write one JSON object a line") from None
            records.append(record)
        return records_to_frame(records, source)
