"""The whole way from logs and boards to pairs, engaged queries and board titles, in memory that does not grow with the log.

Every step works within one entity. Events are spread over hash partitions of entities while they
are read, and each partition is worked on by itself: the same :func:`process_events` runs here one
partition after another and on Ray many at once (``encoders.logs.ray_pipeline``).
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from encoders.enrichment.board_titles import (
    BoardTitlesConfig,
    Prevalence,
    add_prevalence,
    board_titles,
    word_prevalence,
)
from encoders.enrichment.engaged_queries import EngagedQueriesConfig, engaged_queries
from encoders.errors import ConfigError
from encoders.logs.events import BATCH_ROWS, EVENT_SCHEMA, EngagementRules, read_events
from encoders.logs.pairs import (
    PairsConfig,
    TimeSplit,
    build_pairs,
    find_leaks,
    pairs_table,
    refuse_leaks,
)
from encoders.tables.checks import check_frame
from encoders.tables.files import (
    OnBadRows,
    TableSource,
    raise_problems,
    read_raw,
    table_files,
    write_table,
)
from encoders.tables.schemas import BOARDS
from encoders.tables.stream import log_rows

PARTITION_ROWS = 15_000_000
"""Log rows per partition; the events of one partition are in memory at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """Settings of every step."""

    rules: EngagementRules = field(default_factory=EngagementRules)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    engaged: EngagedQueriesConfig = field(default_factory=EngagedQueriesConfig)
    boards: BoardTitlesConfig = field(default_factory=BoardTitlesConfig)
    on_bad_rows: OnBadRows = "raise"
    encoding: str = "utf-8"


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
    """Engaged queries and pairs of the entities of one partition.

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
        features = features.join(
            known.select("entity_type", "entity_id").unique(),
            on=["entity_type", "entity_id"],
            how="semi",
        )
    pairs = build_pairs(
        events,
        config.pairs,
        split,
        known=known,
        features=None if config.pairs.keep_seen else features,
    )
    if not config.pairs.keep_seen:
        refuse_leaks(
            find_leaks(pairs.frame, features), int((pairs.frame["split"] == "heldout").sum())
        )
    return Partition(features, pairs.frame, pairs.counts)


def partition_of(partitions: int) -> pl.Expr:
    """Number of the partition of each row, from ``entity_id`` alone, so that logs and boards of one entity meet."""
    return (pl.col("entity_id").hash(seed=17) % partitions).cast(pl.Int32)


def run_pipeline(
    log: TableSource,
    out: Path,
    config: PipelineConfig,
    *,
    boards: TableSource | None = None,
    known: pl.DataFrame | None = None,
    partitions: int | None = None,
    overwrite: bool = False,
    now: datetime | None = None,
) -> dict[str, Any]:
    """Turn a log (and boards) into ``out/pairs``, ``out/engaged_queries``, ``out/board_titles`` and ``out/summary.json``.

    Args:
        log: Log file or folder, or several that are one log together.
        out: Folder to make; it appears when everything in it is complete.
        config: Settings.
        boards: Boards file, folder or several; None: no board titles.
        known: ``entity_type, entity_id`` of the catalogue; None: every entity of the log is known.
        partitions: Hash partitions; None: one per ``PARTITION_ROWS`` log rows.
        overwrite: Replace ``out`` if it is there.
        now: Time that "in the future" is measured from; None: the clock.

    Returns:
        The summary: windows, counts of everything kept and dropped, table 1.

    Raises:
        ConfigError: ``out`` is there and ``overwrite`` is not set.
        DataError: See ``events.read_events``.
    """
    work = prepare_output(out, overwrite)
    partitions = partitions or max(1, math.ceil(log_rows(log) / PARTITION_ROWS))
    spill = Spill(work / "spill", partitions)
    bad: Counter[str] = Counter()
    last: datetime | None = None
    for batch in read_events(
        log, config.rules, on_bad_rows=config.on_bad_rows, encoding=config.encoding, now=now
    ):
        bad.update(batch.report.rules_broken)
        latest = batch.frame["timestamp"].max()
        last = max(last or latest, latest) if isinstance(latest, datetime) else last
        spill.add(batch.frame)
    split = config.pairs.split_at(last or datetime.now(UTC))
    counts: Counter[str] = Counter()
    for number, events in spill.drain(EVENT_SCHEMA):
        done = process_events(events, config, split, known)
        counts.update(done.counts)
        write_table(done.engaged, work / "engaged_queries" / part_name(number))
        write_table(done.pairs, work / "pairs" / part_name(number))
    titles = write_board_titles(boards, work, config, partitions, bad) if boards is not None else 0
    return finish_output(work, out, config, split, counts, bad, partitions, titles)


class Spill:
    """Frames spread over hash partitions: in memory when there is one partition, else in Arrow files that are read once and removed."""

    def __init__(self, folder: Path, partitions: int) -> None:
        self.folder, self.partitions = folder, partitions
        self._frames: list[pl.DataFrame] = []
        self._files = 0

    def add(self, frame: pl.DataFrame) -> None:
        """Take a frame with ``entity_id``."""
        if self.partitions == 1:
            self._frames.append(frame)
            return
        marked = frame.with_columns(partition_of(self.partitions).alias("__part"))
        for (number,), part in marked.partition_by(
            "__part", as_dict=True, include_key=False
        ).items():
            target = self.folder / f"{number:05d}"
            target.mkdir(parents=True, exist_ok=True)
            part.write_ipc(target / f"{self._files:06d}.arrow", compression="lz4")
        self._files += 1

    def drain(
        self, schema: dict[str, pl.DataType], *, keep: bool = False
    ) -> Iterator[tuple[int, pl.DataFrame]]:
        """Yield each partition whole, in order; its files are removed afterwards unless ``keep``."""
        for number in range(self.partitions):
            if self.partitions == 1:
                yield (
                    number,
                    pl.concat(self._frames) if self._frames else pl.DataFrame(schema=schema),
                )
                continue
            files = sorted((self.folder / f"{number:05d}").glob("*.arrow"))
            yield (
                number,
                (
                    pl.concat([pl.read_ipc(f) for f in files])
                    if files
                    else pl.DataFrame(schema=schema)
                ),
            )
            if not keep:
                shutil.rmtree(self.folder / f"{number:05d}", ignore_errors=True)


def read_boards(
    path: TableSource, config: PipelineConfig, bad: Counter[str], batch_rows: int = BATCH_ROWS
) -> Iterator[pl.DataFrame]:
    """Read and check a boards table batch by batch: ``board_id, title, entity_id``; bad rows that are left out are counted in ``bad``.

    Raises:
        DataError: The table is missing or unreadable.
        RowError: A row breaks a rule and ``config.on_bad_rows`` is ``raise``.
    """
    for file in table_files(path):
        total = log_rows(file) if file.suffix == ".parquet" else batch_rows
        for start in range(0, max(total, 1), batch_rows):
            whole = file.suffix != ".parquet"
            raw = (
                read_raw(file, config.encoding)
                if whole
                else pl.scan_parquet(file).slice(start, batch_rows).collect()
            )
            checked = check_frame(raw, BOARDS, file.name, first_row=start + 1)
            if config.on_bad_rows == "raise":
                raise_problems(checked.report, droppable=True)
            bad.update(
                {f"boards: {rule}": rows for rule, rows in checked.report.rules_broken.items()}
            )
            yield checked.frame.select("board_id", "title", "entity_id")


def write_board_titles(
    boards: TableSource, work: Path, config: PipelineConfig, partitions: int, bad: Counter[str]
) -> int:
    """Write ``work/board_titles``; two passes over the partitions: words of all entities first, then the titles of each. Returns rows."""
    schema: dict[str, pl.DataType] = {
        "board_id": pl.String(),
        "title": pl.String(),
        "entity_id": pl.String(),
    }
    spill = Spill(work / "spill-boards", partitions)
    for frame in read_boards(boards, config, bad):
        spill.add(frame)
    parts: list[Prevalence] = [
        word_prevalence(frame, config.boards) for _, frame in spill.drain(schema, keep=True)
    ]
    everywhere = add_prevalence(parts)
    rows = 0
    for number, frame in spill.drain(schema):
        titles = board_titles(frame, config.boards, everywhere)
        rows += titles.height
        write_table(titles, work / "board_titles" / part_name(number))
    return rows


def part_name(number: int) -> str:
    """File name of a partition's output."""
    return f"part-{number:05d}.parquet"


def prepare_output(out: Path, overwrite: bool) -> Path:
    """Make the hidden folder in which the output grows.

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
    return work


def finish_output(
    work: Path,
    out: Path,
    config: PipelineConfig,
    split: TimeSplit,
    counts: Counter[str],
    bad: Counter[str],
    partitions: int,
    titles: int,
) -> dict[str, Any]:
    """Write the summary, then move the finished folder into place."""
    for spilled in ("spill", "spill-boards"):
        shutil.rmtree(work / spilled, ignore_errors=True)
    pairs = pl.scan_parquet(work / "pairs" / "*.parquet").select(
        "query", "entity_type", "entity_id", "action", "count", "split"
    )
    summary = {
        "windows": {name: moment.isoformat() for name, moment in split._asdict().items()},
        "counts": dict(sorted(counts.items())),
        "bad_rows_dropped": dict(bad),
        "engaged_queries": (
            pl.scan_parquet(work / "engaged_queries" / "*.parquet")
            .select(pl.len())
            .collect()
            .item()
        ),
        "board_titles": titles,
        "partitions": partitions,
        "table_1": pairs_table(pairs.collect()).to_dicts(),
    }
    write_summary(summary, work)
    if out.exists():
        shutil.rmtree(out)
    work.rename(out)
    return summary


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    """Write ``folder/summary.json``."""
    (folder / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
