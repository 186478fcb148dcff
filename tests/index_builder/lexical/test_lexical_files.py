"""Files of the lexical leg: the same bytes twice, and damage refused or answered safely."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from index_builder.errors import IndexFormatError
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.lexical.scan import ScanRequest
from index_builder.native import Postings as CompiledPostings

COMPILED = [False] if CompiledPostings is None else [False, True]
ROWS = 200
TEXTS = [f"word{number % 17} thing{number} of colour{number % 3}" for number in range(ROWS)]
ARRAYS = ("keys", "offsets", "rows", "weights", "best")


def saved(folder: Path) -> Path:
    folder.mkdir()
    LexicalIndex.build({"title": TEXTS}, ROWS).save(folder)
    return folder


def test_save_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(["lexical.json", *(f"lexical.{name}" for name in ARRAYS)])
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


@pytest.mark.slow
def test_load_damaged_files_are_refused_or_answered_safely(tmp_path: Path) -> None:
    """A thousand files with random damage: a typed error, or answers within the rows."""
    whole = saved(tmp_path / "whole")
    contents = {path.name: path.read_bytes() for path in sorted(whole.iterdir())}
    rng = np.random.default_rng(5)
    refused = 0
    for number in range(1_000):
        name = list(contents)[number % len(contents)]
        (whole / name).write_bytes(damaged(contents[name], rng))
        try:
            index = LexicalIndex.load(whole, ROWS, compiled=COMPILED[number % len(COMPILED)])
        except IndexFormatError:
            refused += 1
        else:
            every = np.arange(ROWS, dtype=np.uint32)
            for query in ("word3 thing11", "colour2"):
                hits = index.search(index.query(query), ScanRequest(k=20, also=every, budget=50))
                assert (hits.rows < ROWS).all()
                assert np.isfinite(hits.scores).all() and np.isfinite(hits.also).all()
            del index
        (whole / name).unlink()  # a mapped file keeps its bytes
        (whole / name).write_bytes(contents[name])
    assert refused > 300


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, cut, or repeat a part."""
    way = rng.integers(3)
    if way == 0:
        return content[: rng.integers(len(content))]
    changed = bytearray(content)
    if way == 1:
        start, length = rng.integers(len(content)), rng.integers(1, 9)
        return bytes(changed + changed[start : start + length])
    for place in rng.integers(len(content), size=rng.integers(1, 5)):
        changed[place] ^= 1 << rng.integers(8)
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", 2), ("tokeniser", "other"), ("rows", 7), ("k1", "x"), ("average_length", 0)],
)
def test_load_facts_of_another_index_are_refused(tmp_path: Path, name: str, value: object) -> None:
    folder = saved(tmp_path / "a")
    path = folder / "lexical.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(IndexFormatError, match="lexical"):
        LexicalIndex.load(folder, ROWS)


@pytest.mark.parametrize("compiled", COMPILED)
def test_load_row_out_of_range_is_refused(tmp_path: Path, compiled: bool) -> None:
    for number, row in enumerate((ROWS, 2**32 - 1)):
        folder = saved(tmp_path / str(number))
        rows = np.fromfile(folder / "lexical.rows", "<u4")
        rows[3] = row
        rows.tofile(folder / "lexical.rows")
        with pytest.raises(IndexFormatError, match="out of range"):
            LexicalIndex.load(folder, ROWS, compiled=compiled)


def test_load_missing_file_names_it(tmp_path: Path) -> None:
    for name in ARRAYS:
        folder = saved(tmp_path / name)
        (folder / f"lexical.{name}").unlink()
        with pytest.raises(IndexFormatError, match=f"lexical.{name}"):
            LexicalIndex.load(folder, ROWS)
    shutil.rmtree(tmp_path / "keys")
