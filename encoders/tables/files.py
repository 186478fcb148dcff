"""Read and write tables as CSV, TSV, JSON Lines, Parquet or Arrow files; check what is read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import polars as pl
from polars import selectors

from encoders.errors import DataError, RowError, SchemaError
from encoders.tables.cells import AttributeTypes
from encoders.tables.checks import Checked, TableReport, check_frame
from encoders.tables.schemas import TableSchema, schema

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".ipc")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
OnBadRows = Literal["raise", "drop"]
TableSource = Path | str | Sequence[Path]
"""A file, a folder of part files, or several of them that make one table."""


def read_table(
    path: TableSource,
    table: str,
    *,
    on_bad_rows: OnBadRows = "raise",
    encoding: str = "utf-8",
    now: datetime | None = None,
) -> pl.DataFrame:
    """Read one table and check it; ``check_table`` explains the arguments and reports more."""
    return check_table(path, table, on_bad_rows=on_bad_rows, encoding=encoding, now=now).frame


def check_table(
    path: TableSource,
    table: str,
    *,
    on_bad_rows: OnBadRows = "raise",
    encoding: str = "utf-8",
    now: datetime | None = None,
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
        encoding: Encoding of text files. Nothing is guessed: bytes that do not fit are an error
            that names the row.
        now: Time that "in the future" is measured from; None: the clock.

    Returns:
        The good rows, the rejected rows and the report.

    Raises:
        DataError: The file is missing, unreadable or of an unknown format.
        SchemaError: A required column is missing or of an impossible type.
        RowError: A row breaks a rule and ``on_bad_rows`` is ``raise``; the message names file, row,
            column, value and fix.
    """
    wanted = schema(table)
    files = table_files(path)
    attributes = AttributeTypes(wanted)
    parts = []
    for file in files:
        raw = read_raw(file, encoding)
        if is_delimited(file):
            attributes.add_texts(raw, file.name)
        else:
            attributes.add_typed(raw)
        parts.append(check_frame(raw, wanted, file.name, now=now))
    parts = [
        p._replace(frame=attributes.typed(p.frame)) if is_delimited(file) else p
        for p, file in zip(parts, files, strict=True)
    ]
    checked = parts[0] if len(parts) == 1 else _join_parts(parts, wanted, _source_name(path), now)
    checked.report.notes += attributes.notes()
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


def table_files(path: TableSource) -> list[Path]:
    """List the files of a table: the file itself, or a folder's table files by name.

    Of several paths, one after the other.

    Raises:
        DataError: Nothing is there.
    """
    if not isinstance(path, str | Path):
        return [file for one in path for file in table_files(one)]
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(
            f"{path}: no such file or folder. Give a {', '.join(SUFFIXES)} file or a folder of"
            " them."
        )
    files = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p) in SUFFIXES)
    if not files:
        raise DataError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file.")
    return files


def _source_name(path: TableSource) -> str:
    """Name a table's files in messages."""
    return Path(path).name if isinstance(path, str | Path) else ", ".join(one.name for one in path)


def read_raw(path: Path, encoding: str = "utf-8") -> pl.DataFrame:
    """Read a file unchecked: CSV and TSV give text columns, JSON Lines JSON values.

    Raises:
        DataError: The file is unreadable, or its format unknown.
        RowError: Bytes are not of the encoding, or a line is not a record; the message names the
            row.
    """
    suffix = _suffix(path)
    try:
        if suffix in SEPARATORS:
            return _read_delimited(_text_bytes(path, encoding), SEPARATORS[suffix], path.name)
        if suffix in (".jsonl", ".ndjson"):
            return _read_json_lines(_text_bytes(path, encoding), path.name)
        if suffix == ".parquet":
            return plain_columns(pl.read_parquet(path))
        if suffix in (".arrow", ".feather", ".ipc"):
            return plain_columns(pl.read_ipc(path))
    except (OSError, pl.exceptions.PolarsError, EOFError) as error:
        raise DataError(
            f"{path.name}: cannot be read as {suffix[1:]} ({_first_line(error)}). Is the file"
            " complete?"
        ) from error
    raise DataError(f"{path.name}: unknown format. Expected one of {', '.join(SUFFIXES)}.")


def write_table(frame: pl.DataFrame, path: Path | str) -> Path:
    """Write a table in the format of the path's suffix; the file appears only when it is complete.

    Raises:
        DataError: Unknown suffix, or the format cannot hold the columns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            frame.write_parquet(partial, compression="zstd", compression_level=1)
        elif suffix in (".arrow", ".feather", ".ipc"):
            frame.write_ipc(partial)
        elif suffix in (".jsonl", ".ndjson"):
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


def is_delimited(path: Path) -> bool:
    """Tell whether a file's cells are texts: CSV, TSV."""
    return _suffix(path) in SEPARATORS


def _suffix(path: Path) -> str:
    """Return the suffix that names the format, without ``.gz`` and a part number."""
    name = path.name.removesuffix(".gz")
    # Unsplash ships parts as photos.tsv000, conversions.csv001, ...
    return Path(name).suffix.lower().rstrip("0123456789")


def plain_columns(frame: pl.DataFrame) -> pl.DataFrame:
    """Turn dictionary-encoded columns into ordinary text, and decimals into floats."""
    if not frame.width:
        return frame
    return frame.with_columns(
        pl.col(pl.Categorical, pl.Enum).cast(pl.String),
        selectors.decimal().cast(pl.Float64),
    )


def _text_bytes(path: Path, encoding: str) -> bytes:
    """Read a file's text as UTF-8 bytes, after checking its encoding."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) and encoding == "utf-8":
        encoding = "utf-16"
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode(encoding)
    except LookupError as error:
        raise DataError(
            f"unknown encoding {encoding!r}. Try utf-8, latin-1, cp1252, shift_jis, ..."
        ) from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        around = raw[max(0, error.start - 15) : error.end + 15]
        raise RowError(
            f"{path.name}: line {line}: byte 0x{raw[error.start]:02x} is not {encoding}, got"
            f" {around!r}. Name the real encoding with --encoding (latin-1, cp1252, shift_jis,"
            " ...), or repair the line if the file mixes encodings."
        ) from error
    return raw if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else text.encode("utf-8")


def _read_delimited(data: bytes, separator: str, source: str) -> pl.DataFrame:
    """Parse CSV or TSV into text columns, naming the row that has too many cells."""
    if not data.strip():
        return pl.DataFrame()
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise RowError(
            f"{source}: line {line}: text holds a NUL byte. Remove the NUL bytes; was the file"
            " exported as UTF-16?"
        )
    try:
        return pl.read_csv(data, separator=separator, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        rows = csv.reader(io.StringIO(data.decode("utf-8"), newline=""), delimiter=separator)
        header = next(rows)
        for number, row in enumerate(rows, start=1):
            if row and len(row) != len(header):
                raise RowError(
                    f"{source}: row {number}: expected {len(header)} cells, got {len(row)}:"
                    f" {str(row)[:80]}. Quote cells that hold {separator!r} or a quotation mark."
                ) from error
        raise


def _read_json_lines(data: bytes, source: str) -> pl.DataFrame:
    if not data.strip():
        return pl.DataFrame()
    try:
        return pl.read_ndjson(io.BytesIO(data), infer_schema_length=None)
    except pl.exceptions.PolarsError:
        lines = filter(bytes.strip, data.split(b"\n"))
        return records_to_frame(json_records(enumerate(lines, start=1), source), source)


def json_records(lines: Iterable[tuple[int, bytes]], source: str) -> Iterator[dict[str, Any]]:
    """Parse numbered lines of JSON Lines one by one.

    Raises:
        RowError: A line is not a JSON object.
    """
    for number, line in lines:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RowError(
                f"{source}: row {number}: not valid JSON ({error}), got {line[:60]!r}. Write one"
                " JSON object per line."
            ) from error
        if not isinstance(record, dict):
            raise RowError(
                f"{source}: row {number}: expected a JSON object, got {line[:60]!r}. Write one JSON"
                " object per line."
            )
        yield record


def records_to_frame(records: Iterable[dict[str, Any]], source: str) -> pl.DataFrame:
    """Build a frame from records of differing keys and types; mixed scalars become text.

    Raises:
        SchemaError: A column mixes lists with scalars.
    """
    columns: dict[str, list[Any]] = {}
    for row, record in enumerate(records):
        for name, value in record.items():
            columns.setdefault(name, [None] * row).append(value)
        for cells in columns.values():
            if len(cells) == row:
                cells.append(None)
    series = []
    for name, cells in columns.items():
        kinds = {type(c) for c in cells if c is not None}
        if list in kinds and len(kinds) > 1:
            scalars = (c is not None and not isinstance(c, list) for c in cells)
            row = next(i for i, is_scalar in enumerate(scalars, 1) if is_scalar)
            raise SchemaError(
                f"{source}: row {row}, column {name!r}: expected a list as in other rows, got"
                f" {str(cells[row - 1])[:60]!r}."
            )
        if len(kinds) > 1 and not kinds <= {int, float}:
            cells = [
                c if c is None or isinstance(c, str) else json.dumps(c, ensure_ascii=False)
                for c in cells
            ]
        series.append(pl.Series(name, cells, strict=False))
    return pl.DataFrame(series)


def _join_parts(
    parts: Sequence[Checked], wanted: TableSchema, source: str, now: datetime | None
) -> Checked:
    """Join the checked files of a table; where it has a key, look for ids that two files hold."""
    frame = pl.concat([p.frame for p in parts], how="diagonal_relaxed")
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
    return Checked(frame, pl.concat(rejected, how="diagonal_relaxed"), report)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
