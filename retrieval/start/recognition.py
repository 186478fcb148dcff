"""Recognise the columns and values of files that were made for other systems."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from encoders.errors import ConfigError, DataError
from encoders.tables.parts import table_files
from encoders.tables.reading import read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import (
    MALFORMED,
    ROW,
    Column,
    Kind,
    TableSchema,
    lookalikes,
    plain_entity_type,
    schema,
)

_MOST_VALUES = 50
_READ_AS_TEXT = ("title", "description", "caption", "brand", "category", "engaged_queries")


@dataclass(frozen=True, slots=True)
class Source:
    """A file or folder that the user named, and the table that it holds."""

    path: Path
    table: str
    """Name of the schema."""
    columns: tuple[str, ...]
    """As the file calls them."""

    @classmethod
    def of(cls, path: Path, table: str, reading: ReadingOptions) -> Source:
        """Look the columns up.

        Raises:
            DataError: The file has none, or cannot be read.
        """
        plain = replace(reading, rename={}, values={}, constants={})
        return cls(path, table, tuple(_columns(path, plain)))


@dataclass(frozen=True, slots=True)
class Recognised:
    """How a file reads as its table."""

    given: list[str]
    """Flags that the user gave and that concern this file."""
    found: list[str]
    """Flags beyond those."""
    missing: tuple[str, ...]
    """Required columns that nothing stands for; of a catalogue also ``title``: it has no text."""
    free: tuple[str, ...]
    """Columns of the file that are no column of the table."""


def recognise(source: Source, reading: ReadingOptions, entity_type: str) -> Recognised:
    """Find the flags under which a file reads as its table.

    Args:
        source: The file.
        reading: What the user gave, for all files.
        entity_type: Type of all rows where the file does not say.
    """
    wanted = schema(source.table)
    reading = _concerning(source, reading, wanted)
    columns = [reading.rename.get(name, name) for name in source.columns]
    near = {
        old: new
        for old, new in lookalikes(columns, wanted).items()
        if new not in reading.constants and _fits(source.path, reading, old, new, wanted)
    }
    flags = [f"--rename={old}={new}" for old, new in near.items()]
    names = {*columns, *near.values(), *reading.constants}
    if "entity_type" not in names and wanted.column("entity_type") is not None:
        flags.append(f"--set=entity_type={entity_type}")
        names.add("entity_type")
    old_names = {new: old for old, new in near.items()}
    for column in wanted.columns:
        if column.choices and column.name in {*columns, *near.values()}:
            place = old_names.get(column.name, column.name)
            mapped = reading.values.get(column.name, {})
            for value in _values(source.path, reading, place):
                meant = _meant(value, column, renamed=place != column.name)
                if meant is not None and value not in (meant, *mapped, *mapped.values()):
                    flags.append(f"--map={column.name}.{value}={meant}")
    missing = [c.name for c in wanted.columns if c.required and c.name not in names]
    if source.table == "catalogue" and not names & set(_READ_AS_TEXT):
        missing.append("title")
    free = [
        name
        for name in source.columns
        if wanted.column(name) is None and name not in near and name not in reading.rename
    ]
    return Recognised(as_flags(reading), flags, tuple(missing), tuple(free))


def refuse_unused(sources: Sequence[Source], reading: ReadingOptions) -> None:
    """Refuse a ``--rename`` of a column that no file has.

    Raises:
        ConfigError: Such a column.
    """
    known = {name for source in sources for name in source.columns}
    for old, new in reading.rename.items():
        if old not in known:
            raise ConfigError(
                f"--rename {old}={new}: no file has a column {old!r}; columns are"
                f" {', '.join(sorted(known))}."
            )


def lacking(source: Source, missing: Collection[str], free: Collection[str]) -> str:
    """Word what a file lacks, and how to say what stands for it."""
    column = next(iter(missing))
    held = ", ".join(free) or "none that are not read already"
    name = "text to be found by" if column == "title" else ", ".join(missing)
    return (
        f"{source.path.name} (read as {source.table}) has no {name}. Its other columns: {held}."
        f" Say which one is meant: --rename COLUMN={column}, or --set {column}=VALUE for all rows."
    )


def as_flags(reading: ReadingOptions) -> list[str]:
    """Write options back as flags."""
    flags = [f"--encoding={reading.encoding}"] if reading.encoding != "utf-8" else []
    for name in ("separator", "quote", "escape"):
        value = getattr(reading, name)
        flags += [f"--{name}={value}"] if value is not None else []
    if reading.decimal_comma is not None:
        flags.append("--decimal-comma" if reading.decimal_comma else "--no-decimal-comma")
    flags += [f"--rename={old}={new}" for old, new in reading.rename.items()]
    flags += [
        f"--map={column}.{old}={new}"
        for column, values in reading.values.items()
        for old, new in values.items()
    ]
    return flags + [f"--set={name}={value}" for name, value in reading.constants.items()]


def as_shell(arguments: Sequence[str]) -> str:
    """Write an ``omni`` command as it is typed."""
    return " ".join(["omni", *map(shlex.quote, arguments)])


def _concerning(source: Source, reading: ReadingOptions, wanted: TableSchema) -> ReadingOptions:
    """Leave out what concerns other files: ``--rename sku=id`` means nothing in a log."""

    def has(name: str) -> bool:
        return wanted.open or wanted.column(name) is not None

    return replace(
        reading,
        rename={
            old: new for old, new in reading.rename.items() if old in source.columns and has(new)
        },
        values={column: values for column, values in reading.values.items() if has(column)},
        constants={name: value for name, value in reading.constants.items() if has(name)},
    )


def _columns(path: Path, reading: ReadingOptions) -> list[str]:
    for file in table_files(path):
        for chunk in read_chunks(file, reading, chunk_rows=1000, notes=[]):
            return [name for name in chunk.columns if name not in (ROW, MALFORMED)]
    raise DataError(f"{path}: the file is empty: it has no header. Was the export cut short?")


def _fits(path: Path, reading: ReadingOptions, old: str, new: str, wanted: TableSchema) -> bool:
    """Tell whether a column's values are those of a choice; other columns take any."""
    column = wanted.column(new)
    if column is None or not column.choices:
        return True
    values = _values(path, reading, old)
    known = [value for value in values if column.other_value(value) is not None]
    return bool(values) and 2 * len(known) >= len(values)


def _meant(value: str, column: Column, *, renamed: bool) -> str | None:
    """Return what a value is to be read as: an entity type of the user's own stays what it is."""
    if column.kind is not Kind.NAME:
        return column.other_value(value)
    meant = column.other_value(value) if renamed else None
    return meant or plain_entity_type(value)


def _values(path: Path, reading: ReadingOptions, column: str) -> list[str]:
    """List the distinct values of a column, at most ``_MOST_VALUES`` of them."""
    found: set[str] = set()
    for file in table_files(path):
        for chunk in read_chunks(file, reading, chunk_rows=1 << 20, notes=[]):
            if column not in chunk.columns or chunk.schema[column].is_nested():
                continue
            values = chunk[column].cast(pl.String).drop_nulls().unique()
            found |= set(values.to_list())
            if len(found) > _MOST_VALUES:
                return sorted(found)[:_MOST_VALUES]
    return sorted(found)
