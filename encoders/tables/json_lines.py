"""Read JSON Lines: chunks of records as columns, checked for what is no text or no record."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from encoders.errors import RowError, SchemaError
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import ROW
from encoders.tables.typed_files import check_names
from encoders.text.text_blocks import text_blocks

MAX_DEPTH = 100
"""Nesting that no reader here runs out of stack at."""
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"')
_ONE_OBJECT = "Write one JSON object per line."


def json_chunks(
    path: Path, options: ReadingOptions, chunk_rows: int, texts: Mapping[str, pl.DataType]
) -> Iterator[pl.DataFrame]:
    """Yield the records of a JSON Lines file, ``chunk_rows`` at a time, with their ``ROW``.

    Args:
        path: The file; blank lines are no rows.
        options: Its encoding.
        chunk_rows: Records in a frame.
        texts: Columns whose numbers and truth values are read as text (38 is "38", also beside
            38.5), alone or in lists.

    Raises:
        RowError: A line is no JSON object, too deep, or not Unicode; names the row.
        SchemaError: A column mixes lists with scalars.
    """
    first_row = 1
    held: list[bytes] = []
    for line in _lines(path, options.encoding):
        held.append(line)
        if len(held) == chunk_rows:
            yield _numbered(_frame(held, path.name, first_row, texts), first_row, path.name)
            first_row += len(held)
            held = []
    if held:
        yield _numbered(_frame(held, path.name, first_row, texts), first_row, path.name)


def _lines(path: Path, encoding: str) -> Iterator[bytes]:
    """Yield the lines of a file that are not blank, each with a line end."""
    rest = b""
    for block in text_blocks(path, encoding):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines if line.strip())
    if rest.strip():
        yield rest + b"\n"


def _numbered(frame: pl.DataFrame, first_row: int, source: str) -> pl.DataFrame:
    check_names(frame.columns, source)
    return frame.with_row_index(ROW, offset=first_row)


def _frame(
    lines: list[bytes], source: str, first_row: int, texts: Mapping[str, pl.DataType]
) -> pl.DataFrame:
    """Parse lines; the columns ``texts`` are text."""
    check_lines(lines, source, first_row)
    data = b"".join(lines)
    try:
        frame = pl.read_ndjson(io.BytesIO(data), infer_schema_length=None)
        as_text = {
            name: dtype
            for name, dtype in texts.items()
            if name in frame.columns and _is_number(frame.schema[name], dtype)
        }
        if as_text:
            frame = pl.read_ndjson(
                io.BytesIO(data), infer_schema_length=None, schema_overrides=as_text
            )
        if frame.height == len(lines):
            return frame
    except pl.exceptions.PolarsError:
        pass
    records = list(json_records(enumerate(lines, first_row), source))
    for name, dtype in texts.items():
        _cells_to_text(records, name, isinstance(dtype, pl.List))
    align_vectors(records)
    return records_to_frame(records, source)


def check_lines(lines: Sequence[bytes], source: str, first_row: int) -> None:
    """Refuse lines that the fast reader would misread: half surrogate pairs, deep nesting.

    Raises:
        RowError: Names the row.
    """
    for number, line in enumerate(lines, first_row):
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
            raise RowError(
                f"{source}: row {number}: expected at most {MAX_DEPTH} levels of nesting, got"
                f" {_depth(line):,}. Flatten the record, or leave the column out."
            )
        if _HALF_PAIR.search(line):
            _check_text(line, source, number)


def _depth(line: bytes) -> int:
    """Return the deepest nesting of a line."""
    depth = deepest = 0
    for byte in _STRING.sub(b"", line):
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    return deepest


def _check_text(line: bytes, source: str, number: int) -> None:
    """Refuse a record whose texts hold half a surrogate pair."""
    (record,) = json_records([(number, line)], source)
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{source}: row {number}: half of a surrogate pair is no text, got"
            f" {line[:80]!r}. Cut texts between characters, or leave the character out."
        ) from error


def json_records(lines: Iterable[tuple[int, bytes]], source: str) -> Iterator[dict[str, Any]]:
    """Parse numbered lines of JSON Lines one by one.

    Raises:
        RowError: A line is not a JSON object.
    """
    for number, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            fix = _ONE_OBJECT
            if number == 1 and line.lstrip().startswith(b"["):
                fix = f"{_ONE_OBJECT} jq -c '.[]' turns an array into lines."
            raise RowError(
                f"{source}: row {number}: not valid JSON ({error}), got {line[:60]!r}. {fix}"
            ) from error
        if not isinstance(record, dict):
            fix = _ONE_OBJECT
            if isinstance(record, list) and record and isinstance(record[0], dict):
                fix = f"{_ONE_OBJECT} jq -c '.[]' turns an array into lines."
            raise RowError(
                f"{source}: row {number}: expected a JSON object, got {line[:60]!r}. {fix}"
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


def _is_number(found: pl.DataType, wanted: pl.DataType) -> bool:
    """Tell whether a column, or one of lists, was read as numbers where the schema has text."""
    if isinstance(found, pl.List) != isinstance(wanted, pl.List):
        return False
    leaf = found.inner if isinstance(found, pl.List) else found
    return leaf.is_numeric() or leaf == pl.Boolean


def align_vectors(records: list[dict[str, Any]]) -> None:
    """Make a single vector a list of one where other rows of its column hold several."""
    lists = [
        (record, name, value)
        for record in records
        for name, value in record.items()
        if isinstance(value, list) and value
    ]
    several = {name for _, name, value in lists if isinstance(value[0], list)}
    for record, name, value in lists:
        if name in several and all(isinstance(item, int | float) for item in value):
            record[name] = [value]


def _cells_to_text(records: list[dict[str, Any]], name: str, in_lists: bool) -> None:
    """Write a column's numbers and truth values, alone or in lists, as the JSON reader does."""
    for record in records:
        if name not in record:
            continue
        value = record[name]
        if in_lists and isinstance(value, list):
            record[name] = [_number_text(item) for item in value]
        elif not in_lists:
            record[name] = _number_text(value)


def _number_text(value: Any) -> Any:
    if not isinstance(value, int | float):
        return value
    line = b'{"value": %b}' % json.dumps(value).encode()
    return pl.read_ndjson(io.BytesIO(line), schema_overrides={"value": pl.String})["value"][0]
