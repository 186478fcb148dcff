"""``omni evaluate``: labelled metrics of bundles and baselines on held-out pairs, as tables, JSON, a plot or TREC files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoders.commands.console import data_option, handle_errors, json_option, print_json, say
from encoders.commands.report_output import plot_report, print_report
from encoders.datasets.dataset import Dataset, load_dataset
from encoders.errors import BundleError, ConfigError
from encoders.evaluation.baselines import BASELINES, Baseline, default_cache, make_baseline
from encoders.evaluation.report import (
    bundle_system,
    evaluate_systems,
    save_runs,
    types_without_tower,
)
from encoders.tables.files import read_table
from encoders.tables.schemas import ENTITY_TYPES
from encoders.towers.bundle import load_bundle, read_space

if TYPE_CHECKING:
    from encoders.compatibility.report import SpacesReport


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--against",
    type=click.Path(path_type=Path, file_okay=False),
    help="Second bundle, compared pair by pair with the first.",
)
@click.option(
    "--against-index",
    type=click.Path(path_type=Path, file_okay=False),
    help=(
        "Older bundle: how well BUNDLE's query tower searches vectors that this one made, as it is"
        " and through a learned adapter."
    ),
)
@click.option(
    "--adapter",
    default="auto",
    show_default=True,
    help=(
        "With --against-index: auto (full, if train queries held back find more with it), full,"
        " none, or the rank of a low-rank one."
    ),
)
@click.option(
    "--declare",
    "declares",
    is_flag=True,
    help="With --against-index: write the measured compatibility into BUNDLE.",
)
@click.option(
    "--max-loss",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help=(
        "With --declare: largest part of the old tower's labelled Recall@10 that may be lost on any"
        " type."
    ),
)
@click.option(
    "--baselines",
    default="",
    help=(
        f"Comma-separated: {', '.join(BASELINES)}, or st:NAME_OR_PATH (a Sentence-Transformers"
        " model)."
    ),
)
@click.option(
    "--entity-type",
    "entity_types",
    multiple=True,
    type=click.Choice(ENTITY_TYPES),
    help="Only these types; may be repeated.",
)
@click.option("--split", default="heldout", show_default=True, help="Which pairs to evaluate.")
@click.option(
    "--corpus-size",
    type=click.IntRange(1),
    help="Rank against this many random entities per type instead of all (paper: 1M).",
)
@click.option(
    "--max-queries",
    type=click.IntRange(1),
    help="Evaluate this many random queries per type instead of all.",
)
@click.option(
    "--engaged-queries",
    default=20,
    show_default=True,
    type=click.IntRange(0),
    help="Train queries per entity given to the model.",
)
@click.option(
    "--judgements",
    type=click.Path(path_type=Path, exists=True),
    help="Graded judgements (query, entity_id, grade) instead of pairs.",
)
@click.option(
    "--slice",
    "slices",
    multiple=True,
    help=(
        "Print a table by language, english, action, popularity, positives, source, text, country."
    ),
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where exact search multiplies, e.g. cuda."
)
@click.option(
    "--resamples",
    default=1000,
    show_default=True,
    type=click.IntRange(100),
    help="Bootstrap resamples behind the intervals.",
)
@click.option("--seed", default=0, show_default=True, help="Chooses corpus, queries and resamples.")
@click.option(
    "--save-run",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write qrels and runs for ir_measures to this folder.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw Recall@10 by type and language to this image file.",
)
@data_option
@json_option
@handle_errors
def command(
    bundle: Path | None,
    against: Path | None,
    against_index: Path | None,
    adapter: str,
    declares: bool,
    max_loss: float,
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

    Labelled Recall@10 asks whether the annotated entity ranks in the top 10; a query with 40
    correct entities cannot have more than a quarter of them there, so the ceiling stands beside it.
    Without BUNDLE only the baselines are measured. With --against, both bundles are compared on the
    same pairs. With --against-index, BUNDLE's query tower searches the older bundle's entity
    vectors (an upgrade without embedding again); --declare writes the result into BUNDLE, and `omni
    rebuild --query-tower BUNDLE` then serves it. `--entity-type query` measures related queries.

    Example: omni evaluate runs/model --baselines bm25,bm25-trigrams --slice language
    """
    if against and not bundle:
        raise ConfigError(
            "--against compares two bundles, but only one was given. Usage: omni evaluate BUNDLE"
            " --against BUNDLE2"
        )
    if save_run and corpus_size:
        raise ConfigError(
            "--save-run writes ranked lists over the whole catalogue: leave --corpus-size out."
        )
    if declares and not against_index:
        raise ConfigError(
            "--declare writes down what --against-index measured. Usage: omni evaluate NEW"
            " --against-index OLD --declare"
        )
    if against_index:
        if bundle is None or against or baselines or judgements or save_run or plot:
            raise ConfigError(
                "--against-index takes one BUNDLE, and none of --against, --baselines,"
                " --judgements, --save-run and --plot. Usage: omni evaluate NEW --against-index OLD"
            )
        sizes = {
            "corpus_size": corpus_size,
            "max_queries": max_queries,
            "resamples": resamples,
            "split": split,
        }
        dataset = load_dataset(data_dir, engaged_queries=engaged_queries)
        spaces = _compare_spaces(
            bundle, against_index, dataset, adapter, entity_types, declares, seed, sizes
        )
        _note_other_data([bundle], data_dir)
        _show_spaces(
            spaces,
            bundle,
            against_index,
            max_loss if declares else None,
            slices,
            as_json,
            _source(split, data_dir),
        )
        return
    systems: dict[str, Baseline] = {}
    bundles = {}
    for path in [path for path in (bundle, against) if path]:
        name = path.name if path.name not in systems else str(path)
        bundles[name] = load_bundle(path)
        systems[name] = bundle_system(bundles[name], device)
    for baseline in [part.strip() for part in baselines.split(",") if part.strip()]:
        systems[baseline] = make_baseline(baseline, cache=default_cache())
    dataset = load_dataset(data_dir, engaged_queries=engaged_queries)
    _note_other_data([path for path in (bundle, against) if path], data_dir)
    report = evaluate_systems(
        dataset,
        systems,
        entity_types=entity_types or None,
        without_tower=types_without_tower(bundles.values(), dataset.entity_types),
        split=split,
        corpus_size=corpus_size,
        max_queries=max_queries,
        judgements=read_table(judgements, "judgements") if judgements else None,
        runs=save_run is not None,
        resamples=resamples,
        seed=seed,
    )
    first = next(iter(bundles), None)
    comparisons = [(first, other) for other in systems if other != first] if first else []
    if save_run:
        say(f"wrote {len(save_runs(report, save_run))} files to {save_run}")
    if plot:
        plot_report(report, plot)
        say(f"wrote {plot}")
    if as_json:
        print_json(report.as_dict(comparisons))
    else:
        print_report(report, comparisons, slices, _source(split, data_dir, judgements))


def _source(split: str, data_dir: Path | None, judgements: Path | None = None) -> str:
    """What is evaluated, for the titles of tables."""
    data = "the sample data in the package" if data_dir is None else str(data_dir)
    return (
        f"{split} pairs of {data}"
        if judgements is None
        else f"judgements of {judgements}, entities of {data}"
    )


def _note_other_data(bundles: Sequence[Path], data_dir: Path | None) -> None:
    """Say when the sample is evaluated for want of --data, and a bundle was trained on tables of its own."""
    for path in bundles if data_dir is None else ():
        tables = trained_tables(path)
        if tables:
            say(
                f"note: {path} was trained on {', '.join(tables)}, but the sample data in the"
                " package is evaluated. Give --data FOLDER, a folder with your tables catalogue.*"
                " and pairs.*"
            )


def _compare_spaces(
    bundle: Path,
    old: Path,
    dataset: Dataset,
    adapter: str,
    entity_types: tuple[str, ...],
    declares: bool,
    seed: int,
    options: dict[str, Any],
) -> SpacesReport:
    from encoders.compatibility.report import compare_spaces

    if adapter not in ("auto", "full", "none") and not adapter.isdecimal():
        raise ConfigError(
            f"--adapter must be 'auto', 'full', 'none' or a rank such as 32, but got {adapter!r}."
        )
    rank = int(adapter) if adapter.isdecimal() else 0
    if adapter.isdecimal() and rank == 0:
        raise ConfigError(
            "--adapter 0: an adapter of rank 0 maps everything to nothing. Use full, none or a rank"
            " of at least 1."
        )
    new_bundle, old_bundle = load_bundle(bundle), load_bundle(old)
    if (
        declares and not entity_types
    ):  # what is declared was measured on every type that an index can hold
        for name, why in types_without_tower([old_bundle], dataset.entity_types).items():
            say(f"{name}: {why}; not evaluated")
        entity_types = tuple(name for name in dataset.entity_types if old_bundle.embeds(name))
    wanted = entity_types or None
    use = {"auto": "auto", "none": "never"}.get(adapter, "always")
    return compare_spaces(
        new_bundle,
        old_bundle,
        dataset,
        adapter=use,
        rank=rank,
        entity_types=wanted,
        seed=seed,
        **options,
    )


def _show_spaces(
    spaces: SpacesReport,
    bundle: Path,
    old: Path,
    max_loss: float | None,
    slices: tuple[str, ...],
    as_json: bool,
    source: str,
) -> None:
    """Declare if asked and allowed (``max_loss`` is then a number), and print."""
    from encoders.compatibility.declaration import declare

    worst, loss = spaces.worst_loss()
    learned = spaces.learned if spaces.adapter is not None else {}
    if not as_json:
        print_report(spaces.evaluation, spaces.comparisons, slices, source)
    if max_loss is not None:
        if not loss <= max_loss:
            raise BundleError(
                f"not declared: {spaces.way!r} loses {loss:.1%} of the old tower's labelled"
                f" Recall@10 on {worst}, more than --max-loss {max_loss:g}. Train with the old"
                " vectors as a compatibility task (docs/reference/training.md), or embed the index"
                " again."
            )
        space = read_space(old)
        declare(
            bundle,
            str(space["space_id"]),
            int(space["dimension"]),
            spaces.adapter,
            spaces.measured,
            learned,
        )
    if as_json:
        about = {
            "way": spaces.way,
            "worst_type": worst,
            "worst_loss": loss,
            "declared": max_loss is not None,
            "adapter": spaces.learned,
        }
        print_json(
            {**about, "measured": spaces.measured, **spaces.evaluation.as_dict(spaces.comparisons)}
        )
        return
    say(f"{spaces.way}: largest loss of labelled Recall@10 {loss:.1%}, on {worst}")
    if max_loss is not None:
        say(
            f"declared in {bundle / 'space.json'}. Next: omni rebuild --store STORE --query-tower"
            f" {bundle}"
        )


def trained_tables(bundle: Path) -> list[str]:
    """The tables that a bundle's training config names; empty: the sample or the larger data, or nothing is recorded."""
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    data = config.get("training", {}).get("data", {})
    return [*data.get("catalogue", []), *data.get("pairs", [])]
