"""The side store of filtered and lean searches: 8-bit codes of the vectors and the out-links of a graph over them, both memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from index_builder.corpus import Corpus
from index_builder.errors import IndexFormatError
from index_builder.id_table import IdTable
from index_builder.native import Engine

_BLOCK = 65_536
CODE_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class CodeStore:
    """Codes and links of a corpus.

    One scale serves all vectors: every component is a multiple of ``largest / 127``, stored with 128 added. The order by codes is nearly
    that by inner product; the best candidates are scored again in float32.

    Attributes:
        codes: uint8 ``(U, stride)``; the stride is the dimension rounded up to 64.
        graph: uint32 ``(U, degree)`` out-links, padded with the node itself; None where only scans are wanted.
        entry: Where walks begin.
    """

    codes: np.ndarray
    graph: np.ndarray | None
    entry: int

    @classmethod
    def build(cls, vectors: np.ndarray, graph: np.ndarray | None) -> Self:
        """Quantise ``vectors`` float32 ``(U, D)`` and keep ``graph``."""
        count, dimension = vectors.shape
        largest = max((float(np.abs(vectors[s : s + _BLOCK]).max()) for s in range(0, count, _BLOCK)), default=1.0)
        codes = np.full((count, -(-dimension // CODE_ALIGNMENT) * CODE_ALIGNMENT), 128, dtype=np.uint8)
        for start in range(0, count, _BLOCK):
            block = vectors[start : start + _BLOCK] * np.float32(127 / largest)
            codes[start : start + _BLOCK, :dimension] = (np.rint(block) + 128).astype(np.uint8)
        return cls(codes, graph, central_node(vectors))

    def save(self, folder: Path) -> None:
        """Write ``index.codes.npy`` and, with a graph, ``index.graph.npy``."""
        np.save(folder / "index.codes.npy", self.codes)
        if self.graph is not None:
            np.save(folder / "index.graph.npy", self.graph)

    @classmethod
    def load(cls, folder: Path, vectors: np.ndarray) -> Self:
        """Map what ``save`` wrote.

        Raises:
            IndexFormatError: A file is missing or does not fit the vectors.
        """
        try:
            codes = np.asarray(np.load(folder / "index.codes.npy", mmap_mode="r"))
            path = folder / "index.graph.npy"
            graph = np.asarray(np.load(path, mmap_mode="r")) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise IndexFormatError(f"the codes of {folder.name!r} cannot be read ({error}). Rebuild this release.") from error
        count, dimension = vectors.shape
        stride = -(-dimension // CODE_ALIGNMENT) * CODE_ALIGNMENT
        if codes.shape != (count, stride) or codes.dtype != np.uint8:
            raise IndexFormatError(
                f"the codes of {folder.name!r} are {codes.dtype} {codes.shape}, not uint8 {(count, stride)}. Rebuild this release."
            )
        if graph is not None and (graph.dtype != np.uint32 or graph.ndim != 2 or len(graph) != count):
            raise IndexFormatError(
                f"the graph of {folder.name!r} is {graph.dtype} {graph.shape}, not uint32 ({count}, degree). Rebuild this release."
            )
        return cls(codes, graph, central_node(vectors))


def central_node(vectors: np.ndarray) -> int:
    """The node nearest to the mean among a sample spread over the corpus: where walks begin."""
    if len(vectors) == 0:
        return 0
    step = max(1, len(vectors) // 2_000)
    sample = np.asarray(vectors[::step])
    return int(np.argmax(sample @ sample.mean(axis=0))) * step


def make_engine(corpus: Corpus, ids: IdTable | None, store: CodeStore | None) -> Any:
    """The compiled engine over these arrays, or None where it was not built.

    Raises:
        IndexFormatError: The arrays do not fit each other (a link or an offset points outside).
    """
    if Engine is None or len(corpus.vectors) == 0:
        return None
    blob = ids.blob if ids is not None else np.zeros(1, dtype=np.uint8)
    offsets = ids.offsets if ids is not None else np.zeros(corpus.rows + 1, dtype=np.uint64)
    try:
        return Engine(
            corpus.vectors,
            int(corpus.vectors.shape[1]),
            blob,
            offsets,
            store.codes if store else None,
            store.graph if store else None,
            store.entry if store else 0,
            corpus.node_of_row,
            corpus.row_starts,
            corpus.rows_by_node,
        )
    except ValueError as error:
        raise IndexFormatError(f"the index files do not fit each other: {error}. Rebuild this release.") from error
