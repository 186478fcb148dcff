"""Read CSV and TSV files block by block as text cells; every row is read, or named as malformed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv

from encoders.errors import DataError
from encoders.tables.dialect import (
    Layout,
    decimal_comma_columns,
    find_layout,
    read_decimal_commas,
)
from encoders.tables.parts import format_of
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.row_finder import Rows, find_rows
from encoders.tables.schemas import MALFORMED, ROW
from encoders.text.text_blocks import BLOCK_BYTES, text_blocks

MALFORMED_TYPE = pl.Struct({"rule": pl.String, "fix": pl.String, "value": pl.String})
_DATABASE_NULL = r"\N"


def delimited_chunks(
    path: Path, options: ReadingOptions, notes: list[str], block_bytes: int = BLOCK_BYTES
) -> Iterator[pl.DataFrame]:
    """Yield the rows of a CSV or TSV file, about ``block_bytes`` at a time.

    Args:
        path: The file; nothing is yielded if it has no header.
        options: What is known about it.
        notes: What was found out is added here, before the first frame is yielded.
        block_bytes: Bytes read at a time.

    Yields:
        Text columns, ``ROW`` (numbers of the rows, from 1; blank lines are none) and, where a row
        is malformed, ``MALFORMED``; its cells are null. The first frame may have no rows.

    Raises:
        SchemaError: The header is malformed, or names a column twice.
        RowError: See ``text_blocks``.
    """
    blocks = _with_last(text_blocks(path, options.encoding, block_bytes))
    first = next(blocks, None)
    if first is None:
        return
    block, final = first
    layout = find_layout(block, final, format_of(path), options, path.name)
    if layout is None:
        return
    notes += layout.notes
    reader = _Reader(path.name, layout, options)
    frame = reader.read(block[layout.start :], final)
    reader.read_numbers(frame, notes)
    yield reader.finish(frame)
    for block, final in blocks:
        frame = reader.read(block, final)
        if frame.height:
            yield reader.finish(frame)


def _with_last(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield each block, and whether it is the last one."""
    held = None
    for block in blocks:
        if held is not None:
            yield held, False
        held = block
    if held is not None:
        yield held, True


class _Reader:
    """Parse blocks that follow each other."""

    def __init__(self, source: str, layout: Layout, options: ReadingOptions) -> None:
        self.source = source
        self.dialect = layout.dialect
        self.names = layout.names
        self.options = options
        self.decimal_commas: list[str] = []
        self._rest = b""
        self._next_row = 1

    def read(self, block: bytes, final: bool) -> pl.DataFrame:
        """Parse the rows that end in a block."""
        text = self.dialect.hide_escapes(self._rest + block, final)
        if final:
            text = text.rstrip(b"\x1a")  # MS-DOS ends texts so
        rows = find_rows(text, self.dialect, self.names, final)
        self._rest = text[rows.rest :]
        count = len(rows.starts)
        numbers = np.arange(self._next_row, self._next_row + count)
        self._next_row += count
        good = np.ones(count, dtype=bool)
        good[list(rows.malformed)] = False
        frame = self._parse(_join(text, rows, good), int(good.sum()))
        frame = frame.with_columns(pl.Series(ROW, numbers[good], dtype=pl.UInt32))
        if rows.malformed:
            flaws = self._flaws(text, rows, numbers)
            frame = pl.concat([frame, flaws], how="diagonal").sort(ROW)
        return frame

    def read_numbers(self, sample: pl.DataFrame, notes: list[str]) -> None:
        """Find out from the first rows which columns have decimal commas and which have no name."""
        self._read_decimal_commas(sample, notes)
        if not all(self.names):
            notes.append(
                "a column without a name was left out (pandas writes its index so; index=False"
                " leaves it out)"
            )

    def _read_decimal_commas(self, sample: pl.DataFrame, notes: list[str]) -> None:
        """Take columns for numbers with a decimal comma where told so, or commas separate nothing.

        Between commas, "1,500" may as well be fifteen hundred.
        """
        wanted = self.options.decimal_comma
        columns = [] if wanted is False else decimal_comma_columns(sample)
        shown = ", ".join(map(repr, columns))
        if wanted or self.dialect.separator != b",":
            self.decimal_commas = columns
            option = "--no-decimal-comma leaves them as text"
        else:
            option = "kept as text; --decimal-comma reads them as numbers"
        if columns and wanted is None:
            notes.append(f"numbers with a decimal comma in column(s) {shown} ({option})")

    def finish(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Read decimal commas, and leave out columns without a name."""
        if self.decimal_commas:
            frame = read_decimal_commas(frame, self.decimal_commas)
        return frame.drop(_unnamed(self.names), strict=False)

    def _parse(self, text: bytes, count: int) -> pl.DataFrame:
        columns = _parser_names(self.names)
        if not count:
            return pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
        quote = self.dialect.quote.decode()
        try:
            table = pyarrow.csv.read_csv(
                pa.BufferReader(text),
                read_options=pyarrow.csv.ReadOptions(
                    column_names=columns, block_size=len(text) + 1, use_threads=False
                ),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=self.dialect.separator.decode("latin-1"),
                    quote_char=quote or False,
                    newlines_in_values=True,
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()),
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                    null_values=[""],
                ),
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.source}: cannot be read as CSV ({error}).") from error
        if table.num_rows != count:
            raise DataError(
                f"{self.source}: holds {count:,} rows, but {table.num_rows:,} were read. Say how it"
                " is written (--separator, --quote, --escape), or write it with double quotation"
                " marks around cells."
            )
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame), "a table becomes a frame"
        return self._meant(frame, text)

    def _meant(self, frame: pl.DataFrame, text: bytes) -> pl.DataFrame:
        """Put escaped characters back, and read the null of databases."""
        cells = pl.col(pl.String)
        if self.dialect.skip_spaces:
            frame = frame.with_columns(cells.str.strip_chars_start(" "))
        code = self.dialect.null_code()
        if code is not None and b"\0" in text:
            meant = self.dialect.shown()
            frame = frame.with_columns(
                pl.when(cells == code)
                .then(None)
                .otherwise(cells.str.replace_many(list(meant), list(meant.values())))
                .name.keep()
            )
        if _DATABASE_NULL.encode() in text:
            frame = frame.with_columns(
                pl.when(cells == _DATABASE_NULL).then(None).otherwise(cells).name.keep()
            )
        return frame

    def _flaws(self, text: bytes, rows: Rows, numbers: np.ndarray) -> pl.DataFrame:
        """Return the malformed rows: their numbers, and what is wrong with each."""
        found = []
        for row, flaw in sorted(rows.malformed.items()):
            line = text[rows.starts[row] : rows.ends[row]][:400].decode("utf-8", "replace")
            for code, meant in self.dialect.shown().items():
                line = line.replace(code, f"{self.dialect.escape.decode()}{meant}")
            found.append({"rule": flaw.rule, "fix": flaw.fix, "value": line})
        places = sorted(rows.malformed)
        return pl.DataFrame(
            [
                pl.Series(ROW, numbers[places], dtype=pl.UInt32),
                pl.Series(MALFORMED, found, dtype=MALFORMED_TYPE),
            ]
        )


def _parser_names(names: Sequence[str]) -> list[str]:
    """Return names for all columns; those without one get a name that no file has."""
    return [name or f"\x01{place}" for place, name in enumerate(names)]


def _unnamed(names: Sequence[str]) -> list[str]:
    return [f"\x01{place}" for place, name in enumerate(names) if not name]


def _join(text: bytes, rows: Rows, good: np.ndarray) -> bytes:
    """Return the text of the good rows; what lies between them is left out unless it is short."""
    starts, ends = rows.starts, rows.ends
    if not len(starts):
        return b""
    apart = ~(good[:-1] & good[1:]) | (starts[1:] - ends[:-1] > len(b"\r\n"))
    last = np.append(np.flatnonzero(apart), len(starts) - 1)
    first = np.concatenate([[0], last[:-1] + 1])
    return b"".join(
        text[starts[begin] : ends[end]] + b"\n"
        for begin, end in zip(first.tolist(), last.tolist(), strict=True)
        if good[begin]
    )
