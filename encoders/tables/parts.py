"""Find the files of a table, and join what was read from them.

A table is a file, a folder of part files, or hive folders (``country=DE/``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import unquote

import polars as pl

from encoders.errors import DataError, SchemaError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".ipc")
DELIMITED = (".csv", ".tsv")
JSON_LINES = (".jsonl", ".ndjson", ".json")
ARROW = (".arrow", ".feather", ".ipc")
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"

TableSource = Path | str | Sequence[Path]
"""A file, a folder of part files, or several of them that make one table."""


@dataclass(frozen=True, slots=True)
class TableFile:
    """One file of a table, and the values of the hive folders that it lies in."""

    path: Path
    partition: Mapping[str, str | int | None] = field(default_factory=dict)
    """Column -> value of each folder ``column=value`` between the table's folder and the file.

    Whole numbers where all values of the table's folders are.
    """

    @property
    def name(self) -> str:
        """Return the file's name, with its hive folders."""
        folders = [f"{name}={_HIVE_NULL if v is None else v}" for name, v in self.partition.items()]
        return "/".join([*folders, self.path.name])

    @property
    def format(self) -> str:
        """Return the suffix that names the file's format."""
        return format_of(self.path)

    @property
    def is_delimited(self) -> bool:
        """Tell whether the cells are texts: CSV, TSV."""
        return self.format in DELIMITED


def format_of(path: Path) -> str:
    """Return the suffix that names a file's format, without ``.gz``, ``.zst`` and a part number."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    # Unsplash ships parts as photos.tsv000, conversions.csv001, ...
    return Path(name).suffix.rstrip("0123456789")


def table_files(path: TableSource) -> list[TableFile]:
    """List the files of a table by name: the file itself, or the table files of a folder.

    Hidden files and those whose name begins with ``_`` (``_SUCCESS``, ``_tmp.parquet``) are no part
    of a table. A folder without table files of its own is read with its subfolders. Of several
    paths, one after the other.

    Raises:
        DataError: Nothing is there, or a folder holds table files beside subfolders with others.
    """
    if not isinstance(path, str | Path):
        return [file for one in path for file in table_files(one)]
    path = Path(path)
    if path.is_file():
        return [TableFile(path)]
    if not path.is_dir():
        raise DataError(
            f"{path}: no such file or folder. Give a {', '.join(SUFFIXES)} file or a folder of"
            " them."
        )
    # Spark and BigQuery call JSON Lines .json, but so are notes beside a table called.
    files = _files_below(path, SUFFIXES) or _files_below(path, (".json",))
    if not files:
        raise DataError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file.")
    depths = {len(file.relative_to(path).parts) for file in files}
    if len(depths) > 1 and 1 in depths:
        inner = next(file for file in files if len(file.relative_to(path).parts) > 1)
        raise DataError(
            f"{path}: the folder holds table files, and its subfolders do, too"
            f" ({inner.relative_to(path)}). Which of them are the table cannot be guessed: name"
            " each file or folder, or move the others away."
        )
    partitions = [_partition(file.relative_to(path).parent) for file in files]
    texts = {
        name
        for partition in partitions
        for name, value in partition.items()
        if value is not None and not _WHOLE.fullmatch(value)
    }
    return [
        TableFile(
            file,
            {
                name: value if value is None or name in texts else int(value)
                for name, value in partition.items()
            },
        )
        for file, partition in zip(files, partitions, strict=True)
    ]


def _files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(file for file in _visible(folder) if format_of(file) in suffixes)


def _visible(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder; no name on the way begins with ``.`` or ``_``."""
    for root, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        yield from (Path(root, name) for name in names if not name.startswith((".", "_")))


def _partition(folders: Path) -> dict[str, str | None]:
    """Read ``country=DE/day=2026-01-31`` as columns and their values."""
    values: dict[str, str | None] = {}
    for part in folders.parts:
        name, equals, value = part.partition("=")
        if equals and name:
            values[unquote(name)] = None if value == _HIVE_NULL else unquote(value)
    return values


def source_name(path: TableSource) -> str:
    """Name a table's files in messages."""
    return Path(path).name if isinstance(path, str | Path) else ", ".join(one.name for one in path)


def check_shapes(rows: pl.DataFrame, where: str, shapes: dict[str, tuple[str, str]]) -> None:
    """Remember where each column was first seen as what.

    Raises:
        SchemaError: A column is of another shape here; one vector a row beside several vectors a
            row is no other shape.
    """
    for name, dtype in rows.schema.items():
        shape = _shape(dtype)
        if shape is None:
            continue
        known, first = shapes.setdefault(name, (shape, where))
        if known != shape:
            raise SchemaError(
                f"column {name!r} holds {known} in {first}, but {shape} in {where}. Export it in"
                " one form in all files."
            )


def _shape(dtype: pl.DataType) -> str | None:
    """Name the shape of a column's cells; None: all of them are null."""
    leaf, depth = leaf_type(dtype)
    if leaf == pl.Null:
        return None
    if not depth:
        return "records" if isinstance(leaf, pl.Struct) else "single values"
    return "lists" if depth == 1 or leaf.is_numeric() else "lists of lists"


def leaf_type(dtype: pl.DataType) -> tuple[pl.DataType, int]:
    """Return what lists of lists hold in the end, and how deep."""
    depth = 0
    while isinstance(dtype, pl.List | pl.Array):
        dtype = cast(pl.DataType, dtype.inner)
        depth += 1
    return dtype, depth


def join_frames(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Join frames one below the other; times without a zone are UTC where others have one.

    Raises:
        SchemaError: No type holds the values that a column has in all of them.
    """
    zoned = {
        name
        for frame in frames
        for name, dtype in frame.schema.items()
        if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None
    }
    joined = [_zoned(frame, zoned) for frame in frames]
    types: dict[str, set[pl.DataType]] = {}
    for frame in joined:
        for name, dtype in frame.schema.items():
            types.setdefault(name, set()).add(dtype)
    for name, found in types.items():
        leaves = [leaf_type(dtype)[0] for dtype in found]
        # Their common type would make a date the number of its day
        if any(leaf.is_temporal() for leaf in leaves) and any(leaf.is_numeric() for leaf in leaves):
            raise _no_common_type({name: found})
    try:
        return pl.concat(joined, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise _no_common_type({n: t for n, t in types.items() if len(t) > 1}) from error


def _no_common_type(types: Mapping[str, Collection[pl.DataType]]) -> SchemaError:
    found = "; ".join(f"{name!r}: {', '.join(sorted(map(str, t)))}" for name, t in types.items())
    return SchemaError(
        f"a column must be of one type in all files, but got {found}. Export it as one, or leave it"
        " out."
    )


def _zoned(frame: pl.DataFrame, names: Collection[str]) -> pl.DataFrame:
    """Give the times of some columns the zone UTC where they have none."""
    return frame.with_columns(
        frame[name].dt.replace_time_zone("UTC")
        for name, dtype in frame.schema.items()
        if name in names and isinstance(dtype, pl.Datetime) and dtype.time_zone is None
    )
