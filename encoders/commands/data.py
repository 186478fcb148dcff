"""``omni data``: import public data, validate and describe tables, simulate logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from encoders.commands.console import (
    data_option,
    fail,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.commands.reading_flags import reading_flags
from encoders.errors import DataError
from encoders.tables.reading_options import ReadingOptions

table_argument = click.argument("path", type=click.Path(exists=True, path_type=Path))
kind_option = click.option(
    "--table",
    help="catalogue, log, boards, pairs, judgements, queries or labels. Default: guessed.",
)


@click.group()
def group() -> None:
    """Bring data in, look at it, and make logs to test with.

    Example: omni data validate catalogue.csv
    """


@group.command("import")
@click.argument("name")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the tables (Parquet)."
)
@json_option
@handle_errors
def import_(name: str, path: Path, out: Path, as_json: bool) -> None:
    """Turn public data into tables.

    NAME is unsplash, esci, wands, small or large; PATH is the folder it was unpacked to.

    \b
    unsplash  photos, keywords, collections, conversions (Lite or Full, *.tsv000 or *.csv000)
    esci      Amazon shopping queries (Parquet; us, es, jp)
    wands     Wayfair relevance (query.csv, product.csv, label.csv)
    small     emoji, icons and their human annotations; large: the same and more, with 190 languages

    Example: omni data import wands WANDS/dataset --out wands
    """  # noqa: D301
    from encoders.datasets.importers import import_tables
    from encoders.tables.files import write_table

    with stage(f"import {name}"):
        imported = import_tables(name, path)
        for table, checked in imported.items():
            write_table(checked.frame, out / f"{table}.parquet")
    if as_json:
        print_json({table: checked.report.as_dict() for table, checked in imported.items()})
        return
    rows = [
        (table, checked.report.rows_read, checked.frame.height, ", ".join(checked.frame.columns))
        for table, checked in imported.items()
    ]
    print_table(f"{name} -> {out}", ["table", "rows read", "rows kept", "columns"], rows)
    for table, checked in imported.items():
        for note in checked.report.notes:
            say(f"{table}: {note}")
        for rule, count in checked.report.rules_broken.items():
            say(f"{table}: {count:,} rows left out: {rule}")


@group.command()
@table_argument
@kind_option
@click.option(
    "--rejects",
    type=click.Path(path_type=Path),
    help="Write the bad rows with their problem to this file.",
)
@json_option
@handle_errors
@reading_flags
def validate(
    path: Path, table: str | None, rejects: Path | None, as_json: bool, reading: ReadingOptions
) -> None:
    """Check a table against its schema; name file, row, column, value and fix of what is wrong.

    Exit code 1 if anything is.

    Example: omni data validate catalogue.csv --rejects bad.jsonl
    """
    from encoders.tables.files import check_table, write_table

    table = table or _guess(path, reading)
    checked = check_table(path, table, on_bad_rows="drop", reading=reading)
    report = checked.report
    if rejects is not None and checked.rejected.height:
        write_table(checked.rejected, rejects)
    if as_json:
        print_json(report.as_dict())
    else:
        print_table(
            f"{report.source} as {report.table}",
            ["", "rows"],
            [("read", report.rows_read), ("good", report.rows_kept)],
        )
        for note in report.notes:
            say(f"note: {note}")
        if report.rules_broken:
            print_table("Broken rules", ["rule", "values"], report.rules_broken.items())
            for problem in report.problems:
                say(problem.describe(report.source))
        _say_what_is_read(table, checked.frame.columns)
    if report.rules_broken:
        fail(f"{sum(report.rules_broken.values()):,} values in {report.source} break a rule")


def _say_what_is_read(table: str, columns: list[str]) -> None:
    """Say which columns of a catalogue the towers read, and which are attributes alone."""
    from encoders.tables.schemas import schema

    if table != "catalogue":
        return
    known = [name for name in columns if schema(table).column(name) is not None]
    texts = [name for name in known if name not in ("id", "entity_type", "domain", "image")]
    others = [name for name in columns if name not in known]
    say(f"the towers read: {', '.join(texts) or 'nothing: no column is called title, ...'}")
    if others:
        say(f"attributes, for filters and answers: {', '.join(others)}")


@group.command()
@table_argument
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write: .parquet, .jsonl, .csv, ...",
)
@kind_option
@click.option(
    "--drop-bad-rows", is_flag=True, help="Leave bad rows out and count them, instead of failing."
)
@json_option
@handle_errors
@reading_flags
def convert(
    path: Path,
    out: Path,
    table: str | None,
    drop_bad_rows: bool,
    as_json: bool,
    reading: ReadingOptions,
) -> None:
    """Check a table and write it in the form that every command reads, once and for all.

    For files of other systems: name how they are written, rename columns, map values.

    Example: omni data convert export.csv --out catalogue.parquet --separator ';' --rename sku=id
    --set entity_type=product
    """
    from encoders.tables.files import check_table, raise_problems, write_table

    name = table or _guess(path, reading)
    checked = check_table(path, name, on_bad_rows="drop", reading=reading)
    if not drop_bad_rows:
        raise_problems(checked.report, droppable=True)
    write_table(checked.frame, out)
    if as_json:
        print_json(checked.report.as_dict() | {"out": str(out)})
        return
    for note in checked.report.notes:
        say(f"note: {note}")
    for rule, count in checked.report.rules_broken.items():
        say(f"left out: {count:,} rows: {rule}")
    say(f"{out}: {checked.frame.height:,} rows of table {name}")


@group.command()
@table_argument
@kind_option
@click.option(
    "--plots", type=click.Path(path_type=Path), help="Also draw PNG plots into this folder."
)
@click.option(
    "--drop-bad-rows", is_flag=True, help="Describe the good rows only, instead of failing."
)
@json_option
@handle_errors
@reading_flags
def describe(
    path: Path,
    table: str | None,
    plots: Path | None,
    drop_bad_rows: bool,
    as_json: bool,
    reading: ReadingOptions,
) -> None:
    """Describe a table: missing values, languages, duplicates, head and tail.

    Example: omni data describe log.parquet --plots plots
    """
    from encoders.tables.files import check_table, raise_problems
    from encoders.tables.profile import describe_table, plot_table
    from encoders.tables.schemas import schema

    name = table or _guess(path, reading)
    frame, _, report = check_table(path, name, on_bad_rows="drop", reading=reading)
    if not drop_bad_rows:
        raise_problems(report, droppable=True)
    found = describe_table(frame, schema(name))
    files = plot_table(frame, found, plots) if plots else []
    if as_json:
        print_json(found | {"plots": [str(f) for f in files]})
        return
    columns = ["column", "type", "missing_share", "distinct", "mean_length"]
    print_table(
        f"{path.name}: {found['rows']:,} rows of table {name}",
        columns,
        ([c[k] for k in columns] for c in found["columns"]),
    )
    for column, values in found["values"].items():
        print_table(f"{column}: most frequent", [column, "rows"], values.items())
    if found["time"]:
        say(f"time: {found['time']['first']} to {found['time']['last']}")
    if found["scripts"]:
        print_table("Scripts", ["script", "share of texts"], found["scripts"].items())
    print_table("Duplicates", ["", "number"], found["duplicates"].items())
    if found["head"]:
        keys = ["distinct", "top_1_percent_share", "top_10_percent_share", "seen_once_share"]
        print_table(
            "Head and tail",
            ["column", *keys],
            ([n, *(h[k] for k in keys)] for n, h in found["head"].items()),
        )
    for file in files:
        say(f"plot: {file}")


@group.command("simulate-logs")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to make: log/part-*.parquet, boards.parquet.",
)
@click.option("--rows", default=1_000_000, show_default=True, help="Events to make.")
@click.option("--days", default=730, show_default=True, help="Length of the log.")
@click.option("--start", default="2024-01-01", show_default=True, help="First day (UTC).")
@click.option("--users", default=50_000, show_default=True, help="Users who search.")
@click.option("--results-per-search", default=4, show_default=True, help="Impressions per search.")
@click.option(
    "--duplicates", default=0.01, show_default=True, help="Share of events written twice."
)
@click.option(
    "--late",
    default=0.01,
    show_default=True,
    help="Share of events written one to fourteen days late.",
)
@click.option(
    "--noise",
    default=0.25,
    show_default=True,
    help="Share of results that have nothing to do with the query.",
)
@click.option("--seed", default=0, show_default=True, help="The same seed makes the same log.")
@data_option
@json_option
@handle_errors
def simulate_logs(
    out: Path, data_dir: Path | None, as_json: bool, start: str, **flags: Any
) -> None:
    """Make a log from annotation pairs, to test with.

    It is SIMULATED: good for correctness and scale, never for a claim about quality.

    Zipf query and entity popularity, position bias, sessions, actions with dwell, countries,
    boards, suggestion clicks, noise, events written twice or late.

    Example: omni data simulate-logs --out sim --rows 100000
    """
    from encoders.datasets.dataset import load_dataset
    from encoders.logs.pairs import parse_day
    from encoders.logs.simulator import SimulatorConfig, write_simulation

    config = SimulatorConfig(start=parse_day(start), **flags)
    with stage("simulate logs"):
        pairs = load_dataset(data_dir, engaged_queries=0).pairs
        summary = write_simulation(pairs, out, config)
    if as_json:
        print_json(summary)
    else:
        facts = ((name, value) for name, value in summary.items() if name != "config")
        print_table("SIMULATED log", ["", "value"], facts)


def _guess(path: Path, reading: ReadingOptions) -> str:
    """Guess from its columns which table a file holds.

    Raises:
        DataError: No table fits, or it may be a log or pairs.
    """
    from encoders.tables.parts import table_files
    from encoders.tables.reading import read_chunks
    from encoders.tables.schemas import (
        LOG,
        MALFORMED,
        ROW,
        could_be_log,
        guess_table,
        lookalikes,
        renames,
    )

    columns: list[str] = []
    for file in table_files(path):
        first = next(read_chunks(file, reading, chunk_rows=1000, notes=[]), None)
        if first is not None:
            columns = [name for name in first.columns if name not in (ROW, MALFORMED)]
            break
    if not columns:
        raise DataError(f"{path}: the file is empty: it has no header. Was the export cut short?")
    guess = guess_table(columns)
    if guess is not None:
        return guess
    if {"query", "entity_type", "entity_id"} <= set(columns) and could_be_log(columns):
        lacks = [c.name for c in LOG.columns if c.required and c.name not in columns]
        raise DataError(
            f"{path}: the columns {', '.join(columns)} may be a log or pairs. A log needs"
            f" {', '.join(lacks)} too{renames(lookalikes(columns, LOG), lacks)}: say --table log"
            " once they are there, or --table pairs if it is pairs."
        )
    raise DataError(
        f"{path}: the columns {', '.join(columns)} fit no table. Say which one it is with --table,"
        " or rename the columns."
    )
