"""The ``--store`` option that every command on releases shares."""

from __future__ import annotations

from pathlib import Path

import click

from index_builder.publishing import ReleaseStore

store_option = click.option(
    "--store",
    "store_path",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="OMNI_STORE",
    default=Path("store"),
    show_default=True,
    help="Folder with releases/ and live/ (also read from OMNI_STORE).",
)


def open_store(store_path: Path) -> ReleaseStore:
    """The store of a command."""
    return ReleaseStore(store_path)
