"""From the recall a request wants to the settings of its search, by the calibrated curve."""

from __future__ import annotations

from index_builder.errors import InvalidQuery
from index_builder.search.calibration import Calibration

_UNCALIBRATED_EF = 120
_UNCALIBRATED_SKETCHES = 1_024
_CACHED_CHOICES = 1_000


class SearchSettings:
    """The settings of one index; choices are cached."""

    def __init__(
        self, calibration: Calibration | None, default_recall: float, nodes: int, exact: bool
    ) -> None:
        self._calibration = calibration
        self._default_recall = default_recall
        self._nodes = nodes
        self._exact = exact
        self._known: dict[tuple[int, int | None, float | None], tuple[int, float | None]] = {}
        self._sketches: dict[tuple[int, int], int] = {}

    def choose(self, k: int, ef: int | None, min_recall: float | None) -> tuple[int, float | None]:
        """Return ef (0: scan exactly) and the expected recall.

        Raises:
            InvalidQuery: ef or min_recall out of range.
        """
        chosen = self._known.get((k, ef, min_recall))
        if chosen is None:
            chosen = self._chosen(k, ef, min_recall)
            if len(self._known) > _CACHED_CHOICES:
                self._known.clear()
            self._known[k, ef, min_recall] = chosen
        return chosen

    def sketches(self, k: int, ef: int) -> int:
        """Return how many sketches are scored by codes to reach the recall of ``ef`` unfiltered."""
        known = self._sketches.get((k, ef))
        if known is None:
            if len(self._sketches) > _CACHED_CHOICES:
                self._sketches.clear()
            known = self._sketches[k, ef] = self._enough_sketches(k, ef)
        return known

    def _enough_sketches(self, k: int, ef: int) -> int:
        calibration = self._calibration
        if calibration is not None:
            expected = calibration.recall_at(ef, calibration.k)
            target = self._default_recall if expected is None else expected
            reached = calibration.sketches_for(target)
            if reached is not None:
                return int(reached * max(1.0, k / calibration.k))
        return max(_UNCALIBRATED_SKETCHES, self._nodes // 32, 64 * k)

    def _chosen(self, k: int, ef: int | None, min_recall: float | None) -> tuple[int, float | None]:
        if ef is not None and ef < 1:
            raise InvalidQuery(f"ef must be at least 1, but got {ef}.")
        if min_recall is not None and not 0.0 < min_recall <= 1.0:
            raise InvalidQuery(f"min_recall must be above 0 and at most 1, but got {min_recall}.")
        if self._exact or 2 * k >= self._nodes or min_recall == 1.0:
            return 0, 1.0
        if ef is not None:
            ef = max(ef, k)
            return ef, self._calibration.recall_at(ef, k) if self._calibration else None
        if self._calibration is None:
            return (max(_UNCALIBRATED_EF, 2 * k), None) if min_recall is None else (0, 1.0)
        target = self._default_recall if min_recall is None else min_recall
        reached = self._calibration.ef_for(target, k)
        if reached is None:
            if min_recall is not None:
                return 0, 1.0
            reached = max(self._calibration.points[-1].ef, 2 * k)
        reached = max(reached, k)
        return reached, self._calibration.recall_at(reached, k)
