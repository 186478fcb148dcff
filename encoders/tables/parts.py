"""Find the files of a table: a file, a folder of part files, or hive folders (``country=DE/``)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from encoders.errors import DataError

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
