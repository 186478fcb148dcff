"""Labelled metrics: values worked out by hand, properties, and intervals that behave."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.evaluation.metrics import (
    UNRANKED,
    QuerySums,
    bootstrap_interval,
    ndcg_at_k,
    paired_difference,
    recall_ceiling,
    reciprocal_ranks,
    sums_by_query,
)


def test_recall_and_reciprocal_ranks_by_hand():
    ranks = np.array([1, 2, 10, 11, UNRANKED])
    queries = np.array([0, 0, 0, 1, 1])
    assert sums_by_query(queries, ranks <= 10, 2).hits.tolist() == [3, 0]
    assert sums_by_query(queries, ranks <= 10, 2).value == 0.6
    assert reciprocal_ranks(ranks).tolist() == pytest.approx([1, 0.5, 0.1, 1 / 11, 0])
    assert math.isnan(sums_by_query(np.array([], int), np.array([]), 2).value)


def test_recall_ceiling_forty_correct_entities_is_a_quarter():
    query_index, target = np.zeros(40, int), np.arange(40)
    assert recall_ceiling(query_index, target, np.ones(40, bool), 10, 1).value == 10 / 40


def test_recall_ceiling_repeats_and_answers_outside_corpus_by_hand():
    # Query 0: targets 0 (three pairs: three languages), 1, 2 (one pair each), k = 1: the best list
    # puts target 0 first: 3 of 5. Query 1: targets 3 and 4 in the corpus and 5 outside it, k = 1:
    # one of the two, and always the one outside: 2 of 3.
    query_index = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    target = np.array([0, 0, 0, 1, 2, 3, 4, 5])
    places = np.array([True] * 7 + [False])
    sums = recall_ceiling(query_index, target, places, 1, 3)
    assert sums.hits.tolist() == [3, 2, 0]
    assert sums.counts.tolist() == [5, 3, 0]
    assert sums.value == 5 / 8


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 1000)
)
def test_recall_ceiling_any_positives_is_reached_by_oracle_only(positives, k, seed):
    query_index = np.repeat(np.arange(len(positives)), positives)
    target = np.arange(len(query_index))
    ceiling = recall_ceiling(
        query_index, target, np.ones(len(target), bool), k, len(positives)
    ).value
    oracle = np.concatenate([np.arange(1, p + 1) for p in positives])
    assert (oracle <= k).mean() == pytest.approx(ceiling)
    rng = np.random.default_rng(seed)
    some_list = np.concatenate([rng.permutation(40)[:p] + 1 for p in positives])
    assert (some_list <= k).mean() <= ceiling + 1e-12


def test_ndcg_graded_gains_by_hand():
    # Query 0: gains 3, 1, 0 at ranks 2, 1, 3. Query 1: one answer, not returned. Query 2: only
    # grade 0.
    query_index = np.array([0, 0, 0, 1, 2])
    ranks, gains = np.array([2, 1, 3, UNRANKED, 1]), np.array([3.0, 1.0, 0.0, 2.0, 0.0])
    got = ndcg_at_k(query_index, ranks, gains, 10, 3)
    dcg = 3 / math.log2(3) + 1 / math.log2(2)
    ideal = 3 / math.log2(2) + 1 / math.log2(3)
    assert got[0] == pytest.approx(dcg / ideal)
    assert got[1] == 0
    assert math.isnan(got[2])


def test_ndcg_more_answers_than_k_cuts_both_sums():
    # 20 equal answers, all on the first 20 places: within 10 that is perfect.
    assert ndcg_at_k(np.zeros(20, int), np.arange(1, 21), np.ones(20), 10, 1)[0] == pytest.approx(
        1.0
    )


def test_bootstrap_interval_correlated_pairs_covers_truth_as_stated():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        # Queries share their luck (0.2 or 0.6), so pairs of one query are correlated: resampling
        # pairs would be too narrow.
        luck = rng.choice([0.2, 0.6], 150)
        counts = rng.integers(1, 20, 150)
        interval = bootstrap_interval(
            QuerySums(rng.binomial(counts, luck).astype(float), counts.astype(float)),
            resamples=300,
            seed=trial,
        )
        covered += interval.low <= 0.4 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_interval_one_query_is_nan():
    interval = bootstrap_interval(QuerySums(np.array([1.0, 0.0]), np.array([2.0, 0.0])))
    assert interval.value == 0.5 and math.isnan(interval.low)


def test_paired_difference_overlapping_intervals_is_significant():
    rng = np.random.default_rng(0)
    counts = np.ones(600)
    worse = (rng.random(600) < 0.5).astype(float)
    better = np.where(rng.random(600) < 0.05, 1.0, worse)
    a, b = QuerySums(better, counts), QuerySums(worse, counts)
    result = paired_difference(a, b)
    assert result.difference.low > 0 and result.p_value < 0.01 and result.losses == 0
    assert bootstrap_interval(a).low < bootstrap_interval(b).high
    assert paired_difference(a, a).p_value == 1.0
    with pytest.raises(ValueError, match="same pairs"):
        paired_difference(a, QuerySums(worse, counts * 2))


def test_sums_by_query_without_pairs_are_zero():
    sums = sums_by_query(np.array([0, 2, 2]), np.array([True, True, False]), 4)
    assert sums.hits.tolist() == [1, 0, 1, 0] and sums.counts.tolist() == [1, 0, 2, 0]
