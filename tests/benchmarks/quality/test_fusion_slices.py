"""Slices of the fusion benchmark: edits are edits, and cold entities have no train pairs."""

from __future__ import annotations

import polars as pl

from benchmarks.quality.fusion_slices import cold_entities, misspelt, without_known_queries
from encoders.datasets.dataset import Dataset


def test_misspelt_changes_one_word_by_one_edit() -> None:
    texts = ["birthday cake", "Regenbogen", "дерево", "noël party", "running shoes"] * 40
    for text, edited in zip(texts, misspelt(texts), strict=True):
        assert edited is not None and edited != text
        words, changed = text.split(), edited.split()
        differing = [pair for pair in zip(words, changed, strict=True) if pair[0] != pair[1]]
        assert len(differing) == 1
        before, after = differing[0]
        assert before[0] == after[0] and abs(len(before) - len(after)) <= 1
        assert len(set(before) ^ set(after)) <= 2


def test_misspelt_leaves_out_what_has_no_long_word() -> None:
    assert misspelt(["a b", "寿司", "4711", ""]) == [None] * 4
    assert misspelt(["birthday"] * 5, seed=1) == misspelt(["birthday"] * 5, seed=1)


def test_without_known_queries_cold_entities_keep_held_out_pairs_alone() -> None:
    ids = [f"pin:{i}" for i in range(200)]
    pairs = pl.DataFrame(
        {
            "query": [f"query {i}" for i in range(400)],
            "entity_id": ids * 2,
            "split": ["train"] * 200 + ["heldout"] * 200,
        }
    )
    dataset = Dataset(pl.DataFrame({"id": ids}), pairs)
    cold = cold_entities(dataset)
    assert 5 < len(cold) < 50
    left = without_known_queries(dataset, cold).pairs
    of_cold = left.filter(pl.col("entity_id").is_in(list(cold)))
    assert set(of_cold["split"]) == {"heldout"} and of_cold.height == len(cold)
    assert left.height == 400 - len(cold)
