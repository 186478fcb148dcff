"""A gate that answers nothing to queries which are like nothing that is known.

No threshold on hits does that: random letters share n-grams with some text, and some known query is
always the nearest. A query is taken for nonsense where the nearest known query is far and no text
shares much of its words.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from index_builder.fusion.probability import MIN_QUERIES

MOST_HITS_LOST = 0.015
"""Share of the relevant hits of calibration queries that a fit may lose."""
NO_NEIGHBOUR = -1.0
"""Cosine of the nearest known query where none is known."""
_COSINES = 200
"""Thresholds of the cosine that are tried."""
_DECIMALS = 1e6


class GateMeasure(NamedTuple):
    """What a gate does to queries that it was not fitted on."""

    nonsense_emptied: float
    """Share of the nonsense queries that get no answer."""
    hits_lost: float
    """Share of the relevant hits of real queries that go with it."""


class QueryGate(NamedTuple):
    """Thresholds; a query below both is taken for nonsense."""

    min_cosine: float
    """Of the nearest known query."""
    min_share: float
    """Of the best BM25 as a share of the highest it could be."""
    measure: GateMeasure = GateMeasure(0.0, 0.0)

    def empties(self, signals: np.ndarray) -> np.ndarray:
        """Return which queries get no answer, bool ``(Q,)``.

        Args:
            signals: float ``(Q, 2)``: cosine of the nearest known query, best lexical share.
        """
        return np.asarray((signals < (self.min_cosine, self.min_share)).all(axis=1))


class GateCases(NamedTuple):
    """Real queries and nonsense, as a gate sees them."""

    asked: np.ndarray
    """float ``(Q, 2)``, signals of real queries."""
    hits: np.ndarray
    """float ``(Q,)``, relevant entities among the best ten of each."""
    nonsense: np.ndarray
    """float ``(M, 2)``, signals of nonsense."""

    def half(self, number: int) -> GateCases:
        """Return every second case, from ``number`` (0 or 1)."""
        return GateCases(self.asked[number::2], self.hits[number::2], self.nonsense[number::2])

    def counts(self, gate: QueryGate) -> tuple[float, float]:
        """Return the nonsense queries that a gate empties, and the hits lost."""
        emptied = gate.empties(self.nonsense).sum()
        return float(emptied), float(self.hits[gate.empties(self.asked)].sum())


def fit_gate(cases: GateCases) -> QueryGate | None:
    """Fit the gate that empties most nonsense at ``MOST_HITS_LOST``; None where queries are few.

    ``measure`` is taken across: each half of the cases by the gate of the other.
    """
    if len(cases.asked) < MIN_QUERIES or len(cases.nonsense) < MIN_QUERIES or not cases.hits.any():
        return None
    halves = [cases.half(0), cases.half(1)]
    counts = [halves[1 - number].counts(_best_gate(half)) for number, half in enumerate(halves)]
    emptied, lost = np.sum(counts, axis=0)
    measure = GateMeasure(
        nonsense_emptied=round(float(emptied) / len(cases.nonsense), 6),
        hits_lost=round(float(lost) / float(cases.hits.sum()), 6),
    )
    return _best_gate(cases)._replace(measure=measure)


def _best_gate(cases: GateCases) -> QueryGate:
    """Return the gate with most nonsense emptied; of equals the one that loses fewest hits."""
    cosines = _just_above(np.quantile(cases.nonsense[:, 0], np.linspace(0, 1, _COSINES)))
    best, most = QueryGate(NO_NEIGHBOUR, 0.0), (0.0, 0.0)
    for cosine in np.unique(cosines).tolist():
        gate = QueryGate(cosine, _highest_share(cases, cosine))
        emptied, lost = cases.counts(gate)
        if (emptied, -lost) > most:
            best, most = gate, (emptied, -lost)
    return best


def _highest_share(cases: GateCases, cosine: float) -> float:
    """Return the threshold of the lexical share that the bound on lost hits allows.

    It is no higher than the nonsense needs.
    """
    below = cases.asked[:, 0] < cosine
    order = np.argsort(cases.asked[below, 1], kind="stable")
    shares, hits = cases.asked[below, 1][order], cases.hits[below][order]
    too_many = np.cumsum(hits) > MOST_HITS_LOST * cases.hits.sum()
    highest = float(shares[np.argmax(too_many)]) if too_many.any() else np.inf
    needed = _just_above(cases.nonsense[cases.nonsense[:, 0] < cosine, 1])
    return float(needed[needed <= highest].max(initial=0.0))


def _just_above(values: np.ndarray) -> np.ndarray:
    """Return the next numbers of six decimals above ``values``."""
    return np.asarray(np.floor(values * _DECIMALS + 1) / _DECIMALS)
