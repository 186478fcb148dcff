"""What the documents name is there: files, links, columns."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from encoders.tables.schemas import SCHEMAS
from tests.helpers.doc_snippets import REPOSITORY, pages

PACKAGES = "encoders|index_builder|retrieval|protos|benchmarks|tests|scripts|examples|docs|deploy"
PATH = re.compile(rf"`((?:{PACKAGES})/[\w./-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
DOCUMENTS = [*pages(), REPOSITORY / "benchmarks" / "README.md"]


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", DOCUMENTS, ids=name)
def test_document_paths_exist(page: Path) -> None:
    named = PATH.findall(page.read_text(encoding="utf-8"))
    missing = [path for path in named if not (REPOSITORY / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", DOCUMENTS, ids=name)
def test_document_links_lead_to_files(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_code_pages_named_in_messages_exist() -> None:
    """Errors and help texts send readers to pages of the manual."""
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.toml", "*.sh"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for file in files:
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        for page in re.findall(r"docs/[\w/]+\.md", text):
            assert (REPOSITORY / page).is_file(), f"{file} names {page}"


def test_tables_page_every_column_is_described() -> None:
    text = (REPOSITORY / "docs" / "reference" / "tables.md").read_text(encoding="utf-8")
    for table in SCHEMAS.values():
        section = text.split(f"### {table.name}\n")[1].split("\n## ")[0].split("\n### ")[0]
        described = set(re.findall(r"^\| `(\w+)`", section, re.M))
        assert described == {column.name for column in table.columns}, table.name


def test_readme_fits_one_page() -> None:
    words = (REPOSITORY / "README.md").read_text(encoding="utf-8").split()
    assert len(words) <= 600
