"""One contract for every index implementation, with exact search as the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from encoders.errors import ConfigError
from encoders.exact_search import exact_top_k
from index_builder.ann import (
    KINDS,
    AnnConfig,
    build_index,
    choose_kind,
    load_index,
    missing_features,
    require_cpu,
)
from index_builder.ann.symqg import MIN_ROWS
from index_builder.errors import IndexFormatError, UnsupportedCpu
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
    if kind == "faiss":
        pytest.importorskip("faiss")
    if kind == "symqg":
        pytest.importorskip("rabitqlib")
    if kind == "int8-graph" and Engine is None:
        pytest.skip("the extension was not compiled")
    if missing_features(kind):
        pytest.skip(f"this CPU lacks {missing_features(kind)}")


def test_contract_covers_every_kind() -> None:
    assert {str(index.values[0]) for index in INDEXES} == set(KINDS)


@pytest.mark.parametrize(("kind", "config"), INDEXES)
def test_every_kind_finds_what_exact_search_finds_and_survives_saving(
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


@pytest.mark.parametrize(("kind", "config"), GRAPHS)
def test_links_of_a_graph_point_at_near_nodes(kind: str, config: AnnConfig) -> None:
    _skip_unless_possible(kind)
    vectors = text_vectors(N)
    links = build_index(kind, vectors, config).neighbours()
    assert links is not None and links.dtype == np.uint32 and int(links.max()) < N
    linked = np.einsum("nd,nkd->nk", vectors[:200], vectors[links[:200]]).mean()
    anywhere = (vectors[:200] @ vectors.T).mean()
    assert linked > anywhere + 0.1


@pytest.mark.parametrize(("kind", "config"), INDEXES[1:])
def test_a_missing_or_truncated_file_is_a_typed_error(
    kind: str, config: AnnConfig, tmp_path: Path
) -> None:
    _skip_unless_possible(kind)
    vectors = text_vectors(N)[:1_200]
    with pytest.raises(IndexFormatError):
        load_index(kind, tmp_path / "index", vectors, config)
    build_index(kind, vectors, config).save(tmp_path / "index")
    with pytest.raises(IndexFormatError):
        load_index(kind, tmp_path / "index", vectors[:-1], config)


def test_builds_on_one_thread_of_reproducible_kinds_give_the_same_bytes(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("dimension", "m"), [(7, 16), (100, 6), (256, 20)])
def test_links_with_sketches_lead_where_plain_links_lead(
    dimension: int, m: int, tmp_path: Path
) -> None:
    """Degrees that are no multiple of 32 and odd widths are padded; the same graph gives the same
    neighbours, and nearly the same hits.
    """
    if Engine is None:
        pytest.skip("the extension was not compiled")
    vectors = np.ascontiguousarray(text_vectors(N, 256)[:1_500, :dimension])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    config = AnnConfig(m=m, ef_construction=60, reproducible=True)
    sketched = build_index("int8-graph", vectors, config)
    unsketched = build_index("int8-graph", vectors, replace(config, sketched_links=False))
    links, plain = sketched.neighbours(), unsketched.neighbours()
    assert links is not None and plain is not None and links.shape[1] % 32 == 0
    np.testing.assert_array_equal(links[:, : plain.shape[1]], plain)
    assert (links[:, plain.shape[1] :] == np.arange(1_500)[:, None]).all()
    same = [
        len(
            np.intersect1d(
                sketched.search(v[None], 10, 80)[0], unsketched.search(v[None], 10, 80)[0]
            )
        )
        for v in vectors[:200]
    ]
    assert np.mean(same) >= 9.5


def test_links_that_point_outside_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    if Engine is None:
        pytest.skip("the extension was not compiled")
    vectors = text_vectors(N)[:1_200]
    index = build_index("int8-graph", vectors, CONFIG)
    index.save(tmp_path / "index")
    links = np.load(tmp_path / "index.links.npy")
    for bad, message in ((links[:, :-1], "multiple of"), (links[:-1], "links of")):
        np.save(tmp_path / "index.links.npy", bad)
        with pytest.raises(IndexFormatError, match=message):
            load_index("int8-graph", tmp_path / "index", vectors, CONFIG)
    links[17, :4] = 255
    np.save(tmp_path / "index.links.npy", links)
    with pytest.raises(IndexFormatError, match="past the nodes"):
        load_index("int8-graph", tmp_path / "index", vectors, CONFIG)


def test_auto_says_why_and_respects_size_cpu_and_determinism() -> None:
    modern = frozenset({"avx2", "fma"})
    assert choose_kind(500, features=modern).kind == "exact"
    assert choose_kind(100_000, features=frozenset()).kind == "hnsw"
    assert "avx2" in choose_kind(100_000, features=frozenset()).why
    assert choose_kind(100_000, features=modern, deterministic=True).kind == "hnsw"
    pytest.importorskip("rabitqlib")
    choice = choose_kind(100_000, features=modern)
    assert (choice.kind, choice.rival) == ("symqg", None if Engine is None else "int8-graph")


def test_auto_without_the_extension_takes_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rabitqlib")
    monkeypatch.setattr("index_builder.ann.choice.Engine", None)
    modern = frozenset({"avx2", "fma"})
    choice = choose_kind(100_000, features=modern)
    assert (choice.kind, choice.rival) == ("symqg", None)


def test_a_cpu_without_the_features_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedCpu, match="avx2"):
        require_cpu("symqg", frozenset({"sse4_2"}))
    require_cpu("hnsw", frozenset())


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):
        AnnConfig(degree=48)
    with pytest.raises(ConfigError, match="at least m"):
        AnnConfig(m=64, ef_construction=10)
    with pytest.raises(ConfigError, match="must be one of"):
        build_index("annoy", text_vectors(N)[:10], CONFIG)
    pytest.importorskip("rabitqlib")
    if not missing_features("symqg"):
        with pytest.raises(ConfigError, match=f"{MIN_ROWS:,}"):
            build_index("symqg", text_vectors(N)[:100], CONFIG)


@pytest.mark.parametrize("dimension", [32, 48])
def test_dimensions_that_symqg_cannot_turn_are_left_to_another_kind(dimension: int) -> None:
    """The library raises a bare ValueError below 64 dimensions; auto used to pass it on."""
    pytest.importorskip("rabitqlib")
    choice = choose_kind(100_000, dimension=dimension, features=frozenset({"avx2", "fma"}))
    assert choice.kind == "hnsw" and f"the vectors have {dimension}" in choice.why
    vectors = np.ascontiguousarray(text_vectors(N)[:1_200, :dimension])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if not missing_features("symqg"):
        with pytest.raises(
            ConfigError, match=f"64 to 4,095 dimensions, but got {dimension}.*--index hnsw"
        ):
            build_index("symqg", vectors, CONFIG)
    if Engine is not None:
        assert (
            len(build_index("int8-graph", vectors, UNSKETCHED).search(vectors[:1], 10, 50)[0]) == 10
        )


def test_a_badly_connected_graph_returns_what_it_reaches() -> None:
    """hnswlib answers all or nothing: a graph that leads to fewer than k nodes used to raise
    RuntimeError in the middle of calibration.
    """
    vectors = islands()
    index = build_index("hnsw", vectors, AnnConfig(m=2, ef_construction=2))
    found = [index.search(vectors[i : i + 1], 100, 100)[0] for i in range(0, 1_600, 40)]
    assert min(len(rows) for rows in found) < 100
    assert all(len(set(rows.tolist())) == len(rows) > 0 for rows in found)
    rows, _ = index.search_batch(vectors[::40], 100, 100)
    assert [row[row >= 0].tolist() for row in rows] == [f.tolist() for f in found]


def test_a_kind_of_a_newer_version_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(
        IndexFormatError,
        match=r"'quantum' is unknown to this version.*version of omnisearchsage that wrote it",
    ):
        load_index("quantum", tmp_path / "index", np.eye(4, dtype=np.float32), AnnConfig())


@pytest.mark.parametrize(("old_kind", "sketched"), [("swift", True), ("lean", False)])
def test_renamed_kind_builds_and_loads_as_int8_graph(
    old_kind: str, sketched: bool, tmp_path: Path
) -> None:
    if Engine is None:
        pytest.skip("the extension was not compiled")
    vectors = text_vectors(N)[:1_200]
    built = build_index(old_kind, vectors, CONFIG)
    built.save(tmp_path / "index")
    loaded = load_index(old_kind, tmp_path / "index", vectors, CONFIG)
    assert built.kind == loaded.kind == "int8-graph"
    assert built.parameters()["sketched_links"] is loaded.config.sketched_links is sketched
    assert (tmp_path / "index.links.npy").is_file() is sketched
    assert (tmp_path / "index.graph.npy").is_file() is not sketched


@pytest.mark.parametrize("kind", ["rabitq", "faiss-ivf"])
def test_retired_kind_is_refused_with_another_kind_to_use(kind: str, tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(IndexFormatError, match=f"'{kind}' is no longer read.*--index"):
        load_index(kind, tmp_path / "index", vectors, AnnConfig())
    with pytest.raises(ConfigError, match=f"'{kind}'.*is retired: use --index"):
        build_index(kind, vectors, AnnConfig())


def test_auto_with_low_memory_takes_unsketched_links_or_hnsw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("index_builder.ann.choice.Engine", None)
    assert choose_kind(100_000, low_memory=True).kind == "hnsw"
    monkeypatch.setattr("index_builder.ann.choice.Engine", object())
    choice = choose_kind(100_000, low_memory=True)
    assert (choice.kind, choice.sketched_links) == ("int8-graph", False)
