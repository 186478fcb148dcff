"""``omni bench downstream``: query vectors and a linear head against fastText on Iconclass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
import polars as pl

from benchmarks.quality.recall import describe_dataset
from benchmarks.record import Measurement, out_option, write_record
from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
    stage,
)
from encoders.datasets.dataset import load_large
from encoders.datasets.halves import DEV
from encoders.errors import ConfigError
from encoders.evaluation.baselines import cached, default_cache, sentence_transformer, use_encoder
from encoders.evaluation.downstream import (
    LEVELS,
    FastTextConfig,
    HeadSettings,
    HierarchicalScores,
    fit_linear_head,
    hierarchical_scores,
    labelled_queries,
    predict_fasttext,
    predict_leaves,
    train_fasttext,
)

Encode = Callable[[Sequence[str]], np.ndarray]


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    help="Also: tiny (the shipped query tower), use, or st:NAME; may be repeated.",
)
@click.option(
    "--train-per-kind",
    default=20_000,
    show_default=True,
    type=click.IntRange(100),
    help="Train queries per kind (keyword, title).",
)
@click.option(
    "--test-per-kind",
    default=2_800,
    show_default=True,
    type=click.IntRange(10),
    help="Held-out queries per kind.",
)
@click.option("--seed", default=0, show_default=True, help="Chooses queries and initial weights.")
@out_option
@data_option
@json_option
@handle_errors
def command(
    bundle: Path | None,
    encoders: tuple[str, ...],
    train_per_kind: int,
    test_per_kind: int,
    seed: int,
    out: Path,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Classify held-out queries into Iconclass with BUNDLE's query vectors (paper section 5.4).

    The vectors are frozen; a linear head is trained on them.

    fastText with words and with subwords, trained on the same queries and labels, is the yardstick.
    Needs the larger data set (--data).

    Example: omni bench downstream runs/model --encoder use --data data
    """
    if data_dir is None:
        raise ConfigError(
            "the Iconclass taxonomy is in the larger data set: give its folder with --data (or"
            " OMNI_DATA)."
        )
    dataset = load_large(data_dir, engaged_queries=0, sources=["iconclass"])
    train = labelled_queries(dataset, "train", per_kind=train_per_kind, seed=seed)
    test = labelled_queries(dataset, DEV, per_kind=test_per_kind, seed=seed)
    train_leaves, test_leaves = train["leaves"].to_list(), test["leaves"].to_list()
    texts, questions = train["query"].to_list(), test["query"].to_list()
    timings: dict[str, float] = {}
    predictions: dict[str, list[str]] = {}
    for name, subwords in (("fastText words", 0), ("fastText subwords", 5)):
        with stage(f"train {name}", timings):
            model = train_fasttext(texts, train_leaves, FastTextConfig(longest_subword=subwords))
        predictions[name] = predict_fasttext(model, questions)
    for name, encode in _encoders(bundle, encoders).items():
        with stage(f"embed {len(texts) + len(questions):,} queries with {name}", timings):
            vectors, asked = encode(texts), encode(questions)
        with stage(f"fit the head on {name}", timings):
            head, classes = fit_linear_head(vectors, train_leaves, HeadSettings(seed=seed))
        predictions[name] = predict_leaves(head, classes, asked)
    figures = {name: _by_slice(found, test, test_leaves) for name, found in predictions.items()}
    path = write_record(
        "downstream-iconclass",
        Measurement(
            dataset=describe_dataset(dataset)
            | {
                "train queries": train.height,
                "test queries": test.height,
            },
            config={
                "bundle": bundle.name if bundle else None,
                "encoders": list(encoders),
                "train_per_kind": train_per_kind,
                "seed": seed,
            },
            protocol={
                "prediction": "most probable leaf",
                "interval": "95% Poisson bootstrap over queries",
                "seconds": timings,
            },
            metrics={
                name: {label: scores.as_dict() for label, scores in slices.items()}
                for name, slices in figures.items()
            },
            libraries=("torch", "numpy", "fasttext-wheel"),
        ),
        folder=out,
    )
    say(f"wrote {path.name}")
    if as_json:
        print_json(
            {
                name: {label: scores.as_dict() for label, scores in slices.items()}
                for name, slices in figures.items()
            }
        )
        return
    for label in next(iter(figures.values())):
        rows = [[name, *_row(slices[label])] for name, slices in figures.items()]
        columns = [
            "system",
            "queries",
            "hierarchical precision",
            "hierarchical recall",
            *(f"level {k + 1}" for k in range(LEVELS)),
        ]
        print_table(f"Iconclass, {label}: held-out query strings, real annotations", columns, rows)


def _encoders(bundle: Path | None, names: Sequence[str]) -> dict[str, Encode]:
    found: dict[str, Encode] = {}
    if bundle:
        from encoders.towers.bundle import load_bundle

        found[bundle.name] = load_bundle(bundle).embed_queries
    for name in names or (() if bundle else ("tiny",)):
        if name == "tiny":
            from encoders.towers.pretrained_models import create_query_encoder

            found["shipped query tower"] = create_query_encoder().encode
        elif name == "use":
            found["multilingual USE"] = cached(use_encoder(), "use", default_cache())
        elif name.startswith("st:"):
            found[name[3:]] = cached(sentence_transformer(name[3:]), name, default_cache())
        else:
            raise ConfigError(f"unknown encoder {name!r}. Choose tiny, use, or st:NAME_OR_PATH.")
    return found


def _by_slice(
    predicted: Sequence[str], test: pl.DataFrame, leaves: Sequence[Sequence[str]]
) -> dict[str, HierarchicalScores]:
    """Scores of all queries, of each kind, and of each language's keywords and titles."""
    labels = {"all": pl.lit(True)}
    for kind in sorted(test["kind"].unique().to_list()):
        labels[f"{kind}s"] = pl.col("kind") == kind
    for kind in sorted(test["kind"].unique().to_list()):
        for language in (
            test["language"].value_counts().sort("count", descending=True)["language"].to_list()
        ):
            labels[f"{kind}s in {language}"] = (pl.col("kind") == kind) & (
                pl.col("language") == language
            )
    result = {}
    for label, condition in labels.items():
        rows = np.flatnonzero(test.with_columns(keep=condition)["keep"].to_numpy()).tolist()
        if len(rows) > 1:
            result[label] = hierarchical_scores(
                [predicted[i] for i in rows], [leaves[i] for i in rows]
            )
    return result


def _row(scores: HierarchicalScores) -> list[object]:
    value, low, high = scores.precision
    return [
        scores.queries,
        f"{value:.3f} [{low:.3f}, {high:.3f}]",
        scores.recall,
        *(scores.level[k + 1].value for k in range(LEVELS)),
    ]
