"""The HNSW index (hnswlib): runs on any CPU; every other kind can fall back to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from encoders.errors import MissingDependency
from index_builder.ann.graph_files import library_file, read_hnsw_links, save_with_library
from index_builder.ann.interface import AnnConfig, AnnIndex
from index_builder.errors import IndexFormatError

_HEADER_BYTES = 96


def hnsw_library() -> Any:
    """Import hnswlib.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import hnswlib
    except ImportError as error:
        raise MissingDependency("hnswlib", "hnsw", "Index kind 'hnsw'") from error
    return hnswlib


class HnswIndex(AnnIndex):
    """hnswlib over float32 in squared Euclidean space, which orders unit vectors as cosines do."""

    kind = "hnsw"

    def __init__(self, index: Any, count: int, dimension: int, config: AnnConfig) -> None:
        self.count = count
        self.dimension = dimension
        self.config = config
        self._index = index
        # hnswlib keeps `max(k, index.ef)` candidates: with this one, `k` of a call is its own ef.
        index.set_ef(1)
        self._links: np.ndarray | None = None

    @classmethod
    def build(cls, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Build over ``vectors`` float32 ``(N, D)``."""
        count, dimension = vectors.shape
        index = hnsw_library().Index("l2", dimension)
        index.init_index(
            count, M=config.m, ef_construction=config.ef_construction, random_seed=config.seed
        )
        for start in range(0, count, 65536):
            block = np.ascontiguousarray(vectors[start : start + 65536])
            index.add_items(block, np.arange(start, start + len(block)), num_threads=config.threads)
        index.set_num_threads(1)
        return cls(index, count, dimension, config)

    @classmethod
    def load(cls, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Load ``<prefix>.hnsw``."""
        path = prefix.with_suffix(".hnsw")
        count, dimension = vectors.shape
        if not path.is_file() or path.stat().st_size < _HEADER_BYTES:
            raise IndexFormatError(
                f"expected an hnswlib index at {path.name}, but it is missing or truncated. Rebuild"
                " this release."
            )
        index = hnsw_library().Index("l2", dimension)
        try:
            index.load_index(str(path))
        except RuntimeError as error:
            raise IndexFormatError(
                f"{path.name} is not a readable hnswlib index ({error}). Rebuild this release."
            ) from error
        if index.get_current_count() != count:
            raise IndexFormatError(
                f"{path.name} holds {index.get_current_count()} nodes, but there are {count}"
                " distinct vectors. Rebuild this release."
            )
        index.set_num_threads(1)
        return cls(index, count, dimension, config)

    def save(self, prefix: Path) -> list[Path]:
        """Write ``<prefix>.hnsw``."""
        path = prefix.with_suffix(".hnsw")
        self._write(path)
        return [path]

    def _write(self, path: Path) -> None:
        save_with_library(path, self._index.save_index, self._index.index_file_size())

    def search(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search one ``(1, D)`` query; nearest first.

        Fewer than ``k`` come back where the graph does not lead to more.
        """
        wanted = max(k, min(ef, self.count))
        while True:
            try:
                rows, distances = self._index.knn_query(query, wanted, num_threads=1)
                return rows[0, :k], distances[0, :k]
            except RuntimeError:
                # Fewer than `wanted` nodes can be reached: hnswlib returns all or nothing.
                if wanted == 1:
                    return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.float32)
                wanted = wanted * 3 // 4

    def search_batch(self, queries: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search ``(B, D)`` queries."""
        wanted = max(k, min(ef, self.count))
        try:
            rows, distances = self._index.knn_query(queries, wanted, num_threads=1)
        except RuntimeError:
            return super().search_batch(queries, k, ef)
        return rows[:, :k].astype(np.int64), np.ascontiguousarray(distances[:, :k])

    def neighbours(self) -> np.ndarray | None:
        """Read the base layer's out-links from a saved file."""
        if self._links is None:
            with library_file(".hnsw", self.config.scratch) as path:
                self._write(path)
                self._links = read_hnsw_links(path, self.count)
        return self._links
