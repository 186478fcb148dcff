"""The cross-validation behind ``omni bench text``: left-out queries are left out, and the recall is
what counting by hand gives.
"""

import numpy as np
import polars as pl
import pytest

from benchmarks.quality.text_embedding import cross_validate, engaged_in_other_folds, hits_at_10
from encoders.towers.text_embedding import text_embedding

ENTITIES = pl.DataFrame(
    {
        "id": ["a", "b", "c"],
        "title": ["red heart", "blue sky", None],
        "engaged_queries": [["old"], [], []],
    }
)
PAIRS = pl.DataFrame(
    {
        "query": ["love", "red", "sky", "love"],
        "entity_id": ["a", "a", "b", "c"],
        "fold": [0, 1, 1, 0],
    },
    schema_overrides={"fold": pl.Int64},
)


def test_engaged_in_other_folds_leaves_out_queries_of_fold() -> None:
    seen = engaged_in_other_folds(ENTITIES, PAIRS, 0)
    assert seen["id"].to_list() == ["a", "b", "c"]
    assert seen["engaged_queries"].to_list() == [["red"], ["sky"], None]
    assert engaged_in_other_folds(ENTITIES, PAIRS, 1)["engaged_queries"].to_list() == [
        ["love"],
        None,
        ["love"],
    ]


def test_hits_at_10_random_vectors_equal_sort() -> None:
    rng = np.random.default_rng(0)
    queries, entities = (
        rng.normal(size=(4500, 8)).astype(np.float32),
        rng.normal(size=(40, 8)).astype(np.float32),
    )
    places = rng.integers(0, 40, 4500)
    order = np.argsort(-(queries @ entities.T), axis=1)[:, :10]
    assert hits_at_10(queries, entities, places) == sum(
        place in top for place, top in zip(places, order, strict=True)
    )


@pytest.mark.parametrize("max_pairs", [1, 100])
def test_cross_validate_every_mix_has_same_pairs(max_pairs: int) -> None:
    found = cross_validate(
        text_embedding("tiny-multilingual"),
        ENTITIES,
        PAIRS.drop("fold"),
        [(0.0, 0), (1.0, 2)],
        2,
        max_pairs,
    )
    assert found["pairs"] <= min(4, 2 * max_pairs) and set(found["recall_at_10"]) == {
        "0 x 0 queries",
        "1 x 2 queries",
    }
    assert set(found["recall_at_10"].values()) == {1.0}, "three entities are all among the best ten"
