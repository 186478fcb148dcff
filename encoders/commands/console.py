"""Print for commands: progress to stderr, results to stdout, errors in one line, exit codes."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import click
from rich import box
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
from encoders.extras import extra_named
from encoders.interruption import Terminated, end_process

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


_WRITING = {
    errno.ENOSPC: "Free some space, or name a folder on another disk.",
    errno.EDQUOT: "The quota is used up: free some space, or name a folder elsewhere.",
    errno.EROFS: "The file system is read-only: name another folder.",
    errno.EACCES: "Change its owner or mode, or name another.",
    errno.EPERM: "Change its owner or mode, or name another.",
    errno.EMFILE: "Raise the limit: ulimit -n 65536.",
    errno.ENFILE: "Close other programs, or raise the system's limit.",
}
"""Errors of the operating system -> what a user can do."""
_ERROR_NUMBER = re.compile(r"os error (\d+)|code: (\d+)|\[?[Ee]rrno (\d+)")
"""How libraries in Rust and C++ tell an error's number."""


def handle_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Run a command with its log lines on stderr, and turn what ends it into one line there.

    An ``OmniError`` gives the exit code 1, a ``ConfigError`` 2, an error of the operating system 1,
    Ctrl-C 130 and SIGTERM 143; what was begun is cleaned up before. ``OMNI_DEBUG=1`` shows
    tracebacks. Adds the option ``--quiet``.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        quiet = bool(kwargs.pop("quiet", False))
        _print_anything()
        debug = bool(os.environ.get("OMNI_DEBUG"))
        try:
            with (
                sigterm_raises(),
                progress_lines(not quiet),
                log_lines_on_stderr(),
                extra_named(click.get_current_context().command_path),
            ):
                return function(*args, **kwargs)
        except OmniError as error:
            if debug:
                raise
            fail(str(error), 2 if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt as error:
            ended = isinstance(error, Terminated)
            fail(str(error) or ("terminated" if ended else "interrupted"), 143 if ended else 130)
        except Exception as error:
            message = system_error(error)
            if debug or message is None:
                raise
            fail(message)

    click.option("--quiet", is_flag=True, help="Print results, warnings and errors.")(wrapper)
    return wrapper  # type: ignore[return-value]


def system_error(error: BaseException) -> str | None:
    """Say in one line what the operating system refused, and what to do; None: it was not that.

    Libraries wrap these errors in their own: the chain of causes is looked through.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = _error_number(seen)
        if number == errno.EPIPE:
            return None
        if number is not None or "failed writing file" in str(seen):
            where = getattr(seen, "filename", None)
            reason = os.strerror(number) if number else "writing failed; is the disk full?"
            if where is None:
                reason = f"{reason} ({(str(seen).splitlines() or [''])[0][:200]})"
            advice = _WRITING.get(number or errno.ENOSPC, "")
            name = f"{where}: " if where is not None else ""
            return f"{name}{reason}. {advice}".rstrip()
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def _error_number(error: BaseException) -> int | None:
    """Return the number of the operating system's error that an exception tells of."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    library = type(error).__module__.split(".")[0]
    if isinstance(error, OSError) or library in (
        "polars",
        "pyarrow",
        "safetensors",
        "safetensors_rust",
    ):
        found = _ERROR_NUMBER.search(str(error))
        return int(next(filter(None, found.groups()))) if found else None
    return None


def _print_anything() -> None:
    """Let terminals of any encoding print any text: what they lack is written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside the block SIGTERM raises ``Terminated``, unless a handler of another's is set."""
    settable = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if not settable or before not in (signal.SIG_DFL, end_process):
        yield
        return

    def terminate(number: int, frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, before)


_progress_shown = True


@contextmanager
def progress_lines(shown: bool) -> Iterator[None]:
    """Inside the block ``say``, ``stage`` and ``track`` print, or nothing does."""
    global _progress_shown
    before = _progress_shown
    _progress_shown = before and shown
    try:
        yield
    finally:
        _progress_shown = before


def progress_is_shown() -> bool:
    """Tell whether ``say``, ``stage`` and ``track`` print."""
    return _progress_shown


def say(message: str) -> None:
    """Print one line of progress to stderr."""
    if _progress_shown:
        stderr.print(message, markup=False)


class _SayHandler(logging.Handler):
    """Print records as ``say`` does; warnings and errors also where progress is not shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record's message, and its traceback if it has one."""
        try:
            if record.levelno >= logging.WARNING:
                stderr.print(self.format(record), markup=False)
            else:
                say(self.format(record))
        except Exception:
            self.handleError(record)


@contextmanager
def log_lines_on_stderr() -> Iterator[None]:
    """Print the INFO lines of ``LOGGED_PACKAGES`` to stderr, as ``say`` does, inside the block.

    Of other packages warnings are printed. Only commands do this: importing the packages installs
    no handler.
    """
    handler = _SayHandler()
    levels = {}
    root = logging.getLogger()
    others = _SayHandler(logging.WARNING)
    others.addFilter(lambda record: record.name.partition(".")[0] not in LOGGED_PACKAGES)
    # A root logger without a handler gets one as soon as a library logs to it (onnxruntime does),
    # and that one prints every line of ours a second time
    if not root.handlers:
        root.addHandler(others)
    for logger in map(logging.getLogger, LOGGED_PACKAGES):
        if not any(isinstance(known, _SayHandler) for known in logger.handlers):
            levels[logger] = logger.level
            logger.addHandler(handler)
            if logger.getEffectiveLevel() > logging.INFO:
                logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(others)
        for logger, level in levels.items():
            logger.removeHandler(handler)
            logger.setLevel(level)


@contextmanager
def stage(title: str, timings: dict[str, float] | None = None) -> Iterator[None]:
    """Time a stage: print it and its seconds to stderr, and record them in ``timings[title]``."""
    start = time.perf_counter()
    say(f"{title} ...")
    yield
    seconds = time.perf_counter() - start
    if timings is not None:
        timings[title] = round(seconds, 3)
    if _progress_shown:
        stderr.print(f"{title}: {seconds:.1f}s", style="dim", markup=False)


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on stderr when it is a terminal; silent otherwise."""
    if not stderr.is_terminal or not _progress_shown:
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
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    materialised = [list(row) for row in rows]
    for i, name in enumerate(columns):
        numeric = bool(materialised) and all(
            isinstance(row[i], int | float | None) for row in materialised
        )
        table.add_column(name, justify="right" if numeric else "left")
    for row in materialised:
        table.add_row(*map(_cell, row))
    console = Console(highlight=False, width=None if stdout.is_terminal else 100)
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
