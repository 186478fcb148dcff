"""Columnar attributes of one entity type."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from index_builder.errors import BadAttribute
from index_builder.filters.columns import Column, prepared_column
from index_builder.filters.field_types import (
    BAD_NAME,
    POLARS_TYPES,
    FieldType,
    field_type,
    is_attribute_name,
    refined_type,
)

MAX_SINGLE_CELLS = 500
"""Values that are read one by one: to select rows of a frame takes as long as some hundred."""

RowLookup = Callable[[str], int | None]
"""The row of an id, or None."""


class AttributeTable:
    """Attributes of ``count`` rows.

    Columns are prepared for filtering when a filter first names them, or by ``warm``.

    Attributes:
        frame: The values; dates and times as text in ISO 8601.
        count: Rows.
        schema: Types by name.
        row_of: Finds rows by id, for filters on ``id``; None: ids are not known.
    """

    def __init__(self, frame: pl.DataFrame) -> None:
        for name in frame.columns:
            if not is_attribute_name(name):
                raise BadAttribute(f"column {name!r} {BAD_NAME}")
        self.frame = frame.with_columns(
            [normalised(name, frame[name]).alias(name) for name in frame.columns]
        )
        self.count = len(frame)
        self.schema: dict[str, FieldType] = {
            name: refined_type(name, self.frame[name]) for name in self.frame.columns
        }
        self.row_of: RowLookup | None = None
        self._columns: dict[str, Column] = {}

    @classmethod
    def empty(cls, count: int) -> AttributeTable:
        """Make a table of ``count`` rows without any attribute."""
        table = cls(pl.DataFrame())
        table.count = count
        return table

    def column(self, name: str) -> Column:
        """Return a column prepared for filtering; ``name`` must be in ``schema``."""
        column = self._columns.get(name)
        if column is None:
            column = prepared_column(self.schema[name], self.frame[name])
            self._columns[name] = column
        return column

    def warm(self, names: Sequence[str] | None = None) -> None:
        """Prepare the named columns now (all by default), so that forked workers share them."""
        for name in self.schema if names is None else names:
            column = self.column(name)
            if not column.is_list:
                column.mask(0, 0)

    def values(
        self, rows: Sequence[int] | np.ndarray, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return attribute values of rows, in order; unknown names are left out."""
        known = [name for name in names if name in self.schema]
        if not known:
            return [{} for _ in rows]
        if len(rows) == 0:
            return []
        return rows_of(self.frame, rows, known)

    def save(self, path: Path) -> None:
        """Write the attributes as Parquet.

        Raises:
            OSError: The file cannot be written; polars says so in a text only.
        """
        try:
            self.frame.write_parquet(path, compression="zstd", statistics=False)
        except pl.exceptions.PolarsError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error), str(path)) from error

    @classmethod
    def load(cls, path: Path, count: int) -> AttributeTable:
        """Read what ``save`` wrote; ``count`` is the number of rows of the index."""
        table = cls(pl.read_parquet(path, memory_map=False, glob=False))
        if table.schema and table.count != count:
            raise BadAttribute(
                f"{path.name} holds {table.count} rows, but the index holds {count}. Rebuild this"
                " release."
            )
        table.count = count
        return table


def rows_of(
    frame: pl.DataFrame, rows: Sequence[int] | np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return values of rows of a frame, in order; ``names`` must be in it."""
    if len(rows) * len(names) > MAX_SINGLE_CELLS:
        return frame.select(names)[np.asarray(rows, dtype=np.int64)].to_dicts()
    found: list[dict[str, Any]] = [{} for _ in rows]
    for name in names:
        column = frame.get_column(name)
        for values, row in zip(found, rows):
            value = column[int(row)]
            values[name] = value.to_list() if isinstance(value, pl.Series) else value
    return found


def normalised(name: str, series: pl.Series) -> pl.Series:
    """Cast a column to the type that attributes of its kind have.

    Integers become int64, categories strings, and dates ISO 8601 strings, which sort by time.
    """
    type_ = field_type(name, series.dtype)
    is_list = type_.startswith("list")
    inner: Any = series.dtype.inner if is_list else series.dtype  # type: ignore[attr-defined]
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    base = type_[5:-1] if is_list else type_
    if base == "float" and inner == pl.Float32:
        return series
    target = POLARS_TYPES[base]
    if inner == target:
        return series
    try:
        if not inner.is_temporal():
            return series.cast(pl.List(target) if is_list else target)
        if is_list:
            return series.list.eval(_iso(pl.element(), inner))
        return series.to_frame().select(_iso(pl.col(name), inner))[name]
    except pl.exceptions.PolarsError as error:
        raise BadAttribute(
            f"column {name!r} of type {series.dtype} does not fit an attribute of type {type_}:"
            f" {error}"
        ) from error


def _iso(expression: pl.Expr, dtype: Any) -> pl.Expr:
    """Write times as Python's ``isoformat`` does, which is what live updates send."""
    if isinstance(dtype, pl.Datetime):
        zone = "%:z" if dtype.time_zone else ""
        return (
            expression.dt.cast_time_unit("us")
            .dt.to_string(f"%Y-%m-%dT%H:%M:%S%.6f{zone}")
            .str.replace(r"\.000000", "")
        )
    return expression.dt.to_string("iso")
