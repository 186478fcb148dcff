"""The int8 graph index: a walk over 8-bit codes along links that SymphonyQG or hnswlib built."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from encoders.errors import ConfigError
from index_builder.ann.hnsw import HnswIndex
from index_builder.ann.interface import AnnConfig, AnnIndex
from index_builder.ann.symqg import MIN_ROWS, SymqgIndex, symqg_builds
from index_builder.errors import IndexFormatError, MissingExtension
from index_builder.native import Engine
from index_builder.storage.corpus import Corpus
from index_builder.storage.engine_arrays import MAX_DIMENSION, EngineArrays, make_engine


class Int8GraphIndex(AnnIndex):
    """A compiled walk over one byte a dimension; float32 is read for the last candidates only.

    With ``AnnConfig.sketched_links`` each link carries a factor and one sign bit a dimension of the
    difference to where it leads, so that a walk reads few codes: 1.5 kB a vector (256-d, 32 links),
    private to the process that loads it and shared by those it forks. Without, 0.4 kB a vector, all
    of it memory-mapped and shared.

    A reproducible build (one thread, ``AnnConfig.degree`` ignored) takes hnswlib's graph, since
    SymphonyQG's cannot be seeded.
    """

    kind = "int8-graph"

    def __init__(self, vectors: np.ndarray, arrays: EngineArrays, config: AnnConfig) -> None:
        self.count, self.dimension = vectors.shape
        self.config = config
        self.arrays = arrays
        if Engine is None:
            raise MissingExtension(f"Index kind {self.kind!r}")
        self._nearest = make_engine(Corpus(vectors), None, arrays).nearest

    @classmethod
    def build(cls, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Build over ``vectors`` float32 ``(N, D)``."""
        vectors = np.ascontiguousarray(vectors)
        if vectors.shape[1] > MAX_DIMENSION:
            raise ConfigError(
                f"index kind 'int8-graph' needs vectors of at most {MAX_DIMENSION:,} dimensions,"
                f" but got {vectors.shape[1]:,}. Use --index exact or hnsw."
            )
        seedless = len(vectors) >= MIN_ROWS and symqg_builds(vectors.shape[1])
        builder: type[AnnIndex] = SymqgIndex if seedless and not config.reproducible else HnswIndex
        graph = builder.build(vectors, config).neighbours()
        if graph is None:
            graph = HnswIndex.build(vectors, config).neighbours()
        assert graph is not None, "hnswlib's own file must be readable"
        return cls.over(vectors, graph, config)

    @classmethod
    def over(cls, vectors: np.ndarray, graph: np.ndarray, config: AnnConfig) -> Self:
        """Search ``vectors`` float32 ``(N, D)`` along given out-links, uint32 ``(N, degree)``."""
        arrays = EngineArrays.build(vectors, graph, sketched_links=config.sketched_links)
        return cls(vectors, arrays, config)

    @classmethod
    def load(cls, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Load ``<folder>/index.codes.npy`` and the graph beside it."""
        arrays = EngineArrays.load(prefix.parent, vectors)
        if (arrays.links if config.sketched_links else arrays.graph) is None:
            raise IndexFormatError(
                f"{prefix.name}.{_graph_part(config)}.npy is missing. Rebuild this release."
            )
        return cls(vectors, arrays, config)

    def save(self, prefix: Path) -> list[Path]:
        """Write codes, their quantiser, and links (sketched) or a graph, ``index.<part>.npy``."""
        self.arrays.save(prefix.parent)
        parts = ("codes", "quantiser", _graph_part(self.config))
        return [prefix.parent / f"index.{part}.npy" for part in parts]

    def search(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search one ``(1, D)`` query; nearest first."""
        nodes, distances = np.empty(k, dtype=np.uint32), np.empty(k, dtype=np.float32)
        found = self._nearest(query, k, ef, nodes, distances)
        return (nodes, distances) if found == k else (nodes[:found], distances[:found])

    def neighbours(self) -> np.ndarray | None:
        """Return the out-links."""
        return self.arrays.neighbours()

    def parameters(self) -> dict[str, Any]:
        """Return the configuration as plain values for the manifest."""
        return {**super().parameters(), "sketched_links": self.config.sketched_links}


def _graph_part(config: AnnConfig) -> str:
    """Return the part of a file's name that holds the graph."""
    return "links" if config.sketched_links else "graph"
