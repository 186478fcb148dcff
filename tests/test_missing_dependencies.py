"""Errors about packages that are not installed name extras that exist and bring the package."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def packages_of(extra: str) -> set[str]:
    """Names of the distributions that an extra brings, through other extras, too."""
    names: set[str] = set()
    for requirement in EXTRAS[extra]:
        nested = re.match(r"omnisearchsage\[(.+)\]", requirement)
        if nested is not None:
            names |= {name for other in nested[1].split(",") for name in packages_of(other)}
        else:
            names.add(re.split(r"[\[<>=;\s]", requirement)[0])
    return names


def named() -> Iterator[tuple[str, str, str | None]]:
    """Place, package and extra of every ``MissingDependency``."""
    for package in ("encoders", "index_builder", "retrieval", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_error = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                if is_error and node.func.id == "MissingDependency":
                    library, extra = (ast.literal_eval(argument) for argument in node.args[:2])
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", library, extra


@pytest.mark.parametrize(("place", "library", "extra"), list(named()))
def test_missing_dependency_names_an_extra_that_brings_the_package(
    place: str, library: str, extra: str | None
) -> None:
    if extra is not None:
        assert extra in EXTRAS, place
        assert library in packages_of(extra), place


def test_commands_name_extras_that_exist() -> None:
    """``omnisearchsage[symqg]`` and ``[native]`` were named by errors and never existed."""
    for package in ("encoders", "index_builder", "retrieval", "benchmarks", "docs"):
        for path in [*(ROOT / package).rglob("*.py"), *(ROOT / package).rglob("*.md")]:
            text = path.read_text(encoding="utf-8")
            for extras in re.findall(r"omnisearchsage\[([\w,]+)\]", text):
                assert set(extras.split(",")) <= set(EXTRAS), path
            for extra in re.findall(r"extra `(\w+)`", text):
                assert extra in EXTRAS, path
