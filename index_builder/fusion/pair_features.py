"""Score given (query, entity) pairs by every leg: columns that a first-stage ranker trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import polars as pl

from index_builder.errors import UnknownEntityType
from index_builder.fusion.fused_search import FusedIndex

Encode = Callable[[Sequence[str]], np.ndarray]
"""Query texts -> float32 ``(N, D)``, unit rows."""

FEATURES: dict[str, pl.DataType] = {
    "cosine": pl.Float32(),
    "lexical": pl.Float32(),
    "votes": pl.Float32(),
    "fused": pl.Float32(),
    "known_queries": pl.Int64(),
}
"""Column -> type. Null where the entity is not in the release; ``fused`` also where it has no
weights.
"""


class PairScorer:
    """Scores pairs by one opened release.

    Args:
        legs: Entity type -> its legs.
        encode: The release's query tower.
    """

    def __init__(self, legs: Mapping[str, FusedIndex], encode: Encode) -> None:
        self._legs = legs
        self._encode = encode
        self._known_queries: dict[str, np.ndarray] = {}

    def score(self, pairs: pl.DataFrame) -> pl.DataFrame:
        """Score pairs, each distinct query encoded once.

        Args:
            pairs: ``query``, ``entity_type``, ``entity_id``, texts without nulls.

        Returns:
            The columns of ``FEATURES``, in the order of the pairs.

        Raises:
            UnknownEntityType: The release has no index of a pair's type.
        """
        if pairs.is_empty():
            return pl.DataFrame(schema=FEATURES)
        texts = pairs["query"].unique(maintain_order=True)
        vectors = np.ascontiguousarray(self._encode(texts.to_list()), np.float32)
        vector_of = dict(zip(texts.to_list(), vectors, strict=True))
        numbered = pairs.with_row_index("row")
        parts = []
        for (entity_type, text), group in numbered.group_by(
            "entity_type", "query", maintain_order=True
        ):
            ids = group["entity_id"].to_list()
            scored = self._score_query(str(entity_type), str(text), vector_of[str(text)], ids)
            parts.append(scored.with_columns(group["row"]))
        return pl.concat(parts).sort("row").drop("row")

    def _score_query(
        self, entity_type: str, text: str, vector: np.ndarray, ids: list[str]
    ) -> pl.DataFrame:
        if entity_type not in self._legs:
            raise UnknownEntityType(entity_type, list(self._legs))
        legs = self._legs[entity_type]
        scores = legs.score(legs.query(text, vector), ids)
        fused = np.full(len(ids), np.nan, np.float32)
        if legs.fusion is not None:
            fused = scores @ np.array(legs.fusion.weights, np.float32)
        columns = dict(zip(("cosine", "lexical", "votes"), scores.T, strict=True))
        frame = pl.DataFrame({**columns, "fused": fused}).with_columns(pl.all().fill_nan(None))
        known = self._known(entity_type, legs)
        rows = legs.entities.ids.rows_of(ids)
        counts = pl.Series("known_queries", np.where(rows >= 0, known[np.maximum(rows, 0)], 0))
        is_there = pl.col("cosine").is_not_null()
        return frame.with_columns(counts).select(
            *("cosine", "lexical", "votes", "fused"),
            pl.when(is_there).then(pl.col("known_queries").cast(pl.Int64)),
        )

    def _known(self, entity_type: str, legs: FusedIndex) -> np.ndarray:
        """Count the known queries of each row of the base; int64 ``(N,)``, once."""
        if entity_type not in self._known_queries:
            count = max(1, len(legs.entities.ids))
            rows = np.zeros(0, np.uint32) if legs.votes is None else legs.votes.rows
            self._known_queries[entity_type] = np.bincount(rows, minlength=count)
        return self._known_queries[entity_type]
