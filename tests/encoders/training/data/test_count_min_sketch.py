import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import CheckpointError, ConfigError
from encoders.text.hashing import combine_keys, hash_texts, seeded_hash
from encoders.training.data.count_min_sketch import CountMinSketch

GOLDEN_KEYS = [12768359716712122028, 3244421341483603138, 4371156471240351089]
few = settings(max_examples=30, deadline=None)
texts = st.lists(st.text(max_size=6), max_size=60)


@few
@given(texts, st.sampled_from([1, 8, 1 << 12]), st.integers(1, 4))
def test_count_min_sketch_count_is_never_below_truth(
    items: list[str], width: int, depth: int
) -> None:
    sketch = CountMinSketch(width, depth)
    keys = hash_texts(items)
    sketch.add(keys)
    truth = np.array([items.count(item) for item in items])
    assert (sketch.count(keys) >= truth).all()
    assert sketch.total == len(items)


@few
@given(texts)
def test_count_min_sketch_wide_counts_exactly(items: list[str]) -> None:
    sketch = CountMinSketch(1 << 16, 4)
    keys = hash_texts(items)
    sketch.add(keys)
    assert sketch.count(keys).tolist() == [items.count(item) for item in items]


def test_count_min_sketch_overcount_keeps_published_bound() -> None:
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 1 << 63, 20_000).astype(np.uint64)
    width, depth = 1 << 12, 3
    sketch = CountMinSketch(width, depth)
    sketch.add(keys)
    over = sketch.count(keys) - 1
    assert (over > np.e / width * sketch.total).mean() <= np.exp(-depth)


@few
@given(texts, texts)
def test_merge_two_sketches_equals_adding_to_one(first: list[str], second: list[str]) -> None:
    parts = [CountMinSketch(64, 2, seed=3) for _ in range(3)]
    for sketch, items in zip(parts, (first, second, first + second), strict=True):
        sketch.add(hash_texts(items))
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].table, parts[2].table)
    assert parts[0].total == parts[2].total


def test_add_with_counts_weighs_keys() -> None:
    sketch = CountMinSketch(1 << 10, 2)
    keys = hash_texts(["a", "b", "a"])
    sketch.add(keys, np.array([3, 5, 4]))
    assert sketch.count(keys).tolist() == [7, 5, 7]
    assert sketch.total == 12


def test_hash_texts_keys_equal_pinned_values() -> None:
    assert hash_texts(["pin", "", "Straße"]).tolist() == GOLDEN_KEYS
    assert seeded_hash(np.array([0, 1], dtype=np.uint64)).tolist() == [
        16294208416658607535,
        10451216379200822465,
    ]


def test_combine_keys_depends_on_order() -> None:
    a, b = hash_texts(["a"]), hash_texts(["b"])
    assert combine_keys(a, b) != combine_keys(b, a)


def test_count_min_sketch_saved_and_loaded_counts_alike(tmp_path) -> None:
    sketch = CountMinSketch(32, 2, seed=9)
    keys = hash_texts([str(i % 7) for i in range(100)])
    sketch.add(keys)
    sketch.save(tmp_path / "sketch.npz")
    again = CountMinSketch.load(tmp_path / "sketch.npz")
    np.testing.assert_array_equal(again.count(keys), sketch.count(keys))
    assert (again.total, again.seed) == (100, 9)


@pytest.mark.parametrize("broken", [b"", b"PK\x03\x04 not a zip", None])
def test_load_damaged_file_is_named(tmp_path, broken: bytes | None) -> None:
    path = tmp_path / "sketch.npz"
    if broken is not None:
        path.write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"sketch\.npz.*Count again"):
        CountMinSketch.load(path)


def test_count_min_sketch_bad_shapes_and_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"power of two, but got 100\. Try 128"):
        CountMinSketch(100)
    with pytest.raises(ConfigError, match="at least 1"):
        CountMinSketch(8, 0)
    sketch = CountMinSketch(8)
    with pytest.raises(ConfigError, match=r"negative.*-1"):
        sketch.add(hash_texts(["a"]), np.array([-1]))
    with pytest.raises(ConfigError, match="as many counts"):
        sketch.add(hash_texts(["a"]), np.array([1, 2]))
    with pytest.raises(ConfigError, match="merge"):
        sketch.merge(CountMinSketch(16))
