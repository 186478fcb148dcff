"""Measure how far judges agree: Krippendorff's alpha over any number of judges and missing grades.

Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Level = Literal["nominal", "ordinal", "interval"]
"""How grades differ: equal or not; by the grades that lie between; by their distance squared."""


def coincidence_matrix(table: np.ndarray, values: int) -> np.ndarray:
    """Count the pairs of grades that two judges gave to one item.

    Args:
        table: int ``(judges, items)``, grades from 0 to ``values - 1``; -1: not graded.
        values: Number of different grades.

    Returns:
        float64 ``(values, values)``, symmetric; an item with m grades counts m. Items with fewer
        than two grades count nothing.
    """
    counts = np.stack([(table == value).sum(axis=0) for value in range(values)], axis=1)
    counts = counts[counts.sum(axis=1) >= 2].astype(np.float64)  # (items, values)
    weighted = counts / np.maximum(counts.sum(axis=1, keepdims=True) - 1, 1)
    result: np.ndarray = counts.T @ weighted - np.diag(weighted.sum(axis=0))
    return result


def krippendorff_alpha(coincidence: np.ndarray, level: Level) -> float | None:
    """Compute alpha: 1 where judges agree, 0 where they agree as chance would.

    Args:
        coincidence: From ``coincidence_matrix``.
        level: How grades differ.

    Returns:
        Alpha; None where all grades are equal, so that chance cannot be told.
    """
    totals = coincidence.sum(axis=0)
    expected = np.outer(totals, totals) - np.diag(totals)
    distance = _distances(totals, level)
    chance = float((expected * distance).sum())
    if chance <= 0:
        return None
    observed = float((coincidence * distance).sum())
    return 1.0 - (float(totals.sum()) - 1.0) * observed / chance


def identical_share(coincidence: np.ndarray) -> float:
    """Return the share of pairs of judges and items whose grades are equal; NaN without pairs."""
    total = float(coincidence.sum())
    return float(np.trace(coincidence)) / total if total else float("nan")


def _distances(totals: np.ndarray, level: Level) -> np.ndarray:
    """Square the differences of grades; float64 ``(values, values)``."""
    number = np.arange(len(totals), dtype=np.float64)
    if level == "ordinal":
        number = np.cumsum(totals) - totals / 2  # the middle of each grade's ranks
    distances: np.ndarray = np.subtract.outer(number, number) ** 2
    return (distances > 0).astype(np.float64) if level == "nominal" else distances
