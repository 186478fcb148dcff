"""The peers of ``omni bench hybrid``: real indexes, and a fusion that is checked by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.fusion import Asked, Cases
from benchmarks.quality.hybrid import best_setting, count_hits, two_leg_weights
from benchmarks.quality.hybrid_peers import (
    PEERS,
    RANKERS,
    Corpus,
    Ranker,
    reciprocal_rank_fusion,
    spelt_out,
)
from index_builder.fusion.weights import CalibrationCase

WORDS = ["red house", "blue boat", "生日蛋糕", "green tree", "old clock"]
CORPUS = Corpus(
    [f"{name} picture" for name in WORDS for _ in range(4)], np.eye(20, 32, dtype=np.float32)
)
"""Four rows for each name, and orthogonal vectors."""


@pytest.fixture(params=sorted(PEERS))
def peer(request):
    peer = PEERS[request.param]
    if not peer.is_installed:
        pytest.skip(f"{peer.name} is not installed (extra hybrid)")
    return peer


@pytest.mark.slow
@pytest.mark.parametrize("ranker", [Ranker("rrf", 10), Ranker("weighted", 0.5)], ids=str)
def test_search_row_of_both_legs_is_first(peer, ranker):
    for tokeniser in peer.tokenisers:
        index = peer.build(CORPUS, tokeniser)
        found = index.search("blue boat", CORPUS.vectors[6], ranker)
        assert found[0] == 6 and len(set(found)) == len(found) == 10, tokeniser
        assert {4, 5, 7} <= set(found), "the other rows with these words"
        index.close()


@pytest.mark.slow
def test_search_query_without_known_words_is_answered_by_vectors(peer):
    index = peer.build(CORPUS, peer.tokenisers[0])
    assert index.search("qqqq", CORPUS.vectors[3], Ranker("rrf", 60))[0] == 3
    index.close()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 20), unique=True, max_size=12), max_size=3),
    st.sampled_from([1.0, 10.0, 60.0]),
)
def test_reciprocal_rank_fusion_any_lists_equal_the_formula(lists, constant):
    def total(row):
        return sum(1 / (constant + rows.index(row) + 1) for rows in lists if row in rows)

    everything = {row for rows in lists for row in rows}
    found = reciprocal_rank_fusion(lists, constant)
    assert set(found) == everything and len(found) == len(everything)
    assert all(total(a) >= total(b) - 1e-12 for a, b in itertools.pairwise(found))


def test_spelt_out_ours_keeps_grams_apart_from_words_and_without_spaces():
    terms = spelt_out("Cat", "ours-words-trigrams").split(" ")
    assert terms == ["cat", "g__ca", "g_cat", "g_at_"]
    assert spelt_out("Two Cats", "simple") == "Two Cats"


def test_best_setting_prefers_the_one_that_finds_most():
    queries = Asked(["clocks"], ["en"], [{16, 17, 18, 19}])
    choice = best_setting(PEERS["bm25s + hnswlib"], CORPUS, queries, CORPUS.vectors[:1])
    assert len(choice.recalls) == 2 + len(RANKERS), "two more tokenisers with the first ranker"
    chosen = choice.recalls[f"{choice.tokeniser}, {choice.ranker}"]
    assert chosen == max(choice.recalls.values()) == 1.0
    assert choice.recalls[f"ours-words, {RANKERS[0]}"] < 1.0, "no such word: n-grams find it"


def test_count_hits_counts_annotated_rows_of_each_query():
    queries = Asked(["a", "b"], ["en", "en"], [{1, 2}, {3}])
    found = count_hits(lambda text, vector: [1, 9] if text == "a" else [], queries, np.eye(2))
    assert found.tolist() == [1.0, 0.0]


def test_two_leg_weights_useless_words_have_weight_zero():
    scores = np.zeros((40, 3), np.float32)
    scores[:, 0] = np.linspace(1, 0, 40)
    scores[:, 1] = np.linspace(0, 1, 40)
    relevant = np.arange(40) < 10
    case = CalibrationCase(scores, relevant, 10, 0.0, np.zeros(40, np.bool_))
    weights = two_leg_weights(Cases([case], np.array([10.0])))
    assert weights[0] > 0 and weights[1:] == (0.0, 0.0)
