"""EntityIndex against a plain scan: any mix of filter, excluded, hidden and live entries; bad
input; files.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import ConfigError, InvalidVectors
from index_builder.ann import AnnConfig
from index_builder.ann.choice import kind_available
from index_builder.errors import (
    DimensionMismatch,
    DuplicateIds,
    FilterError,
    IndexBuildError,
    InvalidQuery,
)
from index_builder.live_log.records import LiveEntry
from index_builder.search.entity_index import EntityIndex, IndexConfig
from index_builder.search.live_segments import LiveView
from index_builder.search.live_state import LiveBase, LiveState
from tests.helpers.real_vectors import islands
from tests.helpers.text_entities import CONFIG, FRAME, IDS, N, entity_vectors

INDEXES = [  # symqg builds for 10 s: the fast tests leave it out
    pytest.param(config, marks=pytest.mark.slow) if config.kind == "symqg" else config
    for config in (
        IndexConfig(kind="symqg", ann=CONFIG),
        IndexConfig(kind="int8-graph", ann=CONFIG),
        IndexConfig(kind="int8-graph", ann=replace(CONFIG, sketched_links=False)),
        IndexConfig(kind="hnsw", ann=CONFIG),
    )
    if kind_available(config.kind)
]


@pytest.fixture(scope="module", params=INDEXES, ids=lambda c: f"{c.kind}-{c.ann.sketched_links:d}")
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EntityIndex:
    corpus, queries = entity_vectors()
    folder = tmp_path_factory.mktemp("index") / "pin"
    built = EntityIndex.build(
        "pin",
        IDS,
        corpus,
        FRAME,
        request.param,
        calibration_queries=queries[:100],
    )
    built.save(folder)
    loaded = EntityIndex.load(folder)
    assert loaded.describe() == built.describe()
    assert loaded.calibration is not None
    return loaded


SPACE = "ab" * 32
LIVE_FRAME = pl.DataFrame({"rank": [5, 2_999, None, 2_000]})


def _live_view(vectors: np.ndarray, hidden: np.ndarray, scans: bool) -> LiveView:
    """Three living entries and a dead one, ``vectors`` (4, D), with these base rows hidden."""
    state = LiveState(
        LiveBase(vectors.shape[1], SPACE, row_of=lambda _: None, rows=N),
        exact_limit=64,
        background=False,
        scans=scans,
    )
    for i, values in enumerate(LIVE_FRAME.to_dicts()):
        state.apply(
            [LiveEntry(id=f"live:{i}", vector=vectors[i], space_id=SPACE, attributes=values)]
        )
    return replace(
        state.apply([LiveEntry(id="live:3")]), hidden_rows=hidden, hidden_count=int(hidden.sum())
    )


def _wanted(
    query: np.ndarray, allowed: np.ndarray, live: LiveView | None, live_mask: np.ndarray | None
) -> tuple[int, np.ndarray]:
    """How many entities match, and their scores, best first."""
    corpus, _ = entity_vectors()
    scores = (corpus @ query)[allowed]
    for segment in live.segments if live else ():
        keep = segment.alive if live_mask is None else segment.alive & live_mask
        scores = np.concatenate([scores, (segment.vectors @ query)[keep]])
    return len(scores), np.sort(scores)[::-1]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_search_any_mix_of_conditions_gives_k_allowed_ids(
    index: EntityIndex, data: st.DataObject
) -> None:
    corpus, queries = entity_vectors()
    query = queries[data.draw(st.integers(0, len(queries) - 1))]
    k = data.draw(st.sampled_from([1, 10, 60, 2_900]))
    low = data.draw(st.sampled_from([0, 10, 300, 1_500, 2_500, 2_990, 3_000]))
    expression = data.draw(
        st.sampled_from(
            [
                None,
                f"rank >= {low}",
                f'rank >= {low} and country != "us"',
                'array_contains(tags, "b")',
            ]
        )
    )
    excluded = data.draw(st.lists(st.sampled_from(IDS[:200]), max_size=20, unique=True))
    hidden = np.random.default_rng(low).random(N) < data.draw(st.sampled_from([0.0, 0.1, 0.6]))
    rank, country = FRAME["rank"].to_numpy(), FRAME["country"].to_list()
    allowed = ~hidden
    live_mask = None
    if expression is not None and "rank" in expression:
        allowed &= rank >= low
        live_mask = np.array([r is not None and r >= low for r in LIVE_FRAME["rank"].to_list()])
    if expression is not None and "country" in expression:
        allowed &= np.array([c is not None and c != "us" for c in country])
        live_mask = np.zeros(4, dtype=bool)
    if expression is not None and "tags" in expression:
        allowed &= np.array(["b" in t for t in FRAME["tags"].to_list()])
        live_mask = np.zeros(4, dtype=bool)
    allowed[[int(i.split(":")[1]) for i in excluded]] = False
    index.set_live(
        _live_view(queries[:4], hidden, data.draw(st.booleans()))
        if data.draw(st.booleans())
        else None
    )
    live = index._live
    if live is None:
        allowed |= False if expression is not None else allowed
        base = np.ones(N, dtype=bool)
        if expression is not None and "rank" in expression:
            base &= rank >= low
        if expression is not None and "country" in expression:
            base &= np.array([c is not None and c != "us" for c in country])
        if expression is not None and "tags" in expression:
            base &= np.array(["b" in t for t in FRAME["tags"].to_list()])
        base[[int(i.split(":")[1]) for i in excluded]] = False
        allowed = base
    count, best = _wanted(query, allowed, live, live_mask)
    try:
        result = index.search(query, k, filter=expression, exclude_ids=excluded)
        truth = index.search(query, k, filter=expression, exclude_ids=excluded, exact=True)
    finally:
        index.set_live(None)
    assert len(result.ids) == len(truth.ids) == min(k, count)
    assert len(set(result.ids)) == len(result.ids)
    assert not set(result.ids) & set(excluded)
    np.testing.assert_allclose(truth.scores, best[:k], atol=1e-4)
    assert (np.diff(result.scores) <= 1e-5).all()
    for id_, score in zip(result.ids, result.scores):
        prefix, number = id_.split(":")
        if prefix == "pin":
            assert allowed[int(number)]
        vector = corpus[int(number)] if prefix == "pin" else queries[int(number)]
        assert float(vector @ query) == pytest.approx(float(score), abs=1e-4)


@pytest.mark.slow
def test_filtered_search_with_and_against_query_keeps_recall(
    index: EntityIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that sketches are scanned for so few rows
    monkeypatch.setattr("index_builder.search.plans.SCAN_COST", 100_000)
    monkeypatch.setattr("index_builder.search.plans.SCAN_ROWS", 50)
    corpus, queries = entity_vectors()
    direction = np.linalg.svd(corpus - corpus.mean(axis=0), full_matrices=False)[2][0]
    place = np.argsort(np.argsort(corpus @ direction))
    frame = pl.DataFrame({"place": place, "rank": FRAME["rank"]})
    calibrated = EntityIndex.build(
        "pin",
        IDS,
        corpus,
        frame,
        IndexConfig(kind=index.kind, ann=CONFIG),
        calibration_queries=queries[:100],
    )
    plans = set()
    for share, target in ((0.5, None), (0.5, 0.65), (0.1, None), (0.04, None)):
        size = int(share * N)
        for column in ("place", "rank"):
            for low in (0, N - size):
                expression = f"{column} >= {low} and {column} < {low + size}"
                hits = total = 0
                for query in queries[100:]:
                    result = calibrated.search(query, 10, filter=expression, min_recall=target)
                    truth = calibrated.search(query, 10, filter=expression, exact=True)
                    plans.add(result.plan)
                    hits += int(np.count_nonzero(result.scores >= truth.scores[-1] - 1e-5))
                    total += 10
                assert hits / total >= (target or 0.93), (expression, hits / total)
    assert plans >= {"scan", "filtered-graph"}
    assert plans <= {"scan", "exact-scan", "sketch", "filtered-graph"}


def test_search_among_duplicates_finds_all_of_one_node(index: EntityIndex) -> None:
    corpus, _ = entity_vectors()
    facts = index.describe()
    assert facts["duplicates"] == 9 and facts["nodes"] == N - 9
    result = index.search(corpus[105], 10)
    assert set(result.ids) == set(IDS[100:110])
    assert index.row_of("pin:105") == 105
    np.testing.assert_array_equal(index.vector("pin:105"), corpus[105])
    assert index.attributes(["pin:7", "nobody", "pin:1"], ["country", "no_such"]) == [
        {"country": "de"},
        {},
        {"country": "de"},
    ]


def test_search_min_recall_chooses_ef_or_exact_scan(index: EntityIndex) -> None:
    _, queries = entity_vectors()
    modest, strict = (
        index.search(queries[0], min_recall=0.8),
        index.search(queries[0], min_recall=1.0),
    )
    assert (
        modest.plan == "graph"
        and modest.estimated_recall is not None
        and modest.estimated_recall >= 0.8
    )
    assert strict.plan == "exact" and strict.estimated_recall == 1.0
    kept = index.search(queries[0], 10, min_score=float(strict.scores[4]) - 1e-6)
    assert len(kept.ids) <= 5 and (kept.scores >= strict.scores[4] - 1e-5).all()
    batch = index.search_batch(queries[:3], 10)
    assert [r.ids for r in batch] == [index.search(q, 10).ids for q in queries[:3]]


@pytest.mark.parametrize("gone", [None, 0.0, 0.04, 0.6, 1.0])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 64, 150])
def test_search_batch_any_conditions_answers_as_single_searches(
    index: EntityIndex, size: int, gone: float | None
) -> None:
    """Walks of a batch take turns; neither the ten entities with one vector nor hidden rows and
    live entries disturb them.
    """
    corpus, queries = entity_vectors()
    asked = np.concatenate([corpus[100:102], queries])[:size]
    index.set_live(
        None
        if gone is None
        else _live_view(queries[:4], np.random.default_rng(1).random(N) < gone, scans=True)
    )
    try:
        for k in (1, 10, 25):
            for one, of_batch in zip(
                [index.search(q, k) for q in asked], index.search_batch(asked, k), strict=True
            ):
                assert one.ids == of_batch.ids and (one.plan, one.ef, one.estimated_recall) == (
                    of_batch.plan,
                    of_batch.ef,
                    of_batch.estimated_recall,
                )
                np.testing.assert_array_equal(one.scores, of_batch.scores)
    finally:
        index.set_live(None)


def test_search_best_rows_hidden_keeps_recall(index: EntityIndex) -> None:
    """Deleting a whole neighbourhood leaves the graph's best candidates hidden; what lies behind
    them must be found.
    """
    corpus, queries = entity_vectors()
    hits = total = 0
    for near in (5, 20, 200):
        for query in queries[:60]:
            hidden = np.zeros(N, np.bool_)
            hidden[np.argsort(-(corpus @ query))[:near]] = True
            index.set_live(LiveView(sequence=1, hidden_rows=hidden, hidden_count=near))
            try:
                result, truth = index.search(query, 10), index.search(query, 10, exact=True)
            finally:
                index.set_live(None)
            assert (
                len(result.ids) == 10
                and not hidden[[int(i.split(":")[1]) for i in result.ids]].any()
            )
            hits += int(np.count_nonzero(result.scores >= truth.scores[-1] - 1e-5))
            total += 10
    assert hits / total >= 0.9, hits / total


def test_search_impossible_request_is_refused_by_name(index: EntityIndex) -> None:
    _, queries = entity_vectors()
    query = queries[0]
    with pytest.raises(DimensionMismatch, match="64"):
        index.search(query[:32])
    with pytest.raises(DimensionMismatch, match="float64"):
        index.search(query.astype(np.float64))
    with pytest.raises(InvalidQuery, match="NaN"):
        index.search(np.full(64, np.nan, dtype=np.float32))
    with pytest.raises(InvalidQuery, match="norm"):
        index.search(2 * query)
    for bad in ({"k": 0}, {"ef": 0}, {"min_recall": 1.5}):
        with pytest.raises(InvalidQuery):
            index.search(query, **bad)  # type: ignore[arg-type]
    with pytest.raises(FilterError, match="nothing"):
        index.search(query, filter="nothing == 1")


@pytest.mark.parametrize("count", [0, 1, 2, 15])
def test_search_k_above_corpus_size_returns_everything(count: int, tmp_path: Path) -> None:
    corpus, queries = entity_vectors()
    frame = pl.DataFrame({"rank": list(range(count))}, schema={"rank": pl.Int64})
    index = EntityIndex.build("ad", IDS[:count], corpus[:count], frame, calibration_queries=queries)
    index.save(tmp_path)
    index = EntityIndex.load(tmp_path)
    assert len(index.search(queries[0], 10).ids) == min(10, count)
    assert len(index.search(queries[0], 10, filter="rank < 1").ids) == min(1, count)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda v: v.__setitem__((3, 5), np.nan), "row 3.*NaN"),
        (lambda v: v.__setitem__(4, 0), "row 4.*zeros"),
        (lambda v: v.__setitem__(6, v[6] * 2), "row 6.*norm 2.0000"),
    ],
)
def test_build_bad_vector_is_refused_with_its_row(spoil: Any, words: str) -> None:
    vectors = entity_vectors()[0][:20].copy()
    spoil(vectors)
    with pytest.raises(InvalidVectors, match=words):
        EntityIndex.build("pin", IDS[:20], vectors)


def test_build_bad_id_or_shape_is_refused_by_name() -> None:
    vectors = entity_vectors()[0][:3]
    for ids, error, words in [
        (["a", "b", "a"], DuplicateIds, "row 2: id 'a' was already given by row 0"),
        (["a", "", "c"], IndexBuildError, "row 1"),
        (["a", "cafe\u0301", "c"], IndexBuildError, "row 1.*NFC"),
        (["a", "\ud800", "c"], IndexBuildError, "row 1"),
        (["a", "b"], InvalidVectors, "2 ids and 3 vectors"),
    ]:
        with pytest.raises(error, match=words):
            EntityIndex.build("pin", ids, vectors)
    with pytest.raises(InvalidVectors, match="float64"):
        EntityIndex.build("pin", ["a", "b", "c"], vectors.astype(np.float64))
    with pytest.raises(InvalidVectors, match="shape"):
        EntityIndex.build("pin", ["a", "b", "c"], vectors.reshape(-1))
    with pytest.raises(ConfigError, match="one row of attributes per id"):
        EntityIndex.build("pin", ["a", "b", "c"], vectors, pl.DataFrame({"x": [1]}))
    with pytest.raises(ConfigError, match="annoy"):
        IndexConfig(kind="annoy")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.text(min_size=1, max_size=8).filter(
            lambda s: not any("\ud800" <= c <= "\udfff" for c in s)
        ),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_ids_any_unicode_come_back_unchanged(texts: list[str]) -> None:
    import unicodedata

    ids = list(dict.fromkeys(unicodedata.normalize("NFC", t) for t in texts))
    index = EntityIndex.build("pin", ids, entity_vectors()[0][200 : 200 + len(ids)])
    assert sorted(index.search(entity_vectors()[1][0], 10).ids) == sorted(ids)
    assert [index.row_of(i) for i in ids] == list(range(len(ids)))
    assert index.row_of("no such id at all") is None


def _answer(index: EntityIndex, query: np.ndarray, pipe: Any) -> None:
    pipe.send(index.search(query, 10).ids)


def test_search_in_forked_process_answers_from_shared_index(index: EntityIndex) -> None:
    query = entity_vectors()[1][0]
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_answer, args=(index, query, theirs)
    )
    process.start()
    assert ours.poll(30)
    assert ours.recv() == index.search(query, 10).ids
    process.join(10)


def test_search_without_extension_gives_same_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from index_builder.storage import engine_arrays

    corpus, queries = entity_vectors()
    config = IndexConfig(kind="hnsw", ann=CONFIG)
    compiled = EntityIndex.build("pin", IDS, corpus, FRAME, config)
    monkeypatch.setattr(engine_arrays, "Engine", None)
    plain = EntityIndex.build("pin", IDS, corpus, FRAME, config)
    for expression in (None, "rank < 40", "rank < 2800"):
        for query in queries[:10]:
            assert (
                compiled.search(query, 10, filter=expression).ids
                == plain.search(query, 10, filter=expression).ids
            )


@pytest.mark.slow
def test_search_disconnected_graph_still_gives_k_answers() -> None:
    vectors = islands()
    ids = [str(i) for i in range(len(vectors))]
    config = IndexConfig(kind="hnsw", ann=AnnConfig(m=2, ef_construction=2))
    index = EntityIndex.build("pin", ids, vectors, None, config, calibration_queries=vectors[:50])
    for query in vectors[::100]:
        assert len(index.search(query, 100, ef=100).ids) == 100
        assert [len(r.ids) for r in index.search_batch(query[None], 100)] == [100]
