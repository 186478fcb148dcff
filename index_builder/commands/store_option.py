"""How commands name a store, and a release in it by its id or the start of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from index_builder.errors import ReleaseError
from index_builder.releases.store import ReleaseStore
from index_builder.remote.object_store import is_url


class StoreFolder(click.Path):
    """A folder as a path; a URL is refused with what to do."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check one value."""
        if is_url(str(value)):
            self.fail(
                f"expected a folder, but got the URL {value}: `omni release pull` brings a release"
                " into a folder",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class StoreOrUrl(click.Path):
    """A folder as a path, or a URL as text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check one value."""
        return value if is_url(str(value)) else super().convert(value, param, ctx)


store_option = click.option(
    "--store",
    "store_path",
    type=StoreFolder(path_type=Path, file_okay=False),
    envvar="OMNI_STORE",
    default=Path("store"),
    show_default=True,
    help="Folder with releases/ and live/ (also read from OMNI_STORE).",
)

store_or_url_option = click.option(
    "--store",
    "store_path",
    envvar="OMNI_STORE",
    default="store",
    show_default=True,
    help="Folder with releases/ and live/, or the URL of pushed releases (also OMNI_STORE).",
)


def open_store(store_path: Path) -> ReleaseStore:
    """Return the store of a command."""
    return ReleaseStore(store_path)


def full_release_id(store: ReleaseStore, given: str) -> str:
    """Return the id that begins as ``given``, or ``given`` itself where it is one.

    What no id begins with comes back as it is, for the store to say that there is no such release.
    Services take whole ids only.

    Raises:
        ReleaseError: Several ids begin so, or no id can.
    """
    if store.path_of(given).exists():
        return given
    names = (*store.ids(), *store.damaged_ids())
    found = [release_id for release_id in names if release_id.startswith(given)]
    if len(found) > 1:
        raise ReleaseError(
            f"{len(found)} releases begin with {given!r}: {', '.join(found)}. Give more of the one"
            " you mean"
        )
    return found[0] if found else given
