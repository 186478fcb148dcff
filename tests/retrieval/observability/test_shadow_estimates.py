"""The shadow recall's arithmetic."""

import numpy as np
import pytest

from retrieval.observability.shadow_recall import estimate, recall_of_answer, selectivity_bucket


def test_estimate_interval_covers_the_truth_and_narrows() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        found = estimate((rng.binomial(10, 0.95, size=200) / 10).tolist())
        covered += found.low <= 0.95 <= found.high
    assert covered >= 270
    few, many = estimate([1.0] * 5), estimate([1.0] * 500)
    assert few.low < many.low < 1.0 and few.high == pytest.approx(1.0)


def test_recall_of_answer_ties_count_as_found() -> None:
    exact = np.array([0.9, 0.8, 0.8], dtype=np.float32)
    assert recall_of_answer(["a", "b", "x"], exact, ["a", "b", "c"], exact) == 1.0
    assert recall_of_answer(["a"], exact[:1], ["a", "b", "c"], exact) == pytest.approx(1 / 3)
    assert recall_of_answer([], exact[:0], [], exact[:0]) == 1.0
    assert [selectivity_bucket(s) for s in (None, 0.9, 0.2, 0.05, 0.001)] == [
        "none",
        ">50%",
        "10-50%",
        "1-10%",
        "<1%",
    ]
