"""What is known of queries and the entities they led to: votes, and queries that calibrate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from index_builder.fusion.weights import Fusion


class NonsenseQueries(NamedTuple):
    """Queries that nothing answers."""

    texts: list[str]
    vectors: np.ndarray
    """float32 ``(M, D)``, unit rows."""


class CalibrationQueries(NamedTuple):
    """Queries with their answers, which no leg has seen."""

    texts: list[str]
    vectors: np.ndarray
    """float32 ``(Q, D)``, unit rows."""
    entity_ids: list[list[str]]
    """Relevant entities of each."""
    nonsense: NonsenseQueries | None = None
    """Queries that nothing answers; None: no gate is fitted."""


NO_PAIRS = pl.DataFrame(schema={"query": pl.String, "entity_id": pl.String, "count": pl.Int64})


@dataclass(frozen=True, slots=True)
class Engagements:
    """Engagements with the entities of one type.

    Attributes:
        pairs: ``query, entity_id`` and perhaps ``count``: known queries vote for these entities.
        calibration: Queries on which the weights of the legs are fitted, or None.
        fusion: Weights to keep where there are no or few such queries, or None.
    """

    pairs: pl.DataFrame
    calibration: CalibrationQueries | None = None
    fusion: Fusion | None = None
