"""Calibration arithmetic and the gate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.errors import ConfigError
from encoders.exact_search import exact_top_k
from index_builder.ann import AnnConfig, build_index
from index_builder.errors import GateFailed
from index_builder.search.calibration import (
    Calibration,
    CurvePoint,
    calibrate,
    check_gate,
    mean_interval,
    recall_per_query,
)
from tests.helpers.real_vectors import text_vectors

CURVE = (
    CurvePoint(10, 0.80, 0.78, 0.82),
    CurvePoint(20, 0.92, 0.90, 0.94),
    CurvePoint(40, 0.98, 0.96, 0.99),
)


def test_ef_for_target_uses_lower_bound_and_interpolates() -> None:
    calibration = Calibration(2_000, "real queries", 10, CURVE)
    assert calibration.ef_for(0.90) == 20
    assert calibration.ef_for(0.93) == 30
    assert calibration.ef_for(0.70) == 10
    assert calibration.ef_for(0.97) is None
    assert calibration.settings() == {"0.90": 20, "0.95": 37, "0.99": None}
    assert calibration.recall_at(30) == pytest.approx(0.95)
    assert calibration.recall_at(5) == 0.80 and calibration.recall_at(999) == 0.98


def test_ef_for_larger_k_is_larger() -> None:
    deep = (CurvePoint(100, 0.90, 0.88, 0.92), CurvePoint(200, 0.97, 0.95, 0.98))
    calibration = Calibration(2_000, "real queries", 10, CURVE, 100, deep)
    at_10, at_50, at_100 = (calibration.ef_for(0.93, k) for k in (10, 50, 100))
    assert at_10 is not None and at_50 is not None and at_100 is not None
    assert at_10 < at_50 < at_100


def test_calibration_json_round_trips_and_may_leave_out_times() -> None:
    timed = Calibration(
        5,
        "perturbed entities",
        10,
        (CurvePoint(10, 0.9, 0.8, 1.0, 12.5, 20.0),),
        sketch_points=CURVE,
    )
    assert Calibration.from_dict(timed.as_dict()) == timed
    assert "latency" not in str(timed.as_dict(latencies=False))


def test_gate_missed_target_names_figures_and_flags() -> None:
    check_gate(Calibration(2_000, "real queries", 10, CURVE), 0.95, "pin")
    with pytest.raises(
        GateFailed, match=r"pin: .*0\.9800.*0\.9600-0\.9900.*ef 40.*target 0\.97.*--ef-construction"
    ):
        check_gate(Calibration(2_000, "real queries", 10, CURVE), 0.97, "pin")
    with pytest.raises(GateFailed, match="more queries narrow it"):
        check_gate(
            Calibration(50, "real queries", 10, (CurvePoint(10, 0.99, 0.94, 1.0),)), 0.95, "pin"
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0]), min_size=2, max_size=200))
def test_mean_interval_holds_mean_and_perfect_sample_is_uncertain(
    values: list[float],
) -> None:
    mean, low, high = mean_interval(np.array(values))
    assert 0 <= low <= mean <= high <= 1
    perfect = mean_interval(np.ones(len(values)))
    assert perfect[1] < 1.0


def test_recall_per_query_counts_ties_by_recomputed_scores() -> None:
    vectors = np.eye(4, dtype=np.float32)
    query = np.array([[1, 0, 0, 0]], dtype=np.float32)
    exact = np.array([[1.0, 0.0]], dtype=np.float32)
    assert recall_per_query([np.array([0, 3])], query, vectors, exact).tolist() == [
        1.0
    ]  # row 3 ties with rows 1 and 2
    assert recall_per_query([np.array([0])], query, vectors, exact).tolist() == [0.5]


@pytest.mark.slow
def test_calibrate_real_index_gives_rising_curve() -> None:
    vectors, queries = text_vectors(3_150)[:3_000], text_vectors(3_150)[3_000:]
    index = build_index("hnsw", vectors, AnnConfig(m=8, ef_construction=60))
    result = calibrate(
        lambda q, k, ef: index.search(q, k, ef)[0],
        vectors,
        queries,
        source="perturbed entities",
        ef_grid=(10, 40, 160),
    )
    recalls = [p.recall for p in result.points]
    assert recalls == sorted(recalls) and recalls[-1] > 0.95
    assert all(p.low <= p.recall <= p.high and p.latency_us for p in result.points)
    assert result.source == "perturbed entities" and result.queries == 150
    with pytest.raises(ConfigError, match="at least one query"):
        calibrate(
            lambda q, k, ef: index.search(q, k, ef)[0], vectors, queries[:0], source="real queries"
        )


@pytest.mark.slow
def test_calibrate_stops_where_every_query_is_answered_in_full() -> None:
    vectors, queries = text_vectors(400)[:300], text_vectors(400)[300:]
    tried = []

    def search(query: np.ndarray, k: int, ef: int) -> np.ndarray:
        tried.append(ef)
        return exact_top_k(query, vectors, k if ef >= 20 else k - 1)[0][0]

    result = calibrate(search, vectors, queries, source="real queries", ef_grid=(10, 20, 40, 1280))
    assert [p.recall for p in result.points] == [0.9, 1.0]
    assert result.points[-1].low < 1.0
    assert result.deep_k == 100 and [p.ef for p in result.deep_points] == [1280]
    assert set(tried) == {10, 20, 1280}
