"""Import public data sets as tables: one module a source, with ``folder -> {table: frame}``."""

from __future__ import annotations

import importlib
from pathlib import Path

import polars as pl

from encoders.errors import ConfigError, DataError
from encoders.tables.checks import Checked, check_frame
from encoders.tables.schemas import schema

ADAPTERS: dict[str, tuple[str, str]] = {
    "unsplash": (
        "encoders.datasets.unsplash:read",
        "Unsplash Lite or Full: photos, keywords, collections as boards, downloads as a log",
    ),
    "esci": (
        "encoders.datasets.esci:read",
        "Amazon ESCI: products and graded judgements for us, es, jp",
    ),
    "wands": (
        "encoders.datasets.wands:read",
        "Wayfair WANDS: products and graded judgements, English",
    ),
    "small": (
        "encoders.datasets.annotated_images:read_small",
        "Emoji and icons with human annotations in 17 languages",
    ),
    "large": (
        "encoders.datasets.annotated_images:read_large",
        "Museum art, emoji, clip art, icons, apps; human annotations in 190 languages",
    ),
}


def import_tables(name: str, path: Path) -> dict[str, Checked]:
    """Read a public data set and check every table against its schema.

    Args:
        name: A key of ``ADAPTERS``.
        path: Folder the data set was unpacked to.

    Returns:
        Checked tables by name; rows that break a rule are left out and counted in the table's
        report.

    Raises:
        ConfigError: Unknown name.
        DataError: A file is missing or not of the published shape.
    """
    if name not in ADAPTERS:
        raise ConfigError(
            f"unknown data set {name!r}. Known: {', '.join(ADAPTERS)}. For your own files see"
            " docs/howto/logs_to_pairs.md."
        )
    module, function = ADAPTERS[name][0].split(":")
    tables: dict[str, pl.DataFrame] = getattr(importlib.import_module(module), function)(path)
    return {
        table: check_frame(frame, schema(table), f"{name} {table}")
        for table, frame in tables.items()
    }


def find_parts(folder: Path, stem: str, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files of one table: ``stem`` plus a suffix, also in numbered parts (``.tsv000``).

    Raises:
        DataError: There is none.
    """
    wanted = [
        p for p in sorted(folder.glob(f"{stem}.*")) if p.suffix.rstrip("0123456789") in suffixes
    ]
    if not wanted:
        names = ", ".join(f"{stem}{s}" for s in suffixes)
        raise DataError(
            f"{folder}: expected {names} (or numbered parts), found none. Unpack the whole data set"
            " and name its folder."
        )
    return wanted
