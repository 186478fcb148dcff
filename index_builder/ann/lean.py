"""The lean index: our own walk over 8-bit codes on a graph that SymphonyQG or hnswlib built, re-ranked from the memory-mapped corpus."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from encoders.errors import MissingDependency
from index_builder.ann.hnsw import HnswIndex
from index_builder.ann.interface import AnnConfig, AnnIndex
from index_builder.ann.symqg import MIN_ROWS, SymqgIndex, symqg_builds
from index_builder.errors import IndexFormatError
from index_builder.native import Engine
from index_builder.storage.codes import CodeStore, make_engine
from index_builder.storage.corpus import Corpus


class LeanIndex(AnnIndex):
    """0.4 kB a vector in memory (one byte a dimension and 32 links), float32 read from the mapped file for the last few candidates.

    A deterministic build (one thread, ``AnnConfig.degree`` ignored) takes hnswlib's graph, since
    SymphonyQG's cannot be seeded.
    """

    kind = "lean"
    sketched: ClassVar[bool] = False
    """Whether links carry sketches of where they lead."""

    def __init__(self, vectors: np.ndarray, store: CodeStore, config: AnnConfig) -> None:
        self.count, self.dimension = vectors.shape
        self.config = config
        self.store = store
        if Engine is None:
            raise MissingDependency("a C++ compiler at installation", "native", "The lean index")
        self._nearest = make_engine(Corpus(vectors), None, store).nearest

    @classmethod
    def build(cls, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Build over ``vectors`` float32 ``(N, D)``."""
        vectors = np.ascontiguousarray(vectors)
        seedless = len(vectors) >= MIN_ROWS and symqg_builds(vectors.shape[1])
        builder: type[AnnIndex] = SymqgIndex if seedless and not config.reproducible else HnswIndex
        graph = builder.build(vectors, config).neighbours()
        if graph is None:
            graph = HnswIndex.build(vectors, config).neighbours()
        assert graph is not None, "hnswlib's own file must be readable"
        return cls.over(vectors, graph, config)

    @classmethod
    def over(cls, vectors: np.ndarray, graph: np.ndarray, config: AnnConfig) -> Self:
        """Search ``vectors`` float32 ``(N, D)`` along a graph that is there already: out-links uint32 ``(N, degree)``."""
        return cls(vectors, CodeStore.build(vectors, graph, sketched_links=cls.sketched), config)

    @classmethod
    def load(cls, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Load ``<folder>/index.codes.npy`` and the graph beside it."""
        store = CodeStore.load(prefix.parent, vectors)
        if (store.links if cls.sketched else store.graph) is None:
            raise IndexFormatError(
                f"{prefix.name}.{cls._graph_file()}.npy is missing. Rebuild this release."
            )
        return cls(vectors, store, config)

    def save(self, prefix: Path) -> list[Path]:
        """Write ``<folder>/index.codes.npy`` and the graph, which is ``index.graph.npy`` or ``index.links.npy``."""
        self.store.save(prefix.parent)
        return [
            prefix.parent / "index.codes.npy",
            prefix.parent / f"index.{self._graph_file()}.npy",
        ]

    @classmethod
    def _graph_file(cls) -> str:
        return "links" if cls.sketched else "graph"

    def search(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search one ``(1, D)`` query; nearest first."""
        nodes, distances = np.empty(k, dtype=np.uint32), np.empty(k, dtype=np.float32)
        found = self._nearest(query, k, ef, nodes, distances)
        return (nodes, distances) if found == k else (nodes[:found], distances[:found])

    def neighbours(self) -> np.ndarray | None:
        """The out-links."""
        return self.store.neighbours()
