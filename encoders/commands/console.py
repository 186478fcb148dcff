"""Print for commands: progress to stderr, results to stdout, errors in one line, exit codes."""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from encoders.errors import ConfigError, OmniError

P = ParamSpec("P")
T = TypeVar("T")

stderr = Console(stderr=True, highlight=False, soft_wrap=True)
stdout = Console(highlight=False, soft_wrap=True)

LOGGED_PACKAGES = ("encoders", "index_builder", "retrieval", "benchmarks")
"""Loggers whose INFO lines a command shows."""

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the result as one JSON object on stdout and nothing else.",
)
data_option = click.option(
    "--data",
    "data_dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="OMNI_DATA",
    help=(
        "Folder with larger data sets (also read from OMNI_DATA). Without it the sample data in the"
        " package is used."
    ),
)


def fail(message: str, code: int = 1) -> NoReturn:
    """Print a one-line error to stderr and exit with ``code``."""
    stderr.print(f"error: {message}", style="red", markup=False)
    sys.exit(code)


def handle_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Run a command with its log lines on stderr, and turn an ``OmniError`` into one line there.

    The exit code is then 1, of a ``ConfigError`` 2; ``OMNI_DEBUG=1`` shows the traceback.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with log_lines_on_stderr():
                return function(*args, **kwargs)
        except OmniError as error:
            if os.environ.get("OMNI_DEBUG"):
                raise
            fail(str(error), 2 if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt:
            fail("interrupted", 130)

    return wrapper


def say(message: str) -> None:
    """Print one line of progress to stderr."""
    stderr.print(message, markup=False)


class _SayHandler(logging.Handler):
    """Print records as ``say`` does."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record's message, and its traceback if it has one."""
        try:
            say(self.format(record))
        except Exception:
            self.handleError(record)


@contextmanager
def log_lines_on_stderr() -> Iterator[None]:
    """Print the INFO lines of ``LOGGED_PACKAGES`` to stderr, as ``say`` does, inside the block.

    Only commands do this: importing the packages installs no handler.
    """
    handler = _SayHandler()
    levels = {}
    for logger in map(logging.getLogger, LOGGED_PACKAGES):
        if not any(isinstance(known, _SayHandler) for known in logger.handlers):
            levels[logger] = logger.level
            logger.addHandler(handler)
            if logger.getEffectiveLevel() > logging.INFO:
                logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.removeHandler(handler)
            logger.setLevel(level)


@contextmanager
def stage(title: str, timings: dict[str, float] | None = None) -> Iterator[None]:
    """Time a stage: print it and its seconds to stderr, and record them in ``timings[title]``."""
    start = time.perf_counter()
    stderr.print(f"{title} ...", markup=False)
    yield
    seconds = time.perf_counter() - start
    if timings is not None:
        timings[title] = round(seconds, 3)
    stderr.print(f"{title}: {seconds:.1f}s", style="dim", markup=False)


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on stderr when it is a terminal; silent otherwise."""
    if not stderr.is_terminal:
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True) as progress:
        yield from progress.track(items, total=total, description=title)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to stdout: numbers right-aligned, floats to three decimals, None as a dash."""
    table = Table()
    materialised = [list(row) for row in rows]
    for i, name in enumerate(columns):
        numeric = bool(materialised) and all(
            isinstance(row[i], int | float | None) for row in materialised
        )
        table.add_column(name, justify="right" if numeric else "left")
    for row in materialised:
        table.add_row(*map(_cell, row))
    console = Console(highlight=False, width=None if stdout.is_terminal else 160)
    if title:
        # Printed apart: rich wraps a table's own title at the table's width.
        console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(table)


def _cell(value: object) -> str:
    """Print one value of a table."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_json(value: Any) -> None:
    """Print one JSON object to stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def peak_memory_mib() -> float:
    """Return the peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
