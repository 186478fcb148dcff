"""Small index files that the pinned hnswlib and rabitqlib wrote, and what is in them.

``python -m tests.helpers.library_goldens`` makes them again with the installed versions.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent.parent / "data"
DEGREE = 32
COUNT, DIMENSION = 48, 64


def golden_vectors() -> np.ndarray:
    """Rows of signs, float32 ``(48, 64)``, which compress well."""
    signs = np.random.default_rng(7).integers(0, 2, (COUNT, DIMENSION))
    return np.ascontiguousarray((2 * signs - 1) / 8, dtype=np.float32)


def golden(kind: str, into: Path) -> Path:
    """Unpack the file of a kind as ``index.<kind>``."""
    path = into / f"index.{kind}"
    path.write_bytes(lzma.decompress((FOLDER / f"{kind}.golden.xz").read_bytes()))
    return path


def _links(kind: str) -> np.ndarray:
    return np.load(FOLDER / f"{kind}.golden_links.npy").astype(np.uint32)


LINKS: dict[str, Callable[[], np.ndarray]] = {
    "hnsw": lambda: _links("hnsw"),
    "symqg": lambda: _links("symqg"),
}
"""Links that the libraries' own searches walk, by kind; uint32 ``(48, degree)``."""


def make() -> None:
    """Write the files with the installed libraries, and the links that are read from them."""
    import hnswlib
    import rabitqlib

    from index_builder.ann.graph_files import read_hnsw_links, read_symqg_links

    vectors = golden_vectors()
    FOLDER.mkdir(exist_ok=True)
    hnsw = hnswlib.Index("l2", DIMENSION)
    hnsw.init_index(COUNT, M=4, ef_construction=40, random_seed=1)
    hnsw.add_items(vectors, np.arange(COUNT), num_threads=1)
    symqg = rabitqlib.SymqgIndex(DIMENSION, DEGREE, "l2", 0)
    symqg.build(vectors, 64, 1)
    for kind, save in (("hnsw", hnsw.save_index), ("symqg", symqg.save)):
        path = FOLDER / f"index.{kind}"
        save(str(path))
        read = (
            read_hnsw_links(path, COUNT)
            if kind == "hnsw"
            else read_symqg_links(path, vectors, DEGREE)
        )
        np.save(FOLDER / f"{kind}.golden_links.npy", read.astype(np.uint8))
        packed = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
        (FOLDER / f"{kind}.golden.xz").write_bytes(packed)
        path.unlink()


if __name__ == "__main__":
    make()
