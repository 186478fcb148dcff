"""Vectors of texts outlive a process, and damage to their files does not reach an answer."""

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from encoders.towers.text_embedding import TextEmbedding
from encoders.vector_cache import TEXT_VECTORS, VectorCache

VECTORS = np.arange(6, dtype=np.float16).reshape(3, 2)
ROWS = pl.DataFrame({"title": ["red heart", "oak table"]})


def test_find_after_reopening_returns_what_was_added(tmp_path: Path) -> None:
    VectorCache(tmp_path / "c", 2, 10).add(["a", "ä", "\ud83d"], VECTORS)
    found = VectorCache(tmp_path / "c", 2, 10).find(["ä", "b", "a", "\ud83d"])
    assert set(found) == {"a", "ä", "\ud83d"}
    np.testing.assert_array_equal(found["ä"], VECTORS[1])


def test_read_damaged_file_is_removed_and_the_others_kept(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, 2, 10)
    cache.add(["a"], VECTORS[:1])
    (whole,) = tmp_path.glob("*.npy")
    for name, content in {"cut": whole.read_bytes()[:-3], "empty": b"", "other": b"xyz"}.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
    VectorCache(tmp_path, 3, 10).add(["a"], np.zeros((1, 3), np.float16))
    assert set(VectorCache(tmp_path, 3, 10).find(["a"])) == {"a"}
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_read_beyond_the_most_removes_the_oldest(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, 2, 2)
    for second, text in enumerate("abc"):
        before = set(tmp_path.iterdir())
        cache.add([text], VECTORS[:1])
        (made,) = set(tmp_path.iterdir()) - before
        os.utime(made, (second, second))
    left = VectorCache(tmp_path, 2, 2).find(["a", "b", "c"])
    assert set(left) == {"b", "c"}
    assert len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.slow
def test_text_embedding_of_another_process_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TEXT_VECTORS, str(tmp_path))
    before = TextEmbedding("tiny-multilingual")(ROWS)
    again = TextEmbedding("tiny-multilingual")
    monkeypatch.setattr(again.encoder, "encode", lambda texts: pytest.fail(f"embeds {texts}"))
    np.testing.assert_array_equal(again(ROWS), before)
