"""constraints.txt, the constraints of uv in pyproject.toml, and uv.lock agree on versions."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("constraints.txt", "pyproject.toml", "uv.lock")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "lock_versions.py"))


def test_lock_agrees_with_the_constraints(script: dict[str, Any]) -> None:
    assert script["disagreements"](ROOT) == []


def test_lock_other_version_or_index_is_named(script: dict[str, Any], tmp_path: Path) -> None:
    disagreements: Callable[[Path], list[str]] = script["disagreements"]
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    polars = script["pinned"]()["polars"]
    constraints = tmp_path / "constraints.txt"
    lines = constraints.read_text(encoding="utf-8")
    constraints.write_text(lines.replace(f"polars=={polars}", "polars==0.0.1"), encoding="utf-8")
    project, locked = disagreements(tmp_path)
    assert project.startswith("pyproject.toml") and f"polars {polars}" in locked
    constraints.write_text(lines, encoding="utf-8")
    lock = tmp_path / "uv.lock"
    text = lock.read_text(encoding="utf-8")
    lock.write_text(text.replace("https://pypi.org/simple", "https://a.b/c", 1), encoding="utf-8")
    assert "another index" in disagreements(tmp_path)[0]


def test_lock_has_every_extra(script: dict[str, Any]) -> None:
    import tomllib

    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    (own,) = (package for package in lock["package"] if package["name"] == "omnisearchsage")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(own["metadata"]["provides-extras"]) == set(project["optional-dependencies"])
