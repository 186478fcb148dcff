"""Errors name what exists."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from encoders.errors import MissingDependency
from index_builder.ann import AnnConfig, build_index
from index_builder.errors import MissingExtension
from tests.helpers.real_vectors import text_vectors

ROOT = Path(__file__).parents[2]
PACKAGES = ("encoders", "index_builder", "retrieval", "benchmarks")


def _extras_named() -> Iterator[tuple[str, str | None]]:
    """Where a ``MissingDependency`` is raised, and the extra that it names."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id == "MissingDependency"
                ):
                    extra = node.args[1]
                    assert isinstance(extra, ast.Constant), f"{path}:{node.lineno}"
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", extra.value


@pytest.mark.slow
def test_missing_dependency_names_an_extra_that_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = dict(_extras_named())
    assert len(named) > 5
    unknown = {
        place: extra
        for place, extra in named.items()
        if extra is not None and extra not in project["optional-dependencies"]
    }
    assert unknown == {}


@pytest.mark.slow
def test_int8_graph_without_the_extension_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index_builder.ann.int8_graph.Engine", None)
    monkeypatch.setattr("index_builder.storage.engine_arrays.Engine", None)
    config = AnnConfig(reproducible=True, sketched_links=False)
    with pytest.raises(
        MissingExtension, match=r"int8-graph.*C\+\+ compiler.*--index hnsw"
    ) as error:
        build_index("int8-graph", text_vectors(100), config)
    assert isinstance(error.value, MissingDependency)


@pytest.mark.slow
def test_symqg_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rabitqlib", None)
    monkeypatch.setattr("index_builder.ann.choice.require_cpu", lambda kind: None)
    with pytest.raises(MissingDependency, match="pip install rabitqlib"):
        build_index("symqg", text_vectors(1_100), AnnConfig())
