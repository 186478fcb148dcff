"""Recently used filters and the rows they select, so that a repeated filter costs a dictionary look-up."""

from __future__ import annotations

from collections import OrderedDict

from index_builder.attributes import AttributeTable
from index_builder.filters import BoundFilter, Selection, parse_filter

MAX_BYTES = 64 * 2**20


class SelectionCache:
    """Least recently used selections of one table, bounded in bytes. Safe in threads: each step on the dictionary is atomic in CPython."""

    def __init__(self, table: AttributeTable, max_bytes: int = MAX_BYTES) -> None:
        self._table = table
        self._entries: OrderedDict[str, Selection] = OrderedDict()
        self._max_entries = max(4, max_bytes // max(1, 5 * table.count + 64))

    def get(self, expression: str) -> Selection:
        """The rows ``expression`` selects.

        Raises:
            FilterError: It does not parse or does not fit the attributes.
        """
        found = self._entries.get(expression)
        if found is not None:
            return found
        selection = BoundFilter(parse_filter(expression), self._table).select()
        self._entries[expression] = selection
        while len(self._entries) > self._max_entries:
            try:
                self._entries.popitem(last=False)
            except KeyError:
                break
        return selection
