"""Search a prefix of Matryoshka vectors and re-rank in full.

Fewer numbers a step, more candidates for the same recall.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.index.engines import DEGREE, EF_CONSTRUCTION, Engine
from index_builder.ann import AnnConfig, build_index, load_index
from index_builder.storage.corpus import Corpus
from index_builder.storage.engine_arrays import make_engine
from index_builder.storage.id_table import IdTable


def prefix_engine(kind: str, dimensions: int) -> Callable[[np.ndarray, Path], Engine]:
    """Index the first ``dimensions`` with ``kind``; its ``ef`` best are scored again in float32."""

    def build(corpus: np.ndarray, folder: Path) -> Engine:
        config = AnnConfig(degree=DEGREE, ef_construction=EF_CONSTRUCTION)
        short = _prefix(corpus, dimensions)
        if not (folder / "built").is_file():
            build_index(kind, short, config).save(folder / "index")
            (folder / "built").touch()
        index = load_index(kind, folder / "index", short, config)
        scan = make_engine(
            Corpus(np.ascontiguousarray(corpus)),
            IdTable.build([str(i) for i in range(len(corpus))]),
            None,
        ).scan

        def search(query: np.ndarray, ef: int) -> list[str]:
            head = query[:, :dimensions]
            rows, _ = index.search(
                np.ascontiguousarray(head / np.sqrt(head[0].dot(head[0]))), ef, ef
            )
            out = np.empty(10, dtype=np.float32)
            ids: list[str] = scan(query, 10, rows.astype(np.uint32, copy=False), out, None)
            return ids

        return Engine(search, lambda ids: np.array([int(id_) for id_ in ids]))

    return build


def _prefix(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first numbers of each vector, as unit rows."""
    short = np.ascontiguousarray(vectors[:, :dimensions])
    norms = np.linalg.norm(short, axis=1, keepdims=True)
    return np.asarray(short / np.maximum(norms, np.float32(1e-12)), dtype=np.float32)


PREFIX_ENGINES = {
    f"prefix {d} {kind}": (prefix_engine(kind, d), None)
    for kind in ("hnsw", "symqg")
    for d in (64, 128)
}
"""Name -> (builder, the distribution it needs besides ours); not among the engines measured by
default."""
