"""A hook of mkdocs: pages of the site that lie outside of docs/.

On GitHub the manual links to files of the repository; the site holds those that readers need as
pages of its own, and links to them are turned.
"""

from __future__ import annotations

from pathlib import Path
from posixpath import join, normpath, relpath
from re import Match, compile

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""File of the repository -> page of the site."""
LINK = compile(r"\]\((?P<target>[^)#:\s]+)(?P<rest>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/."""
    for source, page in PAGES.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between docs/ and the pages from outside of it."""
    here = page.file.src_uri
    sources = {name: source for source, name in PAGES.items()}
    in_repository = sources.get(here, f"docs/{here}")

    def turned(link: Match[str]) -> str:
        target = normpath(join(in_repository, "..", link["target"]))
        if target in PAGES:
            target = PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return link[0]
        return f"]({relpath(target, join(here, '..'))}{link['rest'] or ''})"

    return LINK.sub(turned, markdown)
