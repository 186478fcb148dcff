"""What a search claims about its recall holds: on corpora that codes and graphs find hard, under
filters of every kind, with live writes, and for a named target.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
import pytest

from index_builder.ann import AnnConfig
from index_builder.live_log.records import LiveEntry
from index_builder.native import Engine
from index_builder.search.entity_index import EntityIndex, IndexConfig
from index_builder.search.live_state import LiveBase, LiveState
from index_builder.search.request import SearchResult
from index_builder.storage.corpus import UNIT_ERROR, Corpus, check_vectors
from index_builder.storage.engine_arrays import EngineArrays, make_engine
from index_builder.storage.id_table import IdTable

compiled = pytest.mark.skipif(Engine is None, reason="the extension was not compiled")
TIE = 1e-6
SPACE = "ab" * 32


class Hard(NamedTuple):
    """A corpus, its queries, and the group of each."""

    vectors: np.ndarray
    queries: np.ndarray
    groups: np.ndarray
    query_groups: np.ndarray


def unit(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    )


def hard_corpus(shape: str, count: int = 3_000, dimension: int = 64) -> Hard:
    """Groups of cosine about 0.999 or 0.9999, one dominant component, a power-law spectrum, or
    duplicates.
    """
    rng = np.random.default_rng(len(shape))
    total = count + 340
    groups = rng.integers(20, size=total)
    noise = rng.standard_normal((total, dimension))
    if shape.startswith("groups"):
        spread = {"groups 0.999": 0.03, "groups 0.9999": 0.01}[shape]
        rows = unit(rng.standard_normal((20, dimension)))[groups] * dimension**0.5 + spread * noise
    elif shape == "dominant component":
        rows = noise
        rows[:, 0] = 5 * dimension**0.5
    elif shape == "power law":
        rows = noise * np.arange(1, dimension + 1) ** -1.0
    else:
        rows = noise
        rows[count // 3 : count] = rows[rng.integers(count // 3, size=count - count // 3)]
    vectors = unit(rows)
    return Hard(vectors[:count], vectors[count:], groups[:count], groups[count:])


SHAPES = ["groups 0.999", "groups 0.9999", "dominant component", "power law", "duplicates"]


def recall(hard: Hard, query: np.ndarray, result: SearchResult, mask: np.ndarray) -> float:
    scores = hard.vectors @ query
    kth = np.sort(scores[mask])[::-1][:10][-1]
    return float(np.count_nonzero(scores[[int(i) for i in result.ids]] >= kth - TIE)) / 10


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_scan_by_codes_is_exact_on_any_corpus(shape: str) -> None:
    hard = hard_corpus(shape)
    corpus = Corpus.build(hard.vectors)
    ids = IdTable.build([str(i) for i in range(len(hard.vectors))])
    engine = make_engine(corpus, ids, EngineArrays.build(corpus.vectors, None))
    rng = np.random.default_rng(0)
    for query in hard.queries[:40]:
        rows = rng.choice(len(hard.vectors), 1_500, replace=False).astype(np.uint32)
        out = np.empty(10, np.float32)
        found, scored = engine.scan(query[None], 10, rows, out, None)
        want = np.sort((hard.vectors @ query)[rows])[::-1][:10]
        np.testing.assert_allclose((hard.vectors @ query)[[int(i) for i in found]], want, atol=TIE)
        assert 10 <= scored <= len(rows)


@compiled
def test_scan_by_codes_scores_few_rows_of_an_easy_corpus() -> None:
    hard = hard_corpus("power law")
    ids = IdTable.build([str(i) for i in range(len(hard.vectors))])
    engine = make_engine(Corpus(hard.vectors), ids, EngineArrays.build(hard.vectors, None))
    rows, out = np.arange(3_000, dtype=np.uint32), np.empty(10, np.float32)
    assert np.mean([engine.scan(q[None], 10, rows, out, None)[1] for q in hard.queries]) < 600


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *((shape, "int8-graph") for shape in SHAPES),
        ("duplicates", "hnsw"),
        ("groups 0.999", "hnsw"),
    ],
)
def test_filtered_search_reaches_its_target_and_claims_no_more(
    shape: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all plans come into use: scans of few rows are switched off."""
    if kind != "hnsw" and Engine is None:
        pytest.skip("the extension was not compiled")
    hard = hard_corpus(shape, 1_500)
    monkeypatch.setattr("index_builder.search.plans.SCAN_COST", 100_000)
    monkeypatch.setattr("index_builder.search.plans.CODE_SCAN_ROWS", 50)
    monkeypatch.setattr("index_builder.search.plans.SCAN_ROWS", 50)
    count = len(hard.vectors)
    half = np.random.default_rng(1).integers(2, size=count)
    index = EntityIndex.build(
        "pin",
        [str(i) for i in range(count)],
        hard.vectors,
        pl.DataFrame({"group": hard.groups, "half": half}),
        IndexConfig(kind=kind, ann=AnnConfig(m=8, ef_construction=60)),
        calibration_queries=hard.queries[:240],
    )
    filters = {
        "group == {g}": lambda g: hard.groups == g,
        "group != {g}": lambda g: hard.groups != g,
        "half == 1": lambda _: half == 1,
        "group < 10 and half == 0": lambda _: (hard.groups < 10) & (half == 0),
    }
    for expression, passes in filters.items():
        for target in (None, 0.8):
            recalls, claims = [], []
            for query, group in zip(hard.queries[240:], hard.query_groups[240:]):
                result = index.search(
                    query, 10, filter=expression.format(g=group), min_recall=target
                )
                recalls.append(recall(hard, query, result, passes(group)))
                claims.append(result.estimated_recall)
            # Three standard errors of a mean over 100 queries
            slack = 3 * np.std(recalls) / len(recalls) ** 0.5 + 0.005
            where = (shape, kind, expression, target, np.mean(recalls), claims[0])
            assert np.mean(recalls) >= (target or 0.95) - slack, where
            assert all(claim is not None for claim in claims), where
            assert np.mean(recalls) >= np.mean([c or 0 for c in claims]) - slack, where


def test_search_reports_exact_scans_and_scans_by_codes_apart() -> None:
    hard = hard_corpus("power law")
    frame = pl.DataFrame({"group": hard.groups})
    ids = [str(i) for i in range(len(hard.vectors))]
    index = EntityIndex.build("pin", ids, hard.vectors, frame, IndexConfig(kind="hnsw"))
    query = hard.queries[0]
    exact = index.search(query, 10, filter="group < 5", exact=True)
    assert (exact.plan, exact.estimated_recall) == ("exact", 1.0)
    few = index.search(query, 70, filter="group == 3")
    assert (few.plan, few.estimated_recall) == ("exact-scan", 1.0)
    if Engine is not None:
        scan = index.search(query, 10, filter="group < 5", min_recall=0.99)
        assert (scan.plan, scan.estimated_recall) == ("scan", 1.0)
        np.testing.assert_allclose(scan.scores, exact.scores, atol=1e-6)


def test_search_uncalibrated_plan_claims_nothing() -> None:
    hard = hard_corpus("power law")
    ids = [str(i) for i in range(len(hard.vectors))]
    index = EntityIndex.build("pin", ids, hard.vectors, None, IndexConfig(kind="hnsw"))
    assert index.search(hard.queries[0]).estimated_recall is None
    sure = index.search(hard.queries[0], min_recall=0.9)
    assert (sure.plan, sure.estimated_recall) == ("exact", 1.0)


@pytest.mark.slow
def test_search_deeper_than_was_measured_claims_nothing() -> None:
    hard = hard_corpus("power law")
    ids = [str(i) for i in range(len(hard.vectors))]
    index = EntityIndex.build(
        "pin",
        ids,
        hard.vectors,
        None,
        IndexConfig(kind="hnsw"),
        calibration_queries=hard.queries[:300],
    )
    query = hard.queries[310]
    assert index.search(query, 400).estimated_recall in (None, 1.0)
    assert index.search(query, 400, min_recall=0.9).plan == "exact"


@pytest.mark.parametrize("kind", ["hnsw", "symqg", "int8-graph", "exact"])
def test_search_vectors_of_accepted_norms_are_made_unit(kind: str) -> None:
    """Scores are those of unit vectors whatever the plan, for base, live entries and queries."""
    from index_builder.ann.choice import kind_available

    if not kind_available(kind):
        pytest.skip(f"{kind} is not available here")
    hard = hard_corpus("groups 0.999", 2_000)
    rng = np.random.default_rng(3)
    off = (1 + 0.0009 * rng.uniform(-1, 1, (2_000, 1))).astype(np.float32)
    ids = [str(i) for i in range(2_000)]
    index = EntityIndex.build(
        "pin", ids, np.ascontiguousarray(hard.vectors * off), None, IndexConfig(kind=kind)
    )
    state = LiveState(LiveBase(64, SPACE, index.row_of, rows=2_000), background=False)
    state.apply(
        [
            LiveEntry(id=f"l{n}", vector=query * np.float32(0.9992), space_id=SPACE)
            for n, query in enumerate(hard.queries[:5])
        ]
    )
    index.set_live(state.view)
    for query in hard.queries[:10]:
        plain, scaled = index.search(query, 10), index.search(query * np.float32(1.0045), 10)
        assert plain.ids == scaled.ids
        np.testing.assert_allclose(plain.scores, scaled.scores, atol=1e-6)
        true = [
            float(hard.queries[int(i[1:])] @ query) if i[0] == "l" else hard.vectors[int(i)] @ query
            for i in plain.ids
        ]
        np.testing.assert_allclose(plain.scores, true, atol=2e-6)


def test_check_vectors_leaves_unit_rows_as_they_are() -> None:
    rows = unit(np.random.default_rng(0).standard_normal((50, 300)))
    assert check_vectors(rows) is rows
    rows[7] *= np.float32(1.0008)
    before = rows.copy()
    mended = check_vectors(rows)
    np.testing.assert_array_equal(rows, before)
    np.testing.assert_array_equal(np.delete(mended, 7, axis=0), np.delete(rows, 7, axis=0))
    assert np.abs(np.linalg.norm(mended.astype(np.float64), axis=1) - 1).max() <= UNIT_ERROR


@pytest.mark.parametrize("kind", ["exact", "hnsw", "symqg", "int8-graph", "faiss"])
def test_search_own_vector_scores_within_range_and_passes_min_score_one(kind: str) -> None:
    from index_builder.ann.choice import kind_available

    if not kind_available(kind):
        pytest.skip(f"{kind} is not available here")
    vectors = unit(np.random.default_rng(4).standard_normal((1_200, 256)))
    ids = [f"e{n}" for n in range(1_200)]
    index = EntityIndex.build("pin", ids, vectors, None, IndexConfig(kind=kind))
    state = LiveState(LiveBase(256, SPACE, index.row_of, rows=1_200), background=False)
    state.apply([LiveEntry(id="live", vector=vectors[3], space_id=SPACE)])
    index.set_live(state.view)
    for row in range(0, 1_200, 60):
        for exact in (False, True):
            own = index.search(vectors[row], 3, min_score=1.0, exact=exact)
            assert f"e{row}" in own.ids and (own.scores == 1.0).all()
            every = index.search(vectors[row], 50, exact=exact)
            assert every.scores.max() <= 1.0 and every.scores.min() >= -1.0
    assert set(index.search(vectors[3], 5, min_score=1.0).ids) == {"e3", "live"}
    assert index.search(-vectors[5], 1_200, exact=True).scores.min() >= -1.0


def test_live_entries_obey_a_named_target() -> None:
    hard = hard_corpus("groups 0.999", 2_000)
    ids = [str(i) for i in range(1_000)]
    index = EntityIndex.build(
        "pin",
        ids,
        hard.vectors[:1_000],
        None,
        IndexConfig(kind="hnsw"),
        calibration_queries=hard.queries[:200],
    )
    state = LiveState(LiveBase(64, SPACE, index.row_of, rows=1_000), background=False)
    state.apply(
        [LiveEntry(id=str(n), vector=hard.vectors[n], space_id=SPACE) for n in range(1_000, 2_000)]
    )
    index.set_live(state.view)
    everything = np.ones(2_000, bool)
    for target in (None, 0.9, 0.9999):
        found, claims = [], []
        for query in hard.queries[200:]:
            result = index.search(query, 10, min_recall=target)
            found.append(recall(hard, query, result, everything))
            claims.append(result.estimated_recall or 0.0)
        slack = 3 * np.std(found) / len(found) ** 0.5 + 0.005
        assert np.mean(found) >= (target or 0.95) - slack
        assert np.mean(found) >= np.mean(claims) - slack
        assert target is not None or max(claims) < 1.0


@compiled
def test_release_without_quantiser_still_answers_and_scans_exactly() -> None:
    """Codes of an early release have one unknown step: they rank walks, and no scan trusts them."""
    hard = hard_corpus("power law")
    arrays = EngineArrays.build(hard.vectors, None, sketches=True)
    old = EngineArrays(arrays.codes, None, arrays.entry, arrays.sketch, arrays.factors)
    ids = IdTable.build([str(i) for i in range(len(hard.vectors))])
    engine = make_engine(Corpus(hard.vectors), ids, old)
    rows, out = np.arange(3_000, dtype=np.uint32), np.empty(10, np.float32)
    found, scored = engine.scan(hard.queries[:1], 10, rows, out, None)
    assert scored == 3_000
    assert [int(i) for i in found] == np.argsort(-(hard.vectors @ hard.queries[0]))[:10].tolist()
    mask = np.ones(3_000, bool)
    assert len(engine.sketch(hard.queries[:1], 10, 200, out, mask, None)) == 10


@compiled
def test_engine_refuses_vectors_whose_sums_would_overflow() -> None:
    wide = np.zeros((1, 65_537), np.float32)
    wide[0, 0] = 1
    with pytest.raises(ValueError, match="65,536"):
        Engine(wide, 65_537, np.zeros(1, np.uint8), np.zeros(2, np.uint64))
    index = EntityIndex.build("pin", ["a"], wide, pl.DataFrame({"x": [1]}))
    assert index.search(wide[0], 1, filter="x == 1").ids == ["a"]
