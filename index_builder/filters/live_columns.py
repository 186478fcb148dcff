"""Attributes of live entries as typed, sorted columns, each made when a filter first names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from index_builder.filters.attributes import AttributeTable
from index_builder.filters.columns import Column, prepared_column
from index_builder.filters.field_types import FieldType, field_type
from index_builder.filters.json_values import fitted_column, json_columns


class LiveColumns:
    """Columns of live entries with the names and types of a base.

    Values that do not fit their type are missing, but for fractions among integers, which stay.

    Args:
        values: Attributes as JSON values, one dictionary a row; not changed while this lives.
        ids: Of the rows; where one occurs twice, the last row has it.
        base: The table of the base.
    """

    def __init__(
        self, values: Sequence[Mapping[str, Any]], ids: Sequence[str], base: AttributeTable
    ) -> None:
        self._values = values
        self._ids = ids
        self._dtypes = base.frame.schema
        self._columns: dict[str, Column] = {}
        self._rows: dict[str, int] | None = None
        self.count = len(values)
        self.schema: Mapping[str, FieldType] = base.schema

    def row_of(self, id_: str) -> int | None:
        """Return the row of an id, or None."""
        rows = self._rows
        if rows is None:
            rows = self._rows = {known: row for row, known in enumerate(self._ids)}
        return rows.get(id_)

    def column(self, name: str) -> Column:
        """Return a column prepared for filtering; ``name`` must be in ``schema``."""
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = self._prepared(name)
        return column

    def _prepared(self, name: str) -> Column:
        found = pl.DataFrame(json_columns(name, [row.get(name) for row in self._values]))
        series = fitted_column(found, name, self._dtypes[name], self.count)
        type_ = self.schema[name]
        if not type_.endswith(("time", "time>")):
            type_ = field_type(name, series.dtype)
        return prepared_column(type_, series)
