"""Find out how a CSV or TSV file is written: separator, quotation marks, escapes, decimal commas.

A guess holds only if every row of the first block then has as many cells as the header.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from encoders.errors import SchemaError
from encoders.tables.reading_options import NONE, ReadingOptions
from encoders.tables.row_finder import Dialect, find_rows
from encoders.tables.schemas import OTHER_NAMES, SCHEMAS, Kind
from encoders.tables.typed_files import check_names

_SEPARATORS = (",", "\t", ";", "|", "\x01")
_LINE = re.compile(rb"([^\r\n]*)(\r\n|\n|\r|\Z)")
_SEPARATOR_LINE = re.compile(rb'(?i)"?sep=(.)"?\s*')
_WORDS = {b"\t": "tab", b"\x01": r"\x01"}
_KNOWN = frozenset(
    name
    for table in SCHEMAS.values()
    for column in table.columns
    for name in (column.name, *OTHER_NAMES.get(column.name, ()))
)
_NO_NUMBERS = frozenset(
    column.name
    for table in SCHEMAS.values()
    for column in table.columns
    if column.kind not in (Kind.NUMBER, Kind.INTEGER)
)
_NUMBER = r"^[+-]?([0-9]+|[1-9][0-9]{0,2}(\.[0-9]{3})+)(,[0-9]+)?$"
_POSTGRES_NULL = re.compile(rb"(?<![^\t\r\n])\\N(?![^\t\r\n])")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file is written and where its rows begin."""

    dialect: Dialect
    names: tuple[str, ...]
    """Of the columns; empty where a column has none."""
    start: int
    """Bytes of the first block before the first row."""
    notes: list[str]
    """What was found out, and how to say something else."""


def find_layout(
    block: bytes, final: bool, suffix: str, options: ReadingOptions, source: str
) -> Layout | None:
    """Find out how a file is written from its first block; None: it has no header.

    Raises:
        SchemaError: The header cannot be read.
    """
    notes: list[str] = []
    separator = options.separator
    comments = 0
    start, line = 0, b""
    for start, line in _lines(block):  # noqa: B007
        named = _SEPARATOR_LINE.fullmatch(line)
        if named and not comments:
            separator = separator or named[1].decode("latin-1")
        elif line.startswith(b"#") and not _is_header(line[1:]):
            comments += 1
        elif line.strip():
            break
    else:
        return None
    if comments:
        notes.append(f"{comments:,} comment line(s) before the header were skipped")
    default = "\t" if suffix == ".tsv" else ","
    found = separator or _best_separator(line, default)
    if found not in (options.separator, default):
        notes.append(f"cells are separated by {found!r} (--separator says otherwise)")
    rest = block[start:]
    chosen: tuple[Dialect, tuple[str, ...]] | None = None
    for dialect in _candidates(rest, found, suffix, options):
        names = _header_names(line, dialect, source)
        if chosen is None:
            chosen = dialect, names
        if _reads_all(rest, dialect, names, final):
            chosen = dialect, names
            break
    assert chosen is not None, "there is always a candidate"
    dialect, names = chosen
    notes += _quoting_notes(dialect, options)
    _check_header(names, line, dialect, source)
    after = _LINE.match(rest)
    assert after is not None, "the header is a line"
    return Layout(dialect, names, start + after.end(), notes)


def _lines(block: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the first lines of a block with their places."""
    start = 0
    while start < len(block):
        found = _LINE.match(block, start)
        assert found is not None, "the pattern matches anywhere"
        yield start, found[1]
        start = found.end()


def _split(line: bytes, separator: str) -> list[str]:
    return [
        name.strip().strip("\"'").strip().lower()
        for name in line.decode("utf-8", "replace").split(separator)
    ]


def _is_header(line: bytes) -> bool:
    """Tell whether at least two cells, or the only one, are names of columns."""
    for separator in _SEPARATORS:
        names = _split(line, separator)
        if sum(name in _KNOWN for name in names) >= min(2, len(names)):
            return True
    return False


def _best_separator(line: bytes, default: str) -> str:
    """Choose the separator that makes most known names, then most cells; the default of equals."""

    def score(separator: str) -> tuple[int, int, bool]:
        names = _split(line, separator)
        return sum(name in _KNOWN for name in names), min(len(names), 2), separator == default

    return max(_SEPARATORS, key=score)


def _candidates(rest: bytes, separator: str, suffix: str, options: ReadingOptions) -> list[Dialect]:
    """List the dialects that a file may have, the likeliest first, among those that were named."""
    pairs = [('"', ""), ('"', "\\"), ("", ""), ("", "\\"), ("'", "")]
    if suffix == ".tsv" and options.quote is None and _POSTGRES_NULL.search(rest):
        pairs.insert(0, ("", "\\"))  # as Postgres COPY and mysqldump --tab write
    if b"\\" not in rest:
        pairs = [pair for pair in pairs if not pair[1]]
    if options.quote is not None:
        wanted = "" if options.quote == NONE else options.quote
        pairs = [(wanted, escape) for _, escape in pairs]
    if options.escape is not None:
        wanted = "" if options.escape == NONE else options.escape
        pairs = [(quote, wanted) for quote, _ in pairs]
    raw = separator.encode("latin-1")
    spaces = rest[: rest.find(b"\n")].split(raw)[1:]
    skip = bool(spaces) and all(cell.startswith(b" ") for cell in spaces)
    return [
        Dialect(
            separator=raw,
            quote=quote.encode(),
            escape=escape.encode(),
            skip_spaces=skip,
            quote_given=options.quote is not None,
        )
        for quote, escape in dict.fromkeys(pairs)
    ]


def _header_names(line: bytes, dialect: Dialect, source: str) -> tuple[str, ...]:
    try:
        (cells,) = csv.reader(
            [line.decode("utf-8")],
            delimiter=dialect.separator.decode("latin-1"),
            quotechar=dialect.quote.decode() or None,
            quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
            skipinitialspace=True,
        )
    except csv.Error as error:
        raise SchemaError(
            f"{source}: expected names of columns in the first line, got {line[:80]!r} ({error})."
            " Is there a header?"
        ) from error
    names = [cell.strip() for cell in cells]
    if names[0].startswith("#"):
        names[0] = names[0][1:].strip()
    return tuple(names)


def _reads_all(rest: bytes, dialect: Dialect, names: Sequence[str], final: bool) -> bool:
    """Tell whether every row of the block has as many cells as the header under a dialect."""
    hidden = dialect.hide_escapes(rest, final)
    if not dialect.quote and not dialect.quote_given and _has_quoted_cells(hidden, dialect):
        return False
    if dialect.quote == b"'" and not _has_quoted_cells(hidden, dialect):
        return False
    rows = find_rows(hidden, dialect, names, final)
    return not rows.malformed


def _has_quoted_cells(hidden: bytes, dialect: Dialect) -> bool:
    """Tell whether a cell begins and ends with a quotation mark."""
    quote = dialect.quote or b'"'
    edge = re.escape(dialect.separator) + rb"\r\n"
    cell = rb"(?<![^%b])%b[^%b\r\n]*%b(?![^%b])" % (edge, quote, quote, quote, edge)
    return re.search(cell, hidden) is not None


def _quoting_notes(dialect: Dialect, options: ReadingOptions) -> list[str]:
    notes = []
    if options.quote is None and dialect.quote != b'"':
        shown = repr(dialect.quote.decode()) if dialect.quote else "none"
        notes.append(f"quotation marks around cells: {shown} (--quote says otherwise)")
    if options.escape is None and dialect.escape:
        notes.append(
            f"{dialect.escape.decode()!r} escapes the character behind it (--escape says otherwise)"
        )
    return notes


def _check_header(names: Sequence[str], line: bytes, dialect: Dialect, source: str) -> None:
    """Refuse a header that names a column twice or has an open quotation mark."""
    header = find_rows(dialect.hide_escapes(line, True), dialect, names, True)
    if header.malformed:
        raise SchemaError(
            f"{source}: the header holds a quotation mark that is not closed: {line[:80]!r}. Remove"
            " it, or say --quote none."
        )
    check_names([name for name in names if name], source)


def decimal_comma_columns(frame: pl.DataFrame) -> list[str]:
    """Name the columns whose cells are all numbers, some of them with a decimal comma."""
    found = []
    for name, dtype in frame.schema.items():
        if dtype != pl.String or name in _NO_NUMBERS:
            continue
        cells = frame[name].str.strip_chars().drop_nulls()
        cells = cells.filter(cells != "")
        with_comma = cells.filter(cells.str.contains(",", literal=True))
        if len(with_comma) and cells.str.contains(_NUMBER).all():
            found.append(name)
    return found


def read_decimal_commas(frame: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """Write the numbers of columns with a decimal point, and without points between thousands."""
    number = pl.col(*columns).str.strip_chars()
    changed = number.str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True)
    return frame.with_columns(
        pl.when(number.str.contains(_NUMBER)).then(changed).otherwise(pl.col(*columns))
    )
