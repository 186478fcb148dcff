"""Kinds by name: what auto chooses, what a CPU can run, and names of earlier versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from encoders.errors import ConfigError
from index_builder.ann import (
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
from tests.helpers.real_vectors import text_vectors

N = 3_000
CONFIG = AnnConfig(m=12, ef_construction=100)
UNSKETCHED = AnnConfig(m=12, ef_construction=100, sketched_links=False)


def test_choose_kind_respects_size_cpu_and_determinism() -> None:
    modern = frozenset({"avx2", "fma"})
    assert choose_kind(500, features=modern).kind == "exact"
    assert choose_kind(100_000, features=frozenset()).kind == "hnsw"
    assert "avx2" in choose_kind(100_000, features=frozenset()).why
    assert choose_kind(100_000, features=modern, deterministic=True).kind == "hnsw"
    pytest.importorskip("rabitqlib")
    choice = choose_kind(100_000, features=modern)
    assert (choice.kind, choice.rival) == ("symqg", None if Engine is None else "int8-graph")


def test_choose_kind_without_the_extension_takes_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rabitqlib")
    monkeypatch.setattr("index_builder.ann.choice.Engine", None)
    modern = frozenset({"avx2", "fma"})
    choice = choose_kind(100_000, features=modern)
    assert (choice.kind, choice.rival) == ("symqg", None)


def test_require_cpu_names_missing_features() -> None:
    with pytest.raises(UnsupportedCpu, match="avx2"):
        require_cpu("symqg", frozenset({"sse4_2"}))
    require_cpu("hnsw", frozenset())


def test_build_index_with_impossible_settings_raises_config_error() -> None:
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
def test_choose_kind_for_few_dimensions_takes_another_kind_than_symqg(dimension: int) -> None:
    """The library raises a bare ValueError below 64 dimensions."""
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


def test_load_index_of_an_unknown_kind_names_the_version_to_use(tmp_path: Path) -> None:
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


def test_choose_kind_with_low_memory_takes_unsketched_links_or_hnsw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("index_builder.ann.choice.Engine", None)
    assert choose_kind(100_000, low_memory=True).kind == "hnsw"
    monkeypatch.setattr("index_builder.ann.choice.Engine", object())
    choice = choose_kind(100_000, low_memory=True)
    assert (choice.kind, choice.sketched_links) == ("int8-graph", False)
