"""Every shell and Python block of README and manual runs as it is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.doc_snippets import REPOSITORY, RUN, SHOWN, blocks_of, pages, run_page

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
PAGES = [
    page
    for page in pages()
    if page.parent.name == "howto"
    and any(block.language in RUN and not block.not_run for block in blocks_of(page))
]


def test_tutorial_followed_to_its_end_answers_queries(checkout: Path) -> None:
    output = (checkout / "tutorial_output.txt").read_text(encoding="utf-8")
    assert "lighthouse in a storm" in output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_page_every_block_runs(page: Path, checkout: Path, programs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder)
    run_page(page, folder, programs)


def test_blocks_languages_are_known() -> None:
    for page in pages():
        for block in blocks_of(page):
            assert block.language in RUN | SHOWN, f"{block}: a fence needs one of {RUN | SHOWN}"
