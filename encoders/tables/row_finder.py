"""Find the rows of CSV text strictly: each has as many cells as the header, or it is named.

Readers of CSV are lenient where a quotation mark stands in an odd place, and then lose rows. Here
the rows are found first, by the rules of RFC 4180 and with a named escape character; what a reader
makes of them is counted against that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from encoders.tables.schemas import ACTIONS, ENTITY_TYPES

LARGEST_CELL = 8 << 20
"""A quotation mark that is not closed within so many bytes opens no cell."""

_CHOICES = {"entity_type": ENTITY_TYPES, "action": ACTIONS}

Places = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """How cells are separated, quoted and escaped."""

    separator: bytes = b","
    quote: bytes = b'"'
    """Empty: cells are not quoted."""
    escape: bytes = b""
    """Empty: a quotation mark inside a quoted cell is doubled."""
    skip_spaces: bool = False
    """A space follows each separator."""
    quote_given: bool = False
    """The quotation mark was named by the user, and so is not doubted."""

    def hide_escapes(self, text: bytes, final: bool) -> bytes:
        """Replace escaped characters by a NUL and a letter, so that they separate nothing.

        Spaces before quoted cells go where spaces are skipped, but none inside a cell.

        Args:
            text: Begins with a row; what was hidden in it before stays so.
            final: Whether it is the last; else a quoted cell may be closed in the next.
        """
        for sequence, code, _ in self._escapes():
            text = text.replace(sequence, code)
        if self.skip_spaces and self.quote in text and self.quote:
            text = self._spaces_and_cells(final).sub(lambda found: found["cell"] or b"", text)
        return text

    def _spaces_and_cells(self, final: bool) -> re.Pattern[bytes]:
        """Match quoted cells with the spaces before them, or spaces before stray marks."""
        separator, mark = re.escape(self.separator), re.escape(self.quote)
        edge = separator + rb"\r\n"
        spaces = rb"(?<=%b) +(?=%b)" % (separator, mark)
        close = rb"%b(?![^%b])" % (mark, edge)
        close = close if final else rb"(?:%b|\Z)" % close
        cell = rb"%b(?:[^%b]+|%b%b)*+%b" % (mark, mark, mark, mark, close)
        return re.compile(rb"(?:%b|(?<![^%b]))(?P<cell>%b)|%b" % (spaces, edge, cell, spaces))

    def _escapes(self) -> list[tuple[bytes, bytes, str]]:
        """List escaped characters: as written, hidden, and as they are meant."""
        if not self.escape:
            return []
        mark = self.escape.decode()
        separator = self.separator.decode("latin-1")
        meant = {text: text for text in (mark, "\r\n", "\n", "\r", separator)}
        if self.quote:
            meant[self.quote.decode()] = self.quote.decode()
        else:  # the text format of Postgres and MySQL
            meant |= {"n": "\n", "r": "\r", "t": "\t"}
        meant["N"] = f"{mark}N"
        return [
            (f"{mark}{written}".encode(), b"\0" + bytes([0x61 + n]), shown)
            for n, (written, shown) in enumerate(meant.items())
        ]

    def shown(self) -> dict[str, str]:
        """Return hidden characters and what they mean."""
        return {code.decode(): shown for _, code, shown in self._escapes()}

    def null_code(self) -> str | None:
        r"""Return what ``\N``, the null of databases, looks like in a parsed cell."""
        return self._escapes()[-1][1].decode() if self.escape else None


class Flaw(NamedTuple):
    """Why a row cannot be read, and how to mend it."""

    rule: str
    fix: str


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a block that are whole."""

    starts: Places
    ends: Places
    """A row is ``block[start:end]``, without its line end."""
    rest: int
    """Where the bytes begin that belong to the next block."""
    malformed: dict[int, Flaw] = field(default_factory=dict)
    """Place of a row -> why it is none."""


def find_rows(block: bytes, dialect: Dialect, names: Sequence[str], final: bool) -> Rows:
    """Find the rows of a block of text that begins with a row.

    Args:
        block: UTF-8 text with hidden escapes.
        dialect: How it is written.
        names: The header's.
        final: Whether the text ends with the block; else its last row may be incomplete.
    """
    data = np.frombuffer(block, np.uint8)
    quoted, bad, limit = _quoted(block, data, dialect, final)
    line_ends = np.flatnonzero((data == 0x0A) | (data == 0x0D))
    separators = np.flatnonzero(data == dialect.separator[0])
    ends = line_ends if quoted is None else line_ends[~quoted[line_ends]]
    outside = separators if quoted is None else separators[~quoted[separators]]
    ends = ends[ends < limit]
    if final and len(block) and (not len(ends) or ends[-1] < len(block) - 1):
        ends = np.append(ends, len(block))
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    rest = min(int(ends[-1]) + 1, len(block)) if len(ends) else 0
    filled = ends > starts
    starts, ends = starts[filled], ends[filled]
    cells = np.searchsorted(outside, ends) - np.searchsorted(outside, starts) + 1
    blank = _blank(block, starts, ends, cells)
    starts, ends, cells = starts[~blank], ends[~blank], cells[~blank]
    malformed = {
        int(row): _wrong_count(len(names), int(cells[row]), dialect)
        for row in np.flatnonzero(cells != len(names))
    }
    if quoted is not None and not dialect.quote_given:
        inner = line_ends[quoted[line_ends] & (line_ends < limit)]
        several = np.unique(np.searchsorted(ends, inner))
        same = _with_cells(len(names), ends, line_ends, separators)
        for row in several[np.isin(several, same)].tolist():
            lines = block[starts[row] : ends[row]].splitlines()
            if _are_rows(lines, names, dialect):
                malformed[row] = _SWALLOWS
    for place in bad:
        row = int(np.searchsorted(ends, place))
        if row < len(ends) and starts[row] <= place:
            malformed[row] = _stray_quote(dialect)
    return Rows(starts, ends, rest, malformed)


def _wrong_count(expected: int, got: int, dialect: Dialect) -> Flaw:
    shown = dialect.separator.decode("latin-1")
    fix = (
        f"Quote cells that hold {shown!r}, a line break or a quotation mark, or name what the file"
        " is written with: --separator, --quote, --escape."
        if got > expected
        else f"Write the missing cells as empty ones ({shown!r}), and quote cells that hold a line"
        " break."
    )
    return Flaw(f"expected {expected} cells, got {got}", fix)


def _stray_quote(dialect: Dialect) -> Flaw:
    return Flaw(
        "a quotation mark opens a cell and is not closed at the cell's end",
        r"Double quotation marks inside a quoted cell, or say how they are written: --escape '\',"
        " or --quote none where they quote nothing.",
    )


_SWALLOWS = Flaw(
    "a quoted cell runs over line ends and holds whole rows",
    "Close the quotation mark, or say --quote none where it quotes nothing (--quote '\"' where the"
    " cell is meant).",
)


def _blank(block: bytes, starts: Places, ends: Places, cells: Places) -> Mask:
    """Find rows of white space alone."""
    blank = np.zeros(len(starts), dtype=bool)
    for row in np.flatnonzero((cells == 1) & (ends - starts < 256)).tolist():
        blank[row] = not block[starts[row] : ends[row]].strip(b" \t\x1a")
    return blank


def _quoted(
    block: bytes, data: npt.NDArray[np.uint8], dialect: Dialect, final: bool
) -> tuple[Mask | None, list[int], int]:
    """Find which bytes are in quoted cells.

    Returns:
        The mask (None: there are none), places of quotation marks that open nothing, and the byte
        from which on a cell is incomplete.
    """
    if not dialect.quote or dialect.quote not in block:
        return None, [], len(block)
    marks = np.flatnonzero(data == dialect.quote[0])
    edge = np.zeros(256, dtype=bool)
    edge[[dialect.separator[0], 0x0A, 0x0D, dialect.quote[0]]] = True
    opening, closing = marks[0::2], marks[1::2]
    strict = bool(
        (edge[data[opening - 1]] | (opening == 0)).all()
        and (edge[data[np.minimum(closing + 1, len(data) - 1)]] | (closing == len(data) - 1)).all()
    )
    is_open = len(marks) % 2 == 1
    if strict and not (is_open and (final or len(data) - int(marks[-1]) > LARGEST_CELL)):
        inside = np.zeros(len(data), dtype=np.int8)
        inside[marks] = 1
        mask = np.bitwise_xor.accumulate(inside).astype(bool)
        return mask, [], int(marks[-1]) if is_open else len(block)
    return _quoted_slowly(block, dialect, final)


def _quoted_slowly(
    block: bytes, dialect: Dialect, final: bool
) -> tuple[Mask | None, list[int], int]:
    """Do what ``_quoted`` does where quotation marks stand in odd places."""
    edge = re.escape(dialect.separator) + rb"\r\n"
    mark = re.escape(dialect.quote)
    opens = rb"(?<![^%b])%b" % (edge, mark)
    cell = rb"(?:[^%b]+|%b%b)*+" % (mark, mark, mark)
    whole = re.compile(rb"(?P<whole>%b%b%b(?![^%b]))|%b" % (opens, cell, mark, edge, opens))
    incomplete = re.compile(rb"%b%b\Z" % (mark, cell))
    steps = np.zeros(len(block) + 1, dtype=np.int8)
    bad: list[int] = []
    limit = len(block)
    for found in whole.finditer(block):
        if found["whole"] is not None:
            steps[found.start()] += 1
            steps[found.end()] -= 1
        elif (
            not final
            and len(block) - found.start() <= LARGEST_CELL
            and incomplete.match(block, found.start())
        ):
            limit = found.start()
            break
        else:
            bad.append(found.start())
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool), bad, limit


def _with_cells(count: int, ends: Places, line_ends: Places, separators: Places) -> Places:
    """Find the rows whose every line has as many cells as a row, quotation marks aside."""
    stops = np.union1d(line_ends, ends)
    begins = np.concatenate([[0], stops[:-1] + 1])
    cells = np.searchsorted(separators, stops) - np.searchsorted(separators, begins) + 1
    other = (cells != count) & (stops > begins)
    rows = np.searchsorted(ends, stops[other])
    return np.setdiff1d(np.arange(len(ends)), rows)


def _are_rows(lines: Sequence[bytes], names: Sequence[str], dialect: Dialect) -> bool:
    """Tell whether lines hold what rows of such a table do, where its header tells."""
    known = [(place, _CHOICES[name]) for place, name in enumerate(names) if name in _CHOICES]
    if not known:
        return len(names) > 2
    separator = dialect.separator.decode("latin-1")
    cells = [line.decode("utf-8", "replace").split(separator) for line in lines if line]
    values = [[row[place].strip(" \"'") for row in cells] for place, _ in known]
    # The first line begins a row: an entity type of the user's own is as good in the others
    return all(
        {*column[1:]} <= {*choices, column[0]} for column, (_, choices) in zip(values, known)
    )
