"""Recently used filters and the rows they select: a repeated filter costs a look-up, one of a known shape with other numbers no parsing."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict

from index_builder.errors import FilterError
from index_builder.filters.attributes import AttributeTable, Column
from index_builder.filters.expression import MAX_DIGITS, Both, Either, Leaf, parse_filter
from index_builder.filters.selection import BoundFilter, Selection, select_slices

MAX_BYTES = 64 * 2**20
_MAX_SHAPES = 1_000
_MAX_SHAPED = MAX_DIGITS
"""Characters of the longest text whose shape is looked at: no number in it can be too long, and a thousand shapes stay small."""
_ENTRY_BYTES = 512
"""What an entry takes beside its rows and its text: the objects around them and its place in the dictionary, rounded up."""
_MIN_ENTRIES = 4
_NUMBER = re.compile(r"(?<![\w.])([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])")
_RangeOfColumn = tuple[Column, tuple[tuple[str, int], ...]]
"""A column and its comparisons, all of which must hold: operator, and the place of the literal among those of the text."""


class SelectionCache:
    """The selections of one table that were made last, bounded in bytes.

    Safe in threads: a look-up is one atomic step on the dictionary in CPython, and changes take a
    lock.
    """

    def __init__(self, table: AttributeTable, max_bytes: int = MAX_BYTES) -> None:
        self._table = table
        self._entries: OrderedDict[str, Selection] = OrderedDict()
        self._shapes: dict[str, _RangeOfColumn | None] = {}
        self._max_bytes = max_bytes
        self._entry_bytes = (
            5 * table.count + _ENTRY_BYTES
        )  # at most: a mask and all row numbers; the text comes on top
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, expression: str) -> Selection:
        """The rows ``expression`` selects.

        Raises:
            FilterError: It does not parse or does not fit the attributes.
        """
        found = self._entries.get(expression)
        if found is not None:
            return found
        selection = self._range(expression)
        if selection is None:
            selection = BoundFilter(parse_filter(expression), self._table).select()
        with self._lock:
            if expression not in self._entries:
                self._entries[expression] = selection
                self._bytes += self._entry_bytes + 4 * len(
                    expression
                )  # Python keeps a character in at most four bytes
                while self._bytes > self._max_bytes and len(self._entries) > _MIN_ENTRIES:
                    oldest, _ = self._entries.popitem(last=False)
                    self._bytes -= self._entry_bytes + 4 * len(oldest)
        return selection

    def _range(self, expression: str) -> Selection | None:
        """The rows of an expression that compares one column with numbers, by the shape it shares with others; None for any other."""
        if len(expression) > _MAX_SHAPED or '"' in expression or "'" in expression:
            return None
        texts = _NUMBER.split(expression)  # text, number, text, ...
        shape = "\0".join(texts[::2])
        known = self._shapes.get(shape)
        if known is None:
            if shape in self._shapes:
                return None
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            known = self._shapes[shape] = self._understood(texts)
            if known is None:
                return None
        column, comparisons = known
        low, high = 0, len(column.ranked)
        for op, place in comparisons:
            text = texts[2 * place + 1]
            first, last = column.between(
                op, float(text) if "." in text or "e" in text or "E" in text else int(text)
            )
            low, high = max(low, first), min(high, last)
        return select_slices(column, [(low, high)] if low < high else [])

    def _understood(self, texts: list[str]) -> _RangeOfColumn | None:
        """The meaning of a shape: its literals are replaced by their places, and what is parsed says where each belongs."""
        template = "".join(text if i % 2 == 0 else str(i // 2) for i, text in enumerate(texts))
        try:
            root = parse_filter(template).root
            BoundFilter(parse_filter(template), self._table)
        except FilterError:
            return None  # the full parser says what is wrong, and where in the text as it was given
        leaves = [
            part
            for part in (root.parts if isinstance(root, Both) else (root,))
            if isinstance(part, Leaf)
        ]
        numbers = [
            leaf
            for leaf in leaves
            if leaf.op in ("==", "<", "<=", ">", ">=") and not isinstance(leaf.values[0], bool)
        ]
        if isinstance(root, Either) or len(numbers) != (
            len(root.parts) if isinstance(root, Both) else 1
        ):
            return None
        if len({leaf.field for leaf in numbers}) != 1:
            return None
        return self._table.column(numbers[0].field), tuple(
            (leaf.op, int(leaf.values[0])) for leaf in numbers
        )
