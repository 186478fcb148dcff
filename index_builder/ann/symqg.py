"""The SymphonyQG index (rabitqlib): a graph whose edges carry RaBitQ codes of their targets."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Self

import numpy as np

from encoders.errors import ConfigError, MissingDependency
from index_builder.ann.cpu import cpu_features
from index_builder.ann.graph_files import library_file, read_symqg_links, save_with_library
from index_builder.ann.interface import AnnConfig, AnnIndex
from index_builder.errors import IndexFormatError

MIN_ROWS = 1_000
"""Below this the builder has too few points for its partitions, and ``exact`` is faster."""

MIN_DIMENSION, MAX_DIMENSION = 64, 4_095
"""Widths that the library's rotation knows."""


def symqg_library() -> Any:
    """Import rabitqlib.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import rabitqlib
    except ImportError as error:
        raise MissingDependency("rabitqlib", None, "Index kind 'symqg'") from error
    return rabitqlib


def symqg_available() -> bool:
    """Return whether rabitqlib is installed."""
    return importlib.util.find_spec("rabitqlib") is not None


def symqg_builds(dimension: int) -> bool:
    """Return whether rabitqlib is installed, runs on this CPU and knows vectors of that width."""
    return (
        symqg_available()
        and cpu_features().issuperset(SymqgIndex.cpu_features)
        and MIN_DIMENSION <= dimension <= MAX_DIMENSION
    )


class SymqgIndex(AnnIndex):
    """SymphonyQG (Gou et al., SIGMOD 2025) in squared Euclidean space.

    The library scores its last candidates by float32 vectors or 8-bit codes (``AnnConfig.bits``).
    Its inner-product mode reaches far lower recall at equal ``ef`` on unit vectors (0.80 against
    0.95 at ef 60 on 100k text embeddings).
    """

    kind = "symqg"
    cpu_features = ("avx2", "fma")

    def __init__(self, index: Any, vectors: np.ndarray, config: AnnConfig) -> None:
        self.count, self.dimension = vectors.shape
        self.config = config
        self._vectors = vectors
        self._index = index
        self._search = index.search
        self.true_distances = config.bits == 0
        self._links: np.ndarray | None = None

    @classmethod
    def build(cls, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Build over ``vectors`` float32 ``(N, D)``, N >= 1,000."""
        count, dimension = vectors.shape
        if count < MIN_ROWS:
            raise ConfigError(
                f"index kind 'symqg' needs at least {MIN_ROWS:,} distinct vectors, but got"
                f" {count:,}. Use --index exact or auto."
            )
        if not MIN_DIMENSION <= dimension <= MAX_DIMENSION:
            raise ConfigError(
                f"index kind 'symqg' needs vectors of {MIN_DIMENSION} to {MAX_DIMENSION:,}"
                f" dimensions, but got {dimension}. Use --index hnsw or auto."
            )
        index = symqg_library().SymqgIndex(dimension, config.degree, "l2", config.bits)
        index.build(
            np.ascontiguousarray(vectors),
            max(config.ef_construction, config.degree),
            config.threads,
        )
        return cls(index, vectors, config)

    @classmethod
    def load(cls, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Load ``<prefix>.symqg``."""
        path = prefix.with_suffix(".symqg")
        if not path.is_file():
            raise IndexFormatError(
                f"expected a SymphonyQG index at {path.name}, but it is missing. Rebuild this"
                " release."
            )
        try:
            index = symqg_library().SymqgIndex.load(str(path))
        except (RuntimeError, ValueError, MemoryError) as error:
            raise IndexFormatError(
                f"{path.name} is not a readable SymphonyQG index ({error}). Rebuild this release."
            ) from error
        if (index.num_points, index.dim) != vectors.shape:
            raise IndexFormatError(
                f"{path.name} holds {(index.num_points, index.dim)}, but the vectors are"
                f" {vectors.shape}. Rebuild this release."
            )
        return cls(index, vectors, config)

    def save(self, prefix: Path) -> list[Path]:
        """Write ``<prefix>.symqg``."""
        path = prefix.with_suffix(".symqg")
        self._write(path)
        return [path]

    def _write(self, path: Path) -> None:
        # The links, codes and factors of a row follow its vector, which codes may stand for
        row = self.config.degree * (4 + self.dimension // 8)
        row += self.dimension * (1 if self.config.bits else 4)
        save_with_library(path, self._index.save, self.count * row)

    def search(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search one ``(1, D)`` query; nearest first."""
        rows, distances = self._search(query, k, ef)
        return rows[0], distances[0]

    def search_batch(self, queries: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search ``(B, D)`` queries."""
        rows, distances = self._search(queries, k, ef)
        return rows.astype(np.int64), distances

    def neighbours(self) -> np.ndarray | None:
        """Read the out-links from a saved file; None with 8-bit codes, whose layout is another."""
        if self.config.bits:
            return None
        if self._links is None:
            with library_file(".symqg", self.config.scratch) as path:
                self._write(path)
                self._links = read_symqg_links(path, self._vectors, self.config.degree)
        return self._links
