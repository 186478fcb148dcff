"""Run the pipeline on many machines: Ray Data reads and partitions the log.

The same functions run on all partitions at once, and results equal the local ones, row for row. All
machines must see the log under the same path and have this package installed; the calling machine
writes the output.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
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
from encoders.logs.events import EVENT_SCHEMA, batch_starts, empty_log, engaged_events, raw_batches
from encoders.logs.pipeline import (
    PARTITION_ROWS,
    Check,
    PipelineConfig,
    PipelineInputs,
    RunFacts,
    finish_output,
    part_name,
    partition_of,
    process_events,
    read_boards,
    unfinished_output,
)
from encoders.tables.files import raise_problems, write_table
from encoders.tables.parts import TableFile, TableSource, table_files
from encoders.tables.reading_options import ReadingOptions
from encoders.tables.stream import log_rows

if TYPE_CHECKING:
    import pyarrow as pa

LABEL = "partition"


def run_ray_pipeline(
    inputs: PipelineInputs,
    out: Path,
    config: PipelineConfig,
    *,
    address: str,
    overwrite: bool = False,
    check: Check | None = None,
) -> dict[str, Any]:
    """Do what ``pipeline.run_pipeline`` does, on a Ray cluster.

    Args:
        inputs: What to read.
        out: Folder to make.
        config: Settings; ``partitions`` None: one per core of the cluster, or per
            ``PARTITION_ROWS`` log rows if that is more. One task reads ``batch_rows`` log rows.
        address: Address of a running cluster (``host:port``, ``auto``), or ``local`` to start one
            here.
        overwrite: Replace ``out`` if it is there.
        check: See ``pipeline.run_pipeline``.

    Returns:
        The summary.

    Raises:
        MissingDependency: Ray is not installed.
        ConfigError: ``out`` is there and ``overwrite`` is not set.
        DataError: The log is unreadable, or a row breaks a rule.
    """
    ray = connect(address)
    with unfinished_output(out, overwrite) as work:
        return finish_output(work, out, _run(ray, inputs, work, config), check)


def _run(ray: Any, inputs: PipelineInputs, work: Path, config: PipelineConfig) -> RunFacts:
    """Write the tables of a run to the folder ``work``."""
    cores = int(ray.cluster_resources().get("CPU", 1))
    partitions = config.partitions or max(cores, math.ceil(log_rows(inputs.log) / PARTITION_ROWS))
    now = config.now or datetime.now(UTC)

    def read(batch: pa.Table) -> pa.Table:
        return _read_task(batch, config, partitions, now)

    events = (
        ray.data.from_items(_reading_tasks(inputs.log, config.reading, config.batch_rows))
        .map_batches(read, batch_size=1, batch_format="pyarrow")
        .materialize()
    )
    if events.count() == 0:  # not even a report
        raise empty_log(inputs.log)
    bad_rows: Counter[str] = Counter()
    for row in events.map_batches(_reports, batch_format="pyarrow").iter_rows():
        bad_rows.update(json.loads(row["report"]))
    last = events.max("timestamp")
    if last is not None and last.tzinfo is None:
        last = last.replace(tzinfo=UTC)
    split = config.pairs.split_at(last or now)
    known = inputs.known

    def process(group: pa.Table) -> pa.Table:
        frame = _frame(group)
        rows = frame.filter(pl.col("timestamp").is_not_null()).drop(LABEL, "report")
        done = process_events(rows, config, split, known)
        outputs = {"engaged_queries": done.engaged, "pairs": done.pairs}
        return _pack(frame[LABEL][0], outputs, done.counts)

    counts: Counter[str] = Counter()
    grouped = events.groupby(LABEL, num_partitions=partitions)
    for row in grouped.map_groups(process, batch_format="pyarrow").iter_rows():
        counts.update(_unpack(row, work))
    titles = 0
    if inputs.boards is not None:
        frames = read_boards(inputs.boards, config, bad_rows)
        titles = _ray_board_titles(ray, frames, work, config, partitions)
    return RunFacts(
        split=split, partitions=partitions, counts=counts, bad_rows=bad_rows, board_titles=titles
    )


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


def _reading_tasks(
    log: TableSource, reading: ReadingOptions, batch_rows: int
) -> list[dict[str, Any]]:
    """List the pieces of a log that one task each reads."""
    tasks = []
    for file in table_files(log):
        partition = json.dumps(dict(file.partition))
        tasks += [
            {
                "file": str(file.path.resolve()),
                "partition": partition,
                "start": start,
                "rows": batch_rows,
            }
            for start in batch_starts(file, reading, batch_rows)
        ]
    return tasks


def _read_task(batch: pa.Table, config: PipelineConfig, partitions: int, now: datetime) -> pa.Table:
    """Read the events of some tasks, with their partition.

    The report is carried by one more row a task, which has no timestamp.
    """
    frames = []
    for task in batch.to_pylist():
        file = TableFile(Path(task["file"]), json.loads(task["partition"]))
        for raw in raw_batches(file, config.reading, task["start"], task["rows"]):
            events = engaged_events(raw, config.rules, file.name, now=now)
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
    nothing = pl.DataFrame(schema={**EVENT_SCHEMA, LABEL: pl.Int32, "report": pl.String})
    return _table(pl.concat([nothing, *frames]))


def _reports(batch: pa.Table) -> pa.Table:
    """Keep the reports of reading tasks."""
    return _table(_frame(batch.select(["report"])).drop_nulls())


def _ray_board_titles(
    ray: Any, boards: Iterator[pl.DataFrame], work: Path, config: PipelineConfig, partitions: int
) -> int:
    """Write ``work/board_titles``: count the words of all entities first, then choose titles.

    Returns:
        Rows written.
    """
    label = partition_of(partitions).alias(LABEL)
    tables = [_table(frame.with_columns(label)) for frame in boards]
    data = ray.data.from_arrow(tables).materialize()
    grouped = data.groupby(LABEL, num_partitions=partitions)

    def count(group: pa.Table) -> pa.Table:
        words = word_prevalence(_frame(group), config.boards)
        return _pack(0, {"words": words.words}, Counter(entities=words.entities))

    parts = [
        Prevalence(_from_bytes(row["words"]), json.loads(row["counts"])["entities"])
        for row in grouped.map_groups(count, batch_format="pyarrow").iter_rows()
    ]
    nowhere = Prevalence(pl.DataFrame(schema={"word": pl.String, "entities": pl.Int64}), 0)
    everywhere = add_prevalence([nowhere, *parts])

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
    """Pack frames into one row: a partition's outputs differ in columns, a Ray data set may not."""
    row: dict[str, Any] = {LABEL: [int(number)], "counts": [json.dumps(counts)]}
    for name, frame in frames.items():
        buffer = io.BytesIO()
        frame.write_ipc(buffer, compression="zstd")
        row[name] = [buffer.getvalue()]
    return _table(pl.DataFrame(row))


def _from_bytes(packed: bytes) -> pl.DataFrame:
    return pl.read_ipc(io.BytesIO(packed))


def _unpack(row: dict[str, Any], work: Path) -> Counter[str]:
    """Write the frames of a packed row to ``work`` and return its counts."""
    for name in row.keys() - {LABEL, "counts"}:
        write_table(_from_bytes(row[name]), work / name / part_name(row[LABEL]))
    return Counter(json.loads(row["counts"]))
