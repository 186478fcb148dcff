"""Read out-links from the files of the libraries that built them, and check graphs.

The formats are private to rabitqlib and hnswlib: what is read is checked against the vectors.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

_SYMQG_HEADER = 38
_HNSW_HEADER = struct.Struct("<QQQQQQiIQQQdQ")


def read_symqg_links(path: Path, vectors: np.ndarray, degree: int) -> np.ndarray | None:
    """Read the links of a SymphonyQG file with raw vectors; None where its layout is another.

    A row holds the float32 vector, the codes and factors of its neighbours, and last their numbers.

    Returns:
        uint32 ``(N, degree)``.
    """
    count, dimension = vectors.shape
    stride = (path.stat().st_size - _SYMQG_HEADER) // count // 4 * 4
    if stride < 4 * (dimension + degree):
        return None
    rows = np.memmap(path, dtype=np.uint8, mode="r", offset=_SYMQG_HEADER, shape=(count, stride))
    some = np.unique(np.linspace(0, count - 1, 64).astype(np.int64))
    if not np.array_equal(
        np.ascontiguousarray(rows[some, : 4 * dimension]).view(np.float32), vectors[some]
    ):
        return None
    links = np.ascontiguousarray(rows[:, stride - 4 * degree :]).view(np.uint32)
    return links if int(links.max()) < count else None


def read_hnsw_links(path: Path, count: int) -> np.ndarray | None:
    """Read the base layer's links of an hnswlib file; None where its layout is another.

    hnswlib stores elements in the order they were added, which under several threads is not the
    order of their labels.

    Returns:
        uint32 ``(N, 2M)``, padded with the node itself.
    """
    with path.open("rb") as file:
        header = file.read(_HNSW_HEADER.size)
    if len(header) < _HNSW_HEADER.size:
        return None
    _, _, stored, size, label_at, data_at, _, _, _, most, _, _, _ = _HNSW_HEADER.unpack(header)
    if (
        stored != count
        or data_at < 4 + 4 * most
        or path.stat().st_size < _HNSW_HEADER.size + count * size
    ):
        return None
    elements = np.memmap(
        path, dtype=np.uint8, mode="r", offset=_HNSW_HEADER.size, shape=(count, size)
    )
    sizes = np.ascontiguousarray(elements[:, :2]).view(np.uint16).ravel()
    inner = np.ascontiguousarray(elements[:, 4 : 4 + 4 * most]).view(np.uint32)
    labels = np.ascontiguousarray(elements[:, label_at : label_at + 8]).view(np.uint64).ravel()
    if int(sizes.max()) > most or int(labels.max()) >= count:
        return None
    used = np.arange(most) < sizes[:, None]
    if int(np.where(used, inner, 0).max()) >= count:
        return None
    own = np.broadcast_to(np.arange(count, dtype=np.uint32)[:, None], inner.shape)
    links = np.empty((count, int(most)), dtype=np.uint32)
    links[labels] = labels[np.where(used, inner, own)]
    return links


def unreachable_nodes(links: np.ndarray) -> int:
    """Count the nodes that no path from the largest strongly connected component reaches.

    Args:
        links: uint32 ``(N, degree)`` out-links.
    """
    count, degree = links.shape
    graph = csr_matrix(
        (
            np.ones(links.size, dtype=np.bool_),
            links.ravel().astype(np.int64),
            np.arange(0, links.size + 1, degree),
        ),
        shape=(count, count),
    )
    parts, labels = connected_components(graph, directed=True, connection="strong")
    if parts == 1:
        return 0
    reached = labels == np.argmax(np.bincount(labels))
    frontier = np.flatnonzero(reached)
    while len(frontier):
        targets = np.unique(links[frontier])
        frontier = targets[~reached[targets]]
        reached[frontier] = True
    return int(count - np.count_nonzero(reached))
