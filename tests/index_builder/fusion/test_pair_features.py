"""Scores of given pairs equal those that searches give, live entries included."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from index_builder.errors import UnknownEntityType
from index_builder.fusion.fused_search import FusedIndex
from index_builder.fusion.pair_features import FEATURES, PairScorer
from index_builder.fusion.probability import ProbabilityCurve
from index_builder.fusion.votes import Votes
from index_builder.fusion.weights import given_fusion
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.live_log.records import LiveEntry
from index_builder.search.entity_index import EntityIndex
from index_builder.search.live_state import LiveBase, LiveState
from tests.helpers.release_makers import SPACE, D, unit_vectors

ROWS = 900
WORDS = ("red", "blue", "shoe", "boot", "hat", "sku7", "tall")
TITLES = [f"{WORDS[i % 7]} {WORDS[(i // 7) % 7]} item{i}" for i in range(ROWS)]
IDS = [f"e{i}" for i in range(ROWS)]
VECTORS = unit_vectors(ROWS + 40, 5)
FUSION = given_fusion((1.0, 2.0, 3.0))
TEXTS = ["red shoe", "sku7", "item33 tall", "nothing of it"]


@functools.cache
def make_index(live: bool = False) -> FusedIndex:
    lexical = LexicalIndex.build({"title": TITLES}, ROWS)
    entities = EntityIndex.build("pin", IDS, VECTORS[:ROWS], lexical=lexical)
    known = EntityIndex.build("query", ["red shoe", "blue boot"], unit_vectors(2, 9))
    pairs = pl.DataFrame(
        {"query": ["red shoe", "red shoe", "blue boot"], "entity_id": ["e3", "e40", "e3"]}
    )
    if live:
        base = LiveBase(D, SPACE, entities.row_of, rows=ROWS, lexical=lexical)
        state = LiveState(base, background=False)
        for number, (id_, title) in enumerate([("fresh", "red shoe"), ("e3", "tall sku7")], 1):
            written = LiveEntry(
                id=id_,
                vector=VECTORS[ROWS + 4 + number],
                space_id=SPACE,
                attributes={"title": title},
                sequence=number,
            )
            state.apply([written])
        entities.set_live(state.apply([LiveEntry(id="e5", sequence=3)]))
    return FusedIndex(entities, known, Votes.build(pairs, known.ids, entities.ids))


def every_score(index: FusedIndex, text: str, vector: np.ndarray) -> dict[str, np.ndarray]:
    """Search exactly and deep enough to find all: their scores by every leg."""
    query = index.query(text, vector)
    found = index.candidates(query, ROWS + 10, {"exact": True})
    ids = index.ids_of(found, np.arange(len(found.rows)))
    return dict(zip(ids, found.scores, strict=True))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("live", [False, True])
def test_score_equals_what_an_exact_search_says(text: str, live: bool) -> None:
    index = make_index(live)
    expected = every_score(index, text, VECTORS[ROWS])
    assert ("fresh" in expected) is live
    ids = [*expected, "e7", "e7"]
    found = index.score(index.query(text, VECTORS[ROWS]), ids)
    np.testing.assert_allclose(found, np.stack([expected[id_] for id_ in ids]), atol=1e-6)


def test_score_gives_cold_entities_the_votes_that_a_search_gives_them() -> None:
    index = make_index(live=True)
    curve = ProbabilityCurve((-1.0, 1.0), (0.1, 0.9))
    given = replace(index, fusion=replace(FUSION, cold_votes=curve))
    expected = every_score(given, "red shoe", VECTORS[ROWS])
    ids = list(expected)
    found = given.score(given.query("red shoe", VECTORS[ROWS]), [*ids, "nowhere"])
    np.testing.assert_allclose(found[:-1], np.stack([expected[id_] for id_ in ids]), atol=1e-6)
    assert (found[:-1, 2] > 0).all() and np.isnan(found[-1]).all()


def test_score_unknown_and_deleted_ids_are_nan() -> None:
    index = make_index(live=True)
    found = index.score(index.query("red", VECTORS[ROWS]), ["nowhere", "e5", "e6"])
    assert np.isnan(found[:2]).all() and np.isfinite(found[2]).all()


def encode(texts: Sequence[str]) -> np.ndarray:
    return np.stack([VECTORS[ROWS + TEXTS.index(text)] for text in texts])


def test_pair_scorer_keeps_the_order_of_pairs() -> None:
    index = make_index()
    rng = np.random.default_rng(0)
    rows = [(TEXTS[int(rng.integers(4))], "pin", f"e{int(rng.integers(ROWS))}") for _ in range(50)]
    pairs = pl.DataFrame(rows, schema=["query", "entity_type", "entity_id"], orient="row")
    found = PairScorer({"pin": index}, encode).score(pairs)
    assert dict(found.schema) == FEATURES
    for (text, _, id_), scored in zip(rows, found.iter_rows(named=True), strict=True):
        wanted = every_score(index, text, encode([text])[0])[id_]
        got = [scored["cosine"], scored["lexical"], scored["votes"]]
        assert got == pytest.approx(wanted.tolist(), abs=1e-6)
        assert scored["known_queries"] == {"e3": 2, "e40": 1}.get(id_, 0)
        assert scored["fused"] is None


def test_pair_scorer_unknown_entity_is_null_and_fused_has_weights() -> None:
    index = make_index()
    fused = replace(index, fusion=FUSION)
    pairs = pl.DataFrame(
        {"query": ["sku7", "sku7"], "entity_type": ["pin", "pin"], "entity_id": ["e3", "gone"]}
    )
    scored = PairScorer({"pin": fused}, encode).score(pairs)
    first = scored.row(0, named=True)
    weighed = first["cosine"] + 2 * first["lexical"] + 3 * first["votes"]
    assert first["fused"] == pytest.approx(weighed, abs=1e-5)
    assert scored.row(1) == (None,) * len(FEATURES)


def test_pair_scorer_unknown_type_is_named() -> None:
    pairs = pl.DataFrame({"query": ["sku7"], "entity_type": ["ad"], "entity_id": ["e3"]})
    with pytest.raises(UnknownEntityType, match="ad"):
        PairScorer({"pin": make_index()}, encode).score(pairs)


def test_pair_scorer_no_pairs_have_no_scores() -> None:
    schema = {"query": pl.String, "entity_type": pl.String, "entity_id": pl.String}
    found = PairScorer({"pin": make_index()}, encode).score(pl.DataFrame(schema=schema))
    assert found.is_empty() and dict(found.schema) == FEATURES
