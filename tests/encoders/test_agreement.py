"""Krippendorff's alpha equals the published example and its definition, pair by pair."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from encoders.agreement import Level, coincidence_matrix, identical_share, krippendorff_alpha


def published() -> np.ndarray:
    """Krippendorff (2011), example D: four observers, twelve units; a dot is a missing grade."""
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    return np.array([[int(c) - 1 if c.isdigit() else -1 for c in row] for row in rows])


@pytest.mark.parametrize(
    ("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_equals_the_published_example(level: Level, alpha: float) -> None:
    found = krippendorff_alpha(coincidence_matrix(published(), 5), level)
    assert found == pytest.approx(alpha, abs=0.0006)


def slow_alpha(table: np.ndarray, level: Level) -> float | None:
    """Disagreement of all pairs within items over that of all pairs of grades whatever the item."""
    units = [[g for g in column if g >= 0] for column in table.T.tolist()]
    units = [unit for unit in units if len(unit) >= 2]
    grades = [g for unit in units for g in unit]

    def distance(a: int, b: int) -> float:
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return float((a - b) ** 2)
        low, high = sorted((a, b))
        between = sum(grades.count(g) for g in range(low, high + 1))
        return (between - (grades.count(low) + grades.count(high)) / 2) ** 2

    n = len(grades)
    within = sum(
        sum(distance(a, b) for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units
    )
    across = sum(distance(a, b) for a, b in permutations(grades, 2)) / (n - 1) if n > 1 else 0.0
    return 1 - within / across if across else None


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@pytest.mark.parametrize("seed", range(8))
def test_alpha_equals_its_definition(level: Level, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(-1, 4, (int(rng.integers(2, 6)), int(rng.integers(1, 15))))
    found = krippendorff_alpha(coincidence_matrix(table, 4), level)
    wanted = slow_alpha(table, level)
    assert found == (None if wanted is None else pytest.approx(wanted))


def test_identical_share_counts_pairs_of_judges() -> None:
    table = np.array([[0, 1, 2], [0, 1, 1], [0, -1, -1]])
    # three pairs of the first item agree, the pair of the second agrees, that of the third does not
    assert identical_share(coincidence_matrix(table, 3)) == pytest.approx((3 + 2) / 7)
    assert np.isnan(identical_share(coincidence_matrix(table[:1], 3)))
