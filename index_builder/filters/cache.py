"""Cache of recently used filters and the rows that they select.

A repeated filter costs a look-up; one that differs from an earlier one in its numbers only is not
parsed again.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from contextlib import suppress

from index_builder.errors import FilterError
from index_builder.filters.columns import Column, Columns
from index_builder.filters.expression import MAX_DIGITS, Both, Leaf, parse_filter
from index_builder.filters.parts import Selection, select_slices
from index_builder.filters.selection import BoundFilter

MAX_BYTES = 64 * 2**20
_MAX_SHAPES = 1_000
_MAX_SHAPED = MAX_DIGITS
"""Characters of the longest text whose shape is kept: no number in it can have too many digits."""
_ENTRY_BYTES = 512
"""What an entry takes beside its rows and its text, rounded up."""
_MIN_ENTRIES = 4
_NUMBER = re.compile(r"(?<![\w.])([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])")
_RangeOfColumn = tuple[Column, tuple[tuple[str, int], ...]]
"""A column and its comparisons, all of which must hold: operator, and number of the literal."""


class SelectionCache:
    """The last selections of one table, bounded in bytes.

    Safe in threads: a look-up and the move after it are atomic steps on the dictionary in CPython,
    and other changes take a lock.
    """

    def __init__(self, table: Columns, max_bytes: int = MAX_BYTES) -> None:
        self._table = table
        self._entries: OrderedDict[str, Selection] = OrderedDict()
        self._shapes: dict[tuple[str, ...], _RangeOfColumn | None] = {}
        self._max_bytes = max_bytes
        # At most a mask and all row numbers; the text comes on top.
        self._entry_bytes = 5 * table.count + _ENTRY_BYTES
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, expression: str) -> Selection:
        """Return the rows that ``expression`` selects.

        Raises:
            FilterError: It does not parse or does not fit the attributes.
        """
        found = self._entries.get(expression)
        if found is not None:
            with suppress(KeyError):  # evicted meanwhile
                self._entries.move_to_end(expression)
            return found
        selection = self._range(expression)
        if selection is None:
            selection = BoundFilter(parse_filter(expression), self._table).select()
        with self._lock:
            if expression not in self._entries:
                self._entries[expression] = selection
                self._bytes += self._bytes_of(expression)
                while self._bytes > self._max_bytes and len(self._entries) > _MIN_ENTRIES:
                    oldest, _ = self._entries.popitem(last=False)
                    self._bytes -= self._bytes_of(oldest)
        return selection

    def _bytes_of(self, expression: str) -> int:
        """Estimate what an entry takes; Python keeps a character in at most four bytes."""
        return self._entry_bytes + 4 * len(expression)

    def _range(self, expression: str) -> Selection | None:
        """Select the rows of an expression that compares one column with numbers.

        Expressions that differ in their numbers only share a shape, which is parsed once. None for
        any other expression.
        """
        if len(expression) > _MAX_SHAPED or '"' in expression or "'" in expression:
            return None
        texts = _NUMBER.split(expression)  # text, number, text, ...
        shape = tuple(texts[::2])
        known = self._shapes.get(shape)
        if known is None:
            if shape in self._shapes:
                return None
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            known = self._shapes[shape] = self._parse_shape(texts)
            if known is None:
                return None
        column, comparisons = known
        low, high = 0, len(column.ranked)
        for op, place in comparisons:
            text = texts[2 * place + 1]
            is_float = "." in text or "e" in text or "E" in text
            first, last = column.between(op, float(text) if is_float else int(text))
            low = max(low, first)
            high = min(high, last)
        return select_slices(column, [(low, high)] if low < high else [])

    def _parse_shape(self, texts: list[str]) -> _RangeOfColumn | None:
        """Parse a shape; None where it is not a range of one column of numbers.

        Literals are replaced by their numbers, so that the parsed leaves tell where each belongs.
        """
        template = "".join(text if i % 2 == 0 else str(i // 2) for i, text in enumerate(texts))
        try:
            root = parse_filter(template).root
            BoundFilter(parse_filter(template), self._table)
        except FilterError:
            return None  # the full parser says what is wrong, and where in the given text
        parts = root.parts if isinstance(root, Both) else (root,)
        leaves = [part for part in parts if isinstance(part, Leaf) and _compares_number(part)]
        if len(leaves) != len(parts) or len({leaf.field for leaf in leaves}) != 1:
            return None
        comparisons = tuple((leaf.op, int(str(leaf.values[0]))) for leaf in leaves)
        return self._table.column(leaves[0].field), comparisons


def _compares_number(leaf: Leaf) -> bool:
    """Return whether a leaf selects one range of numbers."""
    return leaf.op in ("==", "<", "<=", ">", ">=") and type(leaf.values[0]) is int
