"""``omni bench recall``: labelled Recall@10 of a bundle beside its baselines, recorded.

Baselines: BM25, zero-shot encoders, neighbouring queries and chance.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import click
import polars as pl

from benchmarks.record import RESULTS, Measurement, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    say,
    stage,
)
from encoders.commands.report_output import plot_report, print_report
from encoders.datasets.dataset import Dataset, load_dataset
from encoders.evaluation.baselines import BASELINES, Baseline, default_cache, make_baseline
from encoders.evaluation.report import (
    EvaluationSettings,
    bundle_system,
    evaluate_systems,
    types_without_tower,
)
from encoders.tables.schemas import ENTITY_TYPES

DEFAULT_BASELINES = "random,bm25,bm25-trigrams,use-title,use"
RECORDED_SLICES = ("english", "language", "action", "action, few positives", "popularity", "source")


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--baselines",
    default=DEFAULT_BASELINES,
    show_default=True,
    help=f"Comma-separated, of {', '.join(BASELINES)}, st:NAME_OR_PATH.",
)
@click.option(
    "--entity-type",
    "entity_types",
    multiple=True,
    type=click.Choice(ENTITY_TYPES),
    help="Only these types; may be repeated.",
)
@click.option(
    "--max-queries",
    type=click.IntRange(1),
    help="This many random queries per type instead of all.",
)
@click.option(
    "--corpus-size",
    type=click.IntRange(1),
    help="Rank against this many random entities per type instead of all.",
)
@click.option(
    "--engaged-queries",
    default=20,
    show_default=True,
    type=click.IntRange(0),
    help="Train queries per entity given to the model.",
)
@click.option(
    "--slice",
    "slices",
    multiple=True,
    default=("english",),
    show_default=True,
    help="Also print a table by this slice.",
)
@click.option("--name", default="recall", show_default=True, help="Slug of the record.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS,
    help="Folder of the record. [default: benchmarks/results]",
)
@data_option
@json_option
@handle_errors
def command(
    bundle: Path | None,
    baselines: str,
    entity_types: tuple[str, ...],
    max_queries: int | None,
    corpus_size: int | None,
    engaged_queries: int,
    slices: tuple[str, ...],
    name: str,
    out: Path,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure BUNDLE and the baselines on the held-out pairs exactly, and record the figures.

    The pairs are those of the sample, or of --data.

    The pairs are human annotations standing in for engagement, not clicks. Without BUNDLE only the
    baselines run.

    Example: omni bench recall runs/model --baselines random,bm25,bm25-trigrams
    """
    timings: dict[str, float] = {}
    systems: dict[str, Baseline] = {}
    space_id = loaded = None
    if bundle:
        from encoders.towers.bundle import load_bundle

        loaded = load_bundle(bundle)
        systems[bundle.name], space_id = bundle_system(loaded), loaded.space_id
    for baseline in [part.strip() for part in baselines.split(",") if part.strip()]:
        systems[baseline] = make_baseline(baseline, cache=default_cache())
    with stage("load data", timings):
        dataset = load_dataset(data_dir, engaged_queries=engaged_queries)
    with stage("evaluate", timings):
        report = evaluate_systems(
            dataset,
            systems,
            EvaluationSettings(
                entity_types=entity_types or None,
                max_queries=max_queries,
                corpus_size=corpus_size,
                slices=tuple(dict.fromkeys((*RECORDED_SLICES, *slices))),
            ),
            without_tower=types_without_tower([loaded] if loaded else [], dataset.entity_types),
        )
    comparisons = (
        [(bundle.name, other) for other in systems if other != bundle.name] if bundle else []
    )
    path = write_record(
        name,
        Measurement(
            dataset=describe_dataset(dataset),
            config={
                "bundle": bundle.name if bundle else None,
                "space_id": space_id,
                "engaged_queries": engaged_queries,
                "max_queries": max_queries,
            }
            | {
                "corpus_size": corpus_size,
                "systems": {
                    s: BASELINES.get(s, "model bundle" if bundle and s == bundle.name else s)
                    for s in systems
                },
            },
            protocol={
                "search": "exact, float32",
                "interval": "95% Poisson bootstrap over queries",
                "resamples": 1000,
                "seconds": timings,
            },
            metrics=report.as_dict(comparisons),
            libraries=("numpy", "torch", "polars", "bm25s"),
        ),
        folder=out,
    )
    plot_report(report, path.with_suffix(".png"))
    say(f"wrote {path.name} and {path.with_suffix('.png').name}")
    if as_json:
        print_json(report.as_dict(comparisons))
    else:
        print_report(report, comparisons, slices)


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Describe the data for a record: name, sizes, kind of pairs, a fingerprint of every pair."""
    digest = hashlib.sha256()
    for column in ("query", "entity_id", "split"):
        digest.update("\0".join(dataset.pairs[column].to_list()).encode("utf-8", "surrogatepass"))
    counts = dataset.catalogue.group_by("entity_type").len().sort("entity_type")
    return {
        "name": dataset.name,
        "label": dataset.label,
        "simulated": False if dataset.name in ("sample", "large") else None,
        "entities": dict(counts.iter_rows()),
        "pairs": dict(dataset.pairs.group_by("split").len().sort("split").iter_rows()),
        "languages": dataset.pairs.select(pl.col("language").n_unique()).item(),
        "sha256": digest.hexdigest(),
    }
