"""Probability that a hit is relevant, from its fused score: isotonic regression, few knots."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MIN_QUERIES = 100
"""Fewer calibration queries give no probabilities."""
KNOTS = 32
"""Steps that are kept, about equally many hits each."""
ECE_BINS = 15


class ProbabilityCurve(NamedTuple):
    """Non-decreasing line from fused scores to probabilities."""

    scores: tuple[float, ...]
    """Ascending; empty: no probabilities are known."""
    values: tuple[float, ...]
    """Probability at each, 0 to 1."""

    def __bool__(self) -> bool:
        return bool(self.scores)

    def of(self, scores: np.ndarray) -> np.ndarray:
        """Return the probability of each score, float32; between knots on a line."""
        return np.asarray(np.interp(scores, self.scores, self.values), np.float32)


NO_CURVE = ProbabilityCurve((), ())


def fit_probability(scores: np.ndarray, relevant: np.ndarray) -> ProbabilityCurve:
    """Fit how often hits of a score are relevant.

    Args:
        scores: float ``(H,)``, fused scores of hits.
        relevant: bool ``(H,)``.
    """
    if not len(scores):
        return NO_CURVE
    order = np.argsort(scores, kind="stable")
    parts = [part for part in np.array_split(order, min(KNOTS, len(order))) if len(part)]
    centres = np.array([scores[part].mean() for part in parts])
    shares = np.array([relevant[part].mean() for part in parts])
    sizes = np.array([len(part) for part in parts], np.float64)
    values = isotonic(shares, sizes)
    knots, places = np.unique(centres.round(6), return_index=True)
    return ProbabilityCurve(
        tuple(float(knot) for knot in knots), tuple(float(v) for v in values[places].round(6))
    )


def isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the nearest non-decreasing values (pool adjacent violators), float64."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, count
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, count = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            before, own, many = blocks.pop()
            mean = (before * own + mean * total) / (own + total)
            total += own
            count += many
        blocks.append((mean, total, count))
    return np.concatenate([np.full(count, mean) for mean, _, count in blocks])


def calibration_error(probabilities: np.ndarray, relevant: np.ndarray) -> float:
    """Return the expected calibration error over bins of equally many hits; 0.0 without hits."""
    if not len(probabilities):
        return 0.0
    order = np.argsort(probabilities, kind="stable")
    error = 0.0
    for part in np.array_split(order, ECE_BINS):
        if len(part):
            error += len(part) * abs(float(probabilities[part].mean() - relevant[part].mean()))
    return error / len(order)
