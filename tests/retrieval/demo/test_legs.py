"""The demo's fused answers: which queries fit the weights, and which are shown."""

from __future__ import annotations

import polars as pl
import pytest

from encoders.datasets.dataset import Dataset
from encoders.datasets.halves import rows_of_split
from retrieval.demo.legs import CALIBRATION, SHOWN, LegRow, pairs_for_legs, table_of


@pytest.fixture
def dataset() -> Dataset:
    queries = [f"query {i}" for i in range(400)]
    pairs = pl.DataFrame(
        {
            "query": queries * 2,
            "entity_id": [f"pin:{i}" for i in range(800)],
            "split": ["train" if i % 2 else "heldout" for i in range(400)] * 2,
        }
    )
    return Dataset(pl.DataFrame(), pairs)


def test_pairs_for_legs_keep_shown_queries_apart_from_those_that_fit(dataset: Dataset) -> None:
    pairs = pairs_for_legs(dataset)
    by_split = {
        str(name[0]): set(rows["query"])
        for name, rows in pairs.partition_by("split", as_dict=True).items()
    }
    assert set(by_split) == {"train", CALIBRATION, SHOWN}
    assert not by_split[CALIBRATION] & by_split[SHOWN]
    assert len(by_split[CALIBRATION]) > 30 and len(by_split[SHOWN]) > 30


def test_pairs_for_legs_read_nothing_of_the_test_half(dataset: Dataset) -> None:
    test_half = set(rows_of_split(dataset.pairs, "test")["query"])
    assert len(test_half) > 30 and not test_half & set(pairs_for_legs(dataset)["query"])


def test_table_of_legs_has_the_columns_of_its_head() -> None:
    recall = {"dense": 0.493, "lexical": 0.452, "votes": 0.453, "fused": 0.583}
    assert table_of([LegRow("pin", "all", 3000, recall)]) == [
        ["pin", "all", 3000, 0.493, 0.452, 0.453, 0.583]
    ]
