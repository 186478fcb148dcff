"""Files are cut where their content says so."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.remote import blocks
from index_builder.remote.blocks import MAX_BYTES, MIN_BYTES, cut, cut_blocks, find_blocks
from index_builder.remote.blocks import by_digest as sorted_by_digest


def random_bytes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count).astype(np.uint8)


@given(st.integers(0, 200_000), st.booleans())
def test_cut_any_content_is_covered_once(count: int, constant: bool) -> None:
    content = np.zeros(count, np.uint8) if constant else random_bytes(count)
    borders = list(cut(content))
    assert [start for start, _ in borders] == [0, *(end for _, end in borders[:-1])][: len(borders)]
    assert (borders[-1][1] if borders else 0) == count
    assert all(0 < end - start <= MAX_BYTES for start, end in borders)
    assert all(end - start >= MIN_BYTES for start, end in borders[:-1])


def test_cut_in_small_steps_cuts_at_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    content = random_bytes(1 << 18)
    whole = list(cut(content))
    monkeypatch.setattr(blocks, "_STEP_WORDS", 1001)
    assert list(cut(content)) == whole
    assert 50 < len(whole) < 110, "about one in 4 KiB"


def test_cut_blocks_rows_put_in_and_changed_leave_the_others() -> None:
    rows = random_bytes(1024 * 1000).reshape(1000, 1024)
    before = sorted_by_digest(cut_blocks(rows.ravel()))
    changed = rows.copy()
    changed[[3, 500]] += np.uint8(1)
    changed = np.insert(changed, 200, random_bytes(1024, seed=1), axis=0)
    after = cut_blocks(changed.ravel())
    found, places = find_blocks(before, after["digest"])
    assert after["length"][~found].sum() < 3 * 2 * MAX_BYTES, "each change costs a block or two"
    assert (before["length"][places] == after["length"][found]).all()


def test_find_blocks_nothing_known_finds_nothing() -> None:
    found, places = find_blocks(
        cut_blocks(random_bytes(0)), cut_blocks(random_bytes(9000))["digest"]
    )
    assert not found.any() and len(places) == 0
