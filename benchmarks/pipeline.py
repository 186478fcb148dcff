"""``omni bench pipeline``: log rows to engaged queries, board titles and pairs: time, memory, growth with the log, and the daily update."""

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

from benchmarks.record import write_record
from encoders.console import data_option, handle_errors, json_option, print_json, print_table, stage

LABEL = "SIMULATED log (omni data simulate-logs over annotation pairs): scale only, no quality claim"

MEASURED_RUN = """
import json, resource, sys, time
from pathlib import Path
from encoders.pipeline import PipelineConfig, run_pipeline
log, boards, out = (Path(a) for a in sys.argv[1:4])
wall, cpu = time.perf_counter(), time.process_time()
summary = run_pipeline(log, out, PipelineConfig(), boards=boards, overwrite=True)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
counts = {k: summary["counts"].get(k, 0) for k in ("events", "pairs")}
counts |= {k: summary[k] for k in ("engaged_queries", "board_titles", "partitions")}
print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "peak_gib": peak, **counts}))
"""
"""Run in a process of its own, so that the peak of memory is the pipeline's and nothing is warm."""


@click.command()
@click.option("--rows", "sizes", multiple=True, type=int, default=(1_000_000, 10_000_000), show_default=True, help="Log sizes; repeat.")
@click.option("--repeats", default=3, show_default=True, help="Runs per size; the fastest and the median are recorded.")
@click.option("--results-per-search", default=4, show_default=True, help="Impressions per search: 4 makes a fifth of the rows engagements.")
@click.option("--daily/--no-daily", default=True, show_default=True, help="Measure the daily update after short and long histories.")
@click.option("--day-rows", default=5_000, show_default=True, help="Log rows of a day in the daily measurement.")
@click.option("--threads", default=2, show_default=True, help="Cores used.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the simulated logs (kept and reused). Default: a temporary one.")
@data_option
@json_option
@handle_errors
def command(
    sizes: tuple[int, ...],
    repeats: int,
    results_per_search: int,
    daily: bool,
    day_rows: int,
    threads: int,
    work: Path | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure the log pipeline on SIMULATED logs: wall and CPU seconds, peak memory, growth; and the cost of a daily update.

    Target: 10 million log rows in under 25 s and 4 GiB on 2 cores.

    Example: omni bench pipeline --rows 1000000 --rows 10000000 --repeats 3
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        runs = []
        for rows in sizes:
            source = _simulated(folder / f"log-{rows}-{results_per_search}", rows, results_per_search, data_dir)
            with stage(f"pipeline over {rows:,} rows, {repeats} runs"):
                runs.append(_measure(source, folder / "out", rows, repeats, threads))
        days = _daily_costs(folder, day_rows, data_dir) if daily else []
    metrics = {"pipeline": runs, "daily_update": days}
    if not as_json:
        columns = ["rows", "events", "seconds", "median_seconds", "cpu_seconds", "peak_gib", "seconds_per_million", "partitions", "pairs"]
        print_table(f"Pipeline, {threads} threads: {LABEL}", columns, ([run[c] for c in columns] for run in runs))
        columns = [
            "history_days",
            "history_events",
            "changed_events",
            "seconds",
            "cpu_seconds",
            "cpu_ms_per_changed_event",
            "entities_touched",
        ]
        print_table(f"Daily update (median of 5 days): {LABEL}", columns, ([day[c] for c in columns] for day in days))
    path = write_record(
        "pipeline",
        dataset={"name": "simulated log", "simulated": True, "note": LABEL, "rows": list(sizes)},
        config={"results_per_search": results_per_search, "threads": threads, "day_rows": day_rows},
        protocol={
            "repeats": repeats,
            "clock": "perf_counter; cpu_seconds: process_time over all threads, which other work on the machine does not stretch",
            "processes": "a fresh one per run",
            "memory": "ru_maxrss",
            "load_average": os.getloadavg(),
        },
        metrics=metrics,
        libraries=("polars", "pyarrow"),
    )
    if as_json:
        print_json(metrics | {"record": str(path)})
    else:
        click.echo(path)


def _simulated(folder: Path, rows: int, results_per_search: int, data_dir: Path | None) -> Path:
    """Simulate a log once; a folder that is complete is used again."""
    from encoders.log_simulator import SimulatorConfig, write_simulation
    from encoders.sample import load_dataset

    if not (folder / "simulation.json").is_file():
        with stage(f"simulate {rows:,} rows"):
            config = SimulatorConfig(rows=rows, users=max(1000, rows // 50), results_per_search=results_per_search)
            write_simulation(load_dataset(data_dir, engaged_queries=0).pairs, folder, config)
    return folder


def _measure(source: Path, out: Path, rows: int, repeats: int, threads: int) -> dict[str, Any]:
    results = []
    for _ in range(repeats):
        arguments = [sys.executable, "-c", MEASURED_RUN, str(source / "log"), str(source / "boards.parquet"), str(out)]
        environment = {"POLARS_MAX_THREADS": str(threads), "PATH": "", "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
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


def _daily_costs(folder: Path, day_rows: int, data_dir: Path | None, histories: tuple[int, ...] = (30, 180, 730)) -> list[dict[str, Any]]:
    """Seconds to merge one day into states with histories of different length; the window is two years, so the longest also drops days."""
    from encoders.engaged_queries import EngagedQueriesConfig
    from encoders.engaged_state import EngagedQueriesState
    from encoders.events import EngagementRules, engaged_events
    from encoders.log_simulator import SimulatorConfig, simulate_log
    from encoders.sample import load_dataset

    longest = max(histories) + 5
    start = datetime(2023, 1, 1, tzinfo=UTC)
    config = SimulatorConfig(
        rows=day_rows * longest, days=longest, start=start, rows_per_file=day_rows * 30, users=day_rows * 5, late=0.0, duplicates=0.0
    )
    with stage(f"simulate {longest} days of {day_rows:,} rows"):
        pairs = load_dataset(data_dir, engaged_queries=0).pairs
        events = pl.concat([engaged_events(part, EngagementRules()).frame for part in simulate_log(pairs, config)])
    results = []
    for history in histories:
        # The measured days are the same for every history: the last five. Shorter histories start later.
        begin, first = start + timedelta(days=longest - 5 - history), start + timedelta(days=longest - 5)
        with (
            tempfile.TemporaryDirectory(dir=folder) as state,
            EngagedQueriesState.create(Path(state) / "state", EngagedQueriesConfig(window_days=730)) as current,
        ):
            past = events.filter(pl.col("timestamp").is_between(begin, first, closed="left"))
            with stage(f"load {history} days of history ({past.height:,} events)"):
                current.merge(past)
            seconds, cpu, touched = [], [], []
            for day in range(5):
                today = first + timedelta(days=day)
                rows = events.filter(pl.col("timestamp").is_between(today, today + timedelta(days=1), closed="left"))
                clock, used = time.perf_counter(), time.process_time()
                merge = current.merge(rows)
                seconds.append(time.perf_counter() - clock)
                cpu.append(time.process_time() - used)
                touched.append(merge.touched.height)
            results.append(
                {
                    "history_days": history,
                    "history_events": past.height,
                    "day_events": rows.height,
                    "changed_events": merge.counts["added"] + merge.counts["expired"],
                    "seconds": sorted(seconds)[2],
                    "cpu_seconds": sorted(cpu)[2],
                    "cpu_ms_per_changed_event": 1000 * sorted(cpu)[2] / max(1, merge.counts["added"] + merge.counts["expired"]),
                    "entities_touched": sorted(touched)[2],
                    "expired_events": merge.counts.get("expired", 0),
                }
            )
    return results
