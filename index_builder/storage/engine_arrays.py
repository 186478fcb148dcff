"""Arrays that the compiled engine searches beside the vectors: codes, sketches and links."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from index_builder.errors import IndexFormatError
from index_builder.native import Engine, carry_link_records, link_records
from index_builder.storage.corpus import GONE, Corpus
from index_builder.storage.id_table import IdTable

MAX_DIMENSION = 65_536
"""Widest vectors that have codes: sums of products of bytes must fit 32 bits."""
_ARRAYS = ("codes", "graph", "sketch", "factors", "links", "quantiser")
_BLOCK = 65_536
_CODE_ALIGNMENT = 64
_HEADROOM = 1.1
"""How much wider codes are made where the corpus changes, so that the next changes fit as well."""
_ENTRY_SAMPLE = 2_000
_SKETCH_ROWS = 32
_ZERO_CODE = 128


@dataclass(frozen=True, slots=True)
class EngineArrays:
    """Codes, sketches and links of a corpus, each memory-mapped where it need not be resident.

    A component is a centre plus a multiple of a step, both of its dimension, and the code is that
    multiple with 128 added (as in LVQ; Aguerrebere et al., VLDB 2023). How far codes are from their
    vectors at most is kept beside them, so that scans know which candidates have to be scored again
    in float32 for the answer to be exact. A sketch keeps the signs of a vector's difference from
    the mean; times a factor of its own it estimates the inner product with a query, but for a
    constant (RaBitQ, Gao and Long, SIGMOD 2024).

    Attributes:
        codes: uint8 ``(U, stride)``; the stride is the dimension rounded up to 64.
        graph: uint32 ``(U, degree)`` out-links, padded with the node itself; None where links are
            sketched or only scans are wanted.
        entry: Node at which walks begin.
        sketch: uint8 ``(blocks, stride / 4, 16)``, 32 rows a block: byte j holds four signs of row
            j and, times 16, of row j + 16; or None.
        factors: float32 ``(32 * blocks,)``, one a sketch; or None.
        links: uint8 ``(U, record)``, read in place of ``graph``: a node's out-links (uint32), a
            factor for each (float32), and sketches of the differences to where they lead, in blocks
            of 32 laid out as in ``sketch``; or None.
        quantiser: float32 ``(2 * D + 2,)``: centres, steps, the largest distance of a vector from
            what its codes stand for, and the largest norm of codes about the centres; None in
            early releases, whose codes have one unknown step: scans then score every row.
    """

    codes: np.ndarray
    graph: np.ndarray | None
    entry: int
    sketch: np.ndarray | None = None
    factors: np.ndarray | None = None
    links: np.ndarray | None = None
    quantiser: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        graph: np.ndarray | None,
        *,
        sketches: bool = False,
        sketched_links: bool = False,
    ) -> Self:
        """Quantise vectors and keep the graph beside them.

        Args:
            vectors: float32 ``(U, D)``.
            graph: Out-links, uint32 ``(U, degree)``; None where only scans are wanted.
            sketches: Make ``sketch`` and ``factors``, which filters use.
            sketched_links: Keep the graph as ``links`` instead of ``graph``.
        """
        codes, quantiser = _quantised(vectors)
        arrays = cls(
            codes,
            None if sketched_links else graph,
            central_node(vectors),
            quantiser=quantiser,
        )
        if sketched_links:
            assert graph is not None, "links need a graph"
            links = _sketched_links(vectors, graph, _link_scale(quantiser))
            arrays = replace(arrays, links=links)
        return arrays.with_sketches(vectors) if sketches else arrays

    def carried(self, vectors: np.ndarray, graph: np.ndarray, node_now: np.ndarray) -> EngineArrays:
        """Return the arrays of a changed corpus: codes and records of what stays are copied.

        So rows that stay have the bytes they had, and a copy of the release elsewhere needs no
        others. Where the earlier quantiser does not serve the new vectors, all are quantised.

        Args:
            vectors: float32 ``(U', D)`` of the changed corpus.
            graph: Its out-links, uint32 ``(U', degree)``.
            node_now: uint32 ``(U,)``, number in the changed corpus of each vector of this one, or
                ``GONE``.
        """
        if self.quantiser is None:
            return EngineArrays.build(vectors, graph, sketched_links=self.links is not None)
        codes, quantiser = self._carried_codes(self.quantiser, vectors, node_now)
        arrays = EngineArrays(codes, graph, central_node(vectors), quantiser=quantiser)
        if self.links is None:
            return arrays
        links = _aligned((len(vectors), self.links.shape[1]))
        links[:] = 0
        scale = _link_scale(quantiser)
        ratio = scale / _link_scale(self.quantiser)
        carry_link_records(
            vectors, vectors.shape[1], graph, scale, self.links, node_now, ratio, links
        )
        return replace(arrays, graph=None, links=links)

    def _carried_codes(
        self, quantiser: np.ndarray, vectors: np.ndarray, node_now: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return codes and quantiser of a changed corpus; arguments as for ``carried``.

        New vectors may lie outside the range of the earlier ones. Their codes are then as far from
        them as the quantiser says, and it serves as long as rounding alone could be that far off.
        """
        dimension = vectors.shape[1]
        centre, step = quantiser[:dimension], quantiser[dimension : 2 * dimension]
        stays = np.flatnonzero(node_now != GONE)
        is_new = np.ones(len(vectors), dtype=bool)
        is_new[node_now[stays]] = False
        new = np.ascontiguousarray(vectors[is_new])
        new_codes, facts = _codes_by(new, centre, step)
        if facts[0] > max(quantiser[-2], np.linalg.norm(step) / 2):
            return _quantised(vectors, _HEADROOM)
        codes = _aligned((len(vectors), self.codes.shape[1]))
        codes[node_now[stays]] = self.codes[stays]
        codes[is_new] = new_codes
        return codes, np.concatenate([quantiser[:-2], np.maximum(quantiser[-2:], facts)])

    def with_sketches(self, vectors: np.ndarray) -> Self:
        """Return the same with sketches of ``vectors``, which filters use."""
        sketch, factors = _sketches(vectors)
        return replace(self, sketch=sketch, factors=factors)

    def neighbours(self) -> np.ndarray | None:
        """Return the out-links, uint32 ``(U, degree)``; None where there are none."""
        if self.links is None:
            return self.graph
        degree = self.links.shape[1] // (8 + self.codes.shape[1] // 8)
        return np.ascontiguousarray(self.links[:, : 4 * degree]).view(np.uint32)

    def save(self, folder: Path) -> None:
        """Write ``index.<name>.npy`` for each array that is there."""
        for name in _ARRAYS:
            array = getattr(self, name)
            if array is not None:
                np.save(folder / f"index.{name}.npy", array)

    @classmethod
    def load(cls, folder: Path, vectors: np.ndarray) -> Self:
        """Map what ``save`` wrote.

        Where links are sketched, these and the codes are read into memory: walks read little from
        many places, which huge pages make a tenth to a fifth faster.

        Raises:
            IndexFormatError: A file is missing or does not fit the vectors.
        """
        arrays = cls.mapped(folder, vectors)
        if arrays.links is None:
            return arrays
        return replace(arrays, codes=_resident(arrays.codes), links=_resident(arrays.links))

    @classmethod
    def mapped(cls, folder: Path, vectors: np.ndarray) -> Self:
        """Map what ``save`` wrote and read none of it into memory. Raises as ``load``."""
        try:
            arrays = {name: _mapped(folder / f"index.{name}.npy") for name in _ARRAYS}
        except (OSError, ValueError) as error:
            raise IndexFormatError(
                f"the codes of {folder.name!r} cannot be read ({error}). Rebuild this release."
            ) from error
        codes, graph, links = arrays["codes"], arrays["graph"], arrays["links"]
        if codes is None:
            raise IndexFormatError(
                f"the codes of {folder.name!r} are missing. Rebuild this release."
            )
        _check_shapes(folder.name, codes, graph, links, vectors.shape)
        _check_quantiser(folder.name, arrays["quantiser"], vectors.shape[1])
        return cls(
            codes,
            graph,
            central_node(vectors),
            arrays["sketch"],
            arrays["factors"],
            links,
            arrays["quantiser"],
        )


def _check_shapes(
    name: str,
    codes: np.ndarray,
    graph: np.ndarray | None,
    links: np.ndarray | None,
    shape: tuple[int, ...],
) -> None:
    """Check codes, graph and links against the shape ``(U, D)`` of the vectors.

    Raises:
        IndexFormatError: They do not fit.
    """
    count, dimension = shape
    stride = _stride(dimension)
    record = _SKETCH_ROWS * (8 + stride // 8)
    if codes.shape != (count, stride) or codes.dtype != np.uint8:
        raise IndexFormatError(
            f"the codes of {name!r} are {codes.dtype} {codes.shape}, not uint8"
            f" {(count, stride)}. Rebuild this release."
        )
    if graph is not None and (graph.dtype != np.uint32 or graph.ndim != 2 or len(graph) != count):
        raise IndexFormatError(
            f"the graph of {name!r} is {graph.dtype} {graph.shape}, not uint32 ({count},"
            " degree). Rebuild this release."
        )
    if links is None:
        return
    if links.dtype != np.uint8 or links.ndim != 2 or len(links) != count or links.shape[1] % record:
        raise IndexFormatError(
            f"the links of {name!r} are {links.dtype} {links.shape}, not uint8 ({count},"
            f" a multiple of {record}). Rebuild this release."
        )


def _quantised(vectors: np.ndarray, headroom: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return codes uint8 ``(U, stride)`` of ``vectors`` and their quantiser.

    Args:
        vectors: float32 ``(U, D)``.
        headroom: By how much the range of codes is wider than that of the vectors.
    """
    centre, step = _centre_and_step(vectors)
    step *= np.float32(headroom)
    codes, facts = _codes_by(vectors, centre, step)
    return codes, np.concatenate([centre, step, facts])


def _codes_by(
    vectors: np.ndarray, centre: np.ndarray, step: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes of ``vectors``, and how far from them and from the centre they are at most.

    Padding holds the code of the centre.
    """
    count, dimension = vectors.shape
    codes = _aligned((count, _stride(dimension)))
    codes[:] = _ZERO_CODE
    error = reach = 0.0
    for start in range(0, count, _BLOCK):
        block = vectors[start : start + _BLOCK]
        levels = np.clip(np.rint((block - centre) / step), 1 - _ZERO_CODE, _ZERO_CODE - 1)
        codes[start : start + _BLOCK, :dimension] = (levels + _ZERO_CODE).astype(np.uint8)
        rest = block - (centre + levels * step)
        error = max(error, float(np.einsum("nd,nd->n", rest, rest).max()) ** 0.5)
        reach = max(reach, float(np.einsum("nd,nd->n", levels, levels).max()) ** 0.5)
    # Rounding of float32 in these sums must not make a bound too small
    return codes, np.array([error * 1.0001 + 1e-6, reach * 1.0001], dtype=np.float32)


def _link_scale(quantiser: np.ndarray) -> float:
    """Return what components are multiplied by to be in units of the mean step."""
    dimension = len(quantiser) // 2 - 1
    return 1.0 / float(quantiser[dimension : 2 * dimension].mean(dtype=np.float64))


def _check_quantiser(name: str, quantiser: np.ndarray | None, dimension: int) -> None:
    """Check the shape of a quantiser, if there is one.

    Raises:
        IndexFormatError: It does not fit.
    """
    wanted = (2 * dimension + 2,)
    if quantiser is not None and (quantiser.shape != wanted or quantiser.dtype != np.float32):
        raise IndexFormatError(
            f"the quantiser of {name!r} is {quantiser.dtype} {quantiser.shape}, not float32"
            f" {wanted}. Rebuild this release."
        )


def _centre_and_step(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle of each dimension's range and the 254th part of its length."""
    low = np.zeros(vectors.shape[1], dtype=np.float32)
    high = low.copy()
    if len(vectors):
        starts = range(0, len(vectors), _BLOCK)
        low = np.min([vectors[s : s + _BLOCK].min(axis=0) for s in starts], axis=0)
        high = np.max([vectors[s : s + _BLOCK].max(axis=0) for s in starts], axis=0)
    step = np.maximum((high - low) / np.float32(2 * _ZERO_CODE - 2), np.float32(1e-9))
    return (high + low) / np.float32(2), step


def _stride(dimension: int) -> int:
    """Return the bytes of a vector's codes."""
    return -(-dimension // _CODE_ALIGNMENT) * _CODE_ALIGNMENT


def _aligned(shape: tuple[int, int]) -> np.ndarray:
    """Allocate bytes that begin on a cache line; numpy asks for huge pages where they are many."""
    size = shape[0] * shape[1]
    room = np.empty(size + _CODE_ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % _CODE_ALIGNMENT
    return room[start : start + size].reshape(shape)


def _resident(array: np.ndarray) -> np.ndarray:
    """Copy an array into this process's memory, aligned."""
    copy = _aligned((array.shape[0], array.shape[1]))
    copy[:] = array
    return copy


def _sketched_links(vectors: np.ndarray, graph: np.ndarray, scale: float) -> np.ndarray:
    """Make the records of ``graph`` uint32 ``(U, degree)``.

    Degrees that are no multiple of 32 are widened by links to the node itself.
    """
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
    """Map an array; None where there is no such file."""
    return np.asarray(np.load(path, mmap_mode="r")) if path.is_file() else None


def _sketches(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make the sketches and factors of ``vectors`` float32 ``(U, D)``."""
    count, dimension = vectors.shape
    stride = _stride(dimension)
    blocks = -(-count // _SKETCH_ROWS)
    sketch = np.zeros((blocks, stride // 4, 16), dtype=np.uint8)
    factors = np.zeros(blocks * _SKETCH_ROWS, dtype=np.float32)
    mean = np.mean(vectors[:: max(1, count // _BLOCK)], axis=0, dtype=np.float32)
    for start in range(0, count, _BLOCK):
        rest = vectors[start : start + _BLOCK] - mean
        nibbles = _sign_nibbles(rest, stride)  # (blocks, half, row, nibble)
        at = start // _SKETCH_ROWS
        sketch[at : at + len(nibbles)] = (nibbles[:, 0] | nibbles[:, 1] << 4).transpose(0, 2, 1)
        width = np.maximum(np.abs(rest).sum(axis=1), 1e-12)
        factors[start : start + len(rest)] = np.einsum("nd,nd->n", rest, rest) / width
    return sketch, factors


def _sign_nibbles(rest: np.ndarray, stride: int) -> np.ndarray:
    """Pack four signs of ``rest`` ``(N, D)`` to a nibble: uint8 ``(blocks, 2, 16, stride / 4)``."""
    rows = -(-len(rest) // _SKETCH_ROWS) * _SKETCH_ROWS
    signs = np.zeros((rows, stride), dtype=np.uint8)
    signs[: len(rest), : rest.shape[1]] = rest > 0
    weights = np.array([1, 2, 4, 8], dtype=np.uint8)
    nibbles: np.ndarray = (signs.reshape(-1, 2, 16, stride // 4, 4) * weights).sum(
        axis=4, dtype=np.uint8
    )
    return nibbles


def central_node(vectors: np.ndarray) -> int:
    """Return the node nearest to the mean among a sample spread over the corpus."""
    if len(vectors) == 0:
        return 0
    step = max(1, len(vectors) // _ENTRY_SAMPLE)
    sample = np.asarray(vectors[::step])
    return int(np.argmax(sample @ sample.mean(axis=0))) * step


def make_engine(corpus: Corpus, ids: IdTable | None, arrays: EngineArrays | None) -> Any:
    """Make the compiled engine over these arrays.

    None where the extension was not built, or vectors are wider than ``MAX_DIMENSION``.

    Raises:
        IndexFormatError: The arrays do not fit each other (a link or an offset points outside).
    """
    if Engine is None or len(corpus.vectors) == 0 or corpus.vectors.shape[1] > MAX_DIMENSION:
        return None
    blob = ids.blob if ids is not None else np.zeros(1, dtype=np.uint8)
    offsets = ids.offsets if ids is not None else np.zeros(corpus.rows + 1, dtype=np.uint64)
    held = {} if arrays is None else {n: getattr(arrays, n) for n in ("entry", *_ARRAYS)}
    try:
        return Engine(
            corpus.vectors,
            int(corpus.vectors.shape[1]),
            blob,
            offsets,
            node_of_row=corpus.node_of_row,
            row_starts=corpus.row_starts,
            rows_by_node=corpus.rows_by_node,
            **held,
        )
    except ValueError as error:
        raise IndexFormatError(
            f"the index files do not fit each other: {error}. Rebuild this release."
        ) from error
