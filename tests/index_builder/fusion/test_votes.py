"""Votes of known queries: the formula, ids that are unknown, and files that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from index_builder.errors import IndexFormatError
from index_builder.fusion import votes as votes_module
from index_builder.fusion.votes import TEMPERATURE, Votes
from index_builder.storage.id_table import IdTable

QUERIES = IdTable.build(["red shoes", "boots", "hat"])
ENTITIES = IdTable.build(["a", "b", "c", "d"])
PAIRS = pl.DataFrame(
    {
        "query": ["red shoes", "red shoes", "boots", "boots", "unknown", "hat"],
        "entity_id": ["a", "b", "b", "b", "a", "gone"],
        "count": [3, 1, 2, 5, 9, 1],
    }
)


def test_cast_shares_follow_the_formula() -> None:
    votes = Votes.build(PAIRS, QUERIES, ENTITIES)
    found = votes.cast(np.array([0, 1, 2]), np.array([0.9, 0.8, 0.7], np.float32))
    weight = [math.exp((cosine - 1) / TEMPERATURE) for cosine in (0.9, 0.8, 0.7)]
    a = weight[0] / math.sqrt(2) / math.log(3)
    b = (weight[0] / math.sqrt(2) + weight[1]) / math.log(4)
    assert found.rows.tolist() == [0, 1]
    np.testing.assert_allclose(found.shares, np.array([a, b]) / sum(weight), rtol=1e-5)


def test_cast_without_neighbours_gives_no_votes() -> None:
    votes = Votes.build(PAIRS, QUERIES, ENTITIES)
    assert len(votes.cast(np.zeros(0, np.int64), np.zeros(0, np.float32)).rows) == 0
    assert len(votes.cast(np.array([2]), np.ones(1, np.float32)).rows) == 0


def test_build_query_with_many_entities_keeps_the_most_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(votes_module, "MOST_ENTITIES", 1)
    votes = Votes.build(PAIRS, QUERIES, ENTITIES)
    assert votes.cast(np.array([0]), np.ones(1, np.float32)).rows.tolist() == [0]


def test_save_and_load_cast_the_same(tmp_path: Path) -> None:
    votes = Votes.build(PAIRS, QUERIES, ENTITIES)
    votes.save(tmp_path, {"query": "x", "pin": "y"})
    loaded = Votes.load(tmp_path, 3, 4)
    assert loaded.describe() == votes.describe()
    before = votes.cast(np.array([0, 1]), np.array([0.9, 0.8], np.float32))
    after = loaded.cast(np.array([0, 1]), np.array([0.9, 0.8], np.float32))
    assert before.rows.tolist() == after.rows.tolist()
    assert before.shares.tolist() == after.shares.tolist()


@pytest.mark.parametrize("queries, entities", [(2, 4), (3, 5)])
def test_load_of_other_indexes_is_refused(tmp_path: Path, queries: int, entities: int) -> None:
    Votes.build(PAIRS, QUERIES, ENTITIES).save(tmp_path, {})
    with pytest.raises(IndexFormatError, match="Rebuild"):
        Votes.load(tmp_path, queries, entities)


def test_load_damaged_files_are_refused(tmp_path: Path) -> None:
    Votes.build(PAIRS, QUERIES, ENTITIES).save(tmp_path, {})
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rows = np.array([0, 9, 1], "<u4").tobytes()
    offsets = np.array([0, 3, 2, 3], "<u4").tobytes()
    damaged = {"votes.rows": rows, "votes.offsets": offsets, "votes.json": b"{}"}
    for name, content in damaged.items():
        for bad in (content, b"", whole[name][:-1]):
            (tmp_path / name).unlink()
            (tmp_path / name).write_bytes(bad)
            if name == "votes.json" and bad == whole[name][:-1]:
                assert json.loads(bad)  # only its line break is gone
                continue
            with pytest.raises(IndexFormatError):
                Votes.load(tmp_path, 3, 4)
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(whole[name])
