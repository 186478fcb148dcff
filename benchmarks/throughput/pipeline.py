"""``omni bench pipeline``: log rows to engaged queries, board titles and pairs.

Time, memory, growth with the log, and the daily update.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import polars as pl

from benchmarks.record import Measurement, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    stage,
)

LABEL = (
    "SIMULATED log (omni data simulate-logs over annotation pairs): scale only, no quality claim"
)

MEASURED_RUN = """
import json, resource, sys, time
from pathlib import Path
from encoders.logs.pipeline import PipelineConfig, PipelineInputs, run_pipeline
log, boards, out = (Path(a) for a in sys.argv[1:4])
wall, cpu = time.perf_counter(), time.process_time()
inputs = PipelineInputs(log=log, boards=boards)
summary = run_pipeline(inputs, out, PipelineConfig(), overwrite=True)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
counts = {k: summary["counts"].get(k, 0) for k in ("events", "pairs")}
counts |= {k: summary[k] for k in ("engaged_queries", "board_titles", "partitions")}
print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "peak_gib": peak, **counts}))
"""
"""Run in a process of its own, so that the peak of memory is the pipeline's and nothing is warm."""


MEASURED_DAYS = 6
DAILY_CASES = (
    (30, 1, 1000, 1),
    (180, 1, 1000, 1),
    (730, 1, 1000, 1),
    (730, 4, 1000, 1),
    (730, 12, 1000, 1),
    (730, 1, 730, 1),
    (730, 1, 1000, 3),
)
"""Days of history, how many times as dense it is as the new days, window in days, days merged at
once."""


@click.command()
@click.option(
    "--rows",
    "sizes",
    multiple=True,
    type=int,
    default=(1_000_000, 10_000_000),
    show_default=True,
    help="Log sizes; repeat.",
)
@click.option(
    "--repeats",
    default=3,
    show_default=True,
    help="Runs per size; the fastest and the median are recorded.",
)
@click.option(
    "--results-per-search",
    default=4,
    show_default=True,
    help="Impressions per search: 4 makes a fifth of the rows engagements.",
)
@click.option(
    "--measure",
    "parts",
    multiple=True,
    type=click.Choice(["log", "daily"]),
    default=("log", "daily"),
    show_default=True,
    help=(
        "The log pipeline (record pipeline), the daily update after short and long histories"
        " (record pipeline-daily); repeat."
    ),
)
@click.option(
    "--day-rows",
    default=5_000,
    show_default=True,
    help="Log rows of a day in the daily measurement.",
)
@click.option("--threads", default=2, show_default=True, help="Cores used.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for the simulated logs (kept and reused). Default: a temporary one.",
)
@click.option(
    "--simulate-only", is_flag=True, help="Only make the logs in --work; a later call measures."
)
@data_option
@json_option
@handle_errors
def command(
    sizes: tuple[int, ...],
    repeats: int,
    results_per_search: int,
    parts: tuple[str, ...],
    day_rows: int,
    threads: int,
    work: Path | None,
    simulate_only: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure the log pipeline on SIMULATED logs: wall and CPU seconds, peak memory, daily update.

    Target: 10 million log rows in under 25 s and 4 GiB on 2 cores.

    Example: omni bench pipeline --rows 1000000 --rows 10000000 --repeats 3
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        sizes = sizes if simulate_only or "log" in parts else ()
        sources = {
            rows: _simulated(
                folder / f"log-{rows}-{results_per_search}", rows, results_per_search, data_dir
            )
            for rows in sizes
        }
        if simulate_only:
            return
        runs = []
        for rows, source in sources.items():
            with stage(f"pipeline over {rows:,} rows, {repeats} runs"):
                runs.append(_measure(source, folder / "out", rows, repeats, threads))
        days = _daily_costs(folder, day_rows, data_dir) if "daily" in parts else []
    metrics: dict[str, list[dict[str, Any]]] = {}
    records = []
    if runs:
        metrics["pipeline"] = runs
        columns = [
            "rows",
            "events",
            "seconds",
            "median_seconds",
            "cpu_seconds",
            "peak_gib",
            "seconds_per_million",
            "partitions",
            "pairs",
        ]
        _show(as_json, f"Pipeline, {threads} threads: {LABEL}", columns, runs)
        config = {"results_per_search": results_per_search, "threads": threads}
        records.append(
            _record(
                "pipeline",
                "pipeline",
                runs,
                config,
                {"repeats": repeats, "processes": "a fresh one per run", "memory": "ru_maxrss"},
            )
        )
    if days:
        metrics["daily_update"] = days
        columns = [
            "case",
            "history_events",
            "changed_events",
            "seconds",
            "cpu_seconds",
            "cpu_us_per_changed_event",
            "feature_rows",
        ]
        _show(as_json, f"Daily update (mean of {MEASURED_DAYS} days): {LABEL}", columns, days)
        records.append(
            _record(
                "pipeline-daily",
                "daily_update",
                days,
                {"day_rows": day_rows},
                {"figures": f"mean over {MEASURED_DAYS} days"},
            )
        )
    if as_json:
        print_json(metrics | {"records": [str(r) for r in records]})
    else:
        for record in records:
            click.echo(record)


def _show(as_json: bool, title: str, columns: list[str], rows: list[dict[str, Any]]) -> None:
    if not as_json:
        print_table(title, columns, ([row[c] for c in columns] for row in rows))


def _record(
    name: str,
    what: str,
    rows: list[dict[str, Any]],
    config: dict[str, Any],
    protocol: dict[str, Any],
) -> Path:
    clock = (
        "perf_counter; cpu_seconds: process_time over all threads, which other work on the machine"
        " does not stretch"
    )
    return write_record(
        name,
        Measurement(
            dataset={"name": "simulated log", "simulated": True, "note": LABEL},
            config=config,
            protocol={"clock": clock, "load_average": os.getloadavg(), **protocol},
            metrics={what: rows},
            libraries=("polars", "pyarrow"),
        ),
    )


def _simulated(folder: Path, rows: int, results_per_search: int, data_dir: Path | None) -> Path:
    """Simulate a log once; a folder that is complete is used again."""
    from encoders.datasets.dataset import load_dataset
    from encoders.logs.simulator import SimulatorConfig, write_simulation

    if not (folder / "simulation.json").is_file():
        with stage(f"simulate {rows:,} rows"):
            config = SimulatorConfig(
                rows=rows, users=max(1000, rows // 50), results_per_search=results_per_search
            )
            write_simulation(load_dataset(data_dir, engaged_queries=0).pairs, folder, config)
    return folder


def _measure(source: Path, out: Path, rows: int, repeats: int, threads: int) -> dict[str, Any]:
    results = []
    for _ in range(repeats):
        arguments = [
            sys.executable,
            "-c",
            MEASURED_RUN,
            str(source / "log"),
            str(source / "boards.parquet"),
            str(out),
        ]
        environment = {
            "POLARS_MAX_THREADS": str(threads),
            "PATH": "",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=True, env=environment
        )
        results.append(json.loads(done.stdout))
    fastest = min(results, key=lambda r: r["seconds"])
    median = sorted(r["seconds"] for r in results)[len(results) // 2]
    per_million = fastest["seconds"] / (rows / 1e6)
    return {
        "rows": rows,
        **fastest,
        "median_seconds": median,
        "seconds_per_million": per_million,
        "all_seconds": [r["seconds"] for r in results],
    }


def _daily_costs(folder: Path, day_rows: int, data_dir: Path | None) -> list[dict[str, Any]]:
    """Return the cost of merging days into states of other length and density, and of long slices.

    A day expires in each.
    """
    from encoders.datasets.dataset import load_dataset
    from encoders.logs.events import EngagementRules, engaged_events
    from encoders.logs.simulator import SimulatorConfig, simulate_log

    longest = 730 + MEASURED_DAYS
    start = datetime(2023, 1, 1, tzinfo=UTC)
    config = SimulatorConfig(
        rows=day_rows * longest,
        days=longest,
        start=start,
        rows_per_file=day_rows * 30,
        users=day_rows * 5,
        late=0.0,
        duplicates=0.0,
    )
    with stage(f"simulate {longest} days of {day_rows:,} rows"):
        pairs = load_dataset(data_dir, engaged_queries=0).pairs
        events = pl.concat(
            [engaged_events(part, EngagementRules()).frame for part in simulate_log(pairs, config)]
        )
    first = start + timedelta(days=730)
    results = []
    for days, copies, window, slice_days in DAILY_CASES:
        past = _thickened(
            events.filter(
                pl.col("timestamp").is_between(first - timedelta(days=days), first, closed="left")
            ),
            copies,
        )
        case = (
            f"{days} days"
            + (f", {copies} times as dense" if copies > 1 else "")
            + (", a day expires" if window == days else "")
        )
        case += f", merged {slice_days} days at once" if slice_days > 1 else ""
        new = events.filter(pl.col("timestamp") >= first)
        slices = [
            new.filter(
                pl.col("timestamp").is_between(
                    first + timedelta(days=d), first + timedelta(days=d + slice_days), closed="left"
                )
            )
            for d in range(0, MEASURED_DAYS, slice_days)
        ]
        with (
            tempfile.TemporaryDirectory(dir=folder) as state,
            stage(f"daily update: {case} ({past.height:,} events)"),
        ):
            results.append(
                {"case": case, "history_events": past.height}
                | _merge_cost(Path(state) / "state", past, slices, window)
            )
    return results


def _thickened(past: pl.DataFrame, copies: int) -> pl.DataFrame:
    """Return the events with copies by other users at other times: a denser history.

    The queries of the copies are shuffled.
    """
    others = [
        past.with_columns(
            pl.col("timestamp").dt.offset_by(f"-{n}s"),
            pl.col("user_id") + f"-{n}",
            pl.col("query").sample(fraction=1.0, shuffle=True, seed=n),
        )
        for n in range(1, copies)
    ]
    return pl.concat([past, *others])


def _merge_cost(
    folder: Path, past: pl.DataFrame, slices: list[pl.DataFrame], window_days: int
) -> dict[str, Any]:
    """Load a history, then merge slices: means per slice and per changed event."""
    from encoders.enrichment.engaged_queries import EngagedQueriesConfig
    from encoders.enrichment.engaged_state import EngagedQueriesState

    with EngagedQueriesState.create(folder, EngagedQueriesConfig(window_days=window_days)) as state:
        state.merge(past)
        seconds, cpu, changed, feature_rows = 0.0, 0.0, 0, 0
        for part in slices:
            clock, used = time.perf_counter(), time.process_time()
            merge = state.merge(part)
            seconds += time.perf_counter() - clock
            cpu += time.process_time() - used
            changed += merge.counts["added"] + merge.counts["expired"]
            feature_rows += merge.changed.height
    n = len(slices)
    return {
        "changed_events": changed / n,
        "seconds": seconds / n,
        "cpu_seconds": cpu / n,
        "cpu_us_per_changed_event": 1e6 * cpu / max(1, changed),
        "feature_rows": feature_rows / n,
    }
