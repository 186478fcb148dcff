"""``omni pairs``: turn logs into training pairs, engaged queries and board titles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import polars as pl

from encoders.commands.console import (
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.commands.reading_flags import reading_flags
from encoders.errors import ConfigError

if TYPE_CHECKING:
    from encoders.logs.pipeline import PipelineConfig

FREQUENT_QUERIES = 5_000
"""Lines of ``frequent_queries.txt``: more than proving a release takes."""
CAPS = {"pin": 50, "product": 200, "ad": 200, "query": 200}


def parse_assignments(values: tuple[str, ...], option: str) -> dict[str, int]:
    """Read ``("pin=50",)`` as ``{"pin": 50}``.

    Raises:
        ConfigError: A value is not NAME=WHOLE NUMBER.
    """
    parsed = {}
    for value in values:
        name, _, number = value.partition("=")
        if not number.isdigit():
            raise ConfigError(f"{option} expects NAME=NUMBER, for example pin=50, got {value!r}")
        parsed[name] = int(number)
    return parsed


@click.command()
@click.option(
    "--log",
    "logs",
    required=True,
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Log file or folder of part files. Repeatable: all together are one log.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to make: pairs/, engaged_queries/, frequent_queries.txt, summary.json.",
)
@click.option(
    "--boards",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Boards table; adds board_titles/. Repeatable.",
)
@click.option(
    "--catalogue",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help=(
        "Keep only entities in it; writes it enriched, too. Repeatable: all together are one"
        " catalogue."
    ),
)
@click.option(
    "--train-end",
    help=(
        "Training events are before this UTC date. Default: held-out days and gap before the log's"
        " end."
    ),
)
@click.option("--train-days", default=365, show_default=True, help="Length of the training window.")
@click.option(
    "--gap-days",
    default=15,
    show_default=True,
    help="Days dropped between training and held-out events.",
)
@click.option(
    "--heldout-days",
    default=30,
    show_default=True,
    help="Length of the held-out window; 0: no held-out pairs.",
)
@click.option(
    "--min-dwell", default=10.0, show_default=True, help="Seconds that make a click a long click."
)
@click.option(
    "--cap",
    "caps",
    multiple=True,
    help="Most queries per entity, e.g. --cap pin=50. Default: pin 50, the others 200.",
)
@click.option(
    "--min-users",
    default=3,
    show_default=True,
    help="Users behind a query before it becomes an engaged-query feature.",
)
@click.option(
    "--engaged",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Engaged-query features to check for leaks as well. Repeatable.",
)
@click.option(
    "--drop-leaks",
    is_flag=True,
    help="Drop held-out pairs that --engaged shows, instead of failing.",
)
@click.option(
    "--keep-seen",
    is_flag=True,
    help="Keep held-out pairs that also are training pairs: they measure memory.",
)
@click.option("--seed", default=0, show_default=True, help="Chooses the queries that a cap keeps.")
@click.option(
    "--drop-bad-rows",
    is_flag=True,
    help="Leave bad rows of log and boards out and count them, instead of failing.",
)
@click.option(
    "--partitions",
    type=click.IntRange(min=1),
    help="Hash partitions. Default: one per 15 million log rows.",
)
@click.option(
    "--ray",
    "ray_address",
    help="Run on this Ray cluster (host:port or auto), or start one here (local).",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it is there.")
@json_option
@handle_errors
@reading_flags
def command(
    logs: tuple[Path, ...],
    out: Path,
    boards: tuple[Path, ...],
    catalogue: tuple[Path, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Turn a log into training and held-out pairs (paper 4.1).

    Actions by entity type: pins save and long click; products and ads also add to cart and
    checkout; queries clicks on suggestions. A click of --min-dwell seconds is a long click. Equal
    events count once; equal pairs become one row with a count. Held-out pairs come from a later
    window; those the model could have seen are dropped, and a leak check runs on the rest. Every
    dropped event is counted in summary.json.

    Example: omni data simulate-logs --out sim --rows 100000 && omni pairs --log sim/log --boards
    sim/boards.parquet --out train
    """
    from encoders.logs.pairs import pairs_table
    from encoders.logs.pipeline import PipelineInputs, run_pipeline
    from encoders.tables.files import read_table, scan_parts

    config = _pipeline_config(flags)
    rows = read_table(catalogue, "catalogue", reading=config.reading) if catalogue else None
    known = None
    if rows is not None:
        known = rows.select("entity_type", pl.col("id").alias("entity_id"))
    inputs = PipelineInputs(log=logs, boards=boards or None, known=known)

    def check(work: Path, summary: dict[str, Any]) -> None:
        engaged = [
            work / path.relative_to(out) if path.is_relative_to(out) else path
            for path in flags["engaged"]
        ]
        dropped = check_pairs(work, engaged, flags["drop_leaks"], flags["keep_seen"])
        if dropped:
            counts = summary["counts"]
            counts[f"dropped: heldout pairs visible through {_names(flags['engaged'])}"] = dropped
            counts["pairs"] -= dropped
            summary["table_1"] = pairs_table(scan_parts(work / "pairs")).to_dicts()
        if rows is not None:
            _write_catalogue(rows, work, summary)
        _write_frequent_queries(work)

    overwrite = flags["overwrite"]
    with stage("pairs"):
        if flags["ray_address"]:
            from encoders.logs.ray_pipeline import run_ray_pipeline

            summary = run_ray_pipeline(
                inputs,
                out,
                config,
                address=flags["ray_address"],
                overwrite=overwrite,
                check=check,
            )
        else:
            summary = run_pipeline(inputs, out, config, overwrite=overwrite, check=check)
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)


def _pipeline_config(flags: dict[str, Any]) -> PipelineConfig:
    """Turn the command's flags into settings."""
    from encoders.enrichment.engaged_queries import EngagedQueriesConfig
    from encoders.logs.events import EngagementRules
    from encoders.logs.pairs import PairsConfig, parse_day
    from encoders.logs.pipeline import PipelineConfig

    return PipelineConfig(
        rules=EngagementRules(min_dwell_seconds=flags["min_dwell"]),
        pairs=PairsConfig(
            caps=CAPS | parse_assignments(flags["caps"], "--cap"),
            train_end=parse_day(flags["train_end"]) if flags["train_end"] else None,
            train_days=flags["train_days"],
            gap_days=flags["gap_days"],
            heldout_days=flags["heldout_days"],
            keep_seen=flags["keep_seen"],
            seed=flags["seed"],
        ),
        engaged=EngagedQueriesConfig(min_users=flags["min_users"]),
        on_bad_rows="drop" if flags["drop_bad_rows"] else "raise",
        reading=flags["reading"],
        partitions=flags["partitions"],
    )


def _print_summary(summary: dict[str, Any]) -> None:
    """Print table 1 and what became of events and pairs."""
    print_table(
        "Table 1: pairs",
        ["source", "split", "actions", "pairs", "events", "queries", "entities"],
        (r.values() for r in summary["table_1"]),
    )
    bad = {f"bad rows left out: {rule}": rows for rule, rows in summary["bad_rows_dropped"].items()}
    print_table("Where events and pairs went", ["", "number"], (bad | summary["counts"]).items())
    if not summary["counts"].get("pairs"):
        say("no pairs came out: see the counts above for where the events went")


def check_pairs(out: Path, engaged: Sequence[Path], drop_leaks: bool, keep_seen: bool) -> int:
    """Check the written pairs for leaks, against each other and against ``engaged`` features.

    Args:
        out: Folder of the run.
        engaged: Files of engaged-query features that training will read.
        drop_leaks: Rewrite the pairs without those that ``engaged`` shows, instead of failing.
        keep_seen: Held-out pairs may be training pairs.

    Returns:
        Held-out pairs dropped by ``drop_leaks``.

    Raises:
        LeakError: There is a leak.
    """
    from collections import Counter

    from encoders.logs.pairs import drop_visible, find_leaks, refuse_leaks
    from encoders.tables.files import read_whole_table, write_table

    dropped = 0
    features = None
    if engaged:
        features = read_whole_table(engaged)
    for part in sorted((out / "pairs").glob("part-*.parquet")):
        pairs = pl.read_parquet(part, glob=False)
        if features is not None and drop_leaks:
            counts: Counter[str] = Counter()
            pairs = drop_visible(pairs, features, counts)
            dropped += sum(counts.values())
            write_table(pairs, part)
        leaks = find_leaks(pairs, features)
        if keep_seen:
            leaks = leaks._replace(through_pairs=leaks.through_pairs.clear())
        refuse_leaks(leaks, int((pairs["split"] == "heldout").sum()))
    if dropped:
        say(f"{dropped:,} held-out pairs were visible through {_names(engaged)} and were dropped")
    return dropped


def _write_frequent_queries(out: Path) -> None:
    """Write the most frequent training queries, one a line: what `omni rebuild --queries` takes."""
    from encoders.tables.files import scan_parts

    frequent = (
        scan_parts(out / "pairs")
        .filter(pl.col("split") == "train")
        .group_by("query")
        .agg(pl.col("count").sum())
        .sort(["count", "query"], descending=[True, False])
        .head(FREQUENT_QUERIES)
        .collect(engine="streaming")
    )
    lines = [" ".join(query.split()) + "\n" for query in frequent["query"].to_list()]
    (out / "frequent_queries.txt").write_text("".join(lines), encoding="utf-8")


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _write_catalogue(rows: pl.DataFrame, out: Path, summary: dict[str, Any]) -> None:
    """Write the catalogue with its new features, and count its entities without a pair."""
    from encoders.enrichment.engaged_queries import attach_lists
    from encoders.tables.files import scan_parts, write_table

    for column, value in (("engaged_queries", "query"), ("board_titles", "title")):
        if (out / column).is_dir():
            features = scan_parts(out / column).collect()
            rows = attach_lists(rows, features, column, value)
    write_table(rows, out / "catalogue.parquet")
    paired = (
        scan_parts(out / "pairs")
        .select("entity_type", pl.col("entity_id").alias("id"))
        .unique()
        .collect()
    )
    without = rows.join(paired, on=["entity_type", "id"], how="anti").height
    summary["counts"]["catalogue entities without any pair"] = without
