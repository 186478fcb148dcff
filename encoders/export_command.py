"""``omni export``: write the ONNX forms of a bundle's query tower and show how close and how fast they are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from encoders.bundle import load_bundle
from encoders.console import data_option, handle_errors, json_option, print_json, print_table
from encoders.exports import FORM_FILES, export_forms
from encoders.sample import load_dataset


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--form", "forms", multiple=True, type=click.Choice(list(FORM_FILES)), help="Form to write; may be repeated. Default: all.")
@click.option("--texts", default=2000, show_default=True, help="Train queries used for calibration and parity.")
@data_option
@json_option
@handle_errors
def command(bundle: Path, forms: tuple[str, ...], texts: int, data_dir: Path | None, as_json: bool) -> None:
    """Export BUNDLE's query tower to ONNX (fp32, int8) into BUNDLE/forms/.

    Each form is measured against the trained tower at several batch sizes and lengths; one that misses its tolerance is not written.

    Example: omni export runs/model
    """
    loaded = load_bundle(bundle)
    queries = load_dataset(data_dir).split("train")["query"].unique(maintain_order=True)
    sample = queries.gather_every(max(1, len(queries) // texts)).to_list()[:texts]
    reports = export_forms(loaded.query_encoder, bundle / "forms", sample, forms or tuple(FORM_FILES))
    if as_json:
        print_json([asdict(report) for report in reports])
        return
    columns = ["form", "MB", "cosine min", "overlap@10", "p50 ms", "torch fp32 p50 ms"]
    rows = [[r.form_id, r.bytes / 1e6, r.cosine_min, r.overlap_at_10, r.p50_ms, r.torch_p50_ms] for r in reports]
    print_table(f"Query tower forms ({reports[0].texts} real queries, one thread, batch 1)", columns, rows)
