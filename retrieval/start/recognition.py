"""Recognise the columns and values of files that were made for other systems."""

from __future__ import annotations

import shlex
from pathlib import Path

import polars as pl

from encoders.errors import DataError
from encoders.tables.parts import table_files
from encoders.tables.reading import read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import (
    MALFORMED,
    ROW,
    Kind,
    TableSchema,
    lookalikes,
    other_value,
    schema,
)


def recognised_flags(
    path: Path, table: str, reading: ReadingOptions, entity_type: str
) -> list[str]:
    """Return the flags under which a file reads as a table, beyond those that were given.

    Args:
        path: A file or folder.
        table: Name of the schema.
        reading: What was given.
        entity_type: Type of all rows where the file does not say.

    Raises:
        DataError: The file has no columns.
    """
    wanted = schema(table)
    columns = _columns(path, reading)
    near = {
        old: new
        for old, new in lookalikes(columns, wanted).items()
        if new not in reading.constants and _fits(path, reading, old, new, wanted)
    }
    flags = [f"--rename={old}={new}" for old, new in near.items()]
    names = {*columns, *near.values(), *reading.constants}
    if "entity_type" not in names and wanted.column("entity_type") is not None:
        flags.append(f"--set=entity_type={entity_type}")
    old_names = {new: old for old, new in near.items()}
    for column in wanted.columns:
        if column.kind is Kind.CHOICE and column.name in names:
            place = old_names.get(column.name, column.name)
            for value in _values(path, reading, place):
                meant = other_value(value, column.choices)
                if meant is not None and value != meant:
                    flags.append(f"--map={column.name}.{value}={meant}")
    return flags


def _columns(path: Path, reading: ReadingOptions) -> list[str]:
    for file in table_files(path):
        for chunk in read_chunks(file, reading, chunk_rows=1000, notes=[]):
            return [name for name in chunk.columns if name not in (ROW, MALFORMED)]
    raise DataError(f"{path}: the file is empty: it has no header. Was the export cut short?")


def _fits(path: Path, reading: ReadingOptions, old: str, new: str, wanted: TableSchema) -> bool:
    """Tell whether a column's values are those of a choice; other columns take any."""
    column = wanted.column(new)
    if column is None or column.kind is not Kind.CHOICE:
        return True
    values = _values(path, reading, old)
    known = [value for value in values if other_value(value, column.choices) is not None]
    return bool(values) and 2 * len(known) >= len(values)


def _values(path: Path, reading: ReadingOptions, column: str, most: int = 50) -> list[str]:
    """List the distinct values of a column, at most ``most`` of them."""
    found: set[str] = set()
    for file in table_files(path):
        for chunk in read_chunks(file, reading, chunk_rows=1 << 20, notes=[]):
            if column not in chunk.columns or chunk.schema[column].is_nested():
                continue
            values = chunk[column].cast(pl.String).drop_nulls().unique()
            found |= set(values.to_list())
            if len(found) > most:
                return sorted(found)[:most]
    return sorted(found)


def as_shell(arguments: list[str]) -> str:
    """Write an ``omni`` command as it is typed."""
    return " ".join(["omni", *map(shlex.quote, arguments)])
