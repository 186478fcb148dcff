"""Read and write tables as CSV, TSV, JSON Lines, Parquet or Arrow files; check what is read."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import polars as pl

from encoders.errors import DataError, RowError
from encoders.tables.cells import AttributeTypes
from encoders.tables.checks import Checked, TableReport, check_frame, malformed_rows
from encoders.tables.parts import (
    ARROW,
    JSON_LINES,
    SUFFIXES,
    TableFile,
    TableSource,
    check_shapes,
    format_of,
    join_frames,
    source_name,
    table_files,
)
from encoders.tables.reading import read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import MALFORMED, ROW, TableSchema, schema

SEPARATORS = {".csv": ",", ".tsv": "\t"}
log = logging.getLogger(__name__)

OnBadRows = Literal["raise", "drop"]


def read_table(
    path: TableSource,
    table: str,
    *,
    on_bad_rows: OnBadRows = "raise",
    encoding: str = "utf-8",
    now: datetime | None = None,
    reading: ReadingOptions | None = None,
) -> pl.DataFrame:
    """Read one table and check it; ``check_table`` explains the arguments. Notes are logged."""
    checked = check_table(
        path, table, on_bad_rows=on_bad_rows, encoding=encoding, now=now, reading=reading
    )
    for note in checked.report.notes:
        log.info("%s: %s", checked.report.source, note)
    return checked.frame


def check_table(
    path: TableSource,
    table: str,
    *,
    on_bad_rows: OnBadRows = "raise",
    encoding: str = "utf-8",
    now: datetime | None = None,
    reading: ReadingOptions | None = None,
) -> Checked:
    """Read a file, or a folder of part files, and check it against the schema called ``table``.

    Cells of CSV and TSV are texts. Those of unknown catalogue columns become numbers, booleans or
    lists where every cell of every file reads as one without loss (``007`` does not); a column that
    only mostly does stays text, and a note names the first cell that does not.

    Args:
        path: A file (``.csv .tsv .jsonl .ndjson .parquet .arrow .feather .ipc``; text also as
            ``.gz``), a folder of them, or several.
        table: Name of the schema (``catalogue``, ``log``, ...).
        on_bad_rows: ``raise`` refuses the table at its first bad rows; ``drop`` returns them apart,
            counted in the report.
        encoding: Encoding of text files. It is not guessed: bytes that do not fit are an error that
            names the row.
        now: Time that "in the future" is measured from; None: the clock.
        reading: What is known about how the files are written; None: the encoding.

    Returns:
        The good rows, the rejected rows and the report.

    Raises:
        DataError: The file is missing, unreadable or of an unknown format.
        SchemaError: A required column is missing or of an impossible type.
        RowError: A row breaks a rule and ``on_bad_rows`` is ``raise``; the message names file, row,
            column, value and fix.
    """
    wanted = schema(table)
    options = reading or ReadingOptions(encoding=encoding)
    files = table_files(path)
    attributes = AttributeTypes(wanted)
    parts = []
    empty = []
    for file in files:
        notes: list[str] = []
        raw = _read_whole(file, options, notes)
        if not raw.width and len(files) > 1:
            empty.append(file.name)
            continue
        attributes.add(raw, file)
        checked = check_frame(raw, wanted, file.name, now=now)
        checked.report.notes[:0] = notes
        parts.append((file, checked))
    if not parts:
        raise DataError(f"{source_name(path)}: all files are empty. Was the export cut short?")
    typed = [
        p._replace(frame=attributes.typed(p.frame)) if file.is_delimited else p for file, p in parts
    ]
    one = typed[0] if len(typed) == 1 else None
    checked = one or _join_parts(typed, wanted, source_name(path), now)
    if wanted.name == "catalogue" and not checked.report.rows_read:
        raise DataError(f"{source_name(path)}: there are no rows. Was the export cut short?")
    checked.report.notes += attributes.notes()
    checked.report.notes += [f"{name}: an empty file, left out" for name in empty]
    if on_bad_rows == "raise":
        raise_problems(checked.report)
    return checked


def raise_problems(report: TableReport, *, droppable: bool = False) -> None:
    """Raise the first problems of a report as one error.

    Args:
        report: Of the table.
        droppable: Whether the calling commands have the option ``--drop-bad-rows`` for this table.

    Raises:
        RowError: The report has problems.
    """
    if not report.rules_broken:
        return
    lines = [problem.describe(report.source) for problem in report.problems[:5]]
    total = sum(report.rules_broken.values())
    if total > len(lines):
        lines.append(
            f"({total:,} values break a rule; see omni data"
            f" validate{', or use --drop-bad-rows' if droppable else ''})"
        )
    raise RowError("\n".join(lines))


def read_raw(
    path: Path | TableFile, encoding: str = "utf-8", *, reading: ReadingOptions | None = None
) -> pl.DataFrame:
    """Read a file unchecked: CSV and TSV give text columns, JSON Lines JSON values.

    Raises:
        DataError: The file is unreadable, or its format unknown.
        RowError: Bytes are not of the encoding, or a line is not a record; the message names the
            row.
    """
    file = path if isinstance(path, TableFile) else TableFile(path)
    options = reading or ReadingOptions(encoding=encoding)
    frame = _read_whole(file, options, None)
    raise_malformed(frame, file.name)
    return frame.drop(ROW, MALFORMED, strict=False)


def raise_malformed(frame: pl.DataFrame, source: str) -> None:
    """Raise the first malformed rows of a frame as one error.

    Raises:
        RowError: There are some.
    """
    problems = malformed_rows(frame)
    if problems:
        lines = [problem.describe(source) for problem in problems[:5]]
        if len(problems) > len(lines):
            lines.append(f"({len(problems):,} rows are malformed)")
        raise RowError("\n".join(lines))


def read_whole_table(path: TableSource, reading: ReadingOptions | None = None) -> pl.DataFrame:
    """Read all files of a table unchecked, as ``read_raw`` does.

    Raises:
        DataError: A file is missing or unreadable, or a row malformed.
    """
    return join_frames([read_raw(file, reading=reading) for file in table_files(path)])


def _read_whole(file: TableFile, options: ReadingOptions, notes: list[str] | None) -> pl.DataFrame:
    frames = list(read_chunks(file, options, notes=notes))
    if len(frames) < 2:
        return frames[0] if frames else pl.DataFrame()
    return pl.concat(frames, how="diagonal_relaxed")


def scan_parts(folder: Path) -> pl.LazyFrame:
    """Scan the Parquet parts that this program wrote into a folder, whatever its name holds."""
    return pl.scan_parquet(sorted(folder.glob("*.parquet")), glob=False, hive_partitioning=False)


def write_table(frame: pl.DataFrame, path: Path | str) -> Path:
    """Write a table in the format of the path's suffix; the file appears only when it is complete.

    Raises:
        DataError: Unknown suffix, or the format cannot hold the columns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    suffix = format_of(path)
    try:
        if suffix == ".parquet":
            frame.write_parquet(partial, compression="zstd", compression_level=1)
        elif suffix in ARROW:
            frame.write_ipc(partial)
        elif suffix in JSON_LINES:
            frame.write_ndjson(partial)
        elif suffix in SEPARATORS:
            nested = [
                pl.col(n).map_elements(_json_cell, return_dtype=pl.String)
                for n, t in frame.schema.items()
                if t.is_nested()
            ]
            frame.with_columns(nested).write_csv(partial, separator=SEPARATORS[suffix])
        else:
            raise DataError(f"{path.name}: unknown format. Expected one of {', '.join(SUFFIXES)}.")
        if path.suffix == ".gz":
            partial.write_bytes(gzip.compress(partial.read_bytes(), mtime=0))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _json_cell(values: pl.Series | None) -> str | None:
    return None if values is None else json.dumps(values.to_list(), ensure_ascii=False)


def _join_parts(
    parts: Sequence[Checked], wanted: TableSchema, source: str, now: datetime | None
) -> Checked:
    """Join the checked files of a table; where it has a key, look for ids that two files hold.

    Raises:
        SchemaError: A column holds lists in one file and single values in another.
    """
    shapes: dict[str, tuple[str, str]] = {}
    for part in parts:
        check_shapes(part.frame, part.report.source, shapes)
    frame = join_frames([part.frame for part in parts])
    report = TableReport(source, wanted.name)
    rejected = [p.rejected.with_columns(pl.lit(p.report.source).alias("file")) for p in parts]
    report.rows_read = sum(p.report.rows_read for p in parts)
    if wanted.key:  # the same id may appear in two parts
        again = check_frame(frame, wanted, source, now=now)
        frame = again.frame
        parts = [*parts, again]
        rejected.append(again.rejected.with_columns(pl.lit(source).alias("file")))
    for part in parts:
        report.notes += [f"{part.report.source}: {note}" for note in part.report.notes]
        report.problems += part.report.problems
        for rule, count in part.report.rules_broken.items():
            report.rules_broken[rule] = report.rules_broken.get(rule, 0) + count
    report.rows_kept = frame.height
    return Checked(frame, _join_rejected(rejected), report)


def _join_rejected(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Join the rejected rows of files; columns whose types differ are shown as text."""
    frames = [part for part in parts if part.height] or list(parts[:1])
    types: dict[str, set[pl.DataType]] = {}
    for frame in frames:
        for name, dtype in frame.schema.items():
            types.setdefault(name, set()).add(dtype)
    differing = {name for name, found in types.items() if len(found - {pl.Null()}) > 1}
    return pl.concat(
        [
            frame.with_columns(_shown(frame[name]) for name in frame.columns if name in differing)
            for frame in frames
        ],
        how="diagonal_relaxed",
    )


def _shown(values: pl.Series) -> pl.Series:
    texts = (None if value is None else str(value) for value in values)
    return pl.Series(values.name, texts, dtype=pl.String)
