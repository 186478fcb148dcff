"""The pipeline on many machines: Ray Data reads and partitions the log, and the same per-entity functions run on every partition at once.

Results equal the local ones, row for row. All machines must see the log under the same path and
have this package installed; the output is written by the machine that asked for it.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from encoders.enrichment.board_titles import (
    Prevalence,
    add_prevalence,
    board_titles,
    word_prevalence,
)
from encoders.errors import DataError, MissingDependency
from encoders.logs.events import BATCH_ROWS, engaged_events, raw_batch
from encoders.logs.pipeline import (
    PARTITION_ROWS,
    PipelineConfig,
    finish_output,
    part_name,
    partition_of,
    prepare_output,
    process_events,
    read_boards,
)
from encoders.tables.files import TableSource, raise_problems, table_files, write_table
from encoders.tables.stream import log_rows

if TYPE_CHECKING:
    import pyarrow as pa

LABEL = "partition"


def run_ray_pipeline(
    log: TableSource,
    out: Path,
    config: PipelineConfig,
    *,
    address: str,
    boards: TableSource | None = None,
    known: pl.DataFrame | None = None,
    partitions: int | None = None,
    overwrite: bool = False,
    now: datetime | None = None,
    batch_rows: int = BATCH_ROWS,
) -> dict[str, Any]:
    """``pipeline.run_pipeline`` on a Ray cluster; see there for the arguments.

    Args:
        log: As there.
        out: As there.
        config: As there.
        address: Address of a running cluster (``host:port``, ``auto``), or ``local`` to start one
            here.
        boards: As there.
        known: As there.
        partitions: As there; at least one per core of the cluster is a good number.
        overwrite: As there.
        now: As there.
        batch_rows: Log rows read by one task.

    Returns:
        The summary, as there.

    Raises:
        MissingDependency: Ray is not installed.
        DataError: The log is unreadable, or a row breaks a rule.
    """
    ray = connect(address)
    work = prepare_output(out, overwrite)
    partitions = partitions or max(
        int(ray.cluster_resources().get("CPU", 1)), math.ceil(log_rows(log) / PARTITION_ROWS)
    )
    now = now or datetime.now(UTC)

    def read(batch: pa.Table) -> pa.Table:
        return _read_task(batch, config, partitions, now)

    events = (
        ray.data.from_items(_reading_tasks(log, batch_rows))
        .map_batches(read, batch_size=1, batch_format="pyarrow")
        .materialize()
    )
    bad: Counter[str] = Counter()
    for row in events.map_batches(_reports, batch_format="pyarrow").iter_rows():
        bad.update(json.loads(row["report"]))
    latest = events.max("timestamp")
    last = latest.replace(tzinfo=UTC) if latest is not None and latest.tzinfo is None else latest
    split = config.pairs.split_at(last or now)

    def process(group: pa.Table) -> pa.Table:
        frame = _frame(group)
        done = process_events(
            frame.filter(pl.col("timestamp").is_not_null()).drop(LABEL, "report"),
            config,
            split,
            known,
        )
        return _pack(
            frame[LABEL][0], {"engaged_queries": done.engaged, "pairs": done.pairs}, done.counts
        )

    counts: Counter[str] = Counter()
    for row in (
        events.groupby(LABEL, num_partitions=partitions)
        .map_groups(process, batch_format="pyarrow")
        .iter_rows()
    ):
        counts.update(_unpack(row, work))
    titles = (
        _ray_board_titles(ray, boards, work, config, partitions, bad) if boards is not None else 0
    )
    return finish_output(work, out, config, split, counts, bad, partitions, titles)


def connect(address: str) -> Any:
    """Join (or start, for ``local``) a Ray cluster and return the module.

    Raises:
        MissingDependency: Ray is not installed.
        DataError: No cluster answers at the address.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependency("ray", "ray", "--ray") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DataError(
                f"no Ray cluster answers at {address!r} ({error}). Start one with `ray start"
                " --head`, or use --ray local."
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


def _reading_tasks(log: TableSource, batch_rows: int) -> list[dict[str, Any]]:
    tasks = []
    for file in table_files(log):
        rows = log_rows(file) if file.suffix == ".parquet" else 1
        tasks += [
            {"file": str(file.resolve()), "start": start, "rows": batch_rows}
            for start in range(0, max(rows, 1), batch_rows)
        ]
    return tasks


def _read_task(batch: pa.Table, config: PipelineConfig, partitions: int, now: datetime) -> pa.Table:
    """Events of some reading tasks with their partition; the report travels in one extra row per task, which has no timestamp."""
    frames = []
    for task in batch.to_pylist():
        raw = raw_batch(Path(task["file"]), config.encoding, task["start"], task["rows"])
        events = engaged_events(raw, config.rules, Path(task["file"]).name, now=now)
        if config.on_bad_rows == "raise":
            raise_problems(events.report, droppable=True)
        marked = events.frame.with_columns(
            partition_of(partitions).alias(LABEL), pl.lit(None, pl.String).alias("report")
        )
        report = pl.DataFrame(
            {LABEL: [0], "report": [json.dumps(events.report.rules_broken)]},
            schema={LABEL: pl.Int32, "report": pl.String},
        )
        frames.append(pl.concat([marked, report], how="diagonal"))
    return _table(pl.concat(frames))


def _reports(batch: pa.Table) -> pa.Table:
    return _table(_frame(batch.select(["report"])).drop_nulls())


def _ray_board_titles(
    ray: Any,
    boards: TableSource,
    work: Path,
    config: PipelineConfig,
    partitions: int,
    bad: Counter[str],
) -> int:
    frames = [
        frame.with_columns(partition_of(partitions).alias(LABEL))
        for frame in read_boards(boards, config, bad)
    ]
    data = ray.data.from_arrow([_table(frame) for frame in frames]).materialize()
    grouped = data.groupby(LABEL, num_partitions=partitions)

    def count(group: pa.Table) -> pa.Table:
        words = word_prevalence(_frame(group), config.boards)
        return _pack(0, {"words": words.words}, Counter(entities=words.entities))

    parts = [
        Prevalence(_from_bytes(row["words"]), json.loads(row["counts"])["entities"])
        for row in grouped.map_groups(count, batch_format="pyarrow").iter_rows()
    ]
    everywhere = (
        add_prevalence(parts)
        if parts
        else Prevalence(pl.DataFrame(schema={"word": pl.String, "entities": pl.Int64}), 0)
    )

    def rank(group: pa.Table) -> pa.Table:
        frame = _frame(group)
        titles = board_titles(frame.drop(LABEL), config.boards, everywhere)
        return _pack(frame[LABEL][0], {"board_titles": titles}, Counter(rows=titles.height))

    return sum(
        _unpack(row, work)["rows"]
        for row in grouped.map_groups(rank, batch_format="pyarrow").iter_rows()
    )


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame), "a table becomes a frame"
    return frame


def _table(frame: pl.DataFrame) -> pa.Table:
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())


def _pack(number: int, frames: dict[str, pl.DataFrame], counts: Counter[str]) -> pa.Table:
    """One row that carries whole frames: the outputs of a partition have different columns, a Ray data set has one schema."""
    row: dict[str, Any] = {LABEL: [int(number)], "counts": [json.dumps(counts)]}
    for name, frame in frames.items():
        buffer = io.BytesIO()
        frame.write_ipc(buffer, compression="zstd")
        row[name] = [buffer.getvalue()]
    return _table(pl.DataFrame(row))


def _from_bytes(packed: bytes) -> pl.DataFrame:
    return pl.read_ipc(io.BytesIO(packed))


def _unpack(row: dict[str, Any], work: Path) -> Counter[str]:
    for name in row.keys() - {LABEL, "counts"}:
        write_table(_from_bytes(row[name]), work / name / part_name(row[LABEL]))
    return Counter(json.loads(row["counts"]))
