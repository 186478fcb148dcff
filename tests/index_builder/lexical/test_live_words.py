"""Words of live rows: found at once, scored as in one index, whatever was joined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.lexical.live_words import LiveWords
from index_builder.lexical.scan import ScanRequest

BASE = LexicalIndex.build({"title": ["red cat", "blue dog", "a house by the sea"]}, 3)
VALUES = st.fixed_dictionaries(
    {"title": st.sampled_from(["red cat", "red", "dog sku7", ""])},
    optional={"board_titles": st.lists(st.sampled_from(["cat", "sea"]), max_size=2)},
)


@pytest.mark.slow
@given(st.lists(st.lists(VALUES, max_size=9), max_size=12), st.data())
def test_search_appended_rows_equals_one_segment(
    batches: list[list[dict[str, object]]], data: st.DataObject
) -> None:
    words = LiveWords(BASE)
    for batch in batches:
        words.append(batch)
    values = [row for batch in batches for row in batch]
    assert words.count == len(values)
    size = data.draw(st.integers(0, len(values)))
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), np.bool_)
    query = BASE.query(data.draw(st.sampled_from(["red cat", "sku7 sea", "unknown"])))
    every = np.arange(len(values), dtype=np.uint32)
    hits = words.search(query, ScanRequest(k=5, allowed=alive, also=every))
    one = LiveWords(BASE)
    one.append(values)
    expected = one.search(query, ScanRequest(k=5, allowed=alive, also=every))
    assert hits.rows.tolist() == expected.rows.tolist()
    assert hits.scores.tolist() == expected.scores.tolist()
    assert hits.also.tolist() == expected.also.tolist()
    assert all(row < size and alive[row] for row in hits.rows.tolist())


def test_append_many_small_batches_keeps_few_chunks() -> None:
    words = LiveWords(BASE)
    for number in range(500):
        words.append([{"title": f"red {number}"}])
    assert len(words._chunks) <= 12


def test_taken_rows_are_renumbered() -> None:
    words = LiveWords(BASE)
    for title in ("red", "sku7", "cat", "sku7 red"):
        words.append([{"title": title}])
    left = words.taken(np.array([1, 3]))
    assert left is not None
    assert words.taken(np.array([1, 4])) is None
    both = LiveWords.behind_each_other(BASE, [left, left])
    everything = np.ones(both.count, np.bool_)
    hits = both.search(BASE.query("sku7"), ScanRequest(k=9, allowed=everything))
    assert sorted(hits.rows.tolist()) == [0, 1, 2, 3]
