"""``omni export``: write the ONNX forms of a bundle's query tower, with parity and speed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import polars as pl

from encoders.commands.console import (
    data_option,
    handle_errors,
    json_option,
    print_json,
    print_table,
    say,
)
from encoders.datasets.dataset import load_dataset, load_sample
from encoders.inference.onnx_forms import FEWEST_TEXTS, export_forms
from encoders.tables.files import read_table
from encoders.towers.bundle import ModelBundle, load_bundle
from encoders.towers.forms import FORM_FILES


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--form",
    "forms",
    multiple=True,
    type=click.Choice(list(FORM_FILES)),
    help="Form to write; may be repeated. Default: all.",
)
@click.option(
    "--texts",
    type=click.IntRange(FEWEST_TEXTS),
    default=2000,
    show_default=True,
    help=(
        "Train queries used for calibration and parity: those of --data, or else those that BUNDLE"
        " was trained on."
    ),
)
@data_option
@json_option
@handle_errors
def command(
    bundle: Path, forms: tuple[str, ...], texts: int, data_dir: Path | None, as_json: bool
) -> None:
    """Export BUNDLE's query tower to ONNX (fp32, int8) into BUNDLE/forms/.

    Each form is measured against the trained tower at several batch sizes and lengths; one that
    misses its tolerance is not written.

    Example: omni export runs/model
    """
    loaded = load_bundle(bundle)
    queries = (
        _train_queries(load_dataset(data_dir).pairs)
        if data_dir is not None
        else _trained_on(loaded)
    )
    reports = export_forms(
        loaded.query_encoder, bundle / "forms", _chosen(queries, texts), forms or tuple(FORM_FILES)
    )
    if as_json:
        print_json([asdict(report) for report in reports])
        return
    columns = ["form", "MB", "cosine min", "overlap@10", "p50 ms", "torch fp32 p50 ms"]
    rows = [
        [r.form_id, r.bytes / 1e6, r.cosine_min, r.overlap_at_10, r.p50_ms, r.torch_p50_ms]
        for r in reports
    ]
    print_table(
        f"Query tower forms ({reports[0].texts} real queries, one thread, batch 1)", columns, rows
    )


def _trained_on(bundle: ModelBundle) -> pl.Series:
    """Read the train queries of the tables that the bundle's config names, and say which.

    Where it names none, or they are gone, those of the sample.
    """
    files = bundle.config.get("training", {}).get("data", {}).get("pairs", [])
    if files and all(Path(file).exists() for file in files):
        say(f"texts: the train queries of {', '.join(files)}, which the bundle was trained on")
        return _train_queries(
            pl.concat([read_table(file, "pairs") for file in files], how="diagonal_relaxed")
        )
    why = (
        f"{', '.join(files)}, which it was trained on, is not there"
        if files
        else "the bundle's config names no tables of its own"
    )
    say(
        f"note: texts: train queries of the sample data in the package ({why}). Name other data"
        " with --data FOLDER."
    )
    return _train_queries(load_sample(images=False).pairs)


def _train_queries(pairs: pl.DataFrame) -> pl.Series:
    return pairs.filter(pl.col("split") == "train")["query"].unique(maintain_order=True)


def _chosen(queries: pl.Series, texts: int) -> list[str]:
    """Choose at most ``texts`` of the queries.

    Where they are too few for parity, the sample's fill them up, with a note.
    """
    own = _spread(queries, texts)
    if len(own) >= FEWEST_TEXTS:
        return own
    say(
        f"note: texts: only {len(own)} train queries, but parity needs {FEWEST_TEXTS}: queries of"
        " the sample data fill them up"
    )
    more = _train_queries(load_sample(images=False).pairs)
    return own + _spread(more.filter(~more.is_in(own)), texts - len(own))


def _spread(queries: pl.Series, texts: int) -> list[str]:
    """Choose at most ``texts`` queries, evenly over all of them."""
    return list(queries.gather_every(max(1, len(queries) // texts)).to_list()[:texts])
