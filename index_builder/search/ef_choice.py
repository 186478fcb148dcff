"""From what a request asks for to the settings of a search, by the calibrated curve."""

from __future__ import annotations

from index_builder.errors import InvalidQuery
from index_builder.search.calibration import Calibration

_UNCALIBRATED_EF = 120
_UNCALIBRATED_SKETCHES = 1_024
_REMEMBERED = 1_000


class SearchSettings:
    """The settings of one index; choices are remembered."""

    def __init__(
        self, calibration: Calibration | None, default_recall: float, nodes: int, exact: bool
    ) -> None:
        self._calibration, self._default_recall, self._nodes, self._exact = (
            calibration,
            default_recall,
            nodes,
            exact,
        )
        self._known: dict[tuple[int, int | None, float | None], tuple[int, float | None]] = {}
        self._sketches: dict[tuple[int, int], int] = {}

    def choose(self, k: int, ef: int | None, min_recall: float | None) -> tuple[int, float | None]:
        """Ef (0: scan exactly) and the expected recall; raises ``InvalidQuery`` for an ef or a recall out of range."""
        chosen = self._known.get((k, ef, min_recall))
        if chosen is None:
            chosen = self._chosen(k, ef, min_recall)
            if len(self._known) > _REMEMBERED:
                self._known.clear()
            self._known[k, ef, min_recall] = chosen
        return chosen

    def sketches(self, k: int, ef: int) -> int:
        """How many sketches a filtered search looks at more closely to reach the recall that ``ef`` has without a filter."""
        known = self._sketches.get((k, ef))
        if known is None:
            if len(self._sketches) > _REMEMBERED:
                self._sketches.clear()
            known = self._sketches[k, ef] = self._enough_sketches(k, ef)
        return known

    def _enough_sketches(self, k: int, ef: int) -> int:
        calibration = self._calibration
        expected = None if calibration is None else calibration.recall_at(ef, calibration.k)
        reached = (
            None
            if calibration is None
            else calibration.sketches_for(self._default_recall if expected is None else expected)
        )
        if calibration is None or reached is None:
            return max(_UNCALIBRATED_SKETCHES, self._nodes // 32, 64 * k)
        return int(reached * max(1.0, k / calibration.k))

    def _chosen(self, k: int, ef: int | None, min_recall: float | None) -> tuple[int, float | None]:
        """Ef (0: exact) and the expected recall."""
        if ef is not None and ef < 1:
            raise InvalidQuery(f"ef must be at least 1, but got {ef}.")
        if min_recall is not None and not 0.0 < min_recall <= 1.0:
            raise InvalidQuery(f"min_recall must be above 0 and at most 1, but got {min_recall}.")
        if self._exact or 2 * k >= self._nodes or min_recall == 1.0:
            return 0, 1.0
        calibration = self._calibration
        if ef is not None:
            ef = max(ef, k)
            return ef, calibration.recall_at(ef, k) if calibration else None
        target = self._default_recall if min_recall is None else min_recall
        if calibration is None:
            if min_recall is not None:
                return 0, 1.0
            chosen: tuple[int, float | None] = (max(_UNCALIBRATED_EF, 2 * k), None)
        else:
            reached = calibration.ef_for(target, k)
            if reached is None:
                if min_recall is not None:
                    return 0, 1.0
                reached = max(calibration.points[-1].ef, 2 * k)
            chosen = (max(reached, k), calibration.recall_at(max(reached, k), k))
        return chosen
