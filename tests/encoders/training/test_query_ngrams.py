"""The n-gram table is a ridge solution, its weight is chosen on held-back queries."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.sparse import random as random_sparse

from encoders.training.data.source_tables import TrainingData
from encoders.training.loop import TrainResult, TrainStart, train
from encoders.training.query_ngrams import ridge
from tests.helpers.training_examples import small_config, tiny_query_encoder


def test_ridge_equals_the_normal_equations() -> None:
    rng = np.random.default_rng(0)
    inputs = random_sparse(60, 20, 0.2, format="csr", random_state=0, dtype=np.float32)
    targets = rng.normal(size=(60, 5)).astype(np.float32)
    dense = inputs.toarray().astype(np.float64)
    expected = np.linalg.solve(dense.T @ dense + np.eye(20), dense.T @ targets)
    np.testing.assert_allclose(ridge(inputs, targets, 1.0, 40), expected, atol=1e-4)


def coded_world() -> TrainingData:
    """Entities with names that the tiny tokenizer does not know; queries spell the name."""
    names = [f"zq{i:02d}x" for i in range(40)]
    catalogue = pl.DataFrame({"id": names, "entity_type": ["pin"] * len(names), "title": names})
    queries = [(f"{name} {word}", "pin", name) for name in names for word in ("red", "in", "rug")]
    pairs = pl.DataFrame(queries, schema=["query", "entity_type", "entity_id"], orient="row")
    return TrainingData(catalogue, pairs)


def run(buckets: int, fraction: float = 0.2) -> TrainResult:
    config = small_config(
        steps=20,
        model={"dimension": 16, "query_ngrams": buckets},
        validation={"fraction": fraction},
        features={"text_fields": ["title"]},
    )
    start = TrainStart(tiny_query_encoder())
    return train(config, coded_world(), start=start, quiet=True)


@pytest.mark.slow
def test_train_ngrams_find_names_that_the_tokenizer_does_not_know() -> None:
    plain, ngrams = run(0), run(1 << 12)
    assert plain.query_encoder.ngrams is None
    assert ngrams.query_encoder.ngrams is not None
    assert ngrams.metrics["query_ngram_weight"] > 0
    recall = "validation/recall@10/pin"
    assert ngrams.metrics[recall] > plain.metrics[recall] + 0.2
    catalogue = coded_world().catalogue
    entities = ngrams.entity_encoders["pin"].encode(catalogue)
    best = (ngrams.query_encoder.encode(["zq07x lamp"]) @ entities.T).argsort()[0, -10:]
    assert "zq07x" in catalogue["id"][best.tolist()].to_list()


def test_train_ngrams_without_held_back_queries_have_the_default_weight() -> None:
    result = run(1 << 10, fraction=0.0)
    assert result.metrics["query_ngram_weight"] == 0.5


@pytest.mark.slow
def test_train_twice_gives_the_same_table() -> None:
    first, second = run(1 << 10), run(1 << 10)
    texts = ["zq01x red", "zq39x rug"]
    np.testing.assert_array_equal(
        first.query_encoder.encode(texts), second.query_encoder.encode(texts)
    )
