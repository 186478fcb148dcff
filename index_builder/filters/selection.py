"""Evaluate parsed filters over attribute columns to the rows that pass.

A missing value satisfies no comparison, nor its negation (SQL's three-valued logic). The parser
pushes ``not`` down to the comparisons, so that only "true" has to be computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import polars as pl

from index_builder.errors import FilterError
from index_builder.filters.columns import (
    Column,
    Columns,
    Key,
    Slices,
    outside,
    prepared_column,
)
from index_builder.filters.expression import Both, Filter, Leaf, Moment, Node, Value
from index_builder.filters.field_types import POLARS_TYPES, FieldType
from index_builder.filters.parts import AllParts, AnyPart, Found, Part, Ranges, Selection
from index_builder.filters.patterns import parse_pattern
from index_builder.filters.times import Period, period_of

ID_FIELD = "id"
"""What filters call the id of an entity; an attribute of that name cannot be filtered."""


class BoundFilter:
    """A filter bound to a table: its types are checked and the sizes of its parts known."""

    def __init__(self, parsed: Filter, table: Columns) -> None:
        self._expression = parsed.expression
        self._table = table
        self._root = self._bound(parsed.root)

    def estimate(self) -> float:
        """Estimate the share of rows selected, within [0, 1].

        Sizes of comparisons are exact; they are taken for independent.
        """
        return self._root.share(self._table.count)

    def select(self) -> Selection:
        """Evaluate: by rows where a part is strict, else by masks."""
        return self._root.select(self._table.count)

    def _bound(self, node: Node) -> Part:
        """Bind a part; comparisons of one field side by side become one of known size."""
        if isinstance(node, Leaf):
            return self._leaf(node)
        every = isinstance(node, Both)
        joined: dict[str, Ranges] = {}
        parts: list[Part] = []
        for part in map(self._bound, node.parts):
            known = joined.get(part.field) if isinstance(part, Ranges) else None
            if known is not None:
                assert isinstance(part, Ranges)
                join = known.narrow if every else known.widen
                join(part.slices)
                continue
            parts.append(part)
            if isinstance(part, Ranges):
                joined[part.field] = part
        if len(parts) == 1:
            return parts[0]
        return AllParts(parts) if every else AnyPart(parts)

    def _leaf(self, leaf: Leaf) -> Part:
        """Check the types of a comparison and find its rows.

        Raises:
            FilterError: The attribute is unknown, or of another type.
        """
        if leaf.field == ID_FIELD:
            return Found(self._ids(leaf))
        if leaf.field not in self._table.schema:
            known = ", ".join(sorted(self._table.schema)) or "none"
            raise self._error(f"unknown attribute {leaf.field!r}; this index has {known}.", leaf.at)
        op, negated = leaf.op.removeprefix("not "), leaf.op.startswith("not ")
        type_ = self._table.schema[leaf.field]
        self._check(leaf, op, type_)
        column = self._table.column(leaf.field)
        total = self._table.count
        if op == "null":
            if not negated:
                return Found(_missing(column, total))
            if column.present is None:
                return Ranges(leaf.field, column, outside([], len(column.ranked)))
            return Found(_masked(column.present))
        values = [self._key(value, type_, leaf) for value in leaf.values]
        if column.present is not None:
            rows = _listing(column, values, every=op == "contains all")
            if not negated:
                return Found(Selection(len(rows), total, rows=rows))
            mask = column.present.copy()
            mask[rows] = False
            return Found(_masked(mask))
        if op == "like":
            return self._like(leaf, column, negated)
        slices = column.slices_in(values) if op == "in" else column.slices(op, values[0])
        return Ranges(leaf.field, column, self._signed(column, slices, negated))

    def _signed(self, column: Column, slices: Slices, negated: bool) -> Slices:
        """Return the slices, or where negated those of all other values."""
        return outside(slices, len(column.ranked)) if negated else slices

    def _like(self, leaf: Leaf, column: Column, negated: bool) -> Part:
        """Find the strings that match a pattern."""
        pattern = parse_pattern(str(leaf.values[0]))
        assert pattern is not None, "the parser checks patterns"
        if not (pattern.is_text or pattern.is_prefix):
            mask = column.mask_like(pattern)
            if negated:
                mask = ~mask & (column.keys >= 0)
            return Found(_masked(mask))
        if pattern.is_text:
            slices = column.slices("==", pattern.prefix)
        else:
            slices = column.slices_with_prefix(pattern.prefix)
        return Ranges(leaf.field, column, self._signed(column, slices, negated))

    def _ids(self, leaf: Leaf) -> Selection:
        """Find the rows of ids.

        Raises:
            FilterError: Another operator than ``==``, ``!=`` and ``in``, or no strings.
        """
        row_of, total = self._table.row_of, self._table.count
        if row_of is None:
            raise self._error("this index does not know ids.", leaf.at)
        if leaf.op not in ("==", "!=", "in", "not in"):
            message = f"{ID_FIELD!r} is the id of an entity: only == != in compare it."
            raise self._error(message, leaf.at)
        for value in leaf.values:
            if not isinstance(value, str):
                shown = _shown(value)
                message = f"{ID_FIELD!r} is a string, but {shown} is none: put it in quotes."
                raise self._error(message, leaf.value_at)
        found = {row for value in leaf.values if (row := row_of(str(value))) is not None}
        rows = np.array(sorted(found), dtype=np.uint32)
        if leaf.op in ("==", "in"):
            return Selection(len(rows), total, rows=rows)
        mask = np.ones(total, dtype=np.bool_)
        mask[rows] = False
        return Selection(total - len(rows), total, mask=mask)

    def _error(self, message: str, at: int) -> FilterError:
        return FilterError(message, self._expression, at)

    def _check(self, leaf: Leaf, op: str, type_: str) -> None:
        """Check that the type of the attribute fits the operator."""
        if op == "null":
            return
        of_type = f"attribute {leaf.field!r} is of type {type_}"
        contains = op.startswith("contains")
        if contains and not type_.startswith("list"):
            raise self._error(f"{of_type}: array_contains needs a list.", leaf.at)
        if type_.startswith("list") and not contains:
            message = f"{of_type}: compare it with array_contains({leaf.field}, ...)."
            raise self._error(message, leaf.at)
        if op == "like" and type_ != "string":
            raise self._error(f"{of_type}: like is for strings.", leaf.at)
        wrong = [value for value in leaf.values if _kind_of(value) not in _KINDS[_inner(type_)]]
        if wrong:
            shown, kind = _shown(wrong[0]), _kind_of(wrong[0])
            hint = f' Put it in quotes: "{shown}".' if kind == "date" else ""
            raise self._error(f"{of_type}, but {shown} is a {kind}.{hint}", leaf.value_at)
        if type_ == "bool" and op not in ("==", "!=", "in"):
            raise self._error(f"{of_type}: only == and != compare it.", leaf.at)

    def _key(self, value: Value, type_: str, leaf: Leaf) -> Key:
        """Return what a column of a type is compared with for a checked literal."""
        if _inner(type_) != "time":
            assert not isinstance(value, Moment), "dates are compared with times"
            return value
        try:
            return literal_period(value)
        except ValueError as error:
            message = (
                f"attribute {leaf.field!r} holds dates and times, but {_shown(value)} is none;"
                " write 2024-05-01 or 2024-05-01T12:30:00+02:00."
            )
            raise self._error(message, leaf.value_at) from error


def literal_period(value: Value) -> Period:
    """Return the instants that a literal stands for, with or without quotes.

    Raises:
        ValueError: It is no date or time.
    """
    period = period_of(value.text if isinstance(value, Moment) else str(value))
    if period is None:
        raise ValueError(f"expected a date or time, but got {value!r}")
    return period


class _NoRows:
    """A table without rows, by which types are checked."""

    count = 0

    def __init__(self, schema: Mapping[str, FieldType]) -> None:
        self.schema = schema

    def row_of(self, id_: str) -> int | None:
        """Find no id."""
        return None

    def column(self, name: str) -> Column:
        """Return an empty column."""
        type_ = self.schema[name]
        inner = pl.String if _inner(type_) == "time" else POLARS_TYPES[_inner(type_)]
        dtype = pl.List(inner) if type_.startswith("list") else inner
        return prepared_column(type_, pl.Series(name, [], dtype=dtype))


def check_types(parsed: Filter, schema: Mapping[str, FieldType]) -> None:
    """Check that a filter fits attributes of these types.

    Raises:
        FilterError: An attribute is unknown, or of another type than it is compared with.
    """
    BoundFilter(parsed, _NoRows(schema))


def _masked(mask: np.ndarray) -> Selection:
    """Make a selection of a mask."""
    return Selection(int(np.count_nonzero(mask)), len(mask), mask=mask)


def _missing(column: Column, total: int) -> Selection:
    """Select the rows without a value."""
    if column.present is not None:
        return _masked(~column.present)
    mask = np.ones(total, dtype=np.bool_)
    mask[column.order] = False
    return _masked(mask)


def _listing(column: Column, values: Sequence[Key], *, every: bool) -> np.ndarray:
    """Return the rows, uint32, whose lists hold one of the values, or every one of them."""
    assert column.present is not None, "a list column knows which rows have a list"
    found = [_holding(column, value) for value in dict.fromkeys(values)]
    if not found:
        rows = np.flatnonzero(column.present) if every else np.empty(0)
        return rows.astype(np.uint32)
    if len(found) == 1:
        return found[0]
    if not every:
        return np.unique(np.concatenate(found))
    return reduce(lambda a, b: np.intersect1d(a, b, True), sorted(found, key=len))


def _holding(column: Column, value: Key) -> np.ndarray:
    """Return the rows, uint32, whose lists hold a value."""
    slices = column.slices("==", value)
    if not slices:
        return np.empty(0, dtype=np.uint32)
    ((low, high),) = slices
    rows = column.order[low:high]
    # A day may hold several values of one row
    return rows if column.ranked[low] == column.ranked[high - 1] else np.unique(rows)


_KINDS = {
    "int": ("number",),
    "float": ("number",),
    "bool": ("bool",),
    "string": ("string",),
    "time": ("string", "date"),
}
"""Type of an attribute or of a list's items -> what it is compared with."""


def _inner(type_: str) -> str:
    """Return the type of a list's items, or the type itself."""
    return type_[5:-1] if type_.startswith("list") else type_


def _kind_of(value: Value) -> str:
    """Return what a literal is: bool, string, date or number."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, Moment):
        return "date"
    return "string" if isinstance(value, str) else "number"


def _shown(value: Value) -> str:
    """Show a literal in a message."""
    return value.text if isinstance(value, Moment) else repr(value)
