"""Files of hnswlib and rabitqlib: their private layouts, what is said of others, full disks."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index_builder.ann import AnnConfig, build_index, load_index, missing_features
from index_builder.ann.choice import kind_available
from index_builder.ann.graph_files import read_hnsw_links, read_symqg_links
from index_builder.errors import DiskFull, UnsupportedLibrary
from tests.helpers.child_process import ending_in_child
from tests.helpers.library_goldens import DEGREE, LINKS, golden, golden_vectors
from tests.helpers.release_makers import unit_vectors

needs_symqg = pytest.mark.skipif(
    not kind_available("symqg") or bool(missing_features("symqg")), reason="no rabitqlib here"
)


def test_hnsw_golden_file_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    vectors = golden_vectors()
    path = golden("hnsw", tmp_path)
    links = read_hnsw_links(path, len(vectors))
    np.testing.assert_array_equal(links, LINKS["hnsw"]())
    index = load_index("hnsw", tmp_path / "index", vectors, AnnConfig(m=4))
    rows, _ = index.search(vectors[3:4], 1, 50)
    assert rows.tolist() == [3]
    (again,) = index.save(tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


@needs_symqg
def test_symqg_golden_file_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    vectors = golden_vectors()
    path = golden("symqg", tmp_path)
    links = read_symqg_links(path, vectors, DEGREE)
    np.testing.assert_array_equal(links, LINKS["symqg"]())
    index = load_index("symqg", tmp_path / "index", vectors, AnnConfig(degree=DEGREE))
    rows, _ = index.search(vectors[3:4], 1, 50)
    assert rows.tolist() == [3]
    (again,) = index.save(tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:60],
        lambda data: data[: len(data) // 2],
        lambda data: data[8:],
        lambda data: bytes(len(data)),
        lambda data: data[:40] + b"\xff" * (len(data) - 40),
    ],
)
def test_other_layout_is_a_typed_error_that_names_the_version(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    vectors = golden_vectors()
    reads: dict[str, Callable[[Path], Any]] = {
        "hnsw": lambda path: read_hnsw_links(path, len(vectors)),
        "symqg": lambda path: read_symqg_links(path, vectors, DEGREE),
    }
    for kind, read in reads.items():
        path = golden(kind, tmp_path)
        path.write_bytes(damage(path.read_bytes()))
        library = {"hnsw": "hnswlib 0.8.0", "symqg": "rabitqlib"}[kind]
        with pytest.raises(UnsupportedLibrary, match=f"{library}.* another layout"):
            read(path)


def limit_files() -> None:
    """Let a file of this process have at most 60,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("kind", ["hnsw", "symqg", "faiss"])
def test_save_to_a_full_disk_is_disk_full(tmp_path: Path, kind: str) -> None:
    """rabitqlib said "basic_ios::clear: iostream error", hnswlib nothing."""
    if not kind_available(kind):
        pytest.skip(f"{kind} is not installed")
    index = build_index(kind, unit_vectors(1500, 1), AnnConfig(m=4, ef_construction=32))
    told = ending_in_child(limit_files, lambda: index.save(tmp_path / "index"))
    assert told.startswith("DiskFull: index."), told


_SAVES = """
import resource, signal, sys
from pathlib import Path
import numpy as np
import polars as pl
from index_builder.errors import DiskFull
from index_builder.filters.attributes import AttributeTable
from index_builder.storage.corpus import Corpus
from index_builder.storage.durable_files import disk_full_is_clear
from index_builder.storage.id_table import IdTable

folder = Path(sys.argv[1])
vectors = np.eye(300, dtype=np.float32)
noise = pl.DataFrame({"a": np.random.default_rng(0).standard_normal(20_000)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
for save in (
    lambda: Corpus.build(vectors).save(folder),
    lambda: IdTable.build([f"{i:0100d}" for i in range(2_000)]).save(folder),
    lambda: AttributeTable(noise).save(folder / "attributes.parquet"),
    lambda: vectors.tofile(folder / "input.f32"),
):
    try:
        with disk_full_is_clear("building the release", folder):
            save()
    except DiskFull as error:
        print(error)
"""


@pytest.mark.slow
def test_save_of_every_part_to_a_full_disk_is_disk_full(tmp_path: Path) -> None:
    """numpy's error has no number, and polars' is no OSError."""
    command = [sys.executable, "-c", _SAVES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("building the release: the disk, its quota") == 4


@pytest.mark.parametrize("kind", ["hnsw", "symqg"])
def test_neighbours_are_read_from_the_scratch_folder(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small temporary folder stopped builds, or made them publish without the graph's facts."""
    if not kind_available(kind):
        pytest.skip(f"{kind} is not installed")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = AnnConfig(m=4, ef_construction=32, scratch=scratch)
    index = build_index(kind, unit_vectors(1500, 1), config)
    links = index.neighbours()
    assert links is not None and links.shape[0] == 1500
    assert list(scratch.iterdir()) == []
    assert "scratch" not in index.parameters()
    again = build_index(kind, unit_vectors(1500, 1), config)
    assert ending_in_child(limit_files, again.neighbours).startswith("DiskFull: links.")
    with pytest.raises((DiskFull, OSError)):
        build_index(kind, unit_vectors(1500, 1), AnnConfig(m=4, ef_construction=32)).neighbours()
