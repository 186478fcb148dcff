"""``omni bench recall``: labelled Recall@10 of a bundle beside its baselines, recorded.

Baselines: BM25, zero-shot encoders, neighbouring queries and chance; and each bundle with BM25.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import polars as pl

from benchmarks.record import RESULTS, Measurement, out_option, require_clean_tree, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.commands.entity_type import entity_types_option
from encoders.commands.report_output import plot_report, print_report
from encoders.datasets.dataset import Dataset, load_dataset
from encoders.datasets.halves import DEV, TEST
from encoders.evaluation.baselines import (
    BASELINES,
    Baseline,
    Fused,
    default_cache,
    make_baseline,
)
from encoders.evaluation.report import (
    EvaluationReport,
    EvaluationSettings,
    bundle_system,
    engaged_depth,
    evaluate_systems,
    types_without_tower,
)
from encoders.towers.bundle import load_bundle

DEFAULT_BASELINES = "random,bm25,bm25-trigrams,bm25-ngrams,use-title,use,use-neighbours"
FUSED_WITH = "bm25-ngrams"
"""What each bundle is also measured fused with."""
RECORDED_SLICES = ("english", "language", "action", "action, few positives", "popularity", "source")


@click.command()
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--baselines",
    default=DEFAULT_BASELINES,
    show_default=True,
    help=f"Comma-separated, of {', '.join(BASELINES)}, st:NAME_OR_PATH.",
)
@click.option(
    "--release",
    is_flag=True,
    help="Read the test half of the held-out queries, for the record of a release.",
)
@entity_types_option
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
    type=click.IntRange(0),
    help="Train queries per entity given to the model. [default: as it was trained]",
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
@out_option
@data_option
@json_option
@handle_errors
def command(
    bundles: tuple[Path, ...],
    baselines: str,
    release: bool,
    entity_types: tuple[str, ...],
    max_queries: int | None,
    corpus_size: int | None,
    engaged_queries: int | None,
    slices: tuple[str, ...],
    name: str,
    out: Path,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Measure BUNDLES and the baselines on held-out pairs exactly, and record the figures.

    The pairs are those of the sample, or of --data; human annotations standing in for engagement,
    not clicks. Choices are made on the dev half of the held-out queries; --release reads the other
    half, once, from a clean tree. Several bundles are seeds of one recipe: their mean and range are
    given too. Each bundle is also measured fused with BM25. Without a bundle only the baselines
    run.

    Example: omni bench recall runs/0/model runs/1/model runs/2/model --release
    """
    require_clean_tree(RESULTS if release else out)
    timings: dict[str, float] = {}
    loaded = dict(zip(_names(bundles), map(load_bundle, bundles), strict=True))
    systems: dict[str, Baseline] = {name: bundle_system(b) for name, b in loaded.items()}
    lexical = make_baseline(FUSED_WITH)
    systems |= {f"{name} + {FUSED_WITH}": Fused(systems[name], lexical) for name in loaded}
    for baseline in [part.strip() for part in baselines.split(",") if part.strip()]:
        systems[baseline] = (
            lexical if baseline == FUSED_WITH else make_baseline(baseline, cache=default_cache())
        )
    engaged_queries = engaged_depth(loaded.values(), engaged_queries)
    with stage("load data", timings):
        dataset = load_dataset(data_dir, engaged_queries=engaged_queries)
    with stage("evaluate", timings):
        report = evaluate_systems(
            dataset,
            systems,
            EvaluationSettings(
                entity_types=entity_types or None,
                split=TEST if release else DEV,
                max_queries=max_queries,
                corpus_size=corpus_size,
                slices=tuple(dict.fromkeys((*RECORDED_SLICES, *slices))),
            ),
            without_tower=types_without_tower(loaded.values(), dataset.entity_types),
        )
    first = next(iter(loaded), None)
    comparisons = [(first, other) for other in systems if other not in loaded] if first else []
    seeds = seed_figures(report, list(loaded))
    path = write_record(
        name,
        Measurement(
            dataset=describe_dataset(dataset),
            config={
                "bundles": {name: b.space_id for name, b in loaded.items()},
                "engaged_queries": engaged_queries,
                "max_queries": max_queries,
                "corpus_size": corpus_size,
                "systems": {
                    s: BASELINES.get(s, s if s not in loaded else "bundle") for s in systems
                },
                "bm25-ngrams": getattr(lexical, "chosen", {}),
            },
            protocol={
                "split": report.split,
                "search": "exact, float32",
                "interval": "95% Poisson bootstrap over queries",
                "resamples": 1000,
                "seconds": timings,
            },
            metrics=report.as_dict(comparisons) | {"seeds": seeds},
            libraries=("numpy", "torch", "polars", "bm25s"),
        ),
        folder=out,
    )
    plot_report(report, path.with_suffix(".png"))
    say(f"wrote {path.name} and {path.with_suffix('.png').name}")
    if as_json:
        print_json(report.as_dict(comparisons) | {"seeds": seeds})
        return
    print_report(report, comparisons, slices)
    if len(loaded) > 1:
        rows = [[name, f"{f['mean']:.3f}", f["values"]] for name, f in seeds.items()]
        print_table("labelled Recall@10 over seeds", ["type", "mean", "each"], rows)


def _names(bundles: Sequence[Path]) -> list[str]:
    """Name bundles by their folders, and by the folder above where those are alike."""
    short = [path.name for path in bundles]
    if len(set(short)) == len(short):
        return short
    return [f"{path.parent.name}/{path.name}" for path in bundles]


def seed_figures(report: EvaluationReport, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Sum labelled Recall@10 up over bundles that are seeds of one recipe, by entity type."""
    figures: dict[str, dict[str, Any]] = {}
    for entity_type, task in report.tasks.items() if names else ():
        values = [task.overall[name].recall[10].value for name in names]
        figures[entity_type] = {
            "mean": sum(values) / len(values),
            "values": [round(value, 4) for value in values],
        }
    return figures


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
