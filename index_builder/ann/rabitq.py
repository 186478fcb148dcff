"""The lean index (rabitqlib HNSW): 8 bits a dimension and no float32 inside, about half a kilobyte a vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from encoders.errors import MissingDependency
from index_builder.ann.interface import AnnConfig, AnnIndex
from index_builder.errors import IndexFormatError


def _library() -> Any:
    try:
        import rabitqlib
    except ImportError as error:
        raise MissingDependency("rabitqlib", "symqg", "The rabitq index") from error
    return rabitqlib


class RabitqIndex(AnnIndex):
    """HNSW over RaBitQ codes (Gao et al., SIGMOD 2025); distances are estimates from the codes, not re-ranked."""

    kind = "rabitq"
    cpu_features = ("avx2", "fma")
    true_distances = False

    def __init__(self, index: Any, count: int, dimension: int, config: AnnConfig) -> None:
        self.count, self.dimension, self.config = count, dimension, config
        self._index = index

    @classmethod
    def build(cls, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Build over ``vectors`` float32 ``(N, D)``; codes are residuals to a few k-means centroids."""
        count, dimension = vectors.shape
        library = _library()
        clusters = max(1, min(16, count // 256))
        contiguous = np.ascontiguousarray(vectors)
        if clusters == 1:
            centroids = contiguous.mean(axis=0, keepdims=True)
            assignments = np.zeros(count, dtype=np.uint32)
        else:
            # Ten plain Lloyd steps on a sample: sixteen centroids need no more, and the library's
            # k-means takes no seed for its sample.
            rng = np.random.default_rng(config.seed)
            sample = contiguous[np.sort(rng.choice(count, size=min(count, 20_000), replace=False))]
            centroids = sample[:: max(1, len(sample) // clusters)][:clusters].copy()
            for _ in range(10):
                nearest = np.argmax(sample @ centroids.T - 0.5 * (centroids**2).sum(axis=1), axis=1)
                for c in range(clusters):
                    members = sample[nearest == c]
                    if len(members):
                        centroids[c] = members.mean(axis=0)
            bias = 0.5 * (centroids**2).sum(axis=1)
            assignments = np.concatenate(
                [
                    np.argmax(contiguous[s : s + 65536] @ centroids.T - bias, axis=1)
                    for s in range(0, count, 65536)
                ]
            ).astype(np.uint32)
        index = library.HnswIndex(
            dimension, count, config.m, config.ef_construction, config.bits or 8, "l2", config.seed
        )
        index.build(contiguous, np.ascontiguousarray(centroids), assignments, config.threads)
        return cls(index, count, dimension, config)

    @classmethod
    def load(cls, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Load ``<prefix>.rabitq``."""
        path = prefix.with_suffix(".rabitq")
        if not path.is_file():
            raise IndexFormatError(
                f"expected a RaBitQ HNSW index at {path.name}, but it is missing. Rebuild this"
                " release."
            )
        try:
            index = _library().HnswIndex.load(str(path))
        except (RuntimeError, ValueError, MemoryError) as error:
            raise IndexFormatError(
                f"{path.name} is not a readable RaBitQ HNSW index ({error}). Rebuild this release."
            ) from error
        if (index.num_points, index.dim) != vectors.shape:
            raise IndexFormatError(
                f"{path.name} holds {(index.num_points, index.dim)}, but the vectors are"
                f" {vectors.shape}. Rebuild this release."
            )
        return cls(index, *vectors.shape, config)

    def save(self, prefix: Path) -> list[Path]:
        """Write ``<prefix>.rabitq``."""
        path = prefix.with_suffix(".rabitq")
        self._index.save(str(path))
        return [path]

    def search(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search one ``(1, D)`` query; nearest first by estimated distance."""
        rows, distances = self._index.search(query, k, ef)
        return rows[0], distances[0]
