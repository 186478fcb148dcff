"""Turn logs and boards into pairs, engaged queries and board titles, one partition at a time.

Every step works within one entity. Events are spread over hash partitions of entities while they
are read, and each partition is processed by itself: the same ``process_events`` runs here one
partition after another and on Ray many at once (``encoders.logs.ray_pipeline``).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from encoders.enrichment.board_titles import (
    BoardTitlesConfig,
    add_prevalence,
    board_titles,
    word_prevalence,
)
from encoders.enrichment.engaged_queries import EngagedQueriesConfig, engaged_queries
from encoders.errors import ConfigError
from encoders.file_modes import replace_folder
from encoders.logs.events import BATCH_ROWS, EVENT_SCHEMA, EngagementRules, read_events
from encoders.logs.pairs import (
    PairsConfig,
    TimeSplit,
    build_pairs,
    find_leaks,
    pairs_table,
    refuse_leaks,
)
from encoders.progress import Progress
from encoders.tables.checks import check_frame
from encoders.tables.files import OnBadRows, raise_problems, scan_parts, write_table
from encoders.tables.parts import TableSource, table_files
from encoders.tables.reading import DEFAULT_OPTIONS, read_chunks
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.schemas import BOARDS
from encoders.tables.stream import log_rows

log = logging.getLogger(__name__)

PARTITION_ROWS = 15_000_000
"""Log rows per partition; the events of one partition are in memory at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineInputs:
    """What a run reads."""

    log: TableSource
    """Log file or folder, or several that are one log together."""
    boards: TableSource | None = None
    """Boards file or folder, or several; None: no board titles."""
    known: pl.DataFrame | None = None
    """``entity_type, entity_id`` of the catalogue; None: every entity of the log is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """Settings of every step."""

    rules: EngagementRules = field(default_factory=EngagementRules)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    engaged: EngagedQueriesConfig = field(default_factory=EngagedQueriesConfig)
    boards: BoardTitlesConfig = field(default_factory=BoardTitlesConfig)
    on_bad_rows: OnBadRows = "raise"
    """``raise`` fails at bad rows of log and boards, ``drop`` leaves them out and counts them."""
    reading: ReadingOptions = DEFAULT_OPTIONS
    """How the files of log and boards are written."""
    partitions: int | None = None
    """Hash partitions of entities; None: one per ``PARTITION_ROWS`` log rows."""
    batch_rows: int = BATCH_ROWS
    """Log rows read at a time."""
    now: datetime | None = None
    """Time that "in the future" is measured from; None: the clock."""


class Partition(NamedTuple):
    """What the events of one partition became."""

    engaged: pl.DataFrame
    pairs: pl.DataFrame
    counts: Counter[str]


def process_events(
    events: pl.DataFrame,
    config: PipelineConfig,
    split: TimeSplit,
    known: pl.DataFrame | None = None,
) -> Partition:
    """Find engaged queries and build pairs of the entities of one partition.

    Engaged queries are taken from the window that ends where training ends, so that no feature has
    seen the held-out events; held-out pairs that are visible all the same (the same pair happened
    before) are dropped, and the leak check runs on what is left.

    Args:
        events: All events of some entities (columns of ``events.EVENT_SCHEMA``).
        config: Settings.
        split: The time windows.
        known: Entities of the catalogue; None: all.

    Raises:
        LeakError: A held-out pair is visible through a training pair or a feature (only with
            ``keep_seen``).
    """
    features = engaged_queries(events, config.engaged, split.train_end)
    if known is not None:
        key = ["entity_type", "entity_id"]
        features = features.join(known.select(key).unique(), on=key, how="semi")
    visible = None if config.pairs.keep_seen else features
    pairs = build_pairs(events, config.pairs, split, known=known, features=visible)
    if not config.pairs.keep_seen:
        heldout_rows = int((pairs.frame["split"] == "heldout").sum())
        refuse_leaks(find_leaks(pairs.frame, features), heldout_rows)
    return Partition(features, pairs.frame, pairs.counts)


def partition_of(partitions: int) -> pl.Expr:
    """Return an expression for the partition of a row, from ``entity_id`` alone.

    So log and boards of one entity have one partition.
    """
    return (pl.col("entity_id").hash(seed=17) % partitions).cast(pl.Int32)


Check = Callable[[Path, dict[str, Any]], None]
"""Called with the finished folder and its summary, before the folder is moved into place."""


def run_pipeline(
    inputs: PipelineInputs,
    out: Path,
    config: PipelineConfig,
    *,
    overwrite: bool = False,
    check: Check | None = None,
) -> dict[str, Any]:
    """Turn a log and boards into pairs, engaged queries and board titles.

    Args:
        inputs: What to read.
        out: Folder to make, with ``pairs``, ``engaged_queries``, ``board_titles`` and
            ``summary.json``; it appears when everything in it is complete.
        config: Settings.
        overwrite: Replace ``out`` if it is there.
        check: May add to the folder and the summary; where it raises, ``out`` stays as it is.

    Returns:
        The summary: windows, counts of everything kept and dropped, table 1.

    Raises:
        ConfigError: ``out`` is there and ``overwrite`` is not set.
        DataError: See ``events.read_events``.
    """
    with unfinished_output(out, overwrite) as work:
        return finish_output(work, out, _run(inputs, work, config), check)


def _run(inputs: PipelineInputs, work: Path, config: PipelineConfig) -> RunFacts:
    """Write the tables of a run to the folder ``work``."""
    partitions = config.partitions or max(1, math.ceil(log_rows(inputs.log) / PARTITION_ROWS))
    spill = Spill(work / "spill", partitions)
    bad_rows: Counter[str] = Counter()
    last: datetime | None = None
    reading = Progress(log, "read the log", unit="engagements", then="make pairs")
    for batch in read_events(
        inputs.log,
        config.rules,
        on_bad_rows=config.on_bad_rows,
        reading=config.reading,
        now=config.now,
        batch_rows=config.batch_rows,
    ):
        bad_rows.update(batch.report.rules_broken)
        latest = batch.frame["timestamp"].max()
        if isinstance(latest, datetime):
            last = max(last or latest, latest)
        spill.add(batch.frame)
        reading.add(batch.frame.height)
    split = config.pairs.split_at(last or datetime.now(UTC))
    counts: Counter[str] = Counter()
    making = Progress(log, "make pairs", partitions, unit="partitions", then="board titles, checks")
    for number, events in spill.drain(EVENT_SCHEMA):
        done = process_events(events, config, split, inputs.known)
        counts.update(done.counts)
        write_table(done.engaged, work / "engaged_queries" / part_name(number))
        write_table(done.pairs, work / "pairs" / part_name(number))
        making.add(1)
    titles = 0
    if inputs.boards is not None:
        titles = _write_board_titles(inputs.boards, work, config, partitions, bad_rows)
    return RunFacts(
        split=split, partitions=partitions, counts=counts, bad_rows=bad_rows, board_titles=titles
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a run counted, for its summary."""

    split: TimeSplit
    partitions: int
    counts: Counter[str]
    """Events and pairs by what happened to them."""
    bad_rows: Counter[str]
    """Rows left out, by the rule that they break."""
    board_titles: int
    """Rows of board titles."""


class Spill:
    """Spread frames over hash partitions, in Arrow files that are read once and removed.

    A single partition stays in memory.
    """

    def __init__(self, folder: Path, partitions: int) -> None:
        self.folder = folder
        self.partitions = partitions
        self._frames: list[pl.DataFrame] = []
        self._files = 0

    def add(self, frame: pl.DataFrame) -> None:
        """Add a frame with ``entity_id``."""
        if self.partitions == 1:
            self._frames.append(frame)
            return
        marked = frame.with_columns(partition_of(self.partitions).alias("__part"))
        parts = marked.partition_by("__part", as_dict=True, include_key=False)
        for (number,), part in parts.items():
            target = self.folder / f"{number:05d}"
            target.mkdir(parents=True, exist_ok=True)
            part.write_ipc(target / f"{self._files:06d}.arrow", compression="lz4")
        self._files += 1

    def drain(
        self, schema: dict[str, pl.DataType], *, keep: bool = False
    ) -> Iterator[tuple[int, pl.DataFrame]]:
        """Yield each partition whole, in order, and remove its files afterwards unless ``keep``."""
        empty = pl.DataFrame(schema=schema)
        if self.partitions == 1:
            yield 0, pl.concat([empty, *self._frames])
            return
        for number in range(self.partitions):
            files = sorted((self.folder / f"{number:05d}").glob("*.arrow"))
            yield (
                number,
                pl.concat([empty, *(pl.scan_ipc(file, glob=False).collect() for file in files)]),
            )
            if not keep:
                shutil.rmtree(self.folder / f"{number:05d}", ignore_errors=True)


_BOARD_ROWS: dict[str, pl.DataType] = {
    "board_id": pl.String(),
    "title": pl.String(),
    "entity_id": pl.String(),
}


def read_boards(
    path: TableSource, config: PipelineConfig, bad_rows: Counter[str]
) -> Iterator[pl.DataFrame]:
    """Read and check a boards table batch by batch: ``board_id, title, entity_id``.

    Args:
        path: The table.
        config: Settings.
        bad_rows: Bad rows that are left out are counted here.

    Raises:
        DataError: The table is missing or unreadable.
        RowError: A row breaks a rule and ``config.on_bad_rows`` is ``raise``.
    """
    for file in table_files(path):
        for raw in read_chunks(file, config.reading, chunk_rows=config.batch_rows):
            checked = check_frame(raw, BOARDS, file.name)
            if config.on_bad_rows == "raise":
                raise_problems(checked.report, droppable=True)
            for rule, rows in checked.report.rules_broken.items():
                bad_rows[f"boards: {rule}"] += rows
            yield checked.frame.select(list(_BOARD_ROWS))


def _write_board_titles(
    boards: TableSource, work: Path, config: PipelineConfig, partitions: int, bad_rows: Counter[str]
) -> int:
    """Write ``work/board_titles``: count the words of all entities first, then choose titles.

    Returns:
        Rows written.
    """
    spill = Spill(work / "spill-boards", partitions)
    for frame in read_boards(boards, config, bad_rows):
        spill.add(frame)
    parts = [
        word_prevalence(frame, config.boards) for _, frame in spill.drain(_BOARD_ROWS, keep=True)
    ]
    everywhere = add_prevalence(parts)
    rows = 0
    for number, frame in spill.drain(_BOARD_ROWS):
        titles = board_titles(frame, config.boards, everywhere)
        rows += titles.height
        write_table(titles, work / "board_titles" / part_name(number))
    return rows


def part_name(number: int) -> str:
    """Return the file name of a partition's output."""
    return f"part-{number:05d}.parquet"


@contextmanager
def unfinished_output(out: Path, overwrite: bool) -> Iterator[Path]:
    """Make the hidden folder that the output is written to; it is gone after the block.

    Raises:
        ConfigError: ``out`` is there and may not be replaced.
    """
    if out.exists() and not overwrite:
        raise ConfigError(
            f"{out} is already there. Name another folder, or replace it with --overwrite."
        )
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def finish_output(work: Path, out: Path, facts: RunFacts, check: Check | None) -> dict[str, Any]:
    """Check, write the summary, then move the finished folder into place; returns the summary."""
    for spilled in ("spill", "spill-boards"):
        shutil.rmtree(work / spilled, ignore_errors=True)
    engaged = scan_parts(work / "engaged_queries")
    summary = {
        "windows": {name: moment.isoformat() for name, moment in facts.split._asdict().items()},
        "counts": dict(sorted(facts.counts.items())),
        "bad_rows_dropped": dict(facts.bad_rows),
        "engaged_queries": engaged.select(pl.len()).collect().item(),
        "board_titles": facts.board_titles,
        "partitions": facts.partitions,
        "table_1": pairs_table(scan_parts(work / "pairs")).to_dicts(),
    }
    if check is not None:
        check(work, summary)
    (work / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    replace_folder(work, out)
    return summary
