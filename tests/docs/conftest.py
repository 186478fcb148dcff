"""What the pages of the manual find in their folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.doc_snippets import REPOSITORY, run_page
from tests.helpers.preloaded_commands import preloaded_commands


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the front of PATH whose `omni` and `python` start at once."""
    with preloaded_commands(tmp_path_factory.mktemp("commands")) as folder:
        yield folder


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Path:
    """A folder like a checkout in which the tutorial was followed to its end."""
    if missing := [program for program in ("curl", "openssl") if shutil.which(program) is None]:
        pytest.skip(f"the manual's pages call {', '.join(missing)}, which is not installed")
    folder = tmp_path_factory.mktemp("manual") / "checkout"
    folder.mkdir()
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    output = run_page(REPOSITORY / "docs" / "tutorial.md", folder, programs)
    (folder / "tutorial_output.txt").write_text(output, encoding="utf-8")
    return folder
