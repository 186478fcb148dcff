"""Options of every command that reads tables: how their files are written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from encoders.tables.reading_options import ReadingOptions

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS = (
    click.option("--encoding", default="utf-8", show_default=True, help="Encoding of text files."),
    click.option(
        "--separator", help="Between cells of CSV: , ; | tab ... Default: found in the header."
    ),
    click.option(
        "--quote", help="Quotation mark around cells of CSV, or none. Default: found out."
    ),
    click.option(
        "--escape",
        help="Character before a quotation mark in a quoted cell, or none. Default: found out.",
    ),
    click.option(
        "--decimal-comma/--no-decimal-comma",
        "decimal_comma",
        default=None,
        help="Whether 3,50 in a CSV is a number. Default: found out.",
    ),
    click.option(
        "--rename",
        multiple=True,
        metavar="OLD=NEW",
        help="Read the column OLD as NEW, e.g. sku=id. Repeatable.",
    ),
    click.option(
        "--map",
        "values",
        multiple=True,
        metavar="COLUMN.OLD=NEW",
        help="Read the value OLD of a column as NEW, e.g. action.view=impression. Repeatable.",
    ),
    click.option(
        "--set",
        "constants",
        multiple=True,
        metavar="COLUMN=VALUE",
        help="Value of a column that a file lacks, e.g. entity_type=product. Repeatable.",
    ),
)
_NAMES = (
    "encoding",
    "separator",
    "quote",
    "escape",
    "decimal_comma",
    "rename",
    "values",
    "constants",
)


def reading_flags(function: F) -> F:
    """Add the options, and hand them to a command as one argument ``reading``.

    Stands below ``handle_errors``, which prints what is wrong with them.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        flags = {name: kwargs.pop(name) for name in _NAMES}
        return function(*args, reading=ReadingOptions.of_flags(**flags), **kwargs)

    for option in reversed(_FLAGS):
        option(wrapper)
    return wrapper  # type: ignore[return-value]
