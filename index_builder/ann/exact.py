"""The exact index: the reference for every other kind, and the right choice for small corpora."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np

from index_builder.ann.interface import AnnConfig, AnnIndex


class ExactIndex(AnnIndex):
    """Every row scored by a matrix product; ties broken by row number.

    The corpus itself is the index, so nothing is saved.
    """

    kind = "exact"
    exact = True

    def __init__(self, vectors: np.ndarray, config: AnnConfig) -> None:
        self.count, self.dimension = vectors.shape
        self.config = config
        self._vectors = vectors

    @classmethod
    def build(cls, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Keep ``vectors`` float32 ``(N, D)``."""
        return cls(vectors, config)

    @classmethod
    def load(cls, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Use the corpus; ``prefix`` is not read."""
        return cls(vectors, config)

    def save(self, prefix: Path) -> list[Path]:
        """Write nothing."""
        return []

    def search(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search one ``(1, D)`` query exactly; ``ef`` is ignored."""
        scores = self._vectors @ query[0]  # (N, D) @ (D,) -> (N,)
        rows = top_rows(scores, k)
        return rows, 2.0 - 2.0 * scores[rows]


def top_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """Return rows of the ``k`` highest scores, best first, ties by row; int64 ``(min(k, N),)``."""
    if k >= len(scores):
        return np.argsort(-scores, kind="stable")
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > threshold)
    tied = np.flatnonzero(scores == threshold)[: k - len(above)]
    rows = np.concatenate([above, tied])
    return rows[np.lexsort((rows, -scores[rows]))]
