"""From the recall a request wants to the settings of its search, by the calibrated curves."""

from __future__ import annotations

from typing import NamedTuple

from index_builder.errors import InvalidQuery
from index_builder.search.calibration import Calibration
from index_builder.search.live_segments import SCAN_RECALL

_UNCALIBRATED_EF = 120
_UNCALIBRATED_SKETCHES = 1_024
_CACHED_CHOICES = 1_000
HIDDEN_SHARE = 0.2
"""Share of hidden rows up to which recall beside them was measured."""


class PlainSettings(NamedTuple):
    """How a search without a filter is made; a recall of None was not measured."""

    ef: int
    """Candidate-list size; 0: scan exactly."""
    recall: float | None
    """Expected at ``ef``."""
    hidden_ef: int
    """The same while live writes hide rows of the base."""
    hidden_recall: float | None
    target: float
    """What the request wants, or the index's default."""
    must_reach: bool = False
    """Whether the request named its target, so that an unmeasured plan will not do."""

    @property
    def exact_live(self) -> bool:
        """Whether live entries must all be scored in float32."""
        return self.ef == 0 or (self.must_reach and self.target > SCAN_RECALL)


class FilterSettings(NamedTuple):
    """Which plans a search under a filter may use; a recall of None was not measured.

    The scan by codes, whose answers are exact, stands in for a plan that is None.
    """

    sketches: int | None = None
    """How many of the best sketches are scored by their codes."""
    sketch_recall: float | None = None
    graph_ef: int | None = None
    """Candidate-list size of the walk without a filter; the walk widens it."""
    graph_recall: float | None = None


def check_min_recall(min_recall: float, ef: int | None) -> None:
    """Refuse a wanted recall that is none, or that an ``ef`` beside it would decide.

    Raises:
        InvalidQuery: It is out of range, or both are given.
    """
    if not 0.0 < min_recall <= 1.0:
        raise InvalidQuery(f"min_recall must be above 0 and at most 1, but got {min_recall}.")
    if ef is not None:
        raise InvalidQuery(
            f"expected ef or min_recall, but got both ({ef} and {min_recall}). Leave ef out: the"
            " measured curve chooses one that reaches min_recall."
        )


class SearchSettings:
    """The settings of one index; choices are cached."""

    def __init__(
        self, calibration: Calibration | None, default_recall: float, nodes: int, exact: bool
    ) -> None:
        self._calibration = calibration
        self._default_recall = default_recall
        self._nodes = nodes
        self._exact = exact
        self._plain: dict[tuple[int, int | None, float | None], PlainSettings] = {}
        self._filtered: dict[tuple[int, int | None, float | None], FilterSettings] = {}

    def choose(self, k: int, ef: int | None, min_recall: float | None) -> PlainSettings:
        """Return the settings of a search without a filter.

        Raises:
            InvalidQuery: ef or min_recall out of range.
        """
        chosen = self._plain.get((k, ef, min_recall))
        if chosen is None:
            chosen = self._chosen(k, ef, min_recall)
            if len(self._plain) > _CACHED_CHOICES:
                self._plain.clear()
            self._plain[k, ef, min_recall] = chosen
        return chosen

    def filtered(self, k: int, ef: int | None, min_recall: float | None) -> FilterSettings:
        """Return the plans that reach the same recall under a filter. Raises as ``choose``."""
        chosen = self._filtered.get((k, ef, min_recall))
        if chosen is None:
            chosen = self._under_filter(k, self.choose(k, ef, min_recall), ef)
            if len(self._filtered) > _CACHED_CHOICES:
                self._filtered.clear()
            self._filtered[k, ef, min_recall] = chosen
        return chosen

    def _chosen(self, k: int, ef: int | None, min_recall: float | None) -> PlainSettings:
        if ef is not None and ef < 1:
            raise InvalidQuery(f"ef must be at least 1, but got {ef}.")
        if min_recall is not None:
            check_min_recall(min_recall, ef)
        must_reach = min_recall is not None
        target = self._default_recall if min_recall is None else min_recall
        exact = PlainSettings(0, 1.0, 0, 1.0, target, must_reach)
        if self._exact or 2 * k >= self._nodes or min_recall == 1.0:
            return exact
        curve = self._calibration
        if ef is not None:
            ef = max(ef, k)
            recall = None
            if curve is not None and _is_measured(curve, ef, k):
                recall = curve.recall_at(ef, k)
            hidden = curve.hidden_recall_at(ef, k) if curve is not None else None
            return PlainSettings(ef, recall, ef, hidden, recall or target)
        if curve is None:
            wide = max(_UNCALIBRATED_EF, 2 * k)
            return exact if must_reach else PlainSettings(wide, None, wide, None, target)
        reached = curve.ef_for(target, k)
        if reached is None or (must_reach and not curve.knows_depth(k)):
            return exact
        reached = max(reached, k)
        recall = curve.recall_at(reached, k)
        hidden_ef = curve.hidden_ef_for(target, k, reached)
        if hidden_ef is None:
            return PlainSettings(reached, recall, 0, 1.0, target, must_reach)
        hidden = curve.hidden_recall_at(hidden_ef, k)
        if must_reach and hidden is None:
            return PlainSettings(reached, recall, 0, 1.0, target, must_reach)
        return PlainSettings(reached, recall, hidden_ef, hidden, target, must_reach)

    def _under_filter(self, k: int, plain: PlainSettings, ef: int | None) -> FilterSettings:
        curve = self._calibration
        if plain.ef == 0 and plain.target == 1.0:
            return FilterSettings()
        if curve is None or not curve.families:
            # Never measured: as wide as experience says, unless the request insists
            return FilterSettings() if plain.must_reach else self._unmeasured(k, plain)
        if plain.must_reach and k > curve.k:
            return FilterSettings()
        depth = max(1.0, k / curve.k)
        sketches = curve.sketches_for(plain.target)
        graph_ef = curve.filtered_ef_for(plain.target) if ef is None else plain.ef
        if sketches is not None:
            sketches = int(sketches * depth)
        if graph_ef is not None and ef is None:
            graph_ef = max(k, plain.ef, int(graph_ef * depth))
        return FilterSettings(
            sketches,
            curve.sketch_recall_at(sketches) if sketches is not None and k <= curve.k else None,
            graph_ef,
            curve.filtered_recall_at(graph_ef) if graph_ef is not None and k <= curve.k else None,
        )

    def _unmeasured(self, k: int, plain: PlainSettings) -> FilterSettings:
        """Return settings for an index whose filtered plans were never measured."""
        curve = self._calibration
        sketches = curve.sketches_for(plain.target) if curve is not None else None
        if sketches is not None and curve is not None:
            sketches = int(sketches * max(1.0, k / curve.k))
        else:
            sketches = max(_UNCALIBRATED_SKETCHES, self._nodes // 32, 64 * k)
        return FilterSettings(sketches, None, plain.ef or max(_UNCALIBRATED_EF, 2 * k), None)


def _is_measured(curve: Calibration, ef: int, k: int) -> bool:
    """Return whether the curve of a depth reaches down to ``ef``."""
    points = curve.points if k <= curve.k or not curve.deep_points else curve.deep_points
    return ef >= points[0].ef
