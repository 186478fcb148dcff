"""Weights of the legs: fitted on calibration queries, kept only where they are proved to help."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from encoders.evaluation.metrics import QuerySums, paired_difference
from index_builder.errors import IndexFormatError
from index_builder.fusion.probability import (
    MIN_QUERIES,
    NO_CURVE,
    ProbabilityCurve,
    calibration_error,
    fit_probability,
)
from index_builder.fusion.query_gate import (
    NO_NEIGHBOUR,
    GateCases,
    GateMeasure,
    QueryGate,
    fit_gate,
)

FUSION_FILE = "fusion.json"
FUSION_FORMAT = 1
LEGS = ("dense", "lexical", "votes")
"""Order of the legs in every array: cosine; share of the highest BM25; share of the votes."""
STEPS = 20
"""Weights are tried in steps of one part of this, on legs brought to one spread."""
RECALL_K = 10


class CalibrationCase(NamedTuple):
    """The candidates of one calibration query."""

    scores: np.ndarray
    """float32 ``(C, 3)``, in the order of ``LEGS``."""
    relevant: np.ndarray
    """bool ``(C,)``."""
    positives: int
    """Relevant entities of the query, those included that are no candidates."""
    nearest: float = NO_NEIGHBOUR
    """Cosine of the nearest known query."""
    is_cold: np.ndarray | None = None
    """bool ``(C,)``: no known query led to these; None: to all of them one did."""

    @property
    def gate_signals(self) -> tuple[float, float]:
        """What a query gate looks at: cosine of the nearest known query, best lexical share."""
        return self.nearest, float(self.scores[:, 1].max(initial=0.0))


class FusedRecall(NamedTuple):
    """Share of the fused answer over exact legs that is returned by default, at one depth."""

    k: int
    recall: float
    low: float
    """Lower end of its 95% interval over queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fusion:
    """How the legs of one entity type are added, and what that was fitted on and gained.

    Attributes:
        weights: One a leg, in the order of ``LEGS``; the fused score is their sum of products.
        enabled: Whether answers are fused when a call does not say: fused is better than dense
            beyond the interval.
        queries: Calibration queries.
        pairs: Relevant entities of them.
        dense_recall: Labelled Recall@10 of the dense leg alone.
        fused_recall: The same, fused, each half of the queries with weights fitted on the other.
        gain: Fused less dense.
        gain_low: Lower end of its 95% interval.
        gain_high: Upper end.
        fitted_on: What the queries are.
        probability: From fused scores by these weights to the probability that a hit is relevant.
        probability_error: Its expected calibration error on queries that it was not fitted on.
        cold_votes: From the cosine of an entity to which no known query led to the share of votes
            that it is given: what others of that cosine get on average.
        gate: Takes queries for nonsense, where a call or the server asks for it; None: not fitted.
        recall: Of answers by these weights without a filter, by ascending depth; empty: unmeasured.
    """

    weights: tuple[float, float, float]
    enabled: bool
    queries: int
    pairs: int
    dense_recall: float
    fused_recall: float
    gain: float
    gain_low: float
    gain_high: float
    fitted_on: str
    probability: ProbabilityCurve = NO_CURVE
    probability_error: float = 0.0
    cold_votes: ProbabilityCurve = NO_CURVE
    gate: QueryGate | None = None
    recall: tuple[FusedRecall, ...] = ()

    def __str__(self) -> str:
        """Say the weights and what they gain."""
        weights = ", ".join(f"{leg} {w:.3g}" for leg, w in zip(LEGS, self.weights, strict=True))
        if not self.queries:
            return f"fusion {'on' if self.enabled else 'off'} ({weights}), by weights as given"
        return (
            f"fusion {'on' if self.enabled else 'off'} ({weights}): Recall@10"
            f" {self.dense_recall:.3f} -> {self.fused_recall:.3f}, {self.gain:+.3f}"
            f" [{self.gain_low:+.3f}, {self.gain_high:+.3f}] on {self.queries:,} queries"
        )

    def describe(self) -> dict[str, Any]:
        """Return the facts for the manifest."""
        facts = {**asdict(self), "weights": dict(zip(LEGS, self.weights, strict=True))}
        recall = [point._asdict() for point in self.recall]
        is_calibrated = bool(self.probability)
        return {
            **facts,
            "probability": is_calibrated,
            "cold_votes": bool(self.cold_votes),
            "gate": self._gate_values(),
            "recall": recall,
        }

    def _gate_values(self) -> dict[str, float] | None:
        """Return the gate's thresholds and what it was measured to do; None without a gate."""
        if self.gate is None:
            return None
        thresholds = {"min_cosine": self.gate.min_cosine, "min_share": self.gate.min_share}
        return {**thresholds, **self.gate.measure._asdict()}

    def save(self, folder: Path) -> None:
        """Write ``fusion.json``; the same weights give the same bytes."""
        values = {
            "format": FUSION_FORMAT,
            "legs": LEGS,
            **asdict(self),
            "probability": self.probability._asdict(),
            "cold_votes": self.cold_votes._asdict(),
            "gate": self._gate_values(),
            "recall": [point._asdict() for point in self.recall],
        }
        text = json.dumps(values, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        (folder / FUSION_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Fusion:
        """Read what ``save`` wrote.

        Raises:
            IndexFormatError: It is damaged or of another version.
        """
        where = f"{folder.name}/{FUSION_FILE}"
        try:
            values = json.loads((folder / FUSION_FILE).read_text(encoding="utf-8"))
            form, legs = values.pop("format"), tuple(values.pop("legs"))
            weights = tuple(float(weight) for weight in values.pop("weights"))
            if (form, legs, len(weights)) != (FUSION_FORMAT, LEGS, len(LEGS)):
                raise IndexFormatError(f"{where}: unknown format {form} or legs {legs}. Rebuild.")
            if not all(0 <= weight < math.inf for weight in weights):
                raise IndexFormatError(f"{where}: weights must be 0 or more, but got {weights}.")
            checked: dict[str, Any] = {
                "weights": weights,
                "probability": _curve(values.pop("probability")),
                "cold_votes": _curve(values.pop("cold_votes", NO_CURVE._asdict())),
                "gate": _gate(values.pop("gate", None)),
                "recall": _recall(values.pop("recall", ())),
            }
            return cls(**checked, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise IndexFormatError(
                f"{where} cannot be read ({error!r}). Rebuild this release."
            ) from error


def given_fusion(weights: Sequence[float]) -> Fusion:
    """Take weights as they are: nothing is measured, and answers are fused by them.

    Args:
        weights: Of the legs, in the order of ``LEGS``; those left out are 0.
    """
    dense, lexical, votes = (*weights, 0.0, 0.0)[: len(LEGS)]
    return Fusion(
        weights=(dense, lexical, votes),
        enabled=True,
        queries=0,
        pairs=0,
        dense_recall=0.0,
        fused_recall=0.0,
        gain=0.0,
        gain_low=0.0,
        gain_high=0.0,
        fitted_on="nothing: given",
    )


def _curve(values: dict[str, list[float]]) -> ProbabilityCurve:
    """Check a curve.

    Raises:
        ValueError: Scores do not rise, or values fall or leave 0 to 1.
    """
    scores, shares = np.array(values["scores"], float), np.array(values["values"], float)
    rises = bool((np.diff(scores) > 0).all()) and bool((np.diff(shares) >= 0).all())
    if len(scores) != len(shares) or not rises or not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError("the curve of probabilities does not rise from 0 to 1")
    return ProbabilityCurve(tuple(scores.tolist()), tuple(shares.tolist()))


def _gate(values: dict[str, float] | None) -> QueryGate | None:
    """Check a gate; files of older versions have none.

    Raises:
        ValueError: A number is not finite, or a share is not from 0 to 1.
    """
    if values is None:
        return None
    names = ("min_cosine", "min_share", "nonsense_emptied", "hits_lost")
    cosine, share, emptied, lost = (float(values[name]) for name in names)
    if not (
        math.isfinite(cosine) and math.isfinite(share) and 0 <= emptied <= 1 and 0 <= lost <= 1
    ):
        raise ValueError("the numbers of the query gate are out of range")
    return QueryGate(cosine, share, GateMeasure(emptied, lost))


def _recall(values: Sequence[dict[str, float]]) -> tuple[FusedRecall, ...]:
    """Check the measured recall; files of older versions have none.

    Raises:
        ValueError: Depths do not rise, or a share is not from 0 to 1.
    """
    points = tuple(
        FusedRecall(int(point["k"]), float(point["recall"]), float(point["low"]))
        for point in values
    )
    depths = [0, *(point.k for point in points)]
    rise = all(lower < higher for lower, higher in pairwise(depths))
    if not rise or not all(0 <= point.low <= point.recall <= 1 for point in points):
        raise ValueError("the measured recall of fused answers is out of range")
    return points


class _Cases(NamedTuple):
    """Calibration cases as padded arrays."""

    scores: np.ndarray
    """float32 ``(Q, C, 3)``."""
    is_there: np.ndarray
    """bool ``(Q, C)``."""
    relevant: np.ndarray
    """bool ``(Q, C)``."""
    positives: np.ndarray
    """float64 ``(Q,)``."""

    def part(self, chosen: np.ndarray) -> _Cases:
        return _Cases(*(array[chosen] for array in self))

    def best(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return fused scores and relevance of the ten best of each query, ``(Q, 10)``.

        The score is -inf where a query has fewer candidates.
        """
        fused = np.where(self.is_there, self.scores @ weights, -np.inf)  # (Q, C)
        width = min(RECALL_K, fused.shape[1])
        best = np.argpartition(-fused, width - 1, axis=1)[:, :width]
        return np.take_along_axis(fused, best, axis=1), np.take_along_axis(self.relevant, best, 1)

    def hits(self, weights: np.ndarray) -> np.ndarray:
        """Count the relevant entities among the ten best of each query, float64 ``(Q,)``."""
        return np.asarray(self.best(weights)[1].sum(axis=1), np.float64)


def fit_fusion(
    cases: Sequence[CalibrationCase],
    fitted_on: str,
    pooled: Sequence[CalibrationCase] = (),
    nonsense: Sequence[CalibrationCase] = (),
) -> Fusion:
    """Fit the weights and the query gate of one entity type, and say whether they help.

    The gain is measured across: each half of the queries with the weights of the other.

    Args:
        cases: Calibration queries of the type; no leg may have seen them.
        fitted_on: What they are.
        pooled: Queries of a like type that help to choose the weights where there are few; the gain
            is that of ``cases`` alone.
        nonsense: Queries that nothing answers, for the gate.
    """
    cold_votes = _cold_votes(cases, pooled)
    own, more = _padded(_given(cases, cold_votes)), _padded(_given(pooled, cold_votes))
    spread = _spread(own if len(cases) else more)
    halves = np.arange(len(cases)) % 2
    fused = np.zeros(len(cases))
    for half in (0, 1):
        weights = _best_weights([own.part(halves != half), more], spread)
        fused[halves == half] = own.part(halves == half).hits(weights)
    dense = own.hits(np.array([1, 0, 0], np.float32))
    total = max(1.0, float(own.positives.sum()))
    difference = paired_difference(
        QuerySums(fused, own.positives), QuerySums(dense, own.positives)
    ).difference
    weights = _best_weights([own, more], spread)
    curve, error = _probability(own, weights, halves)
    low = float(difference.low)
    return Fusion(
        weights=(float(weights[0]), float(weights[1]), float(weights[2])),
        enabled=low > 0,
        queries=len(cases),
        pairs=int(own.positives.sum()),
        dense_recall=round(float(dense.sum()) / total, 6),
        fused_recall=round(float(fused.sum()) / total, 6),
        gain=round(float((fused - dense).sum()) / total, 6),
        gain_low=round(low, 6) if math.isfinite(low) else 0.0,
        gain_high=round(float(difference.high), 6) if math.isfinite(low) else 0.0,
        fitted_on=fitted_on,
        probability=curve,
        probability_error=round(error, 6),
        cold_votes=cold_votes,
        gate=fit_gate(GateCases(_signals(cases), own.hits(weights), _signals(nonsense))),
    )


def _cold_votes(
    cases: Sequence[CalibrationCase], pooled: Sequence[CalibrationCase]
) -> ProbabilityCurve:
    """Fit the share of votes on the cosine, over candidates to which a known query led.

    There is no curve where giving votes to cold candidates loses hits.
    """
    warm = [case.scores[_warm(case)] for case in cases or pooled]
    scores = np.concatenate(warm) if warm else np.zeros((0, len(LEGS)), np.float32)
    if not scores[:, 2].any():
        return NO_CURVE
    curve = fit_probability(scores[:, 0], scores[:, 2].clip(0, 1))
    if all(_warm(case).all() for case in (*cases, *pooled)):
        return curve
    found = [_most_hits(cases, pooled, each) for each in (curve, NO_CURVE)]
    return curve if found[0] >= found[1] else NO_CURVE


def _most_hits(
    cases: Sequence[CalibrationCase], pooled: Sequence[CalibrationCase], curve: ProbabilityCurve
) -> float:
    """Return the hits by the best weights when cold candidates are given votes by ``curve``."""
    own, more = _padded(_given(cases, curve)), _padded(_given(pooled, curve))
    weights = _best_weights([own, more], _spread(own if len(cases) else more))
    return float(own.hits(weights).sum() + more.hits(weights).sum())


def _warm(case: CalibrationCase) -> np.ndarray:
    return np.ones(len(case.scores), np.bool_) if case.is_cold is None else ~case.is_cold


def _given(cases: Sequence[CalibrationCase], curve: ProbabilityCurve) -> list[CalibrationCase]:
    """Return the cases with the votes that cold candidates are given."""
    given = []
    for case in cases:
        scores = case.scores
        if curve and case.is_cold is not None and case.nearest > NO_NEIGHBOUR:
            scores = with_cold_votes(scores, case.is_cold, curve)
        given.append(case._replace(scores=scores))
    return given


def with_cold_votes(scores: np.ndarray, is_cold: np.ndarray, curve: ProbabilityCurve) -> np.ndarray:
    """Return scores of candidates, float32 ``(C, 3)``, with votes for those that can have none.

    Without them an entity that is new would be behind all that ever got a vote.
    """
    scores = scores.copy()
    scores[is_cold, 2] = curve.of(scores[is_cold, 0])
    return scores


def _signals(cases: Sequence[CalibrationCase]) -> np.ndarray:
    """Return what a query gate sees of each query, float64 ``(Q, 2)``."""
    return np.array([case.gate_signals for case in cases], np.float64).reshape(-1, 2)


def _probability(
    cases: _Cases, weights: np.ndarray, halves: np.ndarray
) -> tuple[ProbabilityCurve, float]:
    """Fit the curve on all queries, and measure its error on either half by the other's curve."""
    if len(halves) < MIN_QUERIES:
        return NO_CURVE, 0.0
    scores, relevant = cases.best(weights)
    there = np.isfinite(scores)
    found = np.zeros(scores.shape, np.float32)
    for half in (0, 1):
        others = there & (halves != half)[:, None]
        mine = there & (halves == half)[:, None]
        found[mine] = fit_probability(scores[others], relevant[others]).of(scores[mine])
    curve = fit_probability(scores[there], relevant[there])
    return curve, calibration_error(found[there], relevant[there])


def _padded(cases: Sequence[CalibrationCase]) -> _Cases:
    width = max((len(case.scores) for case in cases), default=0) or 1
    scores = np.zeros((len(cases), width, len(LEGS)), np.float32)
    is_there = np.zeros((len(cases), width), np.bool_)
    relevant = np.zeros((len(cases), width), np.bool_)
    for number, case in enumerate(cases):
        count = len(case.scores)
        scores[number, :count] = case.scores
        is_there[number, :count] = True
        relevant[number, :count] = case.relevant
    positives = np.array([case.positives for case in cases], np.float64)
    return _Cases(scores, is_there, relevant, positives)


def _spread(cases: _Cases) -> np.ndarray:
    """Return the standard deviation of each leg over all candidates, float32 ``(3,)``."""
    scores = cases.scores[cases.is_there]
    deviation = scores.std(axis=0) if len(scores) else np.ones(len(LEGS))
    return np.where(deviation > 1e-9, deviation, 1.0).astype(np.float32)


def _best_weights(parts: Sequence[_Cases], spread: np.ndarray) -> np.ndarray:
    """Return the weights with most hits, of equals those nearest to dense alone; float32 ``(3,)``.

    They are in units of the legs themselves, the dense leg's being 1 unless it is 0.
    """
    best, most = np.array([1, 0, 0], np.float32), -1.0
    for dense, lexical in product(range(STEPS, -1, -1), range(STEPS + 1)):
        if dense + lexical > STEPS:
            continue
        weights = np.array([dense, lexical, STEPS - dense - lexical], np.float32) / spread
        found = sum(float(part.hits(weights).sum()) for part in parts if len(part.scores))
        if found > most:
            best, most = weights, found
    scale = best[0] if best[0] > 0 else best.max()
    return np.asarray((best / scale).round(6), np.float32)
