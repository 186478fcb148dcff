"""Fused search: what scoring every entity by every leg would answer, live entries included."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.errors import InvalidQuery
from index_builder.fusion.fused_search import FusedIndex
from index_builder.fusion.probability import ProbabilityCurve
from index_builder.fusion.votes import Votes
from index_builder.fusion.weights import FusedRecall, given_fusion
from index_builder.lexical.lexical_index import LexicalIndex
from index_builder.lexical.scan import ScanRequest
from index_builder.live_log.records import LiveEntry
from index_builder.search.entity_index import EntityIndex, SearchOptions, SearchResult
from index_builder.search.live_state import LiveBase, LiveState
from tests.helpers.release_makers import SPACE, D, unit_vectors

ROWS = 80
WORDS = ("red", "blue", "shoe", "boot", "hat", "sku7", "tall")
TITLES = [f"{WORDS[i % 7]} {WORDS[(i // 7) % 7]} item{i}" for i in range(ROWS)]
IDS = [f"e{i}" for i in range(ROWS)]
QUERY_IDS = ["red shoe", "blue boot", "tall hat"]
VECTORS = unit_vectors(ROWS + 40, 5)
WEIGHTS = (1.0, 2.0, 3.0)


@functools.cache
def make_index() -> FusedIndex:
    lexical = LexicalIndex.build({"title": TITLES}, ROWS)
    attributes = pl.DataFrame({"even": [i % 2 == 0 for i in range(ROWS)], "title": TITLES})
    entities = EntityIndex.build("pin", IDS, VECTORS[:ROWS], attributes, lexical=lexical)
    queries = EntityIndex.build("query", QUERY_IDS, unit_vectors(3, 9))
    pairs = pl.DataFrame(
        {"query": ["red shoe", "red shoe", "blue boot"], "entity_id": ["e3", "e40", "e41"]}
    )
    return FusedIndex(entities, queries, Votes.build(pairs, queries.ids, entities.ids))


@pytest.fixture
def index() -> FusedIndex:
    return make_index()


def every_entity(index: FusedIndex, text: str, vector: np.ndarray) -> dict[str, np.ndarray]:
    """Score every entity of the base by every leg: candidates deep enough to be all."""
    query = index.query(text, vector)
    found = index.candidates(query, ROWS, {"exact": True, "live": None})
    assert len(found.rows) == ROWS
    return {IDS[row]: scores for row, scores in zip(found.rows.tolist(), found.scores, strict=True)}


def used_legs(result: SearchResult) -> tuple[str, ...]:
    assert result.fused is not None
    return result.fused.used


def check(result: SearchResult, expected: dict[str, np.ndarray], k: int) -> None:
    weights = np.array(WEIGHTS, np.float32)
    fused = {id_: float(scores @ weights) for id_, scores in expected.items()}
    best = sorted(fused.values(), reverse=True)[:k]
    assert result.fused is not None
    np.testing.assert_allclose(result.fused.scores, best, rtol=1e-5, atol=1e-6)
    assert result.scores.tolist() == result.fused.legs[:, 0].tolist()
    for id_, legs in zip(result.ids, result.fused.legs, strict=True):
        np.testing.assert_allclose(legs, expected[id_], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["red shoe", "sku7", "item33 tall", "nothing of it"])
@pytest.mark.parametrize("expression", [None, "even == true"])
def test_search_equals_scoring_every_entity(
    index: FusedIndex, text: str, expression: str | None
) -> None:
    vector = VECTORS[ROWS]
    expected = every_entity(index, text, vector)
    options: SearchOptions = {"exclude_ids": ["e3", "e10"]}
    if expression is not None:
        options["filter"] = expression
    left = {
        id_: scores
        for id_, scores in expected.items()
        if id_ not in ("e3", "e10") and (expression is None or int(id_[1:]) % 2 == 0)
    }
    result = index.search(index.query(text, vector), 10, options, WEIGHTS)
    check(result, left, 10)
    assert used_legs(result) == ("dense", "lexical", "votes")


def test_search_without_text_has_no_lexical_leg(index: FusedIndex) -> None:
    result = index.search(index.query("", VECTORS[ROWS]), 5, None, WEIGHTS)
    assert used_legs(result) == ("dense", "votes")
    assert result.fused is not None and (result.fused.legs[:, 1] == 0).all()


def test_search_without_words_and_votes_is_dense(index: FusedIndex) -> None:
    plain = EntityIndex.build("pin", IDS, VECTORS[:ROWS])
    fused = FusedIndex(plain)
    result = fused.search(fused.query("red shoe", VECTORS[ROWS]), 10, None, WEIGHTS)
    dense = plain.search(VECTORS[ROWS], 10)
    assert result.ids == dense.ids
    assert used_legs(result) == ("dense",)
    np.testing.assert_allclose(result.scores, dense.scores, rtol=1e-6)


def test_search_default_weights_are_those_fitted(index: FusedIndex) -> None:
    fitted = replace(index, fusion=given_fusion(WEIGHTS))
    query = fitted.query("red shoe", VECTORS[ROWS])
    assert fitted.search(query, 5).ids == index.search(query, 5, None, WEIGHTS).ids
    assert used_legs(index.search(query, 5)) == ("dense",)


def test_search_min_score_bounds_the_cosine(index: FusedIndex) -> None:
    query = index.query("red shoe", VECTORS[ROWS])
    result = index.search(query, 50, {"min_score": 0.1}, WEIGHTS)
    assert len(result.ids) and (result.scores >= 0.1).all()


def test_search_scores_are_those_of_the_dense_leg(index: FusedIndex) -> None:
    """Also for vectors a little off unit norm, and where rounding takes a score below 1."""
    for row in range(ROWS):
        vector = VECTORS[row] * np.float32(1.0008 if row % 2 else 0.9992)
        options: SearchOptions = {"min_score": 1.0}
        dense = index.entities.search(vector, 5, **options)
        fused = index.search(index.query("", vector), 5, options, (1.0, 0.0, 0.0))
        assert fused.ids == dense.ids == [IDS[row]]
        assert fused.scores.tolist() == dense.scores.tolist() == [1.0]


def test_search_beside_a_delete_does_not_bring_the_replaced_row_back(index: FusedIndex) -> None:
    base = LiveBase(D, SPACE, index.entities.row_of, rows=ROWS, lexical=index.entities.lexical)
    state = LiveState(base, background=False)
    replaced = LiveEntry(id="e3", vector=VECTORS[ROWS + 1], space_id=SPACE, sequence=1)
    view = state.apply([replaced])
    state.apply([LiveEntry(id="e3", sequence=2)])  # after the search took its view
    found = index.search(index.query("", VECTORS[3]), ROWS, {"live": view}, (1.0, 0.0, 0.0))
    at = {id_: float(score) for id_, score in zip(found.ids, found.scores, strict=True)}
    assert found.ids.count("e3") <= 1
    assert at.get("e3", 0.0) < 0.99, "the base's row, which the live entry hides"


FITTED = replace(
    given_fusion(WEIGHTS),
    recall=(FusedRecall(10, 0.97, 0.95), FusedRecall(100, 0.93, 0.9)),
)


def is_exact_search(index: FusedIndex, k: int, options: SearchOptions, **more: object) -> bool:
    """Whether a search asks its dense leg for an exact answer."""
    asked = []
    search = index.entities.search

    class Spy:
        def __getattr__(self, name: str) -> object:
            return getattr(index.entities, name)

        def search(self, vector: np.ndarray, depth: int, **given: object) -> SearchResult:
            asked.append(bool(given.get("exact")))
            assert "min_recall" not in given
            return search(vector, depth, **given)  # type: ignore[arg-type]

    spied = replace(index, entities=Spy())  # type: ignore[arg-type]
    query = spied.query("red shoe", VECTORS[ROWS])
    result = spied.search(query, k, options, **more)  # type: ignore[arg-type]
    assert index.fusion is not None
    assert result.estimated_recall == (1.0 if asked[0] else index.fusion.recall[k > 10].recall)
    return asked[0]


@pytest.mark.parametrize(
    ("k", "options", "exact"),
    [
        (10, {}, False),
        (10, {"min_recall": 0.95}, False),
        (10, {"min_recall": 0.96}, True),
        (11, {"min_recall": 0.95}, True),
        (11, {"min_recall": 0.9}, False),
        (10, {"min_recall": 0.5, "exclude_ids": ["e3"]}, False),
        (10, {"min_recall": 0.5, "filter": "even == true"}, True),
        (101, {"min_recall": 0.5}, True),
        (10, {"exact": True, "min_recall": 0.5}, True),
    ],
)
def test_search_min_recall_not_measured_to_be_reached_takes_exact_legs(
    index: FusedIndex, k: int, options: SearchOptions, exact: bool
) -> None:
    assert is_exact_search(replace(index, fusion=FITTED), k, options) is exact


def test_search_min_recall_of_other_weights_takes_exact_legs(index: FusedIndex) -> None:
    fitted = replace(index, fusion=FITTED)
    assert is_exact_search(fitted, 5, {"min_recall": 0.5}, weights=(1.0, 1.0, 1.0))
    query = fitted.query("red shoe", VECTORS[ROWS])
    assert fitted.search(query, 5, None, (1.0, 1.0, 1.0)).estimated_recall is None


def test_search_min_recall_without_text_takes_exact_legs(index: FusedIndex) -> None:
    """Recall was measured of queries with words."""
    fitted = replace(index, fusion=FITTED)
    query = fitted.query("", VECTORS[ROWS])
    assert fitted.search(query, 5).estimated_recall is None
    assert fitted.search(query, 5, {"min_recall": 0.5}).estimated_recall == 1.0


def test_search_exact_scores_every_known_query(index: FusedIndex) -> None:
    near = index.query("red shoe", VECTORS[ROWS])
    assert not near.is_exact
    one = near._replace(neighbours=near.neighbours[:1], cosines=near.cosines[:1])
    exact = index.search(one, 10, {"exact": True}, WEIGHTS)
    every = index.query("red shoe", VECTORS[ROWS], exact=True)
    assert exact.ids == index.search(every, 10, {"exact": True}, WEIGHTS).ids
    assert exact.estimated_recall == 1.0


@pytest.mark.parametrize("wanted", [0.0, 1.1, float("nan")])
def test_search_min_recall_out_of_range_is_refused(index: FusedIndex, wanted: float) -> None:
    with pytest.raises(InvalidQuery, match="min_recall"):
        index.search(index.query("red shoe", VECTORS[ROWS]), 5, {"min_recall": wanted}, WEIGHTS)


@pytest.mark.parametrize("fused", [True, False])
def test_search_min_recall_beside_ef_is_refused(index: FusedIndex, fused: bool) -> None:
    query = index.query("red shoe", VECTORS[ROWS])
    with pytest.raises(InvalidQuery, match="but got both"):
        if fused:
            index.search(query, 5, {"min_recall": 0.9, "ef": 40}, WEIGHTS)
        else:
            index.entities.search(query.vector, 5, min_recall=0.9, ef=40)


def test_search_new_entity_is_given_votes_by_its_cosine(index: FusedIndex) -> None:
    curve = ProbabilityCurve((-1.0, 1.0), (0.0, 1.0))
    fitted = replace(index, fusion=replace(FITTED, cold_votes=curve))
    base = LiveBase(D, SPACE, index.entities.row_of, rows=ROWS, lexical=index.entities.lexical)
    state = LiveState(base, background=False)
    entry = LiveEntry(id="new", vector=VECTORS[ROWS], space_id=SPACE, attributes={}, sequence=1)
    options: SearchOptions = {"live": state.apply([entry])}
    query = fitted.query("red shoe", VECTORS[ROWS])
    found = fitted.search(query, ROWS + 1, options)
    plain = index.search(query, ROWS + 1, options, WEIGHTS)
    assert found.fused is not None and plain.fused is not None
    votes = dict(zip(found.ids, found.fused.legs[:, 2].tolist(), strict=True))
    before = dict(zip(plain.ids, plain.fused.legs[:, 2].tolist(), strict=True))
    cosines = dict(zip(found.ids, found.scores.tolist(), strict=True))
    voted = {"e3", "e40", "e41"}
    assert votes["new"] == pytest.approx(1.0, abs=1e-5) and before["new"] == 0
    assert {id_: votes[id_] for id_ in voted} == {id_: before[id_] for id_ in voted}
    for id_ in set(votes) - voted:
        assert votes[id_] == pytest.approx((1 + cosines[id_]) / 2, abs=1e-5)


def test_search_excluded_live_entry_deleted_meanwhile_stays_out(index: FusedIndex) -> None:
    base = LiveBase(D, SPACE, index.entities.row_of, rows=ROWS, lexical=index.entities.lexical)
    state = LiveState(base, background=False)
    entry = LiveEntry(
        id="new",
        vector=VECTORS[ROWS + 1],
        space_id=SPACE,
        attributes={"title": "zebra"},
        sequence=1,
    )
    view = state.apply([entry])
    state.apply([LiveEntry(id="new", sequence=2)])  # after the search took its view
    options: SearchOptions = {"live": view, "exclude_ids": ["new"]}
    found = index.search(index.query("zebra", VECTORS[ROWS]), ROWS, options, WEIGHTS)
    assert "new" not in found.ids


def test_search_filter_and_exclusions_hold_for_live_entries(index: FusedIndex) -> None:
    base = LiveBase(D, SPACE, index.entities.row_of, rows=ROWS, lexical=index.entities.lexical)
    state = LiveState(base, background=False)
    for number, (id_, even) in enumerate([("new1", True), ("new2", False), ("new3", True)], 1):
        entry = LiveEntry(
            id=id_,
            vector=VECTORS[ROWS + number],
            space_id=SPACE,
            attributes={"title": "zebra", "even": even},
            sequence=number,
        )
        state.apply([entry])
    query = index.query("zebra", VECTORS[ROWS])
    options: SearchOptions = {
        "live": state.view,
        "filter": "even == true",
        "exclude_ids": ["new3"],
    }
    found = index.search(query, ROWS, options, (0.0, 1.0, 0.0))
    assert found.ids[0] == "new1"
    assert not {"new2", "new3"} & set(found.ids)


WRITES = st.lists(
    st.tuples(st.integers(0, ROWS + 20), st.integers(0, 6), st.booleans()), max_size=40
)


@settings(max_examples=25)
@given(WRITES, st.sampled_from([4, 1000]))
def test_search_live_writes_equal_a_dictionary(
    writes: Sequence[tuple[int, int, bool]], limit: int
) -> None:
    index = make_index()
    base = LiveBase(D, SPACE, index.entities.row_of, rows=ROWS, lexical=index.entities.lexical)
    state = LiveState(base, exact_limit=limit, background=False)
    vector, text = VECTORS[ROWS], "sku7 shoe newword"
    expected = every_entity(index, text, vector)
    lexical = index.entities.lexical
    assert lexical is not None
    maximum = lexical.query(text).maximum
    for number, (which, word, is_delete) in enumerate(writes, 1):
        id_ = f"e{which}"
        expected.pop(id_, None)
        title = f"{WORDS[word]} newword{number % 2}"
        new = VECTORS[ROWS + 1 + (number + word) % 30]
        if is_delete:
            state.apply([LiveEntry(id=id_, sequence=number)])
            continue
        entry = LiveEntry(
            id=id_,
            vector=new,
            space_id=SPACE,
            attributes={"title": title},
            sequence=number,
        )
        state.apply([entry])
        one = lexical.segment({"title": [title]}, 1)
        row = np.zeros(1, np.uint32)
        share = one.search(lexical.query(text), ScanRequest(k=1, also=row)).also[0] / maximum
        expected[id_] = np.array([new @ vector, share, 0.0], np.float32)
    options: SearchOptions = {"live": state.view}
    check(index.search(index.query(text, vector), 10, options, WEIGHTS), expected, 10)
