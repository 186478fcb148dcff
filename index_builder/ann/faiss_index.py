"""The faiss index: HNSW over float16, whose graph CAGRA builds where there is a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Self

import numpy as np

from encoders.errors import MissingDependency
from index_builder.ann.graph_files import save_with_library
from index_builder.ann.interface import AnnConfig, AnnIndex
from index_builder.errors import IndexFormatError


def faiss_library() -> Any:
    """Import faiss.

    Raises:
        MissingDependency: Neither faiss-cpu nor a faiss-gpu build is installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency("faiss-cpu", "faiss", "Index kind 'faiss'") from error
    return faiss


def faiss_available() -> bool:
    """Return whether a faiss build is installed."""
    return importlib.util.find_spec("faiss") is not None


def cagra_available() -> bool:
    """Return whether this faiss can build CAGRA graphs on a GPU of this machine."""
    if not faiss_available():
        return False
    faiss = faiss_library()
    return hasattr(faiss, "GpuIndexCagra") and getattr(faiss, "get_num_gpus", lambda: 0)() > 0


class FaissIndex(AnnIndex):
    """faiss HNSW over float16 vectors, memory-mapped; on a GPU the graph is built by CAGRA."""

    kind = "faiss"
    true_distances = False

    def __init__(self, index: Any, count: int, dimension: int, config: AnnConfig) -> None:
        self.count = count
        self.dimension = dimension
        self.config = config
        self._index = index
        self._faiss = faiss_library()

    @classmethod
    def build(cls, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Build over ``vectors`` float32 ``(N, D)``; on a GPU through CAGRA."""
        count, dimension = vectors.shape
        faiss = faiss_library()
        contiguous = np.ascontiguousarray(vectors)
        if cagra_available() and count >= 10_000:
            index = _build_with_cagra(faiss, contiguous, config)
        else:
            index = faiss.IndexHNSWSQ(dimension, faiss.ScalarQuantizer.QT_fp16, config.m)
            index.hnsw.efConstruction = config.ef_construction
            before = faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(config.threads)
            try:
                index.train(contiguous)
                index.add(contiguous)
            finally:
                faiss.omp_set_num_threads(before)
        return cls(index, count, dimension, config)

    @classmethod
    def load(cls, prefix: Path, vectors: np.ndarray, config: AnnConfig) -> Self:
        """Load ``<prefix>.faiss``, memory-mapped, so that processes share one copy."""
        path = prefix.with_suffix(".faiss")
        if not path.is_file():
            raise IndexFormatError(
                f"expected a faiss index at {path.name}, but it is missing. Rebuild this release."
            )
        faiss = faiss_library()
        try:
            index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
        except RuntimeError as error:
            raise IndexFormatError(
                f"{path.name} is not a readable faiss index ({error}). Rebuild this release."
            ) from error
        if (index.ntotal, index.d) != vectors.shape:
            raise IndexFormatError(
                f"{path.name} holds {(index.ntotal, index.d)}, but the vectors are {vectors.shape}."
                " Rebuild this release."
            )
        return cls(index, *vectors.shape, config)

    def save(self, prefix: Path) -> list[Path]:
        """Write ``<prefix>.faiss``."""
        path = prefix.with_suffix(".faiss")
        least = self.count * 2 * self.dimension
        save_with_library(path, lambda to: self._faiss.write_index(self._index, to), least)
        return [path]

    def search(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Search one ``(1, D)`` query; nearest first."""
        parameters = self._faiss.SearchParametersHNSW(efSearch=ef)
        distances, rows = self._index.search(query, k, params=parameters)
        found = rows[0] >= 0
        return rows[0][found], distances[0][found]


def _build_with_cagra(faiss: Any, vectors: np.ndarray, config: AnnConfig) -> Any:
    """Build the graph on the GPU, as an HNSW that CPUs search."""
    cagra_config = faiss.GpuIndexCagraConfig()
    cagra_config.graph_degree = 2 * config.m
    cagra_config.intermediate_graph_degree = 4 * config.m
    gpu = faiss.GpuIndexCagra(
        faiss.StandardGpuResources(), vectors.shape[1], faiss.METRIC_L2, cagra_config
    )
    gpu.train(vectors)
    index = faiss.IndexHNSWCagra()
    index.base_level_only = False
    gpu.copyTo(index)
    return index
