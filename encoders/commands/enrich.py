"""``omni enrich``: add board titles, engaged queries and captions to a catalogue."""

from __future__ import annotations

from collections import Counter
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
    stage,
    track,
)
from encoders.commands.reading_flags import reading_flags
from encoders.errors import ConfigError
from encoders.tables.reading_options import ReadingOptions

if TYPE_CHECKING:
    from encoders.enrichment.engaged_state import EngagedQueriesState, Merge

catalogue_option = click.option(
    "--catalogue",
    required=True,
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Catalogue table. Repeatable: all together are one catalogue.",
)
out_option = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Enriched catalogue to write (.parquet, .jsonl, ...).",
)


@click.group()
def group() -> None:
    """Add the text features that lift recall most (paper tables 3 and 4).

    They are board titles, engaged queries and captions.

    Example: omni enrich boards --catalogue catalogue.parquet --boards boards.csv --out
    enriched.parquet
    """


@group.command()
@catalogue_option
@click.option(
    "--boards",
    required=True,
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Boards table: board_id, title, entity_id. Repeatable.",
)
@out_option
@click.option("--top", default=10, show_default=True, help="Most titles per entity.")
@click.option(
    "--max-word-prevalence",
    default=0.1,
    show_default=True,
    help="A title whose words all are on more entities than this is noise.",
)
@json_option
@handle_errors
@reading_flags
def boards(
    catalogue: tuple[Path, ...],
    boards: tuple[Path, ...],
    out: Path,
    top: int,
    max_word_prevalence: float,
    reading: ReadingOptions,
    as_json: bool,
) -> None:
    """Put each entity's best board titles on the catalogue (column board_titles).

    Titles are ranked by how specific their words are to the entity and by how many boards bear
    them; noise and repetition drop.

    Example: omni enrich boards --catalogue catalogue.parquet --boards boards.csv --out
    enriched.parquet
    """
    from encoders.enrichment.board_titles import BoardTitlesConfig, board_titles
    from encoders.enrichment.engaged_queries import attach_lists
    from encoders.tables.files import read_table, write_table

    config = BoardTitlesConfig(top=top, max_word_prevalence=max_word_prevalence)
    with stage("board titles"):
        rows = read_table(catalogue, "catalogue", reading=reading)
        filed = read_table(boards, "boards", reading=reading)
        titles = board_titles(filed, config)
        write_table(attach_lists(rows, titles, "board_titles", "title"), out)
    summary = {
        "entities": rows.height,
        "entities with titles": (
            rows.join(titles.select(id="entity_id").unique(), on="id", how="semi").height
        ),
        "titles": titles.height,
        "board rows": filed.height,
        "entities on boards but not in the catalogue": (
            filed.select(id="entity_id").unique().join(rows, on="id", how="anti").height
        ),
    }
    _report(summary, as_json)


@group.command()
@click.option(
    "--state",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the state; --create makes it.",
)
@click.option("--create", is_flag=True, help="Make a new, empty state.")
@click.option(
    "--log",
    "logs",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="New slice of the log: any days, any order. Repeatable.",
)
@click.option(
    "--until",
    help=(
        "Move the end of the window to this UTC midnight or later. Default: the midnight after the"
        " last event."
    ),
)
@click.option(
    "--catalogue",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Catalogue to enrich; needs --out. Repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help=(
        "With --catalogue: the enriched catalogue. Without: features of touched entities; one row"
        " with no query where none is left."
    ),
)
@click.option(
    "--delete-users",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="File with a user id per line: delete these users' events. Repeatable.",
)
@click.option(
    "--delete-queries",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="File with a query per line: never show these. Repeatable.",
)
@click.option("--top", default=20, show_default=True, help="Most queries per entity.")
@click.option(
    "--window-days",
    default=730,
    show_default=True,
    help="Older events no longer count. Fixed once the state is made.",
)
@click.option(
    "--min-users",
    default=3,
    show_default=True,
    help="Different users needed before a query becomes a feature.",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    help="Weight of an action, e.g. --weight save=5. Fixed once the state is made.",
)
@click.option(
    "--min-dwell", default=10.0, show_default=True, help="Seconds that make a click a long click."
)
@click.option(
    "--drop-bad-rows",
    is_flag=True,
    help="Leave bad rows of the log out and count them, instead of failing.",
)
@json_option
@handle_errors
@reading_flags
def queries(
    state: Path,
    create: bool,
    logs: tuple[Path, ...],
    catalogue: tuple[Path, ...],
    out: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Merge a new slice of the log into the engaged queries.

    The cost is that of the slice. Merging day by day gives what counting the whole window at once
    gives. Late and repeated events are recognised, events older than the window drop out. Users and
    queries can be deleted. One line per change is kept (version, what, counts).

    Example: omni enrich queries --state state --create --log sim/log --catalogue catalogue.parquet
    --out enriched.parquet
    """
    from encoders.commands.pairs import parse_assignments
    from encoders.enrichment.engaged_queries import EngagedQueriesConfig, attach_lists
    from encoders.enrichment.engaged_state import EngagedQueriesState
    from encoders.tables.files import read_table, write_table

    if catalogue and not out:
        raise ConfigError("--catalogue needs --out for the enriched catalogue")
    defaults = EngagedQueriesConfig()
    config = EngagedQueriesConfig(
        weights={**defaults.weights, **parse_assignments(flags["weights"], "--weight")},
        top=flags["top"],
        window_days=flags["window_days"],
        min_users=flags["min_users"],
    )
    merges = []
    bad_rows = Counter[str]()
    open_state = EngagedQueriesState.create if create else EngagedQueriesState
    with open_state(state, config) as current, stage("engaged queries"):
        if flags["delete_users"]:
            merges.append(current.delete_users(_lines(flags["delete_users"])))
        if flags["delete_queries"]:
            merges.append(current.delete_queries(_lines(flags["delete_queries"])))
        merges += _merge_logs(current, logs, flags, bad_rows)
        if catalogue and out:
            rows = read_table(catalogue, "catalogue", reading=flags["reading"])
            write_table(attach_lists(rows, current.features(), "engaged_queries", "query"), out)
        elif out:
            write_table(_last_features(merges) if merges else current.features(), out)
        summary: dict[str, Any] = {
            "version": current.version,
            "until": current.until and current.until.isoformat(),
        }
        for merge in merges:
            for name, number in merge.counts.items():
                summary[f"events {name}"] = summary.get(f"events {name}", 0) + number
            summary["entities touched"] = summary.get("entities touched", 0) + merge.touched.height
        summary |= {f"bad rows left out: {rule}": rows for rule, rows in bad_rows.items()}
    _report(summary, as_json)


def _merge_logs(
    state: EngagedQueriesState, logs: Sequence[Path], flags: dict[str, Any], bad_rows: Counter[str]
) -> list[Merge]:
    """Merge logs, then move the window to ``--until``; bad rows left out are counted.

    Batch by batch: memory stays bounded however long the history, and a stopped load can simply be
    run again.
    """
    from encoders.logs.events import EVENT_SCHEMA, EngagementRules, read_events
    from encoders.logs.pairs import parse_day
    from encoders.tables.files import OnBadRows

    until = parse_day(flags["until"]) if flags["until"] else None
    rules = EngagementRules(min_dwell_seconds=flags["min_dwell"])
    on_bad_rows: OnBadRows = "drop" if flags["drop_bad_rows"] else "raise"
    merges = []
    for log in logs:
        for batch in read_events(log, rules, on_bad_rows=on_bad_rows, reading=flags["reading"]):
            bad_rows.update(batch.report.rules_broken)
            merges.append(state.merge(batch.frame, what=log.name))
    if until is not None:
        nothing = pl.DataFrame(schema=EVENT_SCHEMA)
        merges.append(state.merge(nothing, until=until, what="move the window"))
    return merges


@group.command()
@catalogue_option
@click.option(
    "--images",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the image paths.",
)
@click.option(
    "--state",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder that remembers which images are captioned.",
)
@out_option
@click.option(
    "--model",
    default="Salesforce/blip-image-captioning-base",
    show_default=True,
    help="BLIP model: name or local folder.",
)
@click.option("--batch-size", default=16, show_default=True, help="Images per forward pass.")
@click.option("--beams", default=3, show_default=True, help="Beam search width.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@json_option
@handle_errors
@reading_flags
def captions(
    catalogue: tuple[Path, ...],
    images: Path,
    state: Path,
    out: Path,
    reading: ReadingOptions,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a caption for every new or changed image, and report their quality.

    The captions are in the column caption. Stopping loses at most one batch: run the command again
    to go on. Images that fail are named in the state and tried again.

    Example: omni enrich captions --catalogue catalogue.parquet --images images --state captions
    --out captioned.parquet
    """
    from encoders.enrichment.caption_quality import quality_report
    from encoders.enrichment.captions import (
        BlipCaptioner,
        CaptionConfig,
        attach_captions,
        caption_catalogue,
    )
    from encoders.tables.files import read_table, write_table

    config = CaptionConfig(**settings)
    rows = read_table(catalogue, "catalogue", reading=reading)
    with stage("captions"):
        run = caption_catalogue(rows, state, BlipCaptioner(config), config, images, track)
        captioned = attach_captions(rows, state)
        write_table(captioned, out)
    _report(run._asdict() | quality_report(captioned), as_json)


@group.command("caption-sheet")
@catalogue_option
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Sheet to write (.csv)."
)
@click.option("--items", default=200, show_default=True, help="Captions to judge.")
@click.option(
    "--judge",
    "judges",
    multiple=True,
    default=("a", "b"),
    show_default=True,
    help="Name of a judge; repeat for more.",
)
@click.option("--seed", default=0, show_default=True, help="Draws and orders the items.")
@handle_errors
@reading_flags
def caption_sheet(
    catalogue: tuple[Path, ...], out: Path, reading: ReadingOptions, **settings: Any
) -> None:
    """Write a sheet on which judges grade captions: good, usable or wrong.

    Example: omni enrich caption-sheet --catalogue captioned.parquet --out sheet.csv --judge ann
    --judge bo
    """
    from encoders.enrichment.caption_quality import GRADES, judgement_sheet
    from encoders.tables.files import read_table, write_table

    sheet = judgement_sheet(read_table(catalogue, "catalogue", reading=reading), **settings)
    write_table(sheet, out)
    click.echo(
        f"{out}: {sheet.height} rows; fill in the column grade with one of {', '.join(GRADES)},"
        f" then: omni enrich caption-agreement {out}"
    )


@group.command("caption-agreement")
@click.argument("sheets", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@json_option
@handle_errors
def caption_agreement(sheets: tuple[Path, ...], as_json: bool) -> None:
    """Read graded sheets: how good the captions are, and how far the judges agree.

    Agreement is Krippendorff's alpha.

    Example: omni enrich caption-agreement sheet.csv
    """
    from encoders.enrichment.caption_quality import agreement, read_grades
    from encoders.tables.files import read_raw

    graded = pl.concat([read_raw(sheet) for sheet in sheets], how="diagonal_relaxed")
    _report(agreement(read_grades(graded)), as_json)


def _last_features(merges: list[Merge]) -> pl.DataFrame:
    """Return the features of touched entities after the last merge that touched each.

    An entity that has none left gets one row without a query.
    """
    key = ["entity_type", "entity_id"]
    touched, changed = [], []
    for number, merge in enumerate(merges):
        touched.append(merge.touched.with_columns(merge=pl.lit(number)))
        changed.append(merge.changed.with_columns(merge=pl.lit(number)))
    last = pl.concat(touched).group_by(key).agg(pl.col("merge").max())
    features = pl.concat(changed).join(last, on=[*key, "merge"], how="semi").drop("merge")
    emptied = last.select(key).join(features, on=key, how="anti")
    return pl.concat([features, emptied], how="diagonal").sort(*key, "rank")


def _lines(paths: Sequence[Path]) -> list[str]:
    return [
        line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line
    ]


def _report(summary: dict[str, Any], as_json: bool) -> None:
    """Print a summary as JSON or as a table."""
    if as_json:
        print_json(summary)
    else:
        print_table("", ["", "value"], summary.items())
