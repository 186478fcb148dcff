"""Reading and writing tables as CSV, TSV, JSON Lines, Parquet or Arrow files, checked against their schema at the door."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import polars as pl

from encoders.errors import DataError, RowError, SchemaError
from encoders.schemas import TableSchema, schema
from encoders.table_checks import Checked, TableReport, check_frame

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".ipc")
OnBadRows = Literal["raise", "drop"]
TableSource = Path | str | Sequence[Path]
"""A file, a folder of part files, or several of them that make one table."""

_TYPES: dict[pl.DataType, str] = {
    pl.Int64(): "numbers",
    pl.Float64(): "numbers",
    pl.Boolean(): "true or false",
    pl.List(pl.String()): "JSON lists",
    pl.List(pl.Int64()): "JSON lists",
    pl.List(pl.Float64()): "JSON lists",
}
"""What the cells of an unknown catalogue column may be, first fit first; everything else stays text."""
_WHOLE = r"^(0|-?[1-9][0-9]{0,18})$"
_DECIMAL = r"^-?(0|[1-9][0-9]*)?\.[0-9]+$"
_EXPONENT = r"^-?(0|[1-9][0-9]*)(\.[0-9]+[eE][+-]?|[eE][+-])[0-9]+$"
"""Needs a point or a sign: 1E5 may be a code."""
_EXACT_DIGITS = 15
"""Any decimal of so many significant digits comes back from a float64."""
_LARGEST_EXACT = 2**53


def read_table(
    path: TableSource, table: str, *, on_bad_rows: OnBadRows = "raise", encoding: str = "utf-8", now: datetime | None = None
) -> pl.DataFrame:
    """Read one table and check it; see :func:`check_table` for the arguments and what else it can tell."""
    return check_table(path, table, on_bad_rows=on_bad_rows, encoding=encoding, now=now).frame


def check_table(
    path: TableSource, table: str, *, on_bad_rows: OnBadRows = "raise", encoding: str = "utf-8", now: datetime | None = None
) -> Checked:
    """Read a file, or a folder of part files, and check it against the schema called ``table``.

    Cells of CSV and TSV are texts. Those of unknown catalogue columns become numbers, booleans or lists where every cell of every file
    reads as one without loss (``007`` does not); a column that only mostly does stays text, and a note names the first cell that does not.

    Args:
        path: A file (``.csv .tsv .jsonl .ndjson .parquet .arrow .feather .ipc``; text also as ``.gz``), a folder of them, or several.
        table: Name of the schema (``catalogue``, ``log``, ...).
        on_bad_rows: ``raise`` refuses the table at its first bad rows; ``drop`` returns them apart, counted in the report.
        encoding: Encoding of text files. Nothing is guessed: bytes that do not fit are an error that names the row.
        now: Time that "in the future" is measured from; None: the clock.

    Returns:
        The good rows, the rejected rows and the report.

    Raises:
        DataError: The file is missing, unreadable or of an unknown format.
        SchemaError: A required column is missing or of an impossible type.
        RowError: A row breaks a rule and ``on_bad_rows`` is ``raise``; the message names file, row, column, value and fix.
    """
    wanted = schema(table)
    files = table_files(path)
    attributes = AttributeTypes(wanted)
    parts = []
    for file in files:
        raw = read_raw(file, encoding)
        attributes.look_at(raw, file)
        parts.append(check_frame(raw, wanted, file.name, now=now))
    parts = [part._replace(frame=attributes.typed(part.frame, file)) for part, file in zip(parts, files, strict=True)]
    checked = parts[0] if len(parts) == 1 else _join_parts(parts, wanted, _source_name(path), now)
    checked.report.notes += attributes.notes()
    if on_bad_rows == "raise":
        raise_problems(checked.report)
    return checked


def raise_problems(report: TableReport, *, droppable: bool = False) -> None:
    """Raise the first problems of a report as one error.

    Args:
        report: Of the table.
        droppable: Whether the commands that come here have the option ``--drop-bad-rows`` for this table.

    Raises:
        RowError: The report has problems.
    """
    if not report.rules_broken:
        return
    lines = [problem.describe(report.source) for problem in report.problems[:5]]
    total = sum(report.rules_broken.values())
    if total > len(lines):
        lines.append(f"({total:,} values break a rule; see omni data validate{', or use --drop-bad-rows' if droppable else ''})")
    raise RowError("\n".join(lines))


def table_files(path: TableSource) -> list[Path]:
    """The files of a table: the file itself, or the table files of a folder in name order; of several paths one after the other.

    Raises:
        DataError: Nothing is there.
    """
    if not isinstance(path, str | Path):
        return [file for one in path for file in table_files(one)]
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder. Give a {', '.join(SUFFIXES)} file or a folder of them.")
    files = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p) in SUFFIXES)
    if not files:
        raise DataError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file.")
    return files


def _source_name(path: TableSource) -> str:
    return Path(path).name if isinstance(path, str | Path) else ", ".join(one.name for one in path)


class AttributeTypes:
    """Decides over all files of an open table what the cells of its unknown columns are."""

    def __init__(self, wanted: TableSchema) -> None:
        self._wanted = wanted
        self._seen: dict[str, _CellsSeen] = {}

    def look_at(self, frame: pl.DataFrame, file: Path) -> None:
        """Count which types hold the cells of a file, as it was read."""
        for name in self._unknown(frame):
            seen = self._seen.setdefault(name, _CellsSeen())
            if is_delimited(file):
                seen.add_texts(frame[name], file.name)
            else:
                seen.add_typed(frame[name])

    def typed(self, frame: pl.DataFrame, file: Path) -> pl.DataFrame:
        """The checked rows of a file, with their texts as what all files agree on."""
        if not is_delimited(file):
            return frame
        chosen = {name: self._seen[name].dtype() for name in self._unknown(frame)}
        return frame.with_columns(_read_cells(frame[name], dtype) for name, dtype in chosen.items() if dtype is not None)

    def notes(self) -> list[str]:
        """A line for each column that most cells, but not all, would have made more than text."""
        return [note for name, seen in self._seen.items() if (note := seen.note(name))]

    def _unknown(self, frame: pl.DataFrame) -> list[str]:
        return [name for name in frame.columns if self._wanted.open and self._wanted.column(name) is None]


class _CellsSeen:
    """How many filled cells of a column each type holds, and the first that it does not."""

    def __init__(self) -> None:
        self.filled = 0
        self.fitting = dict.fromkeys(_TYPES, 0)
        self.misfits: dict[pl.DataType, str] = {}

    def add_texts(self, cells: pl.Series, source: str) -> None:
        """Count the cells of a text file."""
        texts = _filled(cells)
        filled = texts.is_not_null()
        self.filled += int(filled.sum())
        for dtype, fits in _fitting(texts).items():
            self.fitting[dtype] += int(fits.sum())
            misfits = (filled & ~fits).arg_true()
            if len(misfits) and dtype not in self.misfits:
                self.misfits[dtype] = f"{source}, row {misfits[0] + 1}: {cells[misfits[0]][:60]!r}"

    def add_typed(self, values: pl.Series) -> None:
        """Count the values of a file that has types: whole numbers also fit a column of floats."""
        count = len(values) - values.null_count()
        self.filled += count
        too_large = values.dtype.is_integer() and not values.is_between(-_LARGEST_EXACT, _LARGEST_EXACT).all()
        for dtype in _TYPES:
            if _same_or_wider(values.dtype, dtype) and not (too_large and dtype == pl.Float64):
                self.fitting[dtype] += count

    def dtype(self) -> pl.DataType | None:
        """The first type that holds every cell; None: text."""
        return next((dtype for dtype, count in self.fitting.items() if count == self.filled), None) if self.filled else None

    def note(self, name: str) -> str | None:
        """What to say about a column that stays text although most of its cells are more."""
        best = max(self.fitting, key=lambda dtype: self.fitting[dtype])
        count = self.fitting[best]
        if count == self.filled or 2 * count <= self.filled or best not in self.misfits:
            return None
        return (
            f"column {name!r} stays text: {count:,} of {self.filled:,} cells are {_TYPES[best]}, but not {self.misfits[best]}. "
            "Leave unknown cells empty; codes with leading zeros or too many digits belong to text."
        )


def _same_or_wider(found: pl.DataType, wanted: pl.DataType) -> bool:
    if isinstance(found, pl.List | pl.Array) and isinstance(wanted, pl.List):
        found, wanted = _inner(found), _inner(wanted)
    if found.is_integer():
        return wanted in (pl.Int64, pl.Float64)
    return wanted == pl.Float64 if found.is_float() else found == wanted and not found.is_nested()


def _inner(dtype: pl.List | pl.Array) -> pl.DataType:
    inner = dtype.inner
    return inner if isinstance(inner, pl.DataType) else inner()


def _filled(cells: pl.Series) -> pl.Series:
    """Stripped texts; blank ones are null."""
    texts = cells.cast(pl.String).str.strip_chars()
    return texts.set(texts == "", None)


def _fitting(texts: pl.Series) -> dict[pl.DataType, pl.Series]:
    """For each type, which texts (null: none) it holds so that the same value would be printed again."""
    numbers = texts.cast(pl.Int64, strict=False)
    whole = texts.str.contains(_WHOLE) & numbers.is_not_null()
    small = whole & numbers.is_between(-_LARGEST_EXACT, _LARGEST_EXACT)
    fits: dict[pl.DataType, pl.Series] = {
        pl.Int64(): whole,
        pl.Float64(): small | _exact_decimals(texts),
        pl.Boolean(): texts.str.to_lowercase().is_in(["true", "false"]),
    }
    types_of = {text: _list_items(text) for text in texts.unique().to_list()} if texts.str.starts_with("[").any() else {}
    types = [types_of.get(text) for text in texts.to_list()] if types_of else [None] * len(texts)
    for item, kinds in ((pl.String(), {str}), (pl.Int64(), {int}), (pl.Float64(), {int, float})):
        fits[pl.List(item)] = pl.Series([found is not None and found <= kinds for found in types], dtype=pl.Boolean)
    return {dtype: fit.fill_null(False) for dtype, fit in fits.items()}


def _exact_decimals(texts: pl.Series) -> pl.Series:
    """Which texts are decimals that a float64 gives back."""
    decimal = (texts.str.contains(_DECIMAL) | texts.str.contains(_EXPONENT)).fill_null(False)
    short = texts.str.contains(_DECIMAL) & (texts.str.len_bytes() <= _EXACT_DIGITS)
    doubtful = (decimal & ~short.fill_null(False)).arg_true()
    inexact = [row for row in doubtful.to_list() if not _is_exact(texts[row])]
    return decimal.scatter(inexact, False) if inexact else decimal


def _is_exact(text: str) -> bool:
    printed = repr(float(text))
    return printed == text or Decimal(printed) == Decimal(text)


def _list_items(text: str | None) -> frozenset[type] | None:
    """The types in a JSON list whose values come back as they were written; None: it is not one."""
    if not text or not text.startswith("["):
        return None
    try:
        values = json.loads(text, parse_int=_exact_int, parse_float=_exact_float, parse_constant=_exact_float)
        "".join(value for value in values if isinstance(value, str)).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    types = frozenset(map(type, values))
    return None if float in types and any(type(v) is int and abs(v) > _LARGEST_EXACT for v in values) else types


def _exact_int(text: str) -> int:
    if not -(2**63) <= int(text) < 2**63:
        raise ValueError(text)
    return int(text)


def _exact_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not _is_exact(text):
        raise ValueError(text)
    return value


def _read_cells(cells: pl.Series, dtype: pl.DataType) -> pl.Series:
    texts = _filled(cells)
    if isinstance(dtype, pl.List):
        return texts.str.json_decode(dtype)
    return texts.str.to_lowercase() == "true" if dtype == pl.Boolean else texts.cast(dtype)


def read_raw(path: Path, encoding: str = "utf-8") -> pl.DataFrame:
    """Read a file as it is: text formats give text columns (CSV) or JSON values, nothing is checked yet.

    Raises:
        DataError: The file is unreadable, or its format unknown.
        RowError: Bytes are not of the encoding, or a line is not a record; the message names the row.
    """
    suffix = _suffix(path)
    try:
        if suffix in (".csv", ".tsv"):
            return _read_delimited(_text_bytes(path, encoding), "\t" if suffix == ".tsv" else ",", path.name)
        if suffix in (".jsonl", ".ndjson"):
            return _read_json_lines(_text_bytes(path, encoding), path.name)
        if suffix == ".parquet":
            return _plain(pl.read_parquet(path))
        if suffix in (".arrow", ".feather", ".ipc"):
            return _plain(pl.read_ipc(path))
    except (OSError, pl.exceptions.PolarsError, EOFError) as error:
        raise DataError(f"{path.name}: cannot be read as {suffix[1:]} ({_first_line(error)}). Is the file complete?") from error
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
        elif suffix in (".csv", ".tsv"):
            nested = [pl.col(n).map_elements(_json_cell, return_dtype=pl.String) for n, t in frame.schema.items() if t.is_nested()]
            frame.with_columns(nested).write_csv(partial, separator="\t" if suffix == ".tsv" else ",")
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
    """Whether a file's cells are texts: CSV, TSV."""
    return _suffix(path) in (".csv", ".tsv")


def _suffix(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    # Unsplash ships parts as photos.tsv000, conversions.csv001, ...
    return Path(name).suffix.lower().rstrip("0123456789")


def _plain(frame: pl.DataFrame) -> pl.DataFrame:
    """Dictionary-encoded columns as ordinary text."""
    return frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String)) if frame.width else frame


def _text_bytes(path: Path, encoding: str) -> bytes:
    """The file's text as UTF-8 bytes, after its encoding was checked."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) and encoding == "utf-8":
        encoding = "utf-16"
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode(encoding)
    except LookupError as error:
        raise DataError(f"unknown encoding {encoding!r}. Try utf-8, latin-1, cp1252, shift_jis, ...") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        around = raw[max(0, error.start - 15) : error.end + 15]
        raise RowError(
            f"{path.name}: line {line}: byte 0x{raw[error.start]:02x} is not {encoding}, got {around!r}. "
            "Name the real encoding with --encoding (latin-1, cp1252, shift_jis, ...), or repair the line if the file mixes encodings."
        ) from error
    return raw if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else text.encode("utf-8")


def _read_delimited(data: bytes, separator: str, source: str) -> pl.DataFrame:
    if not data.strip():
        return pl.DataFrame()
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise RowError(f"{source}: line {line}: text holds a NUL byte. Remove the NUL bytes; was the file exported as UTF-16?")
    try:
        return pl.read_csv(data, separator=separator, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        rows = csv.reader(io.StringIO(data.decode("utf-8"), newline=""), delimiter=separator)
        header = next(rows)
        for number, row in enumerate(rows, start=1):
            if row and len(row) != len(header):
                raise RowError(
                    f"{source}: row {number}: expected {len(header)} cells, got {len(row)}: {str(row)[:80]}. "
                    f"Quote cells that hold {separator!r} or a quotation mark."
                ) from error
        raise


def _read_json_lines(data: bytes, source: str) -> pl.DataFrame:
    if not data.strip():
        return pl.DataFrame()
    try:
        return pl.read_ndjson(io.BytesIO(data), infer_schema_length=None)
    except pl.exceptions.PolarsError:
        return records_to_frame(_json_records(data, source), source)


def _json_records(data: bytes, source: str) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(filter(bytes.strip, data.split(b"\n")), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RowError(
                f"{source}: row {number}: not valid JSON ({error}), got {line[:60]!r}. Write one JSON object per line."
            ) from error
        if not isinstance(record, dict):
            raise RowError(f"{source}: row {number}: expected a JSON object, got {line[:60]!r}. Write one JSON object per line.")
        yield record


def records_to_frame(records: Iterable[dict[str, Any]], source: str) -> pl.DataFrame:
    """Build a frame from records whose keys and value types may differ; scalars of mixed types become text.

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
            row = next(i for i, c in enumerate(cells, 1) if c is not None and not isinstance(c, list))
            raise SchemaError(f"{source}: row {row}, column {name!r}: expected a list as in other rows, got {str(cells[row - 1])[:60]!r}.")
        if len(kinds) > 1 and not kinds <= {int, float}:
            cells = [None if c is None else c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in cells]
        series.append(pl.Series(name, cells, strict=False))
    return pl.DataFrame(series)


def _join_parts(parts: Sequence[Checked], wanted: TableSchema, source: str, now: datetime | None) -> Checked:
    frame = pl.concat([p.frame for p in parts], how="diagonal_relaxed")
    report = TableReport(source, wanted.name)
    rejected = [p.rejected.with_columns(pl.lit(p.report.source).alias("file")) for p in parts]
    if wanted.key:  # the same id may appear in two parts
        again = check_frame(frame, wanted, source, now=now)
        frame, parts = again.frame, [*parts, again]
        rejected.append(again.rejected.with_columns(pl.lit(source).alias("file")))
    for part in parts:
        report.notes += [f"{part.report.source}: {note}" for note in part.report.notes]
        report.problems += part.report.problems
        for rule, count in part.report.rules_broken.items():
            report.rules_broken[rule] = report.rules_broken.get(rule, 0) + count
    report.rows_read = sum(p.report.rows_read for p in (parts[:-1] if wanted.key else parts))
    report.rows_kept = frame.height
    return Checked(frame, pl.concat(rejected, how="diagonal_relaxed"), report)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
