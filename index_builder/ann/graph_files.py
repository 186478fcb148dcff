"""Write files by the libraries that built them, read out-links from them, and check graphs.

The formats are private to rabitqlib and hnswlib, whose versions are therefore pinned
(``pyproject.toml``): what is read is checked against the vectors, and the tests read a small file
of each.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np

from index_builder.errors import DiskFull, UnsupportedLibrary

_SYMQG_HEADER = 38
_HNSW_HEADER = struct.Struct("<QQQQQQiIQQQdQ")


def save_with_library(path: Path, save: Callable[[str], None], least_bytes: int) -> None:
    """Let a library write a file, and check that it is whole.

    Libraries say of a full disk that "basic_ios::clear" failed, or nothing at all.

    Args:
        path: Of the file.
        save: Writes it.
        least_bytes: Fewest bytes of a whole file.

    Raises:
        DiskFull: The file could not be written, or lacks its end.
    """
    try:
        save(str(path))
        written = path.stat().st_size
    except (RuntimeError, OSError) as error:
        raise _disk_full(path, f"({error})") from error
    if written < least_bytes:
        raise _disk_full(path, f"({written:,} of {least_bytes:,} bytes)")


def _disk_full(path: Path, detail: str) -> DiskFull:
    free = shutil.disk_usage(path.parent).free
    return DiskFull(
        f"{path.name} could not be written {detail}: {free / 2**20:,.0f} MiB are free in"
        f" {path.parent}, or a quota or the file size limit is reached. Nothing was published."
        " Free some space (for example `omni release gc`) and run again."
    )


@contextmanager
def library_file(suffix: str, scratch: Path | None) -> Iterator[Path]:
    """Yield a path for a file that a library writes and this module reads, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="links-", dir=scratch) as folder:
        yield Path(folder) / f"links{suffix}"


def unknown_layout(library: str) -> UnsupportedLibrary:
    """Return the error for a library whose files have another layout than expected."""
    try:
        version = metadata.version(library)
    except metadata.PackageNotFoundError:
        version = "of an unknown version"
    return UnsupportedLibrary(
        f"{library} {version} writes files of another layout than this version reads. Install the"
        " version that `pip install omnisearchsage` asks for, or choose another kind (--index)."
    )


def read_symqg_links(path: Path, vectors: np.ndarray, degree: int) -> np.ndarray:
    """Read the links of a SymphonyQG file with raw vectors.

    A row holds the float32 vector, the codes and factors of its neighbours, and last their numbers.

    Returns:
        uint32 ``(N, degree)``.

    Raises:
        UnsupportedLibrary: Its layout is another.
    """
    count, dimension = vectors.shape
    stride = (path.stat().st_size - _SYMQG_HEADER) // count // 4 * 4
    if stride < 4 * (dimension + degree):
        raise unknown_layout("rabitqlib")
    rows = np.memmap(path, dtype=np.uint8, mode="r", offset=_SYMQG_HEADER, shape=(count, stride))
    some = np.unique(np.linspace(0, count - 1, 64).astype(np.int64))
    if not np.array_equal(
        np.ascontiguousarray(rows[some, : 4 * dimension]).view(np.float32), vectors[some]
    ):
        raise unknown_layout("rabitqlib")
    links = np.ascontiguousarray(rows[:, stride - 4 * degree :]).view(np.uint32)
    if int(links.max()) >= count:
        raise unknown_layout("rabitqlib")
    return links


def read_hnsw_links(path: Path, count: int) -> np.ndarray:
    """Read the base layer's links of an hnswlib file.

    hnswlib stores elements in the order they were added, which under several threads is not the
    order of their labels.

    Returns:
        uint32 ``(N, 2M)``, padded with the node itself.

    Raises:
        UnsupportedLibrary: Its layout is another.
    """
    with path.open("rb") as file:
        header = file.read(_HNSW_HEADER.size)
    if len(header) < _HNSW_HEADER.size:
        raise unknown_layout("hnswlib")
    _, _, stored, size, label_at, data_at, _, _, _, most, _, _, _ = _HNSW_HEADER.unpack(header)
    if (
        stored != count
        or data_at < 4 + 4 * most
        or path.stat().st_size < _HNSW_HEADER.size + count * size
    ):
        raise unknown_layout("hnswlib")
    elements = np.memmap(
        path, dtype=np.uint8, mode="r", offset=_HNSW_HEADER.size, shape=(count, size)
    )
    sizes = np.ascontiguousarray(elements[:, :2]).view(np.uint16).ravel()
    inner = np.ascontiguousarray(elements[:, 4 : 4 + 4 * most]).view(np.uint32)
    labels = np.ascontiguousarray(elements[:, label_at : label_at + 8]).view(np.uint64).ravel()
    if int(sizes.max()) > most or int(labels.max()) >= count:
        raise unknown_layout("hnswlib")
    used = np.arange(most) < sizes[:, None]
    if int(np.where(used, inner, 0).max()) >= count:
        raise unknown_layout("hnswlib")
    own = np.broadcast_to(np.arange(count, dtype=np.uint32)[:, None], inner.shape)
    links = np.empty((count, int(most)), dtype=np.uint32)
    links[labels] = labels[np.where(used, inner, own)]
    return links


def unreachable_nodes(links: np.ndarray) -> int:
    """Count the nodes that no path from the largest strongly connected component reaches.

    Args:
        links: uint32 ``(N, degree)`` out-links.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

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
