"""Every shell and Python block of README and manual runs as it is written."""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path

import pytest

from encoders.config.train_config import train_config
from tests.helpers.doc_snippets import REPOSITORY, RUN, SHOWN, blocks_of, pages, run_page

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
PAGES = [
    page
    for page in pages()
    if page != TUTORIAL
    and any(block.language in RUN and not block.not_run for block in blocks_of(page))
]
FIND_A_SERVER = {"filters", "live_writes", "monitoring", "serving", "clients", "http_json"}
"""Pages that say "with its server running"."""
NOT_RUN = 16
"""Blocks that cannot run here, each with its reason in the page; one more needs a decision."""


LARGE = 1 << 20
"""Bytes. Larger files (weights, indexes) are never written in place, so pages share them."""


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def copy_or_share(source: str, target: str) -> None:
    if os.path.getsize(source) > LARGE:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


@pytest.mark.slow
def test_tutorial_followed_to_its_end_answers_queries(checkout: Path) -> None:
    output = (checkout / "tutorial_output.txt").read_text(encoding="utf-8")
    assert "lighthouse in a storm" in output


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page_every_block_runs(page: Path, checkout: Path, programs: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout, tmp_path / "checkout", copy_function=copy_or_share)
    folder = tmp_path / "checkout" / "my_search"
    run_page(page, folder, programs, served=page.stem in FIND_A_SERVER)


def test_run_page_failing_block_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```bash\necho first\n```\n\n```bash\nfalse\n```\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    with pytest.raises(AssertionError, match=r"first\n(.*\n)*failed: .*page.md:7"):
        run_page(page, tmp_path / "folder", tmp_path)


def test_blocks_languages_are_known() -> None:
    for page in pages():
        for block in blocks_of(page):
            assert block.language in RUN | SHOWN, f"{block}: a fence needs one of {RUN | SHOWN}"


def test_blocks_not_run_are_counted() -> None:
    marked = [block for page in pages() for block in blocks_of(page) if block.not_run]
    assert all(block.language in RUN for block in marked)
    assert len(marked) == NOT_RUN, [f"{block}: {block.not_run}" for block in marked]


def test_toml_blocks_without_title_are_training_settings() -> None:
    for page in pages():
        for block in blocks_of(page):
            if block.language == "toml" and not block.title:
                train_config(tomllib.loads(block.text), str(block))
