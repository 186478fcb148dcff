"""One contract for every index implementation, with exact search as the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Thread, local
from typing import Any

import hnswlib
import numpy as np
import pytest

from encoders.exact_search import exact_top_k
from index_builder.ann import KINDS, AnnConfig, build_index, load_index
from index_builder.ann.choice import kind_available
from index_builder.ann.hnsw import HnswIndex
from index_builder.errors import IndexFormatError
from index_builder.native import Engine
from index_builder.search.calibration import recall_per_query
from tests.helpers.real_vectors import islands, text_vectors

N = 3_000
CONFIG = AnnConfig(m=12, ef_construction=100)
UNSKETCHED = replace(CONFIG, sketched_links=False)
INDEXES = [
    pytest.param(kind, config, id=name)
    for name, kind, config in (
        ("exact", "exact", CONFIG),
        ("hnsw", "hnsw", CONFIG),
        ("symqg", "symqg", CONFIG),
        ("int8-graph", "int8-graph", CONFIG),
        ("int8-graph unsketched", "int8-graph", UNSKETCHED),
        ("faiss", "faiss", CONFIG),
    )
]
GRAPHS = INDEXES[1:-1]


def _skip_unless_possible(kind: str) -> None:
    if not kind_available(kind):
        pytest.skip(f"index kind {kind!r} cannot be built here")


def test_contract_covers_every_kind() -> None:
    assert {str(index.values[0]) for index in INDEXES} == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "config"), INDEXES)
def test_index_saved_and_loaded_finds_what_exact_search_finds(
    kind: str, config: AnnConfig, tmp_path: Path
) -> None:
    _skip_unless_possible(kind)
    vectors, queries = text_vectors(N + 100)[:N], text_vectors(N + 100)[N:]
    _, exact_scores = exact_top_k(queries, vectors, 10)
    built = build_index(kind, vectors, config)
    built.save(tmp_path / "index")
    loaded = load_index(kind, tmp_path / "index", vectors, config)
    found = []
    for i in range(len(queries)):
        rows, distances = loaded.search(queries[i : i + 1], 10, 200)
        same_rows, _ = built.search(queries[i : i + 1], 10, 200)
        assert rows.tolist() == same_rows.tolist()
        assert len(set(rows.tolist())) == len(rows) <= 10
        assert (np.diff(distances) >= -1e-5).all()
        if loaded.true_distances:
            np.testing.assert_allclose(
                1 - distances / 2, vectors[rows.astype(np.int64)] @ queries[i], atol=1e-4
            )
        found.append(rows)
    recall = recall_per_query(found, queries, vectors, exact_scores).mean()
    assert recall >= (1.0 if built.exact else 0.95), f"recall@10 = {recall:.3f}"
    batch_rows, _ = loaded.search_batch(queries[:5], 10, 200)
    assert [row.tolist() for row in batch_rows] == [f.tolist() for f in found[:5]]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "config"), GRAPHS)
def test_neighbours_of_a_graph_are_near_nodes(kind: str, config: AnnConfig) -> None:
    _skip_unless_possible(kind)
    vectors = text_vectors(N)
    links = build_index(kind, vectors, config).neighbours()
    assert links is not None and links.dtype == np.uint32 and int(links.max()) < N
    linked = np.einsum("nd,nkd->nk", vectors[:200], vectors[links[:200]]).mean()
    anywhere = (vectors[:200] @ vectors.T).mean()
    assert linked > anywhere + 0.1


@pytest.mark.parametrize(("kind", "config"), INDEXES[1:])
def test_load_without_files_or_of_other_vectors_raises_index_format_error(
    kind: str, config: AnnConfig, tmp_path: Path
) -> None:
    _skip_unless_possible(kind)
    vectors = text_vectors(N)[:1_200]
    with pytest.raises(IndexFormatError):
        load_index(kind, tmp_path / "index", vectors, config)
    build_index(kind, vectors, config).save(tmp_path / "index")
    with pytest.raises(IndexFormatError):
        load_index(kind, tmp_path / "index", vectors[:-1], config)


@pytest.mark.slow
def test_reproducible_builds_give_the_same_bytes(tmp_path: Path) -> None:
    vectors = text_vectors(N)[:1_200]
    for name in ("a", "b"):
        build_index("hnsw", vectors, CONFIG).save(tmp_path / name)
    assert (tmp_path / "a.hnsw").read_bytes() == (tmp_path / "b.hnsw").read_bytes()
    if Engine is not None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            build_index("int8-graph", vectors, replace(CONFIG, reproducible=True)).save(
                tmp_path / name / "index"
            )
        for file in ("index.codes.npy", "index.links.npy"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_hnsw_on_a_badly_connected_graph_returns_what_it_reaches() -> None:
    """hnswlib raises RuntimeError where a graph leads to fewer than k nodes."""
    vectors = islands()
    index = build_index("hnsw", vectors, AnnConfig(m=2, ef_construction=2))
    found = [index.search(vectors[i : i + 1], 100, 100)[0] for i in range(0, 1_600, 40)]
    assert min(len(rows) for rows in found) < 100
    assert all(len(set(rows.tolist())) == len(rows) > 0 for rows in found)
    rows, _ = index.search_batch(vectors[::40], 100, 100)
    assert [row[row >= 0].tolist() for row in rows] == [f.tolist() for f in found]


def test_hnsw_searches_of_several_threads_each_keep_their_own_ef() -> None:
    """hnswlib keeps one ef for all callers: a wide search neither slows others nor is narrowed."""
    vectors = text_vectors(N)[:400]
    index = build_index("hnsw", vectors, CONFIG)
    assert isinstance(index, HnswIndex)
    candidates: dict[int, set[int]] = {}
    asked = local()

    class Watched:
        """The library's index; notes how many candidates each search had room for."""

        def __init__(self, inner: hnswlib.Index) -> None:
            self.inner = inner

        def knn_query(self, query: np.ndarray, k: int, num_threads: int) -> Any:
            found = self.inner.knn_query(query, k, num_threads=num_threads)
            candidates.setdefault(asked.ef, set()).add(max(k, self.inner.ef))
            return found

    index._index = Watched(index._index)

    def search(ef: int) -> None:
        asked.ef = ef
        for row in range(200):
            found, distances = index.search(vectors[row : row + 1], 5, ef)
            assert len(found) == len(distances) == 5

    threads = [Thread(target=search, args=(ef,)) for ef in (10, 150, 40, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert candidates == {10: {10}, 40: {40}, 150: {150}, 300: {300}}
