"""``omni evaluate``: labelled metrics of bundles and baselines on held-out pairs, as tables, JSON, a plot or TREC files."""

from __future__ import annotations

from pathlib import Path

import click

from encoders.baselines import BASELINES, Baseline, default_cache, make_baseline
from encoders.bundle import load_bundle
from encoders.console import data_option, handle_errors, json_option, print_json, say
from encoders.errors import ConfigError
from encoders.evaluation_report import bundle_system, evaluate_systems, plot_report, print_report, save_runs
from encoders.sample import load_dataset
from encoders.schemas import ENTITY_TYPES
from encoders.tables import read_table


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--against", type=click.Path(path_type=Path, file_okay=False), help="Second bundle, compared pair by pair with the first.")
@click.option(
    "--baselines", default="", help=f"Comma-separated: {', '.join(BASELINES)}, or st:NAME_OR_PATH (a Sentence-Transformers model)."
)
@click.option("--entity-type", "entity_types", multiple=True, type=click.Choice(ENTITY_TYPES), help="Only these types; may be repeated.")
@click.option("--split", default="heldout", show_default=True, help="Which pairs to evaluate.")
@click.option("--corpus-size", type=click.IntRange(1), help="Rank against this many random entities per type instead of all (paper: 1M).")
@click.option("--max-queries", type=click.IntRange(1), help="Evaluate this many random queries per type instead of all.")
@click.option(
    "--engaged-queries", default=20, show_default=True, type=click.IntRange(0), help="Train queries per entity given to the model."
)
@click.option(
    "--judgements", type=click.Path(path_type=Path, exists=True), help="Graded judgements (query, entity_id, grade) instead of pairs."
)
@click.option(
    "--slice", "slices", multiple=True, help="Print a table by language, english, action, popularity, positives, source, text, country."
)
@click.option("--device", default="cpu", show_default=True, help="Where exact search multiplies, e.g. cuda.")
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(100), help="Bootstrap resamples behind the intervals.")
@click.option("--seed", default=0, show_default=True, help="Chooses corpus, queries and resamples.")
@click.option("--save-run", type=click.Path(path_type=Path, file_okay=False), help="Write qrels and runs for ir_measures to this folder.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw Recall@10 by type and language to this image file.")
@data_option
@json_option
@handle_errors
def command(
    bundle: Path | None,
    against: Path | None,
    baselines: str,
    entity_types: tuple[str, ...],
    split: str,
    corpus_size: int | None,
    max_queries: int | None,
    engaged_queries: int,
    judgements: Path | None,
    slices: tuple[str, ...],
    device: str,
    resamples: int,
    seed: int,
    save_run: Path | None,
    plot: Path | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Evaluate BUNDLE on held-out pairs: labelled Recall@1/10/100, MRR and nDCG@10, exact, with ceilings and 95% intervals.

    Labelled Recall@10 asks whether the annotated entity ranks in the top 10; a query with 40 correct entities cannot have more than a
    quarter of them there, so the ceiling stands beside it. Without BUNDLE only the baselines are measured. With --against, both bundles
    are compared on the same pairs. `--entity-type query` measures related queries.

    Example: omni evaluate runs/model --baselines bm25,bm25-trigrams --slice language
    """
    if against and not bundle:
        raise ConfigError("--against compares two bundles, but only one was given. Usage: omni evaluate BUNDLE --against BUNDLE2")
    if save_run and corpus_size:
        raise ConfigError("--save-run writes ranked lists over the whole catalogue: leave --corpus-size out.")
    systems: dict[str, Baseline] = {}
    names = []
    for path in [path for path in (bundle, against) if path]:
        name = path.name if path.name not in systems else str(path)
        systems[name] = bundle_system(load_bundle(path), device)
        names.append(name)
    for baseline in [part.strip() for part in baselines.split(",") if part.strip()]:
        systems[baseline] = make_baseline(baseline, cache=default_cache())
    dataset = load_dataset(data_dir, engaged_queries=engaged_queries)
    report = evaluate_systems(
        dataset,
        systems,
        entity_types=entity_types or None,
        split=split,
        corpus_size=corpus_size,
        max_queries=max_queries,
        judgements=read_table(judgements, "judgements") if judgements else None,
        runs=save_run is not None,
        resamples=resamples,
        seed=seed,
    )
    comparisons = [(names[0], other) for other in systems if other != names[0]] if names else []
    if save_run:
        say(f"wrote {len(save_runs(report, save_run))} files to {save_run}")
    if plot:
        plot_report(report, plot)
        say(f"wrote {plot}")
    if as_json:
        print_json(report.as_dict(comparisons))
    else:
        print_report(report, comparisons, slices)
