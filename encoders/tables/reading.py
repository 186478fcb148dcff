"""Read one file of a table in chunks, whatever its format: the one way that all commands read."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping

import polars as pl

from encoders.errors import DataError, SchemaError
from encoders.tables.delimited import delimited_chunks
from encoders.tables.json_lines import json_chunks
from encoders.tables.parts import ARROW, JSON_LINES, SUFFIXES, TableFile
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.typed_files import arrow_chunks, parquet_chunks

log = logging.getLogger(__name__)

DEFAULT_OPTIONS = ReadingOptions()
WHOLE = 1 << 62
"""As ``chunk_rows``: records of JSON Lines are read at once, so that they have one type each."""


def read_chunks(
    file: TableFile,
    options: ReadingOptions = DEFAULT_OPTIONS,
    *,
    columns: Collection[str] | None = None,
    chunk_rows: int = WHOLE,
    texts: Mapping[str, pl.DataType] | None = None,
    notes: list[str] | None = None,
) -> Iterator[pl.DataFrame]:
    """Yield a file's rows as they are: CSV and TSV give text columns, JSON Lines JSON values.

    Args:
        file: Of a table.
        options: What is known about it.
        columns: Of Parquet, read these only; None: all.
        chunk_rows: Most rows of a frame.
        texts: Columns of JSON Lines that are text (see ``json_chunks``).
        notes: What was found out about the file is added here; None: it is logged.

    Yields:
        Frames with ``ROW`` and, where rows of CSV or TSV are malformed, ``MALFORMED``; nothing if
        the file has no columns.

    Raises:
        DataError: The file is unreadable, or its format unknown.
        SchemaError: Its columns cannot be what they are called.
        RowError: A line is not of the encoding, or no record; the message names it.
    """
    found: list[str] = []
    for chunk in _format_chunks(file, options, columns, min(chunk_rows, WHOLE), texts or {}, found):
        if notes is None:
            for note in found:
                log.info("%s: %s", file.name, note)
        else:
            notes += found
        found.clear()
        frame = _renamed(_with_partition(chunk, file), file, options)
        for start in range(0, max(frame.height, 1), chunk_rows):
            yield frame[start : start + chunk_rows] if frame.height > chunk_rows else frame


def _format_chunks(
    file: TableFile,
    options: ReadingOptions,
    columns: Collection[str] | None,
    chunk_rows: int,
    texts: Mapping[str, pl.DataType],
    notes: list[str],
) -> Iterator[pl.DataFrame]:
    if file.is_delimited:
        return delimited_chunks(file.path, options, notes)
    if file.format in JSON_LINES:
        return json_chunks(file.path, options, chunk_rows, texts)
    if file.format == ".parquet":
        wanted = columns
        if columns is not None and options.rename:
            old_names = [old for old, new in options.rename.items() if new in columns]
            wanted = {*columns, *old_names}
        return parquet_chunks(file.path, wanted, min(chunk_rows, 1 << 20))
    if file.format in ARROW:
        return arrow_chunks(file.path)
    raise DataError(
        f"{file.name}: unknown format. Expected one of {', '.join(SUFFIXES)}.{_hint(file)}"
    )


def _hint(file: TableFile) -> str:
    if re.fullmatch(r"\.xl\w+|\.ods", file.format):
        return " Save the sheet as CSV UTF-8."
    if file.path.suffix.lower() in (".zst", ".bz2", ".xz", ".zip", ".lz4", ".snappy"):
        return " Unpack it first; of packed files gzip and Zstandard are read."
    return ""


def _with_partition(frame: pl.DataFrame, file: TableFile) -> pl.DataFrame:
    """Add the columns that hive folders name; those that the file has itself stay."""
    added = {name: value for name, value in file.partition.items() if name not in frame.columns}
    if file.is_delimited:
        added = {name: None if v is None else str(v) for name, v in added.items()}
    types = {name: pl.Int64 if isinstance(v, int) else pl.String for name, v in added.items()}
    return frame.with_columns(
        pl.lit(value, dtype=types[name]).alias(name) for name, value in added.items()
    )


def _renamed(frame: pl.DataFrame, file: TableFile, options: ReadingOptions) -> pl.DataFrame:
    """Rename columns, replace values and add columns, as the options say."""
    rename = {old: new for old, new in options.rename.items() if old in frame.columns}
    first: dict[str, str] = {}
    for old, new in rename.items():
        if first.setdefault(new, old) != old:
            raise SchemaError(
                f"{file.name}: --rename {first[new]}={new} and --rename {old}={new}: the file has"
                " both columns. Leave one out."
            )
        if new in frame.columns and new not in rename:
            raise SchemaError(
                f"{file.name}: --rename {old}={new}: the file has a column {new!r} already. Rename"
                f" that one, too (--rename {new}=other_{new})."
            )
    frame = frame.rename(rename)
    mapped = {name: new for name, new in options.values.items() if name in frame.columns}
    frame = frame.with_columns(
        pl.col(name).cast(pl.String).replace(dict(new)) for name, new in mapped.items()
    )
    lacking = {name: v for name, v in options.constants.items() if name not in frame.columns}
    return frame.with_columns(pl.lit(value).alias(name) for name, value in lacking.items())
