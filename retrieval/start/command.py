"""``omni start``: one command from own files to answers."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click
import polars as pl

from encoders.commands.console import fail, handle_errors, json_option, print_json, say
from encoders.commands.reading_flags import reading_flags
from encoders.errors import ConfigError
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import ENTITY_TYPES
from retrieval.start.recipe import (
    FEWEST_PAIRS,
    Prepared,
    count_pairs,
    hold_out,
    pairs_of_titles,
    write_config,
)
from retrieval.start.recognition import as_shell, recognised_flags

SECONDS_UNTIL_READY = 120.0


@dataclass
class Start:
    """One run: where it writes, what it was given, and the commands that it ran."""

    out: Path
    entity_type: str
    reading: ReadingOptions
    given_flags: list[str]
    as_json: bool
    commands: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        """Folder of the tables."""
        return self.out / "data"

    def run(self, *arguments: object) -> None:
        """Run an ordinary command, printed so that it can be repeated."""
        words = [str(argument) for argument in arguments]
        self.commands.append(as_shell(words))
        say(f"\n$ {self.commands[-1]}")
        done = subprocess.run(
            [sys.executable, "-m", "retrieval", *words],
            check=False,
            stdout=sys.stderr.fileno() if self.as_json else None,
        )
        if done.returncode:
            fail(
                f"this step failed: {self.commands[-1]}. Mend what it says, then give the same"
                " omni start again.",
                done.returncode if done.returncode > 0 else 128 - done.returncode,
            )

    def convert(self, path: Path, table: str, target: Path, *, drop_bad_rows: bool = False) -> None:
        """Write a file of another system as a table of this one."""
        flags = recognised_flags(path, table, self.reading, self.entity_type)
        for flag in flags:
            say(f"recognised in {path.name}: {flag}")
        drop = ["--drop-bad-rows"] if drop_bad_rows else []
        arguments = ["--table", table, "--out", target, *self.given_flags, *flags, *drop]
        self.run("data", "convert", path, *arguments)


F = TypeVar("F", bound=Callable[..., Any])


def _input_option(name: str, help_text: str, *, required: bool = False) -> Callable[[F], F]:
    path = click.Path(exists=True, path_type=Path)
    return click.option(name, type=path, required=required, help=help_text)


@click.command()
@_input_option("--catalogue", "What can be found: a file or folder of any form.", required=True)
@_input_option("--log", "Search log: who searched what and clicked, saved or bought what.")
@_input_option("--pairs", "Queries with the entity that answers each, instead of a log.")
@_input_option("--boards", "Collections that users saved entities to.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for tables, towers and store.",
)
@click.option(
    "--entity-type",
    type=click.Choice(ENTITY_TYPES),
    default="product",
    show_default=True,
    help="What the rows are, where a file does not say.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="Time for the training steps.",
)
@click.option("--port", default=50051, show_default=True, help="gRPC port of the server.")
@click.option("--no-serve", is_flag=True, help="Build everything, and do not serve.")
@json_option
@handle_errors
@reading_flags
def command(
    catalogue: Path,
    log: Path | None,
    pairs: Path | None,
    boards: Path | None,
    out: Path,
    as_json: bool,
    reading: ReadingOptions,
    **flags: Any,
) -> None:
    """Go from your files to answers: recognise, check, pair, train, evaluate, build, serve.

    Columns and values of other systems are recognised and said; what is not recognised is named,
    and --rename, --map and --set say it. Each step is an ordinary command, printed as it can be
    repeated. With few pairs, or without a log, nothing is trained: the shipped query tower reads
    queries and entities alike.

    Example: omni start --catalogue shop.csv --log clicks.csv --out search
    """
    if log and pairs:
        raise ConfigError("give --log or --pairs, not both")
    out.mkdir(parents=True, exist_ok=True)
    start = Start(out, flags["entity_type"], reading, _given_flags(reading), as_json)
    start.data.mkdir(exist_ok=True)
    prepared = _prepare(start, catalogue, log, pairs, boards)
    total = sum(prepared.train_pairs.values())
    zero_shot = total < FEWEST_PAIRS
    if zero_shot:
        say(
            f"\n{total:,} train pairs are fewer than {FEWEST_PAIRS:,}: the shipped query tower"
            " finds more untrained than trained on them (zero-shot)"
        )
    real_pairs, counted = prepared.pairs, prepared.train_pairs
    if zero_shot:
        titles = start.data / "titles.parquet"
        pairs_of_titles(start.data / "catalogue.parquet", titles)
        prepared = prepared._replace(pairs=titles, train_pairs=count_pairs(titles))
    config = out / "run.toml"
    write_config(config, prepared, round(60 * flags["minutes"]), zero_shot=zero_shot)
    run = out / ("zero_shot" if zero_shot else "run")
    start.run("train", config, "--out", run)
    if _has_held_out(start.data):
        start.run("evaluate", run / "model", "--data", start.data, "--baselines", "bm25")
    queries = start.data / "frequent_queries.txt"
    proof = ["--queries", queries] if queries.is_file() and queries.stat().st_size else []
    proof += ["--pairs", real_pairs] if total else []
    start.run(
        *("rebuild", "--store", out / "store", "--bundle", run / "model"),
        *("--catalogue", start.data / "catalogue.parquet", *proof),
    )
    if as_json:
        print_json(
            {
                "commands": start.commands,
                "train_pairs": counted,
                "zero_shot": zero_shot,
            }
        )
    say("\nas a job, these commands do the same again:")
    for line in start.commands:
        say(f"  {line}")
    serve = ["serve", "--store", str(out / "store"), "--port", str(flags["port"])]
    if flags["no_serve"]:
        say(f"serve it: {as_shell(serve)}")
        return
    _serve(serve)


def _given_flags(reading: ReadingOptions) -> list[str]:
    """Write options back as flags."""
    flags = [f"--encoding={reading.encoding}"] if reading.encoding != "utf-8" else []
    for name in ("separator", "quote", "escape"):
        value = getattr(reading, name)
        flags += [f"--{name}={value}"] if value is not None else []
    if reading.decimal_comma is not None:
        flags.append("--decimal-comma" if reading.decimal_comma else "--no-decimal-comma")
    flags += [f"--rename={old}={new}" for old, new in reading.rename.items()]
    flags += [
        f"--map={column}.{old}={new}"
        for column, values in reading.values.items()
        for old, new in values.items()
    ]
    return flags + [f"--set={name}={value}" for name, value in reading.constants.items()]


def _prepare(
    start: Start, catalogue: Path, log: Path | None, pairs: Path | None, boards: Path | None
) -> Prepared:
    """Write ``OUT/data``: the catalogue, enriched by log and boards, and the pairs."""
    plain = start.out / "catalogue.parquet"
    start.convert(catalogue, "catalogue", plain)
    if log is not None:
        events = start.out / "log.parquet"
        start.convert(log, "log", events, drop_bad_rows=True)
        windows = _windows(events)
        more = ["--boards", boards] if boards else []
        start.run(
            *("pairs", "--log", events, "--catalogue", plain, "--out", start.data, "--overwrite"),
            *(*windows, *more),
        )
        found = start.data / "pairs"
    else:
        enriched = start.data / "catalogue.parquet"
        if boards:
            tables = ["--catalogue", plain, "--boards", boards]
            start.run("enrich", "boards", *tables, "--out", enriched)
        else:
            start.run("data", "convert", plain, "--table", "catalogue", "--out", enriched)
        found = start.data / "pairs.parquet"
        if pairs is None:
            return Prepared(found, {}, False)
        start.convert(pairs, "pairs", found)
        hold_out(found)
    schema = pl.read_parquet_schema(start.data / "catalogue.parquet")
    engaged = schema.get("engaged_queries") == pl.List(pl.String)
    return Prepared(found, count_pairs(found), engaged)


def _windows(events: Path) -> list[str]:
    """Choose how many days are held out: the usual 30 after a gap, or a tenth of a short log."""
    span = (
        pl.scan_parquet(events, glob=False)
        .select(first=pl.col("timestamp").min(), last=pl.col("timestamp").max())
        .collect()
        .row(0)
    )
    first, last = span
    days = (last - first).days if isinstance(first, datetime) else 0
    if days >= 120:
        return []
    return ["--heldout-days", str(max(days // 10, 1)), "--gap-days", str(days // 20)]


def _has_held_out(data: Path) -> bool:
    for path in (data / "pairs", data / "pairs.parquet"):
        if path.exists():
            files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
            held = pl.scan_parquet(files, glob=False).filter(pl.col("split") == "heldout")
            return bool(held.select(pl.len()).collect().item())
    return False


def _serve(arguments: list[str]) -> None:
    """Serve until Ctrl-C, and open the page once it answers."""
    say(f"\n$ {as_shell(arguments)}")
    server = subprocess.Popen([sys.executable, "-m", "retrieval", *arguments])
    page = "http://localhost:9464/"
    try:
        if _answers(page, server) and sys.stdout.isatty():
            webbrowser.open(page)
        server.wait()
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait()
    if server.returncode:
        fail("the server ended; its last lines say why", server.returncode)


def _answers(page: str, server: subprocess.Popen[bytes]) -> bool:
    """Wait until the page answers, or the server has ended."""
    end = time.monotonic() + SECONDS_UNTIL_READY
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(page, timeout=2):
                return True
        except OSError:
            time.sleep(0.2)
    return False
