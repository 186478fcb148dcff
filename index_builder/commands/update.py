"""``omni update``: apply live upserts and deletes from a file."""

from __future__ import annotations

import time
from pathlib import Path

import click

from encoders.commands.console import handle_errors, json_option, print_json, print_table, say
from encoders.commands.reading_flags import reading_flags
from encoders.tables.reading_options import ReadingOptions
from index_builder.building.update import apply_changes, read_changes
from index_builder.commands.store_option import open_store, store_option
from index_builder.errors import ReleaseNotFound
from index_builder.releases.release import read_manifest


@click.command()
@click.argument("changes", type=click.Path(path_type=Path, exists=True))
@store_option
@click.option(
    "--dry-run", is_flag=True, help="Check the file and say what it would change; write nothing."
)
@json_option
@handle_errors
@reading_flags
def command(
    changes: Path, store_path: Path, dry_run: bool, as_json: bool, reading: ReadingOptions
) -> None:
    """Apply live upserts and deletes from the file CHANGES.

    Running servers answer with them within a second. CHANGES is a table (.jsonl, .csv, .tsv,
    .parquet, .arrow) with the catalogue's columns (id, entity_type, title, ...) and a column op:
    upsert (the default) or delete. Rows are embedded with the active release's towers unless they
    bring an embedding column. The whole file is checked before the first row is written; a row is
    acknowledged only when it is on disk; running the command again does no harm.

    Example: omni update changes.jsonl --store store
    """
    store = open_store(store_path)
    current = store.current()
    if current is None:
        raise ReleaseNotFound(
            f"no release is active in {store.root}; publish one first with `omni rebuild`"
        )
    manifest = read_manifest(store.path_of(current))
    checked = read_changes(changes, manifest, store.live_root, reading)
    counts = checked.counts()
    start = time.perf_counter()
    last: dict[str, int] = {}
    if not dry_run and counts:
        bundle = None
        if checked.upserts.height:
            from encoders.towers.bundle import load_bundle

            say(f"embedding {checked.upserts.height:,} rows with release {current}")
            bundle = load_bundle(store.path_of(current))
        last = apply_changes(checked, store, bundle)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "release_id": current,
                "dry_run": dry_run,
                "changes": counts,
                "last_sequence": last,
                "seconds": round(seconds, 3),
            }
        )
        return
    rows = [
        (entity_type, c["upserts"], c["deletes"], last.get(entity_type))
        for entity_type, c in counts.items()
    ]
    print_table(
        f"{'would be ' if dry_run else ''}written to the live log of {store.root}",
        ("entity type", "upserts", "deletes", "last sequence"),
        rows,
    )
