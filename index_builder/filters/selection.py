"""Filter expressions: a safe parser for a typed subset of Milvus's boolean grammar, and their evaluation to rows.

    expression := and_part ("or" and_part)*
    and_part   := factor ("and" factor)*
    factor     := "not" factor | "(" expression ")" | "array_contains" "(" field "," literal ")" | comparison
    comparison := field op literal | literal op field | field ["not"] "in" "[" literal ("," literal)* "]"
    op         := "==" | "!=" | "<" | "<=" | ">" | ">="

A missing value satisfies no comparison, nor its negation (SQL's three-valued logic): ``not`` is
pushed down to the comparisons, where it turns one into its opposite, so that only "true" ever has
to be computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from index_builder.errors import FilterError
from index_builder.filters.attributes import AttributeTable, Column, Slices
from index_builder.filters.expression import Both, Either, Filter, Leaf, Node

_LOWEST_INT = np.iinfo(np.int64).min  # also the key of a missing integer


@dataclass(slots=True)
class Selection:
    """The rows a filter selects: a mask, the row numbers, or both.

    Attributes:
        count: Matching rows.
        mask: bool ``(N,)`` or None.
        rows: uint32 ``(count,)`` in no particular order, without repetitions, or None.
    """

    count: int
    total: int
    mask: np.ndarray | None = None
    rows: np.ndarray | None = None

    def as_mask(self) -> np.ndarray:
        """The mask, made from the rows if need be."""
        if self.mask is None:
            mask = np.zeros(self.total, dtype=np.bool_)
            mask[self.rows] = True
            self.mask = mask
        return self.mask

    def as_rows(self) -> np.ndarray:
        """The row numbers, made from the mask if need be."""
        if self.rows is None:
            assert self.mask is not None, "a selection has a mask or rows"
            self.rows = np.flatnonzero(self.mask).astype(np.uint32)
        return self.rows


@dataclass(slots=True)
class _Piece:
    """A leaf bound to its column: ranges of the sorted order and how many rows they hold."""

    column: Column
    slices: Slices
    count: int
    negated_list: bool

    def select(self, total: int) -> Selection:
        if self.count * 8 <= total and not self.negated_list:
            return Selection(self.count, total, rows=self.rows())
        return Selection(self.count, total, mask=self.mask())

    def rows(self) -> np.ndarray:
        if self.negated_list:
            return np.flatnonzero(self.mask()).astype(np.uint32)
        parts = [self.column.order[a:b] for a, b in self.slices]
        return (
            parts[0]
            if len(parts) == 1
            else np.concatenate(parts)
            if parts
            else np.empty(0, dtype=np.uint32)
        )

    def mask(self) -> np.ndarray:
        column = self.column
        if column.present is not None:
            hit = np.zeros(len(column.present), dtype=np.bool_)
            for a, b in self.slices:
                hit[column.order[a:b]] = True
            return column.present & ~hit if self.negated_list else hit
        if len(self.slices) > 4 or self.count * 16 < len(column.keys) or self._looks_missing():
            hit = np.zeros(len(column.keys), dtype=np.bool_)
            for a, b in self.slices:
                hit[column.order[a:b]] = True
            return hit
        if len(self.slices) == 1:
            return column.mask(*self.slices[0])
        return self._compare(column.keys)

    def test(self, rows: np.ndarray) -> np.ndarray:
        if self.column.present is not None or len(self.slices) > 4 or self._looks_missing():
            hit: np.ndarray = self.mask()[rows]
            return hit
        return self._compare(self.column.keys[rows])

    def _looks_missing(self) -> bool:
        """Whether rows without a value have the key of a row that is selected: comparing keys would select them, too."""
        if not self.slices or self.slices[0][0] > 0:
            return False
        ranked = self.column.ranked
        return len(ranked) < len(self.column.keys) and bool(ranked[0] == _LOWEST_INT)

    def _compare(self, keys: np.ndarray) -> np.ndarray:
        ranked, size = self.column.ranked, len(self.column.ranked)
        complete = size == len(
            self.column.keys
        )  # no missing values: an end of the order needs no comparison
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
    """The rows of a column that is not a list at ``slices`` of its order."""
    return _Piece(column, slices, sum(b - a for a, b in slices), False).select(len(column.keys))


def _intersect(first: Slices, second: Slices) -> Slices:
    """Ranges in both of two ascending lists of disjoint ranges."""
    result, i, j = [], 0, 0
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
    """A filter tied to a table: types are checked, sizes of the leaves known, rows computed on demand."""

    def __init__(self, parsed: Filter, table: AttributeTable) -> None:
        self._expression, self._table = parsed.expression, table
        self._pieces: dict[Leaf, _Piece] = {}
        self._bind(parsed.root)
        self._root = self._merged(parsed.root)

    def _bind(self, node: Node) -> None:
        if isinstance(node, Leaf):
            if node not in self._pieces:
                self._pieces[node] = self._piece(node)
            return
        for part in node.parts:
            self._bind(part)

    def _merged(self, node: Node) -> Node:
        """The same tree where comparisons of one field joined by ``and`` (a range) are one leaf, whose size is known exactly."""
        if isinstance(node, Leaf):
            return node
        parts = [self._merged(part) for part in node.parts]
        if isinstance(node, Both):
            by_field: dict[str, list[Leaf]] = {}
            rest: list[Node] = []
            for part in parts:
                if isinstance(part, Leaf) and not self._pieces[part].column.is_list:
                    by_field.setdefault(part.field, []).append(part)
                else:
                    rest.append(part)
            for leaves in by_field.values():
                first = leaves[0]
                if len(leaves) > 1:
                    slices = self._pieces[first].slices
                    for leaf in leaves[1:]:
                        slices = _intersect(slices, self._pieces[leaf].slices)
                    first = Leaf(
                        first.field,
                        "and",
                        tuple(f"{leaf.op} {leaf.values}" for leaf in leaves),
                        first.at,
                        first.value_at,
                    )
                    column = self._pieces[leaves[0]].column
                    self._pieces[first] = _Piece(
                        column, slices, sum(b - a for a, b in slices), False
                    )
                rest.append(first)
            return rest[0] if len(rest) == 1 else Both(tuple(rest))
        return Either(tuple(parts))

    def _piece(self, leaf: Leaf) -> _Piece:
        schema = self._table.schema
        if leaf.field not in schema:
            known = ", ".join(sorted(schema)) or "none"
            raise FilterError(
                f"unknown attribute {leaf.field!r}; this index has {known}.",
                self._expression,
                leaf.at,
            )
        type_ = schema[leaf.field]
        contains = leaf.op in ("contains", "not contains")
        if contains != type_.startswith("list"):
            hint = (
                f"compare it with array_contains({leaf.field}, ...)."
                if not contains
                else "array_contains needs a list."
            )
            raise FilterError(
                f"attribute {leaf.field!r} is of type {type_}: {hint}", self._expression, leaf.at
            )
        inner = type_[5:-1] if contains else type_
        for value in leaf.values:
            kind = (
                "bool"
                if isinstance(value, bool)
                else "string"
                if isinstance(value, str)
                else "number"
            )
            wanted = {"int": "number", "float": "number"}.get(inner, inner)
            if kind != wanted:
                raise FilterError(
                    f"attribute {leaf.field!r} is of type {type_}, but {value!r} is a {kind}.",
                    self._expression,
                    leaf.value_at,
                )
        if inner == "bool" and leaf.op not in ("==", "!=", "in", "not in"):
            raise FilterError(
                f"attribute {leaf.field!r} is of type bool: only == and != compare it.",
                self._expression,
                leaf.at,
            )
        column = self._table.column(leaf.field)
        if contains:
            slices = column.slices("==", leaf.values[0])
            found = sum(b - a for a, b in slices)
            negated = leaf.op == "not contains"
            assert column.present is not None, "a list column knows which rows have a list"
            return _Piece(
                column, slices, int(column.present.sum()) - found if negated else found, negated
            )
        if leaf.op in ("in", "not in"):
            slices = column.slices_in(leaf.values, negated=leaf.op == "not in")
        else:
            slices = column.slices(leaf.op, leaf.values[0])
        return _Piece(column, slices, sum(b - a for a, b in slices), False)

    def estimate(self) -> float:
        """Estimated share of rows selected, from exact leaf sizes and independence between them; within [0, 1]."""
        return self._estimate(self._root)

    def _estimate(self, node: Node) -> float:
        if isinstance(node, Leaf):
            return self._pieces[node].count / max(1, self._table.count)
        shares = [self._estimate(part) for part in node.parts]
        if isinstance(node, Both):
            return float(np.prod(shares))
        return 1.0 - float(np.prod([1.0 - s for s in shares]))

    def select(self) -> Selection:
        """Evaluate: by rows where a leaf is strict, else by masks."""
        return self._select(self._root)

    def _select(self, node: Node) -> Selection:
        total = self._table.count
        if isinstance(node, Leaf):
            return self._pieces[node].select(total)
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
        if isinstance(node, Leaf):
            return self._pieces[node].test(rows)
        results = [self._test(part, rows) for part in node.parts]
        hit: np.ndarray = (
            np.logical_and.reduce(results)
            if isinstance(node, Both)
            else np.logical_or.reduce(results)
        )
        return hit
