"""The side store of filtered and lean searches, memory-mapped: 8-bit codes of the vectors, one-bit sketches, out-links of a graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from index_builder.errors import IndexFormatError
from index_builder.native import Engine, link_records
from index_builder.storage.corpus import Corpus
from index_builder.storage.id_table import IdTable

_BLOCK = 65_536
CODE_ALIGNMENT = 64
_SKETCH_ROWS = 32
_ARRAYS = ("codes", "graph", "sketch", "factors", "links")


@dataclass(frozen=True, slots=True)
class EngineArrays:
    """Codes, sketches and links of a corpus.

    One scale serves all vectors: every component is a multiple of ``largest / 127``, stored with
    128 added. The order by codes is nearly that by inner product; the best candidates are scored
    again in float32. A sketch keeps the signs of a vector's difference from the mean; times a
    factor of its own it estimates the inner product with a query, but for a constant (RaBitQ, Gao
    and Long, SIGMOD 2024).

    Attributes:
        codes: uint8 ``(U, stride)``; the stride is the dimension rounded up to 64.
        graph: uint32 ``(U, degree)`` out-links, padded with the node itself; None where only scans
            are wanted.
        entry: Where walks begin.
        sketch: uint8 ``(blocks, stride / 4, 16)``, 32 rows a block: byte j holds four signs of row
            j and, times 16, of row j + 16; or None.
        factors: float32 ``(32 * blocks,)``, one a sketch; or None.
        links: uint8 ``(U, record)``, what the compiled walk reads in place of ``graph``: a node's
            out-links (uint32), a factor for each (float32), and sketches of the differences to
            where they lead, in blocks of 32 laid out as in ``sketch``; or None.
    """

    codes: np.ndarray
    graph: np.ndarray | None
    entry: int
    sketch: np.ndarray | None = None
    factors: np.ndarray | None = None
    links: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        graph: np.ndarray | None,
        *,
        sketches: bool = False,
        sketched_links: bool = False,
    ) -> Self:
        """Quantise ``vectors`` float32 ``(U, D)`` and keep ``graph``, in ``links`` if these carry sketches; ``sketches`` serve filters."""
        count, dimension = vectors.shape
        largest = max(
            (float(np.abs(vectors[s : s + _BLOCK]).max()) for s in range(0, count, _BLOCK)),
            default=1.0,
        )
        codes = _aligned((count, _stride(dimension)))
        codes[:] = 128
        for start in range(0, count, _BLOCK):
            block = vectors[start : start + _BLOCK] * np.float32(127 / largest)
            codes[start : start + _BLOCK, :dimension] = (np.rint(block) + 128).astype(np.uint8)
        store = cls(codes, None if sketched_links else graph, central_node(vectors))
        if sketched_links:
            assert graph is not None, "links need a graph"
            store = replace(store, links=_sketched_links(vectors, graph, 127 / largest))
        return store.with_sketches(vectors) if sketches else store

    def with_sketches(self, vectors: np.ndarray) -> Self:
        """The same with sketches of ``vectors``, which filters need."""
        sketch, factors = _sketches(vectors)
        return replace(self, sketch=sketch, factors=factors)

    def neighbours(self) -> np.ndarray | None:
        """Out-links, uint32 ``(U, degree)``; None where only scans are wanted."""
        if self.links is None:
            return self.graph
        degree = self.links.shape[1] // (8 + self.codes.shape[1] // 8)
        return np.ascontiguousarray(self.links[:, : 4 * degree]).view(np.uint32)

    def save(self, folder: Path) -> None:
        """Write ``index.codes.npy`` and, where they are there, ``index.{graph,sketch,factors,links}.npy``."""
        for name in _ARRAYS:
            array = getattr(self, name)
            if array is not None:
                np.save(folder / f"index.{name}.npy", array)

    @classmethod
    def load(cls, folder: Path, vectors: np.ndarray) -> Self:
        """Map what ``save`` wrote.

        Where links carry sketches, these and the codes are read into memory: walks read little from
        many places, which huge pages make a tenth to a fifth faster.

        Raises:
            IndexFormatError: A file is missing or does not fit the vectors.
        """
        try:
            codes, graph, sketch, factors, links = (
                _mapped(folder / f"index.{name}.npy") for name in _ARRAYS
            )
        except (OSError, ValueError) as error:
            raise IndexFormatError(
                f"the codes of {folder.name!r} cannot be read ({error}). Rebuild this release."
            ) from error
        count, dimension = vectors.shape
        stride = _stride(dimension)
        if codes is None:
            raise IndexFormatError(
                f"the codes of {folder.name!r} are missing. Rebuild this release."
            )
        if codes.shape != (count, stride) or codes.dtype != np.uint8:
            raise IndexFormatError(
                f"the codes of {folder.name!r} are {codes.dtype} {codes.shape}, not uint8"
                f" {(count, stride)}. Rebuild this release."
            )
        if graph is not None and (
            graph.dtype != np.uint32 or graph.ndim != 2 or len(graph) != count
        ):
            raise IndexFormatError(
                f"the graph of {folder.name!r} is {graph.dtype} {graph.shape}, not uint32 ({count},"
                " degree). Rebuild this release."
            )
        record = _SKETCH_ROWS * (8 + stride // 8)
        if links is not None and (
            links.dtype != np.uint8
            or links.ndim != 2
            or len(links) != count
            or links.shape[1] % record
        ):
            raise IndexFormatError(
                f"the links of {folder.name!r} are {links.dtype} {links.shape}, not uint8 ({count},"
                f" a multiple of {record}). Rebuild this release."
            )
        if links is not None:
            codes, links = _resident(codes), _resident(links)
        return cls(codes, graph, central_node(vectors), sketch, factors, links)


def _stride(dimension: int) -> int:
    """Bytes of a vector's codes."""
    return -(-dimension // CODE_ALIGNMENT) * CODE_ALIGNMENT


def _aligned(shape: tuple[int, int]) -> np.ndarray:
    """Room of bytes that begins on a cache line; numpy asks for huge pages where an array is large."""
    size = shape[0] * shape[1]
    room = np.empty(size + CODE_ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % CODE_ALIGNMENT
    return room[start : start + size].reshape(shape)


def _resident(array: np.ndarray) -> np.ndarray:
    """A copy in this process's memory, aligned."""
    copy = _aligned((array.shape[0], array.shape[1]))
    copy[:] = array
    return copy


def _sketched_links(vectors: np.ndarray, graph: np.ndarray, scale: float) -> np.ndarray:
    """The records of ``graph`` uint32 ``(U, degree)``, widened to a multiple of 32 links by links to the node itself."""
    count, dimension = vectors.shape
    missing = -graph.shape[1] % _SKETCH_ROWS
    if missing:
        own = np.broadcast_to(np.arange(count, dtype=np.uint32)[:, None], (count, missing))
        graph = np.concatenate([graph, own], axis=1)
    links = _aligned((count, graph.shape[1] * (8 + _stride(dimension) // 8)))
    links[:] = 0
    link_records(
        np.ascontiguousarray(vectors), dimension, np.ascontiguousarray(graph), scale, links
    )
    return links


def _mapped(path: Path) -> np.ndarray | None:
    return np.asarray(np.load(path, mmap_mode="r")) if path.is_file() else None


def _sketches(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sketches and factors of ``vectors`` float32 ``(U, D)``."""
    count, dimension = vectors.shape
    stride, blocks = -(-dimension // CODE_ALIGNMENT) * CODE_ALIGNMENT, -(-count // _SKETCH_ROWS)
    sketch, factors = (
        np.zeros((blocks, stride // 4, 16), dtype=np.uint8),
        np.zeros(blocks * _SKETCH_ROWS, dtype=np.float32),
    )
    mean = np.mean(vectors[:: max(1, count // _BLOCK)], axis=0, dtype=np.float32)
    weights = np.array([1, 2, 4, 8], dtype=np.uint8)
    for start in range(0, count, _BLOCK):
        rest = vectors[start : start + _BLOCK] - mean
        signs = np.zeros((-(-len(rest) // _SKETCH_ROWS) * _SKETCH_ROWS, stride), dtype=np.uint8)
        signs[: len(rest), :dimension] = rest > 0
        nibbles = (signs.reshape(-1, 2, 16, stride // 4, 4) * weights).sum(
            axis=4, dtype=np.uint8
        )  # (blocks, half, row, nibble)
        at = start // _SKETCH_ROWS
        sketch[at : at + len(nibbles)] = (nibbles[:, 0] | nibbles[:, 1] << 4).transpose(0, 2, 1)
        width = np.abs(rest).sum(axis=1)
        factors[start : start + len(rest)] = np.einsum("nd,nd->n", rest, rest) / np.maximum(
            width, 1e-12
        )
    return sketch, factors


def central_node(vectors: np.ndarray) -> int:
    """The node nearest to the mean among a sample spread over the corpus: where walks begin."""
    if len(vectors) == 0:
        return 0
    step = max(1, len(vectors) // 2_000)
    sample = np.asarray(vectors[::step])
    return int(np.argmax(sample @ sample.mean(axis=0))) * step


def make_engine(corpus: Corpus, ids: IdTable | None, store: EngineArrays | None) -> Any:
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
            store.links if store else None,
        )
    except ValueError as error:
        raise IndexFormatError(
            f"the index files do not fit each other: {error}. Rebuild this release."
        ) from error
