"""EntityIndex against a plain scan: any mix of filter, excluded, hidden and live entries; bad
input; files.
"""

from __future__ import annotations

import json
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
from index_builder.ann import AnnConfig, missing_features
from index_builder.ann.choice import kind_available
from index_builder.errors import (
    DimensionMismatch,
    DuplicateIds,
    FilterError,
    IndexBuildError,
    IndexFormatError,
    InvalidQuery,
)
from index_builder.live_log.records import LiveEntry
from index_builder.native import Engine
from index_builder.search.entity_index import EntityIndex, IndexConfig
from index_builder.search.live_segments import LiveView
from index_builder.search.live_state import LiveBase, LiveState
from tests.helpers.real_vectors import islands, text_vectors

N = 3_000
FRAME = pl.DataFrame(
    {
        "rank": np.random.default_rng(3).permutation(N),
        "country": [["us", "de", None][i % 3] for i in range(N)],
        "tags": [[["a"], ["a", "b"], []][i % 3] for i in range(N)],
    }
)
IDS = [f"pin:{i}" for i in range(N)]
CONFIG = AnnConfig(m=12, ef_construction=100)
INDEXES = [
    config
    for config in (
        IndexConfig(kind="symqg", ann=CONFIG),
        IndexConfig(kind="int8-graph", ann=CONFIG),
        IndexConfig(kind="int8-graph", ann=replace(CONFIG, sketched_links=False)),
        IndexConfig(kind="hnsw", ann=CONFIG),
    )
    if kind_available(config.kind)
]


def _corpus() -> tuple[np.ndarray, np.ndarray]:
    vectors = text_vectors(N + 150)
    corpus = vectors[:N].copy()
    corpus[100:110] = corpus[100]  # ten entities with one vector
    return corpus, vectors[N:]


@pytest.fixture(scope="module", params=INDEXES, ids=lambda c: f"{c.kind}-{c.ann.sketched_links:d}")
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EntityIndex:
    corpus, queries = _corpus()
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
    corpus, _ = _corpus()
    scores = (corpus @ query)[allowed]
    for segment in live.segments if live else ():
        keep = segment.alive if live_mask is None else segment.alive & live_mask
        scores = np.concatenate([scores, (segment.vectors @ query)[keep]])
    return len(scores), np.sort(scores)[::-1]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_never_fewer_than_k_and_never_a_forbidden_id(
    index: EntityIndex, data: st.DataObject
) -> None:
    corpus, queries = _corpus()
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


def test_recall_under_filters_with_and_against_the_query(
    index: EntityIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that sketches are scanned for so few rows
    monkeypatch.setattr("index_builder.search.plans.SCAN_COST", 100_000)
    monkeypatch.setattr("index_builder.search.plans.SCAN_ROWS", 50)
    corpus, queries = _corpus()
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
    for share in (0.5, 0.1, 0.04):
        size = int(share * N)
        for column in ("place", "rank"):
            for low in (0, N - size):
                expression = f"{column} >= {low} and {column} < {low + size}"
                hits = total = 0
                for query in queries[100:]:
                    result = calibrated.search(query, 10, filter=expression)
                    truth = calibrated.search(query, 10, filter=expression, exact=True)
                    plans.add(result.plan)
                    hits += int(np.count_nonzero(result.scores >= truth.scores[-1] - 1e-5))
                    total += 10
                assert hits / total >= 0.93, (expression, hits / total)
    assert plans >= {"sketch", "filtered-graph"}


def test_duplicates_share_a_node_and_all_of_them_are_found(index: EntityIndex) -> None:
    corpus, _ = _corpus()
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


def test_min_recall_chooses_ef_or_an_exact_scan(index: EntityIndex) -> None:
    _, queries = _corpus()
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
def test_a_batch_is_answered_as_its_queries_are_one_by_one(
    index: EntityIndex, size: int, gone: float | None
) -> None:
    """Walks of a batch take turns; neither the ten entities with one vector nor hidden rows and
    live entries disturb them.
    """
    corpus, queries = _corpus()
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


def test_recall_holds_where_the_best_rows_of_each_query_are_hidden(index: EntityIndex) -> None:
    """Deleting a whole neighbourhood leaves the graph's best candidates hidden; what lies behind
    them must be found.
    """
    corpus, queries = _corpus()
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


def test_requests_that_can_never_succeed(index: EntityIndex) -> None:
    _, queries = _corpus()
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
def test_tiny_corpora_and_k_larger_than_the_corpus(count: int, tmp_path: Path) -> None:
    corpus, queries = _corpus()
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
def test_vectors_that_may_not_enter_are_named(spoil: Any, words: str) -> None:
    vectors = _corpus()[0][:20].copy()
    spoil(vectors)
    with pytest.raises(InvalidVectors, match=words):
        EntityIndex.build("pin", IDS[:20], vectors)


def test_ids_and_shapes_that_may_not_enter_are_named() -> None:
    vectors = _corpus()[0][:3]
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
def test_ids_with_any_unicode_come_back_as_they_went_in(texts: list[str]) -> None:
    import unicodedata

    ids = list(dict.fromkeys(unicodedata.normalize("NFC", t) for t in texts))
    index = EntityIndex.build("pin", ids, _corpus()[0][200 : 200 + len(ids)])
    assert sorted(index.search(_corpus()[1][0], 10).ids) == sorted(ids)
    assert [index.row_of(i) for i in ids] == list(range(len(ids)))
    assert index.row_of("no such id at all") is None


def test_damaged_index_files_are_typed_errors(tmp_path: Path) -> None:
    corpus, _ = _corpus()
    index = EntityIndex.build("pin", IDS[:50], corpus[:50], FRAME[:50])
    for name in ("index.json", "ids.offsets.npy", "vectors.npy", "attributes.parquet"):
        folder = tmp_path / name.replace(".", "_")
        index.save(folder)
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(IndexFormatError):
            EntityIndex.load(folder)


def test_two_deterministic_builds_give_the_same_bytes(tmp_path: Path) -> None:
    corpus, queries = _corpus()
    for name in ("a", "b"):
        config = IndexConfig(ann=CONFIG, deterministic=True)
        EntityIndex.build("pin", IDS, corpus, FRAME, config, calibration_queries=queries[:50]).save(
            tmp_path / name
        )
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert [
        n for n in names if (tmp_path / "a" / n).read_bytes() != (tmp_path / "b" / n).read_bytes()
    ] == []


def _answer(index: EntityIndex, query: np.ndarray, pipe: Any) -> None:
    pipe.send(index.search(query, 10).ids)


def test_a_forked_process_answers_from_the_shared_index(index: EntityIndex) -> None:
    query = _corpus()[1][0]
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_answer, args=(index, query, theirs)
    )
    process.start()
    assert ours.poll(30)
    assert ours.recv() == index.search(query, 10).ids
    process.join(10)


def test_without_the_compiled_part_the_answers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from index_builder.storage import engine_arrays

    corpus, queries = _corpus()
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


def test_a_graph_that_does_not_lead_to_k_nodes_still_gives_k_answers() -> None:
    vectors = islands()
    ids = [str(i) for i in range(len(vectors))]
    config = IndexConfig(kind="hnsw", ann=AnnConfig(m=2, ef_construction=2))
    index = EntityIndex.build("pin", ids, vectors, None, config, calibration_queries=vectors[:50])
    for query in vectors[::100]:
        assert len(index.search(query, 100, ef=100).ids) == 100
        assert [len(r.ids) for r in index.search_batch(query[None], 100)] == [100]


def test_calibration_queries_decide_between_the_two_searches_of_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rabitqlib")
    if Engine is None or missing_features("symqg"):
        pytest.skip("only one of them can run here")
    vectors = text_vectors(3_000)
    ids, queries = [str(i) for i in range(2_900)], vectors[2_900:]
    for winner, loser in (("int8-graph", "symqg"), ("symqg", "int8-graph")):
        times = iter((20.0, 10.0) if winner == "int8-graph" else (10.0, None))
        monkeypatch.setattr(
            "index_builder.search.construction.latency_at_recall", lambda *_, left=times: next(left)
        )
        index = EntityIndex.build(
            "pin", ids, vectors[:2_900], None, IndexConfig(ann=CONFIG), calibration_queries=queries
        )
        index.save(tmp_path / winner)
        loaded = EntityIndex.load(tmp_path / winner)
        assert loaded.kind == index.kind == winner and loaded.describe()["kind"] == winner
        assert f"{winner} 10 us" in loaded.describe()["why"] and loser in loaded.describe()["why"]
        assert loaded.search(queries[0], 10).ids == index.search(queries[0], 10).ids
    assert not list((tmp_path / "symqg").glob("index.links.npy"))


@pytest.mark.parametrize(("old_kind", "sketched"), [("swift", True), ("lean", False)])
def test_index_saved_under_a_renamed_kind_loads_with_the_same_answers(
    old_kind: str, sketched: bool, tmp_path: Path
) -> None:
    if Engine is None:
        pytest.skip("the extension was not compiled")
    corpus, queries = _corpus()
    built = EntityIndex.build("pin", IDS, corpus, None, IndexConfig(kind=old_kind, ann=CONFIG))
    built.save(tmp_path)
    meta = json.loads((tmp_path / "index.json").read_text())
    assert (meta["facts"]["kind"], meta["facts"]["parameters"]["sketched_links"]) == (
        "int8-graph",
        sketched,
    )
    meta["facts"]["kind"] = old_kind  # as version 0.1.0 wrote it
    del meta["facts"]["parameters"]["sketched_links"]
    (tmp_path / "index.json").write_text(json.dumps(meta))
    loaded = EntityIndex.load(tmp_path)
    assert loaded.kind == loaded.describe()["kind"] == "int8-graph"
    assert EntityIndex.load_graph(tmp_path).kind == "int8-graph"
    assert [loaded.search(q, 10).ids for q in queries[:20]] == [
        built.search(q, 10).ids for q in queries[:20]
    ]


@pytest.mark.parametrize("kind", ["rabitq", "faiss-ivf"])
def test_index_of_a_retired_kind_is_refused_with_another_kind_to_use(
    kind: str, tmp_path: Path
) -> None:
    corpus, _ = _corpus()
    EntityIndex.build("pin", IDS, corpus, None, IndexConfig(kind="exact")).save(tmp_path)
    meta = json.loads((tmp_path / "index.json").read_text())
    meta["facts"]["kind"] = kind
    (tmp_path / "index.json").write_text(json.dumps(meta))
    with pytest.raises(IndexFormatError, match=f"{kind}.*Rebuild this release.*--index"):
        EntityIndex.load(tmp_path)
    with pytest.raises(ConfigError, match="retired"):
        IndexConfig(kind=kind)
