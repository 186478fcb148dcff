"""`omni embed`: a catalogue through the towers into the signal store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from encoders.commands.console import (
    handle_errors,
    json_option,
    peak_memory_mib,
    print_json,
    print_table,
    say,
)
from encoders.commands.entity_type import EntityTypeName
from encoders.commands.reading_flags import reading_flags
from encoders.errors import ConfigError
from encoders.tables.reading_options import ReadingOptions

if TYPE_CHECKING:
    pass


@click.command(name="embed")
@click.argument("bundle", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--catalogue",
    "catalogues",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help=(
        "Catalogue or query table, or a folder of part files; may be given several times. Parquet"
        " and JSON Lines are streamed."
    ),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the signal store.",
)
@click.option(
    "--entity-type",
    type=EntityTypeName(),
    help="Type of every row where the files have no column entity_type.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1; auto takes a GPU if there is one.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="auto: bf16 on a GPU, else fp32.",
)
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    help="CPU worker threads; 0: as many as PyTorch uses.",
)
@click.option(
    "--batch-rows",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Entities per pass through the tower.",
)
@click.option(
    "--part-rows",
    type=click.IntRange(1),
    default=32_768,
    show_default=True,
    help="Rows per file, and the most a kill can cost.",
)
@json_option
@handle_errors
@reading_flags
def command(
    bundle: Path,
    catalogues: tuple[Path, ...],
    out: Path,
    entity_type: str | None,
    device: str,
    precision: str,
    threads: int,
    batch_rows: int,
    part_rows: int,
    as_json: bool,
    reading: ReadingOptions,
) -> None:
    """Embed a catalogue with a model bundle into the signal store.

    BUNDLE is the folder that `omni train` wrote. Each entity type of the catalogue becomes the
    folder OUT/<type> with Parquet parts (id, embedding, space_id, content_hash, updated_at). The
    new parts replace the old ones when all rows are done: until then readers see the old ones, and
    after a kill the same command goes on where it stopped. Rows whose content did not change are
    not embedded again, unless they were made in another --precision.

    Example: omni embed model --catalogue catalogue.parquet --out signals
    """
    from encoders.inference.batch_embedding import EmbedConfig, columns_read, embed_catalogue
    from encoders.inference.signal_store import SignalStore
    from encoders.tables.parts import table_files
    from encoders.tables.stream import count_rows, stream_catalogue
    from encoders.towers.bundle import load_bundle

    if out.is_file():
        raise ConfigError(f"--out {out} is a file; give a folder")
    config = EmbedConfig(
        device=device,
        precision=precision,
        threads=threads,
        batch_rows=batch_rows,
        part_rows=part_rows,
    )
    config.resolved_device()
    towers = load_bundle(bundle)
    written = max(f.path.stat().st_mtime_ns for path in catalogues for f in table_files(path))
    total = count_rows(catalogues)
    facts = {
        "space": towers.space_id[:16],
        "form": config.form_id(),
        "device": config.resolved_device(),
        "rows": total or "unknown",
    }
    say("  ".join(f"{name} {value}" for name, value in facts.items()))
    chunks = stream_catalogue(
        catalogues,
        columns=columns_read(towers),
        entity_type=entity_type,
        chunk_rows=min(part_rows, 8_192),
        reading=reading,
    )
    store = SignalStore(out, source_written_ns=written)
    report = embed_catalogue(towers, chunks, store, config, total)
    for line in report.notes():
        say(line)
    if as_json:
        print_json(report.as_dict() | {"peak_memory_mib": round(peak_memory_mib(), 1)})
        return
    rows = [
        (name, one.rows, one.embedded, one.unchanged, one.resumed, one.without_features)
        for name, one in report.entity_types.items()
    ]
    print_table(
        f"{out}  space {report.space_id[:16]}",
        ["entity type", "rows", "embedded", "unchanged", "resumed", "no features"],
        rows,
    )
    rate = report.as_dict()["embedded_per_second"] or 0
    say(f"{report.seconds:.1f}s, {rate:,.0f} rows embedded/s, peak {peak_memory_mib():,.0f} MiB")
