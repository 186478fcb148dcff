"""Imports point one way: between packages, and between the rooms (folders) of a package.

``ROOMS`` is the plan of the house. A room may import the rooms listed behind it and the files at
the top of its own package (errors, ground modules); a file at the top of a package imports no room
eagerly, except the doors named in ``DOORS``. Type-checking and lazy imports count like any other.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["protos", "encoders", "index_builder", "retrieval", "benchmarks"]
MAX_FILES = 15

ROOMS: dict[str, dict[str, str]] = {
    "encoders": {
        "text": "",
        "tables": "text",
        "datasets": "text tables",
        "enrichment": "text tables",
        "logs": "text tables enrichment",
        "towers": "text tables",
        "config": "towers",
        "inference": "text towers",
        "evaluation": "text datasets towers",
        "compatibility": "text datasets towers evaluation",
        "relevance": "text tables datasets towers evaluation",
        "training/data": "text tables datasets towers config",
        "training": "text datasets towers config training/data",
        "commands": (
            "text tables datasets enrichment logs towers config inference evaluation"
            " compatibility relevance training/data training"
        ),
        "pretraining": "text datasets towers commands",
    },
    "index_builder": {
        "native": "",
        "storage": "native",
        "filters": "",
        "ann": "native storage",
        "live_log": "storage",
        "lexical": "native storage",
        "search": "native storage filters ann live_log lexical",
        "fusion": "storage lexical search",
        "releases": "storage filters ann live_log search fusion",
        "remote": "storage releases",
        "building": "storage filters ann live_log lexical search fusion releases",
        "commands": "storage filters ann live_log search fusion releases remote building",
    },
    "retrieval": {
        "bounds": "",
        "http2": "bounds",
        "client": "",
        "encoding": "",
        "observability": "",
        "releases": "encoding observability",
        "service": "http2 bounds encoding observability releases",
        "web": "http2 client releases service",
        "server": "http2 encoding observability releases service web",
        "demo": "client",
        "start": "client demo",
        "sizing": "",
        "commands": "client observability server sizing",
    },
    "benchmarks": {
        "index": "",
        "serving": "index",
        "faults": "serving",
        "quality": "",
        "paper_tables": "",
        "throughput": "",
    },
}
"""Package -> room -> the rooms of the same package that it may import, ground floor first."""

DOORS = {
    "encoders/__init__.py",
    "encoders/__main__.py",
    "index_builder/__init__.py",
    "index_builder/__main__.py",
    "retrieval/__init__.py",
    "retrieval/__main__.py",
    "retrieval/client_errors.py",
    "retrieval/client_results.py",
    "retrieval/cli.py",
    "benchmarks/commands.py",
}
"""Files at the top of a package that lead into its rooms."""

FILES = [
    path.relative_to(ROOT) for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))
]


def room_of(path: Path) -> str:
    """``encoders/training/data/batches.py`` -> ``training/data``; a file at the top -> ``""``."""
    return "/".join(path.parts[1:-1])


def module_path(module: str) -> Path | None:
    """The file of a module of ours, or None."""
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path.relative_to(ROOT)
    return None


def imported_files(path: Path) -> set[Path]:
    found: set[Path | None] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {module_path(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = module_path(f"{node.module}.{alias.name}")
                found.add(inner or module_path(node.module))
    return {f for f in found if f is not None and f.parts[0] in PACKAGES and f != path}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_package_imports_no_later_package(path: Path) -> None:
    later = set(PACKAGES[PACKAGES.index(path.parts[0]) + 1 :])
    wrong = sorted(str(file) for file in imported_files(path) if file.parts[0] in later)
    assert not wrong, f"{path} imports from a package that depends on it: {wrong}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_room_imports_only_the_rooms_of_the_table(path: Path) -> None:
    package, room = path.parts[0], room_of(path)
    if package == "protos" or str(path) in DOORS or room in ("sample_data",):
        return
    allowed = {"", room, *ROOMS[package].get(room, "").split()}
    wrong = sorted(
        str(file)
        for file in imported_files(path)
        if file.parts[0] == package and (room_of(file) not in allowed or str(file) in DOORS)
    )
    assert not wrong, f"{path} may import {sorted(allowed)}, but imports {wrong}"


def test_table_is_ordered_so_that_no_circle_is_possible() -> None:
    for package, rooms in ROOMS.items():
        names = list(rooms)
        for number, (room, allowed) in enumerate(rooms.items()):
            later = set(allowed.split()) - set(names[:number])
            assert not later, f"{package}/{room} stands above {sorted(later)} in the table"


def test_table_names_every_room() -> None:
    for package, rooms in ROOMS.items():
        there = {room_of(file) for file in FILES if file.parts[0] == package} - {"", "sample_data"}
        assert there == set(rooms), f"{package}: the table and the folders differ"


def test_no_room_holds_too_many_files() -> None:
    tests = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")]
    counts = Counter(file.parent for file in [*FILES, *tests] if "_pb2" not in file.name)
    full = {str(folder): count for folder, count in counts.items() if count > MAX_FILES}
    assert not full, f"more than {MAX_FILES} files: {full}"
