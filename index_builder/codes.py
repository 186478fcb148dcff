"""The side store of filtered and lean searches, memory-mapped: 8-bit codes of the vectors, one-bit sketches, out-links of a graph."""

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
_SKETCH_ROWS = 32


@dataclass(frozen=True, slots=True)
class CodeStore:
    """Codes, sketches and links of a corpus.

    One scale serves all vectors: every component is a multiple of ``largest / 127``, stored with 128 added. The order by codes is nearly
    that by inner product; the best candidates are scored again in float32. A sketch keeps the signs of a vector's difference from the
    mean; times a factor of its own it estimates the inner product with a query, but for a constant (RaBitQ, Gao and Long, SIGMOD 2024).

    Attributes:
        codes: uint8 ``(U, stride)``; the stride is the dimension rounded up to 64.
        graph: uint32 ``(U, degree)`` out-links, padded with the node itself; None where only scans are wanted.
        entry: Where walks begin.
        sketch: uint8 ``(blocks, stride / 4, 16)``, 32 rows a block: byte j holds four signs of row j and, times 16, of row j + 16; or None.
        factors: float32 ``(32 * blocks,)``, one a sketch; or None.
    """

    codes: np.ndarray
    graph: np.ndarray | None
    entry: int
    sketch: np.ndarray | None = None
    factors: np.ndarray | None = None

    @classmethod
    def build(cls, vectors: np.ndarray, graph: np.ndarray | None, *, sketches: bool = False) -> Self:
        """Quantise ``vectors`` float32 ``(U, D)`` and keep ``graph``; ``sketches`` serve filters only."""
        count, dimension = vectors.shape
        largest = max((float(np.abs(vectors[s : s + _BLOCK]).max()) for s in range(0, count, _BLOCK)), default=1.0)
        codes = np.full((count, -(-dimension // CODE_ALIGNMENT) * CODE_ALIGNMENT), 128, dtype=np.uint8)
        for start in range(0, count, _BLOCK):
            block = vectors[start : start + _BLOCK] * np.float32(127 / largest)
            codes[start : start + _BLOCK, :dimension] = (np.rint(block) + 128).astype(np.uint8)
        return cls(codes, graph, central_node(vectors), *(_sketches(vectors) if sketches else (None, None)))

    def save(self, folder: Path) -> None:
        """Write ``index.codes.npy`` and, where they are there, ``index.graph.npy``, ``index.sketch.npy`` and ``index.factors.npy``."""
        for name in ("codes", "graph", "sketch", "factors"):
            array = getattr(self, name)
            if array is not None:
                np.save(folder / f"index.{name}.npy", array)

    @classmethod
    def load(cls, folder: Path, vectors: np.ndarray) -> Self:
        """Map what ``save`` wrote.

        Raises:
            IndexFormatError: A file is missing or does not fit the vectors.
        """
        try:
            codes, graph, sketch, factors = (_mapped(folder / f"index.{name}.npy") for name in ("codes", "graph", "sketch", "factors"))
        except (OSError, ValueError) as error:
            raise IndexFormatError(f"the codes of {folder.name!r} cannot be read ({error}). Rebuild this release.") from error
        count, dimension = vectors.shape
        stride = -(-dimension // CODE_ALIGNMENT) * CODE_ALIGNMENT
        if codes is None:
            raise IndexFormatError(f"the codes of {folder.name!r} are missing. Rebuild this release.")
        if codes.shape != (count, stride) or codes.dtype != np.uint8:
            raise IndexFormatError(
                f"the codes of {folder.name!r} are {codes.dtype} {codes.shape}, not uint8 {(count, stride)}. Rebuild this release."
            )
        if graph is not None and (graph.dtype != np.uint32 or graph.ndim != 2 or len(graph) != count):
            raise IndexFormatError(
                f"the graph of {folder.name!r} is {graph.dtype} {graph.shape}, not uint32 ({count}, degree). Rebuild this release."
            )
        return cls(codes, graph, central_node(vectors), sketch, factors)


def _mapped(path: Path) -> np.ndarray | None:
    return np.asarray(np.load(path, mmap_mode="r")) if path.is_file() else None


def _sketches(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sketches and factors of ``vectors`` float32 ``(U, D)``."""
    count, dimension = vectors.shape
    stride, blocks = -(-dimension // CODE_ALIGNMENT) * CODE_ALIGNMENT, -(-count // _SKETCH_ROWS)
    sketch, factors = np.zeros((blocks, stride // 4, 16), dtype=np.uint8), np.zeros(blocks * _SKETCH_ROWS, dtype=np.float32)
    mean = np.mean(vectors[:: max(1, count // _BLOCK)], axis=0, dtype=np.float32)
    weights = np.array([1, 2, 4, 8], dtype=np.uint8)
    for start in range(0, count, _BLOCK):
        rest = vectors[start : start + _BLOCK] - mean
        signs = np.zeros((-(-len(rest) // _SKETCH_ROWS) * _SKETCH_ROWS, stride), dtype=np.uint8)
        signs[: len(rest), :dimension] = rest > 0
        nibbles = (signs.reshape(-1, 2, 16, stride // 4, 4) * weights).sum(axis=4, dtype=np.uint8)  # (blocks, half, row, nibble)
        at = start // _SKETCH_ROWS
        sketch[at : at + len(nibbles)] = (nibbles[:, 0] | nibbles[:, 1] << 4).transpose(0, 2, 1)
        width = np.abs(rest).sum(axis=1)
        factors[start : start + len(rest)] = np.einsum("nd,nd->n", rest, rest) / np.maximum(width, 1e-12)
    return sketch, factors


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
            store.sketch if store else None,
            store.factors if store else None,
        )
    except ValueError as error:
        raise IndexFormatError(f"the index files do not fit each other: {error}. Rebuild this release.") from error
