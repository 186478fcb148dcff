"""What may enter an index: vectors are checked row by row, and exact duplicates share one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from encoders.errors import InvalidVectors
from index_builder.errors import IndexFormatError

NORM_TOLERANCE = 1e-3
UNIT_ERROR = 5e-7
"""Rows whose norm is nearer to 1 stay as they are, to the bit; others are divided by their norm."""
GONE = np.uint32(2**32 - 1)
"""In place of a node's number: the vector is no longer there."""
_BLOCK = 65_536


def check_vectors(
    vectors: np.ndarray, ids: Sequence[str] | None = None, dimension: int | None = None
) -> np.ndarray:
    """Check that ``vectors`` may enter an index, and return them of unit norm, C-contiguous.

    Norms up to ``NORM_TOLERANCE`` away from 1 (of vectors that went through half precision) are
    corrected in a copy: graphs order by distance, scores are inner products, and the two agree on
    unit vectors only.

    Args:
        vectors: Expected float32 ``(N, D)`` with finite unit rows.
        ids: For messages.
        dimension: D, if it is known.

    Raises:
        InvalidVectors: Wrong dtype or shape, or a row with NaN, Inf, zero or another norm than 1;
            names the first bad row.
    """
    if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32:
        got = getattr(vectors, "dtype", type(vectors).__name__)
        raise InvalidVectors(
            f"expected vectors of dtype float32, but got {got}. Convert them with"
            " .astype(np.float32)."
        )
    if (
        vectors.ndim != 2
        or vectors.shape[1] == 0
        or (dimension is not None and vectors.shape[1] != dimension)
    ):
        raise InvalidVectors(
            f"expected vectors of shape (N, {dimension or 'D'}), but got {vectors.shape}. Were they"
            " made by this bundle?"
        )
    if ids is not None and len(ids) != len(vectors):
        raise InvalidVectors(
            f"expected one vector per id, but got {len(ids)} ids and {len(vectors)} vectors."
        )
    given = vectors
    for start in range(0, len(vectors), _BLOCK):
        block = given[start : start + _BLOCK]
        norms = np.sqrt(np.einsum("nd,nd->n", block, block))
        bad = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))
        if len(bad):
            row = start + int(bad[0])
            name = f" (id {ids[row]!r})" if ids is not None else ""
            raise InvalidVectors(f"row {row}{name}: {_what_is_wrong(vectors[row])}")
        off = np.flatnonzero(np.abs(norms - 1) > UNIT_ERROR)
        if len(off):
            if vectors is given:
                vectors = np.array(given, order="C")
            vectors[start + off] = _unit_rows(block[off])
    return np.ascontiguousarray(vectors)


def _unit_rows(rows: np.ndarray) -> np.ndarray:
    """Divide rows by their norms, in float64."""
    wide = rows.astype(np.float64)
    unit: np.ndarray = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit.astype(np.float32)


def normalise_rows(rows: np.ndarray) -> None:
    """Give rows ``(N, D)`` unit norm in place, where they do not have it already."""
    squares = np.einsum("nd,nd->n", rows, rows)
    off = np.flatnonzero(np.abs(squares - 1.0) > 2 * UNIT_ERROR)
    if len(off):
        rows[off] = _unit_rows(rows[off])


def unit_vector(vector: np.ndarray) -> np.ndarray:
    """Return one vector ``(D,)`` of unit norm; the very argument where it has that already."""
    if abs(float(vector.dot(vector)) - 1.0) <= 2 * UNIT_ERROR:
        return vector
    unit: np.ndarray = _unit_rows(vector[None])[0]
    return unit


def _what_is_wrong(vector: np.ndarray) -> str:
    """Describe why a vector may not enter an index, and the fix."""
    if not np.isfinite(vector).all():
        return "the vector holds NaN or Inf. Remove it, or find what the encoder was given."
    if not vector.any():
        return "the vector is all zeros. Remove it: nothing can be near it."
    norm = float(np.sqrt(np.einsum("d,d->", vector, vector)))
    return f"the vector has norm {norm:.4f}, not 1. Divide each vector by its norm."


@dataclass(frozen=True, slots=True)
class Corpus:
    """Distinct vectors and which rows share them.

    Attributes:
        vectors: float32 ``(U, D)``, distinct, in order of first appearance.
        node_of_row: uint32 ``(N,)``, or None when every row has its own vector (then node and row
            are the same number).
        row_starts: uint32 ``(U + 1,)``: the rows of node ``n`` are
            ``rows_by_node[row_starts[n]:row_starts[n + 1]]``; None likewise.
        rows_by_node: uint32 ``(N,)``; None likewise.
    """

    vectors: np.ndarray
    node_of_row: np.ndarray | None = None
    row_starts: np.ndarray | None = None
    rows_by_node: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Count the rows, duplicates included."""
        return len(self.vectors) if self.node_of_row is None else len(self.node_of_row)

    @classmethod
    def build(cls, vectors: np.ndarray) -> Corpus:
        """Find exact duplicates among checked vectors ``(N, D)``."""
        first, inverse = _distinct(vectors)
        if len(first) == len(vectors):
            return cls(vectors)
        return cls._with_nodes(np.ascontiguousarray(vectors[first]), inverse.astype(np.uint32))

    @classmethod
    def _with_nodes(cls, vectors: np.ndarray, node_of_row: np.ndarray) -> Corpus:
        """Derive which rows each node has."""
        starts = np.zeros(len(vectors) + 1, dtype=np.uint32)
        starts[1:] = np.cumsum(np.bincount(node_of_row, minlength=len(vectors)))
        rows_by_node = np.argsort(node_of_row, kind="stable").astype(np.uint32)
        return cls(vectors, node_of_row, starts, rows_by_node)

    def save(self, folder: Path) -> None:
        """Write ``vectors.npy`` and, with duplicates, ``vectors.nodes.npy``."""
        np.save(folder / "vectors.npy", self.vectors)
        if self.node_of_row is not None:
            np.save(folder / "vectors.nodes.npy", self.node_of_row)

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Map what ``save`` wrote.

        Raises:
            IndexFormatError: A file is missing or no such array.
        """
        try:
            # A plain view of the map: indexing a memmap is slow.
            vectors = np.asarray(np.load(folder / "vectors.npy", mmap_mode="r"))
            path = folder / "vectors.nodes.npy"
            nodes = np.load(path) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise IndexFormatError(
                f"the vectors of {folder.name!r} cannot be read ({error}). Rebuild this release."
            ) from error
        if vectors.ndim != 2 or vectors.dtype != np.float32:
            raise IndexFormatError(
                f"the vectors of {folder.name!r} are {vectors.dtype} {vectors.shape}, not float32"
                " (N, D). Rebuild this release."
            )
        if nodes is None:
            return cls(vectors)
        if len(nodes) and int(nodes.max()) >= len(vectors):
            raise IndexFormatError(
                f"the nodes of {folder.name!r} point past its vectors. Rebuild this release."
            )
        return cls._with_nodes(vectors, nodes)


def node_now(earlier: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Find each distinct vector of an earlier corpus in another one, by its very bytes.

    Args:
        earlier: float32 ``(U, D)``, distinct rows.
        vectors: float32 ``(U', D)``, distinct rows.

    Returns:
        uint32 ``(U,)``: its row among ``vectors``, or ``GONE``.
    """
    keys = _hashes(vectors)
    order = np.argsort(keys, kind="stable")
    wanted = _hashes(earlier)
    places = np.searchsorted(keys[order], wanted)
    found = order[np.minimum(places, len(order) - 1)] if len(order) else np.zeros(0, np.int64)
    result = np.full(len(earlier), GONE, dtype=np.uint32)
    for start in range(0, len(earlier) if len(order) else 0, _BLOCK):
        block = slice(start, start + _BLOCK)
        same = keys[found[block]] == wanted[block]
        rows = start + np.flatnonzero(same)
        equal = (earlier[rows] == vectors[found[rows]]).all(axis=1)
        result[rows[equal]] = found[rows[equal]]
    return result


def _distinct(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the distinct vectors among ``vectors`` ``(N, D)``.

    Returns:
        The row of the first copy of each, ascending, and for each row the number of its vector.
    """
    count = len(vectors)
    keys = _hashes(vectors)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) < count:
        twins = np.flatnonzero(first[inverse] != np.arange(count))
        # Hashes collide in about 1 of 10^7 builds of a million vectors.
        if not np.array_equal(vectors[twins], vectors[first[inverse[twins]]]):
            rows = np.ascontiguousarray(vectors + np.float32(0)).view(f"V{4 * vectors.shape[1]}")
            _, first, inverse = np.unique(rows.ravel(), return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]


def _hashes(vectors: np.ndarray) -> np.ndarray:
    """Hash each row to a uint64; -0.0 and 0.0 are one value."""
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 2**63, size=vectors.shape[1], dtype=np.uint64) | np.uint64(1)
    keys = np.empty(len(vectors), dtype=np.uint64)
    for start in range(0, len(vectors), _BLOCK):
        bits = (vectors[start : start + _BLOCK] + np.float32(0)).view(np.uint32)
        keys[start : start + _BLOCK] = bits.astype(np.uint64) @ weights
    return keys
