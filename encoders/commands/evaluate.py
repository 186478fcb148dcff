"""``omni evaluate``: labelled metrics of bundles and baselines on held-out pairs.

The result is tables, JSON, a plot or TREC files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encoders.commands.console import data_option, handle_errors, json_option, print_json, say
from encoders.commands.entity_type import entity_types_option
from encoders.commands.report_output import plot_report, print_report
from encoders.datasets.dataset import Dataset, load_dataset
from encoders.datasets.halves import DEV, HELDOUT, describe_split, split_for_choices
from encoders.errors import BundleError, ConfigError
from encoders.evaluation.baselines import BASELINES, Baseline, default_cache, make_baseline
from encoders.evaluation.report import (
    EvaluationSettings,
    bundle_system,
    engaged_depth,
    evaluate_systems,
    frozen_vectors_system,
    save_runs,
    types_without_tower,
)
from encoders.tables.files import read_table
from encoders.towers.bundle import ModelBundle, load_bundle, read_space

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
    "--vectors",
    "vector_columns",
    multiple=True,
    metavar="COLUMN",
    help=(
        "Also measure what BUNDLE's queries find among the catalogue's frozen vectors. Repeatable."
    ),
)
@entity_types_option
@click.option(
    "--split",
    default=DEV,
    show_default=True,
    help="Which pairs: dev is the half of the held-out queries that choices may look at.",
)
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
    type=click.IntRange(0),
    help="Train queries per entity given to the model. [default: as it was trained]",
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
    vector_columns: tuple[str, ...],
    entity_types: tuple[str, ...],
    split: str,
    corpus_size: int | None,
    max_queries: int | None,
    engaged_queries: int | None,
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
    """Evaluate BUNDLE on held-out pairs (their dev half) by exact search.

    Measures are labelled Recall@1/10/100, MRR and nDCG@10, with ceilings and 95% intervals.
    Labelled Recall@10 asks whether the annotated entity ranks in the top 10; a query with 40
    correct entities cannot have more than a quarter of them there, so the ceiling stands beside it.
    Without BUNDLE only the baselines are measured. With --against, both bundles are compared on the
    same pairs. With --against-index, BUNDLE's query tower searches the older bundle's entity
    vectors (an upgrade without embedding again); --declare writes the result into BUNDLE, and `omni
    rebuild --query-tower BUNDLE` then serves it. `--entity-type query` measures related queries.

    Example: omni evaluate runs/model --baselines bm25,bm25-ngrams --slice language
    """
    if split == HELDOUT:
        say("note: --split heldout is dev now; the other half is for the record of a release")
    split = split_for_choices(split)
    settings = EvaluationSettings(
        entity_types=entity_types or None,
        split=split,
        corpus_size=corpus_size,
        max_queries=max_queries,
        runs=save_run is not None,
        resamples=resamples,
        seed=seed,
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
        if (
            bundle is None
            or against
            or baselines
            or judgements
            or save_run
            or plot
            or vector_columns
        ):
            raise ConfigError(
                "--against-index takes one BUNDLE, and none of --against, --baselines,"
                " --judgements, --save-run, --plot and --vectors. Usage: omni evaluate NEW"
                " --against-index OLD"
            )
        upgrade = _Upgrade(bundle, against_index, adapter, max_loss if declares else None)
        new_and_old = load_bundle(bundle), load_bundle(against_index)
        depth = engaged_depth(new_and_old, engaged_queries)
        dataset = load_dataset(data_dir, engaged_queries=depth)
        spaces = _compare_spaces(upgrade, new_and_old, dataset, settings)
        _note_other_data([bundle], data_dir)
        _show_spaces(spaces, upgrade, slices, as_json, _source(split, data_dir))
        return
    if vector_columns and not bundle:
        raise ConfigError(
            "--vectors measures the queries of a bundle. Usage: omni evaluate BUNDLE --vectors"
            f" {vector_columns[0]}"
        )
    if against and not bundle:
        raise ConfigError(
            "--against compares two bundles, but only one was given. Usage: omni evaluate BUNDLE"
            " --against BUNDLE2"
        )
    paths = [path for path in (bundle, against) if path]
    bundles = _load_bundles(paths)
    systems: dict[str, Baseline] = {
        name: bundle_system(loaded, device) for name, loaded in bundles.items()
    }
    systems |= {
        f"{name} on {column}": frozen_vectors_system(loaded, column, device)
        for column in vector_columns
        for name, loaded in bundles.items()
    }
    for baseline in [part.strip() for part in baselines.split(",") if part.strip()]:
        systems[baseline] = make_baseline(baseline, cache=default_cache())
    depth = engaged_depth(bundles.values(), engaged_queries)
    dataset = load_dataset(data_dir, engaged_queries=depth)
    _note_other_data(paths, data_dir)
    report = evaluate_systems(
        dataset,
        systems,
        settings,
        without_tower=types_without_tower(bundles.values(), dataset.entity_types),
        judgements=read_table(judgements, "judgements") if judgements else None,
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


def _load_bundles(paths: Sequence[Path]) -> dict[str, ModelBundle]:
    """Load bundles by their folder's name, or by the path where two folders are called alike."""
    bundles: dict[str, ModelBundle] = {}
    for path in paths:
        name = path.name if path.name not in bundles else str(path)
        bundles[name] = load_bundle(path)
    return bundles


def _source(split: str, data_dir: Path | None, judgements: Path | None = None) -> str:
    """Describe what is evaluated, for the titles of tables."""
    data = "the sample data in the package" if data_dir is None else str(data_dir)
    if judgements is None:
        return f"{describe_split(split)} pairs of {data}"
    return f"judgements of {judgements}, entities of {data}"


def _note_other_data(bundles: Sequence[Path], data_dir: Path | None) -> None:
    """Note that the sample is evaluated where a bundle was trained on other tables."""
    for path in bundles if data_dir is None else ():
        tables = trained_tables(path)
        if tables:
            say(
                f"note: {path} was trained on {', '.join(tables)}, but the sample data in the"
                " package is evaluated. Give --data FOLDER, a folder with your tables catalogue.*"
                " and pairs.*"
            )


@dataclass(frozen=True)
class _Upgrade:
    """The options around ``--against-index``."""

    new: Path
    old: Path
    adapter: str
    max_loss: float | None
    """Largest loss that may be declared; None: declare nothing."""

    def adapter_use(self) -> tuple[str, int]:
        """Read ``--adapter`` as the use (``auto``, ``never``, ``always``) and the rank (0: full).

        Raises:
            ConfigError: It is neither a known word nor a rank above 0.
        """
        if self.adapter.isdecimal():
            if int(self.adapter) == 0:
                raise ConfigError(
                    "--adapter 0: an adapter of rank 0 maps everything to nothing. Use full, none"
                    " or a rank of at least 1."
                )
            return "always", int(self.adapter)
        uses = {"auto": "auto", "none": "never", "full": "always"}
        if self.adapter not in uses:
            raise ConfigError(
                "--adapter must be 'auto', 'full', 'none' or a rank such as 32, but got"
                f" {self.adapter!r}."
            )
        return uses[self.adapter], 0


def _compare_spaces(
    upgrade: _Upgrade,
    new_and_old: tuple[ModelBundle, ModelBundle],
    dataset: Dataset,
    settings: EvaluationSettings,
) -> SpacesReport:
    from encoders.compatibility.report import compare_spaces

    use, rank = upgrade.adapter_use()
    new, old = new_and_old
    if upgrade.max_loss is not None and settings.entity_types is None:
        # A declaration holds for every type that an index can hold: all of them are measured.
        for name, why in types_without_tower([old], dataset.entity_types).items():
            say(f"{name}: {why}; not evaluated")
        embedded = [name for name in dataset.entity_types if old.embeds(name)]
        settings = replace(settings, entity_types=embedded or None)
    return compare_spaces(new, old, dataset, settings, adapter=use, rank=rank)


def _show_spaces(
    spaces: SpacesReport, upgrade: _Upgrade, slices: Sequence[str], as_json: bool, source: str
) -> None:
    """Print the measured compatibility; declare it if requested and the loss is small enough."""
    if not as_json:
        print_report(spaces.evaluation, spaces.comparisons, slices, source)
    worst, loss = spaces.worst_loss()
    declared = upgrade.max_loss is not None
    if upgrade.max_loss is not None:
        _declare(spaces, upgrade, upgrade.max_loss)
    if as_json:
        about = {
            "way": spaces.way,
            "worst_type": worst,
            "worst_loss": loss,
            "declared": declared,
            "adapter": spaces.learned,
            "measured": spaces.measured,
        }
        print_json(about | spaces.evaluation.as_dict(spaces.comparisons))
        return
    say(f"{spaces.way}: largest loss of labelled Recall@10 {loss:.1%}, on {worst}")
    if declared:
        say(
            f"declared in {upgrade.new / 'space.json'}. Next: omni rebuild --store STORE"
            f" --query-tower {upgrade.new}"
        )


def _declare(spaces: SpacesReport, upgrade: _Upgrade, max_loss: float) -> None:
    """Write the measured compatibility into the newer bundle.

    Raises:
        BundleError: A type loses more than ``max_loss``.
    """
    from encoders.compatibility.declaration import declare

    worst, loss = spaces.worst_loss()
    if not loss <= max_loss:
        raise BundleError(
            f"not declared: {spaces.way!r} loses {loss:.1%} of the old tower's labelled"
            f" Recall@10 on {worst}, more than --max-loss {max_loss:g}. Train with the old"
            " vectors as a compatibility task (docs/reference/training.md), or embed the index"
            " again."
        )
    space = read_space(upgrade.old)
    declare(
        upgrade.new,
        str(space["space_id"]),
        int(space["dimension"]),
        spaces.adapter,
        spaces.measured,
        spaces.learned if spaces.adapter is not None else {},
    )


def trained_tables(bundle: Path) -> list[str]:
    """List the tables that a bundle's training config names.

    Empty: the sample or the larger data, or nothing is recorded.
    """
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    data = config.get("training", {}).get("data", {})
    return [*data.get("catalogue", []), *data.get("pairs", [])]
