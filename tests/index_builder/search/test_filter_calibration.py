"""Calibration under filters: its references are exact, its filters pass what they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.search.calibration import TIE, K
from index_builder.search.filter_calibration import (
    FAMILIES,
    _cases,
    _kth_best,
    calibrate_filters,
)
from index_builder.storage.corpus import Corpus
from tests.helpers.release_makers import unit_vectors


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(K, 5_000),
    distinct=st.sampled_from([1, 2, 50, 10_000]),
    seed=st.integers(0, 99),
)
def test_kth_best_of_any_values_is_that_of_the_sorted(count: int, distinct: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(distinct, size=count).astype(np.float32)
    assert _kth_best(values) == np.sort(values)[-K]


@pytest.mark.parametrize("duplicates", [False, True])
def test_cases_pass_their_share_and_know_their_exact_answers(duplicates: bool) -> None:
    vectors = unit_vectors(3_000, 0)
    if duplicates:
        vectors[1_500:] = vectors[:1_500]
    corpus, queries = Corpus.build(vectors), unit_vectors(20, 1)
    cases = list(_cases(corpus, queries, (0.5, 0.2)))
    assert [case.cell[0] for case in cases] == list(FAMILIES) * 20
    for case in cases:
        scores = vectors @ case.query[0]
        assert abs(np.sort(scores[case.mask])[-K] - case.kth) < TIE
        assert abs(case.mask.mean() - case.cell[1]) < 0.06


def test_calibrate_filters_of_exact_search_finds_everything() -> None:
    corpus, queries = Corpus.build(unit_vectors(2_000, 0)), unit_vectors(200, 1)
    asked = []

    def search(query: np.ndarray, k: int, setting: int, mask: np.ndarray) -> np.ndarray:
        asked.append(setting)
        scores = np.sort(corpus.vectors[mask] @ query[0])[::-1]
        return scores[:k] if setting >= 40 else scores[k:]

    points = calibrate_filters(search, corpus, queries, (0.5, 0.2), (20, 40, 80))
    assert [(p.ef, p.recall) for p in points] == [(20, 0.0), (40, 1.0)]
    assert asked.count(40) == (200 + 24) * len(FAMILIES) and 80 not in asked
