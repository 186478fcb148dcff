"""What a search may ask for and what it answers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

if TYPE_CHECKING:
    from index_builder.search.live_segments import LiveView

MAX_K = 10_000


class SearchOptions(TypedDict, total=False):
    """What a search may ask for beside its query and k, as keyword arguments."""

    ef: int | None
    """Candidate-list size; chosen from the calibrated curve when not given."""
    min_recall: float | None
    """Expected ANN recall to reach; the search is exact where no measured plan reaches it."""
    filter: str | None
    """Expression over attributes, see ``index_builder.filters.selection``."""
    exclude_ids: Collection[str]
    """Ids never to return."""
    min_score: float | None
    """Return only scores at or above it, but for rounding (2e-6)."""
    exact: bool
    """Whether to score everything."""
    live: LiveView | EllipsisType | None
    """Live entries of another moment (``EntityIndex.live`` then) instead of the current ones."""


OPTION_NAMES = frozenset(SearchOptions.__annotations__)


class FusedScores(NamedTuple):
    """Scores of a fused answer, beside its cosines."""

    scores: np.ndarray
    """float32 ``(n,)``, by which the answer is ordered."""
    legs: np.ndarray
    """float32 ``(n, 3)``: cosine, lexical share, share of votes."""
    used: tuple[str, ...]
    """Names of the legs that took part."""
    probabilities: np.ndarray | None = None
    """float32 ``(n,)`` that each is relevant; None where these weights were not calibrated."""


@dataclass(slots=True)
class SearchResult:
    """Answers of one search, best first.

    Attributes:
        ids: Entity ids; fewer than k only when fewer entities match.
        scores: float32, their inner products with the query.
        plan: ``graph``, ``exact`` (every row in float32), ``scan`` (matching rows by codes, then
            all that these leave possible in float32), ``exact-scan`` (matching rows in float32),
            ``sketch`` (all rows' sketches), ``filtered-graph``, ``live`` or ``empty``.
        ef: Candidate-list size of the graph search; 0 where no graph was walked.
        estimated_recall: Expected ANN recall at k: 1.0 where the answer is exact by construction,
            else what was measured of the plan, under the worst of several kinds of filters; None
            where nothing was measured.
        selectivity: Share of base rows that pass the filter; None without a filter.
        fused: Of a fused answer (plan ``fused``); None where vectors alone decide.
    """

    ids: list[str]
    scores: np.ndarray
    plan: str
    ef: int
    estimated_recall: float | None
    selectivity: float | None
    fused: FusedScores | None = None
