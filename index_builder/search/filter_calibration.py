"""Calibration under filters: recall of each plan when rows are left out, by how they were chosen.

A filter may go with the query (it passes what is nearest to it), against it (what is farthest),
stand apart from both (what is near to another entity, as categories are), or be independent. Each
family is measured at several selectivities, and the worst counts, so that a request's own filter is
hardly ever harder than what its estimate rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from index_builder.search.calibration import TIE, CurvePoint, K, mean_interval
from index_builder.storage.corpus import Corpus

FAMILIES = ("with", "against", "apart", "independent")
SKETCH_GRID = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SKETCH_SHARES = (0.5, 0.2, 0.08)
"""Selectivities of scans of sketches; stricter filters are scanned by codes."""
GRAPH_GRID = (20, 40, 80, 160, 320, 640, 1280)
GRAPH_SHARES = (0.95, 0.5, 0.25)
"""Selectivities of walks under a filter where sketches or codes take what is stricter."""
HIDDEN_SHARES = (0.8,)
"""Share of rows that live deletes and updates leave; more may be left, not fewer."""
FILTER_QUERIES = 400
"""Queries of each family: enough for a lower bound of 0.99."""
_PILOT_CASES = 24 * len(FAMILIES)
"""Cases that find which settings are worth measuring."""
_PILOT_RANGE = (0.85, 0.995)
"""Mean recalls between which a setting is worth measuring."""
_FEWEST_ANSWERS = 20
_FEWEST_ROWS = 10 * K
_CHUNK = 16
_SAMPLE = 2_000
_HIGH = 0.99
"""Quantile of a sample above which the best are looked for."""

MaskedSearch = Callable[[np.ndarray, int, int, np.ndarray], np.ndarray | None]
"""``(query (1, D), k, setting, mask (N,)) -> inner products``, best first.

None where this plan does not answer and another one does.
"""


class FilterCurves(NamedTuple):
    """What was measured of one index under filters, by plan; empty where a plan cannot be used."""

    sketch: tuple[CurvePoint, ...]
    """By the number of sketches scored by their codes."""
    graph: tuple[CurvePoint, ...]
    """By ef without a filter; a walk widens it."""
    hidden: tuple[CurvePoint, ...]
    """By ef, with rows hidden by live writes and no filter."""


class _Case(NamedTuple):
    """A query under one filter."""

    query: np.ndarray
    """float32 ``(1, D)``."""
    mask: np.ndarray
    """bool ``(N,)``, rows that pass."""
    kth: float
    """Score of the k-th best of these."""
    cell: tuple[str, float]
    """Family and selectivity."""


def calibrate_filters(
    search: MaskedSearch,
    corpus: Corpus,
    queries: np.ndarray,
    shares: Sequence[float],
    grid: Sequence[int],
) -> tuple[CurvePoint, ...]:
    """Measure a plan at each useful setting; every figure is of its worst filters.

    The lower bound is that of the worst family, over all its selectivities, and no higher than the
    lowest mean of one family at one selectivity, which is the recall of a point.

    Args:
        search: The plan.
        corpus: Vectors, and which rows share them.
        queries: float32 ``(Q, D)``; the first 400 are used.
        shares: Selectivities, which take turns from query to query.
        grid: Settings tried, ascending.
    """
    cases = _cases(corpus, queries[:FILTER_QUERIES], shares)
    pilot = list(islice(cases, _PILOT_CASES))
    useful: list[int] = []
    for setting in grid:
        point = _worst(search, pilot, [setting])
        if point and point[0].recall < _PILOT_RANGE[0]:
            useful.clear()
        useful.append(setting)
        if point and point[0].recall >= _PILOT_RANGE[1]:
            break
    return _worst(search, chain(pilot, cases), useful)


def _worst(
    search: MaskedSearch, cases: Iterable[_Case], settings: Sequence[int]
) -> tuple[CurvePoint, ...]:
    """Measure each setting over the cases; one that hardly answers any gives no point."""
    cells: list[tuple[str, float]] = []
    found: list[list[float]] = []
    for case in cases:
        cells.append(case.cell)
        found.append(
            [_recall(search(case.query, K, setting, case.mask), case.kth) for setting in settings]
        )
    points = []
    for setting, column in zip(settings, np.array(found).reshape(-1, len(settings)).T):
        families = _answered([family for family, _ in cells], column, _FEWEST_ANSWERS)
        means = [float(np.mean(part)) for part in _answered(cells, column, _FEWEST_ANSWERS // 2)]
        if families and means:
            _, low, high = (min(of) for of in zip(*map(mean_interval, families)))
            mean = round(min(means), 5)
            points.append(CurvePoint(setting, mean, min(round(low, 5), mean), round(high, 5)))
    return tuple(points)


def _answered(groups: Sequence[Any], column: np.ndarray, fewest: int) -> list[np.ndarray]:
    """Return the recalls of each group that has enough of them; NaN is no answer."""
    members: dict[Any, list[float]] = {}
    for group, recall in zip(groups, column.tolist()):
        if recall == recall:
            members.setdefault(group, []).append(recall)
    largest = max((len(recalls) for recalls in members.values()), default=0)
    return [np.array(r) for r in members.values() if len(r) >= min(fewest, max(1, largest // 2))]


def _recall(found: np.ndarray | None, kth: float) -> float:
    """Return the share of the k best found; NaN where the plan did not answer."""
    return np.nan if found is None else float(np.count_nonzero(found >= kth - TIE)) / K


def _cases(corpus: Corpus, queries: np.ndarray, shares: Sequence[float]) -> Iterator[_Case]:
    """Give every query a filter of each family; selectivities take turns."""
    vectors, rows = corpus.vectors, corpus.node_of_row
    number = 0
    rng = np.random.default_rng(0)
    for start in range(0, len(queries), _CHUNK):
        chunk = np.ascontiguousarray(queries[start : start + _CHUNK])
        others = np.sort(rng.integers(len(vectors), size=len(chunk)))
        near = chunk @ vectors.T  # (B, D) @ (D, U) -> (B, U)
        apart = vectors[others] @ vectors.T
        for query, scores, elsewhere in zip(chunk, near, apart):
            if rows is not None:
                scores, elsewhere = scores[rows], elsewhere[rows]
            share = shares[number % len(shares)]
            number += 1
            for family in FAMILIES:
                mask = _mask(family, share, scores, elsewhere, rng)
                visible = scores[mask]
                if len(visible) >= _FEWEST_ROWS:
                    yield _Case(query[None], mask, _kth_best(visible), (family, share))


def _mask(
    family: str,
    share: float,
    scores: np.ndarray,
    elsewhere: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Make a filter that about ``share`` of the rows pass."""
    mask: np.ndarray
    if family == "independent":
        mask = rng.random(len(scores)) < share
    elif family == "against":
        mask = scores <= _quantile(scores, share)
    else:
        by = scores if family == "with" else elsewhere
        mask = by >= _quantile(by, 1 - share)
    return mask


def _quantile(values: np.ndarray, share: float) -> float:
    """Return about the value that ``share`` of the values are below, from a sample of them."""
    sample = values[:: max(1, len(values) // _SAMPLE)]
    place = min(int(share * len(sample)), len(sample) - 1)
    return float(np.partition(sample, place)[place])


def _kth_best(values: np.ndarray) -> float:
    """Return the k-th highest of at least k values, exactly."""
    high = values[values >= _quantile(values, _HIGH)]
    if len(high) < K:
        high = values
    return float(np.partition(high, len(high) - K)[len(high) - K])
