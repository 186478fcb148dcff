"""Calibration: the ef -> ANN recall@k and latency curve over real queries, and the gate on it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from encoders.errors import ConfigError
from encoders.exact_search import exact_top_k
from index_builder.errors import GateFailed

TARGETS = (0.90, 0.95, 0.99)
MIN_QUERIES = 2_000
K = 10
"""Depth of the recall that targets and gates are about."""
DEEP_K = 100
"""Second depth, for requests with larger k."""
DEEP_QUERIES = 500
"""How many queries the second depth rests on."""
EF_GRID = (10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 448, 640, 896, 1280, 1792, 2560)
STOP_RECALL = 0.9995
"""Lower bound of the recall at which larger settings are no longer tried."""
TIE = 1e-6
"""Inner products closer than this are ties: either entity is a right answer."""
_EXACT_RUNS = 20

Search = Callable[[np.ndarray, int, int], np.ndarray]
"""``(query (1, D), k, ef) -> rows``."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Mean ANN recall@k at one ef, with its 95% interval over queries, and the time of one call.

    Attributes:
        ef: Candidate-list size.
        recall: Mean share of the exact top k returned.
        low: Lower end of the interval.
        high: Upper end.
        latency_us: Median time of one search on one thread, microseconds (kept apart from the rest:
            it differs from run to run).
        latency_p95_us: 95th percentile.
    """

    ef: int
    recall: float
    low: float
    high: float
    latency_us: float | None = None
    latency_p95_us: float | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on one index.

    Attributes:
        queries: How many queries the curve rests on.
        source: ``real queries`` or ``perturbed entities``: never read one as the other.
        k: Depth of the recall.
        points: By ascending ef.
        deep_k: A second depth, for requests with larger k.
        deep_points: The same at ``deep_k``; may be empty.
        exact_latency_us: Mean time of an exact scan, microseconds.
        families: Kinds of filters that the following three were measured under, each at several
            selectivities, the worst of all at each point (see ``filter_calibration``). Empty where
            they were not: an early release has ``sketch_points`` of another measure.
        sketch_points: Recall@k of the scan of sketches; ``ef`` is how many of the best sketches are
            scored by their codes.
        filtered_points: Recall@k of the walk under a filter.
        hidden_points: Recall@k beside rows that live writes hide.
    """

    queries: int
    source: str
    k: int
    points: tuple[CurvePoint, ...]
    deep_k: int = 0
    deep_points: tuple[CurvePoint, ...] = ()
    exact_latency_us: float | None = None
    sketch_points: tuple[CurvePoint, ...] = ()
    families: tuple[str, ...] = ()
    filtered_points: tuple[CurvePoint, ...] = ()
    hidden_points: tuple[CurvePoint, ...] = ()

    def knows_depth(self, k: int) -> bool:
        """Return whether recall at depth ``k`` was measured, or lies between depths that were."""
        return k <= max(self.k, self.deep_k)

    def sketches_for(self, target: float) -> int | None:
        """Return how many sketches to score for a recall whose lower bound is ``target``.

        None if it is reached by no number that was measured; in an early release, the most then.
        """
        points = self.sketch_points
        reached = _ef_for(points, target)
        if reached is None and points and not self.families:
            return points[-1].ef
        return reached

    def sketch_recall_at(self, sketches: int) -> float | None:
        """Return the measured recall of the scan of sketches, interpolated."""
        return _measured_at(self.sketch_points, sketches)

    def filtered_ef_for(self, target: float) -> int | None:
        """Return the smallest ef of a walk under a filter for a lower bound of ``target``."""
        return _ef_for(self.filtered_points, target)

    def filtered_recall_at(self, ef: int) -> float | None:
        """Return the measured recall of the walk under a filter, interpolated."""
        return _measured_at(self.filtered_points, ef)

    def hidden_ef_for(self, target: float, k: int, plain_ef: int) -> int | None:
        """Return the smallest ef for a target while live writes hide rows.

        None if no ef reaches it; ``plain_ef``, that of depth ``k``, where this was not measured.
        """
        if not self.hidden_points:
            return plain_ef
        reached = _ef_for(self.hidden_points, target)
        if reached is None or k <= self.k:
            return None if reached is None else max(reached, plain_ef)
        shallow = self.ef_for(target)
        assert shallow is not None, "depth k is reached, so depth 10 is"
        return int(np.ceil(plain_ef * max(1.0, reached / shallow)))

    def hidden_recall_at(self, ef: int, k: int) -> float | None:
        """Return the lower of the recalls measured at ``ef`` with and without hidden rows."""
        hidden, plain = _measured_at(self.hidden_points, ef), self.recall_at(ef, k)
        return None if hidden is None or plain is None else min(hidden, plain)

    def ef_for(self, target: float, k: int | None = None) -> int | None:
        """Return the smallest measured or interpolated ef for a target at depth ``k``.

        The lower bound of the recall has to reach it; None if it does at no ef.
        """
        k = self.k if k is None else k
        base = _ef_for(self.points, target)
        if base is None:
            return None
        if k <= self.k:
            return base
        if not self.deep_points:
            return max(k, int(np.ceil(base + 2.0 * (k - self.k))))
        deep = _ef_for(self.deep_points, target)
        if deep is None:
            return None
        share = (k - self.k) / (self.deep_k - self.k)  # also extrapolates beyond deep_k
        return max(k, base, int(np.ceil(base + share * (deep - base))))

    def recall_at(self, ef: int, k: int | None = None) -> float | None:
        """Return the expected recall at ``ef`` and depth ``k``, interpolated; None: unmeasured."""
        k = self.k if k is None else k
        if not self.knows_depth(k):
            return None
        shallow = _recall_at(self.points, ef)
        if shallow is None or k <= self.k:
            return shallow
        deep = _recall_at(self.deep_points, ef)
        assert deep is not None, "deep points are not empty"
        share = min(1.0, (k - self.k) / (self.deep_k - self.k))
        return shallow + share * (min(deep, shallow) - shallow)

    def settings(self) -> dict[str, int | None]:
        """Return ef for each target recall."""
        return {f"{target:.2f}": self.ef_for(target) for target in TARGETS}

    def as_dict(self, *, latencies: bool = True) -> dict[str, Any]:
        """Return JSON for the manifest; without ``latencies`` a build always gives the same."""
        times = ("latency_us", "latency_p95_us")

        def rows(points: Sequence[CurvePoint]) -> list[dict[str, Any]]:
            return [
                {name: value for name, value in asdict(p).items() if latencies or name not in times}
                for p in points
            ]

        result: dict[str, Any] = {
            "queries": self.queries,
            "source": self.source,
            "k": self.k,
            "settings": self.settings(),
            "points": rows(self.points),
            "deep_k": self.deep_k,
            "deep_points": rows(self.deep_points),
            "sketch_points": rows(self.sketch_points),
            "families": list(self.families),
            "filtered_points": rows(self.filtered_points),
            "hidden_points": rows(self.hidden_points),
        }
        return result | ({"exact_latency_us": self.exact_latency_us} if latencies else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """Read what ``as_dict`` wrote."""
        return cls(
            queries=values["queries"],
            source=values["source"],
            k=values["k"],
            points=tuple(CurvePoint(**p) for p in values["points"]),
            deep_k=values.get("deep_k", 0),
            deep_points=tuple(CurvePoint(**p) for p in values.get("deep_points", ())),
            exact_latency_us=values.get("exact_latency_us"),
            sketch_points=tuple(CurvePoint(**p) for p in values.get("sketch_points", ())),
            families=tuple(values.get("families", ())),
            filtered_points=tuple(CurvePoint(**p) for p in values.get("filtered_points", ())),
            hidden_points=tuple(CurvePoint(**p) for p in values.get("hidden_points", ())),
        )


def _ef_for(points: Sequence[CurvePoint], target: float) -> int | None:
    for i, point in enumerate(points):
        if point.low >= target:
            if i == 0:
                return point.ef
            before = points[i - 1]
            share = (target - before.low) / max(point.low - before.low, 1e-9)
            return min(point.ef, int(np.ceil(before.ef + share * (point.ef - before.ef) - 1e-6)))
    return None


def _recall_at(points: Sequence[CurvePoint], ef: int) -> float | None:
    if not points:
        return None
    at = bisect_left([p.ef for p in points], ef)
    if at == len(points):
        return points[-1].recall
    if at == 0 or points[at].ef == ef:
        return points[at].recall
    before, after = points[at - 1], points[at]
    return before.recall + (ef - before.ef) / (after.ef - before.ef) * (
        after.recall - before.recall
    )


def _measured_at(points: Sequence[CurvePoint], setting: int) -> float | None:
    """Return the recall at a setting; None below those that were measured."""
    return None if not points or setting < points[0].ef else _recall_at(points, setting)


def recall_per_query(
    found: Sequence[np.ndarray], queries: np.ndarray, vectors: np.ndarray, exact_scores: np.ndarray
) -> np.ndarray:
    """Return ANN recall@k of each query: the share of the exact top k found, ties included.

    Args:
        found: Rows returned per query, without repetition.
        queries: float32 ``(Q, D)``.
        vectors: float32 ``(N, D)``; scores are recomputed from them, never taken from the index.
        exact_scores: float32 ``(Q, k)`` of the exact top k, best first.
    """
    k = exact_scores.shape[1]
    result = np.empty(len(queries))
    for i, rows in enumerate(found):
        scores = vectors[np.asarray(rows[:k], dtype=np.int64)] @ queries[i]  # (k, D) @ (D,) -> (k,)
        result[i] = np.count_nonzero(scores >= exact_scores[i, -1] - TIE) / k
    return result


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean and its 95% interval over queries.

    The normal interval of the mean, but never narrower below than Wilson's for that many queries
    all of which succeeded, so that a perfect sample does not claim certainty.
    """
    n = len(values)
    mean = float(np.mean(values))
    half = 1.96 * float(np.std(values, ddof=1)) / np.sqrt(n) if n > 1 else 1.0
    low = min(mean - half, 1.0 - 1.96**2 / (n + 1.96**2)) if half == 0.0 else mean - half
    return mean, max(0.0, float(low)), min(1.0, mean + float(half))


def calibrate(
    search: Search,
    vectors: np.ndarray,
    queries: np.ndarray,
    *,
    source: str,
    ef_grid: Sequence[int] = EF_GRID,
) -> Calibration:
    """Measure recall and latency of an index at two depths.

    Args:
        search: The call that is measured and timed.
        vectors: float32 ``(N, D)``, what the rows are rows of.
        queries: float32 ``(Q, D)``; not those whose recall is reported elsewhere.
        source: ``real queries`` or ``perturbed entities``.
        ef_grid: Settings tried, ascending, until the lower bound of the recall passes 0.9995 or
            every query is answered in full.

    Raises:
        ConfigError: There are no queries.
    """
    if len(queries) == 0:
        raise ConfigError(
            "calibration needs at least one query, but got none. Give golden queries, or let"
            " perturbed entities stand in."
        )
    k = min(K, len(vectors))
    deep_k = DEEP_K if len(vectors) > 2 * DEEP_K > 2 * k else 0
    deep_queries = queries[:DEEP_QUERIES] if deep_k else queries[:0]
    _, deep_scores = exact_top_k(deep_queries, vectors, max(deep_k, k))
    _, scores = exact_top_k(queries[len(deep_queries) :], vectors, k)
    scores = np.concatenate([deep_scores[:, :k], scores])
    exact_latency = _exact_latency_us(vectors, queries)
    points = _curve(search, vectors, queries, scores, ef_grid)
    deep_points: tuple[CurvePoint, ...] = ()
    if deep_k:
        deep_grid = [ef for ef in ef_grid if ef >= DEEP_K]
        deep_points = _curve(search, vectors, deep_queries, deep_scores, deep_grid)
    return Calibration(len(queries), source, k, points, deep_k, deep_points, exact_latency)


def _exact_latency_us(vectors: np.ndarray, queries: np.ndarray) -> float:
    """Return the mean time of an exact scan, microseconds."""
    runs = min(_EXACT_RUNS, len(queries))
    start = time.perf_counter_ns()
    for i in range(runs):
        _ = vectors @ queries[i]
    return round((time.perf_counter_ns() - start) / 1000 / runs, 1)


def _curve(
    search: Search,
    vectors: np.ndarray,
    queries: np.ndarray,
    scores: np.ndarray,
    ef_grid: Sequence[int],
) -> tuple[CurvePoint, ...]:
    """Measure each ef that is at least k; ``scores`` float32 ``(Q, k)`` of the exact top k."""
    k = scores.shape[1]
    points: list[CurvePoint] = []
    for ef in [ef for ef in ef_grid if ef >= k] or [k]:
        found: list[np.ndarray] = []
        times = np.empty(len(queries))
        for i in range(len(queries)):
            start = time.perf_counter_ns()
            found.append(search(queries[i : i + 1], k, ef))
            times[i] = time.perf_counter_ns() - start
        recalls = recall_per_query(found, queries, vectors, scores)
        mean, low, high = (round(value, 5) for value in mean_interval(recalls))
        median, p95 = (round(float(t) / 1000, 1) for t in np.percentile(times, (50, 95)))
        points.append(CurvePoint(ef, mean, low, high, median, p95))
        if low >= STOP_RECALL or recalls.min() == 1.0:  # nothing is left to find
            break
    return tuple(points)


def latency_at_recall(
    search: Search, vectors: np.ndarray, queries: np.ndarray, scores: np.ndarray, target: float
) -> float | None:
    """Return the median microseconds of one search at a mean recall of ``target``.

    Interpolated over ``ef``; None where no setting reaches the target.

    Args: as ``calibrate``; ``scores`` float32 ``(Q, k)`` of the exact top k.
    """
    before: CurvePoint | None = None
    for ef in EF_GRID:
        (point,) = _curve(search, vectors, queries, scores, [ef])
        latency = float(point.latency_us or 0.0)
        if point.recall < target:
            before = point
            continue
        if before is None:
            return latency
        share = (target - before.recall) / max(point.recall - before.recall, 1e-9)
        latency_before = float(before.latency_us or 0.0)
        return latency_before + share * (latency - latency_before)
    return None


def check_gate(calibration: Calibration, target: float, what: str) -> None:
    """Refuse an index whose lower 95% bound misses ``target`` at every ef that was tried.

    The plans of filters and live entries need no such gate: each is used where its own measured
    curve reaches the target, and a scan whose answers are exact stands in where it does not.

    Raises:
        GateFailed: With the best recall seen and what to raise.
    """
    if calibration.ef_for(target) is not None:
        return
    best = max(calibration.points, key=lambda p: p.low)
    few = ""
    if best.recall >= target or calibration.queries < MIN_QUERIES:
        few = f" The interval rests on {calibration.queries:,} queries: more queries narrow it."
    raise GateFailed(
        f"{what}: ANN recall@{calibration.k} = {best.recall:.4f} (95% interval"
        f" {best.low:.4f}-{best.high:.4f}, {calibration.source}) at ef {best.ef}, and its lower"
        f" bound is below the target {target:.2f}; nothing was published. Raise --ef-construction"
        f" (400), --m (32) or --degree (64), or choose --index hnsw.{few}"
    )
