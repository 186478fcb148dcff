"""Choose types for unknown columns of text files: numbers, booleans or lists where nothing is lost.

CSV and TSV hold texts alone. A column becomes more only where every cell of every file reads as one
type without loss: ``007``, and decimals that a float64 does not give back, stay text.
"""

from __future__ import annotations

import io
import json
import math
from decimal import Decimal
from typing import Any

import polars as pl

from encoders.tables.parts import TableFile
from encoders.tables.schemas import MALFORMED, ROW, TableSchema

_TYPES: dict[pl.DataType, str] = {
    pl.Int64(): "numbers",
    pl.Float64(): "numbers",
    pl.Boolean(): "true or false",
    pl.List(pl.String()): "JSON lists",
    pl.List(pl.Int64()): "JSON lists",
    pl.List(pl.Float64()): "JSON lists",
}
"""Types an unknown catalogue column may have, the first that fits; everything else stays text."""
_WHOLE = r"^(0|-?[1-9][0-9]{0,18})$"
_DECIMAL = r"^-?(0|[1-9][0-9]*)?\.[0-9]+$"
_EXPONENT = r"^-?(0|[1-9][0-9]*)(\.[0-9]+[eE][+-]?|[eE][+-])[0-9]+$"
"""Needs a point or a sign: 1E5 may be a code."""
_EXACT_DIGITS = 15
"""Any decimal of so many significant digits comes back from a float64."""
_LARGEST_EXACT = 2**53


class AttributeTypes:
    """Decide over all files of an open table what the cells of its unknown columns are."""

    def __init__(self, wanted: TableSchema) -> None:
        self._wanted = wanted
        self._seen: dict[str, _CellsSeen] = {}

    def add(self, frame: pl.DataFrame, file: TableFile) -> None:
        """Count which types hold the cells of some rows of a file."""
        for name in self._unknown(frame):
            seen = self._seen.setdefault(name, _CellsSeen())
            if file.is_delimited:
                seen.add_texts(frame[name], frame[ROW], file.name)
            else:
                seen.add_typed(frame[name])

    def typed(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Convert the cells of a text file's checked rows to the types that hold in all files."""
        chosen = {name: self._seen[name].dtype() for name in self._unknown(frame)}
        return frame.with_columns(
            _read_cells(frame[name], dtype) for name, dtype in chosen.items() if dtype is not None
        )

    def notes(self) -> list[str]:
        """Return a line for each column that stays text though most of its cells are more."""
        return [note for name, seen in self._seen.items() if (note := seen.note(name))]

    def _unknown(self, frame: pl.DataFrame) -> list[str]:
        return [
            name
            for name in frame.columns
            if self._wanted.open
            and self._wanted.column(name) is None
            and name not in (ROW, MALFORMED)
        ]


class _CellsSeen:
    """Count the filled cells of a column that each type holds, and keep the first it does not."""

    def __init__(self) -> None:
        self.filled = 0
        self.fitting = dict.fromkeys(_TYPES, 0)
        self.misfits: dict[pl.DataType, str] = {}

    def add_texts(self, cells: pl.Series, rows: pl.Series, source: str) -> None:
        """Count cells of a text file, which stand in rows of these numbers."""
        texts = _filled(cells)
        filled = texts.is_not_null()
        self.filled += int(filled.sum())
        for dtype, fits in _fitting(texts).items():
            self.fitting[dtype] += int(fits.sum())
            misfits = (filled & ~fits).arg_true()
            if len(misfits) and dtype not in self.misfits:
                self.misfits[dtype] = (
                    f"{source}, row {rows[misfits[0]]}: {cells[misfits[0]][:60]!r}"
                )

    def add_typed(self, values: pl.Series) -> None:
        """Count the values of a file that has types; whole numbers also fit a column of floats."""
        count = len(values) - values.null_count()
        self.filled += count
        too_large = values.dtype.is_integer() and _beyond_exact_floats(values)
        for dtype in _TYPES:
            if _same_or_wider(values.dtype, dtype) and not (too_large and dtype == pl.Float64):
                self.fitting[dtype] += count

    def dtype(self) -> pl.DataType | None:
        """Return the first type that holds every cell; None: text."""
        if not self.filled:
            return None
        return next((dtype for dtype, count in self.fitting.items() if count == self.filled), None)

    def note(self, name: str) -> str | None:
        """Explain why a column stays text although most of its cells are more, else None."""
        best = max(self.fitting, key=lambda dtype: self.fitting[dtype])
        count = self.fitting[best]
        if count == self.filled or 2 * count <= self.filled or best not in self.misfits:
            return None
        return (
            f"column {name!r} stays text: {count:,} of {self.filled:,} cells are {_TYPES[best]},"
            f" but not {self.misfits[best]}. Leave unknown cells empty; codes with leading zeros or"
            " too many digits belong to text."
        )


def _beyond_exact_floats(values: pl.Series) -> bool:
    """Tell whether an integer of any width has no exact float."""
    # Compared as Python integers: the bounds do not fit the narrower types.
    low: Any = values.min()
    high: Any = values.max()
    return low is not None and (int(low) < -_LARGEST_EXACT or int(high) > _LARGEST_EXACT)


def _same_or_wider(found: pl.DataType, wanted: pl.DataType) -> bool:
    """Tell whether ``wanted`` holds the values of type ``found``, integers beyond 2**53 aside."""
    if isinstance(found, pl.List | pl.Array) and isinstance(wanted, pl.List):
        found, wanted = _inner(found), _inner(wanted)
    if found.is_integer():
        return wanted in (pl.Int64, pl.Float64)
    if found.is_float():
        return wanted == pl.Float64
    return found == wanted and not found.is_nested()


def _inner(dtype: pl.List | pl.Array) -> pl.DataType:
    inner = dtype.inner
    return inner if isinstance(inner, pl.DataType) else inner()


def _filled(cells: pl.Series) -> pl.Series:
    """Strip texts; blank ones become null."""
    texts = cells.cast(pl.String).str.strip_chars()
    return texts.set(texts == "", None)


def _fitting(texts: pl.Series) -> dict[pl.DataType, pl.Series]:
    """Find for each type the texts that it gives back unchanged when printed; null fits none."""
    numbers = texts.cast(pl.Int64, strict=False)
    whole = texts.str.contains(_WHOLE) & numbers.is_not_null()
    small = whole & numbers.is_between(-_LARGEST_EXACT, _LARGEST_EXACT)
    fits: dict[pl.DataType, pl.Series] = {
        pl.Int64(): whole,
        pl.Float64(): small | _exact_decimals(texts),
        pl.Boolean(): texts.str.to_lowercase().is_in(["true", "false"]),
    }
    types: list[frozenset[type] | None] = [None] * len(texts)
    if texts.str.starts_with("[").any():
        types_of = {text: _list_items(text) for text in texts.unique().to_list()}
        types = [types_of[text] for text in texts.to_list()]
    for item, kinds in ((pl.String(), {str}), (pl.Int64(), {int}), (pl.Float64(), {int, float})):
        fitting = [found is not None and found <= kinds for found in types]
        fits[pl.List(item)] = pl.Series(fitting, dtype=pl.Boolean)
    return {dtype: fit.fill_null(False) for dtype, fit in fits.items()}


def _exact_decimals(texts: pl.Series) -> pl.Series:
    """Find the texts that are decimals which a float64 gives back."""
    decimal = (texts.str.contains(_DECIMAL) | texts.str.contains(_EXPONENT)).fill_null(False)
    short = texts.str.contains(_DECIMAL) & (texts.str.len_bytes() <= _EXACT_DIGITS)
    doubtful = (decimal & ~short.fill_null(False)).arg_true()
    inexact = [row for row in doubtful.to_list() if not _is_exact(texts[row])]
    return decimal.scatter(inexact, False) if inexact else decimal


def _is_exact(text: str) -> bool:
    printed = repr(float(text))
    return printed == text or Decimal(printed) == Decimal(text)


def _list_items(text: str | None) -> frozenset[type] | None:
    """Return the types in a JSON list whose values print as they were written; None: it is none."""
    if not text or not text.startswith("["):
        return None
    try:
        values = json.loads(
            text, parse_int=_exact_int, parse_float=_exact_float, parse_constant=_exact_float
        )
        # Raises on half a surrogate pair, which is no text.
        "".join(value for value in values if isinstance(value, str)).encode()
    except (ValueError, RecursionError):
        return None
    types = frozenset(map(type, values))
    inexact = any(type(value) is int and abs(value) > _LARGEST_EXACT for value in values)
    return None if float in types and inexact else types


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
    """Convert texts that ``dtype`` was found to hold."""
    texts = _filled(cells)
    if isinstance(dtype, pl.List):
        return texts.str.json_decode(dtype)
    if dtype == pl.Boolean:
        return texts.str.to_lowercase() == "true"
    return texts.cast(dtype)


def cell_texts(values: pl.Series) -> pl.Series:
    """Convert a column to texts, or a column of lists to lists of texts.

    Numbers read as polars reads those of JSON files as text (38 and 38.0 as ``38``, 1e-7 as
    ``0.0000001``); NaN is missing.
    """
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    in_lists = isinstance(values.dtype, pl.List)
    wanted = pl.List(pl.String()) if in_lists else pl.String()
    leaf = values.dtype.inner if in_lists else values.dtype  # type: ignore[attr-defined]
    if not leaf.is_float() or values.is_empty():
        return values.cast(wanted)
    lines = values.alias("cell").to_frame().write_ndjson()
    texts = pl.read_ndjson(io.BytesIO(lines.encode()), schema={"cell": wanted})["cell"]
    return texts.alias(values.name)
