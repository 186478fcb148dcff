"""Weights of the legs: the legs that tell get them, and what does not help stays off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index_builder.errors import IndexFormatError
from index_builder.fusion.probability import isotonic
from index_builder.fusion.weights import (
    CalibrationCase,
    FusedRecall,
    Fusion,
    fit_fusion,
    with_cold_votes,
)

CANDIDATES = 60


def nonsense(count: int, seed: int) -> list[CalibrationCase]:
    """Queries that share little with any text, and whose nearest known query is far."""
    return [
        case._replace(
            scores=np.minimum(case.scores, 0.1), relevant=case.relevant & False, nearest=0.3
        )
        for case in cases(count, (0.0, 0.0, 0.0), seed)
    ]


def cases(count: int, strength: tuple[float, float, float], seed: int) -> list[CalibrationCase]:
    """Queries with one relevant candidate, which each leg raises by its strength."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        scores = rng.standard_normal((CANDIDATES, 3)).astype(np.float32)
        relevant = np.zeros(CANDIDATES, np.bool_)
        relevant[rng.integers(CANDIDATES)] = True
        scores[relevant] += np.array(strength, np.float32)
        made.append(CalibrationCase(scores, relevant, 1))
    return made


def test_fit_legs_that_tell_get_weight_and_gain_is_proved() -> None:
    fusion = fit_fusion(cases(400, (1.0, 2.0, 0.0), 0), "held-back queries")
    assert fusion.enabled and fusion.gain_low > 0
    assert fusion.weights[1] > fusion.weights[0] > 0
    assert fusion.weights[2] < fusion.weights[1] / 2
    assert fusion.fused_recall == pytest.approx(fusion.dense_recall + fusion.gain, abs=2e-6)


def test_fit_legs_of_noise_leave_fusion_off() -> None:
    fusion = fit_fusion(cases(300, (2.5, 0.0, 0.0), 1), "held-back queries")
    assert not fusion.enabled
    assert fusion.weights[0] == 1


@pytest.mark.parametrize("count", [0, 1])
def test_fit_few_queries_leave_fusion_off(count: int) -> None:
    fusion = fit_fusion(cases(count, (0.0, 3.0, 0.0), 2), "held-back queries")
    assert not fusion.enabled
    assert fusion.queries == count


def test_fit_pooled_queries_choose_weights_but_not_the_gate() -> None:
    few, like = cases(3, (0.0, 0.0, 3.0), 3), cases(300, (0.0, 0.0, 3.0), 4)
    fusion = fit_fusion(few, "held-back queries", like)
    assert fusion.weights[2] > 0
    assert fusion.queries == 3


def test_fit_case_without_candidates_counts_as_missed() -> None:
    nothing = CalibrationCase(np.zeros((0, 3), np.float32), np.zeros(0, np.bool_), 2)
    fusion = fit_fusion([nothing, *cases(50, (3.0, 3.0, 3.0), 5)], "held-back queries")
    assert fusion.pairs == 52
    assert fusion.fused_recall < 1


def test_fit_probability_of_hits_is_calibrated() -> None:
    fusion = fit_fusion(cases(600, (1.0, 2.0, 1.0), 8), "held-back queries")
    assert fusion.probability and 0 < fusion.probability_error < 0.05
    assert list(fusion.probability.values) == sorted(fusion.probability.values)
    assert fusion.probability.of(np.array([-1e9, 1e9])).tolist() == pytest.approx(
        [fusion.probability.values[0], fusion.probability.values[-1]]
    )
    assert not fit_fusion(cases(20, (1.0, 2.0, 1.0), 8), "held-back queries").probability


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 9)), min_size=1, max_size=20))
def test_isotonic_is_the_nearest_rising_line(points: list[tuple[float, float]]) -> None:
    values, weights = (np.array(column) for column in zip(*points, strict=True))
    fitted = isotonic(values, weights)
    assert (np.diff(fitted) >= -1e-12).all()
    np.testing.assert_allclose(
        (fitted * weights).sum(), (values * weights).sum(), rtol=1e-9, atol=1e-300
    )
    if (np.diff(values) >= 0).all():
        np.testing.assert_allclose(fitted, values, rtol=1e-9, atol=1e-12)


def with_cold(count: int, seed: int, share: float) -> list[CalibrationCase]:
    """Queries whose votes follow the cosine, but some relevant entities can have none."""
    rng = np.random.default_rng(seed)
    made = []
    for case in cases(count, (2.0, 0.0, 0.0), seed):
        is_cold = case.relevant & (rng.random() < share)
        scores = np.abs(case.scores)
        scores[:, 2] = np.clip(scores[:, 0] / 5 + rng.normal(0, 0.02, CANDIDATES), 0, 1)
        scores[is_cold, 2] = 0
        made.append(case._replace(scores=scores, is_cold=is_cold, nearest=0.9))
    return made


def test_fit_cold_entities_are_given_the_votes_of_others_with_their_cosine() -> None:
    fusion = fit_fusion(with_cold(300, 3, 0.5), "held-back queries")
    given = fusion.cold_votes.of(np.array([0.5, 2.0]))
    np.testing.assert_allclose(given, [0.1, 0.4], atol=0.05)
    scores = np.array([[2.0, 0.1, 0.0], [2.0, 0.1, 0.3]], np.float32)
    changed = with_cold_votes(scores, np.array([True, False]), fusion.cold_votes)
    assert changed[0, 2] == pytest.approx(0.4, abs=0.05)
    assert changed[1].tolist() == scores[1].tolist() and scores[0, 2] == 0


def test_fit_votes_that_tell_nothing_of_cold_entities_are_not_given() -> None:
    """Cold candidates are never relevant here: giving them votes would lose hits."""
    rng = np.random.default_rng(5)
    misled = []
    for case in with_cold(300, 4, 0.0):
        is_cold = ~case.relevant & (rng.random(CANDIDATES) < 0.5)
        scores = case.scores.copy()
        scores[case.relevant, 0] = 1.0
        scores[is_cold, 0] = 4.0
        scores[is_cold, 2] = 0
        misled.append(case._replace(scores=scores, is_cold=is_cold))
    assert not fit_fusion(misled, "held-back queries").cold_votes


def test_save_and_load_give_the_same(tmp_path: Path) -> None:
    fusion = fit_fusion(cases(150, (1.0, 1.0, 1.0), 6), "held-back", (), nonsense(150, 9))
    assert fusion.probability and fusion.gate
    fusion = replace(fusion, recall=(FusedRecall(10, 0.99, 0.97), FusedRecall(100, 0.9, 0.8)))
    fusion.save(tmp_path)
    first = (tmp_path / "fusion.json").read_bytes()
    assert Fusion.load(tmp_path) == fusion
    fusion.save(tmp_path)
    assert (tmp_path / "fusion.json").read_bytes() == first


def test_load_file_of_an_older_version_has_no_gate_and_no_recall(tmp_path: Path) -> None:
    fit_fusion(cases(10, (1.0, 1.0, 1.0), 7), "held-back queries").save(tmp_path)
    path = tmp_path / "fusion.json"
    values = json.loads(path.read_text())
    assert values.pop("gate") is None and values.pop("recall") == []
    values.pop("cold_votes")
    path.write_text(json.dumps(values))
    loaded = Fusion.load(tmp_path)
    assert loaded.gate is None and loaded.recall == () and not loaded.cold_votes


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"format": 1', '"format": 2'),
        ('"dense"', '"sparse"'),
        ('"weights": [', '"weights": [-1, '),
        ('"weights": [', '"weights": [NaN, '),
        ('"queries"', '"questions"'),
        ('"probability":', '"chance":'),
        ('"min_cosine": ', '"min_cosine": "x", "y": '),
        ('"hits_lost": ', '"hits_lost": 1'),
        ('"low": 0.97', '"low": 0.995'),
        ('"k": 10', '"k": 0'),
        ('"cold_votes": {', '"cold_votes": {"scores": [2, 1], "values": [0, 1]}, "y": {'),
        ("{", ""),
    ],
)
def test_load_damaged_file_is_refused(tmp_path: Path, old: str, new: str) -> None:
    few = cases(100, (1.0, 1.0, 1.0), 7)
    fusion = fit_fusion(few, "held-back queries", (), nonsense(100, 9))
    replace(fusion, recall=(FusedRecall(10, 0.99, 0.97),)).save(tmp_path)
    path = tmp_path / "fusion.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(IndexFormatError):
        Fusion.load(tmp_path)
