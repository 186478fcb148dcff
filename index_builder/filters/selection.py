"""Evaluate parsed filters over attribute columns to the rows that pass.

A missing value satisfies no comparison, nor its negation (SQL's three-valued logic). The parser
pushes ``not`` down to the comparisons, so that only "true" has to be computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from index_builder.errors import FilterError
from index_builder.filters.attributes import AttributeTable
from index_builder.filters.columns import Column, Slices
from index_builder.filters.expression import Both, Either, Filter, Leaf, Node, Value

_LOWEST_INT = np.iinfo(np.int64).min  # also the key of a missing integer


@dataclass(slots=True)
class Selection:
    """The rows that a filter selects, as a mask, as row numbers, or both.

    Attributes:
        count: Matching rows.
        total: All rows.
        mask: bool ``(N,)`` or None.
        rows: uint32 ``(count,)`` in no particular order, without repetitions, or None.
    """

    count: int
    total: int
    mask: np.ndarray | None = None
    rows: np.ndarray | None = None

    def as_mask(self) -> np.ndarray:
        """Return the mask; made from the rows if need be."""
        if self.mask is None:
            mask = np.zeros(self.total, dtype=np.bool_)
            mask[self.rows] = True
            self.mask = mask
        return self.mask

    def as_rows(self) -> np.ndarray:
        """Return the row numbers; made from the mask if need be."""
        if self.rows is None:
            assert self.mask is not None, "a selection has a mask or rows"
            self.rows = np.flatnonzero(self.mask).astype(np.uint32)
        return self.rows


@dataclass(slots=True)
class _BoundLeaf:
    """A comparison bound to its column.

    Attributes:
        column: What is compared.
        slices: Ranges of the column's order that satisfy the comparison; those that do not where
            ``negated_list``.
        count: Rows that satisfy it.
        negated_list: Whether it is ``not array_contains``.
    """

    column: Column
    slices: Slices
    count: int
    negated_list: bool = False

    def select(self, total: int) -> Selection:
        """Select by rows where few of ``total`` match, else by a mask."""
        if self.count * 8 <= total and not self.negated_list:
            return Selection(self.count, total, rows=self.rows())
        return Selection(self.count, total, mask=self.mask())

    def rows(self) -> np.ndarray:
        """Return the matching rows, uint32."""
        if self.negated_list:
            return np.flatnonzero(self.mask()).astype(np.uint32)
        if len(self.slices) == 1:
            a, b = self.slices[0]
            return self.column.order[a:b]
        parts = [self.column.order[a:b] for a, b in self.slices]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)

    def mask(self) -> np.ndarray:
        """Return the matching rows, bool ``(N,)``."""
        column = self.column
        if column.present is not None:
            hit = self._marked(len(column.present))
            return column.present & ~hit if self.negated_list else hit
        if len(self.slices) > 4 or self.count * 16 < len(column.keys) or self._looks_missing():
            return self._marked(len(column.keys))
        if len(self.slices) == 1:
            return column.mask(*self.slices[0])
        return self._compare(column.keys)

    def _marked(self, total: int) -> np.ndarray:
        """Mark the rows of the slices one by one."""
        hit = np.zeros(total, dtype=np.bool_)
        for a, b in self.slices:
            hit[self.column.order[a:b]] = True
        return hit

    def test(self, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` match, bool."""
        if self.column.present is not None or len(self.slices) > 4 or self._looks_missing():
            hit: np.ndarray = self.mask()[rows]
            return hit
        return self._compare(self.column.keys[rows])

    def _looks_missing(self) -> bool:
        """Return whether a selected row has the key that stands for missing values.

        Comparing keys would then select rows without a value, too.
        """
        if not self.slices or self.slices[0][0] > 0:
            return False
        ranked = self.column.ranked
        return len(ranked) < len(self.column.keys) and bool(ranked[0] == _LOWEST_INT)

    def _compare(self, keys: np.ndarray) -> np.ndarray:
        """Return which keys lie in the slices, bool, by comparisons with the ends of each."""
        ranked = self.column.ranked
        size = len(ranked)
        # Without missing values an end of the order needs no comparison.
        complete = size == len(self.column.keys)
        hit: Any = None
        for a, b in self.slices:
            if complete and a == 0 and b == size:
                return np.ones(len(keys), dtype=np.bool_)
            if complete and b == size:
                part = keys >= ranked[a]
            elif a == 0 and complete:
                part = keys <= ranked[b - 1]
            elif ranked[a] == ranked[b - 1]:
                part = keys == ranked[a]
            else:
                part = (keys >= ranked[a]) & (keys <= ranked[b - 1])
            hit = part if hit is None else hit | part
        result: np.ndarray = np.zeros(len(keys), dtype=np.bool_) if hit is None else hit
        return result


def select_slices(column: Column, slices: Slices) -> Selection:
    """Select the rows at ``slices`` of the order of a column that is not a list."""
    return _BoundLeaf(column, slices, _rows_in(slices)).select(len(column.keys))


def _rows_in(slices: Slices) -> int:
    """Count the rows of disjoint ranges."""
    return sum(b - a for a, b in slices)


def _intersect(first: Slices, second: Slices) -> Slices:
    """Intersect two ascending lists of disjoint ranges."""
    result = []
    i = j = 0
    while i < len(first) and j < len(second):
        low, high = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if low < high:
            result.append((low, high))
        if first[i][1] <= second[j][1]:
            i += 1
        else:
            j += 1
    return result


class BoundFilter:
    """A filter bound to a table: its types are checked and the sizes of its leaves known."""

    def __init__(self, parsed: Filter, table: AttributeTable) -> None:
        self._expression = parsed.expression
        self._table = table
        self._leaves: dict[Leaf, _BoundLeaf] = {}
        self._bind(parsed.root)
        self._root = self._merged(parsed.root)

    def _bind(self, node: Node) -> None:
        """Bind every leaf below ``node``."""
        if isinstance(node, Leaf):
            if node not in self._leaves:
                self._leaves[node] = self._bound(node)
            return
        for part in node.parts:
            self._bind(part)

    def _merged(self, node: Node) -> Node:
        """Join comparisons of one field under ``and`` (a range) to one leaf of known size."""
        if isinstance(node, Leaf):
            return node
        parts = [self._merged(part) for part in node.parts]
        if isinstance(node, Either):
            return Either(tuple(parts))
        by_field: dict[str, list[Leaf]] = {}
        joined: list[Node] = []
        for part in parts:
            if isinstance(part, Leaf) and not self._leaves[part].column.is_list:
                by_field.setdefault(part.field, []).append(part)
            else:
                joined.append(part)
        joined += [self._join(leaves) for leaves in by_field.values()]
        return joined[0] if len(joined) == 1 else Both(tuple(joined))

    def _join(self, leaves: list[Leaf]) -> Leaf:
        """Make one leaf of comparisons of one field that all must hold."""
        first = leaves[0]
        if len(leaves) == 1:
            return first
        slices = self._leaves[first].slices
        for leaf in leaves[1:]:
            slices = _intersect(slices, self._leaves[leaf].slices)
        values = tuple(f"{leaf.op} {leaf.values}" for leaf in leaves)
        joined = Leaf(first.field, "and", values, first.at, first.value_at)
        self._leaves[joined] = _BoundLeaf(self._leaves[first].column, slices, _rows_in(slices))
        return joined

    def _bound(self, leaf: Leaf) -> _BoundLeaf:
        """Check the types of a leaf and find its slices.

        Raises:
            FilterError: The attribute is unknown, or of another type.
        """
        self._check(leaf)
        column = self._table.column(leaf.field)
        if leaf.op in ("contains", "not contains"):
            slices = column.slices("==", leaf.values[0])
            found = _rows_in(slices)
            if leaf.op == "contains":
                return _BoundLeaf(column, slices, found)
            assert column.present is not None, "a list column knows which rows have a list"
            return _BoundLeaf(column, slices, int(column.present.sum()) - found, True)
        if leaf.op in ("in", "not in"):
            slices = column.slices_in(leaf.values, negated=leaf.op == "not in")
        else:
            slices = column.slices(leaf.op, leaf.values[0])
        return _BoundLeaf(column, slices, _rows_in(slices))

    def _check(self, leaf: Leaf) -> None:
        """Check that the leaf's attribute exists and that its type fits operator and values."""
        schema = self._table.schema
        if leaf.field not in schema:
            known = ", ".join(sorted(schema)) or "none"
            message = f"unknown attribute {leaf.field!r}; this index has {known}."
            raise FilterError(message, self._expression, leaf.at)
        type_ = schema[leaf.field]
        contains = leaf.op in ("contains", "not contains")
        if contains and not type_.startswith("list"):
            message = f"attribute {leaf.field!r} is of type {type_}: array_contains needs a list."
            raise FilterError(message, self._expression, leaf.at)
        if type_.startswith("list") and not contains:
            message = (
                f"attribute {leaf.field!r} is of type {type_}: compare it with"
                f" array_contains({leaf.field}, ...)."
            )
            raise FilterError(message, self._expression, leaf.at)
        inner = type_[5:-1] if contains else type_
        wanted = "number" if inner in ("int", "float") else inner
        for value in leaf.values:
            kind = _kind_of(value)
            if kind != wanted:
                message = f"attribute {leaf.field!r} is of type {type_}, but {value!r} is a {kind}."
                raise FilterError(message, self._expression, leaf.value_at)
        if inner == "bool" and leaf.op not in ("==", "!=", "in", "not in"):
            message = f"attribute {leaf.field!r} is of type bool: only == and != compare it."
            raise FilterError(message, self._expression, leaf.at)

    def estimate(self) -> float:
        """Estimate the share of rows selected, within [0, 1].

        Sizes of leaves are exact; leaves are taken for independent.
        """
        return self._estimate(self._root)

    def _estimate(self, node: Node) -> float:
        """Estimate the share of rows that a part of the filter selects."""
        if isinstance(node, Leaf):
            return self._leaves[node].count / max(1, self._table.count)
        shares = [self._estimate(part) for part in node.parts]
        if isinstance(node, Both):
            return float(np.prod(shares))
        return 1.0 - float(np.prod([1.0 - s for s in shares]))

    def select(self) -> Selection:
        """Evaluate: by rows where a leaf is strict, else by masks."""
        return self._select(self._root)

    def _select(self, node: Node) -> Selection:
        """Evaluate a part of the filter."""
        total = self._table.count
        if isinstance(node, Leaf):
            return self._leaves[node].select(total)
        if isinstance(node, Both):
            first, *rest = sorted(node.parts, key=self._estimate)
            selection = self._select(first)
            if selection.rows is not None:
                rows = selection.rows
                for part in rest:
                    rows = rows[self._test(part, rows)]
                return Selection(len(rows), total, rows=rows)
            mask = selection.as_mask()
            for part in rest:
                mask = mask & self._select(part).as_mask()
            return Selection(int(np.count_nonzero(mask)), total, mask=mask)
        mask = self._select(node.parts[0]).as_mask()
        for part in node.parts[1:]:
            mask = mask | self._select(part).as_mask()
        return Selection(int(np.count_nonzero(mask)), total, mask=mask)

    def _test(self, node: Node, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` a part of the filter selects, bool."""
        if isinstance(node, Leaf):
            return self._leaves[node].test(rows)
        results = [self._test(part, rows) for part in node.parts]
        reduce = np.logical_and.reduce if isinstance(node, Both) else np.logical_or.reduce
        hit: np.ndarray = reduce(results)
        return hit


def _kind_of(value: Value) -> str:
    """Return what a literal is: bool, string or number."""
    if isinstance(value, bool):
        return "bool"
    return "string" if isinstance(value, str) else "number"
